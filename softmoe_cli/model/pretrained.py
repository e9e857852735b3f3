"""Weights to start from, whatever names them: a run, a checkpoint, a file, the hub or timm."""

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import timm

from softmoe_cli.config.adapter import no_adapter
from softmoe_cli.config.model import Backbone
from softmoe_cli.errors import UsageError, first_line, nearest
from softmoe_cli.model.vit import plain_vit
from softmoe_cli.run.checkpoint import digest_of
from softmoe_cli.run.delta import base_name, composed
from softmoe_cli.run.header import Source
from softmoe_cli.run.source import read_source
from softmoe_cli.vmoe.source import MARK, read_official


def read_checkpoint(
    checkpoint: str, base: str | None = None, check: Callable[[Source], None] = lambda _: None
) -> Source:
    """The weights that `checkpoint=` names: what `source.read_source` reads, `hf-hub:OWNER/NAME`, a folder that softmoe
    export made and pushed, `timm:NAME`, a pretrained dense ViT, or `vmoe:PATH`, official weights. A delta is put
    together with its base, which `base` may name; `check` sees it before that.

    Raises:
        UsageError: nothing usable there, or a base that is another one.
    """
    source = _read(checkpoint)
    check(source)
    if "base" in source.card:
        return _whole(source, base)
    if base is not None:
        raise UsageError(f"base={base} has no effect: checkpoint={checkpoint} holds a whole model; leave base out")
    return source


def _whole(delta: Source, named: str | None) -> Source:
    """A delta put together with its base."""
    name = base_name(delta, named)
    try:
        base = _read(name)
    except UsageError as error:
        if named is not None:
            raise UsageError(str(error).replace("checkpoint=", "base=", 1)) from error
        raise UsageError(
            f"checkpoint={delta.label} holds adapters alone, and what they belong to cannot be read ({error}); say "
            "where it is now with base="
        ) from error
    if "base" in base.card:
        raise UsageError(f"base={name} holds adapters alone; name the checkpoint that they belong to")
    return composed(delta, base)


def _read(checkpoint: str) -> Source:
    """`read_checkpoint`, a delta by itself."""
    if checkpoint.startswith("hf-hub:"):
        return replace(read_source(_pulled(checkpoint)), label=checkpoint)
    if checkpoint.startswith(MARK):
        return read_official(checkpoint)
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
    plain_vit(name, vit)
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
    """The card that a checkpoint of ours would have for a timm model's pretrained weights: its model and its pixels."""
    about = timm.get_pretrained_cfg(name)
    if about is None:
        raise UsageError(f"timm has no model '{name}'.{nearest(name.split('.')[0], timm.list_models('*vit*'))}")
    backbone: dict[str, Any] = dict.fromkeys(f.name for f in dataclasses.fields(Backbone))
    return {
        "model": {
            "backbone": backbone | {"name": name, "timm": name},
            "adapter": dataclasses.asdict(no_adapter()),
            "router": {"_target_": None},
            "image_size": about.input_size[-1],
            "in_chans": about.input_size[0],
            "moe_blocks": [],
            "blocks": {},
            "expert_width": None,
            "tasks": None,
            "head": "linear",
            "head_experts": None,
            "head_norm": None,
            "expert_init": "identical",
        },
        "data": {"mean": list(about.mean), "std": list(about.std)},
    }
