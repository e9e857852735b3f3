"""Weights to start from."""

import shutil
from pathlib import Path

import pytest

from softmoe_cli.options.inherit import named_source
from softmoe_cli.run.sealed import seal
from tests.conftest import TINY, Softmoe
from tests.runs import last, saved, the_run


def test_moved_checkpoints_do_not_need_their_run(softmoe: Softmoe, tmp_path: Path) -> None:
    assert softmoe("train", *TINY, "train.steps=2").code == 0
    shutil.copy(last(the_run(tmp_path)) / "model.safetensors", tmp_path / "alone.safetensors")
    shutil.rmtree(tmp_path / "outputs")
    assert softmoe("evaluate", "checkpoint=alone.safetensors").code == 0


def test_a_damaged_checkpoint_is_named_where_the_one_before_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        folder = tmp_path / "run" / "checkpoints" / f"last-{step:08d}"
        folder.mkdir(parents=True)
        saved(folder / "model.safetensors", step)
        seal(folder)
    whole = named_source(str(tmp_path / "run"))
    assert whole.label.endswith("last-00000002/model.safetensors") and not capsys.readouterr().err
    (folder / "model.safetensors").write_bytes(b"")
    before = named_source(str(tmp_path / "run"))
    assert before.label.endswith("last-00000001/model.safetensors") and before.digest != whole.digest
    told = "is taken, as newer ones are damaged: last-00000002: model.safetensors does not match its checksum"
    assert capsys.readouterr().err == f"softmoe: checkpoint={before.label} {told}\n"
