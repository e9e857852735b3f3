"""Processes that decode images: what is said when they cannot go on, and that they end with whoever needed them."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from softmoe_cli.config.data import Data
from softmoe_cli.data import batches, sets
from softmoe_cli.data.workers import WorkersError, end_workers
from softmoe_cli.errors import UsageError
from tests.conftest import TINY, Softmoe
from tests.oracles import compose
from tests.processes import Started, forked


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def settings(root: Path) -> Data:
    found = compose(
        "data=folder", f"data.root={root}", "data.image_size=8", "data.channels=1", "data.mean=[0]", "data.std=[1]"
    ).data
    found.memory_gib, found.workers, found.test_fraction = 0, 2, 1
    return found


def looks(root: Path) -> Iterator[batches.Batch]:
    chosen = settings(root)
    return batches.eval_batches(
        sets.load(chosen).test, chosen, image_size=8, in_chans=1, batch_size=1, device=torch.device("cpu")
    )


def workers() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid is not None]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, "was killed, which is what the system does when memory runs out; lower data.workers"),
        (signal.SIGBUS, "there is no shared memory"),
        (signal.SIGXCPU, "was ended by SIGXCPU"),
    ],
)
def test_the_end_of_a_worker_is_a_sentence(tree: Path, number: int, words: str) -> None:
    before = workers()
    batches = looks(tree)
    next(batches)
    os.kill((set(workers()) - set(before)).pop(), number)
    with pytest.raises(WorkersError, match=words):
        list(batches)
    assert workers() == before


def test_more_workers_than_cores_are_what_was_asked_for(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch warns of them in words of its own, once for each pass over the images; here a warning is an error."""
    monkeypatch.setattr(torch._utils, "cpu_count", lambda: 1)
    assert len(list(looks(tree))) == 24


def test_full_shared_memory_is_a_sentence(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch says it; workers are forked, and so have this version of it."""

    def full(*_: object, **__: object) -> torch.UntypedStorage:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    with pytest.raises(WorkersError, match=r"no shared memory \(/dev/shm\) left .*No space left.*make it larger"):
        list(looks(tree))


def test_a_worker_that_has_no_memory_is_a_sentence(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(batches, "opened", none_left)
    with pytest.raises(WorkersError, match="memory ran out where images are decoded"):
        list(looks(tree))


def test_workers_end_though_an_error_still_holds_their_batches(tree: Path) -> None:
    batches = looks(tree)
    next(batches)
    assert workers()
    end_workers()
    assert not workers()


def test_a_defect_where_images_are_decoded_is_raised_as_it_is(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(batches, "centre", broken)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        list(looks(tree))
    assert not workers()


LINE = (
    "train", *TINY, "model.image_size=8", "data=folder", "data.root=images", "data.image_size=8", "data.channels=1",
    "data.memory_gib=0", "data.workers=1", "train.batch_size=4", "threads=1",
)  # fmt: skip


def test_a_run_that_fails_ends_with_its_workers(tree: Path, tmp_path: Path) -> None:
    line = [*LINE, "train.steps=400", "optim.lr=1e30", "optim.clip_norm=null"]
    code, out = Started(tmp_path, line, {}).wait(120)
    assert code == 1 and "The update was not made" in out.splitlines()[-1], out


def test_a_run_whose_worker_is_killed_keeps_what_it_has_learnt(tree: Path, tmp_path: Path, softmoe: Softmoe) -> None:
    def kill() -> None:
        while not (rows := list(tmp_path.glob("outputs/*/*/metrics.jsonl"))) or '"train"' not in rows[0].read_text():
            time.sleep(0.1)
        os.kill(workers()[0], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    told = softmoe(*LINE, "train.steps=100000", "train.eval_every=100000", "train.log_every=3")
    assert told.code == 1 and told.err.startswith("softmoe: a process that decodes images was killed"), told
    (state,) = tmp_path.glob("outputs/*/*/checkpoints/last-*/state.json")
    assert json.loads(state.read_text())["step"] >= 3
    assert not workers()


def test_workers_do_not_outlive_who_needs_them(tree: Path, tmp_path: Path) -> None:
    """A process that is killed says nothing to its workers."""
    assert forked(tmp_path / "told.txt", _die_with_a_worker, tree) == -signal.SIGKILL
    worker = int((tmp_path / "told.txt").read_text())
    for _ in range(300):
        if not Path(f"/proc/{worker}").exists() or "(zombie)" in Path(f"/proc/{worker}/status").read_text():
            return
        time.sleep(0.1)
    pytest.fail("the worker is still there")


def _die_with_a_worker(tree: Path) -> None:
    batches = looks(tree)
    next(batches)
    print(workers()[0], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def test_damage_in_the_middle_of_a_run_is_no_loss(tree: Path, tmp_path: Path) -> None:
    """An image that has gone when it is its turn again."""
    chosen = settings(tree)
    images = sets.load(chosen).test
    (tree / "ant" / "3.png").unlink()
    with pytest.raises(UsageError, match=r"3\.png is not an image that can be read"):
        list(batches.eval_batches(images, chosen, image_size=8, in_chans=1, batch_size=4, device=torch.device("cpu")))
    assert not workers()
