"""Experts with few rows: the same numbers and gradients as products that are handed to torch as they are."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from softmoe_cli.moe import few_rows, layer
from softmoe_cli.moe.few_rows import LONG, PIECED, TURNED, pays
from softmoe_cli.moe.layer import Experts, experts

WIDE = LONG // 4 + 1
"""Hidden units from which on a float32 weight's rows are long."""


def drawn(e: int, r: int, d: int, h: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Rows, w1, b1, w2 and b2."""
    torch.manual_seed(0)
    shapes = (e, r, d), (e, d, h), (e, h), (e, h, d), (e, d)
    return [(torch.randn(shape, dtype=dtype) / 4).requires_grad_() for shape in shapes]


def mlps(*given: Tensor) -> Tensor:
    rows, w1, b1, w2, b2 = given
    return experts(rows, w1, b1, w2, b2, "tanh")


def one_by_one(rows: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Row by row, expert by expert."""
    made = []
    for i, own in enumerate(rows):
        hidden = [F.gelu(row @ w1[i] + b1[i], approximate="tanh") for row in own]
        made.append(torch.stack([each @ w2[i] + b2[i] for each in hidden]))
    return torch.stack(made)


@pytest.mark.parametrize("r", [1, TURNED, TURNED + 1, PIECED + 1])
def test_numbers_and_gradients_are_those_of_single_rows(r: int) -> None:
    """70 is no multiple of a piece, and less than one for many rows."""
    given = drawn(2, r, 70, LONG // 8 + 1)
    assert pays(given[0], given[1]) is (r <= PIECED)
    rows, w1, b1, w2, b2 = given
    want, got = one_by_one(rows, w1, b1, w2, b2), mlps(*given)
    torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)
    seed = torch.randn_like(want)
    pairs = zip(torch.autograd.grad(got, given, seed), torch.autograd.grad(want, given, seed), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("turned", [0, TURNED])
def test_gradients_of_gradients(turned: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LONG": 0, "UNPACKED": 2, "TURNED": turned}.items():
        monkeypatch.setattr(few_rows, name, value)
    given = drawn(2, 1, 3, 4)
    assert pays(given[0], given[1])
    assert torch.autograd.gradcheck(mlps, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(mlps, given, fast_mode=True)


@pytest.mark.parametrize("learned", range(5))
def test_only_what_learns_gets_a_gradient(learned: int) -> None:
    whole, part = drawn(2, 3, 40, WIDE, torch.float32), drawn(2, 3, 40, WIDE, torch.float32)
    for i, each in enumerate(part):
        each.requires_grad_(i == learned)
    for given in (whole, part):
        mlps(*given).square().sum().backward()
    assert [each.grad is not None for each in part] == [i == learned for i in range(5)]
    (gradient,) = (each.grad for each in part if each.grad is not None)
    expected = whole[learned].grad
    assert expected is not None and torch.equal(gradient, expected)


def test_where_it_does_not_pay_torch_gets_the_products_as_they_are() -> None:
    def given(r: int = 3, h: int = WIDE, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Tensor, Tensor]:
        return torch.zeros(2, r, 8, dtype=dtype, **options), torch.zeros(2, 8, h, dtype=dtype, **options)

    assert pays(*given())
    assert pays(*given(dtype=torch.float64))
    assert not pays(*given(r=0))
    assert not pays(*given(r=PIECED + 1))
    assert not pays(*given(h=WIDE - 1))
    assert not pays(*given(dtype=torch.bfloat16))
    assert not pays(*given(device="meta"))
    rows, w1 = given()
    assert not pays(rows.bfloat16(), w1)
    with torch.autocast("cpu", torch.bfloat16):
        assert not pays(rows, w1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not pays(*given(device="cuda"))


def test_functional_transforms_get_plain_products() -> None:
    """Gradients of several sets of weights at once, as each alone."""
    rows, *weights = drawn(2, 3, 40, WIDE, torch.float32)
    stacked = [torch.stack([each, -each]).detach() for each in weights]

    def loss(*given: Tensor) -> Tensor:
        return mlps(rows.detach(), *given).square().sum()

    both = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)))(*stacked)
    for i, sign in enumerate((1, -1)):
        own = [(sign * each.detach()).requires_grad_() for each in weights]
        for found, want in zip(both, torch.autograd.grad(loss(*own), own), strict=True):
            torch.testing.assert_close(found[i], want, atol=1e-4, rtol=1e-4)


def test_recomputation_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def counted(rows: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
        taken.append(rows)
        return few_rows.few_rows(rows, weights, bias)

    monkeypatch.setattr(layer, "few_rows", counted)
    torch.manual_seed(0)
    module = Experts(2, 40, WIDE, gelu="tanh", identical=False)
    rows = torch.randn(2, 3, 40, requires_grad=True)
    found = []
    for again in (False, True):
        y = checkpoint(module, rows, use_reentrant=False) if again else module(rows)
        assert isinstance(y, Tensor)
        found.append(torch.autograd.grad(y.square().sum(), [rows, *module.parameters()]))
    assert all(map(torch.equal, *found))
    assert len(taken) == 2 + 4


def test_pieces_cost_what_the_product_costs() -> None:
    given = drawn(2, 3, 70, WIDE, torch.float32)
    with FlopCounterMode(display=False) as counted:
        mlps(*given).sum().backward()
    assert counted.get_total_flops() == 3 * 2 * 3 * 2 * 2 * 70 * WIDE
