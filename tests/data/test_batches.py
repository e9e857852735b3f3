"""Batches: order, augmentation and evaluation as functions of (seed, step), from memory and from disk."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from softmoe_cli.data.batches import Batch, eval_batches
from softmoe_cli.data.order import stream
from softmoe_cli.data.sets import load
from softmoe_cli.data.splits import ImageSet
from tests.data.trees import CPU, SIDE, augment, batches, folder, in_memory, pixels, same

EVERYTHING = {"hflip": 0.5, "randaugment": [2, 10], "mixup": 0.2, "cutmix": 1.0, "erase": 0.5}


# --- splits -----------------------------------------------------------------------------------------------------------


# --- folders that cannot work -----------------------------------------------------------------------------------------


# --- decoding ---------------------------------------------------------------------------------------------------------


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
    torch.testing.assert_close(torch.cat([x for x, *_ in found]).double(), want, atol=1e-6, rtol=1e-6)
    assert torch.equal(torch.cat([y for _, y, _ in found]), F.one_hot(images.labels[order], 3).float())


def test_flips_are_whole_images() -> None:
    images, data = in_memory(), folder(Path())
    plain, always = (next(batches(images, data, augment(hflip=p))) for p in (0.0, 1.0))
    assert torch.equal(always[0], plain[0].flip(3))
    half = torch.cat([x for x, *_ in itertools.islice(batches(images, data, augment(hflip=0.5)), 25)])
    whole = torch.cat([x for x, *_ in itertools.islice(batches(images, data, augment()), 25)])
    flipped = [torch.equal(a, b.flip(2)) for a, b in zip(half, whole, strict=True)]
    assert all(f or torch.equal(a, b) for f, a, b in zip(flipped, half, whole, strict=True))
    assert 30 < sum(flipped) < 70


def test_label_smoothing() -> None:
    _, y, _ = next(batches(in_memory(), folder(Path()), augment(), num_classes=5, label_smoothing=0.2))
    values = y.flatten().unique().tolist()
    assert values == pytest.approx([0.04, 0.84])
    torch.testing.assert_close(y.sum(dim=1), torch.ones(4))
    _, hard, _ = next(batches(in_memory(), folder(Path()), augment(), num_classes=5, label_smoothing=0.0))
    assert torch.equal(hard.argmax(1), y.argmax(1))
    assert hard.unique().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("change", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 1.0}])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_targets_sum_to_one(change: dict[str, object], smoothing: float) -> None:
    found = itertools.islice(batches(in_memory(), folder(Path()), augment(**change), label_smoothing=smoothing), 8)
    targets = torch.cat([y for _, y, _ in found])
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
    for x, y, _ in itertools.islice(batches(images, data, augment(mixup=0.8, cutmix=1.0), label_smoothing=0.0), 8):
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
    (colour, *_), *_ = eval_batches(images, data, image_size=SIDE, in_chans=3, batch_size=10, device=CPU)
    assert isinstance(images.images, torch.Tensor)
    for channel in range(3):
        want = (images.images[:, 0].float() / 255 - data.mean[channel]) / data.std[channel]
        torch.testing.assert_close(colour[:, channel], want)
    data = folder(Path(), mean=[0.3], std=[0.7])
    (colour, *_), *_ = eval_batches(images, data, image_size=12, in_chans=3, batch_size=10, device=CPU)
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
    assert all(len(x) == len(y) <= batch_size for x, y, _ in found)
    assert len(found) == -(-12 // batch_size)
    assert torch.equal(torch.cat([y for _, y, _ in found]), images.labels)
    torch.testing.assert_close(torch.cat([x for x, *_ in found]), pixels(images) / 255, atol=1e-6, rtol=0)


# --- crops ------------------------------------------------------------------------------------------------------------


def test_shifted_batches_are_filled_with_black() -> None:
    images, data = in_memory(side=10), folder(Path(), mean=[0.5, 0.4, 0.3], std=[0.5, 0.2, 0.1])
    images = ImageSet(images.labels, torch.full_like(pixels(images), 255), 10, 3)
    found = batches(images, data, augment(crop="shift", shift=0.2), image_size=10)
    x = torch.cat([x for x, *_ in itertools.islice(found, 9)])
    for channel, (white, black) in enumerate([(1, -1), (3, -2), (7, -3)]):
        assert x[:, channel].unique().tolist() == pytest.approx([black, white], abs=1e-5)
    outside = (x[:, 0] < 0).all(dim=2).sum(dim=1)
    assert set(outside.tolist()) == {0, 1, 2}  # shifted by at most 2 of 10 pixels, and by each number


# --- idx files --------------------------------------------------------------------------------------------------------
