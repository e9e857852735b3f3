"""data=exemplars: which images become classes, their fixed views, and the new views of every training batch."""

import functools
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from softmoe_cli.config.data import KNOWN_SETS, Data
from softmoe_cli.data.batches import Batch, eval_batches
from softmoe_cli.data.cache import Mapped
from softmoe_cli.data.contents import identity
from softmoe_cli.data.sets import is_here, load
from softmoe_cli.data.splits import Splits
from softmoe_cli.errors import UsageError
from softmoe_cli.options.conf_files import files, load_yaml
from softmoe_cli.run.identity import flat_science, signature
from tests.conftest import TINY, Softmoe
from tests.data.trees import CPU, augment, batches, write_tree
from tests.oracles import compose

DIGITS = ("data=exemplars", "data.source=digits")


@functools.cache
def _settings() -> Data:
    return compose(*DIGITS, "data.exemplars=50", "data.views=3").data


def settings(**changes: Any) -> Data:
    return replace(_settings(), num_classes=None, **changes).settled()


def pixels(images: Tensor | Mapped | None) -> list[bytes]:
    assert images is not None
    return [image.numpy().tobytes() for image in images]


def source_images(splits: Splits) -> torch.Tensor:
    assert isinstance(splits.train.images, torch.Tensor)
    return splits.train.images


def parts(splits: Splits) -> list[list[bytes]]:
    return [pixels(part.images) for part in (splits.train, splits.validation, splits.test)]


def some(splits: Splits, data: Data, count: int = 3, **others: Any) -> list[Batch]:
    """The first batches, of 16 images."""
    options: dict[str, Any] = {"batch_size": 16, "num_classes": len(splits.classes), "change": augment()} | others
    return list(itertools.islice(batches(splits.train, data, **options), count))


def test_classes_are_different_training_images_of_the_source() -> None:
    splits, source = load(settings()), load(settings().made_of)
    train, validation, test = parts(splits)
    assert [len(part) for part in parts(splits)] == [50, 150, 150] and len(set(train)) == 50
    assert set(train) <= set(pixels(source.train.images))  # so neither validation nor test images of the source
    assert not set(train) & set(pixels(source.test.images))
    assert splits.train.labels.tolist() == list(range(50))
    assert splits.validation.labels.tolist() == splits.test.labels.tolist() == list(range(50)) * 3
    assert len(set(validation + test + train)) == 350  # no view is another, or its image
    labels = dict(zip(pixels(source.train.images), source.train.labels.tolist(), strict=True))
    assert [name.split()[0] for name in splits.classes] == [str(labels[image]) for image in train]
    assert len(set(splits.classes)) == 50


def test_fewer_classes_and_views_are_the_first_of_more() -> None:
    """And all are a function of the cut alone."""
    many, few = load(settings(exemplars=600)), load(settings(views=2))
    assert few.classes == many.classes[:50] and few.classes != load(settings(split_seed=1)).classes[:50]
    for part in ("train", "validation", "test"):
        more, fewer = getattr(many, part), getattr(few, part)
        views = max(1, len(fewer) // 50)
        wanted = more.images.view(-1, 600, *more.images.shape[1:])[:views, :50].flatten(0, 1)
        assert torch.equal(fewer.images, wanted)
    assert parts(load(settings(strength=1.0))) == parts(load(settings()))
    weaker = load(settings(strength=0.5))
    assert weaker.classes == few.classes and parts(weaker)[1] != parts(load(settings()))[1]


def test_equal_images_are_one_class(tmp_path: Path) -> None:
    """Half of the files show what others show."""
    root = write_tree(tmp_path / "set", per_class=12)
    for number in range(6):
        (root / "ant" / f"{number}.png").write_bytes((root / "bee" / f"{number}.png").read_bytes())
    words = ("data=exemplars", "data.source=folder", f"data.root={root}", "data.image_size=8", "data.channels=3")
    splits = load(compose(*words, "data.exemplars=20").data)
    assert len(set(parts(splits)[0])) == 20 and splits.train.channels == 3
    with pytest.raises(UsageError, match=r"data\.exemplars=36 is more than the \d+ different training images"):
        load(compose(*words, "data.exemplars=36").data)


def test_training_views_are_a_function_of_seed_and_step() -> None:
    data = settings()
    splits = load(data)
    straight = some(splits, data, 6)
    for first in (1, 4):
        resumed = some(splits, data, 6 - first, first_step=first)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(straight[first:], resumed, strict=True))
    for rows in (torch.tensor([0, 5, 15]), torch.arange(8, 16), slice(0, 4)):
        of_rows = some(splits, data, 6, rows=rows)
        assert all(torch.equal(a[0][rows], b[0]) for a, b in zip(straight, of_rows, strict=True))
    assert not torch.equal(some(splits, data, 1, seed=1)[0][0], straight[0][0])


def test_training_views_never_come_again() -> None:
    """Nor are they validation or test views, or the image; and each is a view of its own class's image."""
    data = settings(exemplars=10, views=20)
    splits = load(data)
    made = torch.cat([batch[0] for batch in some(splits, data, 40)])
    raw = pixels((made * 127.5 + 127.5).round().to(torch.uint8))
    assert len(set(raw)) == 640 and not set(raw) & set(itertools.chain(*parts(splits)))
    labels = torch.cat([batch[1].argmax(dim=1) for batch in some(splits, data, 40)])
    source = (source_images(splits).float() - 127.5) / 127.5
    means = torch.stack([made[labels == label].mean(dim=0) for label in range(10)])
    nearest = torch.cdist(means.flatten(1), source.flatten(1)).argmin(dim=1)
    assert nearest.tolist() == list(range(10))


def test_strength_0_is_the_source() -> None:
    data = settings(strength=0.0)
    splits = load(data)
    train, validation, test = parts(splits)
    assert validation == test == train * 3
    for batch in some(splits, data):
        want = source_images(splits)[batch[1].argmax(dim=1)]
        torch.testing.assert_close(batch[0], want.float() / 127.5 - 1, atol=1e-6, rtol=0)


def test_views_go_with_other_changes_and_with_mixup() -> None:
    """Views are made first, of the images and of those that they are mixed with."""
    data = settings()
    splits = load(data)
    changes: list[dict[str, Any]] = [
        {"mixup": 0.5}, {"randaugment": [2, 10]}, {"erase": 1.0}, {"crop": "shift", "shift": 0.3}
    ]  # fmt: skip
    for change in changes:
        (whole,) = some(splits, data, 1, change=augment(**change))
        (part,) = some(splits, data, 1, change=augment(**change), rows=torch.tensor([2, 7]))
        assert torch.equal(whole[0][[2, 7]], part[0]) and torch.equal(whole[1][[2, 7]], part[1])
        assert not torch.equal(whole[0], some(splits, data, 1)[0][0])


def test_who_reads_training_images_sees_the_images_themselves() -> None:
    data = settings()
    splits = load(data)
    chosen = splits.train.subset(torch.arange(5, 15).numpy())
    assert chosen.strength == 1
    seen = next(eval_batches(chosen, data, image_size=8, in_chans=1, batch_size=10, device=CPU))
    torch.testing.assert_close(seen[0] * 127.5 + 127.5, source_images(splits)[5:15].float())


def test_pixels_and_head_follow_the_source() -> None:
    for name, side in KNOWN_SETS.items():
        assert load_yaml(files("data")[name]).get("image_size", 32) == side  # cifar100 inherits it
    config = compose("data=exemplars", "data.source=cifar10", "data.exemplars=70", "data.root=x")
    assert config.data.image_size == config.model.image_size == 32 and config.data.num_classes == 70
    assert is_here(settings()) and not is_here(config.data)
    assert compose(*DIGITS, "model.image_size=16", "model/backbone=vit_nano4").data.image_size == 8


def test_what_a_view_is_belongs_to_the_run(tmp_path: Path) -> None:
    """Not the place of the source; and a run on another set has none of these keys."""
    config = compose(*DIGITS)

    def mark(**changes: Any) -> str:
        return signature(replace(config, data=settings(**changes)), "train", None, None)

    changes: list[dict[str, Any]] = [
        {"exemplars": 51},
        {"views": 4},
        {"strength": 0.9},
        {"split_seed": 1},
        {"source": "cifar10"},
    ]
    assert len({mark(), *(mark(**each) for each in changes)}) == 6 and mark(root="elsewhere") == mark()
    own = {"data.source", "data.exemplars", "data.strength", "data.views"}
    assert own <= flat_science(config).keys() and not own & flat_science(compose("data=digits")).keys()
    folders = [write_tree(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    words = ("data=exemplars", "data.source=folder", "data.image_size=8", "data.exemplars=5")
    digests = [identity(compose(*words, f"data.root={root}").data) for root in folders]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("data.exemplars=1", r"data\.exemplars=1 is out of range: it must be >= 2"),
        ("data.strength=-0.5", r"data\.strength=-0\.5 is out of range: it must be >= 0 and <= 2"),
        ("data.views=0", r"data\.views=0 is out of range"),
        ("data.source=exemplars", r"data\.source=exemplars is not one of digits"),
        ("data.source=mix", r"data\.source=mix is not one of digits"),
        ("data.source=fashion_mist", r"is not one of .*Did you mean 'fashion_mnist'\?"),
        ("data.source=null", r"data\.source=null is not one of digits"),
        ("data.strength=null", r"data\.strength=null: data=exemplars needs a value"),
        ("data.from_file=true", r"data\.from_file=true: views are made of images in memory"),
        ("data.crop_pct=0.9", r"data\.crop_pct=0\.9 has no effect on data=digits"),
        ("data.test_fraction=1", r"data\.test_fraction=1 leaves no training images"),
        ("data.num_classes=40", r"data\.num_classes=40 is less than the 50 classes found"),
        ("data.exemplars=1400", r"is more than the 1,3\d\d different training images of data\.source=digits; lower it"),
        ("data.memory_gib=0.00001", r"data\.views=3 of data\.exemplars=50 classes.*more than data\.memory_gib=1e-05"),
    ],
)
def test_what_cannot_be(words: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load(compose(*DIGITS, "data.exemplars=50", "data.views=3", words).data)


def test_these_options_are_for_exemplars_alone() -> None:
    data = compose("data=digits").data
    for change in ({"source": "digits"}, {"exemplars": 5}, {"strength": 1.0}, {"views": 2}):
        with pytest.raises(UsageError, match="has no effect on data=digits; say data=exemplars"):
            replace(data, **change).settled()


def test_data_check(softmoe: Softmoe, tmp_path: Path) -> None:
    answer = softmoe("data", "check", *DIGITS, "data.exemplars=30", "data.views=2", "format=json")
    report = json.loads(answer.out)
    assert answer.code == 0 and (report["classes"], report["images"], report["faults"]) == (30, 150, [])
    assert report["notes"][0].startswith("a view: turned by ±20°")
    same = softmoe("data", "check", *DIGITS, "data.exemplars=30", "data.views=2", "data.strength=0")
    assert same.code == 1 and "60 images of validation are in train too" in same.out
    write_tree(tmp_path / "set")
    words = ("data=exemplars", "data.source=folder", "data.root=set", "data.exemplars=5", "format=json")
    report = json.loads(softmoe("data", "check", *words).out)
    assert {row["width_min"] for row in report["parts"]} == {8}  # the sides of these files have 8 to 13 pixels


def results(name: str) -> tuple[str, dict[str, Any]]:
    """Folder and result.json of the run of that name."""
    (folder,) = Path("outputs/default").glob(f"{name}-*")
    return str(folder), json.loads((folder / "result.json").read_text())


START = (*TINY, *DIGITS, "data.exemplars=20", "data.views=2", "data.split_seed=3", "train.steps=1", "name=start")


def test_from_exemplars_to_the_source_itself(softmoe: Softmoe) -> None:
    """The source is cut as it was for the exemplars."""
    trained = softmoe("train", *START)
    assert trained.code == 0 and "a view" in trained.out, trained
    run, row = results("start")
    assert (row["data"], row["classes"], row["train_images"], row["test_images"]) == ("exemplars", 20, 20, 40)
    assert row["data.strength"] == 1 and not row["test_is_cut"]
    tuned = softmoe("finetune", f"checkpoint={run}", "data=digits", "train.steps=1", "tracking=off", "name=end")
    assert tuned.code == 0, tuned
    _, row = results("end")
    assert (row["classes"], row["data.split_seed"], row["test_images"]) == (10, 3, 359)
    assert "data.source" not in row


@pytest.mark.thorough
def test_a_checkpoint_of_exemplars_is_evaluated(softmoe: Softmoe) -> None:
    """On its own views, on stronger ones, few-shot on the source."""
    assert softmoe("train", *START).code == 0
    run, row = results("start")
    again = json.loads(softmoe("evaluate", f"checkpoint={run}", "format=json").out)
    assert again["loss"] == pytest.approx(row["loss"], rel=1e-6)
    words = (*DIGITS, "data.exemplars=20", "data.strength=2")
    harder = json.loads(softmoe("evaluate", f"checkpoint={run}", *words, "format=json").out)
    assert harder["images"] == 200 and harder["loss"] != again["loss"]
    shots = softmoe("evaluate", f"checkpoint={run}", "data=digits", "fewshot=[2]", "format=json")
    assert json.loads(shots.out)["fewshot_2_images"] == 20, shots
    others = softmoe("evaluate", f"checkpoint={run}", *DIGITS, "data.exemplars=20", "data.split_seed=4")
    assert others.code == 2 and f"checkpoint={run}/checkpoints/" in others.err and "knows 20 classes" in others.err
