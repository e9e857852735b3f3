"""The trials of tuning: before the first seed each arm gets its own best value of one setting."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from softmoe_cli.compare.runs import read_runs
from softmoe_cli.config.settle import Fairness, SettleConfig
from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.launch.plan import Job
from softmoe_cli.launch.sweep import Sweep
from softmoe_cli.options.conf_files import value_of
from softmoe_cli.settle.arms import Arm, science, with_changes
from softmoe_cli.settle.equal import NO_MATTER
from softmoe_cli.settle.fair import Arms, asked_arms
from softmoe_cli.settle.record import give, given_before
from softmoe_cli.settle.spent import Spent, passed
from softmoe_cli.settle.tune import TUNING_SEED, Tried, Tuned, booked, chosen_by
from softmoe_cli.settle.tuning import tuning_text, write_tuning
from softmoe_cli.text import flop, in_words, word_of

TUNING = "tuning"
TUNED = "tuned.jsonl"
"""Beside the trials: the value that each arm was given, so that trials which come later change none."""
OF_FINISHED = "result.json"


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
    tuning_seeds = range(TUNING_SEED, TUNING_SEED + asked.tune_seeds)
    trees = [tree for _, _, tree in launcher.composed([[*arm.words, "seed=0"] for arm in arms.arms])]
    study = f"study={trees[0]['study']}-{TUNING}"
    pairs = [(arm, value) for arm in arms.arms for value in asked.tune_values]
    words = [with_changes(arm.words, [word_of(asked.tune, value), study]) for arm, value in pairs]
    jobs, slots = asked_arms(launcher, words, tuning_seeds)
    _require_trials(asked.tune, pairs, jobs)
    by, found = chosen_by(quality), []
    alike = sorted(science(arm.words) for arm in arms.arms)
    question = {
        "tune": asked.tune, "tune_values": asked.tune_values, "tune_seeds": asked.tune_seeds, "by": by,
        "arms": alike,
    }  # fmt: skip
    path = jobs[0].folder.parent / TUNED
    given = given_before(path, question)
    if given is None:
        _run(launcher, pairs, jobs, slots, asked)
    for place, (arm, tree) in enumerate(zip(arms.arms, trees, strict=True)):
        own = jobs[place * len(asked.tune_values) : (place + 1) * len(asked.tune_values)]
        trials = [_trial(value, job) for value, job in zip(asked.tune_values, own, strict=True)]
        spent = booked(trials, [folder for job in own for folder in job.folders.values()])
        found.append(Tuned(arm.label, trials, _default(tree, asked.tune), by, spent))
    order = [alike.index(science(arm.words)) for arm in arms.arms]
    if given is None:
        _require(found, asked.tune, launcher)
        best = {at: str(each.best.value) for at, each in zip(order, found, strict=True) if each.best}
        given = give(path, question, [best[at] for at in sorted(best)])
    found = [replace(each, given=given[at]) for at, each in zip(order, found, strict=True)]
    chosen = [
        with_changes(arm.words, [word_of(asked.tune, each.best.value)])
        for arm, each in zip(arms.arms, found, strict=True)
        if each.best
    ]
    tuned_jobs, slots = asked_arms(launcher, chosen, seeds)
    launcher.tell(tuning_text(found, asked.tune))
    write_tuning(found, asked.tune, jobs[0].folder.parent)
    own_arms = [Arm(arm.label, each, job) for arm, each, job in zip(arms.arms, chosen, tuned_jobs, strict=True)]
    return replace(arms, arms=own_arms, slots=slots), found


def require_below(seeds: Iterable[int]) -> None:
    """Raises UsageError for a seed that tuning uses."""
    largest = max(seeds, default=0)
    if largest >= TUNING_SEED:
        raise UsageError(f"seed={largest}: seeds from {TUNING_SEED} on are for tuning; choose smaller ones")


def _require_trials(key: str, pairs: Sequence[tuple[Arm, Any]], jobs: Sequence[Job]) -> None:
    for (arm, value), job in zip(pairs, jobs, strict=True):
        if abs(job.cost["train_pflop"] / arm.job.cost["train_pflop"] - 1) >= NO_MATTER:
            raise UsageError(
                f"tune={key}: {value} changes what a run of {arm.label} costs, so that its trials would not be "
                "at equal cost; tune a setting that leaves the cost as it is"
            )
        if [other.folder for other in jobs].count(job.folder) > 1:
            raise UsageError(f"tune={key}: with {value}, {arm.label} is the same run as another trial; leave one out")


def _default(tree: dict[str, Any], key: str) -> Any:
    try:
        return value_of(tree, key)
    except KeyError:
        return None


def _run(
    launcher: Sweep, pairs: Sequence[tuple[Arm, Any]], jobs: Sequence[Job], slots: Sequence[str], asked: Fairness
) -> None:
    """Runs the trials that have no result yet: the first one of each arm, which tells what a trial takes, then all.

    Raises:
        RunError: they would pass a budget.
    """
    folders = [folder for job in jobs for folder in job.folders.values()]
    timed = isinstance(asked, SettleConfig) and asked.hours is not None
    for first in (True, False) if timed else (False,):
        todo, price = [], Spent()
        for label in dict.fromkeys(arm.label for arm, _ in pairs):
            own = [(value, job) for (arm, value), job in zip(pairs, jobs, strict=True) if arm.label == label]
            open_jobs = [each for value, job in own for each in _open(label, value, job)]
            done = [folder for _, job in own for folder in job.folders.values() if (folder / OF_FINISHED).exists()]
            one = Spent(0.0, own[0][1].cost["train_pflop"])
            if done:
                one = booked([Tried(None, read_runs(done)[0])]).times(1 / len(done))
            wanted = open_jobs[: 0 if done else 1] if first else open_jobs
            todo += wanted
            price += one.times(len(wanted))
        finished = [folder for folder in folders if (folder / OF_FINISHED).exists()]
        spent = booked([Tried(None, read_runs(finished)[0] if finished else [])], folders)
        over = passed(asked, spent + price)
        if todo and over:
            raise RunError(
                f"{over}: tuning has taken {in_words(spent.seconds)} and {flop(1e15 * spent.pflop)}, and the trials "
                f"left take about {in_words(price.seconds)} and {flop(1e15 * price.pflop)}; give more, or fewer "
                "tune_values or tune_seeds"
            )
        if todo:
            launcher.carry_out(todo, slots)


def _open(label: str, value: Any, job: Job) -> list[Job]:
    """The runs of a trial that have no result."""
    return [
        replace(
            job,
            run=f"{TUNING} {label} {value} seed={seed}",
            overrides=[f"seed={seed}" if word.startswith("seed=") else word for word in job.overrides],
            folder=folder,
        )
        for seed, folder in job.folders.items()
        if not (folder / OF_FINISHED).exists()
    ]


def _trial(value: Any, job: Job) -> Tried:
    done = [folder for folder in job.folders.values() if (folder / OF_FINISHED).exists()]
    runs, left_out = read_runs(done)
    if left_out:
        raise UsageError("; ".join(f"{folder}: {reason}" for folder, reason in left_out))
    return Tried(value, runs, len(job.folders) - len(runs))


def _require(found: Sequence[Tuned], key: str, launcher: Sweep) -> None:
    lost = [each.arm for each in found if each.best is None]
    if lost:
        why = "\n  ".join(launcher.failures.values())
        raise RunError(f"tune={key}: every value fails with some seed for {'; '.join(lost)}\n  {why}")
