"""Runs that are killed, or whose files cannot be written, at any of their file operations: the same command goes on
and ends with the same bits, what failed is said in a sentence, and no process is left behind."""

import contextlib
import errno
import functools
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY
from tests.processes import Started
from tests.runs import finish, same, start, the_run
from tests.wrong import images

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate")
COUNT, KILL, FULL, BROKEN = "count", "kill", "full", "broken"

SHORT = ("tracking=off", "train.steps=8", "train.batch_size=8", "train.save_seconds=0", "train.eval_every=0.5")
RUNS = {
    "soft": (),
    "tokens_choice": (
        "model=vit_nano2_tokens_choice", "train.ema=0.9", "augment.mixup=0.2", "augment.erase=0.3",
        "model.backbone.drop_path=0.1",
    ),
    "files": (
        "data=folder", "data.root=../set", "data.image_size=8", "data.channels=1", "data.memory_gib=0",
        "data.workers=1", "model=vit_nano2_soft", "model.image_size=8", "model.in_chans=1",
        "model.router.noise_std=0.1",
    ),
    "experts_choice": ("model/router=experts_choice", "train.accumulate=2"),
}  # fmt: skip
FEW = {"soft": (KILL, BROKEN), "files": (FULL,)}
MANY = dict.fromkeys(RUNS, (KILL, FULL, BROKEN) * 6)


def faulty(kind: str, at: int) -> None:
    """From now on this process's `at`-th change to the files below outputs/ is a fault; how many there were is kept."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in CHANGES and not (event == "open" and _writes(arguments)):
            return
        if "/outputs/" not in os.path.abspath(os.fsdecode(arguments[0])):
            return
        seen += 1
        if kind == COUNT:
            os.write(counted, b".")
        elif kind == KILL and seen == at:
            os.kill(os.getpid(), signal.SIGKILL)
        elif (kind == FULL and seen >= at) or (kind == BROKEN and seen == at):
            number = errno.ENOSPC if kind == FULL else errno.EIO
            raise OSError(number, os.strerror(number), arguments[0])

    counted = os.open("operations", os.O_WRONLY | os.O_CREAT | os.O_APPEND) if kind == COUNT else -1
    sys.addaudithook(hook)


def _writes(arguments: tuple[Any, ...]) -> bool:
    path, _, flags = arguments
    return isinstance(path, str | bytes) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def left_behind(session: int) -> list[int]:
    """Processes of a session that has lost its leader, after what time they need to notice it."""
    end = time.monotonic() + 60
    while (found := list(_of_session(session))) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def _of_session(session: int) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                yield int(folder.name)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "kinds"),
    [pytest.param(name, kinds, id=f"{name} few") for name, kinds in FEW.items()]
    + [pytest.param(name, kinds, id=f"{name} many", marks=pytest.mark.thorough) for name, kinds in MANY.items()],
)
def test_any_file_operation_may_fail(name: str, kinds: tuple[str, ...], tmp_path: Path) -> None:
    images(tmp_path / "set", per_class=40)
    options = (*SHORT, *RUNS[name])

    def began(folder: str, kind: str, at: int) -> Started:
        first = functools.partial(faulty, kind, at)
        return Started(tmp_path / folder, ["train", *TINY, "threads=1", *options], {}, first=first)

    finish(began("whole", COUNT, 0))
    operations = (tmp_path / "whole/operations").stat().st_size
    assert operations > 20
    rng = random.Random(0)
    for number, kind in enumerate(kinds):
        folder = f"{number}-{kind}"
        process = began(folder, kind, rng.randint(1, operations))
        code, out = process.wait()
        if kind == KILL:
            assert code == -signal.SIGKILL, out
        elif not (kind == BROKEN and code == 0):  # an operation may be tried again, or may not matter
            assert code in (1, 2), out  # 2 where nothing had begun
            reason = os.strerror(errno.ENOSPC if kind == FULL else errno.EIO)
            assert out.strip().splitlines()[-1].startswith("softmoe: ") and reason in out, out
        assert "Traceback" not in out, out
        assert left_behind(process.pid) == []
        finish(start(tmp_path / folder, *options))
        same(the_run(tmp_path / "whole"), the_run(tmp_path / folder))
