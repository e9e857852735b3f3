"""Weights to start from, whatever names them: a run, a checkpoint, a file, the hub or timm."""

import dataclasses
from dataclasses import replace
from typing import Any

import timm

from softmoe_cli.config.model import Backbone
from softmoe_cli.errors import UsageError, first_line, nearest
from softmoe_cli.model.vit import plain_vit
from softmoe_cli.run.checkpoint import digest_of
from softmoe_cli.run.source import Source, read_source


def read_checkpoint(checkpoint: str) -> Source:
    """The weights that `checkpoint=` names: what `source.read_source` reads, `hf-hub:OWNER/NAME`, a folder that softmoe
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
            "router": {"_target_": None},
            "image_size": about.input_size[-1],
            "in_chans": about.input_size[0],
            "moe_blocks": [],
            "blocks": {},
            "expert_width": None,
            "head": "linear",
            "head_experts": None,
            "head_norm": None,
            "expert_init": "identical",
        },
        "data": {"mean": list(about.mean), "std": list(about.std)},
    }
