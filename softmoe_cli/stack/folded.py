"""Operations of several models at once, where torch.func's own rules cost much more than one model's operation.

Of such an operation torch makes several, or copies its operands, or goes from model to model. A rule here gets the same
operands with the models in front, n of them, and folds them into the batch of one operation. All others keep torch's.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

FEW_TOKENS = 32
"""Up to so many tokens torch's fused attention on a CPU takes longer than two products and a softmax: forwards and
backwards 1.9 times as long for 16, as long for 49."""


class _Folded(torch.autograd.Function):
    """A function of one model's operands whose rule for several is given. It has no backward pass: gradients flow
    through the operations of the rule."""

    @staticmethod
    def forward(rule: Callable[..., Tensor], plain: Callable[..., Tensor], *operands: Any) -> Tensor:
        return plain(*operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return

    @staticmethod
    def vmap(
        info: Any, dims: Any, rule: Callable[..., Tensor], plain: Callable[..., Tensor], *operands: Any
    ) -> tuple[Tensor, int]:
        n, front = info.batch_size, []
        for each, dim in zip(operands, dims[2:], strict=True):
            if not isinstance(each, Tensor):
                front.append(each)
            else:
                front.append(each.expand(n, *each.shape) if dim is None else each.movedim(dim, 0) if dim else each)
        return rule(n, *front), 0


def _product(n: int, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (n ... d), matrix (n d o), bias (n o) -> (n ... o)."""
    rows = x.reshape(n, -1, x.shape[-1])
    made = torch.bmm(rows, matrix) if bias is None else torch.baddbmm(bias[:, None], rows, matrix)
    return made.view(*x.shape[:-1], matrix.shape[-1])


def _linear(n: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (n ... d), weight (n o d), bias (n o) -> (n ... o)."""
    return _product(n, x, weight.mT, bias)


def _layer_norm(n: int, x: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x (n ... d), weight and bias (n d) -> (n ... d)."""
    unit = F.layer_norm(x, shape, eps=eps)
    if weight is None:
        return unit
    spread = (n, *[1] * (x.ndim - weight.ndim), *shape)
    return unit * weight.view(spread) if bias is None else torch.addcmul(bias.view(spread), unit, weight.view(spread))


def _attention(n: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v (n b heads tokens d) -> the same."""
    if q.device.type != "cpu" or q.shape[3] > FEW_TOKENS:
        q, k, v = (each.flatten(0, 1) for each in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).unflatten(0, (n, -1))
    shape = q.shape[2:]
    q, k, v = (each.flatten(0, 2) for each in (q * q.shape[-1] ** -0.5, k, v))
    return torch.bmm(torch.bmm(q, k.mT).softmax(dim=2), v).view(n, -1, *shape)


def _patches(n: int, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """images (n b c s s), weight (n o c p p), bias (n o) -> (n b o s/p s/p): each patch through a linear map."""
    p, q = weight.shape[-2:]
    patches = images.unflatten(4, (-1, q)).unflatten(3, (-1, p)).permute(0, 1, 3, 5, 2, 4, 6)  # n b s/p s/p c p p
    return _product(n, patches.flatten(4), weight.flatten(2).mT, bias).permute(0, 1, 4, 2, 3)


def _experts(n: int, bias: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """bias (n e 1 h), rows (n e r d), weight (n e d h) -> (n e r h)."""
    return torch.baddbmm(*(each.flatten(0, 1) for each in (bias, rows, weight))).unflatten(0, (n, -1))


# --- what torch is called with: None where no rule is for it ----------------------------------------------------------


def _linear_of(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _fold(_linear, F.linear, x, weight, bias)


def _layer_norm_of(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    return _fold(_layer_norm, F.layer_norm, x, shape, weight, bias, eps)


def _attention_of(q: Tensor, k: Tensor, v: Tensor, *_mask: Any, **options: Any) -> Tensor | None:
    plain = not _mask and not any(value is not None and value for value in options.values()) and q.ndim == 4
    return _fold(_attention, F.scaled_dot_product_attention, q, k, v) if plain else None


def _patches_of(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor | None:
    plain = padding in (0, (0, 0)) and dilation in (1, (1, 1)) and groups == 1
    if not plain or stride != tuple(weight.shape[2:]) or any(x.shape[2 + i] % stride[i] for i in (0, 1)):
        return None
    return _fold(_patches, lambda x, weight, bias: F.conv2d(x, weight, bias, stride), x, weight, bias)


def _experts_of(bias: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    return _fold(_experts, torch.baddbmm, bias, rows, weight)


def _product_of(x: Tensor, matrix: Tensor) -> Tensor | None:
    return _fold(_product, torch.matmul, x, matrix) if matrix.ndim == 2 and x.ndim >= 2 else None


def _fold(rule: Callable[..., Tensor], plain: Callable[..., Tensor], *operands: Any) -> Tensor:
    made: Tensor = _Folded.apply(rule, plain, *operands)
    return made


RULES: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _linear_of,
    F.layer_norm: _layer_norm_of,
    F.scaled_dot_product_attention: _attention_of,
    F.conv2d: _patches_of,
    torch.baddbmm: _experts_of,
    torch.matmul: _product_of,
    Tensor.matmul: _product_of,
    Tensor.__matmul__: _product_of,
}


class Folding(TorchFunctionMode):
    """While open inside vmap, operations that have a rule follow it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule, named = RULES.get(func), kwargs or {}
        made = None if rule is None else rule(*args, **named)
        return func(*args, **named) if made is None else made
