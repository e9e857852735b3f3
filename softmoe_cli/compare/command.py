"""`softmoe compare`: its options, what it prints, and the files that it writes."""

import argparse
import csv
import dataclasses
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from softmoe_cli import programs
from softmoe_cli.errors import UsageError, nearest
from softmoe_cli.run.rows import AXES, COSTS, QUALITIES

if TYPE_CHECKING:
    from softmoe_cli.compare.drawing import Drawing
    from softmoe_cli.compare.question import Question


OPTIONS: dict[str, tuple[str, str]] = {
    "quality": ("KEY", f"what is better or worse: {', '.join(QUALITIES)}"),
    "cost": ("KEY", f"what it takes: {', '.join(COSTS)}"),
    "by": ("KEY,KEY", "put runs together that agree in these keys, instead of in everything but the seed"),
    "where": ("KEY=VALUE,VALUE", "only runs that have this; may be given several times"),
    "columns": ("KEY,KEY", "other columns: figures, or any key of a result"),
    "sort": ("KEY", "label, a figure or any key; without it the best quality comes first"),
    "baseline": ("LABEL | KEY=VALUE", "what others are measured against; without it the dense control"),
    "margin": ("AMOUNT", "a difference, in the unit of the quality, below which groups are equal; choose it before"),
    "any-time": ("", "verdicts that hold however often one looks; also where seeds were added after a look"),
    "to-quality": ("baseline | VALUE", "how much cheaper a group reaches the baseline's quality, or this one"),
    "at": ("AXIS=BUDGET,BUDGET", f"quality at equal {', '.join(AXES)}; AXIS alone chooses budgets that all runs reach"),
    "with-source": ("", "count what a finetuned run's checkpoint had cost into its training FLOPs, everywhere"),
    "map": (
        "KEY=COLUMN*FACTOR",
        "of runs that other programs made: what is quality, cost, seed; with commas between",
    ),
    "path": ("PATTERN", "what the end of their path says, such as {model}/seed{seed}"),
    "strict": ("", "keep runs of different commits and versions apart"),
    "reference": ("NAME | FILE.csv", "lay the paper's tables (pareto, long_runs) or a CSV beside ours"),
    "out": ("FOLDER", "where the files go; without it compare/ in the first folder"),
    "wandb": ("", "send table, figures and files to Weights & Biases as a run of the study's group"),
    "project": ("NAME", "with --wandb: its project; without it softmoe"),
}
PAPER = Path(__file__).resolve().parent / "paper"
"""The paper's own tables, which --reference knows by name."""
LISTS = ("by", "columns")
REPEATED = ("where", "at", "map")


class _Parser(argparse.ArgumentParser):
    def __init__(self, command: str) -> None:
        super().__init__(prog=f"softmoe {command}", add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help shows the options")


class _Kept(argparse.Action):
    """A value that nothing takes the place of: lists go on, anything else is said once."""

    def __call__(self, parser: object, namespace: argparse.Namespace, value: Any, option: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        if value == ():
            raise UsageError(f"{option} names nothing: write words with commas between")
        if isinstance(value, tuple):
            value = (before or ()) + value
        elif before is not None:
            raise UsageError(f"{option} {before} and {option} {value}: it takes one value; keep one of them")
        setattr(namespace, self.dest, value)


def compare_folders(arguments: Sequence[str]) -> int:
    """Compares, writes and prints.

    Raises:
        UsageError: an option, a folder or a key that cannot work.
    """
    chosen = _parse(arguments)
    from softmoe_cli.compare.drawing import drawing

    with drawing() as drawn:  # before numpy is imported
        return _compare(chosen, drawn)


def _compare(chosen: argparse.Namespace, drawn: "Drawing") -> int:
    from softmoe_cli.compare.blocks import compare
    from softmoe_cli.compare.flat import everything
    from softmoe_cli.compare.looks import record_look
    from softmoe_cli.compare.question import Question
    from softmoe_cli.compare.send import send, tracking_mode
    from softmoe_cli.compare.tables import terminal
    from softmoe_cli.compare.written import files_told, write_comparison

    fields = {f.name for f in dataclasses.fields(Question)}
    given = {key: value for key, value in vars(chosen).items() if key in fields and value is not None}
    question = Question(**given, typed=tuple(sorted(given)))
    reference = _reference(chosen.reference, question) if chosen.reference is not None else None
    mode = tracking_mode() if chosen.wandb else "off"
    comparison = compare(chosen.folders, question)
    if reference is not None:
        comparison.reference_name, comparison.reference = reference
    drawn.begin(comparison)
    first = chosen.folders[0]
    out = chosen.out or (first if first.is_dir() else first.parent) / "compare"
    files = write_comparison(comparison, out, drawn.files)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    shown = [run for group in comparison.groups for run in group.runs]
    unrecorded = record_look(shown, comparison.quality, comparison.margin)
    if programs.listen():
        programs.reply(everything(comparison) | {"folder": str(out), "files": files, "unrecorded": unrecorded})
    else:
        print("\n".join([terminal(comparison, width), *(f"- {each}" for each in unrecorded)]))
        print(f"\n{files_told(files, out, width)}")
    if mode != "off":
        send(comparison, question, files, out, mode, print, project=chosen.project)
    return 0


def no_study(command: str) -> str:
    """What to type, as a message for a command line that names no folder."""
    studies = [folder for folder in Path("outputs").glob("*") if any(folder.glob("*/result.json"))]
    if not studies:
        return f"softmoe {command} needs the folder of a study, and there is none with finished runs in outputs"
    newest = max(studies, key=lambda folder: folder.stat().st_mtime)
    count = f"the newest of {len(studies)} in outputs" if len(studies) > 1 else "the only one in outputs"
    return f"softmoe {command} needs the folder of a study, such as {newest} ({count}): softmoe {command} {newest}"


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    types: dict[str, Callable[[str], Any]] = {"out": Path, "margin": float, **dict.fromkeys(LISTS, listed)}
    chosen = parsed_options("compare", OPTIONS, types, REPEATED, arguments)
    if not chosen.folders:
        raise UsageError(no_study("compare"))
    if chosen.project is not None and not chosen.wandb:
        raise UsageError(f"--project {chosen.project} has no effect without --wandb")
    return chosen


def listed(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(filter(None, text.split(",")))


def parsed_options(
    command: str,
    options: Mapping[str, tuple[str, str]],
    types: Mapping[str, Callable[[str], Any]],
    repeated: Sequence[str],
    arguments: Sequence[str],
) -> argparse.Namespace:
    """The folders and options of a command that reads finished runs. An option without a value is a flag; one of
    `repeated` is a tuple and may be given several times, as a list may; the others are None where they are not given.

    Raises:
        UsageError: an option that does not exist or is given twice, or a value that its type does not take.
    """
    parser = _Parser(command)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    for name, (value, _) in options.items():
        extra: dict[str, Any] = {"action": _Kept} | ({"type": types[name]} if name in types else {})
        if not value:
            extra = {"action": "store_true"}
        elif name in repeated:
            extra = {"action": "append"}
        parser.add_argument(f"--{name}", **extra)
    chosen, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        known = [f"--{name}" for name in options]
        option = unknown[0].partition("=")[0]
        raise UsageError(f"{unknown[0]}: there is no such option.{nearest(option, known)} Options: {', '.join(known)}")
    for name in repeated:
        setattr(chosen, name, tuple(getattr(chosen, name) or ()))
    return chosen


def _reference(name: str, question: "Question") -> tuple[str, list[dict[str, str]]]:
    """The title of the table that --reference names, and its rows.

    Raises:
        UsageError: there is no such file, or its columns fit no plot.
    """
    from softmoe_cli.compare.styles import PUBLISHED

    names = {path.stem: path for path in PAPER.glob("*.csv")}
    path = names.get(name) or Path(name)
    if not path.is_file():
        raise UsageError(f"--reference {name}: no such file.{nearest(name, names)} Names: {', '.join(sorted(names))}")
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file, restval=""))
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"--reference {name} cannot be read: {error}") from error
    if not rows or None in rows[0]:
        raise UsageError(f"--reference {name} holds no rows under a head")
    ours = (question.cost, question.quality)
    axes = next((pair for pair in (ours, PUBLISHED) if set(pair) <= rows[0].keys()), None)
    if axes is None:
        raise UsageError(
            f"--reference {name} has neither the columns {' and '.join(ours)} nor {' and '.join(PUBLISHED)}"
        )
    from softmoe_cli.compare.styles import KINDS

    for number, row in enumerate(rows, 2):
        for key in axes:
            try:
                finite = math.isfinite(float(row[key] or 0))
            except ValueError:
                finite = False
            if not finite:
                raise UsageError(f"--reference {name}, line {number}: {key} '{row[key]}' is no number")
        if row.get("routing") and row["routing"] not in KINDS:
            kinds = ", ".join(KINDS)
            raise UsageError(f"--reference {name}, line {number}: routing {row['routing']} is not one of {kinds}")
    if not any(all(row[key] for key in axes) for row in rows):
        raise UsageError(f"--reference {name} has no row with both {' and '.join(axes)}")
    title = "Soft MoE (Puigcerver et al., 2023), " if path.parent == PAPER else ""
    table = {"pareto": "Table 9", "long_runs": "Table 8"}.get(path.stem, path.name) if title else path.name
    return title + table, rows
