"""Quality and calibration as numbers: against slow versions, and what batches must not change."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from softmoe_cli.data.batches import Batch
from softmoe_cli.evaluate.quality import Outcomes, calibration_error, evaluate, outcomes, qualities
from softmoe_cli.evaluate.trial import answers_to
from tests import oracles

NO_AUTOCAST = torch.autocast("cpu", enabled=False)


def scores(n: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, classes, generator=rng)
    return logits, torch.randint(classes, (n,), generator=rng)


def batches(logits: Tensor, labels: Tensor, size: int) -> Iterator[Batch]:
    return map(Batch, logits.split(size), labels.split(size))


@pytest.mark.parametrize("bins", [1, 8, 15])
def test_calibration_error_is_that_of_the_paper(bins: int) -> None:
    logits, labels = scores(300, 4)
    probability, prediction = logits.double().softmax(dim=1).max(dim=1)
    probability[:8] = torch.arange(1, 9) / 8  # on the edges, which belong to the bin below
    right = prediction == labels
    want = oracles.calibration_error(probability.tolist(), right.tolist(), bins)
    assert calibration_error(probability, right, bins) == pytest.approx(want, abs=1e-14)


def test_calibration_error_of_the_sure_and_the_honest() -> None:
    right = torch.tensor([True] * 6 + [False] * 4)
    assert calibration_error(torch.ones(10, dtype=torch.float64), right) == pytest.approx(0.4)
    assert calibration_error(torch.full((10,), 0.6, dtype=torch.float64), right) == pytest.approx(0, abs=1e-15)
    shuffled = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    probability = torch.rand(10, generator=torch.Generator().manual_seed(1)).double()
    again = calibration_error(probability[shuffled], right[shuffled])
    assert again == pytest.approx(calibration_error(probability, right), abs=1e-15)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_qualities_are_those_of_slow_loops_in_any_batches(loss: str) -> None:
    logits, labels = scores(50, 7)
    told = dict(evaluate(nn.Identity(), batches(logits, labels, 7), loss=loss, autocast=NO_AUTOCAST))
    whole = dict(evaluate(nn.Identity(), batches(logits, labels, 50), loss=loss, autocast=NO_AUTOCAST))
    chances = [oracles.softmax(row) for row in logits.double().tolist()]
    nll = -sum(math.log(row[label]) for row, label in zip(chances, labels.tolist(), strict=True)) / 50
    ranks = [sorted(range(7), key=lambda c: -row[c]).index(label) for row, label in zip(chances, labels, strict=True)]
    best = [max(row) for row in chances]
    want = {
        "top1_pct": 100 * ranks.count(0) / 50, "top5_pct": 100 * sum(rank < 5 for rank in ranks) / 50, "nll": nll,
        "ece_pct": 100 * oracles.calibration_error(best, [rank == 0 for rank in ranks], 15), "images_evaluated": 50,
    }  # fmt: skip
    assert {key: told[key] for key in want} == pytest.approx(want, rel=1e-6)
    assert whole == pytest.approx(told, rel=1e-6)
    if loss == "softmax":
        assert told["loss"] == pytest.approx(nll, rel=1e-6)


@pytest.mark.parametrize("classes", [1, 2, 5, 6, 10, 100])
def test_of_equal_scores_the_lower_class_comes_first(classes: int) -> None:
    """As scores in half precision often are; by a sort that keeps the order of equal ones."""
    rng = torch.Generator().manual_seed(classes)
    logits = torch.randint(4, (200, classes), generator=rng).float()
    labels = torch.randint(classes, (200,), generator=rng)
    said = outcomes(nn.Identity(), batches(logits, labels, 60), loss="softmax", autocast=NO_AUTOCAST)
    orders = [sorted(range(classes), key=lambda c: -row[c]) for row in logits.tolist()]
    assert said.prediction.tolist() == [order[0] for order in orders]
    pairs = zip(labels.tolist(), orders, strict=True)
    assert said.in_top5.tolist() == [label in order[:5] for label, order in pairs]
    assert not (said.right & ~said.in_top5).any()
    integers, _ = answers_to(logits, logits, labels)
    assert torch.equal(integers[1], said.prediction) and torch.equal(integers[2].bool(), said.in_top5)


def test_the_softmax_is_what_yes_or_no_answers_say_when_one_of_them_is_true() -> None:
    """The sigmoid loss: p_c / (1 - p_c) times the chance that all say no, over the sum of that."""
    logits, labels = scores(5, 3)
    said = outcomes(nn.Identity(), batches(logits, labels, 5), loss="sigmoid", autocast=NO_AUTOCAST)
    for row, label, got in zip(
        logits.double().sigmoid().tolist(), labels.tolist(), said.label_probability, strict=True
    ):
        alone = [math.prod(p if i == c else 1 - p for i, p in enumerate(row)) for c in range(3)]
        assert got.item() == pytest.approx(alone[label] / sum(alone), rel=1e-5)


def test_confusion_counts_every_image_once() -> None:
    logits, labels = scores(40, 5)
    said = outcomes(nn.Identity(), batches(logits, labels, 9), loss="softmax", autocast=NO_AUTOCAST)
    assert said.confusion.sum() == 40 and said.confusion.shape == (5, 5)
    assert 100 * said.confusion.trace().item() / 40 == dict(qualities(said))["top1_pct"]
    assert said.confusion.sum(dim=1).tolist() == torch.bincount(labels, minlength=5).tolist()


def test_many_classes_take_no_square_of_them() -> None:
    """ImageNet-21k's number of classes: a square of it has half a billion numbers."""
    classes, rng = 21_841, torch.Generator().manual_seed(0)
    label = torch.randint(classes, (300,), generator=rng)
    label[:5] = classes - 1
    prediction = torch.where(torch.rand(300, generator=rng) < 0.5, label, 0)
    ones = torch.ones(300, dtype=torch.float64)
    said = Outcomes(label, prediction, ones, ones, prediction == label, 0.0, 0.0, classes)
    total, right = said.by_class(classes)
    assert total.tolist() == torch.bincount(label, minlength=classes).tolist()
    assert int(right.sum()) == int((prediction == label).sum())
    assert [tuple(pair) for pair in said.pairs[:, :2].tolist()] == sorted(
        {*zip(label.tolist(), prediction.tolist(), strict=True)}
    )
    assert int(said.pairs[:, 2].sum()) == 300
