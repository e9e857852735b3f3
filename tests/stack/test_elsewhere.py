"""A stack on another device than the CPU, without one: by the shapes alone, on torch's `meta`."""

from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

from softmoe_cli.data.batches import Batch
from softmoe_cli.model.router import router_class
from softmoe_cli.run.checkpoint import random_state
from softmoe_cli.stack.passing import Stack, own_draws
from softmoe_cli.train.loop import handed
from tests.conftest import TINY
from tests.oracles import compose
from tests.routers import ROUTERS, start
from tests.stack.test_stack import new_step

STACKED = [name for name, options in ROUTERS.items() if router_class(options["_target_"]).unstacked is None]


@pytest.mark.parametrize(
    "router",
    [pytest.param(each, marks=[] if each == "tokens_choice" else pytest.mark.thorough) for each in ("dense", *STACKED)],
)
def test_nothing_is_left_on_the_cpu(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two updates in two parts, with noise, clipping and stochastic depth, the second at rates of their own. What the
    pass is written down as makes nothing on the CPU and keeps nothing from there; with few tokens too, attention is
    torch's own; gradients, weights and moments stay where they are."""
    some: tuple[str, ...] = () if router == "dense" else (start(router), "model.moe_blocks=last_2")
    some += ("model.router.noise_std=1",) if "noise_std" in ROUTERS.get(router, {}) else ()
    some += ("model.backbone.drop_path=0.3", "train.batch_size=4", "train.accumulate=2", "optim.clip_norm=0.1")
    config = compose(*TINY, f"model/router={router}", *some)
    batch = Batch(torch.zeros(4, 1, 8, 8, device="meta"), torch.zeros(4, 10, device="meta"))
    monkeypatch.setattr(Tensor, "tolist", lambda told: [[1.0] * told.shape[1]] * len(told))  # the losses and norms
    with ExitStack() as hooks:
        steps = [new_step(config, seed, hooks, "meta") for seed in (0, 1)]
        stack: Stack | None = None
        for rates in ((0.1, 0.1), (0.1, 0.2)):
            given = [handed(step, batch, lr) for step, lr in zip(steps, rates, strict=True)]
            with own_draws([random_state() for _ in steps]):
                stack = stack or Stack(given)
                made = stack.passed(given)
            assert [each.update is None for each in made] == [rates[0] != rates[1]] * 2
            graph = stack._graph
            assert "cpu" not in graph.code, graph.code
            kept = [getattr(graph, str(node.target)) for node in graph.graph.nodes if node.op == "get_attr"]
            assert {each.device.type for each in kept if isinstance(each, Tensor)} <= {"meta"}
            assert "_safe_softmax" in graph.code
            for step in steps:
                held = [x for p in step.parameters for x in (p, p.grad, *step.optimizer.state[p].values())]
                assert {each.device.type for each in held if each is not None} == {"meta"}
