"""Tokens Choice, in both orders, against slow loops written from its papers."""

import pytest

from tests import oracles
from tests.moe.layers import QUIET, close, expert_weights, gates_of, layer, tokens


def test_losses_are_weighted_and_leave_with_their_weight() -> None:
    moe, x = layer("tokens_choice", noise_std=0.0, importance_weight=0.5, load_weight=0.0, gshard_weight=0.25), tokens()
    groups = [gates_of(moe, image) for image in x]
    want = sum(0.5 * oracles.importance_loss(g) + 0.25 * oracles.gshard_loss(g) for g in groups) / len(groups)
    assert moe.router(x).aux_loss.item() == pytest.approx(want, rel=1e-12)
    assert layer("tokens_choice", **QUIET).router(x).aux_loss.item() == 0


def test_a_group_that_is_not_full_keeps_its_slots() -> None:
    """Three images in groups of two: the last one alone has a whole group's slots to itself."""
    moe = layer("tokens_choice", k=1, slots_per_expert=4, capacity_factor=None, images_per_group=2, **QUIET)
    x = tokens()[:3]
    gates = gates_of(moe, x[2])
    placed = oracles.tokens_choice(gates, gates, 1, 4, surest_first=False)
    close(moe(x)[2], oracles.sparse_moe(x[2].tolist(), placed, *expert_weights(moe)))
