"""Numbers that are not finite, and memory that ends, stop a run, with where that came from and the way out."""

from pathlib import Path
from typing import Any

import pytest
import torch

from softmoe_cli.train import loop
from tests.conftest import TINY, Softmoe
from tests.runs import the_run


def test_weights_that_explode_in_the_last_update_are_no_result(softmoe: Softmoe, tmp_path: Path) -> None:
    answer = softmoe("train", *TINY, "train.steps=1", "optim.warmup=0", "optim.lr=1e38", "optim.clip_norm=null")
    assert answer.code == 1, answer
    assert "validation loss" in answer.err and "lower optim.lr" in answer.err
    run = the_run(tmp_path)
    assert not (run / "result.json").exists() and not list((run / "checkpoints").iterdir())


def test_not_finite_stops_with_layer_step_and_batch(softmoe: Softmoe, tmp_path: Path) -> None:
    answer = softmoe("train", *TINY, "optim.lr=1e30", "optim.clip_norm=null", "train.steps=20", "optim.warmup=0")
    assert answer.code == 1, answer
    assert "not finite first in the output of blocks." in answer.err or "in the gradient of" in answer.err
    assert "at step " in answer.err and "batch of images" in answer.err
    assert not list(tmp_path.glob("outputs/*/*/result.json"))


@pytest.mark.parametrize(
    ("overrides", "ways"),
    [
        ((), "lower train.batch_size or raise train.accumulate or set train.recompute=true"),
        (("model/router=mumoe_cp", "model.router.num_experts=2"), "lower train.batch_size or set train.recompute=true"),
        (("train.recompute=true",), "lower train.batch_size or raise train.accumulate"),
    ],
    ids=("any", "norm=batch takes no parts", "recomputed already"),
)
def test_memory_that_ends_names_what_can_help(
    overrides: tuple[str, ...], ways: str, softmoe: Softmoe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(loop, "update", full)
    answer = softmoe("train", *TINY, *overrides)
    assert answer.code == 1, answer
    assert answer.err.strip().endswith(f"out of memory at step 0 (no room); {ways}"), answer.err
