"""Tokens Choice without capacity against slow loops, and what its gates and bias do."""

import torch

from tests import oracles
from tests.moe.layers import EXPERTS, IMAGES, QUIET, TOKENS, close, expert_weights, gates_of, layer, sparse, tokens


def test_dropless_is_tokens_choice_with_room_for_all() -> None:
    moe = layer("tokens_choice_dropless", k=2, **QUIET)
    x = tokens()
    y = moe(x)
    for image, out in zip(x, y, strict=True):
        gates = gates_of(moe, image)
        placed = oracles.tokens_choice(gates, gates, 2, 2 * TOKENS, surest_first=False)
        close(out, oracles.sparse_moe(image.tolist(), placed, *expert_weights(moe)))
    assert sparse(moe.router, x).statistics()["dropped_share"] == 0


def test_balancing_bias_moves_choices_but_not_gates() -> None:
    moe = layer("tokens_choice_dropless", k=1, bias_rate=0.5, **QUIET)
    router, x = moe.router, tokens()
    before = sparse(router, x)
    router.after_update()
    assert torch.equal(router.get_buffer("balance.bias"), torch.zeros(EXPERTS, dtype=torch.float64))  # eval counts none
    router.train()
    demand = sparse(router, x).demand.double()
    router.after_update()
    want = 0.5 * (demand.mean() - demand).sign()
    assert demand.max() > demand.min()
    assert torch.equal(router.get_buffer("balance.bias"), want)
    after = sparse(router.eval(), x)
    gates = [gates_of(moe, image) for image in x]
    for image in range(IMAGES):
        scores = [[g + b for g, b in zip(row, want.tolist(), strict=True)] for row in gates[image]]
        placed = oracles.tokens_choice(gates[image], scores, 1, TOKENS, surest_first=False)
        close(moe(x)[image], oracles.sparse_moe(x[image].tolist(), placed, *expert_weights(moe)))
    assert after.demand.tolist() != before.demand.tolist()


def test_gates_of_zero_are_not_divided() -> None:
    moe = layer("tokens_choice_dropless", k=2, gate="sigmoid", renormalise=True, **QUIET)
    with torch.no_grad():
        moe.router.get_parameter("gate.kernel").fill_(-1000.0)
    y = moe(tokens().abs())
    (100 * y.sum()).backward()
    gradient = moe.router.get_parameter("gate.kernel").grad
    assert y.isfinite().all() and gradient is not None and gradient.isfinite().all()
