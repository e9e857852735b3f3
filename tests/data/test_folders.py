"""Folders of images: parts and classes, what is read, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from softmoe_cli.data.contents import identity
from softmoe_cli.data.sets import load
from tests.data.trees import CLASSES, SIDE, files, folder, pixels, refused, same, write_image, write_tree
from tests.oracles import compose


def test_a_single_tree_is_split(tree: Path) -> None:
    splits = load(folder(tree, validation_fraction=0.2, test_fraction=0.3))
    sets = [splits.train, splits.validation, splits.test]
    assert sorted(file for one in sets for file in files(one)) == sorted(tree.rglob("*.png"))
    assert [one.labels.bincount().tolist() for one in sets] == [[3] * 3, [1] * 3, [2] * 3]
    assert splits.classes == list(CLASSES)
    for one in sets:
        assert [CLASSES[label] for label in one.labels.tolist()] == [file.parent.name for file in files(one)]
        assert pixels(one).shape == (len(one), 3, SIDE, SIDE)
    assert same(splits, load(folder(tree, validation_fraction=0.2, test_fraction=0.3)))


def test_val_is_the_test_set_unless_there_is_one(tmp_path: Path) -> None:
    write_tree(tmp_path / "train", 5)
    write_tree(tmp_path / "val", 2, seed=1)
    two = load(folder(tmp_path, validation_fraction=0.2))
    assert [len(two.train), len(two.validation), len(two.test)] == [12, 3, 6]
    assert {file.parts[-3] for file in files(two.train) + files(two.validation)} == {"train"}
    assert {file.parts[-3] for file in files(two.test)} == {"val"}
    write_tree(tmp_path / "test", 1, seed=2)
    three = load(folder(tmp_path))
    assert [len(three.train), len(three.validation), len(three.test)] == [15, 6, 3]
    assert {file.parts[-3] for file in files(three.validation)} == {"val"}


def test_missing_root(tmp_path: Path) -> None:
    refused(folder(tmp_path / "nowhere"), r"data\.root=.*nowhere is not a folder")


def test_no_classes(tmp_path: Path) -> None:
    write_image(tmp_path / "loose.png", np.random.default_rng(0))
    (tmp_path / ".hidden").mkdir()
    refused(folder(tmp_path), "has no class folders")


def test_empty_class(tmp_path: Path) -> None:
    write_tree(tmp_path)
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "notes.txt").write_text("woof")
    refused(folder(tmp_path), r"class folder .*dog holds no image \(\.jpg")


def test_links_are_followed_once(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "real")
    (tmp_path / "linked").mkdir()
    for name in CLASSES:
        (tmp_path / "linked" / name).mkdir()
        (tmp_path / "linked" / name / "more").symlink_to(root / name)
        (tmp_path / "linked" / name / "again").symlink_to(tmp_path / "linked" / name)
    real, linked = (load(folder(path)).train for path in (root, tmp_path / "linked"))
    assert torch.equal(real.labels, linked.labels) and torch.equal(pixels(real), pixels(linked))


def test_parts_are_in_small_letters(tmp_path: Path) -> None:
    for part in ("Train", "Val"):
        write_tree(tmp_path / part)
    refused(folder(tmp_path), "Train must be called train")
    (tmp_path / "Train").rename(tmp_path / "training")
    (tmp_path / "Val").rename(tmp_path / "val")
    refused(folder(tmp_path), "training must be called train")
    (tmp_path / "training").rename(tmp_path / "Train")
    (tmp_path / "val").rename(tmp_path / "held")
    refused(folder(tmp_path), "Train must be called train")


def test_one_class_may_be_called_like_a_part(tmp_path: Path) -> None:
    assert load(folder(write_tree(tmp_path, classes=("invalid", "valid")))).classes == ["invalid", "valid"]


def test_held_out_files_come_mixed_and_always_the_same(tmp_path: Path) -> None:
    """Groups of images, and the first batch, would be of one class."""
    for part in ("train", "val"):
        write_tree(tmp_path / part)
    one, two = load(folder(tmp_path)), load(folder(tmp_path))
    assert same(one, two)
    for images in (one.validation, one.test):
        assert sorted(images.labels.tolist()) != images.labels.tolist()
    assert one.test.files is not None
    names = sorted(place.relative_to(tmp_path) for place in one.test.files.places)
    assert names == sorted(path.relative_to(tmp_path) for path in (tmp_path / "val").glob("*/*"))


def test_hidden_folders_hold_no_images(tmp_path: Path) -> None:
    plain = load(folder(write_tree(tmp_path)))
    (tmp_path / CLASSES[0] / ".thumbnails").mkdir()
    write_image(tmp_path / CLASSES[0] / ".thumbnails" / "1.png", np.random.default_rng(9))
    assert same(plain, load(folder(tmp_path)))


def test_classes_half_unpacked_are_refused(tmp_path: Path) -> None:
    write_tree(tmp_path)
    for name in CLASSES:
        (tmp_path / f"{name}.tar").write_bytes(b"")
    assert load(folder(tmp_path)).classes == sorted(CLASSES), "tars that were unpacked may stay"
    (tmp_path / "dog.tar").write_bytes(b"")
    refused(folder(tmp_path), r"class folders, and dog\.tar beside them; unpack it")
    for name in CLASSES:
        (tmp_path / f"{name}.tar").unlink(missing_ok=name != "dog")
    (tmp_path / "dog.tar").write_bytes(b"")
    refused(folder(tmp_path), r"class folders, and dog\.tar beside them; unpack it")


def test_identity_is_what_the_folder_holds(tmp_path: Path) -> None:
    a, b = write_tree(tmp_path / "a"), write_tree(tmp_path / "b")
    before = identity(folder(a))
    assert before == identity(folder(b))
    (b / CLASSES[0] / "0.png").rename(b / CLASSES[0] / "another.png")
    assert identity(folder(b)) != before == identity(folder(a))
    assert identity(compose().data) is None


def test_different_classes(tmp_path: Path) -> None:
    write_tree(tmp_path / "train")
    write_tree(tmp_path / "val", classes=("ant", "bee", "cow"))
    refused(folder(tmp_path), "val and .*train have different classes: cat, cow")


def test_one_class(tmp_path: Path) -> None:
    write_tree(tmp_path, classes=("ant",))
    refused(folder(tmp_path), "has one class folder only, ant")


def test_too_few_images(tmp_path: Path) -> None:
    write_tree(tmp_path, per_class=1)
    refused(folder(tmp_path), r"data\.test_fraction=0\.1 leaves no image of class ant for training")
    write_tree(tmp_path, per_class=2)
    refused(folder(tmp_path), r"data\.validation_fraction=0\.1 leaves no image of class ant for training")


def test_too_few_outputs(tree: Path) -> None:
    refused(folder(tree, num_classes=2), r"data\.num_classes=2 is less than the 3 classes found")
    assert load(folder(tree, num_classes=3)).classes == list(CLASSES)


@pytest.mark.parametrize("parts", [["train"], ["val"], ["test"], ["val", "test"]])
def test_incomplete_splits(tmp_path: Path, parts: list[str]) -> None:
    for part in parts:
        write_tree(tmp_path / part)
    named = f"; if {parts[0]} is a class, call it {parts[0]}_" if len(parts) == 1 else ""
    refused(
        folder(tmp_path), rf"has {' and '.join(parts)} only; it needs train and val \(or test\), or classes{named}$"
    )
