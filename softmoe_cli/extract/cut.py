"""The model of some tasks out of one that knows several: the experts that they take, and their classes.

Exact: what a task takes does not depend on an image (Kudugunta et al., 2021, https://arxiv.org/abs/2110.03742, Section
3.2), so that experts which it does not take have no part in its outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from softmoe_cli.config.model import Model
from softmoe_cli.errors import UsageError
from softmoe_cli.model.vit import portable_options
from softmoe_cli.moe.by_task import TaskRouter
from softmoe_cli.moe.kind import Layer
from softmoe_cli.moe.layer import MoE


@dataclass(frozen=True)
class Cut:
    """A model with its weights, in the precision of what it was cut out of.

    Attributes:
        kept: by block the experts that stay, by their old numbers; of blocks that decide by task.
        whole: by block the router whose experts all stay, as it does not decide by task.
    """

    model: Model
    weights: dict[str, Tensor]
    kept: dict[int, list[int]]
    whole: dict[int, str]


def outputs_of(tasks: Mapping[str, int], which: Sequence[str]) -> list[int]:
    """The outputs of a head that are of some tasks, one task after the other."""
    numbers = dict(zip(tasks, range(len(tasks)), strict=True))
    sizes = list(tasks.values())
    first = [sum(sizes[:i]) for i in range(len(sizes))]
    return [first[numbers[name]] + i for name in which for i in range(tasks[name])]


@torch.no_grad()
def cut_out(model: Model, vit: VisionTransformer, which: Sequence[str]) -> Cut:
    """The model of the tasks `which`, in this order, with the experts that they take in every block.

    Raises:
        UsageError: there is none that computes the same.
    """
    if model.head != "linear":
        raise UsageError(f"model.head={model.head} is one tensor for all classes; only a linear head can be cut")
    if model.adapter.name != "none":
        raise UsageError(f"a model with adapters ({model.adapter.name}) cannot be cut; take what they belong to")
    names = list(model.tasks)
    numbers = [names.index(name) for name in which]
    weights, options = dict(vit.state_dict()), {}
    kept: dict[int, list[int]] = {}
    whole: dict[int, str] = {}
    for place, block in enumerate(vit.blocks):
        layer = block.mlp
        if not isinstance(layer, Layer):
            continue
        options[place] = portable_options(model.router_of(place), layer)
        if not isinstance(layer, MoE) or not isinstance(layer.router, TaskRouter):
            whole[place] = str(options[place]["_target_"]).split(".")[-2]
            continue
        chosen = layer.router.settled()[1]
        kept[place] = sorted({expert for task in numbers for expert in chosen[task]})
        try:
            own, factor = layer.router.weights_of(numbers, kept[place])
        except ValueError as error:
            raise UsageError(f"{model.router_key(place)}: {error}") from error
        options[place] |= layer.router.options_of(numbers, kept[place])
        start = f"blocks.{place}.mlp."
        for name in list(weights):
            if name.startswith(f"{start}experts."):
                times = factor if name.endswith((".w2", ".b2")) else 1.0
                weights[name] = times * weights[name][kept[place]]
            elif name.startswith(f"{start}router."):
                weights[name] = own[name.removeprefix(f"{start}router.")]
    for name in ("head.weight", "head.bias"):
        weights[name] = weights[name][outputs_of(model.tasks, which)]
    tasks = {name: model.tasks[name] for name in which} if len(which) > 1 else None
    return Cut(replace(model, tasks=tasks).with_routers(options), weights, kept, whole)
