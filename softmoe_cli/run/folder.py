"""A run is a folder: its configuration, rows and result, and one process at a time that writes them. Its checkpoints
are in run/saving.py; what makes it this run is in run/identity.py.

outputs/<study>/<name>-<signature>/
  config.yaml      fully resolved
  metrics.jsonl    a row per event, on disk when it happens
  routing.jsonl    per-layer routing statistics, at evaluation
  checkpoints/     last-STEP (two of them) and best-STEP, each a folder with SHA256SUMS; in pieces (run/pieces.py) while
                   processes train that have divided the weights
  result.json      one flat row; written last and atomically: its existence means done
  failed.json      why it broke off; gone when it goes on
"""

import contextlib
import dataclasses
import json
import os
import platform
from pathlib import Path
from typing import Any, TextIO

import yaml

from softmoe_cli.config.run import Config
from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.files import cannot_write, file_bytes, not_following, write_atomically
from softmoe_cli.parallel import ALONE, Crew
from softmoe_cli.run import rows
from softmoe_cli.run.lock import locked
from softmoe_cli.run.saving import Checkpoints

ROWS = ("metrics.jsonl", "routing.jsonl")


class Run:
    """A run's folder, held by one process at a time. If several processes train together, the first one writes; the
    others read."""

    def __init__(self, folder: Path, crew: Crew = ALONE) -> None:
        self.folder = folder
        self.checkpoints = Checkpoints(folder / "checkpoints", [folder / file for file in ROWS], crew)
        self._writes = crew.first
        self._lock: TextIO | None = None

    def open(self, config: Config) -> None:
        """Makes the folder, locks it against a second process, and writes config.yaml unless the run is finished."""
        if not self._writes:
            return
        try:
            self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
            held = not_following(str(self.folder / ".lock"), os.O_RDWR | os.O_CREAT | os.O_APPEND)
            self._lock = os.fdopen(held, "a+")
        except OSError as error:
            raise UsageError(
                f"cannot write to output_root={config.output_root}: {error.strerror}: {error.filename}; "
                "choose another output_root"
            ) from error
        if not locked(self._lock):
            self._lock.close()
            self._lock = None
            raise UsageError(f"{self.folder} is in use by another process that runs the same configuration")
        try:
            self._lock.truncate(0)
            # Names machine and process for readers on other machines; unbuffered, or closing would write the name
            # again.
            os.write(self._lock.fileno(), f"{platform.node()} {os.getpid()}".encode())
        except OSError as error:
            raise cannot_write(self.folder / ".lock", error) from error
        if (self.folder / "result.json").exists():
            return
        (self.folder / rows.FAILED_FILE).unlink(missing_ok=True)
        write_atomically(self.folder / "config.yaml", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))

    def close(self) -> None:
        """Waits for the checkpoint that is being written, unlocks the folder, and empties the lock file for other
        machines."""
        self.checkpoints.close()
        if self._lock is not None:
            self._lock.truncate(0)
            self._lock.close()

    def append(self, file: str, row: dict[str, Any]) -> None:
        """One row, in the file when this returns."""
        if not self._writes:
            return
        path = self.folder / file
        try:
            with open(path, "a", opener=not_following) as out:
                out.write(json.dumps({"format": rows.FORMAT} | row, allow_nan=False) + "\n")
        except OSError as error:
            raise cannot_write(path, error) from error

    def rows(self, file: str) -> list[dict[str, Any]]:
        path = self.folder / file
        try:
            return rows.lines(path, rows.FORMAT_KEY)
        except FileNotFoundError:
            return []
        except rows.Unreadable as error:
            raise UsageError(f"{path} {error}; restore it, or remove {self.folder} to run again") from error

    def rewind(self, sizes: dict[str, int]) -> None:
        """Cuts the files of rows back to the sizes that a checkpoint names; later rows will be written again."""
        if not self._writes:
            return
        for file in ROWS:
            path, length = self.folder / file, sizes.get(file, 0)
            if file_bytes(path) < length:
                raise RunError(f"{path} is shorter than its checkpoint says; restore it or remove {self.folder}")
            if path.exists():
                with open(path, "r+", opener=not_following) as written:
                    written.truncate(length)

    def fail(self, reason: str) -> None:
        """Writes down why the run broke off, if that can be written: the reason itself is told anyhow."""
        if self._writes:
            with contextlib.suppress(RunError):
                write_atomically(self.folder / rows.FAILED_FILE, json.dumps({"reason": reason}) + "\n")

    def finish(self, row: dict[str, Any]) -> None:
        """Writes result.json, which also records what metrics.jsonl is by now."""
        if self._writes:
            whole = {"format": rows.FORMAT} | row | rows.metrics_digest((self.folder / "metrics.jsonl").read_bytes())
            write_atomically(self.folder / "result.json", json.dumps(whole, indent=1, allow_nan=False) + "\n")
