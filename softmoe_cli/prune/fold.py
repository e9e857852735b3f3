"""One expert that is left, whose gate is one, is an MLP: the whole model becomes a plain timm ViT."""

from dataclasses import replace
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from softmoe_cli.config.model import Model
from softmoe_cli.cost.flop import on_meta
from softmoe_cli.errors import UsageError
from softmoe_cli.model.vit import count_tokens, mlp_ratio
from softmoe_cli.moe.kind import Layer
from softmoe_cli.moe.layer import MoE

KEEP = "leave out to=dense, and the checkpoint stays a mixture"
TIMM_EPS = 1e-6
"""timm's ViTs have LayerNorms with this epsilon, and a name cannot choose another."""


def folded_model(model: Model, vit: VisionTransformer) -> Model:
    """The config of a dense model that can compute what `vit` does.

    Raises:
        UsageError: there is none among plain timm ViTs; the message says why.
    """
    if model.head != "linear":
        raise UsageError(f"to=dense: the head is {model.head}, which no plain ViT has; {KEEP}")
    if model.backbone.pre_logits:
        raise UsageError(
            f"to=dense: the model has a layer before its head (pre_logits), which no plain ViT has; {KEEP}"
        )
    widths = {}
    for place, block in enumerate(vit.blocks):
        if isinstance(block.mlp, Layer):
            widths[place] = _width(place, block.mlp, count_tokens(vit))
    return _dense(model, widths, len(vit.blocks), vit.num_classes)


def folded_weights(model: Model, vit: VisionTransformer) -> dict[str, Tensor]:
    """The weights of `folded_model`."""
    state = dict(vit.state_dict())
    for place, block in enumerate(vit.blocks):
        if isinstance(block.mlp, MoE):
            start = f"blocks.{place}.mlp."
            state = {key: value for key, value in state.items() if not key.startswith(start)}
            state |= {start + key: value for key, value in mlp_of(block.mlp).items()}
    if model.backbone.qk_norm == "scale":  # timm's has biases, which are zero here
        for key in [key for key in state if key.endswith(("q_norm.weight", "k_norm.weight"))]:
            state[key.replace("weight", "bias")] = torch.zeros_like(state[key])
    return {key: value.contiguous() for key, value in state.items()}


def _width(place: int, layer: Layer, tokens: int) -> int:
    """The hidden width of the MLP that a layer is."""
    if not isinstance(layer, MoE):
        raise UsageError(f"to=dense: block {place} holds experts that are no MLPs; {KEEP}")
    if len(layer.left) != 1:
        raise UsageError(
            f"to=dense needs one expert in each block, and block {place} has {len(layer.left)}; prune with keep=1 first"
        )
    departs = layer.router.departs_from_mlp(tokens, 1)
    if departs is not None:
        raise UsageError(f"to=dense: block {place} with one expert is no MLP: {departs.partition(';')[0]}; {KEEP}")
    shared = 0 if layer.shared is None else int(layer.shared.w1.shape[2])
    return int(layer.experts.w1.shape[2]) + shared


def _dense(model: Model, widths: dict[int, int], depth: int, classes: int) -> Model:
    """The config of the ViT with MLPs of these widths."""
    dense = replace(
        model, router={"_target_": None}, moe_blocks=[], expert_width=None, expert_init="identical"
    ).settled()
    usual = on_meta(dense, classes).blocks[0].mlp.fc1.out_features
    odd = sorted({width for width in widths.values() if width != usual})
    backbone = model.backbone
    if odd and (backbone.timm is not None or len(widths) < depth or len(odd) > 1):
        raise UsageError(
            f"to=dense: MLPs of {odd[0]} units in blocks {sorted(widths)} beside those of {usual} make no plain timm "
            f"ViT, which has one width (model.expert_width, model.router.shared_experts); {KEEP}"
        )
    if odd:
        backbone = replace(backbone, mlp_width=odd[0], name=f"{backbone.name}_mlp{odd[0]}")
    if backbone.qk_norm == "scale":
        backbone = replace(backbone, qk_norm="affine")
    return replace(dense, backbone=backbone)


def mlp_of(layer: MoE) -> dict[str, Tensor]:
    """The weights of the MLP that a layer with one expert is, shared experts included: hidden units side by side, and
    output biases added up."""
    parts = [layer.experts.weights_left()] + ([] if layer.shared is None else [layer.shared.weights_left()])
    w1, b1, w2, b2 = ([part[i].detach()[0] for part in parts] for i in range(4))
    return {
        "fc1.weight": torch.cat(w1, dim=1).T,
        "fc1.bias": torch.cat(b1),
        "fc2.weight": torch.cat(w2).T,
        "fc2.bias": torch.stack(b2).sum(dim=0),
    }


def timm_entry(model: Model) -> dict[str, Any]:
    """`architecture` and `model_args` with which timm alone builds a dense model: a ViT of its own in other sizes.

    Raises:
        UsageError: a choice that timm's entry points cannot be given.
    """
    c = model.backbone
    if c.timm is not None:
        return {"architecture": str(c.timm).split(".")[0], "model_args": {}}
    if c.norm_eps != TIMM_EPS:
        raise UsageError(f"to=dense: timm cannot be asked for model.backbone.norm_eps={c.norm_eps:g}; {KEEP}")
    assert c.width is not None and c.mlp_width is not None
    sizes = {"patch_size": c.patch_size, "embed_dim": c.width, "depth": c.depth, "num_heads": c.heads}
    choices = {
        "img_size": model.image_size, "mlp_ratio": mlp_ratio(c.mlp_width, c.width), "class_token": c.class_token,
        "global_pool": c.pool, "fc_norm": c.norm_after_pool, "qk_norm": c.qk_norm != "none",
        "init_values": c.layer_scale, "act_layer": "gelu_tanh" if c.gelu == "tanh" else "gelu",
    }  # fmt: skip
    return {"architecture": "vit_tiny_patch16_224", "model_args": sizes | choices}
