"""Weak activations: a trained layer's weights, routed otherwise than in training. What self-contrast sets a model
against: Unchosen Experts Can Contribute Too (Shi et al., 2024), https://arxiv.org/abs/2405.14507, Section 2.2.

rank_R, random_1 and top_J are the paper's; its code (DavidFanzz/SCMoE) numbers ranks from 0, the paper and this from 1.
A soft layer leaves no expert unchosen, so that they do not exist there: drop_Q, slot_rank_R and flat are softmoe's own,
and so is skip, for any layer.
"""

import copy
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from softmoe_cli.moe.kind import Layer, Weak
from softmoe_cli.moe.layer import MoE
from softmoe_cli.moe.routing import DenseRouting, Router, SparseRouting, full_precision, uniform_weights
from softmoe_cli.moe.sparse import Balanced, Gate, choose, image_means, in_runs, renormalised


class WeakChoice(Router):
    """Tokens take experts by another router's gates, all that they ask for: nothing is dropped, and no token depends
    on another.

    Args:
        how: rank_R takes the expert that the balanced gates put in place R, top_J the J best, random_1 the `drawn` one
            with weight 1.
        gate, balance, num_experts, shared_experts: of the router that was trained; without `balance`, gates choose.
        by_image: all tokens of an image choose what their mean chooses.
        renormalise: divide gates by their sum over the experts that are taken, so that a single one has weight 1.
    """

    slots_per_expert = None

    def __init__(
        self,
        how: Weak,
        gate: Gate,
        balance: Balanced | None,
        *,
        num_experts: int,
        renormalise: bool,
        shared_experts: int,
        drawn: Int[Tensor, "b n"] | None,
        by_image: bool = False,
    ) -> None:
        super().__init__()
        assert (how.kind == "random") == (drawn is not None)
        self.how, self.gate, self.balance, self.drawn, self.by_image = how, gate, balance, drawn, by_image
        self.num_experts, self.renormalise, self.shared_experts = num_experts, renormalise, shared_experts

    @property
    def experts_per_token(self) -> float:
        return float(self.shared_experts + (self.how.number if self.how.kind == "top" else 1))

    def rows(self, num_tokens: int) -> float:
        return num_tokens * (self.experts_per_token - self.shared_experts)

    def flop(self, num_tokens: int) -> int:
        """The gate, which random_1 does not ask."""
        decisions = 0 if self.drawn is not None else 1 if self.by_image else num_tokens
        return 2 * decisions * len(self.gate.kernel) * self.num_experts

    def forward(self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None = None) -> SparseRouting:
        with full_precision(x):
            kept = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if keep is None else keep
            if self.drawn is not None:
                chosen = self.drawn[:, :, None]
                weights = torch.ones_like(chosen, dtype=self.gate.kernel.dtype)
            else:
                gates = self.gate.activate(self.gate(image_means(x, kept) if self.by_image else x)[0])
                scores = gates if self.balance is None else self.balance.scores(gates)
                chosen = choose(scores, self.how.number)
                if self.how.kind == "rank":
                    chosen = chosen[:, :, -1:]
                weights = (renormalised(gates, chosen) if self.renormalise else gates).gather(2, chosen)
                if self.renormalise and chosen.shape[2] == 1:
                    weights = torch.ones_like(weights)  # also where the gate is too small to be divided by
            weights, chosen = (each.expand(-1, x.shape[1], -1) for each in (weights, chosen))
            return in_runs(weights, chosen, kept, self.num_experts, weights.new_zeros(()))


class WeakMixture(Router):
    """A soft router with other combine weights: slot_rank_R gives each token its slot in place R alone, with weight 1,
    flat gives it the mean of all slots."""

    def __init__(self, how: Weak, of: Router) -> None:
        super().__init__()
        self.how, self.of = how, of
        self.num_experts, self.slots_per_expert = of.num_experts, of.slots_per_expert

    @property
    def experts_per_token(self) -> float:
        return 1.0 if self.how.kind == "slot_rank" else self.of.experts_per_token

    def rows(self, num_tokens: int) -> float:
        return self.of.rows(num_tokens)

    def flop(self, num_tokens: int) -> int:
        return self.of.flop(num_tokens)

    def forward(self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None = None) -> DenseRouting:
        routing = self.of(x, keep)
        combine = routing.combine_weights
        kept = torch.ones_like(combine[:, :, 0, 0]) if keep is None else keep.to(combine.dtype)
        if self.how.kind == "flat":
            _, combine = uniform_weights(kept, *combine.shape[2:])
        else:
            flat = combine.flatten(2)
            place = choose(flat, self.how.number)[:, :, -1:]
            combine = torch.zeros_like(flat).scatter(2, place, kept[:, :, None]).view_as(combine)
        return DenseRouting(routing.dispatch_weights, combine, routing.aux_loss)


class Skipped(nn.Module):
    """A layer that adds nothing: only what goes around it is left, shared experts included."""

    def forward(self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        return torch.zeros_like(x)


M = TypeVar("M", bound=nn.Module)


def narrowed(module: M, which: Int[Tensor, " q"]) -> M:
    """The module with some of the experts that it has left, ascending. Weights are its own."""
    fewer = copy.copy(module)
    fewer._buffers = dict(module._buffers)
    before = module.get_buffer("left") if module._buffers["left"] is not None else None
    fewer._buffers["left"] = which if before is None else before[which]
    return fewer


def weak_layer(layer: Layer, how: Weak, given: Int[Tensor, "*some"] | None) -> nn.Module:
    """The layer in a weak activation that its router has, with the same weights, in evaluation.

    Args:
        given: for random_1 the expert of each token, b n; for drop_Q the Q experts that are kept, q; else None.
    """
    if how.kind == "skip":
        return Skipped()
    assert isinstance(layer, MoE)
    experts = layer.experts
    if how.kind == "drop":
        assert given is not None
        experts = narrowed(experts, given)
    return MoE(layer.router.weaker(how, given), experts, layer.shared).eval()
