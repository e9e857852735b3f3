"""Rules for several models against one model after the other: values and gradients, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from softmoe_cli.moe.routers.soft import _Cosines
from softmoe_cli.stack import folded
from softmoe_cli.stack.folded import Folding

Operation = Callable[..., Tensor]
CASES: dict[str, tuple[Operation, list[tuple[int, ...]]]] = {
    "linear": (F.linear, [(2, 3, 4), (5, 4), (5,)]),
    "linear without bias": (F.linear, [(2, 3, 4), (5, 4)]),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b, 1e-6), [(2, 3, 4), (4,), (4,)]),
    "layer_norm without bias": (lambda x, w: F.layer_norm(x, (4,), w), [(2, 3, 4), (4,)]),
    "layer_norm alone": (lambda x: F.layer_norm(x, (4,)), [(2, 3, 4)]),
    "attention, few tokens": (F.scaled_dot_product_attention, [(2, 2, 5, 4)] * 3),
    "attention": (F.scaled_dot_product_attention, [(2, 2, folded.FEW_TOKENS + 1, 4)] * 3),
    "patches": (lambda x, w, b: F.conv2d(x, w, b, stride=(2, 2)), [(3, 2, 4, 6), (5, 2, 2, 2), (5,)]),
    "experts": (torch.baddbmm, [(3, 1, 5), (3, 2, 4), (3, 4, 5)]),
    "product": (torch.matmul, [(2, 3, 4), (4, 5)]),
    "product, as operator": (lambda x, y: x @ y, [(2, 3, 4), (4, 5)]),
    "product of many, torch's own": (torch.matmul, [(2, 3, 4), (2, 4, 5)]),
    "overlapping patches, torch's own": (lambda x, w: F.conv2d(x, w, stride=(1, 1)), [(3, 2, 4, 6), (5, 2, 2, 2)]),
    "cosines": (_Cosines.apply, [(2, 3, 4), (4, 5)]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_is_one_model_after_the_other(name: str) -> None:
    operation, shapes = CASES[name]
    torch.manual_seed(0)
    given = [torch.randn(3, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    with Folding():
        ours = vmap(operation)(*given)
    theirs = torch.stack([operation(*(each[seed] for each in given)) for seed in range(3)])
    weights = torch.randn_like(theirs)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weights).sum(), given), torch.autograd.grad((theirs * weights).sum(), given)
    )
