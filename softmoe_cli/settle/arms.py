"""The arms of a comparison: what commas make of a command line, what each is called, and which one is the baseline."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from softmoe_cli.config.run import NOT_SCIENCE
from softmoe_cli.errors import UsageError, nearest
from softmoe_cli.launch.plan import Job
from softmoe_cli.launch.typed import files_typed

FIRST_SEED = 0
NAMED = ("model", "adapter", "data", "recipe", "experiment")
"""Groups without a stroke whose choice says enough of itself."""

SET_OTHERS = {"slots", "checkpoint", "base", "data.crop", "data.area", "train.default_epochs"}
"""Keys that are in no signature because what they decide is there under other names: words like any others."""


@dataclass(frozen=True)
class Arm:
    """One arm: its label, the words of its jobs without the seed, and its job as the launcher has checked it."""

    label: str
    words: list[str]
    job: Job


def expanded(params: Mapping[str, str], arguments: Sequence[str], loader: Any) -> list[list[str]]:
    """The words of every job: all combinations of what stands between commas, as Hydra's own sweeper makes them.
    `params` are the keys that an experiment lists for a sweep."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    typed = [*(f"{key}={value}" for key, value in params.items()), *arguments]
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(typed)
    (batch,) = BasicSweeper.split_arguments(overrides, None)
    return batch


def key_of(word: str) -> str:
    return word.lstrip("+").partition("=")[0]


def science(words: Iterable[str]) -> list[str]:
    """The words that decide what an arm computes, in one order: the same however and wherever they were typed."""
    aside = set(NOT_SCIENCE) - SET_OTHERS
    return sorted(word for word in words if not any(f"{key_of(word)}.".startswith(f"{key}.") for key in aside))


def of_files(trees: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What a record of arms needs beside their words where -cn, -cp or -cd say more of them: a digest of what they are
    composed to."""
    if not files_typed():
        return {}
    aside = {*NOT_SCIENCE, "seed"} - SET_OTHERS

    def kept(tree: Mapping[str, Any], start: str = "") -> dict[str, Any]:
        return {
            key: kept(value, f"{start}{key}.") if isinstance(value, dict) else value
            for key, value in tree.items()
            if f"{start}{key}" not in aside
        }

    told = sorted(json.dumps(kept(tree), sort_keys=True) for tree in trees)
    return {"composed": hashlib.sha256("".join(told).encode()).hexdigest()}


def without_seed(many: Iterable[Sequence[str]]) -> list[list[str]]:
    """The arms of a list of jobs: the seed is taken out, and each arm is named once."""
    arms = [[word for word in words if key_of(word) != "seed"] for words in many]
    return [words for place, words in enumerate(arms) if words not in arms[:place]]


def with_changes(words: Sequence[str], changes: Sequence[str]) -> list[str]:
    """The words with some keys given other values."""
    keys = {key_of(change) for change in changes}
    return [*(word for word in words if key_of(word) not in keys), *changes]


def labels(many: Sequence[Sequence[str]]) -> list[str]:
    """What arms are called by: the values of the words in which they differ, with the key's last word before those
    that are no choice by name. `[[model/router=soft, optim.lr=0.1], ...]` -> `soft, lr=0.1`"""
    common = set.intersection(*(set(words) for words in many))
    found = []
    for words in many:
        parts = []
        for word in words:
            key, value = key_of(word), word.partition("=")[2]
            if word not in common:
                parts.append(value if "/" in key or key in NAMED else f"{key.rpartition('.')[2]}={value}")
        found.append(", ".join(parts))
    return found


def baseline_of(told: Sequence[str], many: Sequence[Sequence[str]], added: Sequence[int], named: str | None) -> int:
    """The place of the arm that others are measured against: by its label or one of its words; else the first of
    those to which least was `added`: one without adapters and, if there is one, without experts.

    Raises:
        UsageError: no arm, or several, are called so.
    """
    if named is None:
        return added.index(min(added))
    found = [place for place, words in enumerate(many) if named in (told[place], *words)]
    if len(found) != 1:
        which = f"{len(found)} arms have that." if found else f"no arm is called or has that.{nearest(named, told)}"
        raise UsageError(f"baseline={named}: {which} Arms: {'; '.join(told)}")
    return found[0]
