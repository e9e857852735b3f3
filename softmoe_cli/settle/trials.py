"""The trials of tuning: before the first seed each arm gets its own best value of one setting."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from softmoe_cli.compare.runs import FinishedRun, read_runs
from softmoe_cli.config.settle import Fairness, SettleConfig
from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.launch.plan import Job
from softmoe_cli.launch.sweep import Sweep
from softmoe_cli.options.conf_files import value_of
from softmoe_cli.run.rows import QUALITIES
from softmoe_cli.settle.arms import Arm, of_files, science, with_changes
from softmoe_cli.settle.equal import NO_MATTER
from softmoe_cli.settle.fair import Arms, asked_arms
from softmoe_cli.settle.record import give, given_before
from softmoe_cli.settle.search import first_values, next_value
from softmoe_cli.settle.spent import Spent, passed, spent_in
from softmoe_cli.settle.tune import TUNING_SEED, Tried, Tuned, chosen_by
from softmoe_cli.settle.tuning import tuning_text, write_tuning
from softmoe_cli.text import flop, in_words, word_of

TUNING = "tuning"
TUNED = "tuned.jsonl"
"""Beside the trials: the value that each arm was given and those that it has tried, so that trials which come later
change none."""
OF_FINISHED = "result.json"
Proposed = Mapping[str, Sequence[Any]]
"""Of the tuned setting, by arm."""


def tune_arms(
    launcher: Sweep, arms: Arms, asked: Fairness, quality: str, seeds: Sequence[int]
) -> tuple[Arms, list[Tuned]]:
    """Arms with the best value of the tuned setting each, chosen on validation images with seeds of their own.

    The trials lie in a study of their own beside the arms'; whoever calls holds the sweep's folder.

    Raises:
        UsageError: a value cannot work, or changes what a run costs.
        RunError: no value of an arm works.
    """
    assert asked.tune is not None
    require_below(seeds)
    trees = [tree for _, _, tree in launcher.composed([[*arm.words, "seed=0"] for arm in arms.arms])]
    defaults = {arm.label: _default(tree, asked.tune) for arm, tree in zip(arms.arms, trees, strict=True)}
    by = chosen_by(quality)
    trials = Trials(launcher, arms.arms, asked, f"study={trees[0]['study']}-{TUNING}")
    study = arms.study.with_name(f"{arms.study.name}-{TUNING}")
    alike = sorted(science(arm.words) for arm in arms.arms)
    place = {arm.label: alike.index(science(arm.words)) for arm in arms.arms}
    wanted = ("tune", "tune_values", "tune_trials", "tune_range", "tune_seeds")
    question = {key: getattr(asked, key) for key in wanted} | {"by": by, "arms": alike} | of_files(trees)
    given = given_before(study / TUNED, question)
    if given is not None:
        trials.add({label: given[at]["tried"] for label, at in place.items()})
    else:
        for values in _asked_values(trials, asked, defaults, by):
            trials.add(values)
            trials.run()
            best = {place[label]: _best(trials, label, by) for label in place}
        own = {at: trials.values(label) for label, at in place.items()}
        given = give(study / TUNED, question, [{"value": best[at], "tried": own[at]} for at in sorted(place.values())])
    found = [
        Tuned(arm.label, trials.tried(arm.label), defaults[arm.label], by, trials.spent([arm.label]),
              str(given[place[arm.label]]["value"]), asked.tune_trials is not None)
        for arm in arms.arms
    ]  # fmt: skip
    chosen = [with_changes(arm.words, [word_of(asked.tune, given[place[arm.label]]["value"])]) for arm in arms.arms]
    tuned_jobs, slots = asked_arms(launcher, chosen, seeds)
    launcher.tell(tuning_text(found, asked.tune))
    if all(each.best and each.best.mean(by) for each in found):  # else runs were removed, and the files know more
        write_tuning(found, asked.tune, study)
    own_arms = [Arm(arm.label, each, job) for arm, each, job in zip(arms.arms, chosen, tuned_jobs, strict=True)]
    return replace(arms, arms=own_arms, slots=slots), found


def require_below(seeds: Iterable[int]) -> None:
    """Raises UsageError for a seed that tuning uses."""
    largest = max(seeds, default=0)
    if largest >= TUNING_SEED:
        raise UsageError(f"seed={largest}: seeds from {TUNING_SEED} on are for tuning; choose smaller ones")


def _default(tree: dict[str, Any], key: str) -> Any:
    try:
        return value_of(tree, key)
    except KeyError:
        return None


def _asked_values(trials: "Trials", asked: Fairness, defaults: Mapping[str, Any], by: str) -> Iterator[Proposed]:
    """The values of each round: all of a list; of a search the first third, then one for each arm by what the trials
    so far have found."""
    if asked.tune_trials is None:
        yield dict.fromkeys(defaults, asked.tune_values)
        return
    low, high = asked.tune_range
    higher = QUALITIES[by].better == "higher"
    yield {arm: first_values(asked.tune_trials, low, high, default) for arm, default in defaults.items()}
    while len(trials.values(next(iter(defaults)))) < asked.tune_trials:
        found = {arm: [(each.value, each.mean(by)) for each in trials.tried(arm)] for arm in defaults}
        pairs = {arm: [(value, mean.mean if mean else None) for value, mean in each] for arm, each in found.items()}
        yield {arm: [next_value(each, low, high, higher_is_better=higher)] for arm, each in pairs.items()}


def _best(trials: "Trials", label: str, by: str) -> Any:
    """The best value of an arm so far.

    Raises:
        RunError: there is none.
    """
    best = Tuned(label, trials.tried(label), None, by).best
    if best is None:
        why = "\n  ".join(trials.reasons())
        raise RunError(f"tune={trials.key}: every value fails with some seed for {label}\n  {why}")
    return best.value


class Trials:
    """The runs of all values that have been asked for so far, of all arms."""

    def __init__(self, launcher: Sweep, arms: Sequence[Arm], asked: Fairness, study: str) -> None:
        """`study`: the word that puts them into a study of their own."""
        assert asked.tune is not None
        self._launcher, self._asked, self.key, self._study = launcher, asked, asked.tune, study
        self._arms = {arm.label: arm for arm in arms}
        self._jobs: dict[str, list[tuple[Any, Job]]] = {arm.label: [] for arm in arms}
        self._slots: list[str] = []
        self._noted = launcher.noted()
        self._read: dict[Path, FinishedRun] = {}

    def add(self, values: Proposed) -> None:
        """Asks for trials of further values.

        Raises:
            UsageError: a value cannot work, changes what a run costs, or is the same run as another one.
        """
        pairs = [(label, value) for label, each in values.items() for value in each]
        changes = [[word_of(self.key, value), self._study] for _, value in pairs]
        words = [with_changes(self._arms[label].words, each) for (label, _), each in zip(pairs, changes, strict=True)]
        jobs, self._slots = asked_arms(self._launcher, words, range(TUNING_SEED, TUNING_SEED + self._asked.tune_seeds))
        for (label, value), job in zip(pairs, jobs, strict=True):
            self._jobs[label].append((value, job))
        folders = [job.folder for each in self._jobs.values() for _, job in each]
        for (label, value), job in zip(pairs, jobs, strict=True):
            own = self._arms[label].job.cost["train_pflop"]
            if abs(job.cost["train_pflop"] / own - 1) >= NO_MATTER:
                raise UsageError(
                    f"tune={self.key}: {value} changes what a run of {label} costs, so that its trials would not be "
                    "at equal cost; tune a setting that leaves the cost as it is"
                )
            if folders.count(job.folder) > 1:
                raise UsageError(
                    f"tune={self.key}: with {value}, {label} is the same run as another trial; leave one out"
                )

    def values(self, label: str) -> list[Any]:
        return [value for value, _ in self._jobs[label]]

    def tried(self, label: str) -> list[Tried]:
        """The trials of an arm.

        Raises:
            UsageError: a result is damaged.
        """
        return [
            Tried(value, runs := self._runs([job]), len(job.folders) - len(runs)) for value, job in self._jobs[label]
        ]

    def _runs(self, jobs: Iterable[Job]) -> list[FinishedRun]:
        """The finished runs of trials, each read once."""
        folders = [folder for job in jobs for folder in job.folders.values() if (folder / OF_FINISHED).exists()]
        new = [folder for folder in folders if folder not in self._read]
        found, left_out = read_runs(new) if new else ([], [])
        if left_out:
            raise UsageError("; ".join(f"{folder}: {reason}" for folder, reason in left_out))
        self._read |= {run.folder: run for run in found}
        return [self._read[folder] for folder in folders]

    def spent(self, labels: Iterable[str]) -> Spent:
        """What the trials of arms have cost, with those that failed or were stopped."""
        jobs = [job for label in labels for _, job in self._jobs[label]]
        return spent_in(self._runs(jobs), [folder for job in jobs for folder in job.folders.values()])

    def reasons(self) -> list[str]:
        """Why trials failed."""
        jobs = [job for pairs in self._jobs.values() for _, job in pairs]
        return [each for job in jobs for folder in job.folders.values() if (each := self._why(folder))]

    def _why(self, folder: Path) -> str:
        """Why a run failed when it was last tried; empty where it did not."""
        return self._launcher.failures.get(folder) or self._noted.get(Path(os.path.abspath(folder)), "")

    def run(self) -> None:
        """Runs what has no result yet: the first trial of each arm, which tells what one takes, then all. A run that
        failed in a search is not tried again once a trial of its arm has worked: the search has gone on from there.

        Raises:
            RunError: these trials, with those that are to follow them, would pass a budget.
        """
        timed = isinstance(self._asked, SettleConfig) and self._asked.hours is not None
        for first in (True, False) if timed else (False,):
            todo, price = [], Spent()
            for label, pairs in self._jobs.items():
                done = self._runs(job for _, job in pairs)
                worked = self._asked.tune_trials is not None and any(not each.failed for each in self.tried(label))
                open_jobs = [each for value, job in pairs for each in self._open(label, value, job, worked)]
                one = Spent(0.0, self._arms[label].job.cost["train_pflop"])
                if done:
                    one = spent_in(done, []).times(1 / len(done))
                wanted = open_jobs[: 0 if done else 1] if first else open_jobs
                todo += wanted
                later = 0 if first else (self._asked.trials - len(pairs)) * self._asked.tune_seeds
                price += one.times(len(wanted) + later)
            if todo:
                self._require_within(price)
                self._launcher.carry_out(todo, self._slots)

    def _require_within(self, price: Spent) -> None:
        spent = self.spent(self._jobs)
        over = passed(self._asked, spent + price)
        if over:
            raise RunError(
                f"{over}: tuning has taken {in_words(spent.seconds)} and {flop(1e15 * spent.pflop)}, and the trials "
                f"left take about {in_words(price.seconds)} and {flop(1e15 * price.pflop)}; give more, or try fewer "
                "values or tune_seeds in another study"
            )

    def _open(self, label: str, value: Any, job: Job, worked: bool) -> list[Job]:
        """The runs of a trial that are to be run."""
        return [
            replace(
                job,
                run=f"{TUNING} {label} {value} seed={seed}",
                overrides=[f"seed={seed}" if word.startswith("seed=") else word for word in job.overrides],
                folder=folder,
            )
            for seed, folder in job.folders.items()
            if not (folder / OF_FINISHED).exists() and not (worked and self._why(folder))
        ]
