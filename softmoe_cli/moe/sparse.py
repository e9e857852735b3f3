"""What sparse routers share: a gate, balancing, choosing experts and giving out their slots.

As in V-MoE's official code (google-research/vmoe, nn/routing.py and moe.py) where a docstring names nothing else.
"""

import math

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from softmoe_cli.moe.kind import Shares
from softmoe_cli.moe.routing import SparseRouting, noise_like


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


def positions(experts: Int[Tensor, "g c"], num_experts: int) -> Int[Tensor, "g c"]:
    """How many earlier choices were of the same expert."""
    order = experts.argsort(dim=1, stable=True)
    demand = experts.new_zeros(len(experts), num_experts).scatter_add(1, experts, torch.ones_like(experts))
    place = torch.arange(experts.shape[1], device=experts.device).expand_as(experts)
    rank = torch.empty_like(experts).scatter(1, order, place)
    return rank - (demand.cumsum(dim=1) - demand).gather(1, experts)


def surest_first(gates: Float[Tensor, "g s e"]) -> Int[Tensor, "g s"]:
    """Tokens by their largest gate, descending; of equal ones the lower number first."""
    return gates.detach().amax(dim=2).argsort(dim=1, descending=True, stable=True)


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
    e = gates.shape[2]
    experts = chosen.masked_fill(~keep[:, :, None], e)
    token, gate, demand = seat(gates.gather(2, chosen), experts, order, e, slots, shape)
    return SparseRouting(token, gate, aux_loss, demand, shape)


def seat(
    weights: Float[Tensor, "g s k"],
    experts: Int[Tensor, "g s k"],
    order: Int[Tensor, "g s"] | None,
    num_experts: int,
    slots: int,
    shape: tuple[int | torch.SymInt, int],
) -> tuple[Int[Tensor, "e gp"], Float[Tensor, "e gp"], Int[Tensor, " e"]]:
    """`place` by choices and their weights: each slot's token and gate, and the choices of each expert. `num_experts`
    stands for no choice."""
    (g, s, k), e, tokens = experts.shape, num_experts, shape[0] * shape[1]
    if order is not None:
        weights, experts = (each.gather(1, order[:, :, None].expand(-1, -1, k)) for each in (weights, experts))
    choice, demand = fill(experts.mT.flatten(1), e, slots)
    served = (choice % s).flatten(1)
    if order is not None:
        served = order.gather(1, served)
    first = s * torch.arange(g, device=experts.device)[:, None]
    token = torch.where(choice < k * s, (first + served).view_as(choice), tokens)
    gate = nn.functional.pad(weights.mT.flatten(1), (0, 1)).gather(1, choice.flatten(1)).view_as(choice)
    token, gate = (each.transpose(0, 1).flatten(1) for each in (token, gate))
    return token, gate, demand.sum(dim=0)


def in_runs(
    weights: Float[Tensor, "b n k"],
    chosen: Int[Tensor, "b n k"],
    keep: Bool[Tensor, "b n"],
    num_experts: int,
    aux_loss: Float[Tensor, ""],
) -> SparseRouting:
    """Every choice gets a row, sorted by expert: nothing is dropped. Padding is computed like any token, so that the
    number of rows is known; its gates are zero."""
    b, n, k = chosen.shape

    def count(weight: Int[Tensor, " r"]) -> Int[Tensor, " e"]:
        return expert.new_zeros(num_experts).scatter_add(0, expert, weight)

    gate, expert = (weights * keep[:, :, None]).flatten(), chosen.flatten()
    order = expert.argsort(stable=True)
    offsets = count(torch.ones_like(expert)).cumsum(dim=0).int()
    demand = count(keep[:, :, None].expand_as(chosen).flatten().long())
    return SparseRouting(order // k, gate[order], aux_loss, demand, (b, n), offsets)


@torch.no_grad()
def choice_shares(
    chosen: Int[Tensor, "g s k"],
    weights: Float[Tensor, "g s k"],
    landed: Bool[Tensor, "g s k"],
    kinds: tuple[str, ...],
    shape: tuple[int | torch.SymInt, int],
) -> Shares:
    """What `Decided.shares` says of choices, of which those that `landed` count, among experts of these kinds."""
    given = weights.new_zeros(*chosen.shape[:2], len(kinds)).scatter(2, chosen, weights * landed)
    by_image = [each.flatten(0, 1).unflatten(0, (-1, shape[1]))[: shape[0]]
                for each in (given, chosen.masked_fill(~landed, -1))]  # fmt: skip
    return Shares(by_image[0], None, torch.arange(len(kinds), device=given.device), by_image[1], kinds)


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


def image_means(x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"]) -> Float[Tensor, "b 1 d"]:
    """The mean of each image's tokens that are kept, float32 or better; zero for an image of padding alone."""
    whole = x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~keep[:, :, None], 0)
    return whole.sum(dim=1, keepdim=True) / keep.sum(dim=1).clamp(min=1)[:, None, None]


def in_groups(each: Shaped[Tensor, "b n *d"], images: int) -> Shaped[Tensor, "g s *d"]:
    """Groups of `images` consecutive images each; zeros (and false) fill up the last group."""
    missing = -each.shape[0] % images
    if missing:
        each = torch.cat([each, each.new_zeros(missing, *each.shape[1:])])
    return each.reshape(-1, images * each.shape[1], *each.shape[2:])


GATES = ("softmax", "sigmoid")


class Gate(nn.Module):
    """Logits and gates: a linear map without bias, and a softmax over experts or a sigmoid for each. `left`: the
    experts that are left, where some were pruned."""

    left: Tensor | None

    def __init__(self, dim: int, num_experts: int, *, function: str, noise_std: float) -> None:
        super().__init__()
        if function not in GATES:
            raise ValueError(f"gate={function} is not one of {', '.join(GATES)}")
        if not noise_std >= 0:
            raise ValueError(f"noise_std={noise_std} must not be negative")
        self.function, self.std = function, noise_std / num_experts
        self.kernel = nn.Parameter(torch.empty(dim, num_experts))
        self.register_buffer("left", None, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        std = 1 / math.sqrt(len(self.kernel)) / 0.87962566103423978  # lecun_normal: cut at 2 sigma, std restored
        nn.init.trunc_normal_(self.kernel, std=std, a=-2 * std, b=2 * std)

    def activate(self, logits: Float[Tensor, "g s e"]) -> Float[Tensor, "g s e"]:
        return logits.sigmoid() if self.function == "sigmoid" else logits.softmax(dim=2)

    def shares(self, gates: Float[Tensor, "g s e"]) -> Float[Tensor, "g s e"]:
        """Gates that add up to one, for a loss that would otherwise be least where all are small: sigmoids are divided
        by their sum (DeepSeek-V3, 2024, equation 19)."""
        if self.function == "softmax":
            return gates
        return gates / gates.sum(dim=2, keepdim=True).clamp(min=1e-20)

    def forward(
        self, x: Float[Tensor, "g s d"], images: int = 1
    ) -> tuple[Float[Tensor, "g s e"], Float[Tensor, "g s e"]]:
        """Logits without noise, and those to use: in training with noise of std noise_std / e. A group is so many
        images."""
        clean = x.to(self.kernel.dtype) @ (self.kernel if self.left is None else self.kernel.index_select(1, self.left))
        noisy = clean + self.std * noise_like(clean, images) if self.training and self.std > 0 else clean
        return clean, noisy


def renormalised(gates: Float[Tensor, "g s e"], chosen: Int[Tensor, "g s k"]) -> Float[Tensor, "g s e"]:
    """Gates as shares of their token's sum over its k chosen experts, so that those add up to one: V-MoE's vision
    models after upcycling (Sparse Upcycling, Komatsuzaki et al., 2023) and, with sigmoids, DeepSeek-V3 (2024). Outputs
    are multiplied by them; choosing, serving order and auxiliary losses see the gates before that."""
    total = gates.gather(2, chosen).sum(dim=2, keepdim=True)
    return gates / total.clamp(min=1e-20)  # sigmoids may all be 0, and gradients still be finite


class Balanced(nn.Module):
    """The auxiliary losses of Tokens Choice and, instead of or beside them, a bias that only choosing sees
    (Auxiliary-Loss-Free Load Balancing, Wang et al., 2024, Algorithm 1)."""

    bias: Tensor
    demand: Tensor
    left: Tensor | None
    """The experts that are left, where some were pruned."""
    on: bool = True

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
        self.register_buffer("left", None, persistent=False)
        if bias_rate:
            self.register_buffer("bias", torch.zeros(num_experts))
            self.register_buffer("demand", torch.zeros(num_experts), persistent=False)

    def scores(self, gates: Float[Tensor, "g s e"]) -> Float[Tensor, "g s e"]:
        """The scores that experts are chosen by."""
        if not self.bias_rate:
            return gates
        return gates + (self.bias if self.left is None else self.bias.index_select(0, self.left))

    def add_demand(self, demand: Int[Tensor, " e"]) -> None:
        if self.bias_rate and self.training:
            with torch.no_grad():  # in here: torch.export cannot tell of a block in which nothing happens
                if self.left is None:
                    self.demand += demand
                else:
                    self.demand.index_add_(0, self.left, demand.to(self.demand.dtype))

    def counted(self) -> list[Tensor]:
        return [self.demand] if self.bias_rate else []

    @torch.no_grad()
    def move_bias(self) -> None:
        """Experts asked for less than the mean become easier to choose by a fixed step, the others harder."""
        if not self.bias_rate:
            return
        if self.left is None:
            self.bias += self._step(self.demand)
        elif self.on:
            self.bias.index_add_(0, self.left, self._step(self.demand.index_select(0, self.left)))
        self.demand.zero_()

    def _step(self, demand: Float[Tensor, " e"]) -> Float[Tensor, " e"]:
        return self.bias_rate * (demand.mean() - demand).sign()

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
        if not self.on:
            return gates.new_zeros(())
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


def check_choice(k: int, num_experts: int, images_per_group: int, shared_experts: int, renormalise: bool) -> None:
    """Raises ValueError where tokens cannot choose so many experts, or learn nothing by it."""
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} experts per token must be from 1 to num_experts={num_experts}")
    if images_per_group < 1:
        raise ValueError(f"images_per_group={images_per_group} must be at least 1")
    if shared_experts < 0:
        raise ValueError(f"shared_experts={shared_experts} must not be negative")
    if k == 1 < num_experts and renormalise:
        raise ValueError(
            "renormalise=true with k=1 makes every gate 1, which teaches the router nothing; use k=2 or more"
        )


def choice_limits(num_experts: int, k: int) -> dict[str, int]:
    """`Decider.weak_limits` of a router whose tokens choose k experts."""
    fewer = {"top": k - 1} if k > 1 else {}
    return {"rank": num_experts, "random": 1} | fewer | {"skip": 0}


def gates_depart(k: int, num_experts: int, gate: str, renormalise: bool, parts: int) -> str | None:
    """The part of `Router.departs_from_mlp` that is about the gates of a token's k experts."""
    if not renormalise and not (gate == "softmax" and k == num_experts):
        return f"its gates ({gate}) do not add up to one; set model.router.renormalise=true"
    if k % parts:
        return f"its k={k} does not hold whole copies of {parts} parts; set model.router.k to a multiple"
    return None


def slots_left(slots: int, num_experts: int, left: int, group: int) -> int:
    """Slots per expert for the `left` of `num_experts` experts that had `slots` each, in groups of `group` tokens.

    Each expert gets the slots of all that went beside its own: wherever their tokens go, no more of a group's choices
    are dropped than with all experts, since the choices of experts that stay do not change. One that is left has room
    for all.
    """
    if left == num_experts:
        return slots
    return group if left == 1 else min(group, slots * (num_experts - left + 1))


def room_for(tokens: int) -> str:
    """The options with which each expert has a slot for each of so many tokens."""
    return f"model.router.slots_per_expert={tokens} model.router.capacity_factor=null"
