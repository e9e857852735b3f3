"""What a model costs: parameters, FLOPs by formula, memory, all without allocating a weight.

FLOPs count a multiply-add as 2 and cover matrix products only: norms, softmaxes, GELU and biases count as 0,
as in torch's FlopCounterMode, with which a test holds the formula equal.
"""

from dataclasses import dataclass

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from softmoe_cli.config import Model, UsageError
from softmoe_cli.models import build, count_tokens
from softmoe_cli.moe.layer import MoE


@dataclass(frozen=True)
class Cost:
    """One model on one image, and the memory of training it. `tokens` includes class token and registers.

    `active_params` are those with a part in one token's way through the model, on average: of the routed experts as
    many as the router lets work for a token. `slots_per_token` is the rows of all experts over the tokens, with empty
    slots, in an MoE block: the capacity factor that is really paid for.
    """

    params: int
    active_params: float
    slots_per_token: float | None
    params_by_part: dict[str, int]
    forward_flop: int
    tokens: int
    state_bytes: int
    activation_bytes: int

    def train_flop(self, recompute: bool) -> int:
        """FLOPs per training image: the backward pass costs two forward passes, recomputation one more."""
        return self.forward_flop * (4 if recompute else 3)

    @property
    def train_bytes(self) -> int:
        return self.state_bytes + self.activation_bytes


def account(model: Model, num_classes: int, *, batch: int, recompute: bool, ema: bool) -> Cost:
    """The cost of a config. `batch` images go through the model at once (a part, under accumulation).

    Memory is what training holds at its peak, in float32: weights, gradients, AdamW's two moments, an average
    of the weights if asked for, and the activations kept for the backward pass.
    """
    with torch.device("meta"):
        vit = build(model, num_classes)
    params = sum(p.numel() for p in vit.parameters())
    by_part: dict[str, int] = {}
    for name, parameter in vit.named_parameters():
        part = _part(name)
        by_part[part] = by_part.get(part, 0) + parameter.numel()
    assert sum(by_part.values()) == params
    layers = [block.mlp for block in vit.blocks if isinstance(block.mlp, MoE)]
    idle = 0.0
    for layer in layers:
        routed = layer.router.experts_per_token - layer.router.shared_experts
        experts = sum(p.numel() for p in layer.experts.parameters())
        idle += experts * (1 - min(1.0, routed / layer.router.num_experts))
    tokens = count_tokens(vit)
    return Cost(
        params=params,
        active_params=params - idle,
        slots_per_token=layers[0].router.rows(tokens) / tokens if layers else None,
        params_by_part=by_part,
        forward_flop=forward_flop(vit),
        tokens=tokens,
        state_bytes=4 * params * (5 if ema else 4),
        activation_bytes=_activation_bytes(vit, batch, recompute),
    )


def _part(name: str) -> str:
    for mark in (".experts.", ".shared.", ".router.", ".mlp.", ".attn."):
        if mark in name:
            return mark.strip(".")
    return "head" if name.startswith("head.") else "embedding and norms"


def forward_flop(vit: VisionTransformer) -> int:
    """FLOPs of one image's forward pass, from the shapes of the layers."""
    n, patches, proj = count_tokens(vit), vit.patch_embed.num_patches, vit.patch_embed.proj
    total = 2 * patches * proj.weight.numel()
    for block in vit.blocks:
        d, inner = block.attn.qkv.in_features, block.attn.proj.in_features
        total += 2 * n * d * 3 * inner + 2 * 2 * n * n * inner + 2 * n * inner * d
        if isinstance(block.mlp, MoE):
            total += block.mlp.flop(n)
        elif isinstance(block.mlp, Mlp):
            total += 2 * n * (block.mlp.fc1.weight.numel() + block.mlp.fc2.weight.numel())
        else:
            raise UsageError(f"no FLOP formula for {type(block.mlp).__name__} blocks; use a ViT with plain MLPs")
    if isinstance(vit.head, nn.Linear):
        total += 2 * vit.head.weight.numel()
    return int(total)


def _activation_bytes(vit: VisionTransformer, batch: int, recompute: bool) -> int:
    """Bytes of everything autograd keeps in a training forward pass, found by running one on the meta device."""
    weights = {p.untyped_storage()._cdata for p in vit.parameters()}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no storage's address is used twice

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    height, width = vit.patch_embed.img_size
    vit.set_grad_checkpointing(recompute)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        vit.train()(torch.empty(batch, vit.in_chans, height, width, device="meta"))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
