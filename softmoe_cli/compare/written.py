"""The files of a comparison, and where they are."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from softmoe_cli.errors import UsageError
from softmoe_cli.files import require_vacant, write_atomically

if TYPE_CHECKING:
    from softmoe_cli.compare.groups import Comparison

PAGE = "index.html"


def files_told(files: Sequence[str], out: Path, width: int | None) -> str:
    """Which file to open, and what lies beside it."""
    from softmoe_cli.text import printable

    forms: dict[str, list[str]] = {}
    for name in files:
        stem, _, form = name.rpartition(".")
        forms.setdefault(stem, []).append(form)
    beside = [f"{stem}.{'|'.join(found)}" for stem, found in forms.items() if f"{stem}.{found[0]}" != PAGE]
    others = f"beside it: {', '.join(beside)}"
    return f"open {printable(str(out / PAGE))}\n{others if width is None else textwrap.fill(others, width)}"


def write_comparison(
    comparison: "Comparison", out: Path, drawn: Callable[[], dict[str, bytes]] | None = None
) -> list[str]:
    """Writes every file into `out` and returns their names. `drawn` hands over figures that are drawn beside this.

    Raises:
        UsageError: the folder cannot be written, or holds files of these names that are not ours.
    """
    from softmoe_cli.compare.drawing import figures
    from softmoe_cli.compare.flat import comma_separated, json_text
    from softmoe_cli.compare.page import PAGE_MARK, page
    from softmoe_cli.compare.tables import latex, markdown

    texts = {
        "table.md": markdown(comparison),
        "table.tex": latex(comparison),
        "table.csv": comma_separated(comparison),
        "table.json": json_text(comparison),
    }
    pictures = figures(comparison) if drawn is None else drawn()
    texts = {PAGE: page(comparison, pictures, out)} | texts  # written first: it marks the folder as ours
    files = {name: text.encode() for name, text in texts.items()} | pictures
    return write_files(files, out, PAGE_MARK)


def is_marked(out: Path, mark: bytes) -> bool:
    """Whether a folder's PAGE has the `mark` of a command, so that its files are the command's. Raises OSError."""
    return (out / PAGE).is_file() and mark in (out / PAGE).read_bytes()


def write_files(files: Mapping[str, bytes], out: Path, mark: bytes, *, key: str = "--out") -> list[str]:
    """Writes a command's files into `out`, PAGE the first of them, and returns their names. A folder whose PAGE has
    the command's `mark` is written over; `key` is the option that named it.

    Raises:
        UsageError: the folder cannot be written, or holds files of these names that are not the command's.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        ours = is_marked(out, mark)
    except (OSError, ValueError) as error:
        raise UsageError(f"{key} {out} cannot be written: {error}; choose another folder") from error
    for name in files:
        if not ours:
            require_vacant(key, out / name)
    for name, content in files.items():
        write_atomically(out / name, content)
    return list(files)
