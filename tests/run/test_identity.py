"""What a run is: the same configuration and images are the same run."""

import shutil
from pathlib import Path

from PIL import Image

from tests.conftest import TINY, Softmoe
from tests.runs import the_run


def test_the_images_are_part_of_what_a_run_is(softmoe: Softmoe, tmp_path: Path) -> None:
    for name, change in (("a", 0), ("b", 1)):
        for label, grey in (("x", 40), ("y", 200)):
            (tmp_path / name / label).mkdir(parents=True)
            for i in range(12):
                Image.new("L", (8, 8 + change), grey + i).save(tmp_path / name / label / f"{i}{change}.png")
    line = (
        "train",
        *TINY,
        "data=folder",
        "data.image_size=8",
        "data.channels=1",
        "train.steps=2",
        "train.batch_size=4",
    )
    assert softmoe(*line, "data.root=a").code == 0
    assert "is finished" not in softmoe(*line, "data.root=b").out
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    assert "is finished" in softmoe(*line, "data.root=moved").out
    assert softmoe(*line, "data.root=nowhere").code == 2
    assert len(list(tmp_path.glob("outputs/default/*/result.json"))) == 2


def test_signature_is_what_the_run_computes(softmoe: Softmoe, tmp_path: Path) -> None:
    line = ("train", *TINY, "train.steps=2")
    for other in ("seed=0", "output_root=other", "threads=1", "wandb.project=p", "train.eval_batch_size=7"):
        assert softmoe(*line, other).code == 0
    names = {path.parent.name for path in tmp_path.glob("*/default/*/result.json")}
    assert len(names) == 1
    assert softmoe(*line, "seed=1").code == 0
    assert softmoe(*line, "optim.lr=0.1").code == 0
    assert len({path.parent.name for path in tmp_path.glob("*/default/*/result.json")}) == 3


def test_dense_control_is_one_run_whatever_the_rivals_sweep(softmoe: Softmoe, tmp_path: Path) -> None:
    options = ("tracking=off", "train.steps=2", "model/router=dense", "model.backbone.width=16")
    for other in ("model.moe_blocks=last_1", "model.moe_blocks=last_2"):
        assert softmoe("train", *options, other).code == 0
    the_run(tmp_path)
