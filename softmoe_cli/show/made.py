"""What a folder says of itself that was made from a checkpoint: by prune, extract, upcycle or export."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softmoe_cli.compare.tables import Table
from softmoe_cli.errors import UsageError
from softmoe_cli.run import rows
from softmoe_cli.run.receipt import RECEIPT
from softmoe_cli.run.sealed import WEIGHTS
from softmoe_cli.run.status import State
from softmoe_cli.show.record import Record, flattened
from softmoe_cli.text import four_digits, printable, shortened

UNTOLD = ("keys", "settings.data", "settings.model")
"""Parts of a receipt that are no finding: where each weight is from, and what the checkpoint says by itself."""


def is_made(folder: Path) -> bool:
    """Whether it is a folder with weights and a receipt, and no run."""
    return (folder / WEIGHTS).is_file() and (folder / RECEIPT).is_file() and not (folder / "config.yaml").exists()


def read_made(folder: Path) -> Record:
    """What the receipt says, as a record without rows.

    Raises:
        UsageError: the receipt cannot be read.
    """
    try:
        receipt = rows.parsed(rows.contents(folder / RECEIPT))
    except rows.Unreadable as error:
        raise UsageError(f"run={folder}: {RECEIPT} {error}") from error
    if not isinstance(receipt, dict) or not isinstance(receipt.get("source"), dict):
        raise UsageError(f"run={folder}: {RECEIPT} does not say what the folder was made from")
    state = State(folder.resolve().name, "made", None, None, None, None, None, str(folder))
    return Record(folder, state, None, [], [], {}, [], receipt)


def made_told(record: Record) -> str:
    """One sentence: what it is and what it was made from."""
    assert record.receipt is not None
    return f"{record.name}: made from {printable(str(record.receipt['source'].get('checkpoint')))}."


def receipt_tables(receipt: Mapping[str, Any]) -> list[Table]:
    """What changed from before to after, and all else that the receipt says."""
    said = {
        key: value
        for key, value in flattened(receipt).items()
        if value is not None and not key.endswith("digest") and not f"{key}.".startswith(tuple(f"{k}." for k in UNTOLD))
    }
    pairs = [(key, key.replace("before", "after")) for key in said if "before" in key.replace("_", ".").split(".")]
    both = [(before, after) for before, after in pairs if after in said]
    changed = [[_word(before), _cell(said[before]), _cell(said[after])] for before, after in both]
    left = [[key, _cell(value)] for key, value in said.items() if key not in {key for pair in both for key in pair}]
    tables = [Table("Before and after", "", ["", "before", "after"], changed)] if changed else []
    return [*tables, Table("Receipt", "", ["key", "value"], left)]


def _word(key: str) -> str:
    return key.replace(".before", "").replace("_before", "").replace("before.", "")


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return shortened(printable(str(value).lower() if isinstance(value, bool) else str(value)), 200)
    return f"{value:,}" if isinstance(value, int) else four_digits(value)
