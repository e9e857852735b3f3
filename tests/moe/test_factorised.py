"""Factorised layers against the whole tensor of their experts, their special cases, and what a batch may not change."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from softmoe_cli.model.router import make_layer
from softmoe_cli.moe.coefficients import Coefficients, entmax15
from softmoe_cli.moe.factorised import Factorised, FactorisedRouter, Maps
from tests.routers import ROUTERS

DIM, HIDDEN, TOKENS, IMAGES, EXPERTS = 5, 7, 6, 3, 4
RANKS: dict[str, Any] = {"mumoe_cp": 9, "mumoe_tr": [3, 2, 5]}
RANKS_2: dict[str, Any] = {"mumoe_cp": 9, "mumoe_tr": [3, 2, 3, 4]}
every_kind = pytest.mark.parametrize("name", [name for name in RANKS if name in ROUTERS])


def layer(name: str, **changes: Any) -> Factorised:
    """A float64 layer in evaluation mode whose parameters and running means are all random."""
    torch.manual_seed(0)
    rank = RANKS_2[name] if changes.get("num_experts_2") else RANKS[name]
    options = ROUTERS[name] | {"num_experts": EXPERTS, "rank": rank} | changes
    made = make_layer(options, DIM, HIDDEN, TOKENS, gelu="none", identical=False).double()
    assert isinstance(made, Factorised)
    with torch.no_grad():
        for tensor in made.state_dict().values():
            tensor.normal_(std=0.7)
            if tensor.ndim == 1:
                tensor.abs_()
    return made.eval()


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(IMAGES, TOKENS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.detach(), want.detach(), atol=1e-12, rtol=1e-12)


def factors(maps: Maps) -> list[Tensor]:
    return [*maps.get_submodule("of_experts").parameters(), maps.of_input, maps.of_output]


def whole(maps: Maps) -> Tensor:
    """The tensor of all experts' matrices: e i o, or e f i o with two levels; its last row of i is the bias."""
    parts, levels = factors(maps), len(factors(maps)) - 2
    modes = "efio" if levels == 2 else "eio"
    if parts[0].ndim == 2:
        terms = [f"{mode}r" for mode in modes]
    else:
        terms = [f"{mode}{a}{b}" for mode, a, b in zip(modes, "abcd", "bcda" if levels == 2 else "bca", strict=False)]
    return torch.einsum(f"{','.join(terms)}->{modes}", *parts)


def by_experts(maps: Maps, x: Tensor, levels: tuple[Tensor, ...]) -> Tensor:
    """Every token by every expert's own matrix, one after the other."""
    tensor, y = whole(maps), torch.zeros(*x.shape[:2], len(maps.of_output))
    y = y.to(x.dtype)
    if maps.bias:
        x = torch.cat([x, torch.ones_like(x[..., :1])], dim=2)
    for place in product(*(range(level.shape[2]) for level in levels)):
        share = math.prod(level[..., expert, None] for level, expert in zip(levels, place, strict=True))
        y = y + share * (x @ tensor[place])
    return y


def by_hand(made: Factorised, x: Tensor) -> Tensor:
    experts, levels = made.experts, made.router(x).levels
    inner = x if experts.norm is None else F.layer_norm(x, (DIM,), experts.norm.weight, experts.norm.bias, 1e-5)
    hidden = by_experts(experts.first, inner, levels)
    return by_experts(experts.second, 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))), levels)


# --- entmax -----------------------------------------------------------------------------------------------------------


def slow_entmax15(row: list[float]) -> list[float]:
    """By halving an interval that holds the threshold."""
    low, high = max(row) / 2 - 1, max(row) / 2
    for _ in range(200):
        middle = (low + high) / 2
        if sum(max(value / 2 - middle, 0) ** 2 for value in row) > 1:
            low = middle
        else:
            high = middle
    return [max(value / 2 - low, 0) ** 2 for value in row]


@pytest.mark.parametrize("experts", [1, 2, 9, 64, 1000])
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 4.0, 100.0])
def test_entmax_is_what_its_definition_says(scale: float, experts: int) -> None:
    rows = scale * torch.randn(20, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows[10:, experts // 2 :] -= 50  # far below the others, which the mean is not
    shares = entmax15(rows)
    for row, got in zip(rows.tolist(), shares.tolist(), strict=True):
        assert got == pytest.approx(slow_entmax15(row), abs=1e-12)
    near(shares.sum(dim=1), torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close(entmax15(rows + 7), shares, atol=1e-10, rtol=0)
    assert entmax15(torch.tensor([0.0, -2.0, -2.5])).tolist() == [1, 0, 0]


def test_gradient_of_entmax() -> None:
    rows = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    assert torch.autograd.gradcheck(entmax15, (rows,), atol=1e-6)


# --- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {}, {"norm": "layer", "gate": "softmax"}, {"bias": False}, {"input_norm": True}, {"num_experts_2": 3},
        {"num_experts_2": 2, "norm": "layer", "bias": False}, {"num_experts": 1},
    ],
    ids=str,
)  # fmt: skip
@every_kind
def test_a_token_gets_the_mean_of_all_experts(name: str, options: dict[str, Any]) -> None:
    made, x = layer(name, **options), tokens()
    near(made(x), by_hand(made, x))
    made.train()
    near(made(x), by_hand(made, x))


@every_kind
def test_one_expert_is_a_linear_map_of_low_rank(name: str) -> None:
    made, x = layer(name, num_experts=1), tokens().requires_grad_()
    made.train()(x).sum().backward()
    kernel = made.router.get_parameter("levels.0.kernel")
    assert kernel.grad is not None and not kernel.grad.any()
    (matrix,) = whole(made.experts.first)
    near(made.experts.first(x, made.router(x).levels), x @ matrix[:-1] + matrix[-1])


@every_kind
def test_equal_experts_do_not_need_the_gate(name: str) -> None:
    made, x = layer(name), tokens()
    first = torch.zeros(EXPERTS, dtype=torch.int64)
    for maps in (made.experts.first, made.experts.second):
        factor = factors(maps)[0]
        factor.data.copy_(factor.data[first])
    before = made(x)
    made.router.get_parameter("levels.0.kernel").data.normal_()
    near(made(x), before)


def test_full_rank_cp_is_any_mixture_of_linear_experts() -> None:
    made, x = layer("mumoe_cp", rank=EXPERTS * (DIM + 1)), tokens()
    maps, levels = made.experts.first, made.router(x).levels
    wanted = torch.randn(EXPERTS, DIM + 1, HIDDEN, dtype=torch.float64)
    of_experts, of_input, of_output = factors(maps)
    of_experts.data.copy_(torch.eye(EXPERTS).repeat_interleave(DIM + 1, dim=1))
    of_input.data.copy_(torch.eye(DIM + 1).repeat(1, EXPERTS))
    of_output.data.copy_(wanted.flatten(0, 1).T)
    with_one = torch.cat([x, torch.ones_like(x[..., :1])], dim=2)
    near(maps(x, levels), torch.einsum("eio,bne,bni->bno", wanted, levels[0], with_one))


def test_a_ring_of_diagonal_matrices_is_cp() -> None:
    r = 4
    cp, tr, x = layer("mumoe_cp", rank=r), layer("mumoe_tr", rank=[r, r, r]), tokens()
    for theirs, ours in ((cp.experts.first, tr.experts.first), (cp.experts.second, tr.experts.second)):
        for matrix, core in zip(factors(theirs), factors(ours), strict=True):
            core.data.copy_(torch.einsum("jr,rs->jrs", matrix.data, torch.eye(r, dtype=torch.float64)))
    tr.router.load_state_dict(cp.router.state_dict())
    near(tr(x), cp(x))


def test_a_train_of_ranks_one_has_experts_that_differ_by_a_number() -> None:
    made, x = layer("mumoe_tr", rank=[1, 1, 5]), tokens()
    maps, levels = made.experts.first, made.router(x).levels
    of_experts, of_input, of_output = (core.detach() for core in factors(maps))
    with_one = torch.cat([x, torch.ones_like(x[..., :1])], dim=2)
    shared = with_one @ of_input[:, 0] @ of_output[:, :, 0].T
    near(maps(x, levels), (levels[0] @ of_experts[:, 0]) * shared)


@every_kind
def test_all_of_a_token_to_one_expert_is_that_experts_linear_layer(name: str) -> None:
    made, x = layer(name), tokens()
    maps = made.experts.first
    for expert in range(EXPERTS):
        own = nn.Linear(DIM, HIDDEN).double()
        own.weight.data.copy_(whole(maps)[expert, :DIM].T)
        own.bias.data.copy_(whole(maps)[expert, DIM])
        alone = F.one_hot(torch.full((IMAGES, TOKENS), expert), EXPERTS).double()
        near(maps(x, (alone,)), own(x))


@every_kind
def test_without_a_gate_it_is_the_mean_expert(name: str) -> None:
    """As at the start: the gate's kernel is zero."""
    made, x = layer(name), tokens()
    made.router.get_parameter("levels.0.kernel").data.zero_()
    made.train()
    levels = made.router(x).levels
    assert torch.equal(levels[0], torch.full_like(levels[0], 1 / EXPERTS))
    mean = whole(made.experts.first).mean(dim=0)
    near(made.experts.first(x, levels), x @ mean[:-1] + mean[-1])


def test_a_second_level_of_one_is_none() -> None:
    one, two, x = layer("mumoe_cp"), layer("mumoe_cp", num_experts_2=1), tokens()
    for maps, other in ((one.experts.first, two.experts.first), (one.experts.second, two.experts.second)):
        first, of_input, of_output = factors(maps)
        for ours, theirs in zip(factors(other), (first, torch.ones(1, 9), of_input, of_output), strict=True):
            ours.data.copy_(theirs.data)
    two.router.load_state_dict(two.router.state_dict() | one.router.state_dict())
    near(two(x), one(x))


@every_kind
def test_two_levels_are_one_of_all_pairs(name: str) -> None:
    made, x = layer(name, num_experts_2=3), tokens()
    first, second = made.router(x).levels
    pairs = (first[..., :, None] * second[..., None, :]).flatten(2)
    with_one = torch.cat([x, torch.ones_like(x[..., :1])], dim=2)
    tensor = whole(made.experts.first).flatten(0, 1)
    near(made.experts.first(x, (first, second)), torch.einsum("eio,bne,bni->bno", tensor, pairs, with_one))


# --- invariants -------------------------------------------------------------------------------------------------------


@every_kind
def test_the_order_of_experts_means_nothing(name: str) -> None:
    made, x = layer(name), tokens()
    before, order = made(x), torch.tensor([2, 0, 3, 1])
    state = made.state_dict()
    state |= {key: value[..., order] for key, value in state.items() if key.startswith("router.")}
    state |= {key: value[order] for key, value in state.items() if "of_experts" in key}
    made.load_state_dict(state)
    near(made(x), before)


def test_directions_of_cp_can_be_turned_and_stretched() -> None:
    made, x = layer("mumoe_cp"), tokens()
    before, order = made(x), torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for factor in factors(made.experts.first):
        factor.data.copy_(factor.data[:, order])
    of_experts, _, of_output = factors(made.experts.first)
    of_experts.data[:, 2] *= 3
    of_output.data[:, 2] /= 3
    near(made(x), before)


def test_a_matrix_and_its_inverse_between_cores_cancel() -> None:
    made, x = layer("mumoe_tr"), tokens()
    before = made(x)
    cores = factors(made.experts.first)
    for i, core in enumerate(cores):
        following = cores[(i + 1) % 3]
        turn = torch.randn(core.shape[2], core.shape[2], dtype=torch.float64) + 3 * torch.eye(core.shape[2])
        core.data.copy_(core.data @ turn)
        following.data.copy_(turn.inverse() @ following.data)
    torch.testing.assert_close(made(x), before, atol=1e-9, rtol=1e-9)


@every_kind
def test_maps_are_linear_in_each_factor(name: str) -> None:
    made, x = layer(name), tokens()
    levels, maps = made.router(x).levels, made.experts.first
    before = maps(x, levels)
    for factor in factors(maps):
        factor.data *= 2
        near(maps(x, levels), 2 * before)
        factor.data /= 2


@every_kind
def test_an_expert_that_is_silent_has_no_weights(name: str) -> None:
    made, x = layer(name), tokens()
    with made.silenced([0, 2]):
        silent = made(x)
    for maps in (made.experts.first, made.experts.second):
        factors(maps)[0].data[[0, 2]] = 0
    near(silent, made(x))
    assert not made.experts._forward_pre_hooks


@every_kind
def test_an_image_is_classified_by_itself(name: str) -> None:
    made, x = layer(name), tokens()
    near(made(x[1:2]), made(x)[1:2])
    made.train()
    assert (made(x[1:2]) - made(x)[1:2]).abs().max() > 1e-3, "in training the batch is normalised together"
    alone = layer(name, norm="layer").train()
    near(alone(x[1:2]), alone(x)[1:2])


# --- a batch, its parts and its processes -----------------------------------------------------------------------------


def moved(made: Factorised) -> tuple[Tensor, Tensor]:
    """The running means and variances after an update."""
    made.router.after_update()
    return made.router.get_buffer("levels.0.norm.mean"), made.router.get_buffer("levels.0.norm.variance")


@every_kind
def test_batch_norm_is_torchs(name: str) -> None:
    """In training, of padding too, and in its running means, whose variance is unbiased."""
    made, x = layer(name), tokens()
    norm = nn.BatchNorm1d(EXPERTS, affine=False).double()
    norm.running_mean, norm.running_var = (
        made.router.get_buffer(f"levels.0.norm.{key}").clone() for key in ("mean", "variance")
    )
    made.train()
    keep = torch.ones(IMAGES, TOKENS, dtype=torch.bool)
    keep[0, 4:] = False
    for mask in (None, keep):
        kept = x.flatten(0, 1) if mask is None else x[mask]
        want = norm(kept @ made.router.get_parameter("levels.0.kernel"))
        levels = made.router(x, mask).levels
        near(levels[0].flatten(0, 1) if mask is None else levels[0][mask], entmax15(want))
        for got, running in zip(moved(made), (norm.running_mean, norm.running_var), strict=True):
            near(got, running)
    near(want.mean(dim=0), torch.zeros(EXPERTS, dtype=torch.float64))


@every_kind
def test_recomputation_moves_running_means_once(name: str) -> None:
    made, x = layer(name).train(), tokens()
    other = layer(name).train()
    made(x).sum().backward()
    checkpoint(other, x, use_reentrant=False).sum().backward()
    for got, want in zip(moved(other), moved(made), strict=True):
        assert torch.equal(got, want)
    for got, want in zip(other.parameters(), made.parameters(), strict=True):
        assert got.grad is not None and want.grad is not None
        assert torch.equal(got.grad, want.grad)


@every_kind
def test_running_means_are_kept_and_stand_still_between_updates(name: str) -> None:
    made, x = layer(name).train(), tokens()
    before = made.state_dict()
    assert {f"router.levels.0.norm.{key}" for key in ("mean", "variance")} < before.keys()
    before = {key: value.clone() for key, value in before.items()}
    made(x)
    made.eval()(x)
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())
    moved(made)
    assert not torch.equal(made.state_dict()["router.levels.0.norm.mean"], before["router.levels.0.norm.mean"])


@every_kind
def test_a_frozen_gate_goes_by_its_running_means(name: str) -> None:
    made, x = layer(name), tokens()
    evaluated = made(x)
    made.router.requires_grad_(False)
    near(made.train()(x), evaluated)


@every_kind
def test_a_frozen_level_stands_still_beside_one_that_learns(name: str) -> None:
    made = layer(name, num_experts_2=2).train()
    made.router.get_parameter("levels.0.kernel").requires_grad_(False)
    before = {key: value.clone() for key, value in made.state_dict().items()}
    made(tokens())
    made.router.after_update()
    after = made.state_dict()
    assert torch.equal(after["router.levels.0.norm.mean"], before["router.levels.0.norm.mean"])
    assert not torch.equal(after["router.levels.1.norm.mean"], before["router.levels.1.norm.mean"])


@every_kind
def test_one_token_has_no_variance(name: str) -> None:
    made = layer(name).train()
    with pytest.raises(ValueError, match="norm=batch has no variance over one token; use a larger batch or norm=layer"):
        made(tokens()[:1, :1])


# --- sizes, first values, statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_experts", "second"), [(64, None), (16, None), (8, 8)])
@every_kind
def test_a_matched_rank_is_the_smallest_with_the_parameters_of_the_mlp(
    name: str, num_experts: int, second: int | None
) -> None:
    d, h = 64, 256
    options = ROUTERS[name] | {"num_experts": num_experts, "num_experts_2": second, "rank": "matched"}
    made = make_layer(options, d, h, 1, gelu="none", identical=False)
    rank = made.fixed_options()["rank"]
    smaller = rank - 1 if isinstance(rank, int) else [*rank[:-1], rank[-1] - 1]
    less = make_layer(options | {"rank": smaller}, d, h, 1, gelu="none", identical=False)
    wanted = sum(parameter.numel() for parameter in nn.Sequential(nn.Linear(d, h), nn.Linear(h, d)).parameters())
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (less, made)]
    assert sizes[0] < wanted <= sizes[1]


@every_kind
def test_a_gate_larger_than_the_mlp_leaves_no_rank(name: str) -> None:
    options = ROUTERS[name] | {"num_experts": 1000, "rank": "matched"}
    with pytest.raises(Exception, match=r"num_experts=1000: whatever the rank, .* use fewer experts, or a number"):
        make_layer(options, 64, 256, 1, gelu="none", identical=False)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("mumoe_cp", {"num_experts": 0}, "num_experts=0 must be at least 1"),
        ("mumoe_cp", {"num_experts_2": 0}, "num_experts_2=0 must be at least 1"),
        ("mumoe_cp", {"gate": "sparsemax"}, "gate=sparsemax is not one of entmax15, softmax"),
        ("mumoe_cp", {"norm": "group"}, "norm=group is not one of batch, layer"),
        ("mumoe_cp", {"rank": 0}, "rank=0 must be at least 1, or matched"),
        ("mumoe_cp", {"rank": "half"}, "rank=half is of type str; it must be int or matched"),
        ("mumoe_tr", {"rank": [4, 4]}, r"rank=\[4, 4\] must be matched or 3 whole numbers"),
        ("mumoe_tr", {"rank": [4, 0, 4]}, r"must be matched or 3 whole numbers from 1 on, such as \[4,4,37\]"),
        ("mumoe_tr", {"num_experts_2": 2, "rank": [4, 4, 4]}, "must be matched or 4 whole numbers"),
    ],
)
def test_impossible_factorised_routers_are_refused(name: str, changes: dict[str, Any], words: str) -> None:
    if name in ROUTERS:
        with pytest.raises(Exception, match=words):
            make_layer(ROUTERS[name] | {"rank": RANKS[name]} | changes, 5, 7, 1, gelu="none", identical=False)


@every_kind
def test_first_values_are_the_official_ones(name: str) -> None:
    torch.manual_seed(0)
    d, h, e = 40, 160, 50
    rank: Any = 60 if name == "mumoe_cp" else [3, 4, 20]
    options = ROUTERS[name] | {"num_experts": e, "rank": rank}
    made = make_layer(options, d, h, 1, gelu="none", identical=False)
    assert isinstance(made, Factorised)
    assert not made.router.get_parameter("levels.0.kernel").any()
    of_experts, of_input, of_output = factors(made.experts.first)
    shares = of_experts if name == "mumoe_cp" else of_experts.diagonal(dim1=1, dim2=2)
    assert shares.mean().item() == pytest.approx(1, abs=0.25) and shares.std().item() == pytest.approx(1, abs=0.1)
    if name == "mumoe_tr":
        assert of_experts.count_nonzero() == shares.numel(), "diagonal"
    for factor, fan in ((of_input, d), (of_output, 60)):
        bound = 1 / math.sqrt(fan)
        assert 0.99 * bound < factor.abs().max() <= bound
        assert factor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    further = factors(make_layer(options | {"num_experts_2": 3, "rank": RANKS_2[name]}, d, h, 1, gelu="none",
                                 identical=False).experts.first)[1]  # type: ignore[arg-type]  # fmt: skip
    want = torch.ones(3, 9) if name == "mumoe_cp" else torch.eye(2, 3).expand(3, 2, 3)
    assert torch.equal(further.detach(), want)


def test_statistics_by_hand() -> None:
    shares = torch.tensor([[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]])
    numbers = Coefficients([shares]).statistics()
    assert numbers == pytest.approx(
        {
            "dead_share": 1 / 3, "load_max": 3 * 0.75, "coefficient_entropy": math.log(2) / 2,
            "effective_experts_share": math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)) / 3,
            "coefficient_zeros": 0.5, "coefficient_max": 0.75, "specialist_share": 2 / 3,
        }
    )  # fmt: skip


def test_statistics_of_two_levels_are_those_of_all_pairs() -> None:
    torch.manual_seed(0)
    first, second = entmax15(2 * torch.randn(5, 6, 4)), entmax15(2 * torch.randn(5, 6, 3))
    pairs = (first[..., :, None] * second[..., None, :]).flatten(2)
    assert Coefficients([first, second]).statistics() == pytest.approx(Coefficients([pairs]).statistics(), rel=1e-6)
    assert Coefficients([first, second]).aux_loss == 0


# --- from an MLP ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", [None, 2])
@every_kind
def test_with_a_direction_to_spare_it_can_be_an_mlp(name: str, second: int | None) -> None:
    """Exactly, whatever the gate says; and what is left over can still learn."""
    rank: Any = DIM + 2 if name == "mumoe_cp" else [4, 4, 2] if second is None else [4, 5, 4, 2]
    made, x = layer(name, rank=rank, num_experts_2=second), tokens()
    w1, w2 = torch.randn(HIDDEN, DIM, dtype=torch.float64), torch.randn(DIM, HIDDEN, dtype=torch.float64)
    b1, b2 = torch.randn(HIDDEN, dtype=torch.float64), torch.randn(DIM, dtype=torch.float64)
    assert made.router.departs_from_mlp(TOKENS, 1) is None
    held = made.hold(w1, b1, w2, b2)
    assert {leaf for leaf, _ in held.values()} == {"w1", "w2"} and held.keys() <= made.state_dict().keys()
    near(made(x), F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2))
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    for _ in range(2):  # the first update gives the free directions outputs, the second gives the gate a gradient
        optimizer.zero_grad()
        made.train()(x).square().mean().backward()
        optimizer.step()
    kernel = made.router.get_parameter("levels.0.kernel")
    assert kernel.grad is not None and kernel.grad.abs().max() > 1e-9


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("mumoe_cp", {"rank": DIM + 1}, f"set model.router.rank={DIM + 2}"),
        ("mumoe_tr", {"rank": [4, 4, 1]}, r"set model.router.rank=\[4,4,2\]"),
        ("mumoe_cp", {"bias": False}, "set model.router.bias=true"),
        ("mumoe_cp", {"input_norm": True}, "set model.router.input_norm=false"),
    ],
)
def test_what_cannot_be_an_mlp_says_so(name: str, changes: dict[str, Any], words: str) -> None:
    if name in ROUTERS:
        router: FactorisedRouter = layer(name, **changes).router
        assert words.replace("\\", "") in str(router.departs_from_mlp(TOKENS, 1))
