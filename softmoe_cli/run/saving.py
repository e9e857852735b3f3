"""The checkpoints of a run: saved while training goes on, joined, pruned and found again. What one of them holds is in
run/checkpoint.py."""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from softmoe_cli.device import free_memory
from softmoe_cli.errors import RunError
from softmoe_cli.files import clear, file_bytes, sync
from softmoe_cli.parallel import Crew, is_part
from softmoe_cli.run import pieces as run_pieces
from softmoe_cli.run.card import CARD_FORMAT, card_text
from softmoe_cli.run.checkpoint import write_checkpoint
from softmoe_cli.run.pieces import Piece
from softmoe_cli.run.sealed import (
    OURS,
    STATE,
    SUMS,
    TRAINING,
    WEIGHTS,
    between_names,
    damage,
    file_of,
    numbered,
    piece_files,
    seal,
    sha256,
)


class Checkpoints:
    """The folder of a run's checkpoints. If several processes train together, the first one writes; the others read,
    and write only their pieces of divided weights.

    Training does not wait for the disk: it goes on when a checkpoint is copied to memory, and a thread writes the copy.
    One is written at a time.

    Args:
        rows: the run's files of rows, as long as which a checkpoint says that they are.
    """

    def __init__(self, folder: Path, rows: list[Path], crew: Crew) -> None:
        self.folder = folder
        self._rows, self._crew, self._writes = rows, crew, crew.first
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

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
        divided = any(is_part(value) for value in weights.values())
        if not self._writes and not divided:
            return
        given = [_own_pieces(weights, self._writes), _own_pieces(training, self._writes)]
        finite = [piece.tensor.isfinite().all() for piece in given[0].values()]
        answers = torch.stack(finite).tolist() if finite else []
        broken = [key for key, fine in zip(given[0], answers, strict=True) if not fine]
        if broken:
            raise RunError(f"{broken[0]} is not finite at step {step:,}: not saved; the checkpoint before is good")
        self.wait()
        state = {"format": CARD_FORMAT} | state | {"sizes": {file.name: file_bytes(file) for file in self._rows}}
        name, texts = f"{kind}-{step:08d}", {STATE: json.dumps(state)}
        tensors = [piece.tensor for pieces in given for piece in pieces.values()]
        beside = sum(tensor.nbytes for tensor in tensors if tensor.device.type == "cpu")  # a device's is not touched
        cpu = torch.device("cpu")  # count kept memory as taken first; give it back only if that decides
        copied = any(room_beside(beside, free_memory(cpu, trim=trim)) for trim in (False, True))
        if copied:
            given = [_copied_pieces(pieces) for pieces in given]

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
            self.wait()
        return self._writing is None

    def wait(self) -> None:
        """Waits until the last checkpoint is on disk.

        Raises:
            RunError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest undamaged checkpoint, whose pieces are joined now, and a sentence for each damaged one that was
        passed over."""
        notes: list[str] = []
        for before, final in between_names(self.folder):
            before.rename(final)
        for path in numbered(self.folder, "last"):
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

    def close(self) -> None:
        """Waits for the checkpoint that is being written; none can be saved after that."""
        self._writer.shutdown()

    @contextmanager
    def _taken(self, name: str) -> Iterator[Path]:
        """A temporary name for a checkpoint, which gets its own name if all goes well inside; older ones are removed
        only then."""
        final, temporary = self.folder / name, self.folder / f".{name}"
        if self._writes:
            clear(temporary)
        try:
            yield temporary
            if not self._writes:
                return
            for file in self._rows:
                if file.exists():
                    sync(file)  # the checkpoint vouches for these rows
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
            sync(self.folder)
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
                        file = folder / file_of(whole, crew.rank, crew.size)
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
            for path in numbered(self.folder, "last") + numbered(self.folder, "best"):
                self._join(path)

    def _join(self, path: Path) -> None:
        """Puts whole files in the place of pieces; until their checksums are there, the pieces count."""
        if f"  {WEIGHTS}\n" in (path / SUMS).read_text():
            return
        weights, card = run_pieces.whole_tensors(path / WEIGHTS)
        training = run_pieces.whole_tensors(path / TRAINING)[0] if piece_files(path / TRAINING) else {}
        pieces = [file for name in (WEIGHTS, TRAINING) for file in piece_files(path / name)]
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
            f"cannot write a checkpoint to {self.folder}: {error}; earlier checkpoints are untouched, "
            "so make room and type the same command to go on"
        )

    def _prune(self) -> None:
        """Keeps two `last` checkpoints and every `best` that these name."""
        if not self._writes:
            return
        lasts = numbered(self.folder, "last")
        keep = set(lasts[:2])
        for path in lasts[:2]:
            if damage(path, files=(STATE,)) is None:
                with suppress(ValueError, TypeError, KeyError, RecursionError):  # a foreign state names none
                    keep.add(self.folder / f"best-{json.loads((path / STATE).read_text())['best_step']:08d}")
        for path in self.folder.iterdir():
            if path not in keep and OURS.fullmatch(path.name) and path.is_dir():
                clear(path)


def room_beside(copy: int, free: int) -> bool:
    """Whether a copy of so many bytes of a CPU's memory leaves training enough of what is free."""
    return 4 * copy <= free


def _own_pieces(tensors: dict[str, Tensor], first: bool) -> dict[str, Piece]:
    """The pieces of the tensors that this process writes."""
    by_key = {key: run_pieces.own(value, first=first) for key, value in tensors.items()}
    return {key: piece for key, piece in by_key.items() if piece is not None}


def _copied_pieces(own: dict[str, Piece]) -> dict[str, Piece]:
    """Copies this process's pieces to memory that nobody writes to; from CUDA through pinned memory, all at once."""
    copies: dict[str, Piece] = {}
    for key, piece in own.items():
        value = piece.tensor
        copy = value.to("cpu", copy=True, non_blocking=value.is_cuda, memory_format=torch.contiguous_format)
        copies[key] = piece._replace(tensor=copy)
    if any(piece.tensor.is_cuda for piece in own.values()):
        torch.cuda.synchronize()
    return copies
