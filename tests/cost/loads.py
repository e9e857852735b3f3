"""Loads on the processor, and what is predicted for them."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from softmoe_cli.config.run import Config
from softmoe_cli.cost import fit
from softmoe_cli.cost.load import Load
from softmoe_cli.cost.memory import Memory, predict
from softmoe_cli.parallel import Crew
from tests.oracles import compose
from tests.routers import start

CPU = torch.device("cpu")
FOUR = Crew(size=4, local_size=4)


def composed(router: str = "soft", *overrides: str) -> Config:
    options = [] if router == "dense" else ["model.router.num_experts=16", start(router)]
    return compose(
        f"model/router={router}",
        "data=fashion_mnist",
        "model/backbone=vit_nano4",
        "model.backbone.depth=2",
        "model.moe_blocks=last_1",
        *options,
        *overrides,
    )


def load(config: Config, device: torch.device = CPU, **changes: Any) -> Load:
    return replace(Load.of(config, 10, device), **changes)


def held(config: Config, processes: int = 1, way: str = "ddp", **changes: Any) -> Memory:
    return predict(load(config, **changes), processes, way)


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(fit, "free_memory", lambda device: free)
