"""zero_computation in the commands: batches of any size in evaluation."""

import json
from pathlib import Path

import pytest

from tests.conftest import TINY, Softmoe
from tests.runs import saved, the_run

GROUPED = ("model/router=zero_computation", "model.router.images_per_group=8")


def test_an_evaluation_takes_batches_of_any_size(softmoe: Softmoe, tmp_path: Path) -> None:
    """Groups are for training; another router's would change what is evaluated."""
    path = saved(tmp_path / "one.safetensors", 0, *GROUPED)
    rows = []
    for size in (5, 128):
        answer = softmoe("evaluate", f"checkpoint={path}", f"batch_size={size}", "format=json")
        assert answer.code == 0, answer
        rows.append(json.loads(answer.out))
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-6)
    other = saved(tmp_path / "other.safetensors", 0, "model/router=tokens_choice", GROUPED[1])
    assert "batch_size=5 is not a multiple" in softmoe("evaluate", f"checkpoint={other}", "batch_size=5").err


@pytest.mark.thorough
def test_every_command_takes_them(softmoe: Softmoe, tmp_path: Path) -> None:
    line = ("train", *TINY, *GROUPED, "train.steps=2", "train.batch_size=16", "train.eval_batch_size=7")
    assert softmoe(*line).code == 0
    run = the_run(tmp_path)
    answer = softmoe("export", f"checkpoint={run}", "images=5", "formats=[torch_export]", "folder=out")
    assert answer.code == 0 and "images at a time: any" in answer.out, answer
    dense = ("train", *[word for word in (*TINY, *line[-3:]) if "router" not in word], "model/router=dense")
    assert softmoe(*dense, "study=dense").code == 0
    start = next((tmp_path / "outputs/dense").iterdir())
    up = ("upcycle", f"checkpoint={start}", *GROUPED, "model.router.num_experts=4", "model.moe_blocks=last_1")
    assert softmoe(*up, "images=5", "folder=up").code == 0
    refused = softmoe(*up, "model/router=tokens_choice", "images=5", "folder=other")
    assert refused.code == 2 and "images=5 is not a multiple" in refused.err
