"""Folders that are made from a checkpoint, whole or not at all, with a receipt of what they are made from."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError

from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.files import clear, require_vacant, sync, unused
from softmoe_cli.run.header import Source
from softmoe_cli.run.identity import made_from
from softmoe_cli.run.sealed import damage

RECEIPT = "receipt.json"
"""The name of a file in folders made from a checkpoint: it says from what they were made, how, and what came out."""


class Makes(Protocol):
    """The options that say where a command puts what it makes."""

    folder: str | None
    output_root: str


def folder_of(what: str, config: Makes, name: str, source: Source, settings: dict[str, Any]) -> Path:
    """Where a command puts the model `name` that it has made, `what` being what has happened to it (pruned)."""
    if config.folder is not None:
        return Path(config.folder)
    return Path(config.output_root) / what / f"{name.replace('/', '_')}-{made_from(source, settings)}"


def make_whole(folder: Path, fill: Callable[[Path], None]) -> None:
    """Makes a folder whole or not at all: `fill` first makes it under another name.

    Raises:
        RunError: the folder cannot be written, or somebody else has made it meanwhile.
    """
    temporary = unused(folder)
    try:
        fill(temporary)
        temporary.rename(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot write {folder}: {error}; choose another folder, or make room") from error
    finally:
        clear(temporary)


def already_made(
    folder: Path, source: Source, settings: dict[str, Any], *, clock: bool = False
) -> dict[str, Any] | None:
    """The receipt of a folder that was made before from the same source with the same settings; None where there is
    nothing yet. `clock`: latencies are asked for.

    Raises:
        UsageError: something else is there, or it was made without the latencies, or nothing can be made there.
    """
    made = {"settings": json.loads(json.dumps(settings)), "digest": source.digest}
    receipt: Any = None
    fault: str | None = None
    with suppress(OSError, ValueError, RecursionError):  # then the receipt is not ours
        if (folder / RECEIPT).is_file() and (fault := damage(folder, files=None)) is None:
            receipt = json.loads((folder / RECEIPT).read_text())
    if fault is not None:
        raise UsageError(f"folder={folder} exists and is damaged ({fault}); choose another name or remove it first")
    if isinstance(receipt, dict) and isinstance(receipt.get("source"), dict):
        found = {"settings": receipt.get("settings"), "digest": receipt["source"].get("digest")}
        if found == made:
            timed = receipt.get("of_each", {"": receipt}).values()  # of extract, each task is
            if clock and not all("clock" in each for each in timed):
                raise UsageError(f"clock=true: {folder} was made without it; name another folder=, or leave it out")
            return receipt
    require_vacant("folder", folder)
    return None
