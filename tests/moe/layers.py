"""Layers with random parameters, and what a slow loop written from a router's paper needs to know of them."""

import math
from typing import Any

import torch
from torch import Tensor

from softmoe_cli.model.router import make_layer
from softmoe_cli.moe.layer import MoE
from softmoe_cli.moe.routing import Router, SparseRouting
from tests import oracles
from tests.routers import ROUTERS

DIM, HIDDEN, TOKENS, EXPERTS, IMAGES = 5, 6, 7, 3, 4
QUIET = {"noise_std": 0.0, "importance_weight": 0.0, "load_weight": 0.0}


def layer(router: str, **changes: Any) -> MoE:
    """A float64 layer whose parameters are all random."""
    torch.manual_seed(0)
    options = ROUTERS[router] | {"num_experts": EXPERTS}
    options |= {key: value for key, value in changes.items() if key in options}
    moe = make_layer(options, DIM, HIDDEN, TOKENS, gelu="tanh", identical=False).double()
    assert isinstance(moe, MoE)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=0.7)
    return moe.eval()


def tokens() -> Tensor:
    return torch.randn(IMAGES, TOKENS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def sparse(router: Router, x: Tensor) -> SparseRouting:
    routing = router(x)
    assert isinstance(routing, SparseRouting)
    return routing


def gates_of(moe: MoE, x: Tensor, function: str = "softmax") -> list[list[float]]:
    logits = (x @ moe.router.get_parameter("gate.kernel")).tolist()
    if function == "sigmoid":
        return [[1 / (1 + math.exp(-value)) for value in row] for row in logits]
    return [oracles.softmax(row) for row in logits]


def expert_weights(moe: MoE) -> list[Any]:
    return [parameter.tolist() for parameter in moe.experts.parameters()]


def close(got: Tensor, want: Any) -> None:
    torch.testing.assert_close(got.detach(), torch.tensor(want, dtype=torch.float64), atol=1e-12, rtol=1e-12)
