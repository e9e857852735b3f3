"""Files that hold the old content or the new one, whenever the power goes; and what is never overwritten."""

import contextlib
import errno
import os
import secrets
import shutil
from pathlib import Path

from softmoe_cli.errors import RunError, UsageError

RULE = "What exists is not overwritten: give a name that nothing has, or remove it first."
"""Of every file and folder that a command is told to write; `--help` says it."""


def require_vacant(key: str, path: Path) -> None:
    """Holds a place that `key` names against RULE, before any work is done for it. A link counts, wherever it leads.

    Raises:
        UsageError: something is there, or nothing can be.
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
    """A name beside `path` that nobody has, for what is not finished. Whoever makes it makes it anew (`x`, `mkdir`), so
    that neither a neighbour nor what a link leads to can be hit."""
    return path.with_name(f".{path.name[:60]}-{secrets.token_hex(6)}")  # names have up to 255 bytes


def not_following(path: str, flags: int) -> int:
    """An `opener` for files that grow or are held: what a link of their name leads to is another's."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def write_atomically(path: Path, content: str | bytes) -> None:
    """The file holds the old content or the new one, never a part. Names that are no Unicode stay the bytes they were.

    Raises:
        RunError: it cannot be written; what was there is still there.
    """
    temporary = unused(path)
    try:
        with temporary.open("xb") as file:
            file.write(content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape"))
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
    """Removes what is called so, of a link the link alone; what cannot be removed stays."""
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
