"""Which value of a tuned setting a search tries next: a function of the trials so far, so that a search that was
stopped goes on as if nothing had happened."""

import logging
import math
import warnings
from collections.abc import Sequence

DIGITS = 3
"""Values that are proposed are rounded to so many digits, for people."""


def first_values(trials: int, low: float, high: float, default: object) -> list[float]:
    """The first third of the trials, which is the same for any outcome: the value that the arm has without tuning,
    where it is a number in the range, and the middles of parts of the range whose ends have the same ratio. Where the
    value is such a middle itself, the range has a part more, and the middle nearest to the value is left out."""
    count = max(2, math.ceil(trials / 3))
    if not isinstance(default, int | float) or isinstance(default, bool) or not low <= default <= high:
        return _middles(count, low, high)
    others = _middles(count - 1, low, high)
    if default in others:
        others = _middles(count, low, high)
        others.remove(min(others, key=lambda value: abs(math.log(value / default))))
    return [float(default), *others]


def _good(trials: int) -> int:
    """How many of the trials count as good ones: a quarter, as in Bergstra's own program. Optuna's tenth would be one
    trial of so few."""
    return math.ceil(trials / 4)


def _middles(count: int, low: float, high: float) -> list[float]:
    exact = [low * (high / low) ** ((place + 0.5) / count) for place in range(count)]
    rounded = [_rounded(value) for value in exact]
    apart = len(set(rounded)) == count and low <= rounded[0] and rounded[-1] <= high
    return rounded if apart else exact  # a range may be narrower than people's digits


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def next_value(
    tried: Sequence[tuple[float, float | None]], low: float, high: float, *, higher_is_better: bool
) -> float:
    """What Optuna's tree-structured Parzen estimator proposes (Bergstra et al., Algorithms for Hyper-Parameter
    Optimization, 2011) after (value, quality) pairs; its seed is the number of trials. One without quality has failed
    and counts as the worst: Optuna passes failed trials over, and would propose their neighbours again.
    """
    import optuna

    known = [quality for _, quality in tried if quality is not None]
    worst = min(known) if higher_is_better else max(known)

    def suggested(trial: optuna.Trial) -> float:
        return float(trial.suggest_float("value", low, high, log=True))

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(seed=len(tried), n_startup_trials=0, gamma=_good)
            study = optuna.create_study(direction="maximize" if higher_is_better else "minimize", sampler=sampler)
            for value, quality in tried:
                study.enqueue_trial({"value": value})
                trial = study.ask()
                suggested(trial)
                study.tell(trial, worst if quality is None else quality)
            exact = suggested(study.ask())
    finally:
        optuna.logging.set_verbosity(verbosity)
    value = min(high, max(low, _rounded(exact)))
    return exact if value in [each for each, _ in tried] else value
