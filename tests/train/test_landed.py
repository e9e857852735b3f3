"""The ledger of a router whose cost the images decide: what landed is counted, once and whole."""

import json
from pathlib import Path

import pytest
import torch

from softmoe_cli.config.run import Config
from softmoe_cli.cost.flop import account
from softmoe_cli.data.batches import Batch
from softmoe_cli.model.router import make_layer
from softmoe_cli.model.vit import build
from softmoe_cli.moe.layer import MoE
from softmoe_cli.moe.routing import routings
from softmoe_cli.optim import optimizer_of
from softmoe_cli.train.loop import Step, update
from tests.conftest import TINY, Softmoe
from tests.oracles import compose
from tests.routers import ROUTERS
from tests.runs import rows

CHOICE = ("model/router=tokens_choice", "model.router.k=2", "model.router.capacity_factor=1.1")
PLUS_PLUS = ("model/router=zero_computation", "model.moe_blocks=every_1")


def config(*overrides: str) -> Config:
    return compose(*TINY, *PLUS_PLUS, "train.batch_size=8", *overrides)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("parts", [1, 4])
def test_updates_count_what_landed_once(parts: int, recompute: bool) -> None:
    """Whatever the parts of a batch, and though recomputation calls the routers again."""
    settings = config(f"train.accumulate={parts}", "model.router.capacity_factor=0.6")
    torch.manual_seed(0)
    model = build(settings.model, 10).train()
    model.set_grad_checkpointing(recompute)
    x, targets = torch.randn(8, 1, 8, 8), torch.eye(10)[:8]
    with routings(model) as seen:
        for part in x.chunk(parts):
            model(part)
        want = sum(int(each.landed) for each in seen if each.landed is not None)
        seen.clear()
        quiet = torch.autocast("cpu", enabled=False)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        step = Step(model, model, optimizer_of(model, settings.optim), scaler, quiet, seen, settings)
        update(step, Batch(x, targets), 0.0)
        assert int(step.landed) == want > 0
        update(step, Batch(x, targets), 0.0)
        assert int(step.landed) == 2 * want


def test_landed_flops_by_hand() -> None:
    """With every slot filled the landed cost is the formula's; each choice less is an MLP's products less."""
    settings = config()
    cost = account(settings.model, 10, batch=8)
    slots = cost.slots_per_token
    assert slots is not None and cost.landed_row_flop == 3 * 4 * 16 * 32
    every = round(8 * 2 * cost.tokens * slots)
    assert cost.landed_train_flop(8, every) == pytest.approx(8 * cost.train_flop, rel=1e-12)
    assert cost.landed_train_flop(8, every - 5) == pytest.approx(8 * cost.train_flop - 5 * cost.landed_row_flop)
    again = account(settings.model, 10, batch=8, recompute=True)
    assert again.landed_row_flop == 4 * 4 * 16 * 32


def test_nominal_cost_is_that_of_an_even_load() -> None:
    """By hand: of 4 experts with an MLP and Z without tau 4 / (tau 4 + Z) of all choices; of one that drops what has no
    room, no more than there is room for."""
    for factor in ("null", "1.1"):
        cost = account(config(f"model.router.capacity_factor={factor}").model, 10, batch=8)
        assert cost.nominal_share == pytest.approx(0.75 * 4 / (0.75 * 4 + 3), abs=0.01)  # whole rows
        assert cost.landed_rows is not None and cost.landed_row_flop is not None
        rest = sum(part.train_flop for part in cost.parts if part.name != "experts")
        assert cost.nominal_landed_flop == pytest.approx(rest + cost.landed_rows * cost.landed_row_flop)
        assert (cost.nominal_landed_flop < cost.train_flop) == (factor != "null")
    for factor, share in (("1.1", 1.0), ("0.5", 0.5)):
        cost = account(compose(*TINY, *CHOICE, f"model.router.capacity_factor={factor}").model, 10)
        assert cost.nominal_share == pytest.approx(share, abs=0.01)
    assert account(compose(*TINY, "model/router=experts_choice").model, 10).nominal_share is None
    soft = account(compose(*TINY, "model/router=soft").model, 10)
    assert soft.nominal_landed_flop == soft.train_flop and soft.choices is None


@pytest.mark.parametrize("name", [name for name in ROUTERS if "mumoe" not in name])
def test_what_lands_is_at_most_what_is_computed(name: str) -> None:
    """A router whose rows are of single tokens says so, and how many of them hold one: of 3 experts too."""
    options = ROUTERS[name] | {"num_experts": 3}
    layer = make_layer(options, 16, 32, 16, gelu="none", identical=False).train()
    assert isinstance(layer, MoE)
    found = layer.router(torch.randn(4, 16, 16)).landed
    assert (found is not None) == layer.router.counts_landed
    if found is not None:
        rows, even = layer.rows(16), layer.landed_rows(16)
        assert rows is not None and even is not None and even <= rows
        assert 0 < int(found) <= 4 * rows or layer.router.slots_per_expert is None


@pytest.mark.thorough
def test_rows_and_comparisons_have_it(softmoe: Softmoe, tmp_path: Path) -> None:
    line = ("train", *TINY, "train.steps=6", "train.batch_size=8", "train.log_every=1")
    for seed in (0, 1, 2):
        assert softmoe(*line, *PLUS_PLUS, f"seed={seed}").code == 0
        assert softmoe(*line, "model/router=dense", f"seed={seed}").code == 0
    assert softmoe(*line, *CHOICE).code == 0
    results = [json.loads(path.read_text()) for path in tmp_path.glob("outputs/default/*/result.json")]
    for result in results:
        if result["router"] == "dense":
            assert result["landed_pflop"] == result["train_pflop"] and "landed_share" not in result
            continue
        assert 0.5 * result["train_pflop"] < result["landed_pflop"] < result["train_pflop"]
        plus = result["router"] == "zero_computation"
        assert result["nominal_share"] == (pytest.approx(0.5, abs=0.01) if plus else 1)
        assert 0.2 < result["landed_share"] < (0.8 if plus else 1)
    run = next(tmp_path.glob("outputs/default/*zero_computation*"))
    growing = [row["landed_pflop"] for row in rows(run) if row["split"] == "train"]
    assert len(growing) == 6 and growing == sorted(growing) and growing[0] > 0
    answer = softmoe("compare", "outputs/default", "--cost", "landed_pflop")
    assert answer.code == 0 and "landed" in answer.out, answer
    frozen = ("optim.freeze=[blocks.0.*]", "study=frozen")
    assert softmoe(*line, *PLUS_PLUS, *frozen).code == 0
    (result,) = [json.loads(path.read_text()) for path in tmp_path.glob("outputs/frozen/*/result.json")]
    assert "landed_pflop" not in result
