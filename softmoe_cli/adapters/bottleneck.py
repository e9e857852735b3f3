"""The single adapter: Parameter-Efficient Transfer Learning of Audio Spectrogram Transformers (Cappellazzo et al.,
2023), https://arxiv.org/abs/2312.03694. In one place of a block it is Pfeiffer's, in both Houlsby's."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from softmoe_cli.adapters.kind import Adapter, start_down


class Bottleneck(Adapter):
    """y = W_up gelu(W_down x + b_down) + b_up on every token."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        start_down(self.down.weight.data)
        for parameter in (self.down.bias, *self.up.parameters()):
            nn.init.zeros_(parameter)

    def flop(self, num_tokens: int) -> int:
        return 2 * num_tokens * (self.down.weight.numel() + self.up.weight.numel())

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        y: Tensor = self.up(F.gelu(self.down(x)))
        return y
