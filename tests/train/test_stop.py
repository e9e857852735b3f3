"""Signals save and leave."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from softmoe_cli.train.stop import Interrupted, Stop
from tests.conftest import TINY, Softmoe, thinned
from tests.processes import until
from tests.runs import finish, last, same, start, the_run


@pytest.mark.long
@pytest.mark.parametrize("names", thinned([["SIGUSR1"], ["SIGTERM", "SIGINT", "SIGUSR1"]], 1))
def test_signals_save_and_leave(names: list[str], tmp_path: Path) -> None:
    """One after the other: the run saves and leaves each time, and ends as if it had never stopped."""
    options = ("train.steps=500", "train.batch_size=8", "train.log_every=10")
    finish(start(tmp_path / "whole", *options))
    before = 0
    for name in names:
        process = start(tmp_path / "stopped", *options)
        metrics = tmp_path / "stopped" / "outputs"
        while sum(file.stat().st_size for file in metrics.glob("*/*/metrics.jsonl")) <= before:
            assert not process.ended, process.wait()
            time.sleep(0.005)
        process.send(getattr(signal, name))
        assert f"stopped by {name}; type the same command to go on" in finish(process, 130)
        assert not (the_run(tmp_path / "stopped") / "result.json").exists()
        before = sum(file.stat().st_size for file in metrics.glob("*/*/metrics.jsonl"))
    assert "going on from step" in finish(start(tmp_path / "stopped", *options))
    same(the_run(tmp_path / "whole"), the_run(tmp_path / "stopped"))
    found = (the_run(tmp_path / "stopped") / "metrics.jsonl").read_text().splitlines()
    for key in ("device_s", "eval_s", "save_s"):  # what was spent before a stop stays booked
        spent = [json.loads(line)[key] for line in found]
        assert spent == sorted(spent) and spent[-1] > 0, key


def test_a_signal_to_the_whole_group_saves(tmp_path: Path) -> None:
    """As Slurm and containers send it: the processes that decode images leave it to the one that trains."""
    for label, grey in (("x", 40), ("y", 200)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(12):
            Image.new("L", (8, 8), grey + i).save(tmp_path / "images" / label / f"{i}.png")
    process = start(
        tmp_path, "data=folder", "data.root=images", "data.image_size=8", "data.channels=1", "data.memory_gib=0",
        "data.workers=2", "train.steps=100000", "train.batch_size=4", "train.log_every=2",
    )  # fmt: skip
    until(lambda: list(tmp_path.glob("outputs/*/*/metrics.jsonl")), process)
    os.killpg(process.pid, signal.SIGTERM)
    out = finish(process, 130)
    assert "stopped by SIGTERM" in out and out.count("saving and leaving") == 1
    assert last(the_run(tmp_path)).is_dir()


def test_a_stop_during_validation_leaves_no_row(
    softmoe: Softmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("train", *TINY, "train.steps=40", "train.eval_every=20", "train.log_every=10")
    assert softmoe(*line, "output_root=whole").code == 0
    watch, calls = Stop.watch, 0

    def stopped(self: Stop, items: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:  # the validation at step 40
            self.name = "SIGTERM"
        return watch(self, items)

    monkeypatch.setattr(Stop, "watch", stopped)
    assert softmoe(*line, "output_root=stopped").code == 130
    assert calls == 2
    assert softmoe(*line, "output_root=stopped").code == 0
    whole, resumed = (next((tmp_path / root / "default").iterdir()) for root in ("whole", "stopped"))
    same(whole, resumed)
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (whole, resumed)]
    assert f"best-{json.loads((whole / 'result.json').read_text())['best_step']:08d}" in names[0]
    assert set(names[0]) <= {*names[1], *[name for name in names[0] if name.startswith("last")]}


def test_a_signal_that_nobody_can_be_told_of_still_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(_fd: int, _text: bytes) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", closed)
    stop = Stop()
    stop.hear(signal.SIGTERM)
    with pytest.raises(Interrupted):
        stop.check()
