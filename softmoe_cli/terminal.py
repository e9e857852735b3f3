"""What a run says: a header, progress, a line per evaluation, a closing table. Plain lines when not a terminal."""

import textwrap
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from softmoe_cli.run.rows import of_tasks
from softmoe_cli.signals import nobody_listens
from softmoe_cli.text import flop, in_words, printable_lines

PROGRESS_PERIOD_S = 0.2
INDENT = 19
"""Columns before the value of a row."""


class Listened(Console):
    """Text as it is, with no markup of emoji. `unread`: the reader of our output is gone, and so
    nothing is printed any more."""

    unread = False

    def on_broken_pipe(self) -> None:
        """Called by rich, which would otherwise end the process."""
        self.quiet = self.unread = True
        nobody_listens()


class Screen:
    """Standard output during one run; errors go to standard error elsewhere. A quiet one says nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Listened(highlight=False, soft_wrap=True, emoji=False, quiet=quiet)
        self._progress = Progress(
            TextColumn("{task.percentage:3.0f}%"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TextColumn("eta"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self._task = self._progress.add_task("first step", total=1.0)
        self._next = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self.console.print(Text(printable_lines(text)))

    def sentence(self, text: str) -> None:
        """What has no command in it that is to be copied: on a terminal wrapped between words."""
        self.say("\n".join(self._wrapped(text, self.console.width)))

    def _wrapped(self, text: str, room: int) -> list[str]:
        if not self.console.is_terminal:
            return [text]
        return textwrap.wrap(text, max(20, room), break_long_words=False, break_on_hyphens=False) or [""]

    def table(self, title: str, rows: dict[str, str]) -> None:
        """A table with a row for each word: on a terminal wrapped between words, in a file one line each."""
        self.console.print(Text(title, "bold"))
        for key, value in rows.items():
            self.row(key, value)

    def row(self, key: str, value: str) -> None:
        lines = self._wrapped(printable_lines(value), self.console.width - INDENT)
        self.console.print(Text.assemble("  ", (f"{key:<{INDENT - 2}}", "bold"), f"\n{' ' * INDENT}".join(lines)))

    def step(self, done: float, loss: float, lr: float, images_per_s: float) -> None:
        """Moves the progress bar to the share `done`; cheap enough for every step."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + PROGRESS_PERIOD_S
        self._progress.update(
            self._task,
            completed=done,
            description=f"loss {loss:.4f}  lr {lr:.2e}  {images_per_s:,.0f} images/s",
        )

    def evaluation(self, row: dict[str, Any], note: str = "") -> None:
        """A line per evaluation; a narrow terminal goes without the epoch, then without what it has cost."""
        by_task = ", ".join(f"{name} {figure:.2f}%" for name, figure in of_tasks(row, "top1_pct").items())
        parts = [
            f"{row['split']:<10}", f"step {row['step']:>7,}", f"epoch {row['epoch']:7.2f}", f"loss {row['loss']:.4f}",
            f"top-1 {row['top1_pct']:6.2f}%", by_task, flop(1e15 * row["train_pflop"]), in_words(row["device_s"]), note,
        ]  # fmt: skip
        lines = ["  ".join(filter(None, parts))]
        for left_out in (2, 6, 7):
            if self.console.is_terminal and len(lines[0]) > self.console.width:
                parts[left_out] = ""
                lines = ["  ".join(filter(None, parts))]
        if len(lines[0]) > self.console.width:  # a figure for each of many tasks
            lines = self._wrapped(lines[0], self.console.width - 12)
        self.say(f"\n{' ' * 12}".join(lines))
