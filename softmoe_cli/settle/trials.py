"""The trials of tuning: before the first seed each arm gets its own best value of one setting."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from softmoe_cli.compare.runs import read_runs
from softmoe_cli.config.settle import Fairness
from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.launch.plan import Job
from softmoe_cli.launch.sweep import Sweep
from softmoe_cli.options.conf_files import value_of
from softmoe_cli.settle.arms import Arm, with_changes
from softmoe_cli.settle.equal import NO_MATTER
from softmoe_cli.settle.fair import Arms, asked_arms
from softmoe_cli.settle.tune import TUNING_SEED, Tried, Tuned, booked, chosen_by
from softmoe_cli.settle.tuning import tuning_text, write_tuning

TUNING = "tuning"


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
    if seeds[-1] >= TUNING_SEED:
        raise UsageError(f"seed={seeds[0]}: seeds from {TUNING_SEED} on are for tuning; choose smaller ones")
    tuning_seeds = range(TUNING_SEED, TUNING_SEED + asked.tune_seeds)
    trees = [tree for _, _, tree in launcher.composed([[*arm.words, "seed=0"] for arm in arms.arms])]
    study = f"study={trees[0]['study']}-{TUNING}"
    pairs = [(arm, value) for arm in arms.arms for value in asked.tune_values]
    words = [with_changes(arm.words, [f"{asked.tune}={value}", study]) for arm, value in pairs]
    jobs, slots = asked_arms(launcher, words, tuning_seeds)
    for (arm, value), job in zip(pairs, jobs, strict=True):
        if abs(job.cost["train_pflop"] / arm.job.cost["train_pflop"] - 1) >= NO_MATTER:
            raise UsageError(
                f"tune={asked.tune}: {value} changes what a run of {arm.label} costs, so that its trials would not be "
                "at equal cost; tune a setting that leaves the cost as it is"
            )
    _run(launcher, pairs, jobs, slots)
    by, found = chosen_by(quality), []
    for place, (arm, tree) in enumerate(zip(arms.arms, trees, strict=True)):
        own = jobs[place * len(asked.tune_values) : (place + 1) * len(asked.tune_values)]
        trials = [_trial(value, job) for value, job in zip(asked.tune_values, own, strict=True)]
        found.append(Tuned(arm.label, trials, _default(tree, asked.tune), by, booked(trials)))
    _require(found, asked.tune, launcher)
    chosen = [
        with_changes(arm.words, [f"{asked.tune}={each.best.value}"])
        for arm, each in zip(arms.arms, found, strict=True)
        if each.best
    ]
    tuned_jobs, slots = asked_arms(launcher, chosen, seeds)
    launcher.tell(tuning_text(found, asked.tune))
    write_tuning(found, asked.tune, jobs[0].folder.parent)
    own_arms = [Arm(arm.label, each, job) for arm, each, job in zip(arms.arms, chosen, tuned_jobs, strict=True)]
    return Arms(own_arms, arms.base, arms.typed, slots), found


def _default(tree: dict[str, Any], key: str) -> Any:
    try:
        return value_of(tree, key)
    except KeyError:
        return None


def _run(launcher: Sweep, pairs: Sequence[tuple[Arm, Any]], jobs: Sequence[Job], slots: Sequence[str]) -> None:
    """Runs the trials that have no result yet."""
    todo = []
    for (arm, value), job in zip(pairs, jobs, strict=True):
        for seed, folder in job.folders.items():
            if not (folder / "result.json").exists():
                told = [f"seed={seed}" if word.startswith("seed=") else word for word in job.overrides]
                name = f"{TUNING} {arm.label} {value} seed={seed}"
                todo.append(replace(job, run=name, overrides=told, folder=folder))
    if todo:
        launcher.carry_out(todo, slots)


def _trial(value: Any, job: Job) -> Tried:
    done = [folder for folder in job.folders.values() if (folder / "result.json").exists()]
    runs, left_out = read_runs(done)
    if left_out:
        raise UsageError("; ".join(f"{folder}: {reason}" for folder, reason in left_out))
    return Tried(value, runs, len(job.folders) - len(runs))


def _require(found: Sequence[Tuned], key: str, launcher: Sweep) -> None:
    lost = [each.arm for each in found if each.best is None]
    if lost:
        why = "\n  ".join(launcher.failures.values())
        raise RunError(f"tune={key}: every value fails with some seed for {'; '.join(lost)}\n  {why}")
