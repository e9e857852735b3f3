"""Splits: how images are held out."""

import numpy as np
import pytest
import torch

from softmoe_cli.data.cut import hold_out
from softmoe_cli.data.splits import ImageSet
from softmoe_cli.errors import UsageError
from softmoe_cli.evaluate.fewshot import draws


def test_held_out_images_are_a_share_of_every_class() -> None:
    labels = torch.tensor([0] * 40 + [1] * 7 + [2] * 2)[torch.randperm(49, generator=torch.Generator().manual_seed(0))]
    kept, held = hold_out(labels.numpy(), 0.2, 0, "test_fraction", "abc")
    assert sorted([*kept, *held]) == list(range(49))
    assert (np.diff(kept) > 0).all() and (np.diff(held) > 0).all()
    assert labels[torch.as_tensor(held)].bincount().tolist() == [8, 1, 1]  # at least one
    again, _ = hold_out(labels.numpy(), 0.2, 0, "test_fraction", "abc")
    other, _ = hold_out(labels.numpy(), 0.2, 1, "test_fraction", "abc")
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
    now = hold_out(labels.numpy(), 0.15, 7, "test_fraction", [str(i) for i in range(1200)])
    assert np.array_equal(now[0], np.sort(np.concatenate(kept)))
    assert np.array_equal(now[1], np.sort(np.concatenate(held)))
    rng = np.random.default_rng(3)
    slow = [rng.permutation((labels == label).nonzero().flatten().numpy()) for label in labels.unique().tolist()]
    assert all(map(np.array_equal, slow, draws(labels, 3)))


@pytest.mark.parametrize("count", [1, 2, 40_000, 59_999, 60_000, 10**9])
def test_images_that_are_spread_evenly_are_different_ones(count: int) -> None:
    """Within a half of where exact fractions are; in float32 some places came twice."""
    numbers = torch.arange(60_000)
    places = ImageSet(numbers, None, 1, 1).spread(count).labels
    taken = min(count, 60_000)
    assert len(places.unique()) == len(places) == taken and places[0] == 0
    assert (2 * (places * max(1, taken - 1) - numbers[:taken] * 59_999).abs() <= taken - 1).all()
    assert taken == 1 or places[-1] == 59_999


def test_holding_out_a_whole_class_is_refused() -> None:
    with pytest.raises(UsageError) as refusal:
        hold_out(np.array([0, 0, 1, 2]), 0.1, 0, "test_fraction", ["ant", "zebra", "\x1bcow"])
    assert str(refusal.value) == (
        "data.test_fraction=0.1 leaves no image of class zebra for training: it has 1 in all (1 more classes have too "
        "few: \\x1bcow); add images (a class needs 3, or 2 beside test images of your own), take the class away, or "
        "bring train, val and test of your own, which nothing is taken from"
    )
