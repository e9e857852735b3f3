"""Fair arms: each is given the baseline's cost and its own best value of a tuned setting before its first seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softmoe_cli.config.settle import Fairness, SettleConfig
from softmoe_cli.errors import UsageError
from softmoe_cli.launch.job import answered
from softmoe_cli.launch.plan import Job
from softmoe_cli.launch.sweep import Sweep
from softmoe_cli.settle.alike import require_comparable, require_same_images
from softmoe_cli.settle.arms import Arm, baseline_of, labels, of_files, science, with_changes
from softmoe_cli.settle.equal import Levelled, Leveller
from softmoe_cli.settle.record import give, given_before
from softmoe_cli.text import aligned, four_digits

LEVELLED = "equal.jsonl"
"""In the folder of a study: what each arm was given, so that a clock that is read again changes no arm."""


@dataclass(frozen=True)
class Arms:
    """Arms as they will run, the place of the baseline, the words as they were typed, and the room that jobs have."""

    arms: list[Arm]
    base: int
    typed: list[list[str]]
    slots: list[str]
    tracking: str | list[str] = "off"
    project: str | None = None
    """Where looks are sent: what tracking= and wandb.project= say of the runs."""

    @property
    def study(self) -> Path:
        return self.arms[0].job.folder.parent


def fair_arms(launcher: Sweep, typed: list[list[str]], asked: Fairness, seeds: Sequence[int]) -> Arms:
    """Checks the arms that were typed and gives each what `equal=` asks for.

    Raises:
        UsageError: an arm cannot work, or cannot be made to cost what the baseline does.
    """
    told = labels(typed)
    twins = sorted({label for label in told if told.count(label) > 1})
    if twins:
        raise UsageError(f"two arms are called {twins[0]}; give them other names, as files of conf/experiment have")
    trees = [tree for _, _, tree in launcher.composed([[*each, f"seed={seeds[0]}"] for each in typed])]
    require_comparable(typed, trees, asked)
    jobs, slots = asked_arms(launcher, typed, seeds)
    if isinstance(asked, SettleConfig):
        require_same_images([job.data for job in jobs if job.data is not None])
    base = baseline_of(told, typed, [job.added for job in jobs], asked.baseline)
    words = typed
    if asked.equal is not None:
        named = list(zip(told, typed, trees, strict=True))
        found = _levelled(launcher, named, base, asked, jobs[0].folder.parent)
        launcher.tell(_table(told, found, asked.equal, told[base]))
        words = [with_changes(each, level.changes) for each, level in zip(typed, found, strict=True)]
        jobs, slots = asked_arms(launcher, words, seeds)
    studies = sorted({str(job.folder.parent) for job in jobs})
    if len(studies) > 1:
        raise UsageError(f"arms lie in {' and '.join(studies)}: put them into one study with study=NAME")
    launcher.lie_in(jobs[0].folder.parent)
    arms = [Arm(*each) for each in zip(told, words, jobs, strict=True)]
    for arm in arms[:base] + arms[base + 1 :]:
        if arm.job.folder in [other.job.folder for other in arms if other is not arm]:
            raise UsageError(f"{arm.label} is the same run as another arm: arms must differ in what they compute")
    return Arms(arms, base, typed, slots, trees[base]["tracking"], trees[base]["wandb"]["project"])


def asked_arms(launcher: Sweep, words: Sequence[list[str]], seeds: Sequence[int]) -> tuple[list[Job], list[str]]:
    """A job of each arm, which knows the folders of its runs with all seeds, and the room that jobs have."""
    return launcher.ask([[*each, f"seed={seeds[0]}"] for each in words], seeds)


def _levelled(
    launcher: Sweep, arms: Sequence[tuple[str, list[str], dict[str, Any]]], base: int, asked: Fairness, study: Path
) -> list[Levelled]:
    """What each arm is given: as it was found before in this study, else found now."""
    words = [science(each) for _, each, _ in arms]
    order = sorted(words)
    question = {
        "equal": asked.equal, "free": asked.free, "tolerance": asked.tolerance, "baseline": words[base], "arms": order,
        **of_files([tree for _, _, tree in arms]),
    }  # fmt: skip
    path = study / LEVELLED
    given = given_before(path, question)
    if given is None:
        assert asked.equal is not None
        leveller = Leveller(launcher.command, asked.equal, asked.free, asked.tolerance, launcher.said)
        found: list[Levelled] = answered(leveller.level, arms, base)
        given = [vars(found[words.index(each)]) for each in order]
        if not launcher.plans:
            given = give(path, question, given)
    return [Levelled(**given[order.index(each)]) for each in words]


def _table(told: Sequence[str], found: Sequence[Levelled], by: str, base: str) -> str:
    """What each arm was given."""
    table: list[list[str]] = [["arm", "solved for", "given", by, f"against {base}"]]
    for label, each in zip(told, found, strict=True):
        given = " ".join(each.changes) or "as typed"
        apart = f"{100 * (each.cost / each.baseline_cost - 1):+.2f}%"
        table.append([label, each.free or "", given, four_digits(each.cost), apart])
    return f"equal={by}:\n{aligned(table, markdown=False)}"
