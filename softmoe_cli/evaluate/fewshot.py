"""Few-shot quality of a frozen model: ridge regression from its features on k images per class.

As in the evaluation of the Soft MoE paper (google-research/vmoe, evaluate/fewshot.py; Puigcerver et al., 2023,
Section 3.1), in float64, where the official code's float32 loses up to 0.4% of a weight at small l2.

Letters: r images that are fitted to, m images that are scored, d features, c classes, l strengths of the ridge.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from softmoe_cli.data.cut import by_class
from softmoe_cli.data.splits import ImageSet
from softmoe_cli.errors import UsageError

L2 = tuple(2.0**power for power in range(-10, 20))
"""The official grid."""
BIAS = 100.0
"""The constant feature that stands for a bias; being large, it is hardly regularised."""
STD_EPS = 1e-5
SCORES_AT_ONCE = 2**24
"""The most scores (images times classes) in memory at a time: there may be ten thousands of classes."""


def draws(labels: Int64[Tensor, " n"], seed: int) -> list[np.ndarray]:
    """For each class, ascending, the numbers of its images in a random order: the first k of each are the k shots."""
    rng = np.random.default_rng(seed)
    return [rng.permutation(index) for index in by_class(labels.numpy())]


def take(orders: Sequence[np.ndarray], shots: int) -> np.ndarray:
    """The images of `shots` shots, class by class; all images of a class that has fewer. A larger number of shots
    contains the smaller ones."""
    return np.concatenate([order[:shots] for order in orders])


def check_shots(labels: Int64[Tensor, " n"], shots: Sequence[int], key: str) -> list[str]:
    """A sentence for each number of shots that some classes do not have: all of their images are taken.

    Raises:
        UsageError: no class has as many training images.
    """
    counts = np.bincount(labels.numpy())
    counts = counts[counts > 0]
    sentences = []
    for k in shots:
        if k > counts.max():
            raise UsageError(f"{key}={k}: no class has so many training images; the largest has {counts.max()}")
        if fewer := int((counts < k).sum()):
            sentences.append(
                f"{fewer} of {len(counts)} classes have fewer than {k} training images, all of which are taken"
            )
    return sentences


def feature_statistics(x: Float[Tensor, "r d"]) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Mean and population standard deviation + 1e-5 of each feature."""
    return x.mean(dim=0), x.std(dim=0, correction=0) + STD_EPS


def whiten(x: Float[Tensor, "m d"], mean: Float[Tensor, " d"], std: Float[Tensor, " d"]) -> Float[Tensor, "m d+1"]:
    """Features normalised with the mean and deviation of the images fitted to, and the constant feature behind them."""
    return F.pad((x - mean) / std, (0, 1), value=BIAS)


def ridge(
    x: Float[Tensor, "r d"], labels: Int64[Tensor, " r"], classes: int, l2: Float[Tensor, " l"]
) -> Iterator[Float[Tensor, "d c"]]:
    """w = (X^T X + l2 I)^-1 X^T Y for each l2 in turn, with Y = 1 for an image's class and -1 for the others.

    By an eigendecomposition of whichever of X^T X and X X^T is smaller: once for all l2. Nothing is as large as images
    times classes. `x` is whitened and has its constant feature.
    """
    wide = x.shape[0] < x.shape[1]
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    # V^T Y or V^T X^T Y: twice the sum over a class's images, less that over all
    rows = vectors if wide else x @ vectors
    right = rows.new_zeros(classes, rows.shape[1]).index_add_(0, labels, rows).mul_(2).sub_(rows.sum(dim=0)).T
    for strength in l2:
        solved = vectors @ (right / (values + strength)[:, None])
        yield x.T @ solved if wide else solved


def accuracies(
    fitted: tuple[Tensor, Tensor], scored: tuple[Tensor, Tensor], classes: int, l2: Float[Tensor, " l"]
) -> tuple[Float[Tensor, " l"], Int64[Tensor, "l m"]]:
    """Share of right predictions for every l2, and the predictions, from features (r d, m d) and labels of both."""
    mean, std = feature_statistics(fitted[0])
    weights = ridge(whiten(fitted[0], mean, std), fitted[1], classes, l2)
    seen = whiten(scored[0], mean, std).split(max(1, SCORES_AT_ONCE // classes))
    predicted = torch.stack([torch.cat([(some @ w).argmax(dim=1) for some in seen]) for w in weights])
    return (predicted == scored[1]).double().mean(dim=1), predicted


def best_l2(accuracy: np.ndarray) -> int:
    """The official choice from accuracies (sets, l): the first of the highest mean rank over the sets. Within a set
    the larger of two l2 with equal accuracy ranks higher."""
    ranks = accuracy.argsort(axis=1, kind="stable").argsort(axis=1)
    return int(ranks.sum(axis=0).argmax())


def fewshot(
    features: Callable[[ImageSet], Tensor],
    shots: Sequence[int],
    train: ImageSet,
    scored: ImageSet,
    chooser: ImageSet | None,
    classes: int,
    seed: int,
) -> Iterator[tuple[str, float]]:
    """Yields fewshot_K_top1_pct, fewshot_K_l2 and fewshot_K_images (fitted to) for each K of `shots`.

    Args:
        features: the frozen model's features of images, m d.
        train: where the shots are drawn from, with `seed`.
        scored: what the accuracy is of.
        chooser: the images on whose accuracy l2 is chosen; None: on those that are scored, as the paper does.
    """
    l2, orders = torch.tensor(L2, dtype=torch.float64), draws(train.labels, seed)
    needed = np.sort(take(orders, max(shots)))
    x = features(train.subset(needed)).double().cpu()
    target = (features(scored).double().cpu(), scored.labels)
    judge = target if chooser is None else (features(chooser).double().cpu(), chooser.labels)
    for k in shots:
        index = take(orders, k)
        fitted = (x[np.searchsorted(needed, index)], train.labels[index])
        best = best_l2(accuracies(fitted, judge, classes, l2)[0].numpy()[None])
        accuracy, _ = accuracies(fitted, target, classes, l2[best : best + 1])
        yield f"fewshot_{k}_top1_pct", 100 * accuracy.item()
        yield f"fewshot_{k}_l2", L2[best]
        yield f"fewshot_{k}_images", len(index)
