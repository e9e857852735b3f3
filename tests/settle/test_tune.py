"""What tuning finds on response surfaces whose optima are known."""

import math
from dataclasses import replace

import pytest

from softmoe_cli.settle.search import first_values, next_value
from softmoe_cli.settle.spent import Spent, spent_in
from softmoe_cli.settle.tune import Tried, Tuned, changed_order, chosen_by
from softmoe_cli.settle.tuning import tuning_rows, tuning_sentences, tuning_text
from tests.settle.made_up import finished

VALUES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]


def tuned(arm: str, optimum: float, top: float = 90.0, default: float = 1e-3, values: list[float] = VALUES) -> Tuned:
    """A parabola in the logarithm of the value, with the same noise of three seeds at every value."""
    trials = []
    for value in values:
        quality = top - 8 * math.log10(value / optimum) ** 2
        runs = [
            finished(arm, seed, validation_top1_pct=quality + (seed - 1), validation_loss=(100 - quality) / 30,
                     train_pflop=0.5, device_s=2.0, eval_s=0.25, save_s=0.0, compile_s=0.0)
            for seed in range(3)
        ]  # fmt: skip
        trials.append(Tried(value, runs))
    spent = spent_in([run for trial in trials for run in trial.runs], [])
    return Tuned(arm, trials, default, "validation_top1_pct", spent)


@pytest.mark.parametrize("optimum", VALUES)
def test_the_optimum_is_found_and_ends_of_the_list_are_said(optimum: float) -> None:
    found = tuned("a", optimum)
    assert found.best is not None and found.best.value == optimum
    assert found.at_end == {1e-4: "smallest", 1e-2: "largest"}.get(optimum, "")
    assert ("the list was too short" in " ".join(tuning_sentences([found], "optim.lr"))) == bool(found.at_end)


def test_tuning_is_booked() -> None:
    found = tuned("a", 1e-3)
    assert found.spent == Spent(15 * 2.25, 15 * 0.5)
    assert tuning_rows([found], "optim.lr")["arms"][0]["train_pflop"] == 7.5


def test_order_before_and_after() -> None:
    """At the default of 1e-3 a beats b; with the best of each b beats a."""
    a, b = tuned("a", 1e-3, top=90), tuned("b", 1e-2, top=92)
    assert changed_order([a, b]) == (["a", "b"], ["b", "a"])
    assert "tuning changed the order of the arms by their means: a > b with the defaults, b > a tuned" in tuning_text(
        [a, b], "optim.lr"
    )
    same = tuned("c", 1e-3, top=91)
    assert changed_order([a, same]) == (["c", "a"], ["c", "a"])
    assert "tuning did not change" in tuning_text([a, same], "optim.lr")
    assert changed_order([a, tuned("d", 1e-3, default=0.5)]) is None
    rows = tuning_rows([a, b], "optim.lr")
    assert rows["order_changed"] is True and [arm["best"] for arm in rows["arms"]] == [1e-3, 1e-2]


def test_a_tie_goes_to_the_smaller_loss_and_a_failure_is_not_chosen() -> None:
    def tried(value: float, top1: float, loss: float, failed: int = 0) -> Tried:
        return Tried(value, [finished("a", 0, validation_top1_pct=top1, validation_loss=loss)], failed)

    found = Tuned("a", [tried(1, 90, 0.4), tried(2, 90, 0.3), tried(3, 99, 0.1, failed=1)], 1, "validation_top1_pct")
    assert found.best is not None and found.best.value == 2
    by_loss = Tuned("a", [tried(1, 90, 0.4), tried(2, 80, 0.3)], 1, "validation_loss")
    assert by_loss.best is not None and by_loss.best.value == 2
    assert Tuned("a", [tried(1, 90, 0.4, failed=1)], 1, "validation_loss").best is None


def test_choices_are_made_on_validation_images() -> None:
    assert [chosen_by(key) for key in ("top1_pct", "validation_top1_pct", "nll", "loss")] == [
        "validation_top1_pct", "validation_top1_pct", "validation_loss", "validation_loss",
    ]  # fmt: skip


def test_a_search_begins_with_the_default_and_with_even_steps() -> None:
    assert first_values(9, 1e-4, 1e-1, 0.003) == [0.003, 0.000562, 0.0178]
    for default in (None, "x", True, 0.5):
        assert first_values(8, 1e-4, 1e-1, default) == [0.000316, 0.00316, 0.0316]
    assert first_values(8, 1e-4, 1e-1, 0.000562) == [0.000562, 0.00316, 0.0316], "a middle itself is tried too"
    assert first_values(6, 1e-4, 1e-2, 1e-3) == [1e-3, 0.000316]
    assert first_values(2, 1, 100, 5) == [5, 10] and first_values(2, 1, 100, None) == [3.16, 31.6]


def test_a_narrow_range_has_as_many_values() -> None:
    values = first_values(12, 1.0042, 1.0049, None)
    assert len(set(values)) == 4 and all(1.0042 <= value <= 1.0049 for value in values)


@pytest.mark.thorough  # importing Optuna takes seconds
@pytest.mark.parametrize("higher", [True, False])
def test_a_search_comes_nearer_than_as_many_even_steps(higher: bool) -> None:
    """On parabolas in the logarithm, turned round for a loss; failed trials are passed over; the same trials have the
    same sequel."""
    pytest.importorskip("optuna")
    sign = 1 if higher else -1
    nearest = []
    for optimum in (2e-4, 3e-4, 1e-3, 2e-3, 5e-3, 2e-2):

        def quality(value: float, optimum: float = optimum) -> float | None:
            return None if value > 0.05 else -sign * math.log10(value / optimum) ** 2

        tried = [(value, quality(value)) for value in first_values(12, 1e-4, 1e-1, None)]
        while len(tried) < 12:
            value = next_value(tried, 1e-4, 1e-1, higher_is_better=higher)
            assert value == next_value(tried, 1e-4, 1e-1, higher_is_better=higher) and 1e-4 <= value <= 1e-1
            assert value not in [each for each, _ in tried]
            tried.append((value, quality(value)))
        nearest.append(min(abs(math.log10(value / optimum)) for value, _ in tried))
    steps = math.log10(1e-1 / 1e-4) / 12
    assert sum(nearest) / len(nearest) < steps / 4, "the mean distance of 12 even steps from any value"


def test_a_search_is_told_by_its_trials() -> None:
    """Each arm has values of its own."""
    a = replace(tuned("a", 1e-3, values=[1e-3, 1e-4]), searched=True)
    b = replace(tuned("b", 1e-2, values=[1e-3, 1e-2]), searched=True)
    text = tuning_text([a, b], "optim.lr")
    assert "1         0.001: 90.00" in text and "0.01: 90.00" in text and "trial" in text
    assert "- b is best at the largest value tried, 0.01: better ones may lie outside tune_range" in text
