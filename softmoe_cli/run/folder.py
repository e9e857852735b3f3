"""A run is a folder: its rows, its checkpoints, its result. What makes it this run is in run/identity.py.

outputs/<study>/<name>-<signature>/
  config.yaml      fully resolved
  metrics.jsonl    a row per event, on disk when it happens
  routing.jsonl    per-layer routing statistics, at evaluation
  checkpoints/     last-STEP (two of them) and best-STEP, each a folder with SHA256SUMS; in pieces (run/pieces.py) while
                   processes train that have divided the weights
  result.json      one flat row; written last and atomically: its existence means done
"""

import dataclasses
import json
import os
import platform
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from softmoe_cli.config import Config
from softmoe_cli.device import free_memory
from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.files import cannot_write, clear, not_following, sync, write_atomically
from softmoe_cli.parallel import ALONE, Crew
from softmoe_cli.run import pieces as run_pieces
from softmoe_cli.run import rows
from softmoe_cli.run.card import CARD_FORMAT, card_text
from softmoe_cli.run.checkpoint import (
    OURS,
    STATE,
    SUMS,
    TRAINING,
    WEIGHTS,
    between_names,
    copied_pieces,
    damage,
    numbered,
    own_pieces,
    room_beside,
    seal,
    sha256,
    write_checkpoint,
)
from softmoe_cli.run.lock import locked
from softmoe_cli.run.pieces import Piece

ROWS = ("metrics.jsonl", "routing.jsonl")


class Run:
    """A run's folder, held by one process at a time. If several processes train together, the first one writes; the
    others read, and write only their pieces of divided weights.

    Training does not wait for the disk: it goes on when a checkpoint is copied to memory, and a thread writes the copy.
    One is written at a time.
    """

    def __init__(self, folder: Path, crew: Crew = ALONE) -> None:
        self.folder = folder
        self._crew, self._writes = crew, crew.first
        self.checkpoints = folder / "checkpoints"
        self._lock: TextIO | None = None
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    @property
    def result(self) -> dict[str, Any] | None:
        """The flat row of a finished run, or None."""
        path = self.folder / "result.json"
        try:
            path.stat()
            return rows.row(path, rows.RESULT)
        except FileNotFoundError:
            return None
        except rows.Unreadable as error:
            raise UsageError(f"{path} {error}; remove it to run again") from error
        except OSError as error:
            raise UsageError(
                f"{self.folder} can be no run's folder: {error.strerror}; choose another output_root, study or name"
            ) from error

    def open(self, config: Config) -> None:
        """Makes the folder, locks it against a second process, and writes config.yaml."""
        if not self._writes:
            return
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
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
        write_atomically(self.folder / "config.yaml", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))

    def close(self) -> None:
        """Waits for the checkpoint that is being written, unlocks the folder, and empties the lock file for other
        machines."""
        self._writer.shutdown()
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

    def save(
        self,
        kind: str,
        step: int,
        weights: dict[str, Tensor],
        training: dict[str, Tensor],
        state: dict[str, Any],
        card: dict[str, Any],
        *,
        end: bool = False,
    ) -> None:
        """Copies `<kind>-<step>` and has it written, when the one before is on disk.

        `card` (the model's config and classes) travels inside the weights file, so that the file alone can be
        evaluated and finetuned. With `end` no checkpoint stays in pieces.

        Raises:
            RunError: weights that are not finite; or the one before could not be written.
        """
        divided = any(isinstance(value, DTensor) for value in weights.values())
        if not self._writes and not divided:
            return
        given = [own_pieces(weights, self._writes), own_pieces(training, self._writes)]
        finite = [piece.tensor.isfinite().all() for piece in given[0].values()]
        answers = torch.stack(finite).tolist() if finite else []
        broken = [key for key, fine in zip(given[0], answers, strict=True) if not fine]
        if broken:
            raise RunError(f"{broken[0]} is not finite at step {step:,}: not saved; the checkpoint before is good")
        self.wait_until_saved()
        state = {"format": CARD_FORMAT} | state | {"sizes": {file: self._size(file) for file in ROWS}}
        name, texts = f"{kind}-{step:08d}", {STATE: json.dumps(state)}
        tensors = [piece.tensor for pieces in given for piece in pieces.values()]
        beside = sum(tensor.nbytes for tensor in tensors if tensor.device.type == "cpu")  # a device's is not touched
        cpu = torch.device("cpu")  # count kept memory as taken first; give it back only if that decides
        copied = any(room_beside(beside, free_memory(cpu, trim=trim)) for trim in (False, True))
        if copied:
            given = [copied_pieces(pieces) for pieces in given]

        def write() -> None:
            if divided:
                self._write_pieces(name, given[0], given[1], texts, card, end=end)
            else:
                held = [{key: piece.tensor for key, piece in pieces.items()} for pieces in given]
                with self._taken(name) as folder:
                    write_checkpoint(folder, held[0], card, held[1], texts)

        if copied:
            self._writing = self._writer.submit(write)
        else:
            write()

    @property
    def idle(self) -> bool:
        """Whether no checkpoint is being written.

        Raises:
            RunError: the last one could not be.
        """
        if self._writing is not None and self._writing.done():
            self.wait_until_saved()
        return self._writing is None

    def wait_until_saved(self) -> None:
        """Waits until the last checkpoint is on disk.

        Raises:
            RunError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @contextmanager
    def _taken(self, name: str) -> Iterator[Path]:
        """A temporary name for a checkpoint, which gets its own name if all goes well inside; older ones are removed
        only then."""
        final, temporary = self.checkpoints / name, self.checkpoints / f".{name}"
        if self._writes:
            clear(temporary)
        try:
            yield temporary
            if not self._writes:
                return
            for file in ROWS:
                if (self.folder / file).exists():
                    sync(self.folder / file)  # the checkpoint vouches for these rows
            before = temporary.with_name(f"{temporary.name}-before")
            clear(before)
            if final.exists():
                final.rename(before)
            try:
                temporary.rename(final)
            except OSError:
                if before.exists():
                    before.rename(final)
                raise
            sync(self.checkpoints)
            clear(before)
        except (OSError, SafetensorError) as error:
            if self._writes:
                clear(temporary)
            raise self._unwritten(error) from error
        if name.startswith("last"):
            self._prune()

    def _write_pieces(
        self,
        name: str,
        weights: dict[str, Piece],
        training: dict[str, Piece],
        texts: dict[str, str],
        card: dict[str, Any],
        *,
        end: bool,
    ) -> None:
        """Each process its own pieces; the first, when all have done so, the rest."""
        crew, fault, sums = self._crew, "", {}
        with self._taken(name) as folder:
            crew.gather_aside(None)  # now there is nothing left of an earlier one
            try:
                folder.mkdir(exist_ok=True)
                for whole, pieces, text in ((WEIGHTS, weights, card_text(card)), (TRAINING, training, "")):
                    if pieces:
                        file = folder / run_pieces.file_of(whole, crew.rank, crew.size)
                        run_pieces.write_pieces(file, pieces, text)
                        sums[file.name] = sha256(file)
                        sync(file)
            except (OSError, SafetensorError) as error:
                fault = f"process {crew.rank}: {error}"
            everyones = crew.gather_aside((fault, sums))
            faults = [fault for fault, _ in everyones if fault]
            if faults:
                raise OSError(faults[0])
            if self._writes:
                for file_name, text in texts.items():
                    (folder / file_name).write_text(text)
                seal(folder, {file: digest for _, those in everyones for file, digest in those.items()})
        if end and self._writes:
            for path in self._found("last") + self._found("best"):
                self._join(path)

    def _join(self, path: Path) -> None:
        """Puts whole files in the place of pieces; until their checksums are there, the pieces count."""
        if f"  {WEIGHTS}\n" in (path / SUMS).read_text():
            return
        weights, card = run_pieces.whole_tensors(path / WEIGHTS)
        training = run_pieces.whole_tensors(path / TRAINING)[0] if run_pieces.piece_files(path / TRAINING) else {}
        pieces = [file for name in (WEIGHTS, TRAINING) for file in run_pieces.piece_files(path / name)]
        temporary = path.with_name(f".{path.name}")
        clear(temporary)
        try:
            write_checkpoint(temporary, weights, json.loads(card), training, {STATE: (path / STATE).read_text()})
            for name in (WEIGHTS, TRAINING) if training else (WEIGHTS,):
                (temporary / name).replace(path / name)
            sync(path)
            (temporary / SUMS).replace(path / SUMS)
            sync(path)
        except (OSError, SafetensorError) as error:
            raise self._unwritten(error) from error
        finally:
            clear(temporary)
        for file in pieces:
            file.unlink()

    def _unwritten(self, error: Exception) -> RunError:
        return RunError(
            f"cannot write a checkpoint to {self.checkpoints}: {error}; earlier checkpoints are untouched, "
            "so make room and type the same command to go on"
        )

    def _prune(self) -> None:
        """Keeps two `last` checkpoints and every `best` that these name."""
        if not self._writes:
            return
        lasts = self._found("last")
        keep = set(lasts[:2])
        for path in lasts[:2]:
            if damage(path, files=(STATE,)) is None:
                with suppress(ValueError, TypeError, KeyError, RecursionError):  # a foreign state names none
                    keep.add(self.checkpoints / f"best-{json.loads((path / STATE).read_text())['best_step']:08d}")
        for path in self.checkpoints.iterdir():
            if path not in keep and OURS.fullmatch(path.name) and path.is_dir():
                clear(path)

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest undamaged checkpoint, whose pieces are joined now, and a sentence for each damaged one that was
        passed over."""
        notes: list[str] = []
        for before, final in between_names(self.checkpoints):
            before.rename(final)
        for path in self._found("last"):
            fault = damage(path)
            if fault is None:
                self._join(path)
                return path, notes
            aside = path.with_name(f"damaged-{path.name}")
            clear(aside)
            path.rename(aside)
            notes.append(
                f"{path} is damaged ({fault}) and now called {aside.name}; going back to the checkpoint before"
            )
        if notes:
            notes.append("no undamaged checkpoint is left: starting afresh")
        return None, notes

    def rewind(self, sizes: dict[str, int]) -> None:
        """Cuts the files of rows back to the sizes that a checkpoint names; later rows will be written again."""
        if not self._writes:
            return
        for file in ROWS:
            path, size = self.folder / file, sizes.get(file, 0)
            if self._size(file) < size:
                raise RunError(f"{path} is shorter than its checkpoint says; restore it or remove {self.folder}")
            if path.exists():
                with open(path, "r+", opener=not_following) as written:
                    written.truncate(size)

    def finish(self, row: dict[str, Any]) -> None:
        """Writes result.json, which also records what metrics.jsonl is by now."""
        if self._writes:
            whole = {"format": rows.FORMAT} | row | rows.metrics_digest((self.folder / "metrics.jsonl").read_bytes())
            write_atomically(self.folder / "result.json", json.dumps(whole, indent=1, allow_nan=False) + "\n")

    def _size(self, file: str) -> int:
        path = self.folder / file
        return path.stat().st_size if path.exists() else 0

    def _found(self, kind: str) -> list[Path]:
        """Checkpoints of a kind, newest first."""
        return numbered(self.checkpoints, kind)
