"""A run's checkpoints: written while training goes on, whole or not at all, and nothing of others removed."""

import errno
import math
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from softmoe_cli.errors import RunError
from softmoe_cli.run import checkpoint, saving
from softmoe_cli.run.checkpoint import Checkpoint
from softmoe_cli.run.folder import Run
from softmoe_cli.run.sealed import OURS
from tests.conftest import TINY, Softmoe
from tests.runs import last, the_run


def test_a_checkpoint_saved_again_is_the_new_one(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.checkpoints.folder.mkdir()
    for value in (1.0, 2.0):
        run.checkpoints.save("best", 5, {"w": torch.tensor([value])}, {}, {"best_step": 5}, {})
    run.checkpoints.wait()
    assert load_file(run.checkpoints.folder / "best-00000005" / "model.safetensors")["w"].item() == 2.0
    with pytest.raises(RunError, match="w is not finite at step 6"):
        run.checkpoints.save("last", 6, {"w": torch.tensor([math.nan])}, {}, {}, {})


SAVED: tuple[Any, ...] = ({"best_step": 5}, {})


class Disk:
    """Takes a checkpoint when it is ready, and then may have been too small for it."""

    def __init__(self) -> None:
        self.ready, self.full = threading.Event(), False
        self.writers: list[threading.Thread] = []
        self._write = checkpoint.write_checkpoint

    def __call__(self, *given: Any) -> None:
        self.writers.append(threading.current_thread())
        self.ready.wait(60)
        self._write(*given)
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")


def opened(folder: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk) -> Run:
    monkeypatch.setattr(saving, "write_checkpoint", disk)
    run = Run(folder)
    run.checkpoints.folder.mkdir()
    return run


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is the moment of the save: its weights, its moments, its rows."""
    disk = Disk()
    run = opened(tmp_path, monkeypatch, disk)
    weight, moment = torch.tensor([1.0]), torch.tensor([2.0])
    run.append("metrics.jsonl", {"step": 5})
    run.checkpoints.save("last", 5, {"w": weight}, {"m": moment}, *SAVED)
    weight.add_(10)
    moment.add_(10)
    run.append("metrics.jsonl", {"step": 6})
    assert not run.checkpoints.idle and run.checkpoints.newest() == (None, [])
    disk.ready.set()
    run.checkpoints.wait()
    path, _ = run.checkpoints.newest()
    assert run.checkpoints.idle and path is not None
    found = Checkpoint.read(path)
    assert (found.weights["w"].item(), found.training["m"].item()) == (1.0, 2.0)
    run.rewind(found.state["sizes"])
    assert run.rows("metrics.jsonl") == [{"format": 1, "step": 5}]


def test_a_run_that_ends_waits_for_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk()
    run = opened(tmp_path, monkeypatch, disk)
    run.checkpoints.save("last", 5, {"w": torch.ones(1)}, {}, *SAVED)
    threading.Timer(0.05, disk.ready.set).start()
    run.close()
    assert run.checkpoints.newest()[0] is not None


def test_without_room_for_a_copy_training_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk()
    disk.ready.set()
    run = opened(tmp_path, monkeypatch, disk)
    for step, free in ((5, 16), (6, 15)):
        monkeypatch.setattr(saving, "free_memory", lambda device, trim=True, free=free: free)
        run.checkpoints.save("last", step, {"w": torch.ones(1)}, {}, *SAVED)
        run.checkpoints.wait()
    assert disk.writers[0] is not disk.writers[1] is threading.current_thread()
    assert len(list(run.checkpoints.folder.glob("last-*"))) == 2


@pytest.mark.parametrize("asked", ["idle", "wait", "save"])
def test_a_failed_write_is_told_when_asked_for(asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As what it is; the checkpoint before is there, and nothing else."""
    disk = Disk()
    disk.ready.set()
    run = opened(tmp_path, monkeypatch, disk)
    run.checkpoints.save("last", 5, {"w": torch.ones(1)}, {}, *SAVED)
    run.checkpoints.wait()

    def until_idle() -> None:
        while not run.checkpoints.idle:
            time.sleep(0.001)

    def save_again() -> None:
        run.checkpoints.save("best", 7, {"w": torch.ones(1)}, {}, *SAVED)

    ask = {"idle": until_idle, "wait": run.checkpoints.wait, "save": save_again}
    disk.full = True
    run.checkpoints.save("last", 6, {"w": torch.ones(1)}, {}, *SAVED)
    with pytest.raises(RunError, match="No space left on device; earlier checkpoints are untouched"):
        ask[asked]()
    assert [path.name for path in run.checkpoints.folder.iterdir()] == ["last-00000005"]


def test_what_is_not_ours_stays(softmoe: Softmoe, tmp_path: Path) -> None:
    line = ("train", *TINY, "train.steps=10")
    assert softmoe(*line).code == 0
    run = the_run(tmp_path)
    (run / "checkpoints" / "README").write_text("mine")
    for name in ("keep-this", "last-mine", "last-00000010-mine"):
        shutil.copytree(last(run), run / "checkpoints" / name)
    (run / "checkpoints" / ".last-00000010-before").mkdir()
    (run / "result.json").unlink()
    assert softmoe(*line).code == 0
    left = {path.name for path in (run / "checkpoints").iterdir() if not OURS.fullmatch(path.name)}
    assert left == {"README", "keep-this", "last-mine", "last-00000010-mine"}
    assert (run / "checkpoints" / "last-00000010").exists() and not list((run / "checkpoints").glob(".*"))


def test_a_checkpoint_between_two_names_is_read(softmoe: Softmoe, tmp_path: Path) -> None:
    """Its process has ended after it had taken the name away, and before it gave it to the next one."""
    assert softmoe("train", *TINY, "train.steps=10").code == 0
    run = the_run(tmp_path)
    last(run).rename(run / "checkpoints" / ".last-00000010-before")
    answer = softmoe("evaluate", f"checkpoint={run}")
    assert answer.code == 0, answer
