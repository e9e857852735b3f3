"""The files of checkpoints, found by their names and compared with their checksums; what is in them is not read here,
and torch is not needed."""

import functools
import hashlib
import re
from pathlib import Path

from softmoe_cli.errors import UsageError
from softmoe_cli.files import sync
from softmoe_cli.run import rows

WEIGHTS, TRAINING, STATE, SUMS = "model.safetensors", "training.safetensors", "state.json", "SHA256SUMS"
OURS = re.compile(r"(last|best)-\d+|\.(last|best)-\d+(-before)?")
"""Checkpoints and unfinished ones: nothing else in their folder is ever removed."""
PIECE_NAME = re.compile(r"(?P<name>.+)\.\d+-of-\d+\.safetensors")


def file_of(name: str, rank: int, size: int) -> str:
    """`model.safetensors` of the third of four processes is `model.3-of-4.safetensors`."""
    return f"{name.removesuffix('.safetensors')}.{rank + 1}-of-{size}.safetensors"


def whole_of(file: str) -> str:
    """The name of the whole that a file has pieces of, or its own."""
    match = PIECE_NAME.fullmatch(file)
    return f"{match['name']}.safetensors" if match else file


def piece_files(path: Path) -> list[Path]:
    """The files with the pieces of `path`, in any order; none if `path` is whole, or missing."""
    return [file for file in path.parent.glob("*.safetensors") if file != path and whole_of(file.name) == path.name]


def numbered(folder: Path, kind: str) -> list[Path]:
    """The checkpoints of a kind in a folder, newest first; not what a user has put there under other names."""
    checkpoints = [path for path in folder.glob(f"{kind}-*") if OURS.fullmatch(path.name)]
    return sorted(checkpoints, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    (step,) = re.findall(r"\d+", checkpoint.name)
    return int(step)


def between_names(folder: Path) -> list[tuple[Path, Path]]:
    """(path, right name) of each checkpoint that has only a temporary name, because a process ended while renaming
    it."""
    pairs = [
        (before, before.with_name(before.name.removeprefix(".").removesuffix("-before")))
        for before in folder.glob(".*-before")
        if OURS.fullmatch(before.name)
    ]
    return [(before, final) for before, final in pairs if not final.exists()]


def require_there(checkpoint: str) -> Path:
    """The file, or the folder with checkpoints, that `checkpoint=` names.

    Raises:
        UsageError: there is none.
    """
    if not checkpoint.strip():  # an empty path would mean the working folder
        raise UsageError(f"checkpoint={checkpoint} is empty, as $NAME is where NAME is not set; give it a value")
    path = Path(checkpoint)
    try:
        if path.is_dir():
            checkpoints_in(path)
        elif not path.is_file():
            path.stat()
            raise UsageError(f"checkpoint={checkpoint} is neither a file nor a folder")
    except UsageError:
        raise
    except FileNotFoundError as error:
        raise UsageError(f"checkpoint={checkpoint} does not exist") from error
    except (OSError, ValueError) as error:
        raise unreadable(checkpoint, error) from error
    return path


def unreadable(checkpoint: str, error: OSError | ValueError) -> UsageError:
    """The sentence about a checkpoint that the system does not let us read."""
    reason = error.strerror if isinstance(error, OSError) else error
    return UsageError(f"checkpoint={checkpoint} cannot be read: {reason}")


def checkpoints_in(folder: Path) -> list[Path]:
    """The folder itself if it is a checkpoint, else those that it holds, newest first.

    Raises:
        UsageError: it is none and holds none.
    """
    if (folder / WEIGHTS).is_file() or piece_files(folder / WEIGHTS):
        return [folder]
    checkpoints = numbered(folder / "checkpoints", "last")
    checkpoints += [before for before, final in between_names(folder / "checkpoints") if final.name.startswith("last-")]
    if not checkpoints:
        raise UsageError(f"checkpoint={folder} holds no checkpoint: neither {WEIGHTS} nor checkpoints/last-*")
    return sorted(checkpoints, key=step_of, reverse=True)


def weights_in(folder: Path) -> tuple[Path, str]:
    """The weights file of a run or checkpoint folder, its checksum tested; and what is wrong with newer checkpoints,
    which are passed over.

    Raises:
        UsageError: there is none that is undamaged.
    """
    faults = list[str]()
    for candidate in checkpoints_in(folder):
        fault = damage(candidate)
        if fault is None:
            return candidate / WEIGHTS, "; ".join(faults)
        faults.append(f"{candidate.name}: {fault}")
    raise UsageError(f"checkpoint={folder} holds no undamaged checkpoint ({'; '.join(faults)})")


def seal(folder: Path, known: dict[str, str] | None = None) -> None:
    """Writes the checksums of all files in a folder, of which some may be `known`; on disk when this returns.

    Raises:
        OSError: one that is known is not there.
    """
    known = known or {}
    files = sorted({file.name for file in folder.iterdir()} | known.keys())
    digests = {file: known.get(file) or sha256(folder / file) for file in files}
    (folder / SUMS).write_text("".join(f"{digest}  {file}\n" for file, digest in digests.items()))
    for file in [*files, SUMS]:
        sync(folder / file)
    sync(folder)


def damage(checkpoint: Path, files: tuple[str, ...] | None = (WEIGHTS, TRAINING, STATE)) -> str | None:
    """What is wrong with a checkpoint folder, or None when all files that it lists are there and `files` (None: all),
    whole or in pieces, match their checksums."""
    try:
        sums = rows.contents(checkpoint / SUMS).decode(errors="replace")
    except FileNotFoundError:
        return f"{SUMS} is missing"
    except rows.Unreadable as error:
        return f"{SUMS} {error}"
    lines = [line.split("  ", 1) for line in sums.splitlines()]
    if not lines or any(len(line) != 2 for line in lines):
        return f"{SUMS} is unreadable"
    for digest, file in lines:
        if Path(file).name != file or not (checkpoint / file).is_file():
            return f"{file} is missing"
        if (files is None or whole_of(file) in files) and sha256(checkpoint / file) != digest:
            return f"{file} does not match its checksum"
    return None


def sha256(path: Path) -> str:
    """The digest of a file. One that has not changed since this process asked before is not read again."""
    known = path.stat()
    return _sha256(path, known.st_dev, known.st_ino, known.st_size, known.st_mtime_ns, known.st_ctime_ns)


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, *_known: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
