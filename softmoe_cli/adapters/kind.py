"""What every adapter says of itself, and the small MLPs that most of them hold."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softmoe_cli.moe.layer import Experts

STD = 0.02
"""Standard deviation with which down projections start, cut at two of them. Those of the official runs start so: what
a loaded checkpoint lacks is drawn by transformers 4.28.1."""


class Adapter(nn.Module, ABC):
    """Stands beside a sublayer of a frozen block. Its result is exactly zero at the start, and no parameter of it is
    without a gradient for long: up projections start at zero, down projections do not."""

    @abstractmethod
    def flop(self, num_tokens: int) -> int:
        """FLOPs per image, forwards, on `num_tokens` tokens; a multiply-add counts as 2."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """What is added to the tokens."""


class Bottlenecks(Experts):
    """Stacked adapters: W_up gelu(W_down x + b_down) + b_up, with exact GELU, and no norm, residual or scale inside.

    The official class starts both matrices at zero, which leaves only b_up a gradient; its runs start both with STD,
    because transformers draws them again, and so do not start as the frozen model.
    """

    def __init__(self, number: int, dim: int, width: int) -> None:
        super().__init__(number, dim, width, gelu="none", identical=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        start_down(self.w1)
        for parameter in (self.b1, self.w2, self.b2):
            nn.init.zeros_(parameter)


def start_down(weight: Tensor) -> None:
    """How a down projection starts."""
    nn.init.trunc_normal_(weight, std=STD, a=-2 * STD, b=2 * STD)
