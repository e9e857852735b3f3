"""Tokens Choice, the router of V-MoE: Scaling Vision with Sparse Mixture of Experts (Riquelme et al., 2021),
https://arxiv.org/abs/2106.05974, as in its official code (google-research/vmoe, nn/routing.py and moe.py).

The paper's letters: N tokens of a group are our s, E experts our e, C buffer positions our p. Overflow is dropped.
Gates are not renormalised over the chosen experts (equation 3 of the paper and the code) unless `gate` says so.
"""

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from softmoe_cli.moe.routing import Router, SparseRouting, full_precision, noise_like, slots_of


def choose(scores: Float[Tensor, "*t e"], k: int) -> Int[Tensor, "*t k"]:
    """The k experts with the largest scores, best first; of equal ones the lower number first."""
    left, picks = scores.detach(), []
    for _ in range(k):  # k passes cost less than a sort, and torch's topk leaves the order of equal scores open
        picks.append(left.argmax(dim=-1, keepdim=True))
        left = left.scatter(-1, picks[-1], -math.inf)
    return torch.cat(picks, dim=-1)


def fill(experts: Int[Tensor, "g c"], num_experts: int, slots: int) -> tuple[Int[Tensor, "g e p"], Int[Tensor, "g e"]]:
    """Which choice takes which slot, first come first served; and how many choices asked for each expert.

    Args:
        experts: the chosen experts in the order in which they are served; `num_experts` stands for no choice.

    Returns:
        The place in that order of the choice in each slot, c where the slot stays empty; choices per expert.
    """
    g, c = experts.shape
    order = experts.argsort(dim=1, stable=True)
    demand = experts.new_zeros(g, num_experts + 1).scatter_add(1, experts, torch.ones_like(experts))[:, :-1]
    position = torch.arange(slots, device=experts.device)
    index = (demand.cumsum(dim=1) - demand)[:, :, None] + position
    taken = order.gather(1, index.clamp(max=c - 1).flatten(1)).view(g, num_experts, slots)
    return torch.where(position < demand[:, :, None], taken, c), demand


def place(
    gates: Float[Tensor, "g s e"],
    chosen: Int[Tensor, "g s k"],
    keep: Bool[Tensor, "g s"],
    order: Int[Tensor, "g s"] | None,
    slots: int,
    aux_loss: Float[Tensor, ""],
    shape: tuple[int | torch.SymInt, int],
) -> SparseRouting:
    """Gives out the slots of every group: all first choices before any second, tokens in `order` (None: as they come).

    Args:
        shape: images and tokens of the batch.
    """
    g, s, k = chosen.shape
    e, tokens = gates.shape[2], shape[0] * shape[1]
    weights = gates.gather(2, chosen)
    experts = chosen.masked_fill(~keep[:, :, None], e)
    if order is not None:
        weights, experts = (each.gather(1, order[:, :, None].expand(-1, -1, k)) for each in (weights, experts))
    choice, demand = fill(experts.mT.flatten(1), e, slots)
    served = (choice % s).flatten(1)
    if order is not None:
        served = order.gather(1, served)
    first = s * torch.arange(g, device=chosen.device)[:, None]
    token = torch.where(choice < k * s, (first + served).view_as(choice), tokens)
    gate = nn.functional.pad(weights.mT.flatten(1), (0, 1)).gather(1, choice.flatten(1)).view_as(choice)
    token, gate = (each.transpose(0, 1).flatten(1) for each in (token, gate))
    return SparseRouting(token, gate, aux_loss, demand.sum(dim=0), shape)


def squared_variation(v: Float[Tensor, "g e"]) -> Float[Tensor, " g"]:
    """(std / mean)^2 over experts, with the population's standard deviation; 0 for a group of padding alone."""
    return v.var(dim=1, correction=0) / v.mean(dim=1).square().clamp(min=torch.finfo(v.dtype).tiny)


def importance_loss(gates: Float[Tensor, "g s e"]) -> Float[Tensor, " g"]:
    """Variation of the experts' summed gates (V-MoE, Appendix A.2). `gates` are those without noise."""
    return squared_variation(gates.sum(dim=1))


def load_loss(
    clean: Float[Tensor, "g s e"], noisy: Float[Tensor, "g s e"], std: float, k: int, keep: Bool[Tensor, "g s"]
) -> Float[Tensor, " g"]:
    """Variation of the experts' expected load (V-MoE, Appendix A.2): the mean over tokens of the chance that an expert
    would pass the token's k-th largest noisy logit, were its own noise drawn again."""
    threshold = noisy.topk(k, dim=2).values[:, :, -1:]
    chance = torch.special.ndtr((clean - threshold) / std) * keep[:, :, None]
    return squared_variation(chance.sum(dim=1) / keep.sum(dim=1, keepdim=True).clamp(min=1))


def gshard_loss(gates: Float[Tensor, "g s e"], keep: Bool[Tensor, "g s"]) -> Float[Tensor, " g"]:
    """e times the sum over experts of (share of tokens that like it best) (mean gate): GShard (Lepikhin et al., 2020),
    Algorithm 1."""
    e = gates.shape[2]
    best = nn.functional.one_hot(gates.detach().argmax(dim=2), e) * keep[:, :, None]
    tokens = keep.sum(dim=1, keepdim=True).clamp(min=1)
    return e * ((best.sum(dim=1).to(gates.dtype) / tokens) * (gates.sum(dim=1) / tokens)).sum(dim=1)


def grouped_tokens(
    x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None, images: int
) -> tuple[Float[Tensor, "g s d"], Bool[Tensor, "g s"]]:
    """Groups of `images` consecutive images; a last group that is not full is filled up with padding."""
    if keep is None:
        keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return in_groups(x, images), in_groups(keep, images)


def in_groups(each: Shaped[Tensor, "b n *d"], images: int) -> Shaped[Tensor, "g s *d"]:
    """Of `images` consecutive images each; zeros (and false) fill up the last one."""
    missing = -each.shape[0] % images
    if missing:
        each = torch.cat([each, each.new_zeros(missing, *each.shape[1:])])
    return each.reshape(-1, images * each.shape[1], *each.shape[2:])


GATES = ("softmax", "sigmoid", "softmax_chosen", "sigmoid_chosen")


class Gate(nn.Module):
    """Logits and gates of the sparse routers: a linear map without bias, and softmax or sigmoid.

    With `_chosen` a token's gates are divided by their sum over its k experts, so that they add up to one: V-MoE's
    vision models after upcycling (Sparse Upcycling, Komatsuzaki et al., 2023) and, with sigmoid, DeepSeek-V3 (2024).
    Choosing, serving order and auxiliary losses see the gates before that.
    """

    def __init__(self, dim: int, num_experts: int, *, function: str, noise_std: float) -> None:
        super().__init__()
        if function not in GATES:
            raise ValueError(f"gate={function} is not one of {', '.join(GATES)}")
        if not noise_std >= 0:
            raise ValueError(f"noise_std={noise_std} must not be negative")
        self.function, self.std = function, noise_std / num_experts
        self.kernel = nn.Parameter(torch.empty(dim, num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std = 1 / math.sqrt(len(self.kernel)) / 0.87962566103423978  # lecun_normal: cut at 2 sigma, std restored
        nn.init.trunc_normal_(self.kernel, std=std, a=-2 * std, b=2 * std)

    def activate(self, logits: Float[Tensor, "g s e"]) -> Float[Tensor, "g s e"]:
        return logits.sigmoid() if self.function.startswith("sigmoid") else logits.softmax(dim=2)

    def shares(self, gates: Float[Tensor, "g s e"]) -> Float[Tensor, "g s e"]:
        """Gates that add up to one, for a loss that would otherwise be least where all are small: sigmoids are divided
        by their sum (DeepSeek-V3, 2024, equation 19)."""
        if not self.function.startswith("sigmoid"):
            return gates
        return gates / gates.sum(dim=2, keepdim=True).clamp(min=1e-20)

    def weigh(self, gates: Float[Tensor, "g s e"], chosen: Int[Tensor, "g s k"]) -> Float[Tensor, "g s e"]:
        """What outputs are multiplied by: the gates, or their share in the sum over the chosen experts."""
        if not self.function.endswith("_chosen"):
            return gates
        total = gates.gather(2, chosen).sum(dim=2, keepdim=True)
        return gates / total.clamp(min=1e-20)  # sigmoids may all be 0, and gradients still be finite

    def forward(
        self, x: Float[Tensor, "g s d"], images: int = 1
    ) -> tuple[Float[Tensor, "g s e"], Float[Tensor, "g s e"]]:
        """Logits without noise, and those to use: in training with noise of std noise_std / e. A group is so many
        images."""
        clean = x.to(self.kernel.dtype) @ self.kernel
        noisy = clean + self.std * noise_like(clean, images) if self.training and self.std > 0 else clean
        return clean, noisy


class Balanced(nn.Module):
    """The auxiliary losses of Tokens Choice and, instead of or beside them, a bias that only choosing sees
    (Auxiliary-Loss-Free Load Balancing, Wang et al., 2024, Algorithm 1)."""

    bias: Tensor
    demand: Tensor

    def __init__(
        self,
        num_experts: int,
        *,
        noise_std: float,
        importance_weight: float,
        load_weight: float,
        gshard_weight: float,
        bias_rate: float,
    ) -> None:
        super().__init__()
        for name, value in {
            "importance_weight": importance_weight, "load_weight": load_weight, "gshard_weight": gshard_weight,
            "bias_rate": bias_rate,
        }.items():  # fmt: skip
            if not value >= 0:
                raise ValueError(f"{name}={value} must not be negative")
        if load_weight and not noise_std:
            raise ValueError(
                f"load_weight={load_weight} has no effect with noise_std=0: the load is a chance; set it to 0"
            )
        if load_weight and bias_rate:
            raise ValueError(
                f"bias_rate={bias_rate} with load_weight={load_weight}: that loss is about choices by the gates alone; "
                "set load_weight=0"
            )
        self.importance_weight, self.load_weight, self.gshard_weight = importance_weight, load_weight, gshard_weight
        self.bias_rate = bias_rate
        if bias_rate:
            self.register_buffer("bias", torch.zeros(num_experts))
            self.register_buffer("demand", torch.zeros(num_experts), persistent=False)

    def scores(self, gates: Float[Tensor, "g s e"]) -> Float[Tensor, "g s e"]:
        """What experts are chosen by."""
        return gates + self.bias if self.bias_rate else gates

    def count(self, demand: Int[Tensor, " e"]) -> None:
        if self.bias_rate and self.training:
            with torch.no_grad():  # in here: torch.export cannot tell of a block in which nothing happens
                self.demand += demand

    def counted(self) -> list[Tensor]:
        return [self.demand] if self.bias_rate else []

    @torch.no_grad()
    def settle(self) -> None:
        """Experts asked for less than the mean become easier to choose by a fixed step, the others harder."""
        if self.bias_rate:
            self.bias += self.bias_rate * (self.demand.mean() - self.demand).sign()
            self.demand.zero_()

    def loss(
        self,
        gate: Gate,
        clean: Float[Tensor, "g s e"],
        noisy: Float[Tensor, "g s e"],
        gates: Float[Tensor, "g s e"],
        keep: Bool[Tensor, "g s"],
        k: int,
    ) -> Float[Tensor, ""]:
        """The weighted sum of the losses with a weight, as the mean over groups. The load loss exists only with noise:
        without it there is no chance to speak of."""
        total = gates.new_zeros(gates.shape[0])
        kept = keep[:, :, None]
        if self.importance_weight:
            unmoved = gates if noisy is clean else gate.activate(clean)
            total = total + self.importance_weight * importance_loss(unmoved * kept)
        if self.load_weight and noisy is not clean:
            total = total + self.load_weight * load_loss(clean, noisy, gate.std, k, keep)
        if self.gshard_weight:
            total = total + self.gshard_weight * gshard_loss(gate.shares(gates) * kept, keep)
        return total.mean()


class TokensChoiceRouter(Router):
    """Each token takes its k best experts; each expert has room for so many, in the order of the tokens.

    All first choices are served before any second one. With groups of several images an image's result
    depends on its neighbours in the batch; a last group that is not full keeps the full group's slots.

    Args:
        dim: d.
        num_tokens: n, of which `capacity_factor` is a multiple.
        num_experts: e.
        k: experts per token.
        slots_per_expert: p, slots of an expert in a group; null to have it follow from `capacity_factor`.
        capacity_factor: p = images_per_group * n * k * capacity_factor / e, rounded.
        capacity_rounding: ceil (V-MoE) or round, half to even (fair: as the soft router rounds).
        capacity_multiple: which p is padded up to a multiple of (V-MoE 4; fair: 1). Both are for `capacity_factor`:
            a given p stays as it is.
        images_per_group: images whose tokens compete for the same slots (V-MoE: 8).
        gate: softmax (the paper) or sigmoid, each expert for itself; softmax_chosen and sigmoid_chosen divide by the
            sum over the chosen experts.
        noise_std: the logits' noise in training has this over e as its standard deviation.
        importance_weight, load_weight, gshard_weight: of the auxiliary losses; 0: none.
        bias_rate: step of the balancing bias after each update; 0: none.
        shared_experts: experts beside these that see every token.

    Raises:
        ValueError: an impossible combination.
    """

    exempt: ClassVar[dict[str, str]] = {"token permutation": "slots are given out in the order of the tokens"}

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        *,
        num_experts: int,
        k: int,
        slots_per_expert: int | None,
        capacity_factor: float | None,
        capacity_rounding: str,
        capacity_multiple: int,
        images_per_group: int,
        gate: str,
        noise_std: float,
        importance_weight: float,
        load_weight: float,
        gshard_weight: float,
        bias_rate: float,
        shared_experts: int,
    ) -> None:
        super().__init__()
        check_choice(k, num_experts, images_per_group, shared_experts, gate)
        slots = slots_of(
            slots_per_expert, capacity_factor, images_per_group * num_tokens * k, num_experts, capacity_rounding,
            capacity_multiple,
        )  # fmt: skip
        self.num_experts, self.k = num_experts, k
        self.slots_per_expert: int = slots
        self.images_per_group, self.shared_experts = images_per_group, shared_experts
        self.gate = Gate(dim, num_experts, function=gate, noise_std=noise_std)
        self.balance = Balanced(
            num_experts,
            noise_std=noise_std,
            importance_weight=importance_weight,
            load_weight=load_weight,
            gshard_weight=gshard_weight,
            bias_rate=bias_rate,
        )
        self.options: dict[str, Any] = {
            "num_experts": num_experts, "k": k, "slots_per_expert": slots, "capacity_factor": None,
            "capacity_rounding": capacity_rounding, "capacity_multiple": capacity_multiple,
            "images_per_group": images_per_group, "gate": gate, "noise_std": noise_std,
            "importance_weight": importance_weight, "load_weight": load_weight, "gshard_weight": gshard_weight,
            "bias_rate": bias_rate, "shared_experts": shared_experts,
        }  # fmt: skip

    @property
    def experts_per_token(self) -> float:
        return float(self.k + self.shared_experts)

    def rows(self, num_tokens: int) -> float:
        return self.num_experts * self.slots_per_expert / self.images_per_group

    def flop(self, num_tokens: int) -> int:
        """The gate: one product of n, d and e."""
        return 2 * num_tokens * self.gate.kernel.numel()

    def priority(self, gates: Float[Tensor, "g s e"]) -> Int[Tensor, "g s"] | None:
        """The order in which tokens are served; None: as they come."""
        return None

    def forward(self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None = None) -> SparseRouting:
        with full_precision(x):
            tokens, kept = grouped_tokens(x, keep, self.images_per_group)
            clean, noisy = self.gate(tokens, self.images_per_group)
            gates = self.gate.activate(noisy)
            aux_loss = self.balance.loss(self.gate, clean, noisy, gates, kept, self.k)
            chosen = choose(self.balance.scores(gates), self.k)
            order = self.priority(gates)
            weights, shape = self.gate.weigh(gates, chosen), (x.shape[0], x.shape[1])
            routing = place(weights, chosen, kept, order, self.slots_per_expert, aux_loss, shape)
            self.balance.count(routing.demand)
            return routing

    def counted(self) -> list[Tensor]:
        return self.balance.counted()

    def after_update(self) -> None:
        self.balance.settle()


def check_choice(k: int, num_experts: int, images_per_group: int, shared_experts: int, gate: str) -> None:
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} experts per token must be from 1 to num_experts={num_experts}")
    if images_per_group < 1:
        raise ValueError(f"images_per_group={images_per_group} must be at least 1")
    if shared_experts < 0:
        raise ValueError(f"shared_experts={shared_experts} must not be negative")
    if k == 1 < num_experts and gate.endswith("_chosen"):
        raise ValueError(f"gate={gate} with k=1 makes every gate 1, which teaches the router nothing; use k=2 or more")
