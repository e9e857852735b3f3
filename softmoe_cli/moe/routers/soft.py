"""Soft MoE: From Sparse to Soft Mixtures of Experts (Puigcerver et al., 2023), https://arxiv.org/abs/2308.00951

The paper's letters: m tokens are our n, n experts our e, p slots our p, Phi our `phi`. Where the paper and the
official code (google-research/vmoe, projects/soft_moe/router.py) differ, this follows the code: the
epsilon 1e-6 is added to the sum of squares inside the root (Algorithm 2 adds it to the norm), and `phi`
starts truncated-normal with std 1/sqrt(d e) (Appendix E says Glorot).
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softmoe_cli.moe.routing import DenseRouting, Router, full_precision

EPS = 1e-6


def l2_normalize(x: Float[Tensor, "..."], dim: int) -> Float[Tensor, "..."]:
    """x / sqrt(sum(x^2) + 1e-6) along `dim` (Algorithm 2, with the code's epsilon); a zero vector stays zero."""
    return x / (x.square().sum(dim=dim, keepdim=True) + EPS).sqrt()


def soft_logits(
    x: Float[Tensor, "b n d"], phi: Float[Tensor, "d e p"], scale: Float[Tensor, ""]
) -> Float[Tensor, "b n e p"]:
    """scale times the cosine of each token with each slot's parameters (Section 2.3)."""
    return torch.einsum("bnd,dep->bnep", l2_normalize(x, dim=2), scale * l2_normalize(phi, dim=0))


def soft_weights(logits: Float[Tensor, "b n e p"]) -> tuple[Float[Tensor, "b n e p"], Float[Tensor, "b n e p"]]:
    """Dispatch weights, a softmax over tokens, and combine weights, a softmax over all slots (Section 2.1)."""
    return logits.softmax(dim=1), logits.flatten(2).softmax(dim=2).view_as(logits)


class SoftRouter(Router):
    """Slots are mixtures of all tokens of an image, tokens mixtures of all slots.

    Args:
        dim: d.
        num_tokens: n, used only with `capacity_factor`.
        num_experts: e.
        slots_per_expert: p (the paper's models: 1); null to have it follow from `capacity_factor`.
        capacity_factor: p = round(n * capacity_factor / e), half to even; null when p is given.
        noise_std: standard deviation of the noise on the logits in training (official: 0). Unlike the sparse
            routers' noise it is not divided by e.

    Raises:
        ValueError: when not exactly one of `slots_per_expert` and `capacity_factor` is given, or p would be 0.
    """

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        *,
        num_experts: int,
        slots_per_expert: int | None,
        capacity_factor: float | None,
        noise_std: float,
    ) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts} must be at least 1")
        if noise_std < 0:
            raise ValueError(f"noise_std={noise_std} must not be negative")
        if (slots_per_expert is None) == (capacity_factor is None):
            raise ValueError(
                f"slots_per_expert={slots_per_expert} and capacity_factor={capacity_factor}: "
                "give one of them and set the other to null"
            )
        if slots_per_expert is None:
            assert capacity_factor is not None
            slots_per_expert = round(num_tokens * capacity_factor / num_experts)
            if slots_per_expert < 1:
                raise ValueError(
                    f"capacity_factor={capacity_factor} gives 0 slots per expert for {num_tokens} tokens and "
                    f"num_experts={num_experts}; use at most {max(1, int(num_tokens * capacity_factor))} experts "
                    "or set slots_per_expert=1 and capacity_factor=null"
                )
        if slots_per_expert < 1:
            raise ValueError(f"slots_per_expert={slots_per_expert} must be at least 1")
        self.num_experts = num_experts
        self.slots_per_expert = slots_per_expert
        self.noise_std = noise_std
        self.options: dict[str, Any] = {
            "num_experts": num_experts,
            "slots_per_expert": slots_per_expert,
            "capacity_factor": None,
            "noise_std": noise_std,
        }
        self.phi = nn.Parameter(torch.empty(dim, num_experts, slots_per_expert))
        self.scale = nn.Parameter(torch.ones(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        dim, num_experts, _ = self.phi.shape
        # JAX's lecun_normal counts the expert axis into the fan; 0.8796 is the std of a normal cut at 2 sigma.
        std = 1 / math.sqrt(dim * num_experts) / 0.87962566103423978
        nn.init.trunc_normal_(self.phi, std=std, a=-2 * std, b=2 * std)
        nn.init.ones_(self.scale)

    def flop(self, num_tokens: int) -> int:
        """Logits, dispatch and combine: three products of n, e p and d."""
        dim, num_experts, slots = self.phi.shape
        return 3 * 2 * num_tokens * num_experts * slots * dim

    def forward(self, x: Float[Tensor, "b n d"]) -> DenseRouting:
        with full_precision(x):
            logits = soft_logits(x.to(self.phi.dtype), self.phi, self.scale)
            if self.training and self.noise_std > 0:
                logits = logits + self.noise_std * torch.randn_like(logits)
            dispatch, combine = soft_weights(logits)
        return DenseRouting(dispatch, combine, logits.new_zeros(()), {"scale": self.scale.detach()})
