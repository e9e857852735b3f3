"""Sweeps in processes of their own, and what several tests ask of them."""

import contextlib
import json
from pathlib import Path
from typing import Any

from tests.conftest import TINY
from tests.processes import Started

LINE = (*TINY, "threads=1", "train.batch_size=8", "study=default")


def launch(folder: Path, *arguments: str) -> Started:
    return Started(folder, ["train", "-m", *LINE, *arguments], {})


def finish(process: Started, code: int = 0) -> str:
    left, out = process.wait()
    assert left == code, out
    return out


def runs(folder: Path) -> dict[str, Path]:
    """Run folders by the name of their job."""
    (jobs,) = folder.glob("outputs/*/sweep-*/jobs.json")
    return {job["run"]: jobs.parent / job["folder"] for job in json.loads(jobs.read_text())["jobs"]}


def finished(folder: Path) -> bool:
    return (folder / "result.json").exists()


def below(pid: int) -> list[int]:
    """A process's children, and theirs."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found += [int(path.parent.name), *below(int(path.parent.name))]
    return found


def rows_of(study: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in study.glob("*/result.json")]
