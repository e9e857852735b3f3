"""The layer: MoE(x) = combine(experts(dispatch(x))), with the experts' weights stacked."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from softmoe_cli.moe.few_rows import few_rows, pays
from softmoe_cli.moe.kind import Decider, Layer
from softmoe_cli.moe.processor import CPU_PRODUCTS
from softmoe_cli.moe.routing import Carried, Router, Routing, full_precision


def experts(
    rows: Float[Tensor, "e r d"],
    w1: Float[Tensor, "e d h"],
    b1: Float[Tensor, "e h"],
    w2: Float[Tensor, "e h d"],
    b2: Float[Tensor, "e d"],
    gelu: str,
) -> Float[Tensor, "e r d"]:
    """Each expert's MLP on its own rows, all experts in one batched product.

    `gelu` is `tanh` (the approximation that the official code uses) or `none` (exact).
    """
    if pays(rows, w1):
        return few_rows(F.gelu(few_rows(rows, w1, b1), approximate=gelu), w2, b2)
    hidden = F.gelu(torch.baddbmm(b1[:, None], rows, w1), approximate=gelu)
    return torch.baddbmm(b2[:, None], hidden, w2)


def ragged_experts(
    rows: Float[Tensor, "r d"],
    offsets: Int[Tensor, " e"],
    w1: Float[Tensor, "e d h"],
    b1: Float[Tensor, "e h"],
    w2: Float[Tensor, "e h d"],
    b2: Float[Tensor, "e d"],
    gelu: str,
) -> Float[Tensor, "r d"]:
    """Each expert's MLP on its run of rows, which ends at its offset: two grouped products. What is returned for rows
    behind the last offset means nothing, and its gradient must be zero."""
    if rows.device.type == "cpu" and rows.element_size() == 2 and len(rows):
        place, ends, length = in_tiles(offsets, len(rows))
        wide = rows.new_zeros(length, rows.shape[1]).index_copy(0, place, rows)
        return _ragged(wide, ends, w1, b1, w2, b2, gelu).index_select(0, place)
    return _ragged(rows, offsets, w1, b1, w2, b2, gelu)


def _ragged(
    rows: Tensor, offsets: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gelu: str
) -> Float[Tensor, "r d"]:
    place = torch.arange(rows.shape[0], device=rows.device, dtype=offsets.dtype)
    expert = torch.searchsorted(offsets, place, right=True).clamp(max=len(offsets) - 1)
    inner = grouped(rows, w1, offsets) + b1.to(rows.dtype).index_select(0, expert)
    # A grouped product leaves the rest of its result as it found the memory: neither that nor its gradient may count.
    hidden = F.gelu(inner.masked_fill((place >= offsets[-1])[:, None], 0), approximate=gelu)
    return grouped(hidden, w2, offsets) + b2.to(rows.dtype).index_select(0, expert)


TILE = 16


def in_tiles(offsets: Int[Tensor, " e"], r: int) -> tuple[Int[Tensor, " r"], Int[Tensor, " e"], int]:
    """Where r rows stand once each expert's run is filled up to a multiple of TILE rows, where the runs end then, and a
    length that holds all.

    oneDNN, which multiplies half precision on a CPU, makes and compiles a kernel for each number of rows that it meets.
    Experts get other numbers of rows with every batch, and a step took up to 1.6 times as long so, the first ones more
    (experiments/layer_speed)."""
    none = offsets.new_zeros(1)
    ends = ((offsets.diff(prepend=none) + TILE - 1) // TILE * TILE).cumsum(0, dtype=offsets.dtype)
    place = torch.arange(r, device=offsets.device, dtype=offsets.dtype)
    expert = torch.searchsorted(offsets, place, right=True)  # that of rows behind the last run is one more
    shift = torch.cat([none, ends]) - torch.cat([none, offsets])
    return (place + shift.index_select(0, expert)).long(), ends, r + len(offsets) * (TILE - 1)


def grouped(
    rows: Float[Tensor, "r d"], weights: Float[Tensor, "e d h"], offsets: Int[Tensor, " e"]
) -> Float[Tensor, "r h"]:
    """rows[i] @ weights[expert of i]; `rows` are sorted by expert."""
    odd = any(width * rows.element_size() % 16 for width in weights.shape[1:])
    # torch's grouped product has no float64, which only checks of the maths use, and no gradient of no rows.
    if odd or rows.dtype == torch.float64 or rows.shape[0] == 0:
        sizes = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
        rest = rows.new_zeros(len(rows) - sum(sizes), weights.shape[2])
        parts = rows[: sum(sizes)].split(sizes)
        return torch.cat([*(part @ weight for part, weight in zip(parts, weights, strict=True)), rest])
    return F.grouped_mm(rows, weights.to(rows.dtype), offs=offsets)


def chosen(left: Int[Tensor, " z"] | None, *of_all: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weights of these experts; others get a gradient of zeros."""
    w1, b1, w2, b2 = of_all if left is None else (each.index_select(0, left) for each in of_all)
    return w1, b1, w2, b2


class Stacked(nn.Module):
    """The weights of e MLPs, d to h to d, stacked: `w1` (e d h), `b1` (e h), `w2` (e h d), `b2` (e d). A subclass says
    which rows they meet. `left`: the experts that are left, where some were pruned; the others are never read."""

    left: Tensor | None

    def __init__(self, w1: nn.Parameter, b1: nn.Parameter, w2: nn.Parameter, b2: nn.Parameter, *, gelu: str) -> None:
        super().__init__()
        self.w1, self.b1, self.w2, self.b2 = w1, b1, w2, b2
        self.register_buffer("left", None, persistent=False)
        self.gelu = gelu

    def leave(self, left: Int[Tensor, " z"] | None) -> None:
        """From now on there are these experts only (ascending; None: all)."""
        self.left = left

    def weights_left(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """w1, b1, w2 and b2 of the experts that are left."""
        return chosen(self.left, self.w1, self.b1, self.w2, self.b2)

    def flop(self, rows: float) -> int:
        """FLOPs of both products on `rows` rows; a multiply-add counts as 2, biases and GELU as 0."""
        _, dim, hidden = self.w1.shape
        return round(rows * 2 * 2 * dim * hidden)


class Experts(Stacked):
    """All experts of a layer, in this process.

    Initialisation follows the official code: Xavier-uniform kernels per expert (the expert axis stays out
    of the fans), biases normal with std 1e-6, and all experts of a layer equal unless `identical` is false
    (vmoe's `split_rngs=False`; the slots are what tells experts apart).
    """

    def __init__(self, num_experts: int, dim: int, hidden: int, *, gelu: str, identical: bool) -> None:
        shapes = (num_experts, dim, hidden), (num_experts, hidden), (num_experts, hidden, dim), (num_experts, dim)
        super().__init__(*(nn.Parameter(torch.empty(shape)) for shape in shapes), gelu=gelu)
        self.identical = identical
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            for expert in parameter[:1] if self.identical else parameter:
                if expert.ndim == 2:
                    nn.init.xavier_uniform_(expert)
                else:
                    nn.init.normal_(expert, std=1e-6)
            if self.identical:
                parameter[1:] = parameter[:1]

    def forward(
        self, rows: Float[Tensor, "*rows d"], offsets: Int[Tensor, " e"] | None = None
    ) -> Float[Tensor, "*rows d"]:
        if offsets is None:
            return experts(rows, *self.weights_left(), self.gelu)
        return ragged_experts(rows, offsets, *self.weights_left(), self.gelu)


def in_fast_precision(
    x: Float[Tensor, "b n d"], whole: torch.dtype, compute: Callable[[Tensor], Tensor]
) -> Float[Tensor, "b n o"]:
    """What `compute` makes of tokens, under autocast rounded once, before they are read again and again; in `whole`,
    the parameters' precision, on a CPU where half precision would only take longer."""
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return compute(x)
    half = torch.get_autocast_dtype(device)
    if device == "cpu" and CPU_PRODUCTS[half] != "fast":
        with full_precision(x):
            return compute(x.to(whole)).to(half)
    return compute(x.to(half))


class MoE(Layer):
    """A router and its experts, in the place of a block's MLP. `shared` sees every token, whatever the router says
    (DeepSeekMoE, Dai et al., 2024, Section 3.2)."""

    router: Router
    experts: Stacked
    alive: Tensor
    """Which experts are left, (e), true for those: there where experts may go, and then a part of the weights."""

    def __init__(self, router: Router, experts: Stacked, shared: Experts | None = None) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared
        self.run_widths = experts.w1.shape[1:] if router.slots_per_expert is None else ()
        self.left: Sequence[int] = range(len(experts.w1))
        """The experts that are left, ascending."""
        self._all = len(experts.w1)
        self._slots = router.slots_per_expert
        self._balance = True

    def prunable(self, *, balance: bool = True) -> None:
        """Makes `alive`, so that experts can go. `balance`: whether the router goes on to even the load among those
        that are left."""
        if "alive" not in self._buffers:
            self.register_buffer("alive", torch.ones(len(self.left), dtype=torch.bool, device=self.experts.w1.device))
        self._balance = balance
        self.leave(self.left)

    def leave(self, left: Sequence[int]) -> None:
        """From now on the layer has only these of its experts, and computes what a layer that was built with them
        would. The others' weights stay where they are and are never read; their gradients are zero."""
        self.left = sorted(left)
        device = self.experts.w1.device
        some = None if len(self.left) == self._all else torch.tensor(self.left, dtype=torch.int64, device=device)
        self.alive.zero_()[self.left] = True
        self.router.leave(some, balance=self._balance)
        self.experts.leave(some)

    def weights_left(self) -> dict[str, Tensor]:
        """The weights of a layer that has only the experts that are left, by name."""
        axes = {f"router.{name}": axis for name, axis in self.router.expert_axes.items()}
        axes |= {f"experts.{name}": 0 for name in ("w1", "b1", "w2", "b2")}
        whole = {name: value for name, value in self.state_dict().items() if name != "alive"}
        left = torch.tensor(list(self.left), dtype=torch.int64, device=self.experts.w1.device)
        return {n: value.index_select(axes[n], left) if n in axes else value for n, value in whole.items()}

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if "alive" in self._buffers and not self.alive.is_meta:
            self.leave(self.alive.nonzero()[:, 0].tolist())

    def flop_by_part(self, num_tokens: int) -> dict[str, tuple[int, int]]:
        rows, trained = (self.experts.flop(each(num_tokens)) for each in (self.router.rows, self.router.train_rows))
        parts = {"router": (self.router.flop(num_tokens), self.router.train_flop(num_tokens))}
        parts["experts"] = rows, 3 * trained
        if self.shared is not None:
            every = self.shared.flop(float(num_tokens))
            parts["shared"] = every, 3 * every
        return parts

    def recomputed_flop_by_part(self, num_tokens: int) -> dict[str, int]:
        experts = self.experts.flop(self.router.train_rows(num_tokens))
        return super().recomputed_flop_by_part(num_tokens) | {"experts": experts}

    @property
    def landed_row_flop(self) -> int | None:
        return self.experts.flop(1.0) if self.router.counts_landed else None

    def landed_rows(self, num_tokens: int) -> float | None:
        return self.router.landed_rows(num_tokens) if self.router.counts_landed else None

    def choices(self, num_tokens: int) -> int | None:
        return None if self.router.k is None else num_tokens * self.router.k

    def last_product(self, num_tokens: int) -> tuple[str, int]:
        if self.shared is not None:
            return "shared", self.shared.flop(float(num_tokens)) // 2
        return "router", self.router.combine_flop(num_tokens)

    def rows(self, num_tokens: int) -> float:
        return self.router.train_rows(num_tokens)

    @property
    def active_share(self) -> float:
        return min(1.0, (self.router.experts_per_token - self.router.shared_experts) / len(self.experts.w1))

    def fixed_options(self) -> dict[str, Any]:
        """Those of the layer with all its experts, whichever are left."""
        slots = {} if self._slots is None else {"slots_per_expert": self._slots, "capacity_factor": None}
        return slots | self.router.fixed_options()

    @contextmanager
    def silenced(self, which: Sequence[int]) -> Iterator[None]:
        def hook(
            _module: Experts, inputs: tuple[Tensor, Int[Tensor, " e"] | None], rows: Float[Tensor, "*rows d"]
        ) -> Float[Tensor, "*rows d"]:
            which_rows = torch.tensor(which, device=rows.device)
            if inputs[1] is None:
                return rows.index_fill(0, which_rows, 0)
            place = torch.arange(len(rows), device=rows.device, dtype=torch.int32)
            expert = torch.searchsorted(inputs[1], place, right=True)
            return rows.masked_fill(torch.isin(expert, which_rows)[:, None], 0)

        handle = self.experts.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @overload
    def forward(self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]: ...

    @overload
    def forward(
        self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None, carried: Carried
    ) -> tuple[Float[Tensor, "b n d"], Carried]: ...

    def forward(
        self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None = None, carried: Carried | None = None
    ) -> Float[Tensor, "b n d"] | tuple[Float[Tensor, "b n d"], Carried]:
        """The tokens that the experts made; given what an earlier layer has `carried`, also what this one hands on."""
        given = (x, keep) if carried is None or not self.router.carries else (x, keep, carried)
        routing = self.router(*given)
        y = in_fast_precision(x, self.experts.w1.dtype, lambda tokens: self._through(tokens, keep, routing))
        return y if carried is None else (y, routing.carried or carried)

    def _through(
        self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None, routing: Routing
    ) -> Float[Tensor, "b n d"]:
        y: Tensor = routing.combine(self.experts(routing.dispatch(x), routing.offsets))
        if self.shared is not None:
            shared: Tensor = self.shared(x.flatten(0, 1)[None]).view_as(x)
            y = y + (shared if keep is None else shared.masked_fill(~keep[:, :, None], 0))
        return y


def layer_for(router: Decider, dim: int, hidden: int, *, gelu: str, identical: bool) -> Layer:
    """The layer that a router decides for, in the place of an MLP from `dim` to `hidden` units and back: its own, or
    one with MLPs as experts, which start equal if `identical`.

    Raises:
        ValueError: no such layer can be.
    """
    own = router.layer(hidden, gelu)
    if own is not None:
        return own
    assert isinstance(router, Router)
    e, shared = router.num_experts, router.shared_experts
    # Several shared experts are one of their summed width.
    beside = Experts(1, dim, shared * hidden, gelu=gelu, identical=True) if shared else None
    return MoE(router, Experts(e, dim, hidden, gelu=gelu, identical=identical), beside)
