"""Tells apart the other errors: of the system, of memory, of text, and defects of softmoe.

A command reports the errors that it expects itself, with the key and the way out. Errors that come here were raised by
Python, torch or the system. Their class and origin tell the cause: the user's input (UsageError), the machine's state
(RunError), or a defect.
"""

import errno
import os
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path

from softmoe_cli.errors import RunError, UsageError, first_line
from softmoe_cli.text import shortened

PLACE = {errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EFBIG: "choose another file system"}
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
FILES = {errno.EMFILE, errno.ENFILE}
STATE_ERRORS = {errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EAGAIN, errno.ETIMEDOUT, errno.ENOTCONN, errno.EREMOTEIO}
"""Errors of the machine's state: the same command may work later."""
MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "unable to allocate")
PATH_LETTERS = 500
"""The most letters of a path that a sentence repeats."""
PARSERS = ("json", "yaml", "omegaconf", "antlr4", "hydra")


def ours(error: BaseException, typed: Sequence[str] = ()) -> UsageError | RunError | None:
    """Translates an error into one of softmoe's, which names the key that was `typed` with the path in question; None
    for a defect."""
    if isinstance(error, UsageError | RunError):
        return error
    if isinstance(error, OSError):
        return _of_system(error, typed)
    text = first_line(error)
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in MEMORY)
    ):
        return RunError(f"out of memory ({text}); ask for less at a time, or free some and type the same command again")
    if isinstance(error, UnicodeEncodeError):
        return UsageError(
            f"{error.object[error.start : error.end]!a} cannot be written in {error.encoding}; set "
            "PYTHONIOENCODING=utf-8, or choose a name without it"
        )
    if isinstance(error, RecursionError) and _module(error) in PARSERS:
        return UsageError("what was given to be read is nested too deeply; leave out what stands in so many brackets")
    return None


def _of_system(error: OSError, typed: Sequence[str]) -> UsageError | RunError | None:
    what = error.strerror or first_line(error)
    if error.filename2 is not None:
        where = f"{_name(error.filename)} -> {_name(error.filename2)}: "
    else:
        where = f"{_name(error.filename)}: " if error.filename is not None else ""
    for word in typed:
        value = word.partition("=")[2]
        if value and where.startswith((f"{value}/", f"{value}:")):
            where = f"{word}: {where}"
    where = shortened(where, PATH_LETTERS)
    if error.errno in PLACE:
        return RunError(f"{where}{what}; {PLACE[error.errno]} and type the same command again")
    if error.errno in FILES:
        return RunError(f"{where}{what}; raise the limit with ulimit -n, or lower data.workers")
    if error.errno in STATE_ERRORS or isinstance(error, ConnectionError):
        return RunError(f"{where}{what}; type the same command again")
    if error.errno == errno.ENAMETOOLONG:
        return UsageError(f"{where}{what}: a name may have 255 bytes, a path 4,096; choose a shorter one")
    if error.errno in REFUSED and where:
        return UsageError(f"{where}{what}; choose a place where you may read and write, or change its permissions")
    return UsageError(f"{where}{what}") if where else None


def _name(file: object) -> str:
    return os.fsdecode(file) if isinstance(file, str | bytes | os.PathLike) else f"file {file}"


def _module(error: BaseException) -> str:
    """The top-level module in which an error was raised."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")).partition(".")[0] if frames else ""


def defect(error: BaseException) -> str:
    """Prints the traceback of an error that nobody expected; returns the sentence that says whose defect it is."""
    traceback.print_exception(error)
    what = f"{type(error).__name__}: {first_line(error)}"
    file = _own_code(error)
    if file is not None:
        return f"{what}; raised in {file}, which is not softmoe's"
    return (
        f"{what}: a defect of softmoe, or of code of your own that it ran; please report what stands above, the "
        "command and softmoe --version"
    )


def _own_code(error: BaseException) -> str | None:
    """Where a user's own code raised an error: the last frame that is neither ours nor the environment's."""
    here = f"{Path(__file__).parent}{os.sep}"
    environment = tuple({str(Path(path).resolve()) for path in (*sysconfig.get_paths().values(), sys.base_prefix)})
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = frame.filename
        if file.startswith(here):
            return None
        if not file.startswith(("<", *environment)) and Path(file).name not in ("softmoe", "__main__.py"):
            return f"{file}, line {frame.lineno}"
    return None
