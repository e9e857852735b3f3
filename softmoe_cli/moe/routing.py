"""What a router is and what it returns: a router decides, a routing carries out.

routing = router(x)                          x: b n d
slots   = routing.dispatch(x)                e (b p) d
y       = routing.combine(experts(slots))    b n d
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Routing(ABC):
    """One decision of one router about one batch."""

    aux_loss: Float[Tensor, ""]

    @abstractmethod
    def dispatch(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "e bp d"]:
        """The rows that each expert processes: the slots of all images, image by image."""

    @abstractmethod
    def combine(self, slots: Float[Tensor, "e bp d"]) -> Float[Tensor, "b n d"]:
        """The tokens made from the rows that the experts returned."""

    @abstractmethod
    def statistics(self) -> dict[str, float]:
        """Plain numbers for the record; computed only here, when asked."""


class Router(nn.Module, ABC):
    """Constructed as `Router(dim, num_tokens, **options)`; the options, all without default, stand in its yaml."""

    num_experts: int
    slots_per_expert: int
    options: dict[str, Any]
    """The options that rebuild this router for its weights at any number of tokens: what a checkpoint keeps."""

    @abstractmethod
    def flop(self, num_tokens: int) -> int:
        """FLOPs per image of everything but the experts, on `num_tokens` tokens; a multiply-add counts as 2."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "b n d"]) -> Routing: ...


class DenseRouting(Routing):
    """Every token is a part of every slot and the reverse: two batched matrix products.

    Args:
        dispatch_weights: share of each token in each slot, float32.
        combine_weights: share of each slot in each token, float32.
    """

    def __init__(
        self,
        dispatch_weights: Float[Tensor, "b n e p"],
        combine_weights: Float[Tensor, "b n e p"],
        aux_loss: Float[Tensor, ""],
        extra: dict[str, Tensor] | None = None,
    ) -> None:
        self.dispatch_weights = dispatch_weights
        self.combine_weights = combine_weights
        self.aux_loss = aux_loss
        self.extra = extra or {}

    def dispatch(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "e bp d"]:
        b, n, e, p = self.dispatch_weights.shape
        slots = torch.bmm(self.dispatch_weights.reshape(b, n, e * p).mT.to(x.dtype), x)
        return slots.reshape(b, e, p, -1).transpose(0, 1).reshape(e, b * p, -1)

    def combine(self, slots: Float[Tensor, "e bp d"]) -> Float[Tensor, "b n d"]:
        b, n, e, p = self.combine_weights.shape
        by_image = slots.reshape(e, b, p, -1).transpose(0, 1).reshape(b, e * p, -1)
        return torch.bmm(self.combine_weights.reshape(b, n, e * p).to(slots.dtype), by_image)

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """Means over slots of the dispatch weights' extremes over tokens, and over tokens of the combine
        weights' extremes over slots (the curves of the paper's Figures 13 and 14)."""
        numbers = {
            "dispatch_max": self.dispatch_weights.amax(dim=1).mean(),
            "dispatch_min": self.dispatch_weights.amin(dim=1).mean(),
            "combine_max": self.combine_weights.amax(dim=(2, 3)).mean(),
            "combine_min": self.combine_weights.amin(dim=(2, 3)).mean(),
        }
        return {name: value.item() for name, value in (numbers | self.extra).items()}


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """No autocast on the device of `x`: logits, softmaxes and losses stay in the parameters' precision, float32."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


@contextmanager
def routings(model: nn.Module) -> Iterator[list[Routing]]:
    """Collects, in call order, what every router inside `model` returns while the context is open.

    Clear the list before each forward pass. Recomputation in the backward pass calls routers again, so
    sum the auxiliary losses before `backward`: then each counts exactly once.
    """
    seen: list[Routing] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, routing: seen.append(routing))
        for module in model.modules()
        if isinstance(module, Router)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
