"""What one task costs that was taken out of a model of several: beside what was trained, what is served."""

from dataclasses import replace

from timm.models.vision_transformer import VisionTransformer

from softmoe_cli.config.model import Model
from softmoe_cli.cost.flop import Cost, account
from softmoe_cli.model.vit import portable_options
from softmoe_cli.moe.by_task import TaskRouter
from softmoe_cli.moe.kind import Layer
from softmoe_cli.moe.layer import MoE


def of_one_task(model: Model, vit: VisionTransformer) -> Model:
    """The config of what softmoe extract makes of one task: the experts that it takes, as many of each task, and all
    where a block does not decide by task. `vit`: the whole model, which may be on the meta device."""
    options = {}
    for place, block in enumerate(vit.blocks):
        if isinstance(block.mlp, Layer):
            options[place] = portable_options(model.router_of(place), block.mlp)
            if isinstance(block.mlp, MoE) and isinstance(block.mlp.router, TaskRouter):
                options[place] |= block.mlp.router.options_alone()
    return replace(model, tasks=None).with_routers(options)


def extractable(model: Model) -> bool:
    """Whether softmoe extract takes single tasks out of it: it refuses other heads than linear ones, and adapters."""
    return bool(model.tasks) and model.head == "linear" and model.adapter.name == "none"


def served_tasks(model: Model, vit: VisionTransformer) -> dict[str, Cost]:
    """The cost of each task alone, by its name; nothing for a model that none is taken out of."""
    if not extractable(model):
        return {}
    layers = {place: block.mlp for place, block in enumerate(vit.blocks) if isinstance(block.mlp, MoE)}
    left = {place: layer.left for place, layer in layers.items() if "alive" in dict(layer.named_buffers())}
    alone = of_one_task(model, vit)
    return {name: account(alone, classes, left=left) for name, classes in model.tasks.items()}
