"""The layer: MoE(x) = combine(experts(dispatch(x))), with the experts' weights stacked."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from softmoe_cli.moe.routing import Router


def experts(
    slots: Float[Tensor, "e r d"],
    w1: Float[Tensor, "e d h"],
    b1: Float[Tensor, "e h"],
    w2: Float[Tensor, "e h d"],
    b2: Float[Tensor, "e d"],
    gelu: str,
) -> Float[Tensor, "e r d"]:
    """Each expert's MLP on its own rows, all experts in one batched product.

    `gelu` is `tanh` (the approximation that the official code uses) or `none` (exact).
    """
    hidden = F.gelu(torch.baddbmm(b1[:, None], slots, w1), approximate=gelu)
    return torch.baddbmm(b2[:, None], hidden, w2)


class Experts(nn.Module):
    """e MLPs, d to h to d, with biases.

    Initialisation follows the official code: Xavier-uniform kernels per expert (the expert axis stays out
    of the fans), biases normal with std 1e-6, and all experts of a layer equal unless `identical` is false
    (vmoe's `split_rngs=False`; the slots are what tells experts apart).
    """

    def __init__(self, num_experts: int, dim: int, hidden: int, *, gelu: str, identical: bool) -> None:
        super().__init__()
        self.gelu = gelu
        self.identical = identical
        self.w1 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.b1 = nn.Parameter(torch.empty(num_experts, hidden))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.b2 = nn.Parameter(torch.empty(num_experts, dim))
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

    def flop(self, slots_per_expert: int) -> int:
        """FLOPs per image of both products; a multiply-add counts as 2, biases and GELU as 0."""
        num_experts, dim, hidden = self.w1.shape
        return 2 * 2 * num_experts * slots_per_expert * dim * hidden

    def forward(self, slots: Float[Tensor, "e r d"]) -> Float[Tensor, "e r d"]:
        return experts(slots, self.w1, self.b1, self.w2, self.b2, self.gelu)


class MoE(nn.Module):
    """A router and its experts, in the place of a block's MLP."""

    def __init__(self, router: Router, experts: Experts) -> None:
        super().__init__()
        self.router = router
        self.experts = experts

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        routing = self.router(x)
        out: Tensor = routing.combine(self.experts(routing.dispatch(x)))
        return out
