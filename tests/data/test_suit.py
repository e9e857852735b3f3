"""The default model follows the images: which side, which backbone, and that what is typed wins."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from softmoe_cli.config.run import Config
from softmoe_cli.data.suit import SIDES, backbone_for, side_for
from softmoe_cli.errors import UsageError
from softmoe_cli.options.compose import say_once
from softmoe_cli.options.conf_files import conf_folder
from softmoe_cli.run.identity import run_folder
from tests.conftest import TINY, Softmoe
from tests.oracles import compose

SHORTER = (40, 64, 65, 66, 120)


def drawn(root: Path, sides: tuple[int, ...] = SHORTER, classes: str = "ab") -> Path:
    """A picture of each shorter side per class, upright and lying, PNG and JPEG."""
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i, side in enumerate(sides):
            shape = (side, side + 9, 3) if i % 2 else (side + 30, side, 3)
            picture = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
            picture.save(root / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    return root


def of(root: Path, *overrides: str) -> Config:
    return compose("data=folder", f"data.root={root}", *overrides)


def test_every_side_has_a_backbone_of_few_tokens() -> None:
    folder = conf_folder() / "model/backbone"
    for side in SIDES:
        patch = yaml.safe_load((folder / f"{backbone_for(side)}.yaml").read_text())["patch_size"]
        assert side % patch == 0
        assert 9 <= (side // patch) ** 2 <= 196
    assert [backbone_for(side) for side in (16, 17, 32, 33, 96, 97, 10_000)] == [
        "vit_nano2", "vit_nano4", "vit_nano4", "vit_micro8", "vit_micro8", "vit_micro16", "vit_micro16"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("shorter", "patch", "side"),
    [
        ([8], None, 8), ([3], None, 8), ([28, 28, 28], None, 28), ([31, 31], None, 28), ([40, 64, 120], None, 64),
        ([80], None, 64), ([300, 500, 9], None, 224), ([2000], None, 224), ([64], 14, 56), ([64], 7, 63), ([8], 16, 16),
    ],
)  # fmt: skip
def test_the_median_image_fills_the_side(shorter: list[int], patch: int | None, side: int) -> None:
    assert side_for(shorter, patch) == side


def test_the_default_model_follows_the_files(tmp_path: Path) -> None:
    config = of(drawn(tmp_path / "images"))
    assert (config.data.image_size, config.model.image_size) == (64, 64)
    b = config.model.backbone
    assert (b.name, b.patch_size, b.width, b.depth, b.heads, b.mlp_width) == ("vit_micro8", 8, 128, 6, 4, 512)
    assert config.model.moe_blocks == [3, 4, 5]
    small = of(drawn(tmp_path / "small", (28, 28, 28, 28)))
    assert (small.model.image_size, small.model.name, small.model.moe_blocks) == (28, "vit_nano4_soft", [2, 3])
    assert of(tmp_path / "small", "model/router=tokens_choice").model.name == "vit_nano4_tokens_choice"


def test_known_sets_have_models_of_their_size_too() -> None:
    assert [compose(f"data={name}").model.backbone.name for name in ("digits", "cifar10")] == ["vit_nano2", "vit_nano4"]


def test_what_is_typed_wins(tmp_path: Path) -> None:
    root = drawn(tmp_path / "images")
    cases = {
        ("data.image_size=32",): (32, 32, "vit_nano4"),
        ("data.image_size=48", "model.image_size=96"): (48, 96, "vit_micro8"),
        ("model=vit_s16_soft",): (224, 224, "vit_s16"),
        ("model/backbone=vit_nano4", "model.backbone.width=48"): (64, 64, "vit_nano4"),
        ("model/backbone=vit_s14",): (56, 56, "vit_s14"),
        ("model/backbone=timm", "model.backbone.timm=vit_tiny_patch16_224", "model/router=dense"): (
            224, 224, "vit_tiny_patch16_224"
        ),
    }  # fmt: skip
    for typed, (decoded, seen, backbone) in cases.items():
        config = of(root, *typed)
        assert (config.data.image_size, config.model.image_size, config.model.backbone.name) == (
            decoded, seen, backbone
        ), typed  # fmt: skip
    assert of(tmp_path / "nowhere", "model=vit_s16_soft").data.image_size == 224  # no file is looked at


def test_auto_is_the_run_of_its_number(tmp_path: Path) -> None:
    root = drawn(tmp_path / "images")
    typed = of(root, "data.image_size=64", "train.max_tokens=9000")  # which changes no number either
    assert run_folder(of(root), "train", None, "x") == run_folder(typed, "train", None, "x")


def test_the_side_is_told(softmoe: Softmoe, tmp_path: Path) -> None:
    drawn(tmp_path / "images")
    say_once.cache_clear()
    answer = softmoe("cost", "data=folder", "data.root=images", "data.num_classes=2", "format=json")
    assert answer.code == 0, answer
    assert (
        "softmoe: data.image_size=auto: 64, as the shorter sides of the images have 40 to 120 pixels, median 65; type "
        "data.image_size=64 to have it whatever files come\n"
    ) in answer.err
    (row,) = [json.loads(answer.out)]
    assert (row["model"], row["tokens"]) == ("vit_micro8_soft", 64)


def test_archives_are_looked_into(tmp_path: Path) -> None:
    root = drawn(tmp_path / "images")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(root, "images")
    assert of(tmp_path / "images.tar").model.image_size == 64


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("data=folder", "data.root has no default"),
        ("data=folder data.root=nowhere", "data.root=nowhere is not a folder"),
        ("data=folder data.root=broken", "broken/a/1.png is not an image that can be read"),
        ("data.image_size=auto", "data.image_size=auto is for files of your own; give data=digits a number of pixels"),
        ("data.image_size=6.5", "data.image_size=6.5 is neither a whole number of pixels nor auto"),
        ("data=folder data.root=x data.image_size=0", "image_size=0 is out of range"),
        (
            "model=vit_nano2_soft data.image_size=224",
            "vit_nano2_soft at model.image_size=224 has 12,544 tokens, more than train.max_tokens=1024",
        ),
        ("data.image_size=1024", "vit_micro16_soft at model.image_size=1024 has 4,096 tokens"),
        ("train.max_tokens=15", "has 16 tokens, more than train.max_tokens=15"),
        (
            "model/backbone=timm model.backbone.timm=vit_tiny_patch16_224 model/router=dense model.image_size=64 "
            "train.max_tokens=16",
            "vit_tiny_patch16_224_dense at model.image_size=64 has 17 tokens",
        ),
    ],
)
def test_sides_and_tokens_that_cannot_be(line: str, words: str, softmoe: Softmoe, tmp_path: Path) -> None:
    (tmp_path / "broken/a").mkdir(parents=True)
    (tmp_path / "broken/b").mkdir()
    for name in "ab":
        (tmp_path / f"broken/{name}/1.png").write_bytes(b"no picture")
    answer = softmoe("train", *line.split())
    assert answer.code == 2 and words in answer.err, answer
    assert not (tmp_path / "outputs").exists()


def test_more_tokens_can_be_asked_for() -> None:
    assert compose("model=vit_nano2_soft", "data.image_size=80", "train.max_tokens=1600").model.image_size == 80
    with pytest.raises(UsageError, match="1,600 tokens"):
        compose("model=vit_nano2_soft", "data.image_size=80")


def test_a_checkpoint_decides_the_side(softmoe: Softmoe, tmp_path: Path) -> None:
    """Evaluated on its own set as it was trained; on other images, and finetuned, at the model's size."""
    drawn(tmp_path / "images", (8, 9, 10, 11, 9, 10))
    drawn(tmp_path / "other", (40, 40, 40, 41))
    line = ("train", *TINY, "data=folder", "data.root=images", "train.steps=2", "train.batch_size=4")
    assert softmoe(*line, "model.image_size=16", "data.image_size=8").code == 0
    (run,) = (tmp_path / "outputs/default").iterdir()
    result = json.loads((run / "result.json").read_text())
    own = softmoe("evaluate", f"checkpoint={run}", "data=folder", "data.root=images", "format=json")
    assert own.code == 0, own
    assert json.loads(own.out)["loss"] == pytest.approx(result["loss"], rel=1e-5)
    assert softmoe("evaluate", f"checkpoint={run}", "data=folder", "data.root=other").code == 0
    tuned = softmoe(
        "finetune", f"checkpoint={run}", "data=folder", "data.root=other", "train.steps=1", "train.batch_size=4",
        "tracking=off", "study=tuned",
    )  # fmt: skip
    assert tuned.code == 0, tuned
    (tuned_run,) = (tmp_path / "outputs/tuned").iterdir()
    assert yaml.safe_load((tuned_run / "config.yaml").read_text())["data"]["image_size"] == 16
