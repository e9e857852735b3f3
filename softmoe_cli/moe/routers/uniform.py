"""Uniform: the fixed routing of Soft MoE (Puigcerver et al., 2023), Section 3.6 and Appendix A: every slot is the mean
token, every token gets the mean of all slots. Tells what experts bring with mixing, but without anything learned about
it; the paper starts the experts independently, since equal ones would stay equal."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmoe_cli.moe.routing import DenseRouting, Router, full_precision, mixtures_depart, uniform_weights


class UniformRouter(Router):
    """D = 1/n and C = 1/(e p) everywhere.

    Args:
        dim: d.
        num_tokens: n, unused.
        num_experts: e.
        slots_per_expert: p.

    Raises:
        ValueError: not a positive number of either.
    """

    needs_independent_experts = True
    unprunable = "every expert has the same part in every token"

    def __init__(self, dim: int, num_tokens: int, *, num_experts: int, slots_per_expert: int) -> None:
        super().__init__()
        if num_experts < 1 or slots_per_expert < 1:
            raise ValueError(f"num_experts={num_experts} and slots_per_expert={slots_per_expert} must be at least 1")
        self.dim, self.num_experts = dim, num_experts
        self.slots_per_expert: int = slots_per_expert

    @property
    def experts_per_token(self) -> float:
        return float(self.num_experts)

    def rows(self, num_tokens: int) -> float:
        return float(self.num_experts * self.slots_per_expert)

    def flop(self, num_tokens: int) -> int:
        """Dispatch and combine: two products of n, e p and d."""
        return 2 * 2 * num_tokens * self.num_experts * self.slots_per_expert * self.dim

    def train_flop(self, num_tokens: int) -> int:
        """No gradient goes to the weights of either product."""
        return 2 * self.flop(num_tokens)

    def combine_flop(self, num_tokens: int) -> int:
        return self.flop(num_tokens) // 2

    def departs_from_mlp(self, num_tokens: int, parts: int) -> str | None:
        return mixtures_depart(num_tokens)

    weak_note = "gives each token the mean of all slots, none of which comes before another"

    def weak_limits(self) -> dict[str, int]:
        return {"skip": 0}

    def forward(self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None = None) -> DenseRouting:
        with full_precision(x):
            dtype = torch.promote_types(x.dtype, torch.float32)
            kept = torch.ones(x.shape[:2], device=x.device, dtype=dtype) if keep is None else keep.to(dtype)
            return DenseRouting(*uniform_weights(kept, self.num_experts, self.slots_per_expert), kept.new_zeros(()))
