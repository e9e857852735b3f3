"""Dense mixture of adapters (Dense-MoA), the rival of Soft-MoA in Cappellazzo et al., 2024 (arXiv 2402.00828)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from softmoe_cli.adapters.kind import Adapter, Bottlenecks, start_down
from softmoe_cli.moe.layer import in_fast_precision
from softmoe_cli.moe.routing import full_precision


class DenseMoA(Adapter):
    """y = sum_e g_e A_e(x), g = softmax(W x + b): every token through every adapter, weighted by a router with bias.

    Computed as two products for all adapters together: hidden units are weighted before they go up, so that what each
    adapter returns is never in memory.
    """

    def __init__(self, dim: int, width: int, *, num_adapters: int) -> None:
        super().__init__()
        self.router = nn.Linear(dim, num_adapters)
        self.experts = Bottlenecks(num_adapters, dim, width)
        start_down(self.router.weight.data)
        nn.init.zeros_(self.router.bias)

    def flop(self, num_tokens: int) -> int:
        """Router, adapters, and the weighted sum of their biases."""
        return (
            self.experts.flop(float(num_tokens * len(self.experts.w1)))
            + 2 * 2 * num_tokens * self.router.weight.numel()
        )

    def gates(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
        """Each adapter's share in each token, float32."""
        with full_precision(x):
            return F.linear(x.to(self.router.weight.dtype), self.router.weight, self.router.bias).softmax(dim=2)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        gates = self.gates(x)

        def through(tokens: Tensor) -> Tensor:
            down, bias, up, last = self.experts.w1, self.experts.b1, self.experts.w2, self.experts.b2
            shares = gates.to(tokens.dtype)
            hidden = F.gelu(F.linear(tokens, down.mT.flatten(0, 1), bias.flatten())).unflatten(2, bias.shape)
            mixed = (hidden * shares[:, :, :, None]).flatten(2)
            return F.linear(torch.cat([mixed, shares.to(mixed.dtype)], dim=2), torch.cat([up.flatten(0, 1), last]).mT)

        return in_fast_precision(x, self.experts.w1.dtype, through)
