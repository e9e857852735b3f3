"""MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts (Jin et al., 2024),
https://arxiv.org/abs/2410.07348

The paper's letters: N_FFN experts with an MLP are our e, N_ZC are those that compute (almost) nothing, T tokens of a
group our s, K our k, D our d, tau, gamma (`capacity_factor`) and beta (`balance_weight`) as there. All N = e + N_ZC
experts stand in one order: MLPs, constant, copy, zero.

The released code (SkyworkAI/MoE-plus-plus, inference only) weighs otherwise than the paper: `gates` has both. It has no
capacity and no balance loss, so that training follows the paper. As printed, Equation 8 has room for gamma T of the K T
choices; `capacity_counts_choices` reads its T as K T.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from softmoe_cli.moe.kind import Shares
from softmoe_cli.moe.routing import Carried, Router, SparseRouting, full_precision, has_numbers
from softmoe_cli.moe.sparse import Gate, choice_shares, choose, grouped_tokens, in_groups, positions, seat, surest_first

EXPERT_KINDS = ("ffn", "constant", "copy", "zero")
Gates = Literal["softmax", "renormalised", "top2_softmax"]


def num_constants(num_experts: int, num_zero: int, num_copy: int) -> float:
    """Equation 10, before rounding: constant experts beside so many others."""
    return max(num_experts / 4 - num_zero - num_copy, 1.0)


def ffn_share(num_experts: int, num_free: int, tau: float) -> float:
    """Table 1: the share of choices that goes to experts with an MLP when all is balanced as tau says; the complexity
    over that of a layer without the other `num_free` experts."""
    return num_experts / (num_experts + num_free / tau)


def capacities(choices: int, num_experts: int, num_free: int, tau: float, factor: float) -> tuple[float, float]:
    """Equation 8, before rounding: room for choices at an expert with an MLP, and at another one."""
    return choices * factor / (num_experts + num_free / tau), choices * factor / (tau * num_experts + num_free)


def normalised(logits: Float[Tensor, "*t e"], std: float) -> Float[Tensor, "*t e"]:
    """Logits with the standard deviation `std` over experts, unbiased as in the released code; their mean stays. Logits
    that are all equal stay as they are."""
    own = logits.std(dim=-1, keepdim=True) if logits.shape[-1] > 1 else torch.zeros_like(logits)
    return logits / torch.where(own > 0, own / std, 1)


def choice_gates(
    logits: Float[Tensor, "*t e"], chosen: Int[Tensor, "*t k"], rule: Gates, num_zero: int
) -> Float[Tensor, "*t k"]:
    """What a token's k choices are multiplied by.

    softmax: their shares of a softmax over all experts (Equation 1). renormalised: the same with zero experts' set to
    zero and divided by their sum, so that the partner of a zero expert has weight 1 (the released model). top2_softmax:
    a softmax over the chosen alone, in which a zero expert keeps its share (the released code's other rule).
    """
    if rule == "softmax":
        return logits.softmax(dim=-1).gather(-1, chosen)
    picked, zero = logits.gather(-1, chosen), chosen >= logits.shape[-1] - num_zero
    if rule == "top2_softmax":
        return picked.softmax(dim=-1)
    # A softmax without the zero experts: a share of all can be too small to be divided by.
    return picked.masked_fill(zero, torch.finfo(logits.dtype).min).softmax(dim=-1).masked_fill(zero, 0)


def balance_loss(
    logits: Float[Tensor, "g s e"], chosen: Int[Tensor, "g s k"], keep: Bool[Tensor, "g s"], num_ffn: int, tau: float
) -> Float[Tensor, " g"]:
    """Equation 7: the sum over experts of eta (share of tokens that chose it, dropped or not) (mean probability), with
    eta 1 for experts with an MLP and tau for the others."""
    tokens = keep.sum(dim=1, keepdim=True).clamp(min=1)
    shares = (logits.softmax(dim=2) * keep[:, :, None]).sum(dim=1) / tokens
    votes = keep[:, :, None].expand_as(chosen).flatten(1).to(logits.dtype)
    counts = torch.zeros_like(shares).scatter_add(1, chosen.flatten(1), votes) / tokens
    eta = torch.full_like(shares[0], tau)
    eta[:num_ffn] = 1
    return (eta * counts * shares).sum(dim=1)


class Constants(nn.Module):
    """The experts a1 x + a2 v with [a1, a2] = softmax(W_c x), each with a W_c and a v of its own (Equation 5)."""

    def __init__(self, number: int, dim: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(number, 2, dim))
        self.vector = nn.Parameter(torch.empty(number, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.kernel, std=0.02)
        nn.init.normal_(self.vector)

    def forward(self, x: Float[Tensor, "g s d"]) -> Float[Tensor, "g s c 2"]:
        """a1 and a2 of every token at every one of them."""
        return (x.to(self.kernel.dtype) @ self.kernel.flatten(0, 1).mT).unflatten(2, (-1, 2)).softmax(dim=3)


class Choices(NamedTuple):
    """What the tokens of a batch chose, among all N experts.

    Attributes:
        chosen: each token's choices, best first.
        weights: what these are multiplied by.
        landed: which of them count: none of padding, none that a capacity has dropped.
        keep: false for padding.
        logits: before any normalisation.
        shares: the softmax over all experts by which they were chosen.
    """

    chosen: Int[Tensor, "g s k"]
    weights: Float[Tensor, "g s k"]
    landed: Bool[Tensor, "g s k"]
    keep: Bool[Tensor, "g s"]
    logits: Float[Tensor, "g s all"]
    shares: Float[Tensor, "g s all"]


class ZeroComputationRouting(SparseRouting):
    """A row for each choice that landed on an expert with an MLP; what the other experts make of the tokens stands in
    `direct`, None where it is nothing.

    `rows` are token, gate and offsets as in `SparseRouting`, `counts` the experts of each of EXPERT_KINDS.
    """

    def __init__(
        self,
        rows: tuple[Int[Tensor, "*rows"], Float[Tensor, "*rows"], Int[Tensor, " e"] | None],
        direct: Float[Tensor, "b n d"] | None,
        choices: Choices,
        aux_loss: Float[Tensor, ""],
        shape: tuple[int | torch.SymInt, int],
        counts: tuple[int, int, int, int],
        dropped_in_training: Callable[[Choices], Bool[Tensor, "g s k"]],
    ) -> None:
        token, gate, offsets = rows
        self.choices, self.direct = choices, direct
        self._counts, self._dropped = counts, dropped_in_training
        ffn = choices.chosen < counts[0]
        asked = torch.where(ffn & choices.keep[:, :, None], choices.chosen, counts[0]).flatten()
        demand = asked.new_zeros(counts[0] + 1).scatter_add(0, asked, torch.ones_like(asked))[:-1]
        super().__init__(token, gate, aux_loss, demand, shape, offsets)

    def dispatch(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "*rows d"]:
        """Rows without a token are zeros, with offsets too where there are such rows: behind the last one."""
        tokens = x.flatten(0, 1)
        if self.offsets is None or not has_numbers(self.token):
            tokens = nn.functional.pad(tokens, (0, 0, 0, 1))
        return tokens.index_select(0, self.token.flatten()).view(*self.token.shape, x.shape[-1])

    def combine(self, rows: Float[Tensor, "*rows d"]) -> Float[Tensor, "b n d"]:
        y = super().combine(rows)
        return y if self.direct is None else y + self.direct.to(y.dtype)

    def shares(self) -> Shares:
        kinds = tuple(kind for kind, count in zip(EXPERT_KINDS, self._counts, strict=True) for _ in range(count))
        return choice_shares(*self.choices[:3], kinds, self.shape)

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """Shares of choices by kind, MLPs per token, and what the capacity in training would drop of each kind."""
        chosen, weights, landed, keep, logits, shares = self.choices
        kept, ends = keep[:, :, None].expand_as(chosen), torch.tensor(self._counts).cumsum(0).tolist()
        dropped = self._dropped(self.choices) & kept
        tokens, numbers = keep.sum().clamp(min=1), {}
        for kind, end, count in zip(EXPERT_KINDS, ends, self._counts, strict=True):
            of_kind = kept & (chosen < end) & (chosen >= end - count)
            numbers[f"{kind}_share"] = of_kind.sum() / (tokens * chosen.shape[2])
            numbers[f"{kind}_dropped_share"] = (of_kind & dropped).sum() / of_kind.sum().clamp(min=1)
        mlps = (landed & (chosen < self._counts[0])).sum(dim=2)[keep].float()
        numbers |= {"ffn_per_token": mlps.mean(), "ffn_per_token_std": mlps.std(correction=0)}
        numbers["zero_gate"] = shares[..., ends[2] :].sum(dim=2)[keep].mean()
        numbers["logit_variance"] = logits.var(dim=2, correction=0)[keep].mean()
        values = {name: value.item() for name, value in numbers.items()}
        own = super().statistics()
        own |= {"dropped_share": 1 - landed.any(dim=2)[keep].float().mean().item()}
        own |= {"utilisation": 1.0} if self.offsets is not None else {}  # rows behind the last one are not computed
        return own | {"gate_mean": ((weights * landed).sum() / tokens).item()} | values


class ZeroComputationRouter(Router):
    """Each token takes k of all experts; the more of them compute nothing, the less it costs.

    Capacities and groups of images are for training alone, as in the released code: an evaluation drops nothing, and
    its result does not depend on neighbours.

    Args:
        dim: d.
        num_tokens: n.
        num_experts: e, experts with an MLP.
        num_zero, num_copy: experts that give 0, and the token itself.
        num_constant: experts a1 x + a2 v; null: as many as Equation 10 says.
        k: experts per token (the paper: 2).
        tau: how much is sent to experts with an MLP: each gets tau / (tau e + N_ZC) of the choices, each other one
            1 / (tau e + N_ZC) (the paper: 0.75).
        capacity_factor: room in training over what balanced choices need (the paper: 1.1); null: room for all.
        capacity_counts_choices: whether capacities are shares of the k s choices, or of the s tokens, as printed.
        batch_priority: tokens with the largest gate are served first (Batch Priority Routing), not in their order.
        images_per_group: images whose tokens compete for room in training, and over which the balance loss is taken.
        gates: what a choice is multiplied by, see `choice_gates`.
        logits_norm: standard deviation that gates and choices give the logits (the released model: 1); null: their own.
        gating_residual: add a linear map of the previous such layer's logits to the logits (Equation 6).
        balance_weight: beta, of the balance loss (the paper: 0.01); 0: none.

    Raises:
        ValueError: an impossible combination.
    """

    slots_per_expert = None
    evaluates_alone = True
    counts_landed = True
    decays = ("gate.kernel", "residual.weight", "constants.kernel")
    unprunable = "its layers hand their experts' logits on to each other, and its experts are of several kinds"
    expert_axes: ClassVar[dict[str, int]] = {"gate.kernel": 1, "residual.weight": 0}
    official = "zero_computation"
    of_one_expert: ClassVar[dict[str, Any]] = {
        "k": 1, "num_zero": 0, "num_copy": 0, "num_constant": 0, "gates": "softmax", "tau": 1.0,
    }  # fmt: skip

    k: int

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        *,
        num_experts: int,
        num_zero: int,
        num_copy: int,
        num_constant: int | None,
        k: int,
        tau: float,
        capacity_factor: float | None,
        capacity_counts_choices: bool,
        batch_priority: bool,
        images_per_group: int,
        gates: Gates,
        logits_norm: float | None,
        gating_residual: bool,
        balance_weight: float,
    ) -> None:
        super().__init__()
        if num_constant is None:
            num_constant = int(num_constants(num_experts, num_zero, num_copy))
        self.counts = (num_experts, num_constant, num_copy, num_zero)
        _check(self.counts, k, tau, capacity_factor, images_per_group, gates, logits_norm, balance_weight)
        self.num_experts, self.k, self.tau, self.gates = num_experts, k, tau, gates
        self.factor, self.counts_choices, self.batch_priority = capacity_factor, capacity_counts_choices, batch_priority
        self.loss_images = images_per_group
        self.images_per_group = images_per_group if capacity_factor is not None else 1
        self.logits_norm, self.carries, self.balance_weight = logits_norm, gating_residual, balance_weight
        self._refuse_idle()
        self.direct = bool(num_constant or num_copy)
        if self.num_free:
            named = zip(EXPERT_KINDS, self.counts, strict=True)
            self.kinds = [kind for kind, count in named if count and sum(self.counts) - count >= k]
        self.gate = Gate(dim, sum(self.counts), function="softmax", noise_std=0.0)
        self.constants = Constants(num_constant, dim) if num_constant else None
        self.residual: nn.Linear | None = None
        self._forbidden: str | None = None

    def _refuse_idle(self) -> None:
        """Raises ValueError for an option that changes nothing beside the others."""
        roomy, unmoved = self.factor is None, self.factor is None and not self.balance_weight
        all_room, nothing = "capacity_factor=null, which has room for all", "capacity_factor=null and balance_weight=0"
        idle = {
            "batch_priority=true": (self.batch_priority and roomy, f"with {all_room}; give one of them"),
            "capacity_counts_choices=false": (not self.counts_choices and roomy, f"with {all_room}; give one of them"),
            f"images_per_group={self.loss_images}": (self.loss_images > 1 and unmoved, f"with {nothing}; set it to 1"),
            f"tau={self.tau}": (
                self.tau != 1 and (unmoved or not self.num_free),
                f"{f'with {nothing}' if self.num_free else 'without zero, copy or constant experts'}; set it to 1",
            ),
        }
        for option, (is_idle, why) in idle.items():
            if is_idle:
                raise ValueError(f"{option} has no effect {why}")

    @property
    def num_free(self) -> int:
        """N_ZC."""
        return sum(self.counts[1:])

    @property
    def experts_per_token(self) -> float:
        return self.k * ffn_share(self.num_experts, self.num_free, self.tau)

    def rows(self, num_tokens: int) -> float:
        """As many choices as go to experts with an MLP when all is balanced."""
        return float(round(num_tokens * self.experts_per_token))

    def train_rows(self, num_tokens: int) -> float:
        if self.factor is None:
            return self.rows(num_tokens)
        return self.num_experts * self.room(self.images_per_group * num_tokens)[0] / self.images_per_group

    def room(self, tokens: int) -> tuple[int, int]:
        """Choices that training has room for in a group of so many tokens, at an expert with an MLP and at another."""
        assert self.factor is not None
        choices = tokens * (self.k if self.counts_choices else 1)
        ffn, free = capacities(choices, self.num_experts, self.num_free, self.tau, self.factor)
        return math.ceil(ffn), math.ceil(free)

    def flop(self, num_tokens: int) -> int:
        """Logits, the residual's map, and of the constant experts W_c x and the mix of their v."""
        experts, constants = sum(self.counts), self.counts[1]
        residual = 2 * experts**2 if self.residual is not None else 0
        return num_tokens * (2 * self.gate.kernel.shape[0] * (experts + 3 * constants) + residual)

    weak_note = "has experts that compute nothing, so that ranks are of different kinds"

    def departs_from_mlp(self, num_tokens: int, parts: int) -> str | None:
        _, constant, copy, zero = self.counts
        if constant or copy:
            return (
                "copy and constant experts are no copies of the MLP; set model.router.num_copy=0 and "
                "model.router.num_constant=0"
            )
        if self.gates == "softmax" and not (self.k == self.num_experts and not zero):
            return "its gates (softmax) do not add up to one; set model.router.gates=renormalised"
        if self.gates == "top2_softmax" and zero:
            return "a zero expert keeps its gate with gates=top2_softmax; set model.router.gates=renormalised"
        if zero >= self.k:
            return f"all k={self.k} choices can be zero experts; set model.router.num_zero to less"
        if parts > 1 and (zero or self.k % parts):
            return (
                f"its k={self.k} choices do not always hold whole copies of {parts} parts; set model.expert_width=null"
            )
        return None

    @contextmanager
    def without(self, kind: str) -> Iterator[None]:
        before, self._forbidden = self._forbidden, kind
        try:
            yield
        finally:
            self._forbidden = before

    def follow(self, earlier: Router) -> None:
        experts = sum(self.counts)
        self.residual = nn.Linear(experts, experts, bias=False)
        nn.init.normal_(self.residual.weight, std=0.02)

    def forward(
        self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None = None, carried: Carried | None = None
    ) -> ZeroComputationRouting:
        with full_precision(x):
            tokens, kept = grouped_tokens(x, keep, self.images_per_group if self.training else 1)
            logits = self.scores(tokens, carried)
            routing = self.route(logits, tokens, kept, (x.shape[0], x.shape[1]))
            routing.carried = (carried or Carried())._replace(logits=logits)
            return routing

    def scores(self, tokens: Float[Tensor, "g s d"], carried: Carried | None) -> Float[Tensor, "g s all"]:
        """Equation 6: G(x), before any softmax or normalisation, which is also what is handed on."""
        logits: Tensor = self.gate(tokens)[0]
        if self.residual is None:
            return logits
        if carried is None or carried.logits is None:
            raise ValueError("this layer follows another one and needs what that hands on")
        return logits + self.residual(carried.logits)

    def route(
        self,
        logits: Float[Tensor, "g s all"],
        tokens: Float[Tensor, "g s d"],
        keep: Bool[Tensor, "g s"],
        shape: tuple[int | torch.SymInt, int],
    ) -> ZeroComputationRouting:
        """The decision by given logits; `shape`: images and tokens of the batch."""
        scaled = logits if self.logits_norm is None else normalised(logits, self.logits_norm)
        if self._forbidden is not None:
            place = EXPERT_KINDS.index(self._forbidden)
            first = sum(self.counts[:place])
            scaled = scaled.clone()
            scaled[..., first : first + self.counts[place]] = -math.inf
        shares = scaled.softmax(dim=2)
        chosen = choose(scaled, self.k)  # of shares all but the largest can be 0 alike
        weights = choice_gates(scaled, chosen, self.gates, self.counts[3])
        landed = keep[:, :, None].expand_as(chosen)
        choices = Choices(chosen, weights, landed, keep, logits, shares)
        limited = self.training and self.factor is not None
        if limited:
            choices = choices._replace(landed=landed & ~self._overflow(choices))
        rows = self._slots(choices, shape) if limited else self._runs(choices, shape)
        aux_loss = logits.new_zeros(())
        if self.balance_weight:
            together = self.loss_images // self.images_per_group if self.training else 1
            every, votes, kept = (in_groups(each, together) for each in (logits, chosen, keep))
            losses = balance_loss(every, votes, kept, self.num_experts, self.tau)
            aux_loss = self.balance_weight * losses.mean()
        direct = self._direct(choices, tokens, shape)
        return ZeroComputationRouting(rows, direct, choices, aux_loss, shape, self.counts, self._dropped_in_training)

    def _order(self, shares: Float[Tensor, "g s all"]) -> Int[Tensor, "g s"] | None:
        """The order in which tokens are served; None: as they come."""
        return surest_first(shares) if self.batch_priority else None

    def _dropped_in_training(self, choices: Choices) -> Bool[Tensor, "g s k"]:
        """Which choices of an evaluation, of whose groups each is an image, training would drop in its own groups."""
        grouped = choices
        if not self.training:
            grouped = Choices(*(in_groups(each, self.images_per_group) for each in choices))
        return self._overflow(grouped).reshape(-1, *choices.chosen.shape[1:])[: len(choices.chosen)]

    def _overflow(self, choices: Choices) -> Bool[Tensor, "g s k"]:
        """Which choices the capacity in training drops: all first choices are served before any second one."""
        chosen = choices.chosen
        if self.factor is None:
            return torch.zeros_like(chosen, dtype=torch.bool)
        g, s, k = chosen.shape
        experts, order = chosen.masked_fill(~choices.keep[:, :, None], sum(self.counts)), self._order(choices.shares)
        if order is not None:
            experts = experts.gather(1, order[:, :, None].expand(-1, -1, k))
        earlier = positions(experts.mT.flatten(1), sum(self.counts) + 1).view(g, k, s).mT
        if order is not None:
            earlier = torch.empty_like(earlier).scatter(1, order[:, :, None].expand(-1, -1, k), earlier)
        ffn, free = self.room(s)
        return earlier >= torch.where(chosen < self.num_experts, ffn, free)

    def _slots(
        self, choices: Choices, shape: tuple[int | torch.SymInt, int]
    ) -> tuple[Int[Tensor, "e gp"], Float[Tensor, "e gp"], None]:
        """Rows with room for as many at every expert: one batched product computes them all."""
        e, order = self.num_experts, self._order(choices.shares)
        experts = torch.where(choices.landed, choices.chosen, e).clamp(max=e)
        token, gate, _ = seat(choices.weights, experts, order, e, self.room(experts.shape[1])[0], shape)
        return token, gate, None

    def _runs(
        self, choices: Choices, shape: tuple[int | torch.SymInt, int]
    ) -> tuple[Int[Tensor, " r"], Float[Tensor, " r"], Int[Tensor, " e"]]:
        """Rows sorted by expert, of the choices that landed."""
        e, (b, n) = self.num_experts, shape
        expert = torch.where(choices.landed, choices.chosen, e).clamp(max=e).flatten()
        counts = expert.new_zeros(e + 1).scatter_add(0, expert, torch.ones_like(expert))
        order = expert.argsort(stable=True)[: self._runs_made(counts[:e], b, n)]
        filled = expert[order] < e
        token = torch.where(filled, order // self.k, b * n)
        gate = torch.where(filled, choices.weights.flatten()[order], 0)
        return token, gate, counts[:e].cumsum(dim=0).int()

    def _runs_made(self, landed: Int[Tensor, " e"], images: int | torch.SymInt, tokens: int) -> int | torch.SymInt:
        """How many rows are made: as many as landed, which a GPU has to be waited for. On the meta device, where
        nothing lands, as many as `rows` says; where else there is no telling as many as there are choices, and those
        behind the last offset are not computed."""
        if landed.is_meta:
            return round(int(images) * self.rows(tokens))
        return int(landed.sum()) if has_numbers(landed) else images * tokens * self.k

    def _direct(
        self, choices: Choices, tokens: Float[Tensor, "g s d"], shape: tuple[int | torch.SymInt, int]
    ) -> Float[Tensor, "b n d"] | None:
        """What copy and constant experts make of the tokens: nothing is gathered for it."""
        e, constant, copy, _ = self.counts
        if not (constant or copy):
            return None
        every = choices.logits.new_zeros(choices.logits.shape)
        every = every.scatter(2, choices.chosen, choices.weights * choices.landed)
        share = every[..., e + constant : e + constant + copy].sum(dim=2)
        mixed: Tensor | float = 0.0
        if self.constants is not None:
            parts = every[..., e : e + constant, None] * self.constants(tokens)
            share, mixed = share + parts[..., 0].sum(dim=2), parts[..., 1] @ self.constants.vector
        made = share[..., None] * tokens + mixed
        return made.reshape(-1, shape[1], made.shape[2])[: shape[0]]


def _check(
    counts: tuple[int, int, int, int],
    k: int,
    tau: float,
    factor: float | None,
    images_per_group: int,
    gates: Gates,
    logits_norm: float | None,
    balance_weight: float,
) -> None:
    """Raises ValueError where tokens cannot choose so, or learn nothing by it."""
    for name, count in zip(("num_experts", "num_constant", "num_copy", "num_zero"), counts, strict=True):
        if count < (name == "num_experts"):
            raise ValueError(f"{name}={count} must be at least {int(name == 'num_experts')}")
    if not 1 <= k <= sum(counts):
        raise ValueError(f"k={k} experts per token must be from 1 to all {sum(counts)} experts")
    if images_per_group < 1:
        raise ValueError(f"images_per_group={images_per_group} must be at least 1")
    if not 0 < tau < math.inf:
        raise ValueError(f"tau={tau} must be above 0")
    if factor is not None and not 0 < factor < math.inf:
        raise ValueError(f"capacity_factor={factor} must be above 0; null: room for all")
    if logits_norm is not None and not 0 < logits_norm < math.inf:
        raise ValueError(f"logits_norm={logits_norm} must be above 0; null: logits as they are")
    if not balance_weight >= 0:
        raise ValueError(f"balance_weight={balance_weight} must not be negative")
    if k == 1 < sum(counts) and gates != "softmax":
        raise ValueError(f"gates={gates} with k=1 makes every gate 1, which teaches the router nothing; use k=2")
