"""What a router is and what it returns: a router decides, a routing carries out.

routing = router(x, keep)                             x: b n d, keep: b n, false for padding
rows    = routing.dispatch(x)                         e r d, or r d with `routing.offsets`
y       = routing.combine(experts(rows, offsets))     b n d
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from softmoe_cli.moe.kind import Decided, Decider, Shares, Weak


class Carried(NamedTuple):
    """What travels with the tokens through a forward pass: what layers of a kind hand on from one to the next, and what
    is known of the images beside their pixels."""

    logits: Float[Tensor, "g s e"] | None = None
    """The last router's logits, float32, in the groups that these layers have; None before the first one."""
    task: Int[Tensor, " b"] | None = None
    """The task of each image; None where nobody has said it."""


class Routing(Decided):
    """One decision of one router about one batch."""

    carried: Carried | None = None
    """What the layer hands on, where its router `carries`."""
    offsets: Int[Tensor, " e"] | None
    """Where each expert's rows end, when they are a single run of rows sorted by expert; None when every expert has
    as many rows as the next. Rows behind the last end are nobody's: they are not computed."""

    @abstractmethod
    def dispatch(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "*rows d"]:
        """The rows that the experts process: e r d, image by image or group by group, or r d with `offsets`."""

    @abstractmethod
    def combine(self, rows: Float[Tensor, "*rows d"]) -> Float[Tensor, "b n d"]:
        """The tokens made from the rows that the experts returned."""

    def measured(self, by: str) -> Float[Tensor, " e"]:
        """Each expert's part in this batch by one of its router's `measures`, in float64 where the device has it."""
        raise NotImplementedError(f"{type(self).__name__} measures no {by}")


class Router(Decider):
    """A part of a layer that gives rows of tokens to experts, which are MLPs.

    Options of these names mean the same for all routers: `slots_per_expert` with `capacity_factor`, of which one is
    null. A checkpoint keeps the slots that came of them, so that its weights fit at any number of tokens.
    """

    expert_axes: ClassVar[Mapping[str, int]] = {}
    """The axis of the experts in each parameter and buffer that has one. When an MLP is cut into parts, the parts of a
    copy start alike in these parameters, so that a token that chooses one of them chooses all."""
    most_weight: float = 1.0
    """The most that a token's weights can add up to."""
    needs_independent_experts: bool = False
    """Whether experts that start equal would stay equal."""
    shared_experts: int = 0
    """Experts beside the routed ones that see every token."""
    of_one_expert: ClassVar[Mapping[str, Any]] = {}
    """Options of its own with which a layer of `num_experts=1` is that one expert and nothing else."""
    counts_landed: bool = False
    """Whether its routings say how many rows hold a token (`Decided.landed`), as those of single tokens do."""
    direct: bool = False
    """Whether its routings give tokens something beside what rows were made of, so that combining is linear in the rows
    but for that."""
    k: int | None = None
    """How many experts a token chooses; None where tokens do not choose."""
    measures: Sequence[str] = ("alpha_score", "hit_rate")
    """What its routings measure of each expert: the sum of the weights that tokens give it, or how many tokens it sees.
    Experts can be pruned by either."""
    carries: bool = False
    """Whether a layer hands `Carried` on to the next one: `forward` then takes it as a third argument, and its routing
    has it."""
    by_task: bool = False
    """Whether it decides by the task of each image, of several: it then `carries`."""

    @property
    @abstractmethod
    def experts_per_token(self) -> float:
        """How many experts have a part in one token's output, on average."""

    @abstractmethod
    def rows(self, num_tokens: int) -> float:
        """Rows per image that the experts compute, empty ones included. Where the images decide how many: as many as
        the router's balance aims at."""

    def train_rows(self, num_tokens: int) -> float:
        """The same in training."""
        return self.rows(num_tokens)

    def landed_rows(self, num_tokens: int) -> float:
        """How many of `train_rows` hold a token when the load is as even as the router aims at."""
        return min(self.train_rows(num_tokens), num_tokens * (self.experts_per_token - self.shared_experts))

    def fixed_options(self) -> dict[str, Any]:
        """Options beside slots whose values came of the model, with these values (`Layer.fixed_options`)."""
        return {}

    def combine_flop(self, num_tokens: int) -> int:
        """The part of `flop` that is the product which makes tokens of the experts' rows; 0 where rows are added up."""
        return 0

    @abstractmethod
    def forward(self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None = None) -> Routing:
        """Decides about a batch. Tokens where `keep` is false are padding: they take no slot and get zero."""

    def leave(self, left: Int[Tensor, " z"] | None, *, balance: bool) -> None:
        """From now on decides among these of its experts (ascending; None: all), as a router would that was built with
        them alone. `balance`: whether it goes on to even the experts' load."""
        raise NotImplementedError(f"experts of {type(self).__name__} cannot be pruned")

    def options_left(self) -> dict[str, Any]:
        """Options with which a router is built that has only the experts that are left, where they are not those of
        the layer with all."""
        raise NotImplementedError(f"experts of {type(self).__name__} cannot be pruned")

    def weaker(self, how: Weak, given: Int[Tensor, "*some"] | None) -> "Router":
        """A router that has this one's parameters and decides in a weak way that is in `weak_limits` and not skip.
        `given` is as in weak.weak_layer."""
        raise NotImplementedError(f"{type(self).__name__} has no weak activation but skip")

    def follow(self, earlier: "Router") -> None:
        """Makes what a layer needs to use what an earlier one of its model hands on. Called once, when it is built, if
        its router `carries` and is not the first."""


class DroplessRouter(Router):
    """A router that gives each token k experts, which compute as many rows as ask for them: there is no capacity, and
    nothing is dropped."""

    slots_per_expert = None
    counts_landed = True
    unstacked = "gives each expert its own number of rows, which torch does not multiply for several models at once"
    k: int

    @property
    def experts_per_token(self) -> float:
        return float(self.k + self.shared_experts)

    def rows(self, num_tokens: int) -> float:
        return float(num_tokens * self.k)


class DenseRouting(Routing):
    """Every token is a part of every slot and the reverse: two batched matrix products.

    Args:
        dispatch_weights: share of each token in each slot, float32.
        combine_weights: share of each slot in each token, float32.
    """

    offsets = None

    def __init__(
        self,
        dispatch_weights: Float[Tensor, "b n e p"],
        combine_weights: Float[Tensor, "b n e p"],
        aux_loss: Float[Tensor, ""],
    ) -> None:
        self.dispatch_weights = dispatch_weights
        self.combine_weights = combine_weights
        self.aux_loss = aux_loss

    def dispatch(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "e bp d"]:
        # Slots with the experts innermost: one expert's rows, image by image, then lie at equal distances.
        b, _, e, p = self.dispatch_weights.shape
        slots = torch.bmm(self.dispatch_weights.mT.flatten(2).mT.to(x.dtype), x)
        return slots.view(b * p, e, -1).transpose(0, 1)

    def combine(self, rows: Float[Tensor, "e bp d"]) -> Float[Tensor, "b n d"]:
        b, _, e, p = self.combine_weights.shape
        by_image = rows.transpose(0, 1).reshape(b, p * e, -1)  # a view where p is 1
        return torch.bmm(self.combine_weights.mT.flatten(2).to(rows.dtype), by_image)

    @torch.no_grad()
    def measured(self, by: str) -> Float[Tensor, " e"]:
        assert by == "alpha_score"
        return self.combine_weights.to(most_precise(self.combine_weights)).sum(dim=(0, 1, 3))

    @torch.no_grad()
    def shares(self) -> Shares:
        e, p = self.dispatch_weights.shape[2:]
        expert = torch.arange(e, device=self.dispatch_weights.device).repeat_interleave(p)
        return Shares(self.combine_weights.flatten(2), self.dispatch_weights.flatten(2), expert, None)

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """Every slot is filled and no token dropped. `dispatch_max` and its like are means over slots of the dispatch
        weights' extremes over tokens, and over tokens of the combine weights' extremes over slots (the curves
        of the Soft MoE paper's Figures 13 and 14). An expert's load is its share of all combine weights."""
        load = self.combine_weights.sum(dim=(0, 1, 3))
        numbers = {
            "dispatch_max": self.dispatch_weights.amax(dim=1).mean(),
            "dispatch_min": self.dispatch_weights.amin(dim=1).mean(),
            "combine_max": self.combine_weights.amax(dim=(2, 3)).mean(),
            "combine_min": self.combine_weights.amin(dim=(2, 3)).mean(),
        }
        values = {name: value.item() for name, value in numbers.items()}
        return {"utilisation": 1.0, "dropped_share": 0.0} | load_statistics(load) | values


def uniform_weights(
    keep: Float[Tensor, "b n"], num_experts: int, slots: int
) -> tuple[Float[Tensor, "b n e p"], Float[Tensor, "b n e p"]]:
    """Each kept token's equal share in every slot, and every slot's equal share in each kept token."""
    kept = keep[:, :, None, None].expand(-1, -1, num_experts, slots)
    return kept / kept.sum(dim=1, keepdim=True).clamp(min=1), kept / (num_experts * slots)


def mixtures_depart(num_tokens: int) -> str | None:
    """`departs_from_mlp` of a router whose slots are mixtures of tokens."""
    if num_tokens == 1:
        return None
    return (
        f"its slots are mixtures of {num_tokens} tokens, and an MLP of a mixture is no mixture of MLPs; choose a "
        "router whose experts see single tokens"
    )


class SparseRouting(Routing):
    """Each row is one token, or nothing: a gather, and a sum of what was gathered.

    Args:
        token: for each row the token's number among the b n of the batch; b n for an empty row.
        gate: what a row's result is multiplied by, float32; 0 for an empty row.
        demand: how many tokens asked for each expert, whether they found a slot or not.
        shape: images (a symbol while torch.export traces) and tokens of the batch.
        offsets: as in `Routing`.
    """

    def __init__(
        self,
        token: Int[Tensor, "*rows"],
        gate: Float[Tensor, "*rows"],
        aux_loss: Float[Tensor, ""],
        demand: Int[Tensor, " e"],
        shape: tuple[int | torch.SymInt, int],
        offsets: Int[Tensor, " e"] | None = None,
    ) -> None:
        self.token, self.gate, self.aux_loss, self.demand, self.offsets = token, gate, aux_loss, demand, offsets
        self.shape = shape

    @property
    def landed(self) -> Int[Tensor, ""]:
        return (self.token < self.shape[0] * self.shape[1]).sum()

    def dispatch(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "*rows d"]:
        tokens = x.flatten(0, 1)
        if self.offsets is None:
            tokens = nn.functional.pad(tokens, (0, 0, 0, 1))  # an empty row is a row of zeros
        return tokens.index_select(0, self.token.flatten()).view(*self.token.shape, -1)

    def combine(self, rows: Float[Tensor, "*rows d"]) -> Float[Tensor, "b n d"]:
        b, n = self.shape
        weighted = rows.flatten(0, -2) * self.gate.flatten()[:, None].to(torch.promote_types(rows.dtype, torch.float32))
        y = weighted.new_zeros(b * n + 1, rows.shape[-1]).index_add(0, self.token.flatten(), weighted)
        return y[:-1].view(b, n, -1).to(rows.dtype)

    @torch.no_grad()
    def measured(self, by: str) -> Float[Tensor, " e"]:
        """Tokens that found no slot do not count."""
        precise = most_precise(self.gate)
        if self.offsets is None:
            each = self.gate if by == "alpha_score" else self.token < int(self.shape[0]) * self.shape[1]
            return each.to(precise).sum(dim=1)
        if by == "hit_rate":
            return self.demand.to(precise)
        place = torch.arange(len(self.gate), device=self.gate.device, dtype=self.offsets.dtype)
        expert = torch.searchsorted(self.offsets, place, right=True)
        return self.gate.new_zeros(len(self.offsets), dtype=precise).index_add(0, expert, self.gate.to(precise))

    @torch.no_grad()
    def shares(self) -> Shares:
        if self.offsets is None:
            e = len(self.token)
            expert = torch.arange(e, device=self.token.device)[:, None].expand_as(self.token)
        else:  # rows behind the last end are nobody's: they meet the column after the last expert
            e = len(self.offsets)
            place = torch.arange(len(self.token), device=self.token.device, dtype=self.offsets.dtype)
            expert = torch.searchsorted(self.offsets, place, right=True)
        b, n = self.shape
        where = (self.token.flatten(), expert.flatten())
        empty = self.gate.new_zeros(int(b) * n + 1, e + 1)
        given = empty.index_put(where, self.gate.flatten(), accumulate=True)[:-1, :-1]
        sees = empty.index_put(where, empty.new_ones(()))[:-1, :-1] > 0
        order = given.masked_fill(~sees, -math.inf).argsort(dim=1, descending=True, stable=True)
        chosen = order.masked_fill(~sees.gather(1, order), -1)[:, : max(1, int(sees.sum(dim=1).max()))]
        return Shares(given.view(b, n, e), None, torch.arange(e, device=given.device), chosen.view(b, n, -1))

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """`utilisation`: share of rows that hold a token. `dropped_share`: share of tokens that no expert saw.
        `gate_mean`: mean over tokens of the sum of their gates, which is how much of its experts a token gets."""
        tokens = int(self.shape[0]) * self.shape[1]
        filled = self.token < tokens
        seen = torch.zeros(tokens + 1, device=self.token.device).index_fill(0, self.token.flatten(), 1.0)[:-1]
        return {
            "utilisation": filled.float().mean().item(),
            "dropped_share": 1 - seen.mean().item(),
            **load_statistics(self.demand),
            "gate_mean": self.gate.sum().item() / tokens,
        }


def most_precise(like: Tensor) -> torch.dtype:
    """What sums over many batches are kept in: float64, but on a device that has none."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def load_statistics(load: Num[Tensor, " e"]) -> dict[str, float]:
    """How evenly experts are used.

    dead_share: share of experts with less than a hundredth of the mean load. load_max: the largest load over the
    mean. effective_experts_share: exp(entropy of the loads) / e, which is 1 when all are equal and 1/e when one
    expert has everything.
    """
    load = load.cpu().double()  # on a CPU: not every device has float64
    share = load / load.sum().clamp(min=1e-30)
    e = len(load)
    entropy = -(share * share.clamp(min=1e-30).log()).sum().item()
    return {
        "dead_share": (share < 0.01 / e).double().mean().item(),
        "load_max": share.max().item() * e,
        "effective_experts_share": math.exp(entropy) / e,
    }


def capacity(num_tokens: int, num_experts: int, factor: float, rounding: str, multiple: int) -> int:
    """Slots per expert for `num_tokens` tokens to place (choices, where a token makes several).

    num_tokens * factor / num_experts in double precision, rounded up (`ceil`) or half to even (`round`), then up to a
    multiple (vmoe's compute_capacity: the product first, because that decides some cases).

    Raises:
        ValueError: less than one slot, or no finite number of them.
    """
    exact = num_tokens * factor / num_experts
    if not math.isfinite(exact):
        raise ValueError(f"capacity_factor={factor:g} is not a finite number")
    slots = math.ceil(exact) if rounding == "ceil" else round(exact)
    if slots < 1:
        raise ValueError(
            f"capacity_factor={factor:g} gives {slots} slots per expert for {num_tokens} tokens or choices and "
            f"num_experts={num_experts}; use fewer experts, a larger capacity_factor, or set slots_per_expert and "
            "capacity_factor=null"
        )
    return -(-slots // multiple) * multiple


def slots_of(
    slots_per_expert: int | None,
    capacity_factor: float | None,
    num_tokens: int,
    num_experts: int,
    rounding: str,
    multiple: int,
) -> int:
    """The one of the two ways to say how many slots an expert has that was chosen.

    Raises:
        ValueError: both or neither given, or not a positive number of experts and slots.
    """
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts} must be at least 1")
    if (slots_per_expert is None) == (capacity_factor is None):
        raise ValueError(
            f"slots_per_expert={slots_per_expert} and capacity_factor={capacity_factor}: "
            "give one of them and set the other to null"
        )
    if rounding not in ("ceil", "round"):
        raise ValueError(f"capacity_rounding={rounding} is not one of ceil, round")
    if multiple < 1:
        raise ValueError(f"capacity_multiple={multiple} must be at least 1")
    if slots_per_expert is None:
        assert capacity_factor is not None
        return capacity(num_tokens, num_experts, capacity_factor, rounding, multiple)
    if slots_per_expert < 1:
        raise ValueError(f"slots_per_expert={slots_per_expert} must be at least 1")
    return slots_per_expert


def has_numbers(x: Tensor) -> bool:
    """Whether what a tensor holds can be read now: not on the meta device, nor while torch predicts, compiles or
    exports."""
    return not (torch.compiler.is_compiling() or x.is_meta or isinstance(x, FakeTensor))


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """No autocast on the device of `x`: logits, softmaxes and losses stay in the parameters' precision, float32."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


_whole: tuple[int, int] | None = None


@contextmanager
def whole_batch(first: int, images: int) -> Iterator[None]:
    """Inside, a batch is a run of a larger one of `images` images, from its image `first`."""
    global _whole
    before, _whole = _whole, (first, images)
    try:
        yield
    finally:
        _whole = before


DrawInto = Callable[[Tensor], Tensor]
"""Fills a tensor with random numbers, in place."""
_drawn: Callable[[Tensor, DrawInto], Tensor] | None = None


@contextmanager
def drawn_by(drawn: Callable[[Tensor, DrawInto], Tensor]) -> Iterator[None]:
    """Inside, random numbers in the shape of a tensor are what `drawn` makes of it, and of how they are drawn."""
    global _drawn
    before, _drawn = _drawn, drawn
    try:
        yield
    finally:
        _drawn = before


def of_whole_batch(like: Float[Tensor, "..."], draw: DrawInto, images: int = 1) -> Tensor:
    """Random numbers in the shape of `like`, each row for a group of `images` images: `draw` fills a tensor in place.

    Inside `whole_batch` those of the larger batch are drawn, and the rows that are this one's are kept. So it gets what
    it would get as a part of the larger batch, and the random state moves on by as much.
    """
    if _drawn is not None:
        return _drawn(like, draw)
    if _whole is None:
        return draw(torch.empty_like(like))
    first, total = _whole
    size = (-(-total // images), *like.shape[1:])
    start = first // images
    return draw(torch.empty_strided(size, like.stride(), dtype=like.dtype, device=like.device))[start:][: len(like)]


def noise_like(like: Float[Tensor, "..."], images: int = 1) -> Tensor:
    """Standard normal noise, as `of_whole_batch`."""
    alone = _whole is None and _drawn is None
    return torch.randn_like(like) if alone else of_whole_batch(like, Tensor.normal_, images)


@contextmanager
def routings(model: nn.Module) -> Iterator[list[Decided]]:
    """Collects, in call order, what every router inside `model` decides while the context is open and gradients are
    computed: evaluation in between leaves nothing that would hold its memory.

    Clear the list before each forward pass. Recomputation in the backward pass calls routers again, so
    sum the auxiliary losses before `backward`: then each counts exactly once.
    """
    seen: list[Decided] = []

    def remember(_module: nn.Module, _inputs: object, decision: Decided) -> None:
        if torch.is_grad_enabled():
            seen.append(decision)

    hooks = [module.register_forward_hook(remember) for module in model.modules() if isinstance(module, Decider)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
