"""What several routers share: losses, noise, capacity, statistics, fixed weights, refusals."""

import math
from typing import Any

import pytest
import torch

from softmoe_cli.model.router import make_router
from softmoe_cli.moe.routing import SparseRouting, load_statistics
from softmoe_cli.moe.sparse import gshard_loss, importance_loss, load_loss, squared_variation
from tests import oracles
from tests.moe.layers import DIM, EXPERTS, IMAGES, QUIET, TOKENS, close, expert_weights, gates_of, layer, tokens
from tests.routers import ROUTERS


@pytest.mark.parametrize("router", ["uniform", "soft_uniform", "uniform_soft"])
def test_fixed_routings_of_the_paper(router: str) -> None:
    """Learned weights as the soft oracle has them, fixed ones 1/n and 1/(e p)."""
    p = 2
    moe, x = layer(router, slots_per_expert=p), tokens()
    weights = dict(moe.router.named_parameters())
    phi = weights["phi"].tolist() if weights else [[[0.0] * p for _ in range(EXPERTS)] for _ in range(DIM)]
    scale = weights["scale"].item() if weights else 1.0
    for image, out in zip(x, moe(x), strict=True):
        soft = oracles.soft_moe(image.tolist(), phi, scale, *expert_weights(moe))
        if router in ("uniform", "uniform_soft"):
            mean = image.mean(dim=0).tolist()
            outputs = [[oracles.mlp(mean, *(w[i] for w in expert_weights(moe)))] * p for i in range(EXPERTS)]
        else:
            outputs = soft.outputs
        flat = torch.tensor(outputs, dtype=torch.float64).flatten(0, 1)
        if router in ("uniform", "soft_uniform"):
            want = flat.mean(dim=0).expand(TOKENS, DIM)
        else:
            want = torch.tensor(soft.combine, dtype=torch.float64).flatten(1) @ flat
        close(out, want.tolist())


@pytest.mark.parametrize("k", [1, 2])
def test_auxiliary_losses(k: int) -> None:
    generator = torch.Generator().manual_seed(2)
    clean = torch.randn(2, 6, EXPERTS, dtype=torch.float64, generator=generator)
    noisy = clean + 0.3 * torch.randn(2, 6, EXPERTS, dtype=torch.float64, generator=generator)
    gates, keep = noisy.softmax(dim=2), torch.ones(2, 6, dtype=torch.bool)
    close(importance_loss(gates), [oracles.importance_loss(group) for group in gates.tolist()])
    close(gshard_loss(gates, keep), [oracles.gshard_loss(group) for group in gates.tolist()])
    pairs = zip(clean.tolist(), noisy.tolist(), strict=True)
    close(load_loss(clean, noisy, 0.3, k, keep), [oracles.load_loss(quiet, loud, 0.3, k) for quiet, loud in pairs])


@pytest.mark.parametrize("router", ["tokens_choice", "tokens_choice_dropless"])
def test_sigmoid_gates_are_balanced_by_their_shares(router: str) -> None:
    """Smaller gates alone are no smaller loss."""
    moe, x = layer(router, gate="sigmoid", **QUIET | {"gshard_weight": 0.25}), tokens()
    shares = [[[g / sum(row) for g in row] for row in gates_of(moe, image, "sigmoid")] for image in x]
    want = sum(0.25 * oracles.gshard_loss(group) for group in shares) / len(shares)
    assert moe.router(x).aux_loss.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("router", ["tokens_choice", "experts_choice"])
def test_gate_noise_is_drawn_in_training_only_and_divided_by_the_experts(router: str) -> None:
    moe = layer(router, noise_std=6.0)
    gate, x = moe.router.get_submodule("gate"), torch.randn(50, 40, DIM, dtype=torch.float64)
    clean, quiet = gate.eval()(x)
    assert clean is quiet
    clean, noisy = gate.train()(x)
    assert (noisy - clean).std().item() == pytest.approx(6.0 / EXPERTS, rel=0.03)


@pytest.mark.parametrize("router", ["tokens_choice", "tokens_choice_dropless"])
def test_shared_experts_see_every_token(router: str) -> None:
    moe, x = layer(router, shared_experts=2, **QUIET), tokens()
    assert moe.shared is not None
    both = moe(x)
    w1, b1, w2, b2 = (parameter.tolist()[0] for parameter in moe.shared.parameters())
    moe.shared = None
    want = [[oracles.mlp(token, w1, b1, w2, b2) for token in image] for image in x.tolist()]
    close(both - moe(x), want)


def test_fair_capacity_gives_every_router_the_same_slots() -> None:
    """196 tokens: with rounding and no multiple the sparse routers have the slots that the soft ones have."""
    for experts, slots in ((32, 6), (64, 3), (128, 2)):
        for name, options in ROUTERS.items():
            if "slots_per_expert" in options and "capacity_factor" in options:
                fair = options | {"num_experts": experts, "slots_per_expert": None, "capacity_factor": 1.0}
                assert make_router(fair, DIM, 196).slots_per_expert == slots, name


@pytest.mark.parametrize("router", ["tokens_choice", "tokens_choice_dropless"])
def test_padding_is_not_asked_for_and_alone_has_no_loss(router: str) -> None:
    weights = {"importance_weight": 0.5, "gshard_weight": 0.5, "load_weight": 0.5}
    moe, x = layer(router, k=2, noise_std=1.0, **weights), tokens()
    keep = torch.zeros(IMAGES, TOKENS, dtype=torch.bool)
    keep[0, :3] = True
    assert int(moe.router.train()(x, keep).demand.sum()) == 2 * 3
    loss = moe.router(x, keep).aux_loss
    loss.backward()
    gradient = moe.router.get_parameter("gate.kernel").grad
    assert gradient is not None and gradient.isfinite().all() and loss.isfinite()
    assert squared_variation(torch.zeros(1, EXPERTS)).item() == 0


def test_load_statistics() -> None:
    load = torch.tensor([6.0, 2.0, 0.0, 0.0])
    numbers = load_statistics(load)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert numbers == pytest.approx(
        {"dead_share": 0.5, "load_max": 3.0, "effective_experts_share": math.exp(entropy) / 4}, rel=1e-12
    )


def test_sparse_statistics_by_hand() -> None:
    """Two experts of two slots, three tokens: 0 and 2 at the first expert, 0 again at the second, 1 dropped."""
    token = torch.tensor([[0, 2], [0, 3]])
    gate = torch.tensor([[0.5, 0.25], [0.3, 0.0]])
    routing = SparseRouting(token, gate, torch.zeros(()), torch.tensor([3, 1]), (1, 3))
    numbers = routing.statistics()
    assert numbers["utilisation"] == 0.75
    assert numbers["dropped_share"] == pytest.approx(1 / 3)
    assert numbers["gate_mean"] == pytest.approx(1.05 / 3)
    assert numbers["load_max"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("router", "changes", "words"),
    [
        ("tokens_choice", {"k": 0}, "k=0 experts per token must be from 1 to num_experts=3"),
        ("tokens_choice", {"k": 4}, "k=4 experts per token"),
        ("tokens_choice", {"images_per_group": 0}, "images_per_group=0 must be at least 1"),
        ("tokens_choice", {"gate": "tanh"}, "gate=tanh is not one of softmax, sigmoid"),
        ("tokens_choice", {"renormalise": True}, "with k=1 makes every gate 1"),
        ("tokens_choice", {"noise_std": 0.0}, "load_weight=0.005 has no effect with noise_std=0"),
        ("tokens_choice", {"bias_rate": -1.0}, "bias_rate=-1.0 must not be negative"),
        ("tokens_choice", {"bias_rate": 0.1}, "bias_rate=0.1 with load_weight=0.005"),
        ("tokens_choice", {"noise_std": math.nan}, "noise_std=nan must not be negative"),
        ("tokens_choice", {"shared_experts": -1}, "shared_experts=-1 must not be negative"),
        ("tokens_choice", {"capacity_rounding": "floor"}, "capacity_rounding=floor is not one of ceil, round"),
        ("tokens_choice", {"capacity_factor": 0.01}, "gives 0 slots per expert"),
        ("tokens_choice", {"capacity_factor": math.inf}, "capacity_factor=inf is not a finite number"),
        ("experts_choice", {"slots_per_expert": 8, "capacity_factor": None}, "a group has 7 tokens to choose from"),
        ("experts_choice", {"slots_per_expert": 2}, "give one of them"),
        ("identity", {"num_experts": 8}, "num_experts=8 must be from 1 to the 7 tokens"),
        ("uniform", {"slots_per_expert": 0}, "must be at least 1"),
        ("tokens_choice", {"bias_rate": math.inf}, "model.router.bias_rate=inf is not a finite number"),
        ("tokens_choice_dropless", {"images_per_group": 2**31}, "images_per_group=2147483648 is out of range"),
        ("mumoe_tr", {"rank": [2, 2**40, 2]}, "is out of range: it must be <= 2147483647"),
        ("uniform", {"slots_per_expert": 10**9}, r"compute 3e\+09 rows of an image, and 2147483647 are the most"),
        ("zero_computation", {"capacity_factor": 2e9}, "rows of an image, and 2147483647 are the most"),
    ],
)
def test_impossible_routers_are_refused(router: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words):
        layer(router, **changes)
