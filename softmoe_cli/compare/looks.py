"""Looks at a study: what softmoe compare has shown of it is recorded, so that seeds which come later are known as such.

A look is a row of looks.jsonl in the folder of each study that it showed. It counts for two groups from two shared
seeds on: from then on a difference has an interval, and whoever has seen that may decide by it how many seeds follow.
"""

import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from softmoe_cli.compare.cuts import Draw, unit_of
from softmoe_cli.compare.intervals import pairable
from softmoe_cli.compare.runs import FinishedRun
from softmoe_cli.files import not_following
from softmoe_cli.run import rows
from softmoe_cli.text import printable

LOOKS = "looks.jsonl"
COUNTS_FROM = 2
"""Seeds that both groups must have in a look."""


@dataclass(frozen=True)
class PastLook:
    """One look: its main measure, its margin, and the signatures of its runs."""

    time: float
    quality: str
    margin: float | None
    runs: frozenset[str]


@dataclass(frozen=True)
class PastLooks:
    """All looks, the first one first; `damage` names files that cannot be read: then any seed may have come after a
    look."""

    seen: list[PastLook]
    damage: list[str]

    def first(self, run: FinishedRun, partner: FinishedRun) -> int:
        """The number of the first look that showed both; behind the last one where none did."""
        pair = {run.row["signature"], partner.row["signature"]}
        return next((place for place, look in enumerate(self.seen) if pair <= look.runs), len(self.seen))


def read_looks(runs: Iterable[FinishedRun]) -> PastLooks:
    """The looks at the studies of these runs."""
    seen, damage = set(), []
    for study in sorted({run.folder.parent for run in runs}):
        try:
            told = rows.lines(study / LOOKS, rows.LOOKED)
        except FileNotFoundError:
            continue
        except rows.Unreadable as error:
            damage.append(f"{printable(str(study / LOOKS))} {error}: any seed may have come after a look")
            continue
        seen |= {PastLook(row["time"], row["quality"], row["margin"], frozenset(row["runs"])) for row in told}
    return PastLooks(sorted(seen, key=lambda look: (look.time, sorted(look.runs))), damage)


def record_look(runs: Sequence[FinishedRun], quality: str, margin: float | None) -> list[str]:
    """Adds a row to looks.jsonl of every study, where that does not have the same one; what could not be written."""
    now = PastLook(time.time(), quality, margin, frozenset(run.row["signature"] for run in runs))
    row = {"format": rows.FORMAT, "time": now.time, "quality": quality, "margin": margin, "runs": sorted(now.runs)}
    failed = []
    for study in sorted({run.folder.parent for run in runs}):
        known = read_looks([run for run in runs if run.folder.parent == study])
        if known.damage or any(replace(look, time=now.time) == now for look in known.seen):
            continue
        try:
            with open(study / LOOKS, "a", opener=not_following) as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            failed.append(
                f"this look is not recorded in {printable(str(study / LOOKS))} ({error.strerror}): seeds that are "
                "added later will not be known as such; say --any-time then"
            )
    return failed


def seed_order(ours: Sequence[FinishedRun], theirs: Sequence[FinishedRun], looks: PastLooks) -> list[int]:
    """Of runs of one cut: the seeds that both have, in the order of the looks that showed them first, and of their
    numbers within a look: so every look has seen the beginning of it. Empty where a seed occurs twice in a group."""
    mine, its = ({run.row["seed"]: run for run in runs} for runs in (ours, theirs))
    if len(mine) < len(ours) or len(its) < len(theirs):
        return []
    return sorted(mine.keys() & its.keys(), key=lambda seed: (looks.first(mine[seed], its[seed]), seed))


def draw_order(
    ours: Sequence[FinishedRun], theirs: Sequence[FinishedRun], looks: PastLooks
) -> list[tuple[int, list[Draw]]]:
    """The same for runs of any cuts, each seed with its draw. Where cuts are compared: the cuts in their order, each
    with the draws that the first look at it showed; a mean that took in later ones would not be what that look saw."""
    mine, its = ({run.draw: run for run in runs} for runs in (ours, theirs))
    if len(mine) < len(ours) or len(its) < len(theirs):
        return []
    unit, cuts = unit_of(mine, its)
    gathered: dict[int, dict[Draw, int]] = {}
    for draw in sorted(mine.keys() & its.keys()):
        if draw[0] in cuts:
            gathered.setdefault(draw[unit == "seed"], {})[draw] = looks.first(mine[draw], its[draw])
    earliest = {key: min(draws.values()) for key, draws in gathered.items()}
    return [
        (key, [draw for draw, first in gathered[key].items() if first == earliest[key]])
        for key in sorted(gathered, key=lambda key: (earliest[key], key))
    ]


def seeds_were_added(ours: Sequence[FinishedRun], theirs: Sequence[FinishedRun], looks: PastLooks) -> bool:
    """Whether a look that counts has shown some of the runs that a test of the two groups uses, and not all."""
    if looks.damage:
        return True
    _, cuts = unit_of(*([run.draw for run in runs] for runs in (ours, theirs)))
    sides = [[(run.draw, run) for run in runs if run.draw[0] in cuts] for runs in (ours, theirs)]
    shared = pairable(*sides)
    mine, its = ([run.row["signature"] for draw, run in side if shared is None or draw in shared] for side in sides)
    for look in looks.seen:
        counts = [sum(signature in look.runs for signature in signatures) for signatures in (mine, its)]
        if min(counts) >= COUNTS_FROM and counts != [len(mine), len(its)]:
            return True
    return False
