"""What each expert of each block is worth, by one of four measures.

`alpha_score` and `hit_rate` are Chen et al.'s (2022): the sum of the gates that an expert's tokens have, and the number
of its tokens. `router_change` is that of Chowdhury et al. (2024), https://arxiv.org/abs/2405.16646: by how much the
norm of an expert's part of the router has grown since an earlier checkpoint, as in their released code. `random` is a
control.
"""

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack

import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from softmoe_cli.config.model import Model
from softmoe_cli.config.pruning import MEASURED
from softmoe_cli.data.batches import Batch
from softmoe_cli.errors import UsageError
from softmoe_cli.moe.kind import Layer
from softmoe_cli.moe.layer import MoE
from softmoe_cli.moe.routing import Routing


def prunable(vit: VisionTransformer, model: Model, by: str, key: str = "by") -> dict[int, MoE]:
    """The layers whose experts can be pruned by this measure, by block. `key`: the option that names it.

    Raises:
        UsageError: there are none, with the reason.
    """
    layers = {place: block.mlp for place, block in enumerate(vit.blocks) if isinstance(block.mlp, Layer)}
    if not layers:
        raise UsageError(f"{model.router_name} has no experts to prune; choose a checkpoint of a mixture of experts")
    found = {}
    for place, layer in layers.items():
        if layer.router.unprunable is not None or not isinstance(layer, MoE):
            raise UsageError(f"experts of {model.router_name} cannot be pruned: {layer.router.unprunable}")
        if by in MEASURED and by not in layer.router.measures:
            raise UsageError(
                f"{key}={by} tells no experts of {model.router_name} apart: every token has a part in each of them; "
                f"use {' or '.join(layer.router.measures)}"
            )
        found[place] = layer
    return found


@torch.no_grad()
def measured(
    vit: VisionTransformer, layers: Mapping[int, MoE], by: str, batches: Iterable[Batch]
) -> dict[int, list[float]]:
    """Each block's scores over all batches, as evaluation sees them: without noise. Experts that are gone have 0."""
    sums = {place: [0.0] * len(layer.experts.w1) for place, layer in layers.items()}
    vit.eval()
    with ExitStack() as stack:
        for place, layer in layers.items():

            def add(_router: object, _inputs: object, routing: Routing, place: int = place) -> None:
                for expert, score in zip(layers[place].left, routing.measured(by).tolist(), strict=True):
                    sums[place][expert] += score

            stack.enter_context(layer.router.register_forward_hook(add))
        for batch in batches:
            vit(*batch.inputs)
    return sums


def router_norms(state: Mapping[str, Tensor], place: int, layer: MoE) -> Float[Tensor, " e"]:
    """The norm of what the router of one block has for each expert, float64, from the weights of a model.

    Raises:
        UsageError: the weights are of another model.
    """
    norms = torch.zeros(len(layer.experts.w1), dtype=torch.float64)
    for name, parameter in layer.router.named_parameters():
        axis = layer.router.expert_axes.get(name)
        if axis is None:
            continue
        there = state.get(key := f"blocks.{place}.mlp.router.{name}")
        if there is None or there.shape != parameter.shape:
            seen = "no such weight" if there is None else f"{tuple(there.shape)}"
            raise UsageError(f"router_change needs a checkpoint of the same model: {key} is {seen} in it, and "
                             f"{tuple(parameter.shape)} in this one")  # fmt: skip
        norms += there.double().cpu().movedim(axis, 0).flatten(1).square().sum(dim=1)
    return norms.sqrt()


def random_scores(seed: int, place: int, experts: int) -> list[float]:
    """Random scores, a function of seed and block."""
    digest = hashlib.sha256(f"prune {seed} {place}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:6]))
    return torch.rand(experts, generator=generator, dtype=torch.float64).tolist()
