"""Soft mixture of adapters (Soft-MoA): Efficient Fine-tuning of Audio Spectrogram Transformers via Soft Mixture of
Adapters (Cappellazzo et al., 2024), https://arxiv.org/abs/2402.00828

It is the soft router of moe/ before stacked adapters. The official code (umbertocappellazzo/PETL_AST at 1fe23af5,
src/MoA.py) normalises nothing in the paper's runs. Its `normalize=True` is not Soft MoE's: it divides the slots'
parameters by their norm over the adapters instead of the width, and lets the slots mix the unit tokens. Here
`normalised` is Soft MoE's own router.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softmoe_cli.adapters.kind import Adapter, Bottlenecks
from softmoe_cli.moe.layer import in_fast_precision
from softmoe_cli.moe.routers.soft import SoftRouter


class PlainSoftRouter(SoftRouter):
    """The soft router with logits that are products of tokens and slots as they are.

    phi starts as torch's `xavier_normal_` starts a tensor (d, n, p): std sqrt(2 / (p (n + d))). The logits of tokens
    behind a LayerNorm then have a deviation of about 1.4, so that the mixtures are far from uniform from the start.
    """

    decays = ("phi",)

    def reset_parameters(self) -> None:
        dim, adapters, slots = self.phi.shape
        nn.init.normal_(self.phi, std=math.sqrt(2 / (slots * (adapters + dim))))
        self.register_parameter("scale", None)

    def logits(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e p"]:
        _, e, p = self.phi.shape
        return (x @ self.phi.mT.flatten(1)).unflatten(2, (p, e)).mT

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        return self.slot_statistics()


class SoftMoA(Adapter):
    """y = combine(adapters(dispatch(x))): a slot is a mixture of an image's tokens, a token's result a mixture of all
    slots' results. The paper's letters: m tokens are our n, n adapters our e.

    Args:
        dim: d.
        width: r.
        num_adapters, slots_per_adapter: e and p.
        normalised: whether logits are those of Soft MoE's router.
    """

    def __init__(self, dim: int, width: int, *, num_adapters: int, slots_per_adapter: int, normalised: bool) -> None:
        super().__init__()
        kind = SoftRouter if normalised else PlainSoftRouter
        self.router = kind(
            dim, 1, num_experts=num_adapters, slots_per_expert=slots_per_adapter, capacity_factor=None, noise_std=0.0
        )
        self.experts = Bottlenecks(num_adapters, dim, width)

    def flop(self, num_tokens: int) -> int:
        return self.router.flop(num_tokens) + self.experts.flop(self.router.rows(num_tokens))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        routing = self.router(x)

        def through(tokens: Tensor) -> Tensor:
            return routing.combine(self.experts(routing.dispatch(tokens)))

        return in_fast_precision(x, self.experts.w1.dtype, through)
