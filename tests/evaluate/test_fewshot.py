"""Few-shot evaluation: against a plain solve, what must not change it, and what it must always give."""

import numpy as np
import pytest
import torch
from torch import Tensor

from softmoe_cli.data.splits import ImageSet
from softmoe_cli.errors import UsageError
from softmoe_cli.evaluate.fewshot import (
    L2,
    accuracies,
    best_l2,
    check_shots,
    draws,
    feature_statistics,
    fewshot,
    ridge,
    take,
    whiten,
)
from tests import oracles

GRID = torch.tensor(L2, dtype=torch.float64)


def clouds(images: int, width: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features that lie around one point per class, and labels in turn."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % classes
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return centres[labels] + 0.8 * torch.randn(images, width, generator=rng, dtype=torch.float64), labels


@pytest.mark.parametrize(("images", "width"), [(12, 4), (5, 9), (7, 6)], ids=["tall", "wide", "square"])
def test_ridge_is_the_solution_of_its_equations(images: int, width: int) -> None:
    x, labels = clouds(images, width, 3)
    white = whiten(x, *feature_statistics(x))
    for l2, got in zip((0.5, 64.0), ridge(white, labels, 3, torch.tensor([0.5, 64.0])), strict=True):
        want = torch.tensor(oracles.ridge(white.tolist(), labels.tolist(), 3, l2))
        torch.testing.assert_close(got, want.double(), rtol=1e-7, atol=1e-9)


def test_scale_and_shift_of_features_do_not_matter() -> None:
    fitted, scored = clouds(20, 6, 4), clouds(30, 6, 4, seed=1)
    scale, shift = torch.linspace(0.5, 300, 6), torch.linspace(-50, 50, 6)
    moved_fitted, moved_scored = ((x * scale + shift, labels) for x, labels in (fitted, scored))
    share, predicted = accuracies(fitted, scored, 4, GRID)
    again, same = accuracies(moved_fitted, moved_scored, 4, GRID)
    assert torch.equal(share, again) and torch.equal(predicted, same)
    assert share.max() > 0.6


def test_more_shots_add_to_fewer() -> None:
    labels = torch.tensor([2, 0, 1, 2, 2, 0, 1, 2, 0])
    orders = draws(labels, 3)
    for k in (1, 2, 3):
        rows = take(orders, k)
        assert set(rows) < set(take(orders, k + 1)) or k == 3
        assert np.bincount(labels[rows]).tolist() == [min(k, n) for n in (3, 2, 4)]
        assert labels[rows].tolist() == sorted(labels[rows].tolist())
    assert not np.array_equal(take(orders, 3), take(draws(labels, 4), 3))


def test_the_larger_l2_wins_a_tie() -> None:
    assert best_l2(np.array([[0.5, 0.7, 0.7, 0.1]])) == 2
    assert best_l2(np.array([[0.5, 0.7, 0.6], [0.9, 0.1, 0.8]])) == 0  # ranks 0 2 1 and 2 0 1: the first of the highest


def as_set(labels: Tensor, first: int) -> ImageSet:
    """Images whose only pixel is their number, so that features can be looked up by it."""
    return ImageSet(labels, torch.arange(first, first + len(labels)).to(torch.uint8).view(-1, 1, 1, 1), 1, 1)


def test_only_the_shots_are_looked_at_and_l2_is_chosen_where_it_is_said() -> None:
    table = torch.cat([clouds(30, 5, 3, seed)[0] for seed in range(3)])
    train, scored, chooser = (as_set(torch.arange(30) % 3, first) for first in (0, 30, 60))
    asked: list[int] = []

    def features(images: ImageSet) -> Tensor:
        assert isinstance(images.images, Tensor)
        asked.append(len(images))
        return table[images.images.flatten().long()]

    honest = dict(fewshot(features, [1, 4], train, scored, chooser, 3, seed=0))
    assert asked == [12, 30, 30]
    official = dict(fewshot(features, [1, 4], train, scored, None, 3, seed=0))
    assert list(honest) == [f"fewshot_{k}_{what}" for k in (1, 4) for what in ("top1_pct", "l2", "images")]
    assert honest["fewshot_1_images"] == 3 and honest["fewshot_4_images"] == 12
    assert all(0 <= honest[f"fewshot_{k}_top1_pct"] <= official[f"fewshot_{k}_top1_pct"] <= 100 for k in (1, 4))
    assert official["fewshot_4_top1_pct"] > 60 and honest["fewshot_4_l2"] in L2
    assert dict(fewshot(features, [1, 4], train, scored, chooser, 3, seed=0)) == honest


def test_shots_that_a_class_does_not_have_are_said() -> None:
    labels = torch.tensor([2, 0, 4, 2, 2, 0, 4, 2, 0])
    assert check_shots(labels, [1, 3, 4], "fewshot") == [
        "1 of 3 classes have fewer than 3 training images, all of which are taken",
        "2 of 3 classes have fewer than 4 training images, all of which are taken",
    ]
    with pytest.raises(UsageError, match="fewshot=5: no class has so many training images; the largest has 4"):
        check_shots(labels, [1, 5], "fewshot")


def test_nothing_is_as_large_as_images_times_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores come so many at a time, and are the same ones."""
    fitted, scored = clouds(20, 6, 4), clouds(30, 6, 4, seed=1)
    whole = accuracies(fitted, scored, 4, GRID)
    monkeypatch.setattr("softmoe_cli.evaluate.fewshot.SCORES_AT_ONCE", 12)
    again = accuracies(fitted, scored, 4, GRID)
    assert torch.equal(whole[0], again[0]) and torch.equal(whole[1], again[1])
