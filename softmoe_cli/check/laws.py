"""The laws that every router must obey: one function measures each law."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path
from torch.utils.checkpoint import checkpoint

from softmoe_cli.config.model import group_of
from softmoe_cli.cost.flop import counter
from softmoe_cli.device import compiled
from softmoe_cli.errors import UsageError
from softmoe_cli.model.router import make_layer, make_router
from softmoe_cli.model.vit import portable_options
from softmoe_cli.moe.kind import UNKNOWN, Decided, Layer
from softmoe_cli.moe.layer import MoE
from softmoe_cli.moe.routing import Carried, Router, Routing, routings, whole_batch

DIM, HIDDEN, TOKENS, GROUPS = 16, 128, 16, 4
EXACT = 1e-10
"""The largest allowed error in float64. Comparisons are in float64 if the router can, and use this bound unless they
name another."""
SINGLE = 1e-3
"""The largest allowed error in float32, for tokens and weights with sizes from 1 to 100."""
FAULTS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)


class NotApplicable(Exception):
    """Raised by a check that does not apply to this router; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """The result of a check: `figure` is the measured value, or the reason why the check does not apply."""

    name: str
    verdict: str
    figure: str


class Subject:
    """A router under test: its options, and layers that are built from them, with every weight drawn at random."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        router = self._build(options).router
        self.router_class, self.exempt = type(router), router.exempt
        self.dtype, self.exact = torch.float64, EXACT
        if not self._doubles():
            self.dtype, self.exact = torch.float32, SINGLE

    def _doubles(self) -> bool:
        """Whether the router computes in float64 when weights and tokens are float64; some routers always use
        float32."""
        try:
            kept = decisions(self.layer(torch.float64).router(self.batch(torch.float64))).values()
        except FAULTS:  # the checks will report this
            return False
        return all(each.dtype == torch.float64 for each in kept if each.is_floating_point() and each.ndim)

    @staticmethod
    def _build(options: dict[str, Any]) -> Layer:
        return told_tasks(make_layer(options, DIM, HIDDEN, TOKENS, gelu="tanh", identical=False))

    def layer(self, dtype: torch.dtype | None = None, **changes: Any) -> Layer:
        """A layer in evaluation mode, always with the same weights; `changes` replace those router options that the
        router has."""
        known = {key: value for key, value in changes.items() if key in self.options}
        torch.manual_seed(0)
        layer = self._build(self.options | known)
        _draw(layer)
        return layer.to(dtype or self.dtype).eval()

    def pair(self, dtype: torch.dtype | None = None) -> "TwoLayers | None":
        """Two layers of which the second follows the first; None where layers hand nothing on."""
        torch.manual_seed(0)
        first, second = self._build(self.options), self._build(self.options)
        if not isinstance(first, MoE) or not isinstance(second, MoE):
            return None
        if not second.router.carries or second.router.by_task:  # of a task nothing is handed on that could change
            return None
        second.router.follow(first.router)
        pair = TwoLayers(first, second)
        _draw(pair)
        return pair.to(dtype or self.dtype).eval()

    def batch(self, dtype: torch.dtype | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        images = GROUPS * group_of(self.options)  # groups for losses may be larger than groups for slots
        return torch.randn(images, TOKENS, DIM, dtype=torch.float64, generator=generator).to(dtype or self.dtype)


def told_tasks(layer: Layer) -> Layer:
    """The layer, whose router is told the tasks of images by what they show, so that an image keeps its task wherever
    it stands: by its smallest number, which neither the order of tokens nor large padding changes."""
    if isinstance(layer.router, Router) and layer.router.by_task:
        tasks = layer.router.fixed_options()["num_tasks"]

        def tell(_router: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x, keep, *_ = (*inputs, None)
            return x, keep, Carried(task=(100 * x.detach().amin(dim=(1, 2))).long() % tasks)

        layer.router.register_forward_pre_hook(tell)
    return layer


@torch.no_grad()
def _draw(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.ndim:
            parameter.normal_(std=0.5)
        else:
            parameter.fill_(3.0)


class TwoLayers(nn.Module):
    """Two layers one after the other, as in a model, with what the first one hands on."""

    def __init__(self, first: MoE, second: MoE) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        made, carried = self.first(x, keep, Carried())
        made, _ = self.second(x + made, keep, carried)
        out: Tensor = made
        return out


def decisions(decision: Decided) -> dict[str, Tensor]:
    """Every tensor that a decision keeps, by its path in the object."""
    leaves, _ = tree_flatten_with_path(vars(decision))
    return {keystr(path): each for path, each in leaves if isinstance(each, Tensor)}


def deviation(got: Tensor, want: Tensor) -> float:
    """The largest absolute difference; infinite if a value is NaN, because no comparison with NaN is true."""
    return (got - want).abs().nan_to_num(nan=math.inf).max().item() if got.numel() else 0.0


Finding = tuple[bool, str]
Check = Callable[[Subject], Finding]


def bounded(value: float, bound: float, what: str) -> Finding:
    return value <= bound, f"{what} {value:.1e}{' in float32' if bound == SINGLE else ''}"


def no_leakage(subject: Subject) -> Finding:
    """The output of a group of images neither depends on other images nor sends gradients to them. Tried on the first
    and on the last group, in evaluation and in training."""
    layer = subject.layer()
    x, size = subject.batch(), layer.router.images_per_group
    worst = 0.0

    def through(images: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same noise
        with whole_batch(0, len(images)):
            return layer(images)

    for training, own in itertools.product((False, True), (slice(size), slice(-size, None))):
        layer.train(training)
        rest = torch.ones(len(x), dtype=torch.bool)
        rest[own] = False
        other = x.clone()
        other[rest] = other[rest].flip(0) * 2 + 1
        moved = deviation(through(other)[own], through(x)[own])
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(through(leaf)[own].square().sum(), leaf)
        worst = max(worst, moved, deviation(gradient[rest], torch.zeros(())))
    return bounded(worst, subject.exact, "largest influence")


def batch_independence(subject: Subject) -> Finding:
    """Groups in another order, or one at a time, give the same outputs."""
    layer = subject.layer()
    x, size = subject.batch(), layer.router.images_per_group
    whole = layer(x)
    order = torch.arange(len(x)).view(-1, size).roll(1, dims=0).flatten()
    moved = deviation(layer(x[order]), whole[order])
    alone = torch.cat([layer(part) for part in x.split(size)])
    return bounded(max(moved, deviation(alone, whole)), subject.exact, "largest change")


def token_permutation(subject: Subject) -> Finding:
    """Permuted tokens give permuted outputs."""
    layer = subject.layer()
    x = subject.batch()
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2))
    return bounded(deviation(layer(x[:, order]), layer(x)[:, order]), subject.exact, "largest change")


def padding_is_neutral(subject: Subject) -> Finding:
    """Padding tokens (`keep` is false) change no other output, get zero and have no gradient; so do the images that are
    missing in a group that is not full."""
    layer = subject.layer()
    x, size = subject.batch(), layer.router.images_per_group
    padded = torch.cat([x, 100 * torch.ones(len(x), 3, DIM, dtype=x.dtype)], dim=1).requires_grad_()
    keep = torch.arange(TOKENS + 3).expand(len(x), -1) < TOKENS
    y = layer(padded, keep)
    (gradient,) = torch.autograd.grad(y[:, :TOKENS].square().sum(), padded)
    changes = [deviation(y[:, :TOKENS], layer(x)), deviation(y[:, TOKENS:], torch.zeros(()))]
    changes += [deviation(gradient[:, TOKENS:], torch.zeros(()))]
    changes += [deviation(layer.router(padded, keep).aux_loss, layer.router(x).aux_loss)]
    if size > 1:
        short = x[: size + 1]
        full = torch.cat([short, x[: size - 1]])
        images = torch.ones(2 * size, TOKENS, dtype=torch.bool)
        images[size + 1 :] = False
        changes.append(deviation(layer(short), layer(full, images)[: size + 1]))
    return bounded(max(changes), subject.exact, "largest change")


def one_expert(subject: Subject) -> Finding:
    """With one expert that has room for every token the layer is its MLP."""
    if "num_experts" not in subject.options:
        raise NotApplicable("it has no option num_experts")
    router = make_router(subject.options, DIM, TOKENS)
    if not isinstance(router, Router):
        raise NotApplicable("its experts are linear maps, not MLPs")
    room = {"slots_per_expert": TOKENS * router.images_per_group, "capacity_factor": None}
    try:
        layer = subject.layer(None, **{"num_experts": 1, **room, **router.of_one_expert})
    except UsageError as error:
        raise NotApplicable(f"one expert alone cannot be built: {error}") from error
    reason = layer.router.departs_from_mlp(TOKENS, parts=1)
    if reason not in (None, UNKNOWN):
        raise NotApplicable(reason)
    x = subject.batch()
    mlp: Tensor = layer.experts(x.flatten(0, 1)[None])
    return bounded(deviation(layer(x), mlp.view_as(x)), subject.exact, "difference")


def dispatched(layer: Layer, x: Tensor) -> Routing:
    """What the router decides about rows."""
    decision = layer.router(x)
    if not isinstance(decision, Routing):
        raise NotApplicable("it gives no rows to experts")
    return decision


def dispatch_law(subject: Subject) -> Finding:
    """Each expert row is a weighted sum of tokens: linear in the tokens, with weights that add up to one, or to
    zero."""
    x = subject.batch()
    routing, other = dispatched(subject.layer(), x), x.flip(0).square()
    bent = deviation(routing.dispatch(2 * x + other), 2 * routing.dispatch(x) + routing.dispatch(other))
    total = routing.dispatch(torch.ones_like(x))
    stray = deviation(torch.minimum(total.abs(), (total - 1).abs()), torch.zeros(()))
    return bounded(max(bent, stray), subject.exact, "largest departure")


def combine_law(subject: Subject) -> Finding:
    """Outputs are linear in the experts' rows, but for what a router gives directly, and a token's weights add up to a
    number from zero to the router's maximum."""
    layer = subject.layer()
    x = subject.batch()
    routing = dispatched(layer, x)
    assert isinstance(layer, MoE)
    rows = routing.dispatch(x)
    other = rows.square()
    direct = routing.combine(torch.zeros_like(rows)) if layer.router.direct else torch.zeros((), dtype=x.dtype)

    def made(of: Tensor) -> Tensor:
        return routing.combine(of) - direct

    bent = deviation(made(2 * rows + other), 2 * made(rows) + made(other))
    total = made(torch.ones_like(rows))
    stray = deviation(total, total.clamp(0.0, layer.router.most_weight))
    lowest, highest = total.min().item(), total.max().item()
    holds, figure = bounded(max(bent, stray), subject.exact, "largest departure")
    return holds, f"{figure}, a token's weights sum to {lowest:.2g} to {highest:.2g}"


def handing_on(subject: Subject) -> Finding:
    """A layer that follows another one keeps the laws too: in other orders and with padding it gives the same, nothing
    stays behind of another batch, recomputation gives the same gradients, its FLOPs are the formula's, and what is
    handed on alone brings the earlier router a gradient."""
    pair = subject.pair()
    if pair is None:
        raise NotApplicable("its layers take nothing of earlier ones")
    x, size = subject.batch(), pair.first.router.images_per_group
    order = torch.arange(len(x)).view(-1, size).roll(1, dims=0).flatten()
    padded = torch.cat([x, 100 * torch.ones(len(x), 3, DIM, dtype=x.dtype)], dim=1)
    keep = torch.arange(TOKENS + 3).expand(len(x), -1) < TOKENS
    whole = pair(x)
    changes = [
        deviation(pair(x[order]), whole[order]),  # of another batch nothing may be left after that
        deviation(torch.cat([pair(part) for part in x.split(size)]), whole),
        deviation(pair(padded, keep)[:, :TOKENS], whole),
    ]
    if "token permutation" not in subject.exempt:
        moved = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2))
        changes.append(deviation(pair(x[:, moved]), whole[:, moved]))
    leaves = list(pair.parameters())
    pair.train()
    plain, again = (
        torch.autograd.grad(y.square().sum(), leaves, materialize_grads=True)
        for y in (pair(x), checkpoint(pair, x, use_reentrant=False))
    )
    changes += [deviation(*each) for each in zip(again, plain, strict=True)]
    _, carried = pair.first(x, None, Carried())
    made, _ = pair.second(x, None, carried)
    alone = torch.autograd.grad(made.square().sum(), list(pair.first.router.parameters()), materialize_grads=True)
    if not any(gradient.any() for gradient in alone):
        return False, "what is handed on brings the earlier router no gradient"
    pair, tokens = pair.eval().float().to("meta"), subject.batch(torch.float32).to("meta")
    with counter() as seen:
        pair(tokens)
    formula = len(x) * (pair.first.flop(TOKENS) + pair.second.flop(TOKENS))
    if seen.get_total_flops() != formula:
        return False, f"counter {seen.get_total_flops():,}, formulas {formula:,}"
    return bounded(max(changes), max(1e-8, subject.exact), "two layers; largest change")


def finite_gradients(subject: Subject) -> Finding:
    """In training every parameter gets a gradient without infinite or NaN values, even when tokens are zero."""
    layer = subject.layer(torch.float32).train()
    leaves = dict(layer.named_parameters())
    for x in (subject.batch(torch.float32), torch.zeros(layer.router.images_per_group, TOKENS, DIM)):
        x.requires_grad_()
        with routings(layer) as seen:
            y = layer(x)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
        gradients = torch.autograd.grad((y * weights).sum() + seen[0].aux_loss, [x, *leaves.values()])
        for name, gradient in zip(["the tokens", *leaves], gradients, strict=True):
            if not gradient.isfinite().all():
                return False, f"gradient of {name} is not finite"
        if x.any():
            sizes = {n: g.abs().max().item() for n, g in zip(["the tokens", *leaves], gradients, strict=True)}
    least = min(sizes, key=lambda name: sizes[name])
    return sizes[least] > 1e-9, f"smallest {sizes[least]:.1e}, of {least}"


def float32_decisions(subject: Subject) -> Finding:
    """Under bf16 autocast the routing has the same bits as without autocast: it is computed in float32."""
    layer = subject.layer(torch.float32)
    x = subject.batch(torch.float32)
    plain = decisions(layer.router(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, y = decisions(layer.router(x)), layer(x)
    for name, want in plain.items():
        got = half[name]
        if got.dtype != want.dtype or not torch.equal(got, want):
            off = deviation(got.double(), want.double()) if got.shape == want.shape else math.inf
            return False, f"{name} is {got.dtype} and differs by up to {off:.1e}"
    exact = layer(x)
    error = ((y.float() - exact).norm() / exact.norm()).item()
    return error < 0.03, f"decisions {'equal' if plain else 'unknown'}; output off by {100 * error:.2f}%"


def auxiliary_losses(subject: Subject) -> Finding:
    """A batch computed in two parts gives the mean of the parts' losses and the same gradient; a recomputed layer
    counts once. Training noise is on: each part gets its own."""
    layer = subject.layer().train()
    x = subject.batch()

    def found(parts: int, recompute: bool) -> list[Tensor]:
        """The loss and all gradients."""
        layer.zero_grad()
        total = torch.zeros((), dtype=x.dtype)
        for i, part in enumerate(x.chunk(parts)):
            torch.manual_seed(3)
            with routings(layer) as seen, whole_batch(i * len(part), len(x)):
                y = checkpoint(layer, part, use_reentrant=False) if recompute else layer(part)
                aux = sum((routing.aux_loss for routing in seen), torch.zeros(())) / parts
                (y.square().sum() + 10 * aux).backward()  # inside `routings`: recomputation calls the router again
            total += aux.detach()
        return [total, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]

    whole = found(1, False)
    if whole[0] == 0:
        raise NotApplicable("it has no auxiliary loss")
    worst = max(
        deviation(got, want)
        for parts, recompute in ((2, False), (1, True))
        for got, want in zip(found(parts, recompute), whole, strict=True)
    )
    return bounded(worst, max(1e-8, subject.exact), f"loss {whole[0].item():.3g}; largest difference")


def cost_formula(subject: Subject) -> Finding:
    """The FLOPs by formula, of a forward pass and of training, are equal to those that torch's counter counts."""
    layer = subject.layer(torch.float32).to("meta")
    x = subject.batch(torch.float32).to("meta").requires_grad_()
    with counter() as forward:  # which remembers shapes, not values
        layer(x)
    with counter() as step:
        layer.train()(x).sum().backward()
    got = forward.get_total_flops(), step.get_total_flops()
    training = sum(flop for _, flop in layer.flop_by_part(TOKENS).values())
    want = len(x) * layer.flop(TOKENS), len(x) * training
    return got == want, "counter {:,} and {:,} in training, formulas {:,} and {:,}".format(*got, *want)


def rebuilt(subject: Subject) -> Finding:
    """The options that a checkpoint keeps build the same layer, for any number of tokens."""
    layer, x = subject.layer(), subject.batch()
    kept = portable_options(subject.options, layer)
    again, same = (
        told_tasks(make_layer(kept, DIM, HIDDEN, n, gelu="tanh", identical=False)) for n in (2 * TOKENS, TOKENS)
    )
    for each in (again, same):
        each.to(subject.dtype).eval().load_state_dict(layer.state_dict())
    if portable_options(kept, again) != kept:
        return False, f"{portable_options(kept, again)} instead of {kept}"
    return bounded(deviation(same(x), layer(x)), 0.0, "difference")


SHARES = ("utilisation", "dropped_share", "dead_share", "effective_experts_share")


def statistics(subject: Subject) -> Finding:
    """Statistics are plain finite numbers, and shares from 0 to 1."""
    layer = subject.layer(torch.float32)
    numbers = layer.router(subject.batch(torch.float32)).statistics() | layer.router.statistics()
    bad = [name for name, value in numbers.items() if type(value) is not float or not math.isfinite(value)]
    bad += [name for name in SHARES if not -1e-6 <= numbers.get(name, 0.0) <= 1 + 1e-6]
    return not bad, f"{len(numbers)} of them" if not bad else f"{bad[0]} is {numbers[bad[0]]}"


def compiles(subject: Subject) -> Finding:
    """torch.compile takes the training layer as one graph, forwards and backwards, with the same output and gradients,
    under bf16 autocast too."""
    layer = (subject.pair(torch.float32) or subject.layer(torch.float32)).train()
    x = subject.batch(torch.float32).requires_grad_()
    torch._dynamo.reset()
    graph = compiled(layer, fullgraph=True, backend="aot_eager")  # Inductor would compile the same graph

    def found(layer: Callable[[Tensor], Tensor], half: bool) -> list[Tensor]:
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y = layer(x)
        return [y, *torch.autograd.grad(y.float().square().mean(), leaves, materialize_grads=True)]

    leaves = [x, *layer.parameters()]
    pairs = (pair for half in (False, True) for pair in zip(found(graph, half), found(layer, half), strict=True))
    scaled = ((got / size, want / size) for got, want in pairs for size in [want.abs().max().clamp(min=1e-9)])
    worst = max(deviation(got, want) for got, want in scaled)
    return bounded(worst, 1e-4, "one graph; relative difference")
