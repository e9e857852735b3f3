"""Writes files so that they hold the old content or the new one even after a power cut; refuses to overwrite."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from softmoe_cli.errors import RunError, UsageError

RULE = "What exists is not overwritten: give a name that nothing has, or remove it first."
"""The rule for every file and folder that a command is told to write; `--help` prints it."""


def require_vacant(key: str, path: Path) -> None:
    """Checks a path that `key` names against RULE, before any work is done for it. A link counts as a file, wherever it
    leads.

    Raises:
        UsageError: something is there, or nothing can be written there.
    """
    try:
        path.lstat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # too long, below a file, or with a zero in it
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{key}={path} can be neither a file nor a folder: {reason}; choose another name") from error
    raise UsageError(f"{key}={path} exists, and what exists is not overwritten; choose another name or remove it first")


def unused(path: Path) -> Path:
    """An unused name beside `path`, for a file or folder that is not finished. The caller must create it as new (`x`,
    `mkdir`), so that neither another file nor the target of a link can be overwritten."""
    return path.with_name(f".{path.name[:60]}-{secrets.token_hex(6)}")  # names have up to 255 bytes


def not_following(path: str, flags: int) -> int:
    """An `opener` for files that are appended to or locked: it follows no link, because the target may be somebody
    else's file."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_atomically(path: Path, content: str | bytes) -> None:
    """The file holds the old content or the new one, never a part. Names that are no Unicode stay the bytes they were.

    Raises:
        RunError: it cannot be written; what was there is still there.
    """
    with written_whole(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape"))


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which becomes `path` when all is written, and nothing if something is raised before.

    Raises:
        RunError: it cannot be written; what was there is still there.
    """
    temporary = unused(path)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        clear(temporary)


def cannot_write(path: Path, error: OSError) -> RunError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    way_out = "make room and type the same command to go on" if full else "type the same command again when it can be"
    return RunError(f"cannot write {path}: {error.strerror}; {way_out}")


def clear(path: Path) -> None:
    """Removes a file or folder; of a link, only the link. What cannot be removed stays."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_bytes(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0
