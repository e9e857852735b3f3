"""What a process of `softmoe` is told before it does anything."""

import gc
import io
import os

from softmoe_cli import programs
from softmoe_cli.deferred import defer_packages

GARBAGE = 50_000
"""New objects after which Python looks for circles of garbage. By default it looks after 700, which is an eighth of the
time that importing torch takes, and finds none."""
SPINS = "1000"
"""How often a waiting thread of torch's looks again before it sleeps. By default it looks for milliseconds, which
another program on the same cores turns into seconds a step; to sleep at once costs small models a quarter of their time
on a quiet machine (experiments/loop_overhead). GNU's OpenMP alone reads it."""


def settle_in() -> None:
    """Readies streams, memory, threads and late imports of this process. Before torch is imported, and once."""
    for stream in programs.streams():  # file names and terminals may not be UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    gc.set_threshold(GARBAGE)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # jobs inherit it
    defer_packages()
