"""The model of the experts that are left, and how it differs from the whole one on images."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from softmoe_cli.config.model import Model
from softmoe_cli.data.batches import Batch
from softmoe_cli.device import wait
from softmoe_cli.errors import UsageError
from softmoe_cli.evaluate.quality import classification_loss
from softmoe_cli.model.vit import portable_options
from softmoe_cli.moe.layer import MoE

UNTIMED = 2


def smaller_model(model: Model, vit: VisionTransformer) -> Model:
    """The config of a mixture with the experts that are left."""
    options = {}
    for place, block in enumerate(vit.blocks):
        if isinstance(block.mlp, MoE):
            own = portable_options(model.router_of(place), block.mlp)
            options[place] = own | {k: v for k, v in block.mlp.router.options_left().items() if k in own}
    return model.with_routers(options)


def smaller_weights(vit: VisionTransformer) -> dict[str, Tensor]:
    """The weights of `smaller_model`."""
    state = dict(vit.state_dict())
    for place, block in enumerate(vit.blocks):
        if isinstance(block.mlp, MoE):
            start = f"blocks.{place}.mlp."
            state = {key: value for key, value in state.items() if not key.startswith(start)}
            state |= {start + name: value for name, value in block.mlp.weights_left().items()}
    return {key: value.contiguous() for key, value in state.items()}


def key_map(weights: Mapping[str, Tensor], kept: Mapping[int, Sequence[int]], to: str) -> dict[str, dict[str, Any]]:
    """For each weight that is not simply copied: `from` which experts it comes, by block and number, and `how`."""
    parts = (".mlp.experts.", ".mlp.router.") if to == "experts" else (".mlp.fc",)
    how = "chosen" if to == "experts" else "folded, with the shared experts' if there are such"
    found = {}
    for key in weights:
        place = int(key.split(".")[1]) if key.startswith("blocks.") else -1
        if place in kept and any(part in key for part in parts):
            found[key] = {"from": {"block": place, "experts": list(kept[place])}, "how": how}
    return found


@torch.no_grad()
def compared(
    whole: nn.Module,
    new: nn.Module,
    batches: Iterable[Batch],
    *,
    checkpoint: str,
    loss: str,
    labelled: bool,
) -> dict[str, Any]:
    """Both models' outputs on all `images`: how far apart they are and, if `labelled`, `quality` before and after; else
    no label is looked at.

    Raises:
        UsageError: an output of a model made of `checkpoint` is no finite number.
    """
    whole.eval(), new.eval()
    images, same, changes, most = 0, 0, 0.0, 0.0
    right, losses = [0, 0], [0.0, 0.0]
    for x, labels, _ in batches:
        outputs = whole(x), new(x)
        answers = [each.argmax(dim=1) for each in outputs]
        change = (outputs[1] - outputs[0]).abs()
        if not change.isfinite().all():
            raise UsageError(
                f"checkpoint={checkpoint}: its outputs in float32 are no finite numbers; train again with a lower "
                "optim.lr, or name another checkpoint"
            )
        images, same = images + len(x), same + int((answers[0] == answers[1]).sum())
        changes, most = changes + change.mean(dim=1).sum().item(), max(most, change.max().item())
        if labelled:
            targets = F.one_hot(labels, outputs[0].shape[1]).float()
            for i in range(2):
                right[i] += int((answers[i] == labels).sum())
                losses[i] += classification_loss(outputs[i], targets, loss).item() * len(x)
    quality = [
        {"top1_pct": 100 * right[i] / images, "loss": losses[i] / images} if labelled else None for i in range(2)
    ]
    return {
        "images": images, "mean_change": changes / images, "max_change": most,
        "same_predictions_pct": 100 * same / images, "quality": {"before": quality[0], "after": quality[1]},
    }  # fmt: skip


@torch.no_grad()
def distance_in_float64(
    one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[float, int]:
    """The largest difference of an output, as a share of the largest output; and images with another prediction."""
    a, b = one(x), other(x)
    share = ((a - b).abs().max() / a.abs().max().clamp(min=torch.finfo(a.dtype).tiny)).item()
    return share, int((a.argmax(dim=1) != b.argmax(dim=1)).sum())


@torch.no_grad()
def latencies(models: Mapping[str, nn.Module], x: Tensor, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a forward pass of `x`, the models taking turns: median, and the distance of the quartiles."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(-UNTIMED, repeats):
        for name, model in models.items():
            wait(x.device)
            start = time.perf_counter()
            model(x)
            wait(x.device)
            if turn >= 0:
                times[name].append(1000 * (time.perf_counter() - start))
    found = {}
    for name, each in times.items():
        low, middle, high = statistics.quantiles(each, n=4)
        found[name] = {"latency_ms": middle, "latency_spread_ms": high - low}
    return found
