"""Errors of the system and defects, and whose they are."""

import errno

import pytest
import torch

from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.failures import ours

ERRORS: dict[str, tuple[BaseException, type[Exception] | None, str]] = {
    "full": (OSError(errno.ENOSPC, "No space left on device"), RunError, "No space left on device; make room"),
    "full file": (OSError(errno.ENOSPC, "No space left", "a/b"), RunError, "a/b: No space left; make room"),
    "too long": (OSError(errno.ENAMETOOLONG, "File name too long", "n"), UsageError, "n: File name too long: a"),
    "typed": (NotADirectoryError(errno.ENOTDIR, "Not a directory", "x/y/z"), UsageError, "output_root=x/y: x/y/z: "),
    "denied": (PermissionError(errno.EACCES, "denied", "out"), UsageError, "out: denied; choose a place where you may"),
    "files": (OSError(errno.EMFILE, "Too many open files"), RunError, "raise the limit with ulimit -n"),
    "disk": (OSError(errno.EIO, "Input/output error"), RunError, "Input/output error; type the same command again"),
    "memory": (MemoryError(), RunError, "out of memory"),
    "torch": (torch.OutOfMemoryError("CUDA out of memory"), RunError, "out of memory (CUDA out of memory)"),
    "cpu": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), RunError, "out of memory ("),
    "ascii": (UnicodeEncodeError("ascii", "a\u4e2d", 1, 2, "no"), UsageError, r"'\u4e2d' cannot be written in ascii"),
    "without a file": (OSError("odd"), None, ""),
    "a defect": (KeyError("x"), None, ""),
    "deep, but in our code": (RecursionError(), None, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_by_class_and_origin(name: str) -> None:
    error, kind, words = ERRORS[name]
    found = ours(error, ["output_root=x/y", "seed=1"])
    assert type(found) is (type(None) if kind is None else kind) and words in str(found or "")
