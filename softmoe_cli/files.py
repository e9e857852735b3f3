"""Files that hold the old text or the new one, whenever the power goes."""

import os
from pathlib import Path


class RunError(RuntimeError):
    """A run that cannot go on; the message says why and what is safe."""


def write_atomically(path: Path, text: str) -> None:
    """The file holds the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_text(text)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> RunError:
    return RunError(f"cannot write {path}: {error.strerror}; make room and type the same command to go on")


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
