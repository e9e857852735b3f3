"""MoE++ against slow loops written from its paper and its released code, and what its definition implies."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from softmoe_cli.cost.flop import counter
from softmoe_cli.moe import layer as module
from softmoe_cli.moe.layer import Experts, MoE
from softmoe_cli.moe.routers import zero_computation
from softmoe_cli.moe.routers.tokens_choice import TokensChoiceRouter
from softmoe_cli.moe.routers.zero_computation import (
    ZeroComputationRouter,
    ZeroComputationRouting,
    balance_loss,
    ffn_share,
    num_constants,
)
from softmoe_cli.moe.routing import Carried
from tests import oracles
from tests.routers import ROUTERS

D, HIDDEN, TOKENS, IMAGES, E = 6, 7, 9, 4, 4
Options = dict[str, Any]


def made(first: bool = True, tokens: int = TOKENS, **changes: Any) -> MoE:
    """A float64 layer with random weights, which may follow another one."""
    torch.manual_seed(0 if first else 1)
    options = ROUTERS["zero_computation"] | {"num_experts": E, "num_constant": 2} | changes
    options.pop("_target_")
    router = ZeroComputationRouter(D, tokens, **options)
    if not first:
        router.follow(router)
    layer = MoE(router, Experts(options["num_experts"], D, HIDDEN, gelu="tanh", identical=False)).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.7)
    return layer


def router_of(layer: MoE) -> ZeroComputationRouter:
    assert isinstance(layer.router, ZeroComputationRouter)
    return layer.router


def routing_of(layer: MoE, x: Tensor, carried: Carried | None = None) -> ZeroComputationRouting:
    return router_of(layer)(x, None, carried)


def images(number: int = IMAGES, tokens: int = TOKENS) -> Tensor:
    return torch.randn(number, tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# --- against loops ----------------------------------------------------------------------------------------------------


def oracle(
    layer: MoE, group: list[list[float]], options: Options, before: list[list[float]] | None, drops: bool
) -> Any:
    """Outputs, logits and balance loss of one group of tokens, token by token, from Equations 1 to 9."""
    weights = {name: value.tolist() for name, value in layer.state_dict().items()}
    e, constants, copies, zeros = router_of(layer).counts
    every, free, k, tau = e + constants + copies + zeros, constants + copies + zeros, options["k"], options["tau"]
    kernel, y, logits, picks, gates = weights["router.gate.kernel"], [], [], [], []
    for place, x in enumerate(group):
        own = [sum(x[i] * kernel[i][j] for i in range(D)) for j in range(every)]
        if before is not None:
            table = weights["router.residual.weight"]
            own = [own[j] + sum(table[j][i] * before[place][i] for i in range(every)) for j in range(every)]
        logits.append(own)
        scaled = own
        if options["logits_norm"] is not None:
            mean = sum(own) / every
            spread = math.sqrt(sum((value - mean) ** 2 for value in own) / (every - 1))
            scaled = [value * options["logits_norm"] / spread for value in own]
        shares = oracles.softmax(scaled)
        best = [j for _, j in sorted((-share, j) for j, share in enumerate(shares))][:k]
        if options["gates"] == "top2_softmax":
            chosen = oracles.softmax([scaled[j] for j in best])
        else:
            chosen = [shares[j] for j in best]
        if options["gates"] == "renormalised":
            chosen = [0.0 if j >= every - zeros else gate for j, gate in zip(best, chosen, strict=True)]
            chosen = [gate / sum(chosen) if sum(chosen) else 0.0 for gate in chosen]
        picks.append(best)
        gates.append(chosen)
    asked = [0] * every
    room = [math.inf] * every
    if drops:
        choices = len(group) * (k if options["capacity_counts_choices"] else 1)
        each = choices * options["capacity_factor"] / (tau * e + free)
        room = [math.ceil(tau * each) if j < e else math.ceil(each) for j in range(every)]
    order = list(range(len(group)))
    if options["batch_priority"]:
        order.sort(key=lambda t: (-max(oracles.softmax(logits[t])), t))
    y = [[0.0] * D for _ in group]
    for rank in range(k):
        for t in order:
            j, gate, x = picks[t][rank], gates[t][rank], group[t]
            asked[j] += 1
            if asked[j] > room[j]:
                continue
            if j < e:
                mlp = [weights[f"experts.{name}"][j] for name in ("w1", "b1", "w2", "b2")]
                out = oracles.mlp(x, *mlp)
            elif j < e + constants:
                rows, v = weights["router.constants.kernel"][j - e], weights["router.constants.vector"][j - e]
                a1, a2 = oracles.softmax([sum(a * b for a, b in zip(row, x, strict=True)) for row in rows])
                out = [a1 * a + a2 * b for a, b in zip(x, v, strict=True)]
            else:
                out = x if j < e + constants + copies else [0.0] * D
            y[t] = [a + gate * b for a, b in zip(y[t], out, strict=True)]
    means = [sum(oracles.softmax(row)[j] for row in logits) / len(group) for j in range(every)]
    loss = sum((1 if j < e else tau) * asked[j] / len(group) * means[j] for j in range(every))
    return y, logits, loss


CASES: dict[str, Options] = {
    "as shipped": {},
    "the paper's gates": {"gates": "softmax"},
    "softmax of the chosen": {"gates": "top2_softmax", "logits_norm": 1.5},
    "the released model": {"logits_norm": 1.0, "capacity_factor": None},
    "printed capacities": {"capacity_counts_choices": False, "tau": 0.25, "gates": "softmax"},
    "surest first": {"batch_priority": True, "capacity_factor": 0.6},
    "groups of images": {"images_per_group": 2, "capacity_factor": 0.7},
    "three choices, two zeros, no constant": {"k": 3, "num_zero": 2, "num_copy": 2, "num_constant": 0},
    "one choice": {"k": 1, "gates": "softmax"},
}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_two_layers_equal_loops_over_tokens(changes: Options, training: bool) -> None:
    """Outputs, what is handed on, and the balance loss; the second layer has the first one's logits."""
    options = ROUTERS["zero_computation"] | changes
    first, second = made(**changes).train(training), made(first=False, **changes).train(training)
    x = images()
    y1, carried = first(x, None, Carried())
    x2 = x + y1
    y2, carried2 = second(x2, None, carried)
    drops = training and options["capacity_factor"] is not None
    size = options["images_per_group"] if training else 1
    groups = list(zip(x.reshape(-1, size * TOKENS, D), x2.reshape(-1, size * TOKENS, D), strict=True))
    want: list[list[Any]] = [[], [], [], [], [], []]
    for one, two in groups:
        a = oracle(first, one.tolist(), options, None, drops)
        b = oracle(second, two.tolist(), options, a[1], drops)
        for place, value in enumerate((*a, *b)):
            want[place].append(value)
    assert carried.logits is not None and carried2.logits is not None
    got = (y1, carried.logits, None, y2, carried2.logits, None)
    for ours, theirs in zip(got, want, strict=True):
        if ours is not None:
            reference = torch.tensor(theirs, dtype=torch.float64).view_as(ours)
            torch.testing.assert_close(ours.detach(), reference, atol=1e-11, rtol=1e-11)
    for layer, seen, losses in (
        (first, routing_of(first, x), want[2]),
        (second, routing_of(second, x2, carried), want[5]),
    ):
        weight = router_of(layer).balance_weight
        assert seen.aux_loss.item() == pytest.approx(weight * sum(losses) / len(losses), rel=1e-11)


# --- what the definition implies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_without_free_experts_it_is_tokens_choice(training: bool) -> None:
    """Special case 1, bit for bit: the same room, the same gates, no noise."""
    bare: Options = {"num_zero": 0, "num_copy": 0, "num_constant": 0, "gating_residual": False, "gates": "softmax"}
    bare |= {"tau": 1.0}
    options = ROUTERS["tokens_choice"] | {"num_experts": E, "k": 2, "capacity_factor": 1.1, "capacity_rounding": "ceil"}
    options |= {"noise_std": 0.0, "load_weight": 0.0, "importance_weight": 0.0}
    if not training:  # where nothing is dropped
        options |= {"slots_per_expert": TOKENS, "capacity_factor": None}
    options.pop("_target_")
    layer = made(**bare, balance_weight=0.0).train(training)
    router = TokensChoiceRouter(D, TOKENS, **options).double().train(training)
    router.load_state_dict(layer.router.state_dict())
    x = images().requires_grad_()
    outs = [each(x) for each in (layer, MoE(router, layer.experts))]
    grads = [torch.autograd.grad(out.square().sum(), [x, *layer.experts.parameters()]) for out in outs]
    if training:
        assert torch.equal(*outs)
        assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    else:  # as runs of rows, which a CPU multiplies in another order than slots
        torch.testing.assert_close(*outs, atol=1e-13, rtol=0)
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_tau_one_is_equal_for_both_kinds() -> None:
    """Special case 2: equal room, and the plain sum of f P as the loss."""
    layer = made(tau=1.0, balance_weight=1.0)
    assert len(set(router_of(layer).room(TOKENS))) == 1
    routing = routing_of(layer, images())
    chosen, logits = routing.choices.chosen, routing.choices.logits
    counts = torch.zeros_like(logits[:, 0]).scatter_add(
        1, chosen.flatten(1), torch.ones_like(chosen.flatten(1)).double()
    )
    want = (counts / TOKENS * logits.softmax(dim=2).mean(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(routing.aux_loss, want)


def test_the_residual_is_a_linear_map_of_logits() -> None:
    """Special case 3: without the map, layers know nothing of each other; with the identity alone, logits are equal."""
    first, second, x = made(), made(first=False), images()
    residual = router_of(second).residual
    assert residual is not None
    _, carried = first(x, None, Carried())
    assert carried.logits is not None
    with torch.no_grad():
        residual.weight.zero_()
        alone = made()
        alone.load_state_dict({key: value for key, value in second.state_dict().items() if "residual" not in key})
        assert torch.equal(second(x, None, carried)[0], alone(x))
        residual.weight.copy_(torch.eye(len(residual.weight)))
        router_of(second).gate.kernel.zero_()
    assert torch.equal(second(x, None, carried)[1].logits, carried.logits)


def test_the_residual_is_needed() -> None:
    with pytest.raises(ValueError, match="needs what that hands on"):
        made(first=False)(images())


def prefer(layer: MoE, *experts: int) -> None:
    """Positive tokens then choose these experts, the first one before the second."""
    with torch.no_grad():
        kernel = router_of(layer).gate.kernel
        kernel.fill_(-1.0)
        for rank, expert in enumerate(experts):
            kernel[:, expert] = 1.0 - rank / 10


def test_copy_beside_zero_is_the_token() -> None:
    """Special case 4."""
    layer, x = made(), images().abs()
    copy, zero = E + 2, E + 3
    prefer(layer, copy, zero)
    torch.testing.assert_close(layer(x), x, atol=1e-14, rtol=0)
    assert routing_of(layer, x).statistics() | {"zero_gate": 0.0} == pytest.approx(
        routing_of(layer, x).statistics() | {"zero_gate": 0.0, "copy_share": 0.5, "zero_share": 0.5, "ffn_per_token": 0}
    )


def test_constants_between_token_and_vector() -> None:
    """Special case 5: alike for W_c = 0, else the token or the vector."""
    layer, x = made(), images().abs()
    prefer(layer, E, E + 3)  # the partner is the zero expert, so that the gate is 1
    constants = router_of(layer).constants
    assert constants is not None
    v = constants.vector[0].detach()
    with torch.no_grad():
        constants.kernel.zero_()
        torch.testing.assert_close(layer(x), (x + v) / 2)
        constants.kernel[0, 0] = 1e4
        torch.testing.assert_close(layer(x), x, atol=1e-14, rtol=0)
        constants.kernel[0, 1] = 2e4
        torch.testing.assert_close(layer(x), v.expand_as(x))


def test_renormalised_gates_add_up_to_one_and_zero_teaches_nothing() -> None:
    """Special case 6."""
    layer, x = made(), images(20)
    routing = routing_of(layer, x)
    chosen, weights, *_ = routing.choices
    torch.testing.assert_close(weights.sum(dim=2), torch.ones_like(weights[..., 0]), atol=1e-14, rtol=0)
    beside = (chosen == E + 3).any(dim=2)
    assert 0 < beside.sum() < beside.numel()
    partner = weights[beside].sum(dim=1) - weights[beside].masked_fill(chosen[beside] != E + 3, 0).sum(dim=1)
    assert torch.equal(partner, torch.ones_like(partner))
    logits = routing.choices.logits.detach().requires_grad_()
    keep = torch.ones(logits.shape[:2], dtype=torch.bool)
    again = router_of(layer).route(logits, x, keep, (len(x), TOKENS))
    y = again.combine(layer.experts(again.dispatch(x), again.offsets))
    (gradient,) = torch.autograd.grad((y * images(20).flip(0)).sum(), logits)
    assert gradient[beside].abs().max() < 1e-7 < gradient[~beside].abs().max()


@pytest.mark.parametrize("gap", [10.0, 50.0, 120.0])
def test_the_partner_of_a_sure_zero_expert(gap: float) -> None:
    """It is the second best expert, with weight 1, also where its share of the softmax is nearly nothing, or 0."""
    router = router_of(made(num_copy=0, num_constant=0).float())
    logits, x = torch.tensor([-2.0, -1.0, 0.0, -3.0, gap]).view(1, 1, 5), torch.zeros(1, 1, D)
    choices = router.route(logits, x, torch.ones(1, 1, dtype=torch.bool), (1, 1)).choices
    assert choices.chosen.tolist() == [[[4, 2]]] and choices.weights.tolist() == [[[0.0, 1.0]]]


def test_normalised_logits_do_not_know_the_size_of_w() -> None:
    """Special case 7."""
    layer, x = made(logits_norm=1.0), images()
    before = layer(x)
    with torch.no_grad():
        router_of(layer).gate.kernel.mul_(3)
    torch.testing.assert_close(layer(x), before, atol=1e-12, rtol=0)


def test_balanced_choices_and_the_sum_of_room() -> None:
    """Special case 8: the loss of even choices with equal probabilities, and room for gamma k s choices in all."""
    layer = made(balance_weight=1.0, num_constant=2)
    every = E + 4
    chosen = torch.arange(16).view(1, 8, 2) % every
    logits = torch.zeros(1, 8, every, dtype=torch.float64)
    loss = balance_loss(logits, chosen, torch.ones(1, 8, dtype=torch.bool), E, 0.75)
    assert loss.item() == pytest.approx(2 / every**2 * (E + 0.75 * 4), rel=1e-14)
    ffn, free = router_of(layer).room(10**6)
    assert E * ffn + 4 * free == pytest.approx(1.1 * 2 * 10**6, rel=1e-5)


def test_published_counts() -> None:
    assert [num_constants(e, 1, 1) for e in (8, 16, 32)] == [1.0, 2.0, 6.0]
    assert ffn_share(8, 4, 0.75) == pytest.approx(0.6) and ffn_share(32, 8, 0.75) == pytest.approx(0.75)
    assert [router_of(made(num_experts=e, num_constant=None)).counts[1] for e in (4, 8, 16, 32)] == [1, 1, 2, 6]


def test_the_order_of_mlps_does_not_matter() -> None:
    first, second, x = made(), made(first=False), images()
    y, carried = first(x, None, Carried())
    want = second(x + y, None, carried)[0]
    order = torch.tensor([2, 0, 3, 1, *range(E, E + 4)])
    with torch.no_grad():
        for layer in (first, second):
            router = router_of(layer)
            router.gate.kernel.copy_(router.gate.kernel[:, order])
            for parameter in layer.experts.parameters():
                parameter.copy_(parameter[order[:E]])
            if router.residual is not None:
                router.residual.weight.copy_(router.residual.weight[order][:, order])
        y, carried = first(x, None, Carried())
        torch.testing.assert_close(second(x + y, None, carried)[0], want, atol=1e-12, rtol=0)


def test_an_evaluation_has_no_groups() -> None:
    """Any number of images; each by itself. What training would drop is still counted in its groups, the last one not
    full."""
    layer, x = made(images_per_group=3, capacity_factor=0.5), images(5)
    torch.testing.assert_close(layer(x), torch.cat([layer(each) for each in x.split(1)]), atol=1e-12, rtol=0)
    told = routing_of(layer, x).statistics()
    chosen, _, landed, keep, *_ = routing_of(layer.train(), x).choices
    ffn = (chosen < E) & keep[:, :, None]
    assert 0 < told["ffn_dropped_share"] == pytest.approx(1 - (landed & ffn).sum().item() / ffn.sum().item())


def test_a_dropped_choice_leaves_the_other() -> None:
    """With room for few, every output is the sum of the terms that landed."""
    layer, x = made(capacity_factor=0.3).train(), images()
    routing = routing_of(layer, x)
    chosen, weights, landed, *_ = routing.choices
    assert 0.2 < landed.double().mean() < 0.8
    single = made()
    single.load_state_dict(layer.state_dict())
    terms = []
    for rank in range(2):
        only = torch.where(landed[..., rank, None], weights[..., rank, None], 0)
        outs = torch.zeros_like(x)
        for expert in range(E):
            mask = (chosen[..., rank] == expert)[..., None]
            rows = x.reshape(1, -1, D).expand(E, -1, -1)
            outs = outs + mask * layer.experts(rows)[expert].view_as(x)
        router = router_of(layer)
        assert router.constants is not None
        alpha = router.constants(x)
        for c in range(2):
            mixed = alpha[..., c, :1] * x + alpha[..., c, 1:] * router.constants.vector[c]
            outs = outs + (chosen[..., rank] == E + c)[..., None] * mixed
        outs = outs + (chosen[..., rank] == E + 2)[..., None] * x
        terms.append(only * outs)
    torch.testing.assert_close(layer(x), terms[0] + terms[1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("factor", [None, 0.5])
def test_counted_cost_is_what_the_landed_choices_cost(factor: float | None, training: bool) -> None:
    """Runs of rows cost what torch's counter sees of them; slots are all computed, and so many of them are filled."""
    layer, x = made(capacity_factor=factor).train(training), images(20)
    routing = routing_of(layer, x)
    chosen, _, landed, *_ = routing.choices
    assert routing.landed == (landed & (chosen < E)).sum() == (routing.token < 20 * TOKENS).sum()
    rows = routing.dispatch(x)
    with counter() as seen:
        layer.experts(rows, routing.offsets)
    computed = layer.experts.flop(float(routing.landed))
    if routing.offsets is None:
        assert seen.get_total_flops() == layer.experts.flop(20 * router_of(layer).train_rows(TOKENS)) > computed
    else:
        assert seen.get_total_flops() == computed and len(rows) == routing.landed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_choice_may_land(dtype: torch.dtype) -> None:
    """Without MLPs no row is made, and their weights get a gradient of zero."""
    layer, x = made(capacity_factor=None).to(dtype).train(), images().to(dtype)
    router = router_of(layer)
    with router.without("ffn"):
        assert len(routing_of(layer, x).token) == 0
        layer(x).square().sum().backward()
    grads = [parameter.grad for parameter in layer.experts.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)


def test_memory_behind_the_last_row_means_nothing() -> None:
    """What a grouped product leaves uncomputed may be NaN: neither outputs nor gradients see it."""
    layer, x = made(capacity_factor=None).train(), images().requires_grad_()
    leaves = [x, *layer.parameters()]
    want = torch.autograd.grad(layer(x).square().sum(), leaves)
    real = module.grouped
    with (
        mock.patch.object(module, "grouped", lambda *given: Nan.apply(real(*given), given[2])),
        mock.patch.object(zero_computation, "has_numbers", return_value=False),  # as while a graph is made
    ):
        y = layer(x)
        got = torch.autograd.grad(y.square().sum(), leaves)
    assert y.isfinite().all()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


class Nan(torch.autograd.Function):
    """NaN behind the last row, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, offsets: Tensor) -> Tensor:
        ctx.end = int(offsets[-1])
        return torch.cat([rows[: ctx.end], torch.full_like(rows[ctx.end :], math.nan)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        assert not gradients[0][ctx.end :].any()
        return torch.cat([gradients[0][: ctx.end], torch.full_like(gradients[0][ctx.end :], math.nan)]), None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": 9}, "k=9 experts per token must be from 1 to all 8"),
        ({"tau": 0.0}, "tau=0.0 must be above 0"),
        ({"num_copy": -1}, "num_copy=-1"),
        ({"num_experts": 0}, "num_experts=0 must be at least 1"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0"),
        ({"logits_norm": 0.0}, "logits_norm=0.0"),
        ({"k": 1}, "gates=renormalised with k=1"),
        ({"balance_weight": -1.0}, "balance_weight=-1.0"),
        ({"images_per_group": 0}, "images_per_group=0"),
        ({"capacity_factor": None, "batch_priority": True}, "batch_priority=true has no effect"),
        ({"capacity_factor": None, "capacity_counts_choices": False}, "capacity_counts_choices=false has no effect"),
        (
            {"capacity_factor": None, "balance_weight": 0.0, "tau": 1.0, "images_per_group": 2},
            "images_per_group=2 has no effect with capacity_factor=null and balance_weight=0; set it to 1",
        ),
        ({"capacity_factor": None, "balance_weight": 0.0}, "tau=0.75 has no effect with capacity_factor=null and bal"),
        (
            {"num_zero": 0, "num_copy": 0, "num_constant": 0},
            "tau=0.75 has no effect without zero, copy or constant experts; set it to 1",
        ),
    ],
)
def test_what_cannot_be(changes: Options, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        made(**changes)
