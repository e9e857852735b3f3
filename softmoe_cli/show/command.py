"""`softmoe show`: a run's page and its pictures."""

import copy
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from softmoe_cli import programs
from softmoe_cli.compare.written import PAGE, files_told, is_marked, write_files
from softmoe_cli.config.commands import ShowConfig
from softmoe_cli.errors import UsageError
from softmoe_cli.options import inherit
from softmoe_cli.options.compose import compose, door, names, overlay, plain
from softmoe_cli.run.sealed import checkpoints_in
from softmoe_cli.show.made import is_made, read_made
from softmoe_cli.show.page import SHOWN_MARK, Shown, run_page, state_told
from softmoe_cli.show.record import Record, read_record
from softmoe_cli.text import printable

FLAGS_OF_SHOW = {"--follow": "follow=true", "--wandb": "wandb=true"}
CHART_TITLES = {
    "curves.png": "curves", "routing.png": "routing statistics", "calibration.png": "calibration",
    "confusion.png": "confusion",
}  # fmt: skip

OF_SHEETS = re.compile(r"(worst|(routing|likes|classes|training)-block-\d+(-\w+)?)\.png")


def spelt_out(arguments: Sequence[str]) -> list[str]:
    """The words of `softmoe show` as Hydra takes them: `RUN` is `run=RUN`, `--follow` is `follow=true`.

    Raises:
        UsageError: several runs.
    """
    runs = [word for word in arguments if _is_run(word)]
    if len(runs) > 1:
        raise UsageError(f"softmoe show takes one run, got {' '.join(runs)}; softmoe compare takes many")
    return [f"run={_quoted(word)}" if word in runs else FLAGS_OF_SHOW.get(word, word) for word in arguments]


def _is_run(word: str) -> bool:
    return not word.startswith("-") and ("=" not in word or os.path.isdir(word))


def _quoted(word: str) -> str:
    """A path that Hydra takes as it is, whatever is in it."""
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def show_as_typed(composed: Any, typed: list[str]) -> int:
    """`softmoe show`, from what Hydra composed and the words that were typed."""
    tree = plain(composed, ShowConfig)
    if tree["run"] == "???":
        raise UsageError("softmoe show needs the folder of a run: softmoe show outputs/STUDY/RUN")
    config = _checked(tree)
    for key in ("port", "every_s"):
        if names(key, typed) and not config.follow:
            raise UsageError(f"{key}={tree[key]:g} has no effect without --follow; add it, or leave {key} out")
    record = read_made(Path(config.run)) if is_made(Path(config.run)) else read_record(Path(config.run))
    if config.follow and record.receipt is not None:
        raise UsageError(f"follow=true: {config.run} was made from a checkpoint and does not train; leave --follow out")
    if config.follow:
        _follow(config, tree, typed)
        return 0
    from softmoe_cli.show.send import mode_of_sending, send_pictures

    mode = mode_of_sending() if config.wandb else "off"
    shown = what_is_shown(tree, record, typed)
    out = Path(config.folder) if config.folder is not None else record.folder / "show"
    drawn = pictures(record, shown)
    files = write_pictures(run_page(record, shown), drawn, out)
    if config.format == "json":
        programs.reply(_row(record, shown, out, list(drawn)))
    else:
        print(f"{state_told(record)}\n{shown.of}\n{files_told(files, out, None)}")
    if mode != "off":
        titles = {name: CHART_TITLES[name] for name in drawn if name in CHART_TITLES}
        titles |= {f"{sheet.name}.png": sheet.title for sheets in shown.sheets.values() for sheet in sheets}
        send_pictures(record, titles, PAGE, out, mode, print)
    return 0


def write_pictures(page: str, drawn: Mapping[str, bytes], out: Path) -> list[str]:
    """Writes the page and its pictures, and returns their names. Pictures of an earlier look that this one has not made
    are removed: they would be taken for its own.

    Raises:
        UsageError: see `write_files`.
    """
    try:
        earlier = list(out.glob("*.png")) if is_marked(out, SHOWN_MARK) else []
    except (OSError, ValueError):
        earlier = []  # `write_files` says why
    files = write_files({PAGE: page.encode(), **drawn}, out, SHOWN_MARK, key="folder")
    for path in earlier:
        known = path.name in CHART_TITLES or OF_SHEETS.fullmatch(path.name)
        if known and path.name not in files and path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)
    return files


def _checked(tree: dict[str, Any]) -> ShowConfig:
    """The options, checked before any work is done for them. Whether the data go with a checkpoint is not known yet.

    Raises:
        UsageError: one of them cannot be.
    """
    usual = dataclasses.asdict(compose().data)
    named = tree["data"] if inherit.names_data(tree["data"]) else {}
    return door(copy.deepcopy(tree) | {"data": overlay(usual, named)}, ShowConfig)


def _row(record: Record, shown: Shown, out: Path, drawn: list[str]) -> dict[str, Any]:
    """What is printed as JSON."""
    said = shown.said
    return {
        "run": str(record.folder), "state": record.state.state, "page": str(out / PAGE),
        "pictures": [str(out / name) for name in drawn], "seen": shown.of,
        "images": len(said.label) if said is not None else None,
        "top1_pct": said.top1_pct if said is not None else None,
        "layers": shown.layers, "notes": [*record.notes, *shown.notes],
    }  # fmt: skip


def what_is_shown(tree: dict[str, Any], record: Record, typed: list[str]) -> Shown:
    """What the newest checkpoint does with the images; a sentence where there is none."""
    try:
        checkpoints_in(record.folder)
    except UsageError as error:
        if tree["image"] is not None:
            raise UsageError(f"image={tree['image']}: the run has no checkpoint that could look at it") from error
        return Shown("The run has no checkpoint, so that no image could be looked at.")
    from softmoe_cli.show.model_look import shown_of, subject_of

    source = inherit.named_source(str(record.folder), tree["base"])
    return shown_of(subject_of(tree, source, typed), source, record.folder)


def _follow(config: ShowConfig, tree: dict[str, Any], typed: list[str]) -> None:
    """Serves the page while the run goes on."""
    from softmoe_cli.show.follow import follow

    def age_s() -> float | None:
        return read_record(Path(config.run)).state.age_s

    say = functools.partial(print, flush=True)  # whoever reads it from a file needs the address now
    make = pages_of(Path(config.run), tree, typed, config.every_s)
    follow(make, config.port, config.every_s, say, age_s=age_s)


def pages_of(folder: Path, tree: dict[str, Any], typed: list[str], every_s: float) -> Callable[[bool], tuple[str, str]]:
    """What makes the page of a run that goes on, and says its state. Images are looked at again when there is a new
    checkpoint; where that cannot be, as of one that has gone since it was found, the last look stays, and is tried
    again the next time."""
    seen: dict[str, Shown] = {}

    def make(goes_on: bool) -> tuple[str, str]:
        record = read_record(folder)
        newest = max((str(path) for path in record.folder.glob("checkpoints/last-*/SHA256SUMS")), default="")
        if newest in seen:
            shown = seen[newest]
        else:
            try:
                shown = what_is_shown(copy.deepcopy(tree), record, typed)  # which it changes
            except UsageError as error:
                if not seen:
                    raise
                (last,) = seen.values()
                told = f"The newest checkpoint could not be looked at: {printable(str(error))}"
                shown = dataclasses.replace(last, notes=[*last.notes, told])
            else:
                seen.clear()
                seen[newest] = shown
        return run_page(record, shown, refresh_s=every_s if goes_on else None), record.state.state

    return make


def pictures(record: Record, shown: Shown) -> dict[str, bytes]:
    """Every picture as a file: name to content."""
    from softmoe_cli.show.charts import chart_files
    from softmoe_cli.show.paint import sheet_png

    sheets = [sheet for each in shown.sheets.values() for sheet in each]
    return chart_files(record, shown.said, shown.classes) | {f"{sheet.name}.png": sheet_png(sheet) for sheet in sheets}
