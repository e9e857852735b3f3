"""Soft / Uniform: the ablation of Soft MoE (Puigcerver et al., 2023), Section 3.6 and Appendix A, with learned dispatch
and uniform combine: every token of an image gets the same update."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmoe_cli.moe.routers.soft import SoftRouter
from softmoe_cli.moe.routing import DenseRouting, uniform_weights


class SoftUniformRouter(SoftRouter):
    """`SoftRouter` with C = 1/(e p)."""

    exempt: Mapping[str, str] = {"official numbers": "no code of it was released"}
    official = None
    unprunable = "every token gets the mean of all slots, so that no expert has more of it than another"

    def train_flop(self, num_tokens: int) -> int:
        """No gradient goes to the combine weights."""
        return super().train_flop(num_tokens) - self.combine_flop(num_tokens)

    weak_note = "gives each token the mean of all slots, none of which comes before another"

    def weak_limits(self) -> dict[str, int]:
        return {"skip": 0}

    def forward(self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None = None) -> DenseRouting:
        routing = super().forward(x, keep)
        weights = routing.dispatch_weights
        kept = torch.ones_like(weights[:, :, 0, 0]) if keep is None else keep.to(weights.dtype)
        _, routing.combine_weights = uniform_weights(kept, self.num_experts, self.slots_per_expert)
        return routing
