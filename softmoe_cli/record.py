"""A run is a folder: its identity, its rows, its checkpoints, its result.

outputs/<study>/<name>-<signature>/
  config.yaml      fully resolved
  metrics.jsonl    a row per event, on disk when it happens
  routing.jsonl    per-layer routing statistics, at evaluation
  checkpoints/     last-STEP (two of them) and best-STEP, each a folder with SHA256SUMS; in pieces (shards.py) while
                   processes train that have divided the weights
  result.json      one flat row; written last and atomically: its existence means done
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from softmoe_cli import rows, shards
from softmoe_cli.card import FORMAT, other_format, read_card
from softmoe_cli.config import NOT_SCIENCE, Config
from softmoe_cli.device import free_memory
from softmoe_cli.errors import RunError as RunError
from softmoe_cli.errors import UsageError
from softmoe_cli.files import cannot_write, clear, not_following, require_vacant, sync, unused
from softmoe_cli.files import write_atomically as write_atomically
from softmoe_cli.parallel import ALONE, Crew
from softmoe_cli.shards import Piece

WEIGHTS, TRAINING, STATE, SUMS = "model.safetensors", "training.safetensors", "state.json", "SHA256SUMS"
ROWS = ("metrics.jsonl", "routing.jsonl")
RECEIPT = "receipt.json"
"""In folders that are made from a checkpoint: from what, how, and what came out."""
FIRST_WEIGHT = "patch_embed.proj.weight"
"""A name that every ViT's weights have."""
OURS = re.compile(r"(last|best)-\d+|\.(last|best)-\d+(-before)?")
"""Checkpoints and unfinished ones: nothing else in their folder is ever removed."""


def signature(config: Config, command: str, source_digest: str | None, data_digest: str | None) -> str:
    """Ten hex digits of what the run computes: its scientific config, the command, the weights that it starts from and,
    where the config does not say it, which images it reads."""
    given = [digest for digest in (data_digest,) if digest]
    text = json.dumps([command, source_digest, _science(config), *given], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _science(config: Config) -> dict[str, Any]:
    science = dataclasses.asdict(config)
    for key in NOT_SCIENCE:
        section, _, leaf = key.rpartition(".")
        del (science[section] if section else science)[leaf]
    return _plain(science)


def flat_science(config: Config) -> dict[str, Any]:
    """What the signature is made of, as `section.key`: a result row tells with it which runs differ in what."""

    def walk(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(walk(_science(config), ""))


def _plain(value: Any) -> Any:
    """With whole numbers as int: `capacity_factor=2` and `2.0` are one run."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint as read back: weights by state-dict key, training tensors, and plain numbers."""

    path: Path
    weights: dict[str, Tensor]
    training: dict[str, Tensor]
    state: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """The one that `Run.newest` has found.

        Raises:
            UsageError: its checksums are right, and softmoe did not write it.
        """
        try:
            state = json.loads((path / STATE).read_text())
            return cls(path, load_file(path / WEIGHTS), load_file(path / TRAINING), state)
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise UsageError(
                f"{path} cannot be read ({error}); remove it to go on from the checkpoint before"
            ) from error

    def check(self) -> None:
        """Holds its numbers and random state against what training writes, before anything is taken from it.

        Raises:
            UsageError: its checksums are right, and softmoe did not write it.
        """
        fault = _state_fault(self.state) or _random_fault(self.training)
        if fault is not None:
            raise UsageError(f"{self.path}: {fault}; remove it to go on from the checkpoint before")


def _state_fault(state: Any) -> str | None:
    """What keeps the plain numbers of a checkpoint from being ours."""
    if not isinstance(state, dict):
        return f"{STATE} holds no numbers by name"
    if (fault := other_format(state)) is not None:
        return f"{STATE} {fault}"
    for key in ("step", "best_step"):
        if type(state.get(key)) is not int or not 0 <= state[key] < 2**63:
            return f"{STATE} has no number {key}"
    for key, kinds in {"sizes": (int,), "seconds": (int, float)}.items():
        numbers = state.get(key)
        if not isinstance(numbers, dict) or not all(type(n) in kinds and n >= 0 for n in numbers.values()):
            return f"{STATE} has no numbers {key}"
    if "device" not in state["seconds"]:
        return f"{STATE} has no numbers seconds"
    return None if isinstance(state.get("scaler"), dict) else f"{STATE} has no scaler"


def _random_fault(training: dict[str, Tensor]) -> str | None:
    own, there = torch.get_rng_state(), training.get("random.cpu")
    if there is None or there.shape != own.shape or there.dtype != own.dtype:
        return f"{TRAINING} has no random state of this torch"
    return None


class Run:
    """A run's folder, held by one process at a time. Of several that train together the first writes; the others read,
    and write their pieces of weights that all have divided.

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
        if not _locked(self._lock):
            self._lock.close()
            self._lock = None
            raise UsageError(f"{self.folder} is in use by another process that runs the same configuration")
        try:
            self._lock.truncate(0)
            # Whose process it is, for who looks from another machine; unbuffered, or closing it would write it again.
            os.write(self._lock.fileno(), f"{platform.node()} {os.getpid()}".encode())
        except OSError as error:
            raise cannot_write(self.folder / ".lock", error) from error
        write_atomically(self.folder / "config.yaml", yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))

    def close(self) -> None:
        """Lets the checkpoint that is being written be whole, lets go of the folder, and says so to other machines."""
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
            return rows.lines(path, rows.FORMATS)
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
        given = [_own(weights, self._writes), _own(training, self._writes)]
        finite = [piece.tensor.isfinite().all() for piece in given[0].values()]
        answers = torch.stack(finite).tolist() if finite else []
        broken = [key for key, fine in zip(given[0], answers, strict=True) if not fine]
        if broken:
            raise RunError(f"{broken[0]} is not finite at step {step:,}: not saved; the checkpoint before is good")
        self.settle()
        state = {"format": FORMAT} | state | {"sizes": {file: self._size(file) for file in ROWS}}
        name, texts = f"{kind}-{step:08d}", {STATE: json.dumps(state)}
        tensors = [piece.tensor for pieces in given for piece in pieces.values()]
        beside = sum(tensor.nbytes for tensor in tensors if tensor.device.type == "cpu")  # a device's is not touched
        cpu = torch.device("cpu")  # what is freed and kept goes back only where that decides: training takes it again
        copied = any(room_beside(beside, free_memory(cpu, trim=trim)) for trim in (False, True))
        if copied:
            given = [_copied(pieces) for pieces in given]

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
            self.settle()
        return self._writing is None

    def settle(self) -> None:
        """Waits until the last checkpoint is on disk.

        Raises:
            RunError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @contextmanager
    def _taken(self, name: str) -> Iterator[Path]:
        """Another name for a checkpoint, which gets its own when all is well inside; older ones go only afterwards."""
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
                for whole, pieces, text in ((WEIGHTS, weights, _text(card)), (TRAINING, training, "")):
                    if pieces:
                        file = folder / shards.file_of(whole, crew.rank, crew.size)
                        shards.write(file, pieces, text)
                        sums[file.name] = _sha256(file)
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
        weights, card = shards.joined(path / WEIGHTS)
        training = shards.joined(path / TRAINING)[0] if shards.files(path / TRAINING) else {}
        pieces = [file for name in (WEIGHTS, TRAINING) for file in shards.files(path / name)]
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
        """Keeps two `last` checkpoints and every `best` that they speak of."""
        if not self._writes:
            return
        lasts = self._found("last")
        keep = set(lasts[:2])
        for path in lasts[:2]:
            if damage(path, files=(STATE,)) is None:
                with suppress(ValueError, TypeError, KeyError, RecursionError):  # no state of ours keeps nothing
                    keep.add(self.checkpoints / f"best-{json.loads((path / STATE).read_text())['best_step']:08d}")
        for path in self.checkpoints.iterdir():
            if path not in keep and OURS.fullmatch(path.name) and path.is_dir():
                clear(path)

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest undamaged checkpoint, whose pieces are joined now, and a sentence for each damaged one that was
        passed over."""
        notes: list[str] = []
        for before, final in _between_names(self.checkpoints):
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
        """Cuts the rows back to what a checkpoint vouches for; later ones will be written again."""
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
        """Writes result.json, which says what metrics.jsonl was by now."""
        if self._writes:
            whole = {"format": rows.FORMAT} | row | rows.seal((self.folder / "metrics.jsonl").read_bytes())
            write_atomically(self.folder / "result.json", json.dumps(whole, indent=1, allow_nan=False) + "\n")

    def _size(self, file: str) -> int:
        path = self.folder / file
        return path.stat().st_size if path.exists() else 0

    def _found(self, kind: str) -> list[Path]:
        """Checkpoints of a kind, newest first."""
        return _numbered(self.checkpoints, kind)


def _numbered(folder: Path, kind: str) -> list[Path]:
    """The checkpoints of a kind in a folder, newest first; not what a user has put there under other names."""
    found = [path for path in folder.glob(f"{kind}-*") if OURS.fullmatch(path.name)]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(checkpoint: Path) -> int:
    (step,) = re.findall(r"\d+", checkpoint.name)
    return int(step)


def _between_names(folder: Path) -> list[tuple[Path, Path]]:
    """Checkpoints that a process which ended between two names has left without theirs, and that."""
    pairs = [
        (before, before.with_name(before.name.removeprefix(".").removesuffix("-before")))
        for before in folder.glob(".*-before")
        if OURS.fullmatch(before.name)
    ]
    return [(before, final) for before, final in pairs if not final.exists()]


def room_beside(copy: int, free: int) -> bool:
    """Whether a copy of so many bytes of a CPU's memory leaves training enough of what is free."""
    return 4 * copy <= free


def _own(tensors: dict[str, Tensor], first: bool) -> dict[str, Piece]:
    """What this process writes of them."""
    found = {key: shards.own(value, first=first) for key, value in tensors.items()}
    return {key: piece for key, piece in found.items() if piece is not None}


def _copied(pieces: dict[str, Piece]) -> dict[str, Piece]:
    """In memory that nobody writes to; from CUDA through pinned memory, all at once."""
    copies: dict[str, Piece] = {}
    for key, piece in pieces.items():
        value = piece.tensor
        copy = value.to("cpu", copy=True, non_blocking=value.is_cuda, memory_format=torch.contiguous_format)
        copies[key] = piece._replace(tensor=copy)
    if any(piece.tensor.is_cuda for piece in pieces.values()):
        torch.cuda.synchronize()
    return copies


def _text(card: dict[str, Any]) -> str:
    return json.dumps({"format": FORMAT} | card)


def write_checkpoint(
    folder: Path, weights: dict[str, Tensor], card: dict[str, Any], training: dict[str, Tensor], texts: dict[str, str]
) -> None:
    """Makes the folder of a checkpoint: weights with their card, training tensors if any, other files by name, and the
    checksums of them all; on disk when this returns. The same contents give the same bytes: safetensors writes a
    header's entries in any order, so there is one."""
    folder.mkdir(parents=True)
    save_file(weights, folder / WEIGHTS, metadata={"softmoe": _text(card)})
    if training:
        save_file(training, folder / TRAINING)
    for name, text in texts.items():
        (folder / name).write_text(text)
    seal(folder)


def seal(folder: Path, known: dict[str, str] | None = None) -> None:
    """Writes the checksums of all files in a folder, of which some may be `known`; on disk when this returns.

    Raises:
        OSError: one that is known is not there.
    """
    known = known or {}
    files = sorted({file.name for file in folder.iterdir()} | known.keys())
    digests = {file: known.get(file) or _sha256(folder / file) for file in files}
    (folder / SUMS).write_text("".join(f"{digest}  {file}\n" for file, digest in digests.items()))
    for file in [*files, SUMS]:
        sync(folder / file)
    sync(folder)


def publish(folder: Path, fill: Callable[[Path], None]) -> None:
    """Makes a folder whole or not at all: `fill` makes it under another name.

    Raises:
        RunError: it cannot be written, or is there meanwhile.
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


def published(folder: Path, source: "Source", settings: dict[str, Any]) -> dict[str, Any] | None:
    """The receipt of a folder that was made before from the same source with the same settings; None where there is
    nothing yet.

    Raises:
        UsageError: something else is there, or nothing can be.
    """
    made = {"settings": json.loads(json.dumps(settings)), "digest": source.digest}
    receipt: Any = None
    fault: str | None = None
    with suppress(OSError, ValueError, RecursionError):  # all of which is another's
        if (folder / RECEIPT).is_file() and (fault := damage(folder, files=None)) is None:
            receipt = json.loads((folder / RECEIPT).read_text())
    if fault is not None:
        raise UsageError(f"folder={folder} exists and is damaged ({fault}); choose another name or remove it first")
    if isinstance(receipt, dict) and isinstance(receipt.get("source"), dict):
        found = {"settings": receipt.get("settings"), "digest": receipt["source"].get("digest")}
        if found == made:
            return receipt
    require_vacant("folder", folder)
    return None


def made_from(source: "Source", settings: dict[str, Any]) -> str:
    """Ten hex digits of what a folder is made from and how: part of its name where none is chosen."""
    return hashlib.sha256(json.dumps([source.digest, settings], sort_keys=True).encode()).hexdigest()[:10]


def digest_of(weights: dict[str, Tensor]) -> str:
    """SHA-256 of names and values, whatever file they stand in."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(key.encode() + weights[key].numpy().tobytes())
    return digest.hexdigest()


def _locked(file: TextIO) -> bool:
    """Locks a file. Half a second's patience, because softmoe status tries locks for a moment, and a quarter of a
    minute's where the process that it names is gone: workers that decode for it share its lock and end after it."""
    for tries in range(300):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if tries >= 10 and not _orphaned(file):
                return False
            time.sleep(0.05)
        else:
            return True
    return False


def _orphaned(file: TextIO) -> bool:
    """Whether the process of this machine that a lock names is gone."""
    file.seek(0)
    node, _, pid = file.read().rpartition(" ")
    if node != platform.node() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def damage(checkpoint: Path, files: tuple[str, ...] | None = (WEIGHTS, TRAINING, STATE)) -> str | None:
    """What is wrong with a checkpoint folder, or None when all files that it lists are there and `files` (None: all),
    whole or in pieces, match their checksums."""
    try:
        said = rows.contents(checkpoint / SUMS).decode(errors="replace")
    except FileNotFoundError:
        return f"{SUMS} is missing"
    except rows.Unreadable as error:
        return f"{SUMS} {error}"
    lines = [line.split("  ", 1) for line in said.splitlines()]
    if not lines or any(len(line) != 2 for line in lines):
        return f"{SUMS} is unreadable"
    for digest, file in lines:
        if Path(file).name != file or not (checkpoint / file).is_file():
            return f"{file} is missing"
        if (files is None or shards.whole_of(file) in files) and _sha256(checkpoint / file) != digest:
            return f"{file} does not match its checksum"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Source:
    """Weights to start from or to evaluate: `card` is what the file says of its model and classes, `prefix` what every
    name in the file began with and does not here."""

    label: str
    digest: str
    weights: dict[str, Tensor]
    card: dict[str, Any]
    prefix: str = ""

    @property
    def train_pflop(self) -> float | None:
        """What its training had cost, from the first weights on; None where the file does not say."""
        cost: Any = self.card.get("train_pflop")
        return float(cost) if rows.number(cost) and cost >= 0 else None


def origin(command: str, settings: dict[str, Any], source: Source | None) -> str:
    """Ten hex digits that weights made alike have in common: with the same settings but for the seed, from weights
    with a common origin. What they differ in is chance, so that comparisons may group what was finetuned from them."""
    start = source.card.get("origin", source.digest) if source else None
    text = json.dumps(
        [command, start, {key: value for key, value in settings.items() if key != "seed"}], sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def read_source(checkpoint: str) -> Source:
    """Reads `checkpoint=`: a run folder (its newest undamaged checkpoint), a checkpoint folder, or a file.

    Raises:
        UsageError: nothing there, nothing undamaged, or not a safetensors file. Pickles are never opened.
    """
    if not checkpoint.strip():  # which a path would take for the working folder
        raise UsageError(f"checkpoint={checkpoint} is empty, as $NAME is where NAME is not set; give it a value")
    path = Path(checkpoint)
    try:
        if path.is_dir():
            path = _weights_in(path)
            if not path.exists():
                return _joined_source(path)
        if not path.is_file():
            path.stat()
            raise UsageError(f"checkpoint={checkpoint} is neither a file nor a folder")
        digest = _sha256(path)
    except UsageError:
        raise
    except FileNotFoundError as error:
        raise UsageError(f"checkpoint={checkpoint} does not exist") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"checkpoint={checkpoint} cannot be read: {reason}") from error
    try:
        with safe_open(path, framework="pt") as file:
            card = (file.metadata() or {}).get("softmoe")
            weights = {key: file.get_tensor(key) for key in list(file.keys())}
    except SafetensorError as error:
        with path.open("rb") as raw:
            pickled = raw.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        reason = (
            "is a pickle, which can run code when opened; save its weights with safetensors first"
            if pickled
            else f"is no safetensors file, or is truncated or damaged ({error})"
        )
        raise UsageError(f"checkpoint={path} {reason}") from error
    return _source(path, digest, weights, card)


def _source(path: Path, digest: str, weights: dict[str, Tensor], text: str | None) -> Source:
    """What a file holds, with the names that its weights have in a model.

    Raises:
        UsageError: more classes than outputs, or a card that softmoe did not write.
    """
    card = read_card(text, path) if text is not None else {}
    prefix, weights = _without_prefix(weights)
    head = weights.get("head.weight")
    if card and head is not None and (head.ndim != 2 or len(head) < len(card["classes"])):
        raise UsageError(
            f"checkpoint={path} speaks of {len(card['classes'])} classes, and its head.weight is {tuple(head.shape)}; "
            "softmoe saved no such file"
        )
    return Source(str(path), digest, weights, card, prefix)


def _without_prefix(weights: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """A ViT's weights without what wrappers put before every name (DistributedDataParallel, torch.compile, averages of
    weights, trainers), and that; without the count that torch's averages keep beside them."""
    named = {key: value for key, value in weights.items() if key != "n_averaged"}
    ends = (key.removesuffix(FIRST_WEIGHT) for key in named if key.endswith(f".{FIRST_WEIGHT}"))
    prefix = next(ends, "")
    if not prefix or not all(key.startswith(prefix) for key in named):
        return "", weights
    return prefix, {key.removeprefix(prefix): value for key, value in named.items()}


def _joined_source(path: Path) -> Source:
    """Of weights in pieces: as if `path` had been written, which is what it will be when the run ends."""
    try:
        weights, text = shards.joined(path)
    except RunError as error:
        raise UsageError(f"checkpoint={path.parent}: {error}") from error
    digest = hashlib.sha256(save(weights, metadata={"softmoe": text})).hexdigest()
    return _source(path, digest, weights, text)


def read_moments(source: Source, digest: str | None = None) -> dict[str, dict[str, Tensor]]:
    """AdamW's state (`exp_avg`, `exp_avg_sq`, `step`) of each parameter, from the training tensors beside a
    checkpoint's weights; nothing where there are none. With `digest` they must be the tensors of that digest.

    Raises:
        UsageError: they are damaged, or not the ones that the weights speak of.
    """
    folder, tensors = Path(source.label).parent, {}
    if Path(source.label).name == WEIGHTS and ((folder / TRAINING).is_file() or shards.files(folder / TRAINING)):
        fault = damage(folder)
        if fault is not None:
            raise UsageError(f"checkpoint={folder}: {fault}")
        tensors = shards.read(folder / TRAINING)
    tensors = {key: value for key, value in tensors.items() if key.startswith("optimizer.")}
    if digest is not None and digest_of(tensors) != digest:
        raise UsageError(
            f"checkpoint={source.label} was upcycled with optimizer moments, and {folder / TRAINING} does not hold "
            "them; name the whole folder, or upcycle with carry_optimizer=false"
        )
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, kind = key.removeprefix("optimizer.").rpartition(".")
        found.setdefault(name, {})[kind] = value
    return {name: state for name, state in found.items() if state.keys() == {"exp_avg", "exp_avg_sq", "step"}}


def _weights_in(folder: Path) -> Path:
    """The weights file of a run or checkpoint folder, its checksum tested."""
    if (folder / WEIGHTS).is_file() or shards.files(folder / WEIGHTS):
        candidates = [folder]
    else:
        found = _numbered(folder / "checkpoints", "last")
        found += [before for before, final in _between_names(folder / "checkpoints") if final.name.startswith("last-")]
        candidates = sorted(found, key=_step_of, reverse=True)
    if not candidates:
        raise UsageError(f"checkpoint={folder} holds no checkpoint: neither {WEIGHTS} nor checkpoints/last-*")
    faults = []
    for candidate in candidates:
        fault = damage(candidate)
        if fault is None:
            return candidate / WEIGHTS
        faults.append(f"{candidate.name}: {fault}")
    raise UsageError(f"checkpoint={folder} holds no undamaged checkpoint ({'; '.join(faults)})")


def random_state() -> dict[str, Tensor]:
    """torch's random states, on the CPU and on the CUDA or MPS device: dropout, stochastic depth and router noise draw
    from them. Order and augmentation are functions of seed and step and need no state."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda.0"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        states["random.mps"] = torch.mps.get_rng_state()
    return states


def set_random_state(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["random.cpu"])
    if torch.cuda.is_available() and "random.cuda.0" in states:
        torch.cuda.set_rng_state(states["random.cuda.0"])
    if torch.backends.mps.is_available() and "random.mps" in states:
        torch.mps.set_rng_state(states["random.mps"])
