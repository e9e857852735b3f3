"""Products of experts that have few rows each, on a CPU.

There a product moves its weights rather than multiplies, and MKL, torch's library for it, takes as long as arithmetic
and transfer one after the other. For some operands it does better: for weights of few rows, which it seems not to copy
before it multiplies, and where weights stand on the left instead of turned on the right. Below, products are handed
over so. What that is worth, and what else was tried: experiments/layer_speed.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

PIECED = 64
"""Rows of an expert up to which it pays to meet a weight in pieces."""
TURNED = 48
"""Rows up to which it pays to turn the gradient."""
UNPACKED = 32
"""Rows of a weight that make a piece at least."""
LONG = 4096
"""Bytes above which each row of a weight lies on pages of memory of its own. It pays for such weights only."""


def pays(rows: Float[Tensor, "e r d"], w1: Float[Tensor, "e d h"]) -> bool:
    """Whether `few_rows` is for experts with these weights. Not while torch compiles or exports, nor inside its
    transforms (vmap), which take products as they are."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    mkl = rows.device.type == "cpu" and torch.backends.mkl.is_available() and not torch.is_autocast_enabled("cpu")
    whole = rows.dtype == w1.dtype and rows.dtype in (torch.float32, torch.float64)
    return mkl and whole and 0 < rows.shape[1] <= PIECED and w1.shape[2] * w1.element_size() > LONG


class _FewRows(torch.autograd.Function):
    @staticmethod
    def forward(
        rows: Float[Tensor, "e r d"], weights: Float[Tensor, "e d h"], bias: Float[Tensor, "e h"]
    ) -> Float[Tensor, "e r h"]:
        _, d, h = weights.shape
        if h < d:
            return torch.baddbmm(bias[:, None], rows, weights)
        piece = max(UNPACKED, 2 * rows.shape[1])
        first, *others = zip(rows.split(piece, 2), weights.split(piece, 1), strict=True)
        y = torch.baddbmm(bias[:, None], *first)
        for part in others:
            torch.baddbmm(y, *part, out=y)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "e r h"]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weights = ctx.saved_tensors
        of_rows = of_weights = of_bias = None
        if ctx.needs_input_grad[0]:
            turned = rows.shape[1] <= TURNED
            of_rows = torch.bmm(weights, grad.mT).mT.contiguous() if turned else torch.bmm(grad, weights.mT)
        if ctx.needs_input_grad[1]:
            of_weights = torch.bmm(rows.mT, grad)
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum(dim=1)
        return of_rows, of_weights, of_bias


def few_rows(
    rows: Float[Tensor, "e r d"], weights: Float[Tensor, "e d h"], bias: Float[Tensor, "e h"]
) -> Float[Tensor, "e r h"]:
    """bias + rows @ weights, expert by expert.

    A weight that is wider than high is met in pieces of some of its rows. The gradient of the rows is computed turned,
    weights @ grad.T, and turned back.
    """
    return _FewRows.apply(rows, weights, bias)
