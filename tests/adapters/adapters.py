"""Adapters and models with adapters."""

from typing import Any

import torch
from torch import nn

from softmoe_cli.adapters.bottleneck import Bottleneck
from softmoe_cli.adapters.dense_moa import DenseMoA
from softmoe_cli.adapters.kind import Adapter
from softmoe_cli.adapters.lora import LowRank
from softmoe_cli.adapters.soft_moa import SoftMoA
from softmoe_cli.config.adapter import AdapterOptions, no_adapter

OPTIONS: dict[str, dict[str, Any]] = {
    "soft_moa": {"location": "attn", "num_adapters": 3, "slots_per_adapter": 2, "normalised": False, "width": 4},
    "dense_moa": {"location": "both", "num_adapters": 3, "width": 4},
    "bottleneck": {"location": "mlp", "insert": "parallel", "width": 4},
    "lora": {"width": 4, "alpha": 8.0},
}


def options(name: str, **chosen: Any) -> AdapterOptions:
    """Checked options of an adapter; small, where nothing is chosen."""
    return AdapterOptions(**vars(no_adapter()) | {"name": name} | OPTIONS.get(name, {}) | chosen).settled()


def layers(dim: int, width: int, number: int, slots: int) -> dict[str, Adapter]:
    """One of each, with random weights everywhere, float64."""
    sizes: dict[str, Any] = {"num_adapters": number, "slots_per_adapter": slots}
    made: dict[str, Adapter] = {
        "soft_moa": SoftMoA(dim, width, normalised=False, **sizes),
        "soft_moa, normalised": SoftMoA(dim, width, normalised=True, **sizes),
        "dense_moa": DenseMoA(dim, width, num_adapters=number),
        "bottleneck": Bottleneck(dim, width),
        "lora": LowRank(dim, width, dim, alpha=3.0),
    }
    return {name: randomised(adapter) for name, adapter in made.items()}


def randomised(adapter: Adapter) -> Adapter:
    for parameter in adapter.double().parameters():
        nn.init.normal_(parameter, std=0.7)
    return adapter


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)
