"""Experts Choice against a slow loop written from its paper."""

import pytest

from tests import oracles
from tests.moe.layers import DIM, TOKENS, close, expert_weights, gates_of, layer, tokens


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("slots", "images"), [(1, 1), (3, 1), (7, 1), (4, 2), (14, 2)])
def test_experts_choice(slots: int, images: int, renormalise: bool) -> None:
    options = {"slots_per_expert": slots, "capacity_factor": None, "images_per_group": images}
    moe, x = layer("experts_choice", **options, renormalise=renormalise, noise_std=0.0), tokens()
    y = moe(x)
    for group, out in zip(x.view(-1, images * TOKENS, DIM), y.view(-1, images * TOKENS, DIM), strict=True):
        placed = oracles.experts_choice(gates_of(moe, group), slots)
        if renormalise:
            total = [sum(g for token, g in placed.kept.values() if token == t) for t in range(images * TOKENS)]
            placed.kept = {place: (t, g / total[t]) for place, (t, g) in placed.kept.items()}
        close(out, oracles.sparse_moe(group.tolist(), placed, *expert_weights(moe)))
