"""Our models under an entry point of timm's, so that timm loads what `softmoe export` has pushed."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, register_model, resolve_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from softmoe_cli.config.adapter import AdapterOptions
from softmoe_cli.config.model import Backbone, Model
from softmoe_cli.errors import UsageError
from softmoe_cli.model.vit import build


def softmoe_vit(pretrained: bool = False, *, softmoe: dict[str, Any], **arguments: Any) -> VisionTransformer:
    """timm's entry point to what softmoe trained: the architecture in the config.json of folders from softmoe export.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` comes here once this module is imported; num_classes,
    in_chans and img_size may be asked for as with timm's own models; a head for other classes than it was trained on is
    a new linear one, as timm's reset_classifier makes it.

    Args:
        softmoe: the model's config, as a checkpoint keeps it.

    Raises:
        UsageError: a model that cannot be built, or with a router that is not softmoe's and not imported yet.
    """
    parts = {"backbone": Backbone(**softmoe["backbone"]), "adapter": AdapterOptions(**softmoe["adapter"])}
    model = Model(**softmoe | parts)
    for target in (str(each["_target_"]) for each in model.routers):
        if target != "None" and not target.startswith("softmoe_cli.moe.routers."):
            module = target.rpartition(".")[0]
            if module not in sys.modules:  # to import a module is to run it, and a file may name any
                raise UsageError(f"the router {target} is not softmoe's; if you trust it, import {module} first")
    trained = resolve_pretrained_cfg("softmoe_vit", arguments.get("pretrained_cfg")).num_classes
    make = partial(_adapted, model, trained)
    vit: VisionTransformer = build_model_with_cfg(
        make, "softmoe_vit", pretrained, pretrained_filter_fn=_for_timm, **arguments
    )
    return vit


def _for_timm(weights: dict[str, Tensor], vit: VisionTransformer) -> dict[str, Tensor]:
    """What timm makes of weights for its models, with the layer before the head, which timm leaves out."""
    own = {name: value for name, value in weights.items() if name.startswith("fc_norm.pre_logits.")}
    kept: dict[str, Tensor] = checkpoint_filter_fn(weights, vit)
    return kept | own


def _adapted(
    model: Model,
    trained: int,
    num_classes: int,
    img_size: int | Sequence[int],
    in_chans: int,
    global_pool: str | None = None,
) -> VisionTransformer:
    """`trained`: the classes that the model's own head is for."""
    sides = {img_size} if isinstance(img_size, int) else set(img_size)
    if len(sides) != 1:
        raise UsageError(f"img_size={img_size}: images of softmoe's models are square")
    head = model.head if num_classes == trained else "linear"
    asked = replace(model, image_size=sides.pop(), in_chans=in_chans, head=head).settled()
    vit = build(asked, num_classes or 1)
    if global_pool not in (None, vit.global_pool):
        raise UsageError(f"global_pool={global_pool}: this model was trained with {vit.global_pool}")
    if not num_classes:
        vit.reset_classifier(0)
    return vit


register_model(softmoe_vit)
