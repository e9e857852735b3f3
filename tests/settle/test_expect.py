"""What --plan foresees, against tables that were simulated elsewhere by the same rule (20,000 studies, looks from 3 to
30 seeds; looks before ours can decide nothing)."""

import pytest

from softmoe_cli.settle.expect import Expected, expectations, expected
from tests.conftest import thinned

TABLE = [
    # margin, effect, better or worse, equal, seeds
    (None, 0.0, 0.020, 0.0, 29.7), (None, 0.5, 0.409, 0.0, 25.2), (None, 0.8, 0.882, 0.0, 17.5),
    (None, 1.0, 0.985, 0.0, 13.3), (None, 1.5, 1.0, 0.0, 8.6), (None, 2.0, 1.0, 0.0, 6.9), (None, 3.0, 1.0, 0.0, 5.8),
    (1.0, 0.0, 0.019, 0.955, 16.6), (1.0, 0.5, 0.382, 0.377, 20.8), (1.0, 0.8, 0.861, 0.052, 16.9),
    (1.0, 1.0, 0.978, 0.009, 13.2), (1.0, 2.0, 1.0, 0.0, 6.9), (1.5, 0.0, 0.011, 0.989, 9.8),
    (1.5, 0.5, 0.171, 0.828, 12.1), (1.5, 1.0, 0.834, 0.166, 12.0), (1.5, 1.5, 0.996, 0.004, 8.5),
]  # fmt: skip


@pytest.mark.parametrize(("margin", "effect", "different", "equal", "seeds"), thinned(TABLE, 6))
def test_shares_and_seeds_are_those_of_the_tables(
    margin: float | None, effect: float, different: float, equal: float, seeds: float
) -> None:
    """Shares to three standard errors of 4,000 studies, mean seeds to 0.5."""
    found = expected(effect, 1, 5, 30, margin)
    assert found.different == pytest.approx(different, abs=0.025)
    assert found.equal == pytest.approx(equal, abs=0.025)
    assert found.seeds == pytest.approx(seeds, abs=0.5)
    assert found.open == pytest.approx(1 - found.different - found.equal)


def test_four_arms_need_more() -> None:
    """The same tables at a quarter of the level: no difference 88.8% equal with 21.5 seeds, one deviation 94.2% with
    17.3, two 8.9 seeds."""
    none, one, two = (expected(effect, 4, 6, 30, 1.0) for effect in (0.0, 1.0, 2.0))
    assert (none.equal, none.seeds) == (pytest.approx(0.888, abs=0.025), pytest.approx(21.5, abs=0.5))
    assert (one.different, one.seeds) == (pytest.approx(0.942, abs=0.025), pytest.approx(17.3, abs=0.5))
    assert two.seeds == pytest.approx(8.9, abs=0.3)


def test_the_rows_of_a_plan() -> None:
    found = expectations(2, 6, 20, [0.8])
    assert [(each.effect, each.margin) for each in found] == [(0.5, None), (1.0, None), (2.0, None), (0.0, 0.8)]
    assert found[2] == expected(2.0, 2, 6, 20), "the same draws each time"
    assert isinstance(found[0], Expected) and found[0].seeds > found[1].seeds > found[2].seeds >= 6
