"""What a process of `softmoe` is told before it does anything."""

import atexit
import gc
import io
import os

from softmoe_cli import programs
from softmoe_cli.deferred import defer_packages

IMPORTED, GARBAGE = 1_000_000, 50_000
"""New objects after which Python looks for circles of garbage: while it imports, when there is none, and afterwards. By
default it looks after 700; torch and what comes with it make 700,000, which are looked through again and again."""
SPINS = "1000"
"""How often a waiting thread of torch's looks again before it sleeps. By default it looks for milliseconds, which
another program on the same cores turns into seconds a step; to sleep at once costs small models a quarter of their time
on a quiet machine (experiments/loop_overhead). GNU's OpenMP alone reads it."""


def settle_in() -> None:
    """Readies streams, memory, threads and late imports of this process. Before torch is imported, and once."""
    for stream in programs.streams():  # file names and terminals may not be UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    gc.set_threshold(IMPORTED)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # jobs inherit it
    defer_packages()


def settled() -> None:
    """All is imported: what is there now stays to the end and is not looked through, nor copied in jobs that are forked
    from here. Once, as what a later run leaves behind is garbage. In a program that has imported softmoe_cli nothing
    changes: it decides this itself."""
    if gc.get_threshold()[0] == IMPORTED:
        gc.freeze()
        gc.set_threshold(GARBAGE)
        atexit.register(gc.unfreeze)  # Triton's parts complain when they are left at the end
