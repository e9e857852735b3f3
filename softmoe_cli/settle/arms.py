"""The arms of a comparison: what commas make of a command line, what each is called, and which one is the baseline."""

from collections.abc import Sequence
from dataclasses import dataclass

from softmoe_cli.errors import UsageError, nearest
from softmoe_cli.launch.plan import Job

FIRST_SEED = 0


@dataclass(frozen=True)
class Arm:
    """One arm: its label, the words of its jobs without the seed, and its job as the launcher has checked it."""

    label: str
    words: list[str]
    job: Job


def labels(many: Sequence[Sequence[str]]) -> list[str]:
    """What arms are called by: the values of the words in which they differ, with the key's last word before those
    that are no choice by name. `[[model/router=soft, optim.lr=0.1], ...]` -> `soft, lr=0.1`"""
    common = set.intersection(*(set(words) for words in many))
    found = []
    for words in many:
        parts = []
        for word in words:
            key, _, value = word.lstrip("+").partition("=")
            if word not in common:
                named = "/" in key or key in ("model", "data", "recipe", "experiment")
                parts.append(value if named else f"{key.rpartition('.')[2]}={value}")
        found.append(", ".join(parts))
    return found


def without_seed(many: Sequence[Sequence[str]]) -> list[list[str]]:
    """The arms of a list of jobs: the seed is taken out, and each is named once."""
    arms = [[word for word in words if word.lstrip("+").partition("=")[0] != "seed"] for words in many]
    return [words for place, words in enumerate(arms) if words not in arms[:place]]


def baseline_of(arms: Sequence[Arm], named: str | None) -> Arm:
    """The arm that others are measured against: by its label or one of its words; else the first dense one, else the
    first.

    Raises:
        UsageError: no arm, or several, are called so.
    """
    if named is None:
        return next((arm for arm in arms if arm.job.dense), arms[0])
    found = [arm for arm in arms if named in (arm.label, *arm.words)]
    if len(found) != 1:
        told = [arm.label for arm in arms]
        which = f"{len(found)} arms have that" if found else f"no arm is called or has that.{nearest(named, told)}"
        raise UsageError(f"baseline={named}: {which} Arms: {'; '.join(told)}")
    return found[0]
