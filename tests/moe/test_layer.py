"""The MoE layer against plain arithmetic, and what every router in conf/model/router must keep."""

import inspect
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import softmoe_cli.moe.routers
from softmoe_cli.model.router import make_layer
from softmoe_cli.model.vit import portable_options
from softmoe_cli.moe.kind import Decider, Layer
from softmoe_cli.moe.layer import TILE, Experts, MoE, in_tiles, ragged_experts
from softmoe_cli.moe.routers.soft import SoftRouter, soft_logits
from softmoe_cli.moe.routing import DenseRouting, load_statistics, routings
from tests.oracles import soft_moe
from tests.routers import ROUTERS, YAMLS

every_router = pytest.mark.parametrize("options", ROUTERS.values(), ids=ROUTERS.keys())

DIM, HIDDEN, TOKENS, IMAGES = 12, 128, 16, 3


def soft(dim: int, num_tokens: int, e: int, p: int, *, noise_std: float = 0.0) -> SoftRouter:
    return SoftRouter(
        dim, num_tokens, num_experts=e, slots_per_expert=p, capacity_factor=None, noise_std=noise_std
    )  # fmt: skip


def soft_layer(n: int, d: int, h: int, e: int, p: int, seed: int = 0) -> MoE:
    """A float64 layer whose parameters are all random: no zero bias, no unit scale, no two experts alike."""
    torch.manual_seed(seed)
    layer = MoE(soft(d, n, e, p), Experts(e, d, h, gelu="tanh", identical=False)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
        layer.router.get_parameter("scale").fill_(3.0)
    return layer


def contract_layer(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Layer:
    torch.manual_seed(0)
    return make_layer(options, DIM, HIDDEN, TOKENS, gelu="tanh", identical=False).to(dtype)


def soft_routing(router: nn.Module, x: Tensor) -> DenseRouting:
    routing = router(x)
    assert isinstance(routing, DenseRouting)
    return routing


# --- soft MoE against the oracle --------------------------------------------------------------------------------------

SHAPES = [(5, 4, 6, 3, 2), (6, 3, 4, 1, 1), (4, 5, 3, 1, 3), (1, 4, 5, 3, 2), (1, 2, 2, 1, 1), (7, 2, 3, 4, 1)]


@pytest.mark.parametrize(("n", "d", "h", "e", "p"), SHAPES)
def test_layer_agrees_with_plain_arithmetic(n: int, d: int, h: int, e: int, p: int) -> None:
    layer = soft_layer(n, d, h, e, p)
    x = torch.randn(2, n, d, dtype=torch.float64)
    routing = soft_routing(layer.router, x)
    slots = routing.dispatch(x)
    outputs = layer.experts(slots)
    y = layer(x)
    assert slots.shape == (e, 2 * p, d)
    weights: dict[str, Any] = {name: parameter.tolist() for name, parameter in layer.named_parameters()}
    for b in range(2):
        want = soft_moe(
            x[b].tolist(), weights["router.phi"], weights["router.scale"], weights["experts.w1"],
            weights["experts.b1"], weights["experts.w2"], weights["experts.b2"],
        )  # fmt: skip
        pairs = {
            "dispatch": (routing.dispatch_weights[b], want.dispatch),
            "combine": (routing.combine_weights[b], want.combine),
            "slots": (slots[:, b * p : (b + 1) * p], want.slots),
            "outputs": (outputs[:, b * p : (b + 1) * p], want.outputs),
            "y": (y[b], want.y),
        }
        for name, (got, expected) in pairs.items():
            difference = (got.detach() - torch.tensor(expected, dtype=torch.float64)).abs().max().item()
            assert difference < 1e-12, name


@pytest.mark.parametrize("size", [0.0, 1e-4, 1e-3, 1e3])
def test_epsilon_is_inside_the_root(size: float) -> None:
    layer = soft_layer(4, 3, 2, 2, 1)
    x = size * torch.randn(1, 4, 3, dtype=torch.float64)
    weights: dict[str, Any] = {name: parameter.tolist() for name, parameter in layer.named_parameters()}
    want = soft_moe(
        x[0].tolist(), weights["router.phi"], weights["router.scale"], weights["experts.w1"],
        weights["experts.b1"], weights["experts.w2"], weights["experts.b2"],
    )  # fmt: skip
    got = soft_routing(layer.router, x).combine_weights[0].detach()
    torch.testing.assert_close(got, torch.tensor(want.combine, dtype=torch.float64), atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("learned", ["tokens", "slots", "both"])
def test_gradients_of_the_logits(size: float, learned: str) -> None:
    torch.manual_seed(0)
    x = (size * torch.randn(2, 3, 4, dtype=torch.float64)).requires_grad_(learned != "slots")
    phi = torch.randn(4, 2, 3, dtype=torch.float64).requires_grad_(learned != "tokens")
    scale = torch.tensor(1.3, dtype=torch.float64).requires_grad_(learned != "tokens")
    assert torch.autograd.gradcheck(soft_logits, (x, phi, scale), eps=1e-7)


def test_exact_gelu_is_another_function_than_the_tanh_approximation() -> None:
    torch.manual_seed(0)
    tanh = Experts(1, 4, 8, gelu="tanh", identical=True).double()
    exact = Experts(1, 4, 8, gelu="none", identical=True).double()
    exact.load_state_dict(tanh.state_dict())
    rows = 2 * torch.randn(1, 5, 4, dtype=torch.float64)
    w1, b1, w2, b2 = (parameter[0] for parameter in exact.parameters())
    hidden = rows[0] @ w1 + b1
    want = (hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))) @ w2 + b2
    torch.testing.assert_close(exact(rows)[0], want, atol=1e-12, rtol=1e-12)
    assert (exact(rows) - tanh(rows)).abs().max() > 1e-6


def test_weights_sum_to_one() -> None:
    layer = soft_layer(6, 4, 3, 3, 2)
    routing = soft_routing(layer.router, torch.randn(2, 6, 4, dtype=torch.float64))
    ones = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(routing.dispatch_weights.sum(dim=1), ones.expand(2, 3, 2))
    torch.testing.assert_close(routing.combine_weights.sum(dim=(2, 3)), ones.expand(2, 6))


def test_raw_tokens_are_dispatched() -> None:
    """Doubling long tokens leaves the weights, which see only directions, and doubles the slots."""
    layer = soft_layer(6, 4, 3, 3, 2)
    x = 1e4 * torch.randn(1, 6, 4, dtype=torch.float64)
    one, two = soft_routing(layer.router, x), soft_routing(layer.router, 2 * x)
    torch.testing.assert_close(two.dispatch_weights, one.dispatch_weights, atol=1e-9, rtol=0)
    torch.testing.assert_close(two.dispatch(2 * x), 2 * one.dispatch(x), atol=0, rtol=1e-8)


def test_noise_is_drawn_in_training_only() -> None:
    torch.manual_seed(0)
    router, quiet = soft(4, 6, 3, 1, noise_std=0.5), soft(4, 6, 3, 1)
    quiet.load_state_dict(router.state_dict())
    x = torch.randn(2, 6, 4)
    noisy = soft_routing(router.train(), x)
    assert (noisy.dispatch_weights - soft_routing(router, x).dispatch_weights).abs().max() > 1e-3
    assert torch.equal(soft_routing(router.eval(), x).combine_weights, soft_routing(quiet, x).combine_weights)
    # the logits' noise, up to a shift per token, is what tells the noisy log weights from the quiet ones
    torch.manual_seed(0)
    wide, silent = soft(4, 400, 50, 1, noise_std=0.5), soft(4, 400, 50, 1)
    silent.load_state_dict(wide.state_dict())
    x = torch.randn(1, 400, 4)
    difference = soft_routing(wide, x).combine_weights.log() - soft_routing(silent, x).combine_weights.log()
    assert difference.std(dim=(2, 3)).mean().item() == pytest.approx(0.5, rel=0.02)


def test_statistics_are_means_of_extremes() -> None:
    layer = soft_layer(5, 4, 3, 3, 2)
    routing = soft_routing(layer.router, torch.randn(2, 5, 4, dtype=torch.float64))
    dispatch, combine = routing.dispatch_weights.tolist(), routing.combine_weights.tolist()
    slots = [[dispatch[b][s][i][j] for s in range(5)] for b in range(2) for i in range(3) for j in range(2)]
    tokens = [[w for row in combine[b][s] for w in row] for b in range(2) for s in range(5)]
    assert routing.statistics() == pytest.approx(
        {
            "utilisation": 1.0,
            "dropped_share": 0.0,
            "dispatch_max": sum(map(max, slots)) / len(slots),
            "dispatch_min": sum(map(min, slots)) / len(slots),
            "combine_max": sum(map(max, tokens)) / len(tokens),
            "combine_min": sum(map(min, tokens)) / len(tokens),
            **load_statistics(routing.combine_weights.sum(dim=(0, 1, 3))),
        },
        rel=1e-12,
    )
    numbers = layer.router.statistics()
    vectors = layer.router.get_parameter("phi").detach().flatten(1).T.tolist()
    pairs = [cosine(v, w) for i, v in enumerate(vectors) for w in vectors[:i]]
    assert numbers == pytest.approx(
        {
            "scale": 3.0,
            "slot_cosine_min": min(pairs),
            "slot_cosine_max": max(pairs),
            "slot_cosine_mean": sum(pairs) / len(pairs),
        },
        abs=1e-5,
    )


def cosine(v: list[float], w: list[float]) -> float:
    return sum(a * b for a, b in zip(v, w, strict=True)) / math.hypot(*v) / math.hypot(*w)


@pytest.mark.parametrize(
    ("tokens", "e", "factor", "p"),
    [(16, 4, 1.0, 4), (18, 4, 1.0, 4), (6, 4, 1.0, 2), (100, 10, 1.1, 11), (3, 2, 2.0, 3)],
)
def test_capacity_rounds_half_to_even(tokens: int, e: int, factor: float, p: int) -> None:
    router = SoftRouter(4, tokens, num_experts=e, slots_per_expert=None, capacity_factor=factor, noise_std=0.0)
    assert router.slots_per_expert == p
    assert router.phi.shape == (4, e, p)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slots_per_expert": None}, "give one of them"),
        ({"capacity_factor": 1.0}, "give one of them"),
        ({"slots_per_expert": None, "capacity_factor": 0.1}, r"capacity_factor=0.1 gives 0 slots.*use fewer experts"),
        ({"slots_per_expert": 0}, "slots_per_expert=0 must be at least 1"),
        ({"num_experts": 0}, "num_experts=0 must be at least 1"),
        ({"noise_std": -1.0}, "noise_std=-1.0 must not be negative"),
    ],
)
def test_impossible_soft_routers_are_refused(change: dict[str, Any], words: str) -> None:
    good: dict[str, Any] = {"num_experts": 4, "slots_per_expert": 1, "capacity_factor": None, "noise_std": 0.0}
    SoftRouter(4, 16, **good)
    with pytest.raises(ValueError, match=words):
        SoftRouter(4, 16, **(good | change))


# --- what every router keeps ------------------------------------------------------------------------------------------


def test_every_router_file_has_a_yaml_of_its_name() -> None:
    files = {path.stem for path in Path(softmoe_cli.moe.routers.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == set(ROUTERS)
    assert set(YAMLS) - set(ROUTERS) == {"dense"}


@pytest.mark.parametrize("name", ROUTERS)
def test_yaml_and_constructor_have_the_same_options(name: str) -> None:
    module, _, class_name = ROUTERS[name]["_target_"].rpartition(".")
    assert module == f"softmoe_cli.moe.routers.{name}"
    router_class = getattr(import_module(module), class_name)
    assert issubclass(router_class, Decider)
    parameters = inspect.signature(router_class).parameters.values()
    named = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert named == set(ROUTERS[name]) - {"_target_"}
    assert all(parameter.default is parameter.empty for parameter in parameters)
    assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == ["dim", "num_tokens"]


@every_router
def test_routings_sees_one_routing_and_leaves_no_hook(options: dict[str, Any]) -> None:
    layer = contract_layer(options)
    x = torch.randn(IMAGES, TOKENS, DIM)
    with routings(nn.Sequential(layer, layer.experts)) as seen:
        layer(x)
        assert len(seen) == 1
        with torch.no_grad():
            layer(x)
        assert len(seen) == 1, "evaluation leaves nothing"
    layer(x)
    assert len(seen) == 1
    assert not layer.router._forward_hooks
    with pytest.raises(KeyError), routings(layer):
        raise KeyError
    assert not layer.router._forward_hooks
    assert seen[0].aux_loss.shape == ()
    assert seen[0].aux_loss.isfinite()


def test_options_of_a_soft_router_keep_its_slots_at_another_number_of_tokens() -> None:
    options: dict[str, Any] = {"num_experts": 4, "slots_per_expert": None, "capacity_factor": 1.0, "noise_std": 0.5}
    router = SoftRouter(4, 16, **options)
    layer = MoE(router, Experts(4, 4, 8, gelu="tanh", identical=True))
    again = SoftRouter(4, 64, **portable_options(options, layer))
    assert again.slots_per_expert == 4
    assert again.noise_std == 0.5
    again.load_state_dict(router.state_dict())


@every_router
def test_float64_goes_through(options: dict[str, Any]) -> None:
    single, double = contract_layer(options).eval(), contract_layer(options, torch.float64).eval()
    x = torch.randn(IMAGES, TOKENS, DIM)
    y = double(x.double())
    assert y.dtype == torch.float64
    for out in (single(x), y):
        out.square().mean().backward()
    for got, want in zip(single.parameters(), double.parameters(), strict=True):
        assert got.grad is not None and want.grad is not None
        torch.testing.assert_close(got.grad.double(), want.grad, atol=1e-6, rtol=1e-3)
    assert double.router(x.double()).aux_loss.dtype == torch.float64
    torch.testing.assert_close(single(x).double(), y, atol=1e-5, rtol=1e-4)
    assert not torch.equal(single(x).double(), y)  # some arithmetic was really done in more digits


@every_router
def test_tokens_may_be_of_half_precision(options: dict[str, Any]) -> None:
    """As a block without a norm of float32 in front of it hands them on under autocast."""
    layer = contract_layer(options).eval()
    x = torch.randn(IMAGES, TOKENS, DIM).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x.float()), atol=0.02, rtol=0.1)


def test_soft_weights_are_float32_of_half_precision_tokens_too() -> None:
    router = soft(DIM, TOKENS, 4, 2)
    x = torch.randn(2, TOKENS, DIM).bfloat16()
    want = soft_routing(router, x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = soft_routing(router, x)
    assert got.dispatch_weights.dtype == got.combine_weights.dtype == torch.float32
    assert torch.equal(got.dispatch_weights, want.dispatch_weights)
    assert torch.equal(got.combine_weights, want.combine_weights)


# --- initialisation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("identical", [True, False])
def test_experts_start_identical_or_not(identical: bool) -> None:
    torch.manual_seed(0)
    d, h = 48, 80
    experts = Experts(4, d, h, gelu="tanh", identical=identical)
    for name, parameter in experts.named_parameters():
        for a in range(4):
            for b in range(a):
                assert torch.equal(parameter[a], parameter[b]) is identical, name
    bound = math.sqrt(6 / (d + h))
    for kernels in (experts.w1, experts.w2):
        for kernel in kernels:  # uniform: the bound is reached, the standard deviation is bound / sqrt(3)
            assert 0.99 * bound < kernel.abs().max() <= bound
            assert kernel.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    for biases in (experts.b1, experts.b2):
        assert biases[0].std().item() == pytest.approx(1e-6, rel=0.35)


def test_slot_vectors_start_truncated_normal_and_scale_at_one() -> None:
    torch.manual_seed(0)
    d, e, p = 64, 16, 20
    router = soft(d, 16, e, p)
    std = 1 / math.sqrt(d * e)
    cut = 2 * std / 0.87962566103423978
    assert router.phi.std().item() == pytest.approx(std, rel=0.02)
    assert router.phi.mean().abs().item() < 0.03 * std
    assert 0.99 * cut < router.phi.abs().max() <= cut * (1 + 1e-6)
    assert router.scale.shape == ()
    assert router.scale.item() == 1.0


def test_flops_count_the_matrix_products() -> None:
    n, d, h, e, p = 10, 4, 6, 3, 2
    layer = soft_layer(n, d, h, e, p)
    assert isinstance(layer.router, SoftRouter)
    assert layer.router.flop(n) == 3 * 2 * n * d * e * p
    assert layer.experts.flop(float(e * p)) == 2 * (e * p) * (2 * d * h)


# --- runs of rows in half precision -----------------------------------------------------------------------------------

RUNS = [[3, 0, 21, 16], [1, 0, 0, 0], [0, 5, 5, 31]]


@pytest.mark.parametrize("sizes", RUNS)
def test_tiles_hold_each_run_from_a_multiple_on(sizes: list[int]) -> None:
    r = sum(sizes) + 3  # rows behind the last run too
    place, ends, length = in_tiles(torch.tensor(sizes).cumsum(0).int(), r)
    full = [-(-size // TILE) * TILE for size in sizes]
    assert ends.tolist() == [sum(full[: i + 1]) for i in range(len(full))] and ends.dtype == torch.int32
    starts = [0, *ends.tolist()]
    want = [starts[i] + j for i, size in enumerate([*sizes, 3]) for j in range(size)]
    assert place.tolist() == want and max(want) < length


@pytest.mark.parametrize("sizes", RUNS)
def test_runs_in_half_precision_are_those_of_float32(sizes: list[int]) -> None:
    """Forwards and backwards, whatever stands behind the last run."""
    torch.manual_seed(0)
    e, d, h, r = len(sizes), 16, 24, sum(sizes)
    offsets = torch.tensor(sizes).cumsum(0).int()
    weights = [torch.randn(shape).bfloat16() for shape in ((e, d, h), (e, h), (e, h, d), (e, d))]
    rows, gradient = torch.randn(r + 3, d).bfloat16(), torch.randn(r, d).bfloat16()
    rows[r:] = float("nan")
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        given = [each.to(dtype, copy=True).requires_grad_() for each in (rows, *weights)]
        x, w1, b1, w2, b2 = given
        made = ragged_experts(x, offsets, w1, b1, w2, b2, "tanh")[:r]
        found.append([made, *torch.autograd.grad(made, given, gradient.to(dtype))])
    for half, whole in zip(*found, strict=True):
        half, whole = (each[:r] if len(each) == r + 3 else each for each in (half, whole))
        assert (half - whole).norm() <= 0.02 * whole.norm()
