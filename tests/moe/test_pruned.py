"""A layer that has lost experts is the layer that was built without them; what has gone gets nothing."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from softmoe_cli.model.router import make_layer, make_router
from softmoe_cli.moe.layer import MoE
from softmoe_cli.moe.routing import Router, SparseRouting
from tests.conftest import thinned
from tests.moe.layers import DIM, EXPERTS, HIDDEN, IMAGES, QUIET, TOKENS, layer, tokens
from tests.routers import ROUTERS

BALANCED = {"importance_weight": 0.3, "gshard_weight": 0.2, "load_weight": 0.0, "noise_std": 0.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "soft": ("soft", {"slots_per_expert": 2, "capacity_factor": None}),
    "uniform_soft": ("uniform_soft", {}),
    "tokens_choice": ("tokens_choice", BALANCED | {"k": 2}),
    "tokens_choice, sigmoid": ("tokens_choice", BALANCED | {"gate": "sigmoid"}),
    "tokens_choice, bias": ("tokens_choice", QUIET | {"bias_rate": 0.1, "k": 2, "renormalise": True}),
    "tokens_choice, groups": ("tokens_choice", BALANCED | {"images_per_group": 2}),
    "tokens_choice_bpr": ("tokens_choice_bpr", BALANCED),
    "tokens_choice_dropless": ("tokens_choice_dropless", BALANCED | {"k": 2, "shared_experts": 1}),
    "image_choice": ("image_choice", BALANCED | {"k": 2, "renormalise": True}),
    "experts_choice": ("experts_choice", {"noise_std": 0.0}),
    "experts_choice, renormalised": ("experts_choice", {"noise_std": 0.0, "renormalise": True}),
}
PRUNABLE = sorted({router for router, _ in CASES.values()} & ROUTERS.keys())


def built(moe: MoE, router: str, changes: dict[str, Any]) -> MoE:
    """A layer of the experts that are left, with their weights."""
    options = ROUTERS[router] | {"num_experts": EXPERTS}
    options |= {key: value for key, value in changes.items() if key in options}
    options |= {key: value for key, value in moe.router.options_left().items() if key in options}
    new = make_layer(options, DIM, HIDDEN, TOKENS, gelu="tanh", identical=False).double()
    assert isinstance(new, MoE)
    new.load_state_dict(moe.weights_left())
    return new


def test_every_router_says_whether_it_can_be_pruned() -> None:
    said = {name: make_router(options, 16, 16) for name, options in ROUTERS.items()}
    assert sorted(name for name, router in said.items() if router.unprunable is None) == PRUNABLE
    assert all(isinstance(router, Router) for name, router in said.items() if name in PRUNABLE)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("left", [[1], [0, 2]])
def test_what_is_left_is_the_layer_built_without_the_others(name: str, left: list[int]) -> None:
    """Outputs, gradients, auxiliary losses, the balancing bias, statistics and cost: soft with q experts left is a soft
    layer with those q experts' slots."""
    router, changes = CASES[name]
    moe = layer(router, **changes).train()
    moe.prunable()
    moe.leave(left)
    new = built(moe, router, changes).train()
    x = tokens()
    made, seen = [], []
    for each in (moe, new):
        hook = each.router.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
        made.append(each(x.clone()))
        hook.remove()
        (made[-1].square().sum() + seen[-1].aux_loss).backward()
    assert torch.equal(*made) and torch.equal(seen[0].aux_loss, seen[1].aux_loss)
    assert seen[0].statistics() == seen[1].statistics()
    assert moe.flop_by_part(TOKENS) == new.flop_by_part(TOKENS) and moe.rows(TOKENS) == new.rows(TOKENS)
    for each in (moe, new):
        each.router.after_update()
    kept = moe.weights_left()
    assert all(torch.equal(kept[key], value) for key, value in new.state_dict().items())
    axes = {f"router.{key}": axis for key, axis in moe.router.expert_axes.items()}
    axes |= {f"experts.{key}": 0 for key in ("w1", "b1", "w2", "b2")}
    gone, expected = [e for e in range(EXPERTS) if e not in left], dict(new.named_parameters())
    for key, parameter in moe.named_parameters():
        assert parameter.grad is not None
        grad = parameter.grad
        if key in axes:
            assert not grad.index_select(axes[key], torch.tensor(gone)).any(), "what has gone gets no gradient"
            grad = grad.index_select(axes[key], torch.tensor(left))
        torch.testing.assert_close(grad, expected[key].grad, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", thinned(CASES, 4))
def test_the_mask_is_in_the_weights(name: str) -> None:
    """A layer that loads them has the same experts; without experts gone it is the layer that it was."""
    router, changes = CASES[name]
    moe, x = layer(router, **changes), tokens()
    whole = moe(x)
    moe.prunable()
    assert torch.equal(moe(x), whole) and moe.state_dict()["alive"].all()
    moe.leave([0, 2])
    again = layer(router, **changes)
    again.prunable()
    again.load_state_dict(moe.state_dict())
    assert again.left == [0, 2] and torch.equal(again(x), moe(x))
    moe.leave([2])
    assert moe.left == [2] and moe.fixed_options() == again.fixed_options() == layer(router, **changes).fixed_options()


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("soft", "uniform_soft")])
def test_no_score_for_what_has_gone(name: str) -> None:
    """Scores are of those that are left, and against a slow count of what each one's tokens get."""
    router, changes = CASES[name]
    moe = layer(router, **changes)
    moe.prunable()
    for left in ([0, 1, 2], [0, 2]):
        moe.leave(left)
        routing = moe.router(tokens())
        gates, hits = slow_scores(routing, len(left))
        torch.testing.assert_close(routing.measured("alpha_score"), torch.tensor(gates, dtype=torch.float64))
        assert routing.measured("hit_rate").tolist() == hits


def slow_scores(routing: Any, experts: int) -> tuple[list[float], list[int]]:
    gates, hits, nothing = [0.0] * experts, [0] * experts, IMAGES * TOKENS
    if routing.offsets is None:
        rows = [(e, *row) for e in range(experts)
                for row in zip(routing.token[e].tolist(), routing.gate[e].tolist(), strict=True)]  # fmt: skip
    else:
        ends = [0, *routing.offsets.tolist()]
        owners = [e for e in range(experts) for _ in range(ends[e], ends[e + 1])]
        rows = list(zip(owners, routing.token.tolist(), routing.gate.tolist(), strict=True))
    for expert, token, gate in rows:
        if token < nothing:
            gates[expert], hits[expert] = gates[expert] + gate, hits[expert] + 1
    return gates, hits


def test_hit_rate_and_alpha_score_disagree() -> None:
    """60 tokens at gate 0.4 and 40 at gate 0.9: the first expert has more tokens, the second more of them."""
    token, zeros = torch.arange(100), torch.zeros(())
    gate = torch.cat([torch.full((60,), 0.4), torch.full((40,), 0.9)]).double()
    routing = SparseRouting(token, gate, zeros, torch.tensor([60, 40]), (1, 100), torch.tensor([60, 100]))
    assert routing.measured("hit_rate").tolist() == [60, 40]
    assert routing.measured("alpha_score").tolist() == pytest.approx([24, 36])


def dropped(routing: Any) -> int:
    return int(routing.demand.sum()) - int((routing.token < IMAGES * TOKENS).sum())


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("k", [1, 2])
def test_no_more_choices_are_dropped_than_with_all(k: int, images: int) -> None:
    """Whichever experts go, one after the other; and with one left every token has a slot."""
    torch.manual_seed(3)
    options = ROUTERS["tokens_choice"] | QUIET | {
        "num_experts": 5, "k": k, "images_per_group": images, "slots_per_expert": 2, "capacity_factor": None,
    }  # fmt: skip
    moe = make_layer(options, DIM, HIDDEN, TOKENS, gelu="tanh", identical=False).double()
    assert isinstance(moe, MoE)
    moe.prunable()
    with torch.no_grad():
        moe.router.get_parameter("gate.kernel").normal_(std=2.0)
    x = tokens()
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 7):
        moe.leave(order)
        whole = dropped(moe.router(x))
        for gone in range(1, 5):
            moe.leave(order[gone:])
            now = dropped(moe.router(x))
            assert now <= whole
        assert now == 0 and moe.router(x).statistics()["dropped_share"] == 0


def test_experts_choice_with_one_left_takes_every_token() -> None:
    moe = layer("experts_choice", noise_std=0.0)
    moe.prunable()
    moe.leave([1])
    routing = moe.router(tokens())
    assert routing.statistics()["dropped_share"] == 0 and torch.equal(routing.gate, torch.ones_like(routing.gate))


def test_balancing_can_end_with_the_first_that_goes() -> None:
    moe = layer(
        "tokens_choice_dropless", importance_weight=0.3, load_weight=0.0, noise_std=0.0, bias_rate=0.1, k=1
    ).train()
    moe.prunable(balance=False)
    assert moe.router(tokens()).aux_loss > 0
    moe.router.after_update()
    bias = moe.router.get_buffer("balance.bias").clone()
    assert bias.any()
    moe.leave([0, 2])
    assert moe.router(tokens()).aux_loss == 0
    moe.router.after_update()
    assert torch.equal(moe.router.get_buffer("balance.bias"), bias)


def test_a_planted_expert_stays() -> None:
    """Gates are made so that one expert has 60% of their sum."""
    logits = torch.log(torch.tensor([0.2, 0.6, 0.2], dtype=torch.float64))
    moe = layer("soft", slots_per_expert=1, capacity_factor=None)
    x = tokens()

    def planted(_module: Any, _inputs: Any, routing: Any) -> None:
        routing.combine_weights = logits.exp().expand(IMAGES, TOKENS, 3)[..., None]

    moe.router.register_forward_hook(planted)
    seen: list[Tensor] = []
    moe.router.register_forward_hook(lambda _module, _inputs, routing: seen.append(routing.measured("alpha_score")))
    moe(x)
    share = seen[0] / seen[0].sum()
    assert share[1].item() == pytest.approx(0.6) and seen[0].argmax() == 1
