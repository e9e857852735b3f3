"""`softmoe show`: a run's page and its pictures."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softmoe_cli.compare.written import PAGE, write_files
from softmoe_cli.config.commands import ShowConfig
from softmoe_cli.errors import UsageError
from softmoe_cli.options.compose import plain
from softmoe_cli.show.page import SHOWN_MARK, Shown, headline, run_page
from softmoe_cli.show.record import Record, read_record

FLAGS_OF_SHOW = {"--follow": "follow=true", "--json": "format=json", "--wandb": "wandb=true"}


def spelt_out(arguments: Sequence[str]) -> list[str]:
    """The words of `softmoe show` as Hydra takes them: `RUN` is `run=RUN`, `--follow` is `follow=true`.

    Raises:
        UsageError: several runs.
    """
    runs = [word for word in arguments if _is_run(word)]
    if len(runs) > 1:
        raise UsageError(f"softmoe show takes one run, got {' '.join(runs)}; softmoe compare takes many")
    return [f"run={_quoted(word)}" if _is_run(word) else FLAGS_OF_SHOW.get(word, word) for word in arguments]


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
    record = read_record(Path(tree["run"]))
    shown = what_is_shown(tree, record, typed)
    out = Path(tree["folder"]) if tree["folder"] is not None else record.folder / "show"
    files = {PAGE: run_page(record, shown).encode()} | pictures(record, shown)
    write_files(files, out, SHOWN_MARK, key="folder")
    told = {"run": str(record.folder), "state": record.state.state, "page": str(out / PAGE),
            "pictures": [name for name in files if name != PAGE]}  # fmt: skip
    if tree["format"] == "json":
        print(json.dumps(told))
    else:
        print(f"{headline(record)}\n{shown.of}")
        print(f"open {out / PAGE}\nbeside it: {', '.join(told['pictures'])}")
    return 0


def what_is_shown(tree: dict[str, Any], record: Record, typed: list[str]) -> Shown:
    """What the newest checkpoint does with the images; a sentence where there is none."""
    from softmoe_cli.run.sealed import checkpoints_in

    try:
        checkpoints_in(record.folder)
    except UsageError:
        return Shown("There is no checkpoint yet, so that no image can be looked at.")
    from softmoe_cli.options import inherit
    from softmoe_cli.show.model_look import shown_of, subject_of

    source = inherit.named_source(str(record.folder), tree["base"])
    return shown_of(subject_of(tree, source, typed), source)


def pictures(record: Record, shown: Shown) -> dict[str, bytes]:
    """Every picture as a file: name to content."""
    from softmoe_cli.show.charts import chart_files
    from softmoe_cli.show.paint import sheet_png

    sheets = [sheet for each in shown.sheets.values() for sheet in each]
    return chart_files(record, shown.said, shown.classes) | {f"{sheet.name}.png": sheet_png(sheet) for sheet in sheets}
