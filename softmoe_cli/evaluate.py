"""Quality of a model on a set of images, each counted exactly once: an iterator of (name, value)."""

import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softmoe_cli import data
from softmoe_cli.config import EvaluateConfig, Model, UsageError, check_groups
from softmoe_cli.device import arithmetic, hardware, prepare_attention
from softmoe_cli.models import build, load_weights
from softmoe_cli.moe.routing import Router, routings
from softmoe_cli.record import Source
from softmoe_cli.terminal import Screen

Batch = tuple[Tensor, Tensor]


def classification_loss(logits: Tensor, targets: Tensor, kind: str) -> Tensor:
    """Mean over images, float32. `targets` (b, classes) are shares of each class.

    softmax: cross-entropy. sigmoid: binary cross-entropy summed over classes (the official pretraining loss).
    """
    logits = logits.float()
    if kind == "sigmoid":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1).mean()
    return F.cross_entropy(logits, targets)


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], *, loss: str, autocast: torch.autocast
) -> Iterator[tuple[str, float]]:
    """Yields top1_pct, top5_pct, loss and images_evaluated. Sums are float64, so that the batch size does not show."""
    model.eval()
    images = 0
    sums = torch.zeros(3, dtype=torch.float64)
    with autocast:  # around all batches: a weight is cast once
        for x, labels in batches:
            logits = model(x).float()
            targets = F.one_hot(labels, logits.shape[1]).float()
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            means = [best[:, 0].float().mean(), best.any(dim=1).float().mean()]
            means.append(classification_loss(logits, targets, loss))
            sums += torch.stack(means).cpu().double() * len(labels)
            images += len(labels)
    yield "top1_pct", 100 * round(sums[0].item()) / images
    yield "top5_pct", 100 * round(sums[1].item()) / images
    yield "loss", sums[2].item() / images
    yield "images_evaluated", images


@torch.no_grad()
def routing_statistics(model: nn.Module, batch: Batch, autocast: torch.autocast) -> list[dict[str, float]]:
    """One row of statistics per MoE layer, in the order of the blocks, on one batch."""
    model.eval()
    with routings(model) as seen, autocast:
        model(batch[0])
    routers = [module for module in model.modules() if isinstance(module, Router)]
    return [routing.statistics() | router.statistics() for routing, router in zip(seen, routers, strict=True)]


def evaluate_checkpoint(config: EvaluateConfig, model_config: Model, source: Source) -> None:
    """`softmoe evaluate`: prints top-1, top-5, loss, images and seconds of a checkpoint, as a table or as JSON.

    Raises:
        UsageError: the data have other classes than the checkpoint.
    """
    loss, precision = config.loss or source.card["loss"], config.precision or source.card["precision"]
    check_groups("batch_size", config.batch_size, model_config.router)
    device, autocast = arithmetic(config.device, precision, config.threads)
    splits = data.load(config.data)
    if source.card["classes"] != splits.classes:
        raise UsageError(
            f"checkpoint={source.label} knows {_shortly(source.card['classes'])}, but data={config.data.name} has "
            f"{_shortly(splits.classes)}; use softmoe finetune for other classes"
        )
    if "head.weight" not in source.weights:
        raise UsageError(f"checkpoint={source.label} has no head; softmoe finetune gives it one")
    model = build(model_config, source.weights["head.weight"].shape[0])
    load_weights(model, source.weights, keep_head=True, allow_unexpected=[])
    prepare_attention(model, device, precision)
    images = {"train": splits.train, "validation": splits.validation, "test": splits.test}[config.split]
    batches = data.eval_batches(
        images,
        config.data,
        image_size=model_config.image_size,
        in_chans=model_config.in_chans,
        batch_size=config.batch_size,
        device=device,
    )
    start = time.perf_counter()
    values = dict(evaluate(model.to(device), batches, loss=loss, autocast=autocast))
    row: dict[str, Any] = {"checkpoint": source.label, "data": config.data.name, "split": config.split}
    row |= {"top1_pct": values["top1_pct"], "top5_pct": values["top5_pct"], "loss": values["loss"]}
    row |= {"images": values["images_evaluated"], "eval_s": time.perf_counter() - start, "hardware": hardware(device)}
    if config.format == "json":
        print(json.dumps(row))
        return
    shown = {key: f"{value:.4f}" if isinstance(value, float) else str(value) for key, value in row.items()}
    Screen().table("evaluate", shown)


def _shortly(classes: list[str]) -> str:
    """`10 classes (0, 1, 2, …)`"""
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', …' if len(classes) > 3 else ''})"
