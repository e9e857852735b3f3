"""A timm VisionTransformer with some of its MLPs replaced."""

import dataclasses
import math
import pkgutil
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any

import timm
import torch
from timm.layers import GELU, Attention, GELUTanh, Mlp, PatchEmbed, lecun_normal_
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from softmoe_cli.config.model import Model, check_blocks, placement
from softmoe_cli.errors import UsageError, first_line, nearest
from softmoe_cli.model.adapted import adapt
from softmoe_cli.model.blocks import CarryingBlock
from softmoe_cli.model.router import make_layer
from softmoe_cli.model.tasks import task_vit
from softmoe_cli.moe import routers
from softmoe_cli.moe.factorised import FactorisedRouter
from softmoe_cli.moe.kind import Layer
from softmoe_cli.moe.layer import MoE
from softmoe_cli.moe.routing import Router


def build(model: Model, num_classes: int) -> VisionTransformer:
    """The model of a config, freshly initialised from torch's random state; with adapters, all but them is frozen as
    they need it.

    Raises:
        UsageError: a router, placement or timm model that cannot be built.
    """
    if model.backbone.timm is None:
        vit = _official_vit(model, num_classes)
    else:
        vit = _timm_vit(model.backbone.timm, model, num_classes)
    if model.mixture:
        blocks = placement(model.moe_blocks, len(vit.blocks))
        if not blocks:
            raise UsageError(f"model.moe_blocks=[] leaves router {model.router_name} without a block; name some")
        check_blocks(model.blocks, blocks)  # of timm's models nobody knows the depth before
        for index in blocks:
            block = vit.blocks[index]
            block.mlp = _layer(block.mlp, model, index, num_tokens=count_tokens(vit))
        if model.expert_init == "independent" and not any(isinstance(block.mlp, MoE) for block in vit.blocks):
            raise UsageError(
                f"model.expert_init=independent has no effect with router {model.router_name}, which makes its experts "
                "itself; leave it identical"
            )
        _join(vit, blocks, model)
    if model.head != "linear":
        vit.head = _head(model, vit.head.in_features, num_classes)
    adapt(vit, model.adapter)
    return task_vit(vit, model.tasks, num_classes)


def _join(vit: VisionTransformer, blocks: Sequence[int], model: Model) -> None:
    """Lets the layers of these blocks hand on what their routers carry, through the blocks between them."""
    deciders = [vit.blocks[index].mlp.router for index in blocks]
    routers_of = {index: each for index, each in zip(blocks, deciders, strict=True) if isinstance(each, Router)}
    carrying = [index for index, each in routers_of.items() if each.carries and not each.by_task]
    by_task = [index for index, each in routers_of.items() if each.by_task]
    if not carrying:
        for index in range(max(by_task, default=-1) + 1):  # from the first one on: the task comes with the image
            vit.blocks[index] = CarryingBlock(vit.blocks[index], first=index == 0, last=index == max(by_task))
        return
    if model.blocks:
        raise UsageError(
            f"{model.router_key(carrying[0])}: a router that hands on its logits from block to block, as "
            "zero_computation does with gating_residual=true, cannot be among others; set gating_residual=false, or "
            "leave model.blocks out"
        )
    for earlier, router in pairwise(deciders):
        router.follow(earlier)
    first, last = blocks[0], blocks[-1]
    if first < last:
        for index in range(first, last + 1):
            vit.blocks[index] = CarryingBlock(vit.blocks[index], first=index == first, last=index == last)


def _head(model: Model, dim: int, num_classes: int) -> nn.Module:
    """Factorised experts with as many parameters as the linear head of so many classes."""
    found = _heads()
    if model.head not in found:
        names = ["linear", *found]
        raise UsageError(f"model.head={model.head} is none of {', '.join(names)}.{nearest(model.head, names)}")
    options = {"num_experts": model.head_experts, "num_experts_2": None, "rank": "matched", "gate": "entmax15"}
    options |= {"norm": model.head_norm, "bias": True, "input_norm": False}
    kind: Any = found[model.head]
    try:
        head: nn.Module = kind(dim, 1, **options).head(num_classes)
    except ValueError as error:
        raise UsageError(f"model.head={model.head} with model.head_experts={model.head_experts}: {error}") from error
    return head


def _heads() -> dict[str, type[FactorisedRouter]]:
    """The routers that can make a head, by the names of their files."""
    found = {}
    for each in pkgutil.iter_modules(routers.__path__):
        module = import_module(f"{routers.__name__}.{each.name}")
        own = [kind for kind in vars(module).values() if getattr(kind, "__module__", None) == module.__name__]
        for kind in own:
            if isinstance(kind, type) and issubclass(kind, FactorisedRouter):
                found[each.name] = kind
    return found


def portable(model: Model, vit: VisionTransformer) -> dict[str, Any]:
    """The model's config as a checkpoint keeps it: routers with their sizes fixed, for any number of tokens."""
    kept = dataclasses.asdict(model)
    for index, block in enumerate(vit.blocks):
        if isinstance(block.mlp, Layer):
            options = portable_options(model.router_of(index), block.mlp)
            if str(index) in kept["blocks"]:
                kept["blocks"][str(index)] = options
            else:
                kept["router"] = options
    return kept


def portable_options(options: dict[str, Any], layer: Layer) -> dict[str, Any]:
    """A router's options with the sizes that resulted, such as the number of slots: they build the same layer for any
    number of tokens."""
    return options | {key: value for key, value in layer.fixed_options().items() if key in options}


def count_tokens(vit: VisionTransformer) -> int:
    """n: patches, class token and registers of one image."""
    return int(vit.patch_embed.num_patches + vit.num_prefix_tokens)


def mlp_ratio(hidden: int, width: int) -> float:
    """What timm must be told to make MLPs of exactly so many hidden units: it rounds width * ratio down."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


class Patches(PatchEmbed):
    """timm's, with each token's numbers side by side. A convolution leaves those of an image's tokens side by side,
    what is added to them keeps that order, and every norm would copy all tokens, forwards and backwards."""

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = super().forward(x)
        return tokens.contiguous()


def _official_vit(model: Model, num_classes: int) -> VisionTransformer:
    """timm's ViT with the choices of the official Soft MoE configs, each of them an option of `Backbone`."""
    c = model.backbone
    assert c.width is not None and c.heads is not None and c.mlp_width is not None
    assert c.norm_eps is not None and c.pos_std is not None
    norm = partial(nn.LayerNorm, eps=c.norm_eps)
    abstract = torch.get_default_device().type == "meta"  # there is nothing to initialise, and initialising takes time
    vit = VisionTransformer(
        img_size=model.image_size,
        patch_size=c.patch_size,
        in_chans=model.in_chans,
        num_classes=num_classes,
        global_pool=c.pool,
        embed_dim=c.width,
        depth=c.depth,
        num_heads=c.heads,
        mlp_ratio=mlp_ratio(c.mlp_width, c.width),
        qk_norm=c.qk_norm != "none",
        init_values=c.layer_scale,
        class_token=c.class_token,
        fc_norm=c.norm_after_pool,
        drop_path_rate=c.drop_path,
        norm_layer=norm,
        embed_layer=Patches,
        act_layer=GELUTanh if c.gelu == "tanh" else nn.GELU,
        weight_init="skip" if abstract else "",
    )
    if c.qk_norm == "scale":
        for block in vit.blocks:
            for name in ("q_norm", "k_norm"):
                setattr(block.attn, name, norm(c.width // c.heads, bias=False))
    if c.pre_logits:  # where timm's forward has a norm, which such a model has before its pooling
        layer = nn.Linear(c.width, c.width)
        vit.fc_norm = nn.Sequential(OrderedDict(pre_logits=layer, tanh=nn.Tanh()))
    if c.init == "official" and not abstract:
        _init_official(vit)
    if not abstract:
        nn.init.normal_(vit.pos_embed, std=c.pos_std)
    return vit


@torch.no_grad()
def _init_official(vit: VisionTransformer) -> None:
    """The initialisation of the official code's backbone (vmoe's vit_moe.py and Flax's defaults)."""
    for name, module in vit.named_modules():
        if isinstance(module, nn.Conv2d):
            lecun_normal_(module.weight)
        elif isinstance(module, nn.Linear):
            for matrix in module.weight.chunk(3 if name.endswith("qkv") else 1):  # q, k, v have a fan each
                nn.init.xavier_uniform_(matrix)
        else:
            continue
        if module.bias is not None:
            nn.init.normal_(module.bias, std=1e-6 if ".mlp." in name else 0.0)
    if vit.cls_token is not None:
        nn.init.zeros_(vit.cls_token)
    nn.init.zeros_(vit.head.weight)
    nn.init.constant_(vit.head.bias, -math.log(vit.num_classes))


def _timm_vit(name: str, model: Model, num_classes: int) -> VisionTransformer:
    if not timm.is_model(name):
        raise UsageError(f"timm has no model '{name}'.{nearest(name.split('.')[0], timm.list_models('*vit*'))}")
    try:
        vit = timm.create_model(
            name,
            img_size=model.image_size,
            in_chans=model.in_chans,
            num_classes=num_classes,
            drop_path_rate=model.backbone.drop_path or 0.0,
            pretrained=False,
        )
    except (TypeError, AssertionError, RuntimeError) as error:
        raise UsageError(
            f"timm's {name} cannot be built at model.image_size={model.image_size}: {first_line(error)}"
        ) from error
    vit = plain_vit(name, vit)
    patch = vit.patch_embed.patch_size[0]
    if model.image_size % patch:
        raise UsageError(
            f"model.image_size={model.image_size} is not a multiple of {patch}, the patch of timm's {name}; "
            f"the nearest sizes that are: {max(1, model.image_size // patch) * patch}, "
            f"{(model.image_size // patch + 1) * patch}"
        )
    return vit


def plain_vit(name: str, vit: nn.Module) -> VisionTransformer:
    """Accepts only what the cost formula and the loading of weights know."""
    # Subclasses have more parts: DeiT's second head, for example, has no formula and cannot get other classes.
    if not isinstance(vit, VisionTransformer) or type(vit) is not VisionTransformer:
        raise UsageError(f"timm's {name} is a {type(vit).__name__}, not a plain VisionTransformer")
    strange = {type(block).__name__ for block in vit.blocks if type(block) is not Block}
    inside = [
        part
        for block in vit.blocks
        if type(block) is Block
        for part, kind in ((block.attn, Attention), (block.mlp, Mlp))
        if type(part) is not kind
    ]
    strange |= {type(part).__name__ for part in inside}
    if type(vit.patch_embed) is not PatchEmbed:  # convolutions before the patches
        strange.add(type(vit.patch_embed).__name__)
    if vit.attn_pool is not None:
        strange.add(type(vit.attn_pool).__name__)
    if strange:
        raise UsageError(
            f"timm's {name} has {', '.join(sorted(strange))}; softmoe knows ViTs with plain patches and blocks only"
        )
    return vit


def _layer(mlp: nn.Module, model: Model, index: int, num_tokens: int) -> Layer:
    """Router and experts of a block, in the shape of the dense MLP that they replace."""
    if (
        not isinstance(mlp, Mlp)
        or not isinstance(mlp.act, nn.GELU | GELU | GELUTanh)
        or not isinstance(mlp.norm, nn.Identity)
    ):
        plumbing = (nn.Linear, nn.Dropout, nn.Identity)
        inside = ", ".join(type(part).__name__ for part in mlp.children() if not isinstance(part, plumbing))
        raise UsageError(
            f"model.backbone.timm={model.backbone.timm} has {type(mlp).__name__} blocks with {inside}; "
            "experts replace plain GELU MLPs"
        )
    dim, hidden = mlp.fc1.in_features, model.expert_width or mlp.fc1.out_features
    gelu, identical = "tanh" if isinstance(mlp.act, GELUTanh) else "none", model.expert_init == "identical"
    options, where = _of_tasks(model.router_of(index), model.tasks, model.router_key(index)), model.router_key(index)
    layer = make_layer(options, dim, hidden, num_tokens, gelu=gelu, identical=identical, where=where)
    if isinstance(layer.router, Router) and layer.router.needs_independent_experts and identical:
        name = str(options["_target_"]).split(".")[-2]
        raise UsageError(
            f"model.expert_init=identical: with router {name} experts that start equal stay equal; set "
            "model.expert_init=independent"
        )
    _check_runs(layer.run_widths, "fp32")
    return layer


def _of_tasks(options: dict[str, Any], tasks: dict[str, int] | None, where: str) -> dict[str, Any]:
    """A router's options with the number of tasks that the model knows, where it decides by them."""
    if "num_tasks" not in options:
        return options
    said, known = options["num_tasks"], None if tasks is None else len(tasks)
    if said not in (None, known or 1):
        raise UsageError(f"{where}.num_tasks={said}: the model knows {known or 'one and no other'}; leave it null")
    return options | {"num_tasks": known if said is None else said}


def _check_runs(widths: Sequence[int], precision: str) -> None:
    """Raises UsageError where torch's grouped product would refuse: its rows must take whole 16 bytes."""
    unit = 4 if precision == "fp32" else 8
    if any(width % unit for width in widths):
        raise UsageError(
            f"a router without capacity multiplies runs of rows, in {precision} only of multiples of {unit} numbers: "
            f"the model is {widths[0]} wide, its experts {widths[1]}; change model.backbone.width or model.expert_width"
        )


def prepare(vit: VisionTransformer, device: torch.device, precision: str) -> None:
    """Turns off fused attention on a CPU in half precision, where its backward pass is several times slower.

    Raises:
        UsageError: experts whose width this precision cannot multiply.
    """
    for block in vit.blocks:
        block.attn.fused_attn = block.attn.fused_attn and (device.type != "cpu" or precision == "fp32")
        if isinstance(block.mlp, Layer):
            _check_runs(block.mlp.run_widths, precision)
