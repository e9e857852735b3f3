"""Weights to start from."""

import shutil
from pathlib import Path

from tests.conftest import TINY, Softmoe
from tests.runs import last, the_run


def test_moved_checkpoints_do_not_need_their_run(softmoe: Softmoe, tmp_path: Path) -> None:
    assert softmoe("train", *TINY, "train.steps=2").code == 0
    shutil.copy(last(the_run(tmp_path)) / "model.safetensors", tmp_path / "alone.safetensors")
    shutil.rmtree(tmp_path / "outputs")
    assert softmoe("evaluate", "checkpoint=alone.safetensors").code == 0
