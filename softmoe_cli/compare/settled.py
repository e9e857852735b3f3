"""Studies that softmoe settle has made: what was fixed before their first run holds for every later look at them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from softmoe_cli.compare.groups import Group
from softmoe_cli.compare.question import Question
from softmoe_cli.compare.runs import FinishedRun
from softmoe_cli.errors import UsageError
from softmoe_cli.run import rows
from softmoe_cli.text import printable

RECORD = "settle.json"
RECORDED = {
    **rows.FORMAT_KEY,
    "arms": rows.Key(rows.Kind("a list", lambda value: isinstance(value, list)), meaning="label and words of each"),
    "baseline": rows.Key(rows.TEXT, meaning="the label of the arm that others are measured against"),
    "quality": rows.Key(rows.TEXT, meaning="the main measure"),
    "margin": rows.Key(rows.NUMBER, meaning="within which arms are equal", null=True),
    "fairness": rows.Key(
        rows.Kind("settings", lambda value: isinstance(value, dict)), meaning="how arms are made fair"
    ),
    "first_seed": rows.Key(rows.WHOLE, meaning="of the seeds, which follow each other"),
}
"""The keys of settle.json."""


def asked_before(study: Path) -> dict[str, Any] | None:
    """What settle.json says; None where there is none.

    Raises:
        UsageError: it is damaged.
    """
    path = study / RECORD
    try:
        return rows.row(path, RECORDED)
    except FileNotFoundError:
        return None
    except rows.Unreadable as error:
        raise UsageError(f"{printable(str(path))} {error}; choose another study") from error


@dataclass(frozen=True)
class Settled:
    """What settle.json asks for: runs of the baseline, by folder, if it is to be taken; how many comparisons Holm's
    correction counts at least; and a note that says so."""

    baselines: frozenset[str] = frozenset()
    family: int = 0
    notes: tuple[str, ...] = ()

    def candidates(self, groups: Sequence[Group]) -> list[Group]:
        """The groups that have a run of the baseline."""
        return [g for g in groups if any(os.path.abspath(run.folder) in self.baselines for run in g.runs)]


def as_settled(question: Question, runs: Sequence[FinishedRun]) -> tuple[Question, Settled]:
    """The question as the studies of these runs have fixed it, where nothing else was typed. Whoever stopped at a
    verdict has looked after every seed, so that the any-time rule judges in any case."""
    told: dict[Path, dict[str, Any]] = {}
    notes = []
    for study in sorted({run.folder.parent for run in runs if run.chosen is None}):
        try:
            record = asked_before(study)
        except UsageError as error:
            notes.append(f"{error}; the any-time rule judges, and no other part of its question is known")
            question = replace(question, any_time=True)
            continue
        if record is not None:
            told[study] = record
    if not told:
        return question, Settled(notes=tuple(notes))
    question = replace(question, any_time=True)
    fixed = {(record["quality"], record["margin"]) for record in told.values()}
    if len(fixed) == 1:
        ((quality, margin),) = fixed
        if quality in rows.QUALITIES and question.quality == Question.quality and "quality" not in question.typed:
            question = replace(question, quality=quality)
        if question.margin is None and question.quality == quality:
            question = replace(question, margin=margin)
    baselines = frozenset[str]().union(*(_baselines(study, record["baseline"]) for study, record in told.items()))
    family = sum(max(1, len(record["arms"]) - 1) for record in told.values())
    names = " and ".join(printable(str(study / RECORD)) for study in told)
    margin = "" if question.margin is None else f", a margin of {question.margin:g}"
    against = question.baseline or " and ".join(dict.fromkeys(record["baseline"] for record in told.values()))
    notes.append(
        f"{names}: settle decided when to stop, so the any-time rule judges {question.quality}{margin}, against "
        f"{printable(against)}, with Holm over {family} or more"
    )
    return question, Settled(baselines if question.baseline is None else frozenset(), family, tuple(notes))


def _baselines(study: Path, label: str) -> set[str]:
    """The folders of an arm's runs: a sweep's jobs are called by arm and seed."""
    found = set()
    for file in sorted(study.glob("sweep-*/jobs.json")):
        try:
            _, jobs = rows.jobs(file)
        except (FileNotFoundError, rows.Unreadable):
            continue  # softmoe status names it
        named = [job for job in jobs if str(job["run"]).rpartition(" seed=")[0] == label]
        found |= {os.path.abspath(file.parent / job["folder"]) for job in named}
    return found
