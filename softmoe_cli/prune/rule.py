"""Which experts stay: shares, the threshold, and the forced decision.

After Task-Specific Expert Pruning for Sparse Mixture-of-Experts (Chen et al., 2022), https://arxiv.org/abs/2206.00277:
written from its abstract and from summaries, since no code was released. Which scores a threshold compares, and what it
is by default, is ours.
"""

import math
from collections.abc import Sequence


def shares(scores: Sequence[float], left: Sequence[int]) -> list[float]:
    """The share of each expert that is left in their scores, in the order of `left`. A negative score counts as 0, and
    shares are equal where nobody has any."""
    given = [max(scores[expert], 0.0) for expert in left]
    total = math.fsum(given)
    return [each / total for each in given] if total else [1 / len(left)] * len(left)


def largest(scores: Sequence[float], left: Sequence[int], keep: int) -> list[int]:
    """The `keep` experts with the largest scores of those that are left, ascending; of equal ones the lower number
    stays."""
    return sorted(sorted(left, key=lambda expert: (-scores[expert], expert))[:keep])


def survivors(scores: Sequence[float], left: Sequence[int], threshold: float, keep: int) -> list[int]:
    """Those whose share is not below `threshold` over their number, and the `keep` best in any case; ascending."""
    given = [max(scores[expert], 0.0) for expert in left]
    # A correctly rounded sum against correctly rounded products: equal scores are never below their own mean.
    bar = threshold * math.fsum(given)
    above = [expert for expert, score in zip(left, given, strict=True) if score * len(left) >= bar]
    return sorted({*above, *largest(scores, left, keep)})
