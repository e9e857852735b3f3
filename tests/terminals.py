"""Commands on a real terminal of some width: what a reader of its screen sees."""

import fcntl
import functools
import os
import pty
import re
import struct
import sys
import termios
import threading
from pathlib import Path

from tests.processes import Started

HEIGHT = 30


def on_pty(folder: Path, columns: int, arguments: list[str], **environment: str) -> tuple[int | None, list[str]]:
    """Runs `softmoe` on a terminal so wide; returns its exit status and every line that stood on the screen, without
    what moves and colours it."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, columns, 0, 0))
    told: list[bytes] = []
    reader = threading.Thread(target=_read, args=(ours, told))
    reader.start()
    terminal = {"TERM": "xterm-256color", **environment}
    process = Started(
        folder, arguments, terminal, first=functools.partial(_write_there, os.ttyname(its), "COLUMNS" in environment)
    )
    code, _ = process.wait()
    os.close(its)  # upon which reading ends
    reader.join()
    os.close(ours)
    screen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\n", b"".join(told).decode())
    return code, list(dict.fromkeys(filter(str.strip, re.split(r"[\r\n]+", screen))))


def _write_there(name: str, said: bool) -> None:
    """`said`: whether COLUMNS is there to be believed."""
    terminal = os.open(name, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(terminal, descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)  # they were files
    if not said:
        os.environ.pop("COLUMNS", None)


def _read(descriptor: int, told: list[bytes]) -> None:
    try:
        while part := os.read(descriptor, 65536):
            told.append(part)
    except OSError:  # nobody writes any more
        pass
