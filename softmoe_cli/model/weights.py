"""Loading weights into a model: position embeddings resampled, slots resized, a new head."""

import fnmatch
import math
import re
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from softmoe_cli.config.model import Model
from softmoe_cli.errors import UsageError, first_line
from softmoe_cli.model.adapted import is_adapters
from softmoe_cli.model.vit import build, count_tokens
from softmoe_cli.moe.kind import Decider
from softmoe_cli.moe.layer import MoE
from softmoe_cli.run.header import Source


@dataclass
class LoadReport:
    """What became of a checkpoint's weights, by key of the state dict."""

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


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
    _expect_pruned(vit, state)
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
        elif key in slots and value.shape != own[key].shape and _alike(value, own[key], but=slots[key]):
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
    begin = not any(map(is_adapters, state))  # adapters beside trained weights start afresh, all or none
    fresh = not any(key.startswith("head.") for key in incoming)  # and so does a head
    strange = [
        key for key in report.new if not (is_adapters(key) and begin) and not (key.startswith("head.") and fresh)
    ]
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


def _expect_pruned(vit: VisionTransformer, state: dict[str, Tensor]) -> None:
    """Makes a place for what the weights say of experts that are left, where some were pruned."""
    layers = {f"blocks.{place}.mlp.alive": block.mlp for place, block in enumerate(vit.blocks)}
    for key, layer in layers.items():
        if key in state and isinstance(layer, MoE) and layer.router.unprunable is None:
            if not state[key].any():
                raise UsageError(f"{key} in the checkpoint says that no expert is left; softmoe saved no such file")
            layer.prunable()


def experts_left(state: dict[str, Tensor]) -> dict[int, list[int]]:
    """Which experts weights say are left, by block, where some were pruned."""
    found = {key: re.fullmatch(r"blocks\.(\d+)\.mlp\.alive", key) for key in state}
    return {int(match[1]): state[key].nonzero()[:, 0].tolist() for key, match in found.items() if match}


_PATCH_HINT = "the model (its patch size, width or model.in_chans)"


SLOT_NOISE = 0.1
"""Noise on slots that are copies, as a share of the parameters' standard deviation: equal slots would stay equal."""


def slot_axes(vit: VisionTransformer) -> dict[str, int]:
    """The axis of an expert's slots in each of a model's parameters that has one."""
    return {
        f"{place}.{name}": axis
        for place, module in vit.named_modules()
        if isinstance(module, Decider)
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
    """Slots per expert with which `after` has as many slots per token as `before`, rounded, at least one.

    Raises:
        UsageError: `before` has no slots per expert.
    """
    if before.blocks or after.blocks:
        raise UsageError("slots=proportional knows one router for all blocks; with model.blocks set slots_per_expert")
    slots = before.router.get("slots_per_expert")
    if slots is None or before.router_name != after.router_name:
        raise UsageError(
            f"slots=proportional: the checkpoint's router is {before.router_name} and the model's {after.router_name}; "
            "it takes the same on both sides, and one that has slots per expert"
        )
    with torch.device("meta"):
        # Other heads need more classes than 2, and tasks have their own.
        plain = (replace(model, head="linear", tasks=None) for model in (before, after))
        old, new = (count_tokens(build(model, 2)) * model.images_per_group for model in plain)
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
    """Compares weights, by names and shapes, with the model that their own card describes: a few words in a file must
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
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes that torch cannot represent
        raise UsageError(f"{start}: such sizes cannot be ({first_line(error)})") from error
    own = vit.state_dict()
    said = source.card["model"]
    whole = [each["_target_"] for each in model.routers] == [
        each["_target_"] for each in (said["router"], *(said["blocks"] or {}).values())
    ]
    for key, value in own.items():
        if ".mlp." in key and not whole:
            continue
        there = source.weights.get(key)
        if there is None and not key.startswith("head."):
            raise UsageError(f"{start}: it lacks {key}")
        if there is not None and there.shape != value.shape:
            raise UsageError(f"{start}: {key} is {tuple(there.shape)} there and {tuple(value.shape)} in such a model")
