"""What a run says of itself: header, time, result."""

import json
from pathlib import Path

import pytest

from softmoe_cli.train.ending import chance, shown
from softmoe_cli.train.summary import _commit, remark
from tests.conftest import TINY, Softmoe
from tests.oracles import compose

RESULT = {"test_images": 18, "top1_pct": 100 * 6 / 18, "chance_pct": 100 * 6 / 18, "classes": 3, "tokens": 64}
FINISHED = {
    **RESULT, "top5_pct": 100.0, "loss": 1.0, "validation_top1_pct": 1.0, "best_validation_top1_pct": 1.0,
    "best_step": 1, "images": 1, "epochs": 1.0, "steps": 1, "train_pflop": 3.924e-4, "device_s": 63.0,
    "eval_s": 1.0, "save_s": 0.0, "compile_s": 0.0, "remark": "",
}  # fmt: skip


def test_chance() -> None:
    assert chance(RESULT) == (
        "top-1 cannot be told from chance: always the commonest of 3 classes is right for 33.3% of these 18 images"
    )
    assert chance(RESULT | {"top1_pct": 100 * 11 / 18}) == ""
    assert chance(RESULT | {"top1_pct": 0.0}) != ""
    skewed = {"test_images": 1000, "classes": 2, "chance_pct": 90.0}  # a model that says one class always
    assert chance(skewed | {"top1_pct": 90.0}) != "" and chance(skewed | {"top1_pct": 92.5}) == ""


def test_what_the_router_says_of_the_last_look(tmp_path: Path) -> None:
    """It is given the rows of the last look; a file that cannot be read is named instead."""
    file, model = tmp_path / "routing.jsonl", compose("model/router=soft").model

    def told(*last: dict[str, float]) -> str:
        rows = [{"step": 5, "block": 3, "dispatch_max": 0.9}]
        rows += [{"step": 9, "block": i} | row for i, row in enumerate(last)]
        file.write_text("".join(json.dumps({"format": 1} | row) + "\n" for row in rows))
        return remark(RESULT, tmp_path, model)

    almost = told({"dispatch_max": 0.020}, {"dispatch_max": 0.022})
    assert almost.startswith("still almost uniform") and "0.0210" in almost and "0.0156" in almost
    assert shown(FINISHED | {"remark": almost}, Path("x"))["routing"] == almost
    assert told({"dispatch_max": 0.9}) == "" and "routing" not in shown(FINISHED, Path("x"))
    assert remark(RESULT, tmp_path / "none", model) == ""
    for content in ('{"step":', "[1]\n", '{"step": "x"}'):
        file.write_text(content)
        assert "routing.jsonl is damaged in line 1" in remark(RESULT, tmp_path, model)
        assert remark(RESULT, tmp_path, compose("model/router=dense").model) == ""
    file.write_text("")
    assert remark(RESULT, tmp_path, model) == ""


def test_no_top5_of_five_classes() -> None:
    titled = shown(FINISHED, Path("x"))
    assert "test top-5" not in titled and "test top-5" in shown(FINISHED | {"classes": 6}, Path("x"))
    assert titled["training cost"] == "392.4 GFLOP, 1 min 3 s"


def test_a_run_tells_its_time_first_and_what_to_type_last(softmoe: Softmoe) -> None:
    """The same lines come again where the run is finished already."""
    answer = softmoe("train", *TINY, "train.steps=3", "output_root=my runs")
    assert answer.code == 0, answer
    lines = answer.out.splitlines()
    (time,) = [i for i, line in enumerate(lines) if line.startswith("  time ")]
    looks = [i for i, line in enumerate(lines) if line.startswith(("validation", "test  "))]
    assert time < looks[0]
    assert "3 times on validation images and once on test images" in lines[time]
    assert " a step: about " in lines[looks[0] - 1]  # measured, before the first evaluation
    run = next(line for line in lines if line.startswith("  folder"))[19:]
    next_lines = ["next", f"  softmoe evaluate checkpoint='{run}'", "  softmoe compare 'my runs/default'"]
    assert lines[-3:] == next_lines
    assert softmoe("train", *TINY, "train.steps=3", "output_root=my runs").out.splitlines()[-3:] == next_lines
    assert "MiB at the peak" in answer.out and ", 1 thread, " in answer.out


def test_a_machine_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert _commit() is None
