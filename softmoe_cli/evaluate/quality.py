"""Quality of a model on a set of images, each counted exactly once: an iterator of (name, value)."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int64
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from softmoe_cli.adapters.soft_moa import SoftMoA
from softmoe_cli.data.batches import Batch
from softmoe_cli.errors import UsageError
from softmoe_cli.model.tasks import valid_answers
from softmoe_cli.moe.factorised import FactorisedHead
from softmoe_cli.moe.kind import Decided, Decider, Layer
from softmoe_cli.moe.routing import full_precision
from softmoe_cli.run.rows import OVER_TASKS, TASK_QUALITY

CALIBRATION_BINS = 15
"""As in Guo et al., 2017."""


IMPOSSIBLE = -1e30
"""A logit whose class has no probability and no part in a loss or gradient; with -inf they would be no numbers."""


def classification_loss(logits: Tensor, targets: Tensor, kind: str, valid: Tensor | None = None) -> Tensor:
    """Mean over images, in float32 or better. `targets` (b, classes) are shares of each class, of those that are
    `valid` (all).

    softmax: cross-entropy. sigmoid: binary cross-entropy summed over classes (the official pretraining loss).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if valid is not None:
        logits = logits.masked_fill(~valid, IMPOSSIBLE)
    if kind == "sigmoid":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1).mean()
    return F.cross_entropy(logits, targets)


@dataclass(frozen=True)
class Outcomes:
    """What a model predicted for n images, in their order, on the CPU.

    Probabilities are the softmax of the logits. That holds for the sigmoid loss too: its classes are independent yes or
    no with odds e^logit, and given that exactly one of them is true, which is what single labels say, the softmax is
    their distribution.
    """

    label: Int64[Tensor, " n"]
    prediction: Int64[Tensor, " n"]
    probability: Float64[Tensor, " n"]
    """The probability of the prediction."""
    label_probability: Float64[Tensor, " n"]
    in_top5: Bool[Tensor, " n"]
    nll: float
    """Mean over images of -ln(probability of the label)."""
    loss: float
    classes: int

    @property
    def right(self) -> Bool[Tensor, " n"]:
        return self.prediction == self.label

    @property
    def top1_pct(self) -> float:
        return _share_pct(self.right)

    def by_class(self, classes: int) -> tuple[Int64[Tensor, " c"], Int64[Tensor, " c"]]:
        """Images, and right predictions, of each of the first `classes` classes."""
        total, right = (torch.bincount(label, minlength=classes) for label in (self.label, self.label[self.right]))
        return total[:classes], right[:classes]

    @property
    def pairs(self) -> Int64[Tensor, "pairs 3"]:
        """Label, prediction and number of images, of every such pair that there is, ascending."""
        found, counts = (self.label * self.classes + self.prediction).unique(return_counts=True)
        return torch.stack([found // self.classes, found % self.classes, counts], dim=1)

    @property
    def confusion(self) -> Int64[Tensor, "c c"]:
        """Images by label (row) and prediction (column). With many classes this square does not fit into memory; see
        `pairs`."""
        label, prediction, images = self.pairs.T
        square = torch.zeros(self.classes, self.classes, dtype=torch.int64)
        square[label, prediction] = images
        return square


def together(several: Sequence[Outcomes]) -> Outcomes:
    """The outcomes of several runs of images one after the other."""
    sizes = [len(said.label) for said in several]

    def mean(of: Sequence[float]) -> float:
        return sum(size * each for size, each in zip(sizes, of, strict=True)) / sum(sizes)

    names = ("label", "prediction", "probability", "label_probability", "in_top5")
    return Outcomes(
        **{name: torch.cat([getattr(said, name) for said in several]) for name in names},
        nll=mean([said.nll for said in several]), loss=mean([said.loss for said in several]),
        classes=max(said.classes for said in several),
    )  # fmt: skip


def _share_pct(right: Bool[Tensor, " n"]) -> float:
    return 100 * int(right.sum()) / len(right)


Collect = Callable[[list[Any]], list[Any]]
"""Takes this process's findings, one for each of its batches; returns those of all processes, in the order of the
batches."""


def _seen_all(found: list[Any]) -> list[Any]:
    return found


def guesses(
    scores: Float[Tensor, "b c"], labels: Int64[Tensor, " b"]
) -> tuple[Int64[Tensor, " b"], Bool[Tensor, " b"]]:
    """The class with the largest score, and whether the label is among the first five. Of equal scores, which are no
    rarity in half precision, the lower class comes first; torch's topk leaves their order open. Five guesses are never
    right less often than one."""
    own, number = scores.gather(1, labels[:, None]), torch.arange(scores.shape[1], device=scores.device)
    behind = (scores < own) | ((scores == own) & (number >= labels[:, None]))
    return scores.argmax(dim=1), (~behind).sum(dim=1) < 5


@torch.no_grad()
def outcomes(
    model: nn.Module, batches: Iterable[Batch], *, loss: str, autocast: torch.autocast, collect: Collect = _seen_all
) -> Outcomes:
    """Runs every batch through the model once; fetches the results from the device at the end. Sums are float64, so
    that the batch size does not change them."""
    model.eval()
    answers, classes = [], 0
    with autocast:  # around all batches: a weight is cast once
        for batch in batches:
            labels, logits = batch.labels, model(*batch.inputs)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            classes = logits.shape[1]
            best, hit = guesses(logits, labels)
            integers = torch.stack([labels, best, hit.long()])
            chances = logits.softmax(dim=1)
            known = [chances.gather(1, which[:, None])[:, 0] for which in (best, labels)]
            numbers = torch.stack([*known, F.cross_entropy(logits, labels, reduction="none")])
            targets, valid = F.one_hot(labels, classes).to(logits.dtype), valid_answers(model, batch.inputs)
            mean_loss = classification_loss(logits, targets, loss, valid)
            answers.append((integers, numbers, mean_loss, len(labels)))
    answers = collect(answers)
    label, prediction, hit = torch.cat([each[0] for each in answers], dim=1).cpu()
    probability, label_probability, nll = torch.cat([each[1] for each in answers], dim=1).cpu().double()
    sizes = torch.tensor([each[3] for each in answers], dtype=torch.float64)
    mean = (torch.stack([each[2] for each in answers]).cpu().double() @ sizes).item() / len(label)
    return Outcomes(label, prediction, probability, label_probability, hit.bool(), nll.mean().item(), mean, classes)


def require_finite(said: Outcomes, checkpoint: str, precision: str) -> Outcomes:
    """What was said, where all of it is numbers: an answer that is none would be taken for the first class.

    Raises:
        UsageError: outputs that are no finite numbers.
    """
    none = int(said.probability.isnan().sum())
    if none:
        way = "" if precision == "fp32" else "try precision=fp32, "
        raise UsageError(
            f"checkpoint={checkpoint}: its outputs of {none:,} of {len(said.label):,} images are no finite numbers in "
            f"{precision}; {way}train again with a lower optim.lr, or name another checkpoint"
        )
    return said


def calibration_error(
    probability: Float64[Tensor, " n"], right: Bool[Tensor, " n"], bins: int = CALIBRATION_BINS
) -> float:
    """Expected calibration error (Guo et al., 2017, equation 3, https://arxiv.org/abs/1706.04599), from 0 to 1.

    Images fall into bins of equal width by the probability of their prediction, ((m - 1) / bins, m / bins]; the error
    is the mean over images of |share that is right - mean probability| of their bin.
    """
    edges = torch.arange(1, bins + 1, dtype=torch.float64) / bins
    place = torch.bucketize(probability, edges).clamp(max=bins - 1)  # a softmax may round to a little over 1
    excess = torch.zeros(bins, dtype=torch.float64).index_add(0, place, right.double() - probability)
    return excess.abs().sum().item() / len(probability)


def reliability(
    probability: Float64[Tensor, " n"], right: Bool[Tensor, " n"], bins: int = CALIBRATION_BINS
) -> Float64[Tensor, "bins 3"]:
    """Of each bin of `calibration_error`: its images, the share of them that is right, the mean probability."""
    edges = torch.arange(1, bins + 1, dtype=torch.float64) / bins
    place = torch.bucketize(probability, edges).clamp(max=bins - 1)
    sums = torch.zeros(bins, 3, dtype=torch.float64)
    sums.index_add_(0, place, torch.stack([torch.ones_like(probability), right.double(), probability], dim=1))
    sums[:, 1:] /= sums[:, :1].clamp(min=1)
    return sums


def qualities(said: Outcomes) -> Iterator[tuple[str, float]]:
    """Yields top1_pct, top5_pct, loss, nll, ece_pct and images_evaluated."""
    yield "top1_pct", said.top1_pct
    yield "top5_pct", _share_pct(said.in_top5)
    yield "loss", said.loss
    yield "nll", said.nll
    yield "ece_pct", 100 * calibration_error(said.probability, said.right)
    yield "images_evaluated", len(said.label)


def by_task(of_each: Mapping[str, Outcomes]) -> dict[str, float]:
    """Top-1 and NLL of each task, and their means over tasks, in which each task counts once. (The mean over images,
    in which a task counts as often as it has images, is what stands under the plain names.)"""
    values = {name: {"top1_pct": said.top1_pct, "nll": said.nll} for name, said in of_each.items()}
    row = {TASK_QUALITY.format(name, key): number for name, own in values.items() for key, number in own.items()}
    for key in ("top1_pct", "nll"):
        row[OVER_TASKS.format(key)] = sum(own[key] for own in values.values()) / len(values)
    return row


def evaluate(
    model: nn.Module, batches: Iterable[Batch], *, loss: str, autocast: torch.autocast, collect: Collect = _seen_all
) -> Iterator[tuple[str, float]]:
    """The `qualities` of a model on labelled images."""
    return qualities(outcomes(model, batches, loss=loss, autocast=autocast, collect=collect))


@torch.no_grad()
def features(
    model: VisionTransformer, batches: Iterable[Batch], autocast: torch.autocast, collect: Collect = _seen_all
) -> Float[Tensor, "n d"]:
    """What the head would see of every image (pooled, after the last norm), float32, on the CPU."""
    model.eval()
    pooled: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda _head, inputs: pooled.append(inputs[0].float()))
    with hook, autocast:
        for batch in batches:
            model(
                *batch.inputs
            )  # called as a module: weights that are divided among processes are gathered around such a call
    return torch.cat(collect(pooled)).cpu()


def watched_routers(model: VisionTransformer) -> Iterator[tuple[dict[str, int | str], Decider]]:
    """What decides in a model, in the order of its blocks, and where it stands: the `block`, and of adapters the
    sublayer `beside` which it is. That of a head with experts comes last, as a block of its own `beside` which is the
    head."""
    for name, module in model.named_modules():
        if isinstance(module, FactorisedHead):
            yield {"block": len(model.blocks), "beside": "head"}, module.router
        if isinstance(module, Layer | SoftMoA):
            where = re.search(r"\bblocks\.(\d+)\.(\w+)", name)
            assert where is not None
            place: dict[str, int | str] = {"block": int(where[1])}
            if isinstance(module, SoftMoA):
                place["beside"] = where[2].removesuffix("_adapter")
            yield place, module.router


@torch.no_grad()
def routing_statistics(
    model: VisionTransformer, batch: Batch, autocast: torch.autocast
) -> list[tuple[dict[str, int | str], dict[str, float], dict[str, Any]]]:
    """Statistics of every router on one batch; before them where it stands, as in `watched_routers`; behind them what
    it tells beside numbers."""
    model.eval()
    statistics: list[tuple[dict[str, int | str], dict[str, float], dict[str, Any]]] = []

    def remember(place: dict[str, int | str]) -> Any:
        def hook(router: Decider, _inputs: object, decision: Decided) -> None:
            with full_precision(batch.images):  # now, when the router's weights are whole
                statistics.append((place, decision.statistics() | router.statistics(), decision.told()))

        return hook

    hooks = [router.register_forward_hook(remember(place)) for place, router in watched_routers(model)]
    with autocast:
        model(*batch.inputs)
    for hook in hooks:
        hook.remove()
    return statistics
