"""Uniform / Soft: the ablation of Soft MoE (Puigcerver et al., 2023), Section 3.6 and Appendix A, with uniform
dispatch and learned combine: every slot is the mean token, so experts must start different."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmoe_cli.moe.routers.soft import SoftRouter
from softmoe_cli.moe.routing import DenseRouting, uniform_weights


class UniformSoftRouter(SoftRouter):
    """`SoftRouter` with D = 1/n."""

    needs_independent_experts = True

    exempt: Mapping[str, str] = {"official numbers": "no code of it was released"}
    official = None

    def train_flop(self, num_tokens: int) -> int:
        """No gradient goes to the dispatch weights."""
        return super().train_flop(num_tokens) - self.combine_flop(num_tokens)

    @classmethod
    def remark(cls, layers: Sequence[Mapping[str, Any]], num_tokens: int) -> str:
        """Nothing: its slots are uniform by definition."""
        return ""

    def forward(self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None = None) -> DenseRouting:
        routing = super().forward(x, keep)
        weights = routing.combine_weights
        kept = torch.ones_like(weights[:, :, 0, 0]) if keep is None else keep.to(weights.dtype)
        routing.dispatch_weights, _ = uniform_weights(kept, self.num_experts, self.slots_per_expert)
        return routing
