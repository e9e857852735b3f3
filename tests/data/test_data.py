"""Data: splits, order, augmentation as a function of (seed, step), folders read from memory and from disk."""

import gzip
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from softmoe_cli.config.data import Data
from softmoe_cli.config.recipe import Augment
from softmoe_cli.data.archives import Stored
from softmoe_cli.data.batches import eval_batches, stream, train_batches
from softmoe_cli.data.decode import centre, opened
from softmoe_cli.data.known import read_idx
from softmoe_cli.data.pixels import boxes, resized_crop, shift_crop
from softmoe_cli.data.sets import identity, load
from softmoe_cli.data.splits import ImageSet, Splits, hold_out
from softmoe_cli.errors import UsageError
from softmoe_cli.evaluate.fewshot import draws
from tests.oracles import compose

CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "cat")
SIDE = 8
Batch = tuple[Tensor, Tensor]


def write_image(path: Path, rng: np.random.Generator, size: tuple[int, int] = (11, 9), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def write_tree(root: Path, per_class: int = 6, classes: tuple[str, ...] = CLASSES, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for name in classes:
        for i in range(per_class):
            write_image(root / name / f"{i}.png", rng, (SIDE + i, SIDE + 3))
    return root


def folder(root: Path, **changes: object) -> Data:
    data = compose("data=folder", "data.root=x", f"data.image_size={SIDE}").data
    for key, value in ({"root": str(root), "workers": 0} | changes).items():
        assert hasattr(data, key)
        setattr(data, key, value)
    return data


def augment(**changes: object) -> Augment:
    config = compose().augment
    for key, value in ({"crop": "none", "hflip": 0.0} | changes).items():
        assert hasattr(config, key)
        setattr(config, key, value)
    return config


EVERYTHING = {"hflip": 0.5, "randaugment": [2, 10], "mixup": 0.2, "cutmix": 1.0, "erase": 0.5}


def batches(
    images: ImageSet, data: Data, change: Augment, *, first_step: int = 0, batch_size: int = 4, seed: int = 0,
    image_size: int = SIDE, in_chans: int | None = None, num_classes: int = 3, label_smoothing: float = 0.1,
) -> Iterator[Batch]:  # fmt: skip
    return train_batches(
        images, data, change, image_size=image_size, in_chans=in_chans or images.channels, num_classes=num_classes,
        batch_size=batch_size, label_smoothing=label_smoothing, seed=seed, first_step=first_step, device=CPU,
    )  # fmt: skip


def in_memory(n: int = 10, channels: int = 3, side: int = SIDE) -> ImageSet:
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, channels, side, side), generator=rng, dtype=torch.uint8)
    return ImageSet(torch.arange(n) % 3, pixels, side, channels)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("images"))


def same(a: Splits, b: Splits) -> bool:
    pairs = [(getattr(a, part), getattr(b, part)) for part in ("train", "validation", "test")]
    return a.classes == b.classes and all(
        torch.equal(x.labels, y.labels) and files(x) == files(y) and torch.equal(pixels(x), pixels(y)) for x, y in pairs
    )


def pixels(images: ImageSet) -> Tensor:
    if images.images is not None:
        return images.images
    stored = images.files
    assert stored is not None
    return torch.stack(
        [centre(opened(stored, i, images.channels, 100.0), images.side, None) for i in range(len(images))]
    )


def files(images: ImageSet) -> list[Path]:
    return [] if images.files is None else images.files.places


def decode(file: Path, side: int, channels: int) -> Tensor:
    return centre(opened(Stored.files(file.parent, [file.name]), 0, channels, 100.0), side, None)


# --- splits -----------------------------------------------------------------------------------------------------------


def test_held_out_images_are_a_share_of_every_class() -> None:
    labels = torch.tensor([0] * 40 + [1] * 7 + [2] * 2)[torch.randperm(49, generator=torch.Generator().manual_seed(0))]
    kept, held = hold_out(labels, 0.2, 0, "test_fraction", "abc")
    assert sorted([*kept, *held]) == list(range(49))
    assert (np.diff(kept) > 0).all() and (np.diff(held) > 0).all()
    assert labels[torch.as_tensor(held)].bincount().tolist() == [8, 1, 1]  # at least one
    again, _ = hold_out(labels, 0.2, 0, "test_fraction", "abc")
    other, _ = hold_out(labels, 0.2, 1, "test_fraction", "abc")
    assert (kept == again).all()
    assert not (kept == other).all()


def test_one_pass_over_the_labels_cuts_as_one_for_each_class_did() -> None:
    """Splits of every study depend on it."""
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 400, 5000) * 3)
    rng, kept, held = np.random.default_rng(7), [], []
    for label in labels.unique().tolist():
        index = rng.permutation((labels == label).nonzero().flatten().numpy())
        count = max(1, round(len(index) * 0.15))
        held.append(index[:count])
        kept.append(index[count:])
    now = hold_out(labels, 0.15, 7, "test_fraction", [str(i) for i in range(1200)])
    assert np.array_equal(now[0], np.sort(np.concatenate(kept)))
    assert np.array_equal(now[1], np.sort(np.concatenate(held)))
    rng = np.random.default_rng(3)
    slow = [rng.permutation((labels == label).nonzero().flatten().numpy()) for label in labels.unique().tolist()]
    assert all(map(np.array_equal, slow, draws(labels, 3)))


def test_holding_out_a_whole_class_is_refused() -> None:
    with pytest.raises(UsageError) as refusal:
        hold_out(torch.tensor([0, 0, 1, 2]), 0.1, 0, "test_fraction", ["ant", "zebra", "\x1bcow"])
    assert str(refusal.value) == (
        "data.test_fraction=0.1 leaves no image of class zebra for training: it has 1 in all (1 more classes have too "
        "few: \\x1bcow); add images (a class needs 3, or 2 beside test images of your own), take the class away, or "
        "bring train, val and test of your own, which nothing is taken from"
    )


def test_digits_are_split_once_and_for_all() -> None:
    splits = load(compose("data=digits").data)
    sets = [splits.train, splits.validation, splits.test]
    assert [len(one) for one in sets] == [1295, 143, 359]
    assert same(splits, load(compose("data=digits", "seed=5").data))
    assert not same(splits, load(compose("data=digits", "data.split_seed=1").data))
    from sklearn.datasets import load_digits

    source = load_digits()
    want = sorted(
        (int(label), tuple(np.rint(image * 255 / 16).astype(int).ravel().tolist()))
        for label, image in zip(source.target, source.images, strict=True)
    )
    got = sorted(
        (label, tuple(image.flatten().tolist()))
        for one in sets
        for label, image in zip(one.labels.tolist(), pixels(one), strict=True)
    )
    assert got == want  # together they are the whole set, each image once
    for one in sets:
        share = one.labels.bincount(minlength=10) / len(one)
        assert (share - torch.as_tensor(np.bincount(source.target)) / 1797).abs().max() < 0.01


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


# --- folders that cannot work -----------------------------------------------------------------------------------------


def refused(data: Data, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load(data)


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


@pytest.mark.parametrize("content", [b"", b"not an image", b"cut"])
def test_broken_image(tmp_path: Path, content: bytes) -> None:
    write_tree(tmp_path)
    broken = tmp_path / "bee" / "broken.png"
    whole = (tmp_path / "bee" / "0.png").read_bytes()
    broken.write_bytes(whole[: len(whole) // 2] if content == b"cut" else content)
    refused(folder(tmp_path), r"broken\.png is not an image that can be read")


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_image_in_a_lazy_folder(tmp_path: Path, workers: int) -> None:
    write_tree(tmp_path)
    data = folder(tmp_path, memory_gib=0, workers=workers)
    train = load(data).train
    files(train)[0].write_bytes(b"not an image")
    with pytest.raises(UsageError, match=r"\.png is not an image that can be read"):
        list(eval_batches(train, data, image_size=SIDE, in_chans=3, batch_size=4, device=CPU))
    with pytest.raises(UsageError, match=r"\.png is not an image that can be read"):
        list(itertools.islice(batches(train, data, augment()), 20))


def test_images_of_more_than_eight_bits_are_refused(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    Image.fromarray(np.full((9, 9), 30000, np.uint16)).save(root / CLASSES[0] / "deep.png")
    refused(folder(root), "more than 8 bits")


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


def test_a_program_by_an_images_name_is_not_run(tmp_path: Path) -> None:
    """Pillow would hand PostScript to Ghostscript."""
    write_tree(tmp_path)
    figure = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "bee" / "figure.jpg").write_bytes(figure)
    refused(folder(tmp_path), r"figure\.jpg is not an image that can be read: damaged, or none of BMP, GIF")


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


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_decoding_cuts_the_centre(tmp_path: Path, mode: str, channels: int) -> None:
    raw = np.zeros((SIDE, SIDE + 6, 3), np.uint8)
    raw[:, 3:-3] = 60  # the centre square; the sides are cut away
    Image.fromarray(raw).convert(mode).save(tmp_path / "a.png")
    decoded = decode(tmp_path / "a.png", SIDE, channels)
    assert decoded.shape == (channels, SIDE, SIDE)
    assert decoded.unique().tolist() == [60]


def test_decoding_keeps_channels_and_directions(tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(raw).save(tmp_path / "a.png")
    assert torch.equal(decode(tmp_path / "a.png", SIDE, 3), torch.from_numpy(raw).permute(2, 0, 1))


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "batch_size"), [(10, 3), (10, 5), (7, 7), (3, 8), (5, 1)])
def test_each_epoch_sees_each_image_once(length: int, batch_size: int) -> None:
    epochs = 4
    steps = -(-epochs * length // batch_size)
    found = list(itertools.islice(stream(length, batch_size, 3, 0), steps))
    assert {len(index) for index in found} == {batch_size}
    order = torch.cat(found)[: epochs * length].view(epochs, length)
    for epoch in order:
        assert sorted(epoch.tolist()) == list(range(length))
    assert len({tuple(epoch.tolist()) for epoch in order}) > 1
    for k in range(1, steps):
        assert torch.equal(next(stream(length, batch_size, 3, k)), found[k])


def test_order_depends_on_the_seed() -> None:
    assert not torch.equal(next(stream(50, 50, 0, 0)), next(stream(50, 50, 1, 0)))


# --- training batches -------------------------------------------------------------------------------------------------


def equal(a: Batch, b: Batch) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("crop", ["none", "shift", "resized"])
def test_resumed_batches_are_equal_bit_for_bit(crop: str) -> None:
    images, data, change = in_memory(), folder(Path()), augment(crop=crop, shift=0.25, **EVERYTHING)
    straight = list(itertools.islice(batches(images, data, change, image_size=12), 6))
    torch.manual_seed(123)
    np.random.seed(123)
    random.seed(123)
    for k in (1, 2, 5):
        resumed = batches(images, data, change, image_size=12, first_step=k)
        for later, got in zip(straight[k:], resumed, strict=False):
            assert equal(got, later)
    assert not equal(next(batches(images, data, change, image_size=12, seed=1)), straight[0])
    assert not any(equal(a, b) for a, b in itertools.combinations(straight, 2))


def test_lazy_folders_equal_those_in_memory_and_resume(tree: Path) -> None:
    """Whatever the number of processes that decode, and from wherever a run goes on."""
    change = augment(crop="resized", area=0.3, **EVERYTHING)
    data = folder(tree)
    loaded = load(data)
    want = list(itertools.islice(batches(loaded.train, data, change), 6))
    for workers in (0, 2):
        lazy_data = folder(tree, memory_gib=0, workers=workers)
        lazy = load(lazy_data)
        assert lazy.train.images is None and loaded.train.images is not None
        assert same(lazy, loaded)
        for k in (0, 3):
            got = list(itertools.islice(batches(lazy.train, lazy_data, change, first_step=k), 6 - k))
            assert all(equal(a, b) for a, b in zip(got, want[k:], strict=True))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hflip", {"hflip": 0.5}), ("shift", {"crop": "shift", "shift": 0.25}),
        ("resized", {"crop": "resized", "area": 0.1}),
        ("randaugment", {"randaugment": [2, 10]}), ("mixup", {"mixup": 0.5}), ("cutmix", {"cutmix": 1.0}),
        ("erase", {"erase": 0.5}),
    ],
)  # fmt: skip
def test_every_augmentation_does_something(name: str, change: dict[str, object]) -> None:
    images, data = in_memory(), folder(Path())
    plain, changed = (list(itertools.islice(batches(images, data, augment(**c)), 4)) for c in ({}, change))
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(plain, changed, strict=True)), name
    targets = all(torch.equal(a[1], b[1]) for a, b in zip(plain, changed, strict=True))
    assert targets == (name not in ("mixup", "cutmix"))


@pytest.mark.parametrize("memory", [1.0, 0.0])
def test_global_random_states_are_left_alone(tree: Path, memory: float) -> None:
    data, change = folder(tree, memory_gib=memory), augment(crop="resized", **EVERYTHING)
    images = load(data).train
    before, numpy_before = torch.get_rng_state(), np.random.get_state(legacy=False)
    list(itertools.islice(batches(images, data, change), 4))
    list(eval_batches(images, data, image_size=SIDE, in_chans=3, batch_size=4, device=CPU))
    numpy_after = np.random.get_state(legacy=False)
    assert isinstance(numpy_before, dict) and isinstance(numpy_after, dict)
    assert (numpy_before["state"]["key"] == numpy_after["state"]["key"]).all()
    assert numpy_before["state"]["pos"] == numpy_after["state"]["pos"]
    assert torch.equal(torch.get_rng_state(), before)


def test_erasing_leaves_all_but_a_box_of_some_images() -> None:
    """A quarter of the images lose 2% to 33% of their pixels, in one box, and nothing else changes."""
    images, data = in_memory(400, side=24), folder(Path())
    plain, erased = (next(batches(images, data, augment(erase=p), batch_size=400, image_size=24)) for p in (0.0, 0.25))
    assert torch.equal(plain[1], erased[1])
    changed = (plain[0] != erased[0]).all(dim=1)
    assert torch.equal(changed, (plain[0] != erased[0]).any(dim=1))
    hit = changed.flatten(1).any(dim=1)
    assert 0.2 < hit.float().mean() < 0.3
    for image in changed[hit]:
        rows, columns = image.nonzero(as_tuple=True)
        box = (int(rows.max() - rows.min()) + 1) * (int(columns.max() - columns.min()) + 1)
        assert int(image.sum()) == box
        assert 0.015 < box / 24**2 < 0.35


def test_plain_batches_are_the_normalised_images() -> None:
    images, data = in_memory(), folder(Path(), mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 2.0])
    assert images.images is not None
    order = torch.cat(list(itertools.islice(stream(10, 4, 0, 0), 3)))
    found = list(itertools.islice(batches(images, data, augment(), label_smoothing=0.0), 3))
    scaled = images.images[order].double() / 255
    want = torch.stack(
        [(scaled[:, c] - mean) / std for c, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.25), (0.3, 2.0)])], dim=1
    )
    torch.testing.assert_close(torch.cat([x for x, _ in found]).double(), want, atol=1e-6, rtol=1e-6)
    assert torch.equal(torch.cat([y for _, y in found]), F.one_hot(images.labels[order], 3).float())


def test_flips_are_whole_images() -> None:
    images, data = in_memory(), folder(Path())
    plain, always = (next(batches(images, data, augment(hflip=p))) for p in (0.0, 1.0))
    assert torch.equal(always[0], plain[0].flip(3))
    half = torch.cat([x for x, _ in itertools.islice(batches(images, data, augment(hflip=0.5)), 25)])
    whole = torch.cat([x for x, _ in itertools.islice(batches(images, data, augment()), 25)])
    flipped = [torch.equal(a, b.flip(2)) for a, b in zip(half, whole, strict=True)]
    assert all(f or torch.equal(a, b) for f, a, b in zip(flipped, half, whole, strict=True))
    assert 30 < sum(flipped) < 70


def test_label_smoothing() -> None:
    _, y = next(batches(in_memory(), folder(Path()), augment(), num_classes=5, label_smoothing=0.2))
    values = y.flatten().unique().tolist()
    assert values == pytest.approx([0.04, 0.84])
    torch.testing.assert_close(y.sum(dim=1), torch.ones(4))
    _, hard = next(batches(in_memory(), folder(Path()), augment(), num_classes=5, label_smoothing=0.0))
    assert torch.equal(hard.argmax(1), y.argmax(1))
    assert hard.unique().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("change", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 1.0}])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_targets_sum_to_one(change: dict[str, object], smoothing: float) -> None:
    found = itertools.islice(batches(in_memory(), folder(Path()), augment(**change), label_smoothing=smoothing), 8)
    targets = torch.cat([y for _, y in found])
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(32))
    sure = 1 - smoothing + smoothing / 3
    assert (targets.amax(dim=1) < sure - 1e-3).any()  # some are really mixed
    assert targets.min() >= smoothing / 3 - 1e-6


def test_mixup_mixes_pixels_as_it_mixes_targets() -> None:
    """On images that are their labels: constant 0, 100 or 200."""
    n = 6
    labels = torch.arange(n) % 3
    flat = (100 * labels).to(torch.uint8).view(n, 1, 1, 1).expand(n, 1, SIDE, SIDE).contiguous()
    images, data = ImageSet(labels, flat, SIDE, 1), folder(Path(), mean=[0.0], std=[1.0])
    for x, y in itertools.islice(batches(images, data, augment(mixup=0.8, cutmix=1.0), label_smoothing=0.0), 8):
        want = (y @ torch.tensor([0.0, 100, 200])) / 255
        torch.testing.assert_close(x.mean(dim=(1, 2, 3)), want, atol=1e-5, rtol=1e-4)


def test_grey_images_are_repeated() -> None:
    images, data = in_memory(channels=1), folder(Path(), mean=[0.3], std=[0.7])
    for crop in ("none", "shift", "resized"):
        change = augment(crop=crop, shift=0.25)
        grey, colour = (next(batches(images, data, change, in_chans=c))[0] for c in (1, 3))
        assert colour.shape == (4, 3, SIDE, SIDE)
        torch.testing.assert_close(colour, grey.expand(-1, 3, -1, -1), atol=0, rtol=0)
    data = folder(Path(), mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    (colour, _), *_ = eval_batches(images, data, image_size=SIDE, in_chans=3, batch_size=10, device=CPU)
    assert images.images is not None
    for channel in range(3):
        want = (images.images[:, 0].float() / 255 - data.mean[channel]) / data.std[channel]
        torch.testing.assert_close(colour[:, channel], want)
    data = folder(Path(), mean=[0.3], std=[0.7])
    (colour, _), *_ = eval_batches(images, data, image_size=12, in_chans=3, batch_size=10, device=CPU)
    assert colour.shape == (10, 3, 12, 12)
    assert torch.equal(colour[:, 0], colour[:, 2])


# --- evaluation batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [1.0, 0.0])
@pytest.mark.parametrize("batch_size", [1, 7, 12, 17])
def test_evaluation_covers_each_image_once(tree: Path, memory: float, batch_size: int) -> None:
    data = folder(tree, memory_gib=memory, validation_fraction=0.2, mean=[0.0], std=[1.0])
    images = load(data).train
    assert len(images) == 12
    found = list(eval_batches(images, data, image_size=SIDE, in_chans=3, batch_size=batch_size, device=CPU))
    assert all(len(x) == len(y) <= batch_size for x, y in found)
    assert len(found) == -(-12 // batch_size)
    assert torch.equal(torch.cat([y for _, y in found]), images.labels)
    torch.testing.assert_close(torch.cat([x for x, _ in found]), pixels(images) / 255, atol=1e-6, rtol=0)


# --- crops ------------------------------------------------------------------------------------------------------------


def test_shift_crop_against_a_loop() -> None:
    x = torch.randn(5, 2, 6, 6)
    shift = torch.tensor([[0, 2, -3, 1, -1], [0, -1, 3, 2, -2]])
    fill = torch.tensor([7.0, -7.0])
    want = fill.view(1, 2, 1, 1).repeat(5, 1, 6, 6)
    for b in range(5):
        down, right = shift[:, b].tolist()
        for row, column in itertools.product(range(6), range(6)):
            if 0 <= row - down < 6 and 0 <= column - right < 6:
                want[b, :, row, column] = x[b, :, row - down, column - right]
    assert torch.equal(shift_crop(x, shift, fill), want)
    assert torch.equal(shift_crop(x, torch.zeros(2, 5, dtype=torch.int64), fill), x)


def test_shifted_batches_are_filled_with_black() -> None:
    images, data = in_memory(side=10), folder(Path(), mean=[0.5, 0.4, 0.3], std=[0.5, 0.2, 0.1])
    images = ImageSet(images.labels, torch.full_like(pixels(images), 255), 10, 3)
    found = batches(images, data, augment(crop="shift", shift=0.2), image_size=10)
    x = torch.cat([x for x, _ in itertools.islice(found, 9)])
    for channel, (white, black) in enumerate([(1, -1), (3, -2), (7, -3)]):
        assert x[:, channel].unique().tolist() == pytest.approx([black, white], abs=1e-5)
    outside = (x[:, 0] < 0).all(dim=2).sum(dim=1)
    assert set(outside.tolist()) == {0, 1, 2}  # shifted by at most 2 of 10 pixels, and by each number


def test_the_full_box_is_a_plain_resize() -> None:
    x = torch.randn(3, 2, 8, 8)
    box = torch.tensor([[0.0, 0, 1, 1]]).expand(3, 4)
    torch.testing.assert_close(resized_crop(x, box, 8), x, atol=1e-5, rtol=0)
    larger = F.interpolate(x, size=(16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resized_crop(x, box, 16), larger, atol=1e-5, rtol=0)


def test_resized_crop_cuts_its_box() -> None:
    x = torch.randn(2, 3, 8, 8)
    box = torch.tensor([[0.25, 0.5, 0.5, 0.5], [0.0, 0.25, 0.5, 0.5]])
    want = torch.stack([x[0, :, 2:6, 4:8], x[1, :, 0:4, 2:6]])
    torch.testing.assert_close(resized_crop(x, box, 4), want, atol=1e-5, rtol=0)


def test_boxes_lie_inside_and_have_the_areas() -> None:
    top, left, height, width = boxes(4000, 0.2, torch.Generator().manual_seed(0)).unbind(1)
    assert min(top.min(), left.min()) >= 0
    assert max((top + height).max(), (left + width).max()) <= 1 + 1e-6
    area, aspect = height * width, width / height
    assert area.min() >= 0.2 * 3 / 4 and area.min() < 0.21
    free = (height < 1) & (width < 1)
    assert 3 / 4 - 1e-5 <= aspect[free].min() < 0.77 and 1.3 < aspect[free].max() <= 4 / 3 + 1e-5
    small = area[free & (area < 0.7)]  # below 3/4 no side is ever cut: uniform
    assert small.mean().item() == pytest.approx(0.45, abs=0.01)


def test_images_that_a_few_bytes_say_are_vast_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    write_tree(tmp_path)
    place = tmp_path / "ant" / "vast.png"
    Image.new("1", (40_000, 3_000)).save(place)
    assert place.stat().st_size < 40_000
    refused(folder(tmp_path), r"vast\.png is 40,000 x 3,000 pixels, .* raise data\.max_megapixels=100")
    assert len(load(folder(tmp_path, max_megapixels=121.0)).train)


@pytest.mark.parametrize("size", [(1, 50_000), (50_000, 1), (2, 90_000)])
def test_a_line_of_pixels_is_not_made_as_wide_as_a_picture(size: tuple[int, int]) -> None:
    """timm's transform would have 256 x 12,800,000 pixels in between."""
    line = Image.new("L", size, 10)
    line.putpixel((size[0] // 2, size[1] // 2), 200)
    square = centre(line, 224, 0.875)
    assert square.shape == (1, 224, 224) and int(square.max()) > 150 and int(square.min()) < 50


# --- idx files --------------------------------------------------------------------------------------------------------

CUBE = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
IDX = b"\x00\x00\x08\x03" + np.array(CUBE.shape, ">u4").tobytes() + CUBE.tobytes()
PACKED = gzip.compress(IDX)


def test_read_idx(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(IDX)
    (tmp_path / "packed.gz").write_bytes(gzip.compress(IDX))
    for name in ("plain", "packed.gz"):
        assert (read_idx(tmp_path / name) == CUBE).all()
        assert read_idx(tmp_path / name).dtype == np.uint8


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("short", IDX[:-1], "short is cut short: 39 bytes where its header promises 40"),
        ("long", IDX + b"x", "long is too long: more bytes where its header promises 40"),
        pytest.param("header", IDX[:9], "header is cut short"),
        ("empty", b"", "empty is no idx file"),
        ("floats", b"\x00\x00\x0d" + IDX[3:], "floats is no idx file of bytes: it must begin with 00 00 08"),
        ("short.gz", gzip.compress(IDX[:-1]), "cut short"),
        ("broken.gz", gzip.compress(IDX)[:-12], r"broken\.gz cannot be read"),
        pytest.param(
            "damaged.gz",
            PACKED[:12] + b"\xff" * 8 + PACKED[20:],
            r"damaged\.gz cannot be read",
        ),
        ("plain.gz", IDX, r"plain\.gz cannot be read"),
        ("bomb.gz", gzip.compress(IDX + bytes(10**7)), "too long: more bytes where its header promises 40"),
        (
            "vast.gz",
            gzip.compress(IDX[:4] + b"\x00\xff\xff\xff" * 3),
            r"vast\.gz promises 4398\d*\.\d* GiB, more than the",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_damaged_idx_files_are_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=words):
        read_idx(tmp_path / name)
