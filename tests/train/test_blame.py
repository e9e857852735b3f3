"""Numbers that are not finite stop a run, with where they came from."""

from pathlib import Path

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
