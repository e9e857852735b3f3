"""`softmoe data check` on sets that were made faulty on purpose, each in one way."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import Answer, Softmoe
from tests.images import CLASSES, WHOLE, as_tfds, pack, picture, write

CLEAN = ("data", "check", "data=folder", "data.root=images", "data.workers=0")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write(tmp_path / "images", WHOLE)


def told(softmoe: Softmoe, *changes: str) -> tuple[Answer, dict[str, Any]]:
    """The table's answer and the report."""
    table, report = softmoe(*CLEAN, *changes), softmoe(*CLEAN, *changes, "format=json")
    assert table.code == report.code
    return table, json.loads(report.out)


def test_a_clean_set(softmoe: Softmoe, images: Path) -> None:
    table, report = told(softmoe)
    assert table.code == 0 and "every image was read" in table.out
    assert (report["data"], report["classes"], report["images"], report["faults"]) == ("folder", 3, 36, [])
    parts = {row["part"]: row for row in report["parts"]}
    assert {part: row["images"] for part, row in parts.items()} == {"train": 27, "validation": 3, "test": 6}
    assert [parts["train"][f"per_class_{key}"] for key in ("min", "median", "max")] == [9, 9, 9]
    size = sum(len(content) for content in WHOLE.values())
    assert sum(row["mib"] for row in parts.values()) == pytest.approx(size / 2**20)


def test_sizes_balance_and_repetitions(softmoe: Softmoe, images: Path) -> None:
    write(images, {"train/ant/wide.png": picture(500, (20, 9)), "train/ant/again.png": WHOLE["train/ant/1.png"]})
    table, report = told(softmoe, "data.validation_fraction=0.01")
    assert table.code == 0, table
    rows = report["parts"]
    assert sum(row["images"] for row in rows[:2]) == 32 and rows[0]["part"] == "train"
    assert max(row["width_max"] for row in rows) == 20 and max(row["height_max"] for row in rows) == 9
    assert sum(row["again"] for row in rows[:2]) in (0, 1)  # the two may have come into two parts


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files(softmoe: Softmoe, images: Path, workers: int) -> None:
    (images / "train/bee/3.png").write_bytes(WHOLE["train/bee/3.png"][:60])
    (images / "val/cat/0.png").write_bytes(b"woof")
    table, report = told(softmoe, f"data.workers={workers}")
    assert table.code == 1 and "wrong: test: 1 of 6 images cannot be read" in table.out
    faults = [fault for fault in report["faults"] if fault["kind"] == "unreadable"]
    assert len(faults) == len(report["faults"]) == 2
    for fault, name in zip(faults, ("train/bee/3.png", "val/cat/0.png"), strict=True):
        (place,) = fault["places"]
        assert f"images/{name} is not an image that can be read" in place


def test_empty_and_odd_classes(softmoe: Softmoe, images: Path) -> None:
    for part in ("train", "val"):
        (images / part / "dog").mkdir()
    (images / "val" / "cow").mkdir()
    write(images, {"val/cow/0.png": picture(600)})
    table, report = told(softmoe)
    assert table.code == 1 and report["classes"] == 5
    sentences = [fault["sentence"] for fault in report["faults"]]
    assert len(sentences) == 3 and all("holds no image" in sentence for sentence in sentences[:2])
    assert "different classes: cow" in sentences[2]
    assert [row["part"] for row in report["parts"]] == ["train", "val"]  # as they lie: a run could not split them


def test_the_same_pixels_in_train_and_test(softmoe: Softmoe, images: Path) -> None:
    """Found in another kind of file too; nothing else is."""
    with Image.open(images / "train/bee/4.png") as image:
        image.save(images / "val/bee/copy.bmp")
    table, report = told(softmoe)
    assert table.code == 1 and "1 images of test are in" in table.out
    (fault,) = report["faults"]
    assert fault["kind"] == "duplicates"
    assert fault["places"] == ["images/train/bee/4.png = images/val/bee/copy.bmp"]


def test_the_same_pixels_under_two_labels(softmoe: Softmoe, images: Path) -> None:
    write(images, {"val/ant/x.png": WHOLE["val/cat/1.png"]})
    table, report = told(softmoe)
    assert table.code == 1
    (fault,) = report["faults"]
    assert fault["kind"] == "labels" and fault["places"] == ["images/val/ant/x.png = images/val/cat/1.png"]


def test_a_set_that_cannot_be_split(softmoe: Softmoe, images: Path) -> None:
    for i in range(1, 10):
        (images / f"train/bee/{i}.png").unlink()
    table, report = told(softmoe)
    assert table.code == 1
    (fault,) = report["faults"]
    assert fault["kind"] == "split" and "leaves no image of class bee for training" in fault["sentence"]


def test_archives_of_which_a_part_lacks_a_class(softmoe: Softmoe, tmp_path: Path) -> None:
    for part, first, labels in (("train", 0, [0, 1, 2] * 4), ("val", 50, [0, 2])):
        pictures = {f"{i}.png": picture(first + i) for i in range(len(labels))}
        pack(tmp_path / f"set/{part}.tar", pictures | {f"{i}.cls": b"%d" % label for i, label in enumerate(labels)})
    answer = softmoe("data", "check", "data=webdataset", "data.root=set", "data.workers=0", "format=json")
    (fault,) = json.loads(answer.out)["faults"]
    assert answer.code == 1 and (fault["sentence"], fault["places"]) == ("1 of 3 classes have no test image", ["1"])


def test_more_classes_than_are_asked_for(softmoe: Softmoe, images: Path) -> None:
    """A run is refused, and so is the set."""
    table, report = told(softmoe, "data.num_classes=2")
    assert table.code == 1 and "wrong: data.num_classes=2 is less than the 3 classes found" in table.out
    assert [row["part"] for row in report["parts"]] == ["train", "val"]


def test_archives_and_what_cannot_be_read_at_all(softmoe: Softmoe, tmp_path: Path) -> None:
    as_tfds(tmp_path / "tfds")
    line = ("data", "check", "data.workers=0", "format=json")
    answer = softmoe(*line, "data=tfds", "data.root=tfds")
    assert answer.code == 0 and json.loads(answer.out)["images"] == 36
    (tmp_path / "tfds/label.labels.txt").write_text("\n".join([*CLASSES, "dog"]))
    report = json.loads(softmoe(*line, "data=tfds", "data.root=tfds").out)
    assert [(fault["kind"], fault["places"]) for fault in report["faults"]] == [("classes", ["dog"])]
    packed = pack(tmp_path / "all.tar", WHOLE)
    packed.write_bytes(packed.read_bytes()[:5000])
    answer = softmoe(*line, "data=folder", "data.root=all.tar")
    assert answer.code == 2 and "must be uncompressed and whole" in answer.err
    assert softmoe("data").code == softmoe("data", "chek").code == 2
    assert "exit status 1 if it is faulty" in softmoe("data", "check", "--help").out


def test_sets_in_memory(softmoe: Softmoe) -> None:
    answer = softmoe("data", "check", "format=json")
    assert answer.code == 0, answer
    report = json.loads(answer.out)
    assert [row["images"] for row in report["parts"]] == [1295, 143, 359]
    assert report["parts"][0]["width_max"] == 8
