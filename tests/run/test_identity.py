"""What a run is: the same configuration and images are the same run."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from softmoe_cli.data.contents import identity
from softmoe_cli.run.identity import run_folder
from tests.conftest import TINY, Softmoe
from tests.oracles import compose
from tests.runs import the_run

FILES = (*TINY, "data=folder", "data.image_size=8", "data.channels=1", "train.steps=2", "train.batch_size=4")


def folder_of(*words: str) -> Path:
    """Where the run of these words goes, as `softmoe train` decides it."""
    config = compose(*words)
    return run_folder(config, "train", None, identity(config.data))


def write_two_sets(folder: Path) -> None:
    """`a`, `b` with other pixels, and `moved`, which are those of `a`."""
    for name, change in (("a", 0), ("b", 1)):
        for label, grey in (("x", 40), ("y", 200)):
            (folder / name / label).mkdir(parents=True)
            for i in range(12):
                Image.new("L", (8, 8 + change), grey + i).save(folder / name / label / f"{i}{change}.png")
    shutil.copytree(folder / "a", folder / "moved")


def test_the_images_are_part_of_what_a_runs_folder_is(tmp_path: Path) -> None:
    write_two_sets(tmp_path)
    a, b, moved = (folder_of(*FILES, f"data.root={tmp_path / name}") for name in ("a", "b", "moved"))
    assert a == moved != b


def test_a_runs_folder_is_named_after_what_it_computes() -> None:
    idle = ("seed=0", "output_root=other", "threads=1", "wandb.project=p", "train.eval_batch_size=7")
    assert len({folder_of(*TINY, word).name for word in idle}) == 1
    assert len({folder_of(*TINY, word).name for word in ("seed=0", "seed=1", "optim.lr=0.1")}) == 3
    places = ("model.moe_blocks=last_1", "model.moe_blocks=last_2")
    assert len({folder_of("model/router=dense", word) for word in places}) == 1
    assert len({folder_of("model/router=soft", word) for word in places}) == 2


@pytest.mark.thorough
def test_the_images_are_part_of_what_a_run_is(softmoe: Softmoe, tmp_path: Path) -> None:
    write_two_sets(tmp_path)
    line = ("train", *FILES)
    assert softmoe(*line, "data.root=a").code == 0
    assert "is finished" not in softmoe(*line, "data.root=b").out
    assert "is finished" in softmoe(*line, "data.root=moved").out
    assert softmoe(*line, "data.root=nowhere").code == 2
    assert len(list(tmp_path.glob("outputs/default/*/result.json"))) == 2


@pytest.mark.thorough
def test_signature_is_what_the_run_computes(softmoe: Softmoe, tmp_path: Path) -> None:
    line = ("train", *TINY, "train.steps=2")
    for other in ("seed=0", "output_root=other", "threads=1", "wandb.project=p", "train.eval_batch_size=7"):
        assert softmoe(*line, other).code == 0
    names = {path.parent.name for path in tmp_path.glob("*/default/*/result.json")}
    assert len(names) == 1
    assert softmoe(*line, "seed=1").code == 0
    assert softmoe(*line, "optim.lr=0.1").code == 0
    assert len({path.parent.name for path in tmp_path.glob("*/default/*/result.json")}) == 3


@pytest.mark.thorough
def test_dense_control_is_one_run_whatever_the_rivals_sweep(softmoe: Softmoe, tmp_path: Path) -> None:
    options = ("tracking=off", "train.steps=2", "model/router=dense", "model.backbone.width=16")
    for other in ("model.moe_blocks=last_1", "model.moe_blocks=last_2"):
        assert softmoe("train", *options, other).code == 0
    the_run(tmp_path)
