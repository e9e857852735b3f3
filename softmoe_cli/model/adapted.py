"""Adapters beside the sublayers of a frozen backbone: where they stand, and what is trained."""

from collections.abc import Mapping

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from softmoe_cli.adapters.bottleneck import Bottleneck
from softmoe_cli.adapters.dense_moa import DenseMoA
from softmoe_cli.adapters.kind import Adapter
from softmoe_cli.adapters.lora import AdaptedProjection
from softmoe_cli.adapters.soft_moa import SoftMoA
from softmoe_cli.config.adapter import AdapterOptions
from softmoe_cli.model.blocks import CarryingBlock

NORMS = {"attn": "norm1", "mlp": "norm2"}
"""The norm in front of each sublayer."""
TRAINED_LAST = ("norm.", "fc_norm.", "head.")
"""What is trained outside of the blocks: the final norm, wherever the model has it, and the head."""


class AdaptedBlock(CarryingBlock):
    """timm's block, or a carrying one, with an adapter beside attention, beside the MLP, or beside both.

    u = LN1(x), h = x + attention(u) + A(u), y = h + MLP(LN2(h)) + A'(LN2(h)). What an adapter returns is added outside
    of LayerScale and stochastic depth. A `sequential` adapter reads what its sublayer adds to the tokens instead of
    what it reads. (The official block adds what stands beside attention twice, to h and to y; its figure does not.)

    Args:
        block: whose parts it takes over, under their names.
        adapters: by the sublayer's name.
    """

    def __init__(self, block: Block, adapters: Mapping[str, Adapter], *, sequential: bool) -> None:
        carries = isinstance(block, CarryingBlock)
        super().__init__(block, first=not carries or block.first, last=not carries or block.last)
        self.attn_adapter, self.mlp_adapter = adapters.get("attn"), adapters.get("mlp")
        self.sequential, self.carries = sequential, carries

    def added(self, sublayer: str, read: Tensor, made: Tensor) -> Tensor:
        """What a sublayer has made, with its adapter's result."""
        adapter = self.attn_adapter if sublayer == "attn" else self.mlp_adapter
        if adapter is None:
            return made
        beside: Tensor = adapter(made if self.sequential else read)
        return made + beside


def adapt(vit: VisionTransformer, options: AdapterOptions) -> None:
    """Gives a model its adapters and freezes all else but the norms in front of them, the final norm and the head.
    (LoRA has no norm in front.)"""
    if options.name == "none":
        return
    vit.requires_grad_(False)
    for place, block in enumerate(vit.blocks):
        if options.name == "lora":
            assert options.alpha is not None
            dim = block.attn.qkv.in_features
            block.attn.qkv = AdaptedProjection(block.attn.qkv, options.width_for(dim), alpha=options.alpha)
            continue
        adapters = {site: _adapter(options, block.attn.qkv.in_features) for site in options.sites}
        vit.blocks[place] = AdaptedBlock(block, adapters, sequential=options.insert == "sequential")
        for site in options.sites:
            getattr(block, NORMS[site]).requires_grad_(True)
    for name, parameter in vit.named_parameters():
        if name.startswith(TRAINED_LAST):
            parameter.requires_grad_(True)


def _adapter(options: AdapterOptions, dim: int) -> Adapter:
    width = options.width_for(dim)
    if options.name == "bottleneck":
        return Bottleneck(dim, width)
    assert options.num_adapters is not None
    if options.name == "dense_moa":
        return DenseMoA(dim, width, num_adapters=options.num_adapters)
    assert options.slots_per_adapter is not None
    assert options.normalised is not None
    return SoftMoA(
        dim, width, num_adapters=options.num_adapters, slots_per_adapter=options.slots_per_adapter,
        normalised=options.normalised,
    )  # fmt: skip


def is_adapters(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return "_adapter." in name


@torch.no_grad()
def merged(weights: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """A model's weights with LoRA's products added to the matrices that they stand beside, computed in float64. Such a
    matrix keeps the precision of the more precise of both."""
    whole = {name: value for name, value in weights.items() if not is_adapters(name)}
    for name in weights:
        if name.endswith(".q_adapter.down.weight"):
            place = name.removesuffix("q_adapter.down.weight")
            total = weights[f"{place}weight"].to(torch.float64, copy=True)
            for part, which in zip(total.chunk(3), ("q", None, "v"), strict=True):
                if which is not None:
                    down, up = (weights[f"{place}{which}_adapter.{side}.weight"].double() for side in ("down", "up"))
                    part.add_(up @ down, alpha=alpha / len(down))
            kept = torch.promote_types(weights[f"{place}weight"].dtype, weights[name].dtype)
            whole[f"{place}weight"] = total.to(kept)
    return whole


def trained_names(vit: nn.Module) -> set[str]:
    """The parameters that are trained."""
    return {name for name, parameter in vit.named_parameters() if parameter.requires_grad}
