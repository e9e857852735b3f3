"""Puts runs into groups, and groups that saw the same images into blocks with intervals, verdicts and fronts."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from softmoe_cli.compare.checklist import compute
from softmoe_cli.compare.cuts import standing_together
from softmoe_cli.compare.groups import (
    LABEL_LETTERS,
    Block,
    Comparison,
    Group,
    block_of,
    group_key,
    key_named,
    natural,
    said,
)
from softmoe_cli.compare.looks import read_looks
from softmoe_cli.compare.others.computed import with_computed
from softmoe_cli.compare.others.read import is_others, read_others
from softmoe_cli.compare.question import Question
from softmoe_cli.compare.runs import FINGERPRINT, VERSION, FinishedRun, read_runs, single, sweep_commands, with_sources
from softmoe_cli.compare.settled import as_settled
from softmoe_cli.compare.verdicts import judge
from softmoe_cli.errors import UsageError
from softmoe_cli.run.rows import COSTS, QUALITIES, number, of_tasks
from softmoe_cli.text import shortened

SPLIT_SEED = "data.split_seed"
EVALUATION = (
    "data", "data.identity", "test_images", "data.num_classes", SPLIT_SEED, "data.validation_fraction",
    "data.test_fraction",
)  # fmt: skip
"""Qualities are compared only where all of these are equal: the same images, cut the same way. Cuts that groups have in
common may stand together, as then each cut is compared with itself."""


def compare(folders: Sequence[Path], question: Question) -> Comparison:
    """Reads and filters the runs, separates those that cannot be compared, groups them and judges the groups.

    Raises:
        UsageError: folders, keys or a baseline that do not exist, or nothing left to compare.
    """
    question.check()
    runs, left_out, told = _single_runs(folders, question)
    question, settled = as_settled(question, runs)
    usable, left_out, keys = _asked_for(runs, left_out, question)
    if question.with_source:
        usable, unknown = with_sources(usable)
        left_out += unknown
    by = [key_named("by", key, keys) for key in question.by]
    columns = [key_named("columns", key, [*keys, *COSTS, *QUALITIES]) for key in question.columns]
    columns = columns or [key for key in ("forward_gflop", "params_m", "device_s") if key != question.cost]
    notes = [*told, *settled.notes, *(f"{run.place}: {run.damage}; it has no curve" for run in usable if run.damage)]
    notes += version_notes(usable, question.strict)
    parts, varying = kept_apart(usable, question, by)
    blocks = [block_of(title, part, by, columns, question) for title, part in parts]
    if len(blocks) > 1:
        notes.append(f"runs that differ in {', '.join(varying)} are kept apart: {len(blocks)} tables")
    looks = read_looks(usable)
    notes += looks.damage
    judge(blocks, question, looks, settled)
    for block in blocks:
        _sort(block, question, keys)
    asked = columns if question.columns else []
    return Comparison(
        question.quality, question.cost, columns, blocks, notes, left_out, asked, sweep_commands(usable),
        second=question.second, margin=question.margin, to_quality=question.to_quality, compute=compute(runs, folders),
    )  # fmt: skip


def usable_runs(
    folders: Sequence[Path], question: Question
) -> tuple[list[FinishedRun], list[tuple[str, str]], list[str]]:
    """The runs below the folders that a question is about; (folder, reason) for what is left out; all keys of the runs.

    Raises:
        UsageError: a folder or a key that does not exist, or nothing is left.
    """
    runs, left_out, _ = _single_runs(folders, question, others=False)
    return _asked_for(runs, left_out, question)


def _single_runs(
    folders: Sequence[Path], question: Question, *, others: bool = True
) -> tuple[list[FinishedRun], list[tuple[str, str]], list[str]]:
    """The runs, those of other programs too if asked for, what is left out, and notes on what they state."""
    read, left_out, notes = read_others(folders, question) if others else ([], [], [])
    runs, unread = read_runs([folder for folder in folders if not (others and is_others(folder))])
    read, computed = with_computed(read)
    runs, doubles = single([*runs, *read], question.strict)
    left_out = [*unread, *left_out, *doubles]
    if not runs:
        raise UsageError(f"no finished run below {', '.join(map(str, folders))}{_first(left_out)}")
    return runs, left_out, [*notes, *computed]


def _asked_for(
    runs: list[FinishedRun], left_out: list[tuple[str, str]], question: Question
) -> tuple[list[FinishedRun], list[tuple[str, str]], list[str]]:
    keys = list(dict.fromkeys(key for run in runs for key in run.row))
    runs = _where(runs, question.where, keys)
    usable = []
    for run in runs:
        needed = (question.quality, question.cost) if run.chosen is None else (question.quality,)
        lacks = [key for key in needed if not number(run.row.get(key))]
        if lacks:
            left_out.append((run.place, f"its result has no number {lacks[0]}"))
        else:
            usable.append(run)
    if not usable:
        raise UsageError(
            f"no run has both {question.quality} and {question.cost}; choose others with --quality and --cost"
        )
    return usable, left_out, keys


def kept_apart(
    runs: Sequence[FinishedRun], question: Question, by: Sequence[str] | None = None
) -> tuple[list[tuple[str, list[FinishedRun]]], list[str]]:
    """(title, runs) of each part whose runs may stand together, and the keys in which the parts differ. Where it is
    said `by` what runs are grouped, cuts that several groups have in common are one part."""
    parts = defaultdict(list)
    for run in runs:
        parts[_apart(run, question)].append(run)
    if by is not None:
        parts = _joined(parts, by)
    varying = [i for i, values in enumerate(zip(*parts, strict=True)) if len(set(values)) > 1]
    found = []
    for key in sorted(parts):
        title = f"{shortened(key[0], LABEL_LETTERS)}, {parts[key][0].row.get('test_images', '?')} test images"
        cuts = {run.draw[0] for run in parts[key]}
        title += f" in each of {len(cuts)} cuts" if len(cuts) > 1 else ""
        differing = [
            f"{APART[i]} {shortened(key[i], LABEL_LETTERS)}"
            for i in varying
            if APART[i] not in ("data", "test_images") and key[i] and (parts[key][0].chosen is None or key[i] != "null")
        ]
        found.append(("; ".join([title, *differing]), parts[key]))
    return found, list(dict.fromkeys(APART[i] for i in varying))


APART = (*EVALUATION, "data.sets", "train.loss", *FINGERPRINT, *VERSION)
Separated = defaultdict[tuple[str, ...], list[FinishedRun]]


def _joined(parts: Separated, by: Sequence[str]) -> Separated:
    """Parts that differ in their cut alone become one where groups have runs of both."""
    at = APART.index(SPLIT_SEED)
    alike: dict[tuple[str, ...], list[FinishedRun]] = defaultdict(list)
    for key, runs in parts.items():
        alike[(*key[:at], "", *key[at + 1 :])] += runs
    found: Separated = defaultdict(list)
    for key, runs in alike.items():
        groups: dict[int, set[str]] = defaultdict(set)
        for run in runs:
            groups[run.draw[0]].add(group_key(run, by))
        for together in standing_together(groups):
            name = ",".join(map(str, sorted(together)))
            found[(*key[:at], name, *key[at + 1 :])] += [run for run in runs if run.draw[0] in together]
    return found


def _first(left_out: list[tuple[str, str]]) -> str:
    if not left_out:
        return "; give the folder of a study, such as outputs/default"
    return f"; left out are {len(left_out)}, first {left_out[0][0]}: {left_out[0][1]}"


def _apart(run: FinishedRun, question: Question) -> tuple[str, ...]:
    """What must be equal for two runs to stand in one table; "" where it need not be."""
    row = run.row
    seconds = question.clocked or row.get("train.minutes") is not None  # minutes buy more training on better hardware
    return (
        *(said(row.get(key)) for key in EVALUATION),
        ", ".join(sorted(of_tasks(row, "top1_pct"))),  # other sets may have as many images and classes
        said(row.get("train.loss")) if QUALITIES[question.quality].curve == "loss" else "",
        *(said(row.get(key)) if seconds else "" for key in FINGERPRINT),
        *(said(row.get(key)) if question.strict else "" for key in VERSION),
    )


def version_notes(runs: list[FinishedRun], strict: bool) -> list[str]:
    runs = [run for run in runs if run.chosen is None]
    versions = Counter(
        f"commit {run.row.get('commit')}, softmoe {run.row.get('softmoe')}, torch {run.row.get('torch')}"
        for run in runs
    )
    notes = []
    if len(versions) > 1 and not strict:
        told = "; ".join(f"{count} of {version}" for version, count in sorted(versions.items()))
        notes.append(f"runs of {len(versions)} code versions stand together ({told}); --strict keeps them apart")
    dirty = sum(str(run.row.get("commit")).endswith("-dirty") for run in runs)
    if dirty:
        notes.append(f"{dirty} of {len(runs)} runs were made from a checkout with uncommitted changes (-dirty)")
    return notes


def _where(runs: list[FinishedRun], conditions: Sequence[str], keys: list[str]) -> list[FinishedRun]:
    for condition in conditions:
        name, equals, values = condition.partition("=")
        if not equals:
            raise UsageError(f"--where {condition}: write KEY=VALUE or KEY=VALUE,VALUE")
        key = key_named("where", name, keys)
        there = sorted({said(run.row.get(key)) for run in runs})
        whole = values.startswith("[") or said(values) in there  # a value may have commas of its own
        wanted = [said(value) for value in ([values] if whole else values.split(","))]
        runs = [run for run in runs if said(run.row.get(key)) in wanted]
        if not runs:
            raise UsageError(f"--where {condition}: no run has that. {key} is {' or '.join(there)}")
    return runs


def _sort(block: Block, question: Question, keys: Iterable[str]) -> None:
    """Best quality first, other figures and settings ascending; ties always in the same order."""
    key = "label" if question.sort == "label" else question.sort and key_named("sort", question.sort, keys)
    key = key or question.quality

    def place(group: Group) -> tuple[Any, ...]:
        if key == "label":
            return natural(group.label)
        values = [run.row.get(key) for run in group.runs]
        numbers = [float(value) for value in values if value is not None and number(value)]
        if len(numbers) < len(values):
            return (1, *natural(said(values[0])), group.label)
        sign = -1 if key in QUALITIES and QUALITIES[key].better == "higher" else 1
        return (0, sign * math.fsum(numbers) / len(numbers), group.label)

    block.groups.sort(key=place)
