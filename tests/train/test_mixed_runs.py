"""Runs on several sets: what they write down, and that a kill or several processes change nothing of it."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from softmoe_cli.data.mix import MixedSet
from softmoe_cli.data.order import TaskDraws
from softmoe_cli.data.sets import load
from softmoe_cli.run import rows as declared
from tests.conftest import Softmoe
from tests.mixes import mix, write_clothes
from tests.oracles import compose
from tests.processes import Started, torchrun
from tests.runs import finish, kill_five_times, last, rows, same, the_run

EXPERT, TABLE, HEAD = 2 * 16 * 32 + 32 + 16, 2 * 4 - 2, 10 * 17
"""Parameters of an expert of the tiny mixture, what its table loses with one task and two experts, and its head."""


def test_what_a_run_writes_down(softmoe: Softmoe, tmp_path: Path) -> None:
    words = mix(write_clothes(tmp_path / "sets"), "train.steps=8", "train.eval_every=0.25", "model.router.noise_std=40",
                "optim.lr=0.3", "threads=1")  # fmt: skip
    answer = softmoe("train", *words)
    assert answer.code == 0, answer
    assert "experts          digits: block 1: " in answer.out and "; mean over tasks " in answer.out
    run = the_run(tmp_path)
    looks = declared.lines(run / "routing.jsonl", declared.ROUTING)
    for before, now in itertools.pairwise(looks):
        assert [*now["task_experts"]] == ["digits", "fashion_mnist"]
        moved = sum(before["task_experts"][name] != own for name, own in now["task_experts"].items())
        assert now["task_changes"] == moved
        one, other = (set(own) for own in now["task_experts"].values())
        assert now["task_overlap"] == len(one & other) / len(one | other)
    assert "task_changes" not in looks[0]
    row = [row for row in rows(run) if row["split"] == "validation"][-1]
    taken = [int(row[f"tasks_of_expert_{expert}_block_1"]) for expert in range(4)]
    assert taken == [sum(expert in own for own in looks[-1]["task_experts"].values()) for expert in range(4)]
    result = json.loads((run / "result.json").read_text())
    own, other = result["task_digits_top1_pct"], result["task_fashion_mnist_top1_pct"]
    assert result["mean_over_tasks_top1_pct"] == pytest.approx((own + other) / 2)
    assert result["top1_pct"] == pytest.approx((359 * own + 40 * other) / 399)
    assert result["validation_task_digits_top1_pct"] == row["task_digits_top1_pct"]
    assert result["chance_pct"] == pytest.approx(100 * (37 + 4) / 399)
    assert result["served_as"] == "task" and "served as        one task alone (softmoe extract): " in answer.out
    assert result["params_m"] - result["served_params_m"] == pytest.approx((2 * EXPERT + TABLE + HEAD) / 1e6)
    config = compose(*words)
    images = load(config.data).train
    assert isinstance(images, MixedSet)
    drawn = TaskDraws(images, 5.0, 32, config.seed).before(8).tolist()
    epochs = [result[f"task_{name}_epochs"] for name in ("digits", "fashion_mnist")]
    assert epochs == [drawn[0] / 1295, drawn[1] / 110]


@pytest.mark.thorough
def test_killed_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    words = mix(write_clothes(tmp_path / "sets"), "train.steps=60", "train.save_seconds=0", "train.eval_every=10",
                "train.ema=0.9", "threads=1")  # fmt: skip
    finish(Started(tmp_path / "whole", ["train", *words], {}))
    kill_five_times(lambda: Started(tmp_path / "killed", ["train", *words], {}), tmp_path / "killed")
    finish(Started(tmp_path / "killed", ["train", *words], {}))
    same(the_run(tmp_path / "whole"), the_run(tmp_path / "killed"))


@pytest.mark.long
@pytest.mark.thorough
def test_a_compiled_run_loses_as_much(tmp_path: Path) -> None:
    """In a process of its own, where no shape checker is in the way; noise would be drawn otherwise when compiled."""
    clothes = write_clothes(tmp_path / "sets")
    for flag in ("true", "false"):
        words = mix(clothes, "train.steps=4", "model.backbone.depth=1", "model.moe_blocks=[0]", "threads=1",
                    "model.router.noise_std=0", f"train.compile={flag}")  # fmt: skip
        finish(Started(tmp_path / flag, ["train", *words], {"TORCHINDUCTOR_COMPILE_THREADS": "1"}))
    compiled, eager = (rows(the_run(tmp_path / flag)) for flag in ("true", "false"))
    for x, y in zip(compiled, eager, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("way", ["ddp", "fsdp", "expert"])
def test_several_processes_are_as_one(way: str, tmp_path: Path) -> None:
    """Noise, the tasks of images, their masks and the balance: rows and weights agree."""
    words = ["train", *mix(write_clothes(tmp_path / "sets"), "train.steps=6", "train.label_smoothing=0.1", "threads=1")]
    finish(Started(tmp_path / "one", words, {}))
    several = [
        Started(tmp_path / "several", [*words, f"parallel={way}"], environment, f"{rank}.txt")
        for rank, environment in enumerate(torchrun(2))
    ]
    for each in several:
        finish(each)
    one, other = (the_run(tmp_path / name) for name in ("one", "several"))
    for mine, theirs in zip(rows(one, "routing.jsonl"), rows(other, "routing.jsonl"), strict=True):
        assert mine["task_experts"] == theirs["task_experts"]
    a, b = (load_file(last(run) / "model.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], atol=1e-4, rtol=1e-4)
    x, y = (json.loads((run / "result.json").read_text()) for run in (one, other))
    assert x["task_digits_epochs"] == y["task_digits_epochs"]
    assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)
