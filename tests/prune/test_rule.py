"""Which experts stay: shares, the threshold, the forced decision; against slow sums in rationals."""

import random
from fractions import Fraction

import pytest

from softmoe_cli.prune.rule import largest, shares, survivors


def slow(scores: list[float], left: list[int], threshold: float, keep: int) -> list[int]:
    """The rule in exact arithmetic: an expert stays if its share is not below threshold / Z, or no `keep` others
    before it are better."""
    total = sum(Fraction(scores[expert]) for expert in left)
    stay = []
    for expert in left:
        before = sum(scores[other] > scores[expert] or (scores[other] == scores[expert] and other < expert)
                     for other in left)  # fmt: skip
        above = Fraction(scores[expert]) * len(left) >= Fraction(threshold) * total
        if above or before < keep:
            stay.append(expert)
    return stay


def test_against_exact_arithmetic() -> None:
    rng = random.Random(0)
    dropped = 0
    for _ in range(500):
        e = rng.randint(1, 12)
        left = sorted(rng.sample(range(e), rng.randint(1, e)))
        scores = [rng.choice([0.0, 0.5, rng.random(), 10 * rng.random()]) for _ in range(e)]
        threshold, keep = rng.choice([0.0, 0.3, 0.5, 1.0, 1.7]), rng.randint(1, len(left))
        stay = survivors(scores, left, threshold, keep)
        assert stay == slow(scores, left, threshold, keep)
        assert len(stay) >= keep and sum(shares(scores, left)) == pytest.approx(1, abs=1e-12)
        dropped += len(left) - len(stay)
    assert dropped > 300


def test_threshold_zero_drops_nobody_and_up_to_one_never_everybody() -> None:
    scores = [0.0, 3.0, 0.1, 5.0]
    assert survivors(scores, [0, 1, 2, 3], 0.0, 1) == [0, 1, 2, 3]
    assert survivors(scores, [0, 1, 2, 3], 1.0, 1) == [1, 3]


@pytest.mark.parametrize("score", [0.1, 1 / 3, 7.3e-5, 0.0])
@pytest.mark.parametrize("experts", [3, 7, 10, 128])
def test_equal_shares(score: float, experts: int) -> None:
    """Nobody is below the mean where all are equal, whatever rounding says; above 1 only the best stay, and of equal
    ones the lower number."""
    left = list(range(experts))
    assert survivors([score] * experts, left, 1.0, 1) == left
    if score:
        assert survivors([score] * experts, left, 1.01, 2) == [0, 1]
    assert largest([score] * experts, left, 1) == [0]
    assert shares([score] * experts, left) == pytest.approx([1 / experts] * experts)


def test_a_permutation_of_experts_permutes_survivors() -> None:
    rng = random.Random(1)
    scores = [rng.random() for _ in range(9)]
    order = rng.sample(range(9), 9)
    there = [scores[expert] for expert in order]
    for keep in (1, 4):
        assert {order[i] for i in largest(there, list(range(9)), keep)} == set(largest(scores, list(range(9)), keep))
    assert {order[i] for i in survivors(there, list(range(9)), 0.8, 1)} == set(
        survivors(scores, list(range(9)), 0.8, 1)
    )


def test_negative_scores_have_no_share_but_an_order() -> None:
    """The norm of a router's part may have fallen."""
    scores = [-2.0, -1.0, 3.0, 1.0]
    assert shares(scores, [0, 1, 2, 3]) == [0, 0, 0.75, 0.25]
    assert largest(scores, [0, 1], 1) == [1]
