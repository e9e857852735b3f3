"""A timm VisionTransformer with some of its MLPs replaced; loading weights into it, resizing, a new head."""

import dataclasses
import fnmatch
import inspect
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import timm
import torch
from jaxtyping import Float
from timm.layers import GELU, Attention, GELUTanh, Mlp, lecun_normal_, resample_abs_pos_embed
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from softmoe_cli.config import Backbone, Model, group_of, placement
from softmoe_cli.errors import UsageError, first_line, nearest
from softmoe_cli.moe.layer import Experts, MoE
from softmoe_cli.moe.routing import Router
from softmoe_cli.record import Source, digest_of, read_source


def read_checkpoint(checkpoint: str) -> Source:
    """The weights that `checkpoint=` names: what `record.read_source` reads, `hf-hub:OWNER/NAME`, a folder that softmoe
    export made and pushed, or `timm:NAME`, a pretrained dense ViT.

    Raises:
        UsageError: nothing usable there.
    """
    if checkpoint.startswith("hf-hub:"):
        return replace(read_source(_pulled(checkpoint)), label=checkpoint)
    if not checkpoint.startswith("timm:"):
        return read_source(checkpoint)
    name = checkpoint.removeprefix("timm:")
    if timm.is_model(name) and "vit" not in name:
        raise UsageError(f"{checkpoint} is not a ViT; see timm.list_models('*vit*')")
    if not timm.is_model(name):
        raise UsageError(
            f"{checkpoint}: timm has no such model.{nearest(name.split('.')[0], timm.list_models('*vit*'))}"
        )
    try:
        vit = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError) as error:  # hub errors are OSErrors; timm raises RuntimeError without weights
        raise UsageError(f"{checkpoint}: timm could not fetch its weights ({first_line(error)})") from error
    _plain_vit(name, vit)
    weights = {key: value.contiguous() for key, value in vit.state_dict().items()}
    return Source(checkpoint, digest_of(weights), weights, timm_card(name))


def _pulled(checkpoint: str) -> str:
    """The folder of `hf-hub:OWNER/NAME[@REVISION]` in the Hugging Face cache, fetched where it is not there yet."""
    from huggingface_hub import errors, snapshot_download

    name, _, revision = checkpoint.removeprefix("hf-hub:").partition("@")
    try:
        return snapshot_download(name, revision=revision or None)
    except errors.HFValidationError as error:
        raise UsageError(f"checkpoint={checkpoint} is not of the form hf-hub:OWNER/NAME[@REVISION]") from error
    except (OSError, errors.HTTPError) as error:
        raise UsageError(
            f"checkpoint={checkpoint} could not be fetched ({first_line(error)}); to log in: hf auth login"
        ) from error


def timm_card(name: str) -> dict[str, Any]:
    """What a checkpoint of ours would say of a timm model's pretrained weights: its model and its pixels."""
    about = timm.get_pretrained_cfg(name)
    if about is None:
        raise UsageError(f"timm has no model '{name}'.{nearest(name.split('.')[0], timm.list_models('*vit*'))}")
    backbone: dict[str, Any] = dict.fromkeys(f.name for f in dataclasses.fields(Backbone))
    return {
        "model": {
            "backbone": backbone | {"name": name, "timm": name},
            "router": {"_target_": None},
            "image_size": about.input_size[-1],
            "in_chans": about.input_size[0],
            "moe_blocks": [],
            "expert_width": None,
            "expert_init": "identical",
        },
        "data": {"mean": list(about.mean), "std": list(about.std)},
    }


def build(model: Model, num_classes: int) -> VisionTransformer:
    """The model of a config, freshly initialised from torch's random state.

    Raises:
        UsageError: a router, placement or timm model that cannot be built.
    """
    if model.backbone.timm is None:
        vit = _official_vit(model, num_classes)
    else:
        vit = _timm_vit(model.backbone.timm, model, num_classes)
    if model.router["_target_"] is not None:
        blocks = placement(model.moe_blocks, len(vit.blocks))
        if not blocks:
            raise UsageError(f"model.moe_blocks=[] leaves router {model.router_name} without a block; name some")
        for index in blocks:
            block = vit.blocks[index]
            block.mlp = _moe(block.mlp, model, num_tokens=count_tokens(vit))
    return vit


def portable(model: Model, vit: VisionTransformer) -> dict[str, Any]:
    """The model's config as a checkpoint keeps it: routers with their slots fixed, for any number of tokens."""
    kept = dataclasses.asdict(model)
    for block in vit.blocks:
        if isinstance(block.mlp, MoE):
            kept["router"] = portable_options(model.router, block.mlp.router)
    return kept


def portable_options(options: dict[str, Any], router: Router) -> dict[str, Any]:
    """A router's options with the slots that came of them: the same router for any number of tokens."""
    fixed = {"slots_per_expert": router.slots_per_expert, "capacity_factor": None}
    return options | {key: value for key, value in fixed.items() if key in options}


def count_tokens(vit: VisionTransformer) -> int:
    """n: patches, class token and registers of one image."""
    return int(vit.patch_embed.num_patches + vit.num_prefix_tokens)


def _official_vit(model: Model, num_classes: int) -> VisionTransformer:
    """timm's ViT with the choices of the official Soft MoE configs, each of them an option of `Backbone`."""
    c = model.backbone
    assert c.width is not None and c.heads is not None and c.mlp_width is not None
    assert c.norm_eps is not None and c.pos_std is not None
    norm = partial(nn.LayerNorm, eps=c.norm_eps)
    abstract = torch.get_default_device().type == "meta"  # nothing to initialise, and it takes its time
    vit = VisionTransformer(
        img_size=model.image_size,
        patch_size=c.patch_size,
        in_chans=model.in_chans,
        num_classes=num_classes,
        global_pool=c.pool,
        embed_dim=c.width,
        depth=c.depth,
        num_heads=c.heads,
        mlp_ratio=c.mlp_width / c.width,
        qk_norm=c.qk_norm != "none",
        init_values=c.layer_scale,
        class_token=c.class_token,
        fc_norm=c.norm_after_pool,
        drop_path_rate=c.drop_path,
        norm_layer=norm,
        act_layer=GELUTanh if c.gelu == "tanh" else nn.GELU,
        weight_init="skip" if abstract else "",
    )
    if c.qk_norm == "scale":
        for block in vit.blocks:
            for name in ("q_norm", "k_norm"):
                setattr(block.attn, name, norm(c.width // c.heads, bias=False))
    if c.init == "official" and not abstract:
        _init_official(vit)
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
    vit = _plain_vit(name, vit)
    patch = vit.patch_embed.patch_size[0]
    if model.image_size % patch:
        raise UsageError(
            f"model.image_size={model.image_size} is not a multiple of {patch}, the patch of timm's {name}; "
            f"the nearest sizes that are: {max(1, model.image_size // patch) * patch}, "
            f"{(model.image_size // patch + 1) * patch}"
        )
    return vit


def _plain_vit(name: str, vit: nn.Module) -> VisionTransformer:
    """Only what the cost formula and the loading of weights know."""
    # Subclasses have more: DeiT's second head, for one, is in no formula and knows no other classes.
    if not isinstance(vit, VisionTransformer) or type(vit) is not VisionTransformer:
        raise UsageError(f"timm's {name} is a {type(vit).__name__}, not a plain VisionTransformer")
    strange = {type(block).__name__ for block in vit.blocks if type(block) is not Block}
    strange |= {type(block.attn).__name__ for block in vit.blocks if type(block) is Block and not _plain(block.attn)}
    if vit.attn_pool is not None:
        strange.add(type(vit.attn_pool).__name__)
    if strange:
        raise UsageError(f"timm's {name} has {', '.join(sorted(strange))}; softmoe knows ViTs with plain blocks only")
    return vit


def _plain(attention: nn.Module) -> bool:
    return type(attention) is Attention


def _moe(mlp: nn.Module, model: Model, num_tokens: int) -> MoE:
    """Router and experts in the shape of the dense MLP that they replace."""
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
    router = make_router(model.router, dim, num_tokens)
    if router.needs_independent_experts and model.expert_init == "identical":
        raise UsageError(
            f"model.expert_init=identical: with router {model.router_name} experts that start equal stay equal; "
            "set model.expert_init=independent"
        )
    if router.slots_per_expert is None:
        _check_runs([dim, hidden], "fp32")
    gelu = "tanh" if isinstance(mlp.act, GELUTanh) else "none"
    identical = model.expert_init == "identical"
    shared = router.shared_experts
    return MoE(
        router,
        Experts(router.num_experts, dim, hidden, gelu=gelu, identical=identical),
        # Several shared experts are one of their summed width.
        Experts(1, dim, shared * hidden, gelu=gelu, identical=True) if shared else None,
    )


def _check_runs(widths: Sequence[int], precision: str) -> None:
    """Raises UsageError where torch's grouped product would refuse: its rows must take whole 16 bytes."""
    unit = 4 if precision == "fp32" else 8
    if any(width % unit for width in widths):
        raise UsageError(
            f"a router without capacity multiplies runs of rows, in {precision} only of multiples of {unit} numbers: "
            f"the model is {widths[0]} wide, its experts {widths[1]}; change model.backbone.width or model.expert_width"
        )


def prepare(vit: VisionTransformer, device: torch.device, precision: str) -> None:
    """Unfused attention on a CPU in half precision, where the fused backward pass is several times slower.

    Raises:
        UsageError: experts whose width this precision cannot multiply.
    """
    for block in vit.blocks:
        block.attn.fused_attn = block.attn.fused_attn and (device.type != "cpu" or precision == "fp32")
        if isinstance(block.mlp, MoE) and block.mlp.router.slots_per_expert is None:
            _check_runs(block.mlp.experts.w1.shape[1:], precision)


def make_router(options: dict[str, Any], dim: int, num_tokens: int) -> Router:
    """The router that a config's `_target_` names, with the other keys as its arguments.

    The constructor's keyword-only arguments are the schema: unknown, missing and ill-typed keys are errors. Only
    subclasses of `Router` are ever called; but importing a module runs it, so what a checkpoint names is held against
    the known routers before it comes here.
    """
    router_class = _router_class(str(options["_target_"]))
    given = {key: value for key, value in options.items() if key != "_target_"}
    known = {
        name: get_type_hints(router_class.__init__).get(name)
        for name, parameter in inspect.signature(router_class).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    for key, value in given.items():
        if key not in known:
            raise UsageError(
                f"model.router.{key}: {router_class.__name__} has no such option."
                f"{nearest(key, known)} It has {', '.join(known)}"
            )
        if _admits(known[key], value):
            continue
        if type(value) is not int or not _admits(known[key], float(value)):
            names = " or ".join(map(_kind, _kinds(known[key])))
            raise UsageError(f"model.router.{key}={value} is of type {type(value).__name__}; it must be {names}")
        given[key] = float(value)
    missing = known.keys() - given.keys()
    if missing:
        raise UsageError(f"model.router.{sorted(missing)[0]} is missing; {router_class.__name__} needs it")
    try:
        router = router_class(dim, num_tokens, **given)
    except ValueError as error:
        raise UsageError(f"model.router: {error}") from error
    except Exception as error:
        if router_class.__module__.startswith("softmoe_cli."):
            raise
        raise UsageError(f"{router_class.__name__} cannot be made: {type(error).__name__}: {error}") from error
    if router.images_per_group not in (1, group_of(given)):
        raise UsageError(
            f"{router_class.__name__}.images_per_group={router.images_per_group} must come from an option of that "
            "name, which says in what groups images are read and divided among devices"
        )
    return router


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """What is allowed: one type or several. None: nothing is said."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _admits(annotation: Any, value: Any) -> bool:
    for kind in _kinds(annotation):
        if get_origin(kind) is Literal:
            if value in get_args(kind):
                return True
        elif kind in (None, Any) or type(value) is (get_origin(kind) or kind):
            return True
    return False


def _kind(annotation: Any) -> str:
    if annotation is NoneType:
        return "null"
    return " or ".join(map(str, get_args(annotation))) if get_origin(annotation) is Literal else annotation.__name__


def _router_class(target: str) -> type[Router]:
    module, _, name = target.rpartition(".")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a router of one's own is a file in the working folder
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"model.router._target_={target} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Router)):
        raise UsageError(f"model.router._target_={target} is not a subclass of softmoe_cli.moe.routing.Router")
    return found


@dataclass
class LoadReport:
    """What became of a checkpoint's weights, by key of the state dict."""

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def patterns(keys: list[str]) -> dict[str, None]:
    """Names in their order, with a * for the number of the block, each once."""
    return dict.fromkeys(re.sub(r"\bblocks\.\d+\.", "blocks.*.", key) for key in keys)


def load_weights(
    vit: VisionTransformer,
    state: dict[str, Tensor],
    *,
    keep_head: bool,
    allow_unexpected: list[str],
    resize_slots: bool = False,
) -> LoadReport:
    """Copies `state` into `vit`: position table resampled by timm, head kept or left new, the parameters of slots made
    more or fewer with `resize_slots`, all else exact.

    Raises:
        UsageError: a weight that is missing, of another shape, not finite, or unexpected and not allowed
            (`allow_unexpected` takes names and shell patterns).
    """
    own, report, incoming = vit.state_dict(), LoadReport(), {}
    slots = slot_axes(vit) if resize_slots else {}
    for key, value in state.items():
        if not value.isfinite().all():
            raise UsageError(f"{key} in the checkpoint holds values that are not finite; it comes from a broken run")
        if key.startswith("head.") and not keep_head:
            continue
        if key not in own:
            report.unexpected.append(key)
        elif value.is_floating_point() != own[key].is_floating_point():
            raise UsageError(f"{key} in the checkpoint is of {value.dtype}, which no such weight is")
        elif key == "pos_embed" and value.shape != own[key].shape:
            incoming[key] = _resample(vit, value)
            report.resized.append(f"{key} {value.shape[1]} -> {own[key].shape[1]} positions")
        elif key in slots and _alike(value, own[key], but=slots[key]):
            before, after = value.shape[slots[key]], own[key].shape[slots[key]]
            incoming[key] = resized_slots(value, slots[key], after)
            report.resized.append(f"{key} {before} -> {after} slots per expert")
        elif value.shape != own[key].shape:
            raise UsageError(
                f"the checkpoint is of another architecture: {key} is {tuple(value.shape)} there and "
                f"{tuple(own[key].shape)} in {'the model' if key != 'patch_embed.proj.weight' else _PATCH_HINT}"
            )
        else:
            incoming[key] = value
            report.loaded.append(key)
    report.new = [key for key in own if key not in incoming]
    strange = [key for key in report.new if not key.startswith("head.")]
    if strange:
        raise UsageError(
            f"the checkpoint is of another architecture: it lacks {', '.join(strange[:3])}"
            f"{f' and {len(strange) - 3} more' if len(strange) > 3 else ''}"
        )
    refused = [key for key in report.unexpected if not any(fnmatch.fnmatch(key, a) for a in allow_unexpected)]
    if refused:
        raise UsageError(
            f"the checkpoint holds {len(refused)} unexpected weights: {', '.join(refused[:5])}; "
            f"if they may be left out, say allow_unexpected=['{refused[0]}'] (patterns with * work)"
        )
    vit.load_state_dict(incoming, strict=False)
    return report


_PATCH_HINT = "the model (its patch size, width or model.in_chans)"


SLOT_NOISE = 0.1
"""Noise on slots that are copies, as a share of the parameters' standard deviation: equal slots would stay equal."""


def slot_axes(vit: VisionTransformer) -> dict[str, int]:
    """The axis of an expert's slots in each of a model's parameters that has one."""
    return {
        f"{place}.{name}": axis
        for place, module in vit.named_modules()
        if isinstance(module, Router)
        for name, axis in module.slot_axes.items()
    }


def _alike(one: Tensor, other: Tensor, but: int) -> bool:
    """Whether two shapes differ in one axis at most."""
    return one.ndim == other.ndim and all(i == but or one.shape[i] == other.shape[i] for i in range(one.ndim))


def resized_slots(parameter: Float[Tensor, "..."], axis: int, slots: int) -> Float[Tensor, "..."]:
    """Slot j of an expert's `slots` becomes its old slot floor(j p / slots), so that experts keep their shares of a
    token. The first copy of a slot is exact, the others get SLOT_NOISE, from torch's random state."""
    last = parameter.movedim(axis, -1)
    old = torch.arange(slots) * last.shape[-1] // slots
    again = torch.cat([torch.zeros(1, dtype=torch.bool), old[1:] == old[:-1]])
    noise = SLOT_NOISE * parameter.std() * again * torch.randn(*last.shape[:-1], slots)
    return (last[..., old] + noise).movedim(-1, axis)


def proportional_slots(before: Model, after: Model) -> int:
    """Slots per expert that are to `after`'s tokens what `before`'s are to its own, rounded, at least one.

    Raises:
        UsageError: there are none to keep in proportion.
    """
    slots = before.router.get("slots_per_expert")
    if slots is None or before.router_name != after.router_name:
        raise UsageError(
            f"slots=proportional: the checkpoint's router is {before.router_name} and the model's {after.router_name}; "
            "it takes the same on both sides, and one that has slots per expert"
        )
    with torch.device("meta"):
        old, new = (count_tokens(build(model, 2)) * group_of(model.router) for model in (before, after))
    return max(1, round(slots * new / old))


def _resample(vit: VisionTransformer, table: Tensor) -> Tensor:
    """A position table for `vit`'s grid (bicubic, antialiased: timm's), from a square one."""
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    side = math.isqrt(max(0, table.shape[1] - prefix)) if table.ndim == 3 else 0
    if not side or table.shape[2] != vit.embed_dim or side * side != table.shape[1] - prefix:
        raise UsageError(
            f"the checkpoint is of another architecture: pos_embed is {tuple(table.shape)} there, which is no square "
            f"grid with {prefix} extra tokens of width {vit.embed_dim}"
        )
    resized: Tensor = resample_abs_pos_embed(
        table, new_size=list(vit.patch_embed.grid_size), old_size=[side, side], num_prefix_tokens=prefix
    )
    return resized


def require_described(source: Source, model: Model) -> None:
    """Holds weights against the model that their own card describes, by names and shapes: a few words in a file must
    not decide how much is allocated.

    Args:
        model: the card's; its router may be replaced, and then the MLPs' weights are not looked at.

    Raises:
        UsageError: the weights are of another model.
    """
    start = f"checkpoint={source.label} is of another architecture than it says"
    blocks = {int(found[1]) for key in source.weights if (found := re.match(r"blocks\.(\d+)\.", key))}
    depth = model.backbone.depth
    if depth is not None and blocks != set(range(depth) if depth <= len(blocks) else ()):
        raise UsageError(f"{start}: it holds {len(blocks)} blocks where model.backbone.depth={depth}")
    head = source.weights.get("head.weight")
    try:
        with torch.device("meta"):
            vit = build(model, 1 if head is None else len(head))
    except UsageError as error:
        raise UsageError(f"{start}: {error}") from error
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes that torch cannot even write down
        raise UsageError(f"{start}: such sizes cannot be ({first_line(error)})") from error
    own = vit.state_dict()
    whole = model.router["_target_"] == source.card["model"]["router"]["_target_"]
    for key, value in own.items():
        if ".mlp." in key and not whole:
            continue
        there = source.weights.get(key)
        if there is None and not key.startswith("head."):
            raise UsageError(f"{start}: it lacks {key}")
        if there is not None and there.shape != value.shape:
            raise UsageError(f"{start}: {key} is {tuple(there.shape)} there and {tuple(value.shape)} in such a model")


def softmoe_vit(pretrained: bool = False, *, softmoe: dict[str, Any], **arguments: Any) -> VisionTransformer:
    """timm's entry point to what softmoe trained: the architecture in the config.json of folders from softmoe export.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` comes here once this module is imported; num_classes,
    in_chans and img_size may be asked for as with timm's own models.

    Args:
        softmoe: the model's config, as a checkpoint keeps it.

    Raises:
        UsageError: a model that cannot be built, or with a router that is not softmoe's and not imported yet.
    """
    model = Model(**softmoe | {"backbone": Backbone(**softmoe["backbone"])})
    target = str(model.router["_target_"])
    if target != "None" and not target.startswith("softmoe_cli.moe.routers."):
        module = target.rpartition(".")[0]
        if module not in sys.modules:  # to import a module is to run it, and a file may name any
            raise UsageError(f"the router {target} is not softmoe's; if you trust it, import {module} first")
    vit: VisionTransformer = build_model_with_cfg(
        partial(_adapted, model), "softmoe_vit", pretrained, pretrained_filter_fn=checkpoint_filter_fn, **arguments
    )
    return vit


def _adapted(
    model: Model, num_classes: int, img_size: int | Sequence[int], in_chans: int, global_pool: str | None = None
) -> VisionTransformer:
    sides = {img_size} if isinstance(img_size, int) else set(img_size)
    if len(sides) != 1:
        raise UsageError(f"img_size={img_size}: images of softmoe's models are square")
    asked = replace(model, image_size=sides.pop(), in_chans=in_chans).settled()
    vit = build(asked, num_classes or 1)
    if global_pool not in (None, vit.global_pool):
        raise UsageError(f"global_pool={global_pool}: this model was trained with {vit.global_pool}")
    if not num_classes:
        vit.reset_classifier(0)
    return vit


register_model(softmoe_vit)
