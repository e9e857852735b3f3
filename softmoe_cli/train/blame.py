"""The messages when numbers stop being finite, or memory ends."""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from softmoe_cli.config.recipe import Train
from softmoe_cli.errors import RunError, first_line
from softmoe_cli.moe.kind import Layer
from softmoe_cli.parallel import own_part


def exploded(what: str, step: int) -> RunError:
    """The error for an evaluation whose numbers are not finite: the update before it has spoilt the weights."""
    return RunError(
        f"{what} at step {step:,}: the last update left weights that are too large or not finite; lower "
        "optim.lr or set optim.clip_norm, and type the command again"
    )


def not_finite(
    model: VisionTransformer,
    inputs: tuple[Tensor, ...],
    autocast: torch.autocast,
    first_image: int,
    step: int,
    loss: float,
    norm: float,
) -> RunError:
    """The error for an update that was not made. Goes through the same batch again to find where the loss or a gradient
    first stopped being finite. `first_image` is the place of the batch's first image in the stream of all batches."""
    x = inputs[0]
    broken: list[str] = []

    def remember(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, tuple):  # what a layer hands on stands behind its tokens
                output = output[0]
            if isinstance(output, Tensor) and not output.isfinite().all():
                broken.append(name)

        return hook

    hooks = [m.register_forward_hook(remember(name)) for name, m in model.named_modules() if not list(m.children())]
    hooks += [m.register_forward_hook(remember(name)) for name, m in model.named_modules() if isinstance(m, Layer)]
    with torch.no_grad(), autocast:
        model(*inputs)
    for hook in hooks:
        hook.remove()
    gradients = [n for n, p in model.named_parameters() if p.grad is not None and not own_part(p.grad).isfinite().all()]
    if broken:
        where = f"first in the output of {broken[0]}"
    else:
        where = f"in the gradient of {gradients[-1] if gradients else 'the loss'}"
    pixels = "finite" if x.isfinite().all() else "not finite"
    return RunError(
        f"loss {loss} and gradient norm {norm} at step {step:,} (batch of images {first_image:,} to "
        f"{first_image + len(x) - 1:,} of the stream; input {pixels}): not finite {where}. The update was not made; "
        "lower optim.lr, or set optim.clip_norm or train.precision=fp32"
    )


def out_of_memory(error: torch.OutOfMemoryError, step: int, train: Train, whole_batches: str | None) -> RunError:
    """The error for a step without room on the device. `whole_batches`: why a batch cannot be computed in parts."""
    ways = ["lower train.batch_size"]
    if whole_batches is None:
        ways.append("raise train.accumulate")
    if not train.recompute:
        ways.append("set train.recompute=true")
    return RunError(f"out of memory at step {step:,} ({first_line(error)}); {' or '.join(ways)}")
