"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al., 2021), https://arxiv.org/abs/2106.09685

On the queries and values of every block, as in the paper's experiments. timm computes queries, keys and values with one
matrix; peft (0.21) adapts such a matrix as a whole, keys included, and so is no help here.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softmoe_cli.adapters.kind import Adapter


class LowRank(Adapter):
    """y = alpha / r B A x, without biases. A starts as torch starts a linear layer (Kaiming uniform), B at zero."""

    def __init__(self, dim: int, width: int, out: int, *, alpha: float) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, width, bias=False), nn.Linear(width, out, bias=False)
        self.scale = alpha / width
        nn.init.zeros_(self.up.weight)

    def flop(self, num_tokens: int) -> int:
        return 2 * num_tokens * (self.down.weight.numel() + self.up.weight.numel())

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n o"]:
        y: Tensor = self.up(self.down(x)) * self.scale
        return y


class AdaptedProjection(nn.Linear):
    """timm's matrix of queries, keys and values, with low-rank ones beside queries and values."""

    def __init__(self, whole: nn.Linear, width: int, *, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.weight, self.bias = whole.weight, whole.bias
        of_each = whole.out_features // 3
        self.q_adapter, self.v_adapter = (LowRank(whole.in_features, width, of_each, alpha=alpha) for _ in range(2))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n o"]:
        q, k, v = super().forward(x).chunk(3, dim=-1)
        return torch.cat([q + self.q_adapter(x), k, v + self.v_adapter(x)], dim=-1)
