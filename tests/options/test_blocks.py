"""Routers of single blocks: how they are typed, and what every part makes of them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from softmoe_cli.compare import groups
from softmoe_cli.config.model import check_groups
from softmoe_cli.cost.flop import account, account_model, count_flop, on_meta
from softmoe_cli.errors import UsageError
from softmoe_cli.moe.routers.soft import SoftRouter
from softmoe_cli.moe.routers.tokens_choice import TokensChoiceRouter
from softmoe_cli.run.identity import flat_science, signature
from tests.conftest import TINY, Softmoe
from tests.model.models import make
from tests.oracles import compose
from tests.routers import ROUTERS
from tests.runs import rows, the_run

FOUR = ("tracking=off", *TINY[1:2], "model.backbone.depth=4", *TINY[3:6], "model.moe_blocks=[1,3]")


@pytest.mark.parametrize(
    ("typed", "changes"),
    [
        ("{3: tokens_choice}", {}),
        ("{3: {router: tokens_choice, num_experts: 2, k: 2}}", {"num_experts": 2, "k": 2}),
    ],
)
def test_a_name_stands_for_all_options(typed: str, changes: dict[str, Any]) -> None:
    model = compose(*FOUR, f"model.blocks={typed}").model
    assert model.blocks == {"3": ROUTERS["tokens_choice"] | changes}
    assert model.router_name == "soft+tokens_choice" and model.name.endswith("_soft+tokens_choice")
    assert model.router_of(1) == model.router and model.router_of(3) == model.blocks["3"]


def test_options_alone_are_of_the_models_router() -> None:
    model = compose(*FOUR, "model.blocks={1: {num_experts: 2}}").model
    assert model.blocks == {"1": model.router | {"num_experts": 2}} and model.router_name == "soft"
    experts = [make(*FOUR, "model.blocks={1: {num_experts: 2}}").blocks[i].mlp.router.num_experts for i in (1, 3)]
    assert experts == [2, 4]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("model.blocks={2: soft}",), "model.blocks.2 is about a block without experts: model.moe_blocks has 1, 3"),
        (("model.blocks={1: soft, 3: soft}",), "so that model.router has no effect"),
        (("model.blocks={3: sofft}",), "there is no router 'sofft'. Did you mean 'soft'?"),
        (("model.blocks={3: dense}",), "a block without experts is left out of model.moe_blocks"),
        (("model.blocks={3: {k: 2}}",), "model.blocks.3.k: SoftRouter has no such option"),
        (("model.blocks=[3]",), "model.blocks=[3] is no group of blocks"),
        (("model.blocks={last: soft}",), "model.blocks.last: a block is called by its number"),
        (("model.blocks={03: soft}",), "model.blocks.03: a block is called by its number, from 0, without zeros"),
        (("model.moe_blocks='last_²'",), "model.moe_blocks=last_² is none of last_N"),
        (("model.blocks={3: zero_computation}",), "set gating_residual=false, or leave model.blocks out"),
        (("model.blocks={3: uniform}",), "with router uniform experts that start equal stay equal"),
    ],
)  # fmt: skip
def test_what_cannot_be(words: tuple[str, ...], says: str) -> None:
    with pytest.raises(UsageError) as told:
        make(*FOUR, *words)
    assert says in str(told.value)


def test_the_dense_control_has_no_blocks_of_its_own() -> None:
    dense = [*FOUR[:5], "model/router=dense"]
    assert compose(*dense, "model.blocks={3: soft}").model == compose(*dense).model


def test_each_layer_is_that_of_a_model_with_its_router() -> None:
    mixed = make(*FOUR, "model.blocks={3: tokens_choice}")
    assert isinstance(mixed.blocks[1].mlp.router, SoftRouter)
    assert isinstance(mixed.blocks[3].mlp.router, TokensChoiceRouter)
    x = torch.randn(2, 16, 16)
    for index, router in ((1, "soft"), (3, "tokens_choice")):
        options = [] if router == "soft" else ["model.router.num_experts=8"]
        alone = make(*FOUR, f"model/router={router}", *options).eval().blocks[index].mlp
        alone.load_state_dict(mixed.blocks[index].mlp.state_dict())
        assert torch.equal(alone(x), mixed.eval().blocks[index].mlp(x))


MIXED = (
    "{3: tokens_choice}", "{3: {router: experts_choice, images_per_group: 4}}", "{1: tokens_choice_dropless}",
    "{1: {router: zero_computation, gating_residual: false}}", "{3: mumoe_cp}",
)  # fmt: skip


@pytest.mark.parametrize("typed", MIXED)
def test_costs_by_formula_and_by_counter(typed: str) -> None:
    model = compose(*FOUR, f"model.blocks={typed}").model
    vit = on_meta(model, 10)
    cost = account_model(vit, batch=None, recompute=False)
    forward, step = count_flop(vit)
    assert forward.flop == cost.forward_flop * forward.images
    if "zero_computation" not in typed:  # of which training's slots are more than an evaluation's rows
        assert step.flop == cost.train_flop * step.images
    alone = [account(compose(*FOUR, *words).model, 10) for words in ((), (f"model.blocks={typed}",))]
    assert alone[1] == cost != alone[0]
    layers = [vit.blocks[i].mlp for i in (1, 3)]
    each = [layer.rows(cost.tokens) for layer in layers]
    assert cost.slots_per_token == (None if None in each else sum(each) / 2 / cost.tokens)


def test_only_rows_that_images_decide_about_have_to_land() -> None:
    typed = "model.blocks={1: {router: zero_computation, gating_residual: false}}"
    vit = on_meta(compose(*FOUR, typed).model, 10)
    cost = account_model(vit, batch=None, recompute=False)
    soft, counted = vit.blocks[3].mlp, vit.blocks[1].mlp
    assert soft.landed_row_flop is None
    parts = {part.name: part.train_flop for part in cost.parts}
    rest = sum(parts.values()) - parts["experts"]
    want = 5 * (rest + soft.flop_by_part(cost.tokens)["experts"][1]) + 7 * 3 * counted.landed_row_flop
    assert cost.landed_train_flop(5, 7) == want


def test_a_share_is_of_the_choices_whose_rows_are_counted() -> None:
    """None beside layers whose experts choose, whose rows land without a choice; and soft layers do not count."""
    plain = "model/router=tokens_choice", "model.router.num_experts=8"
    alone = account(compose(*FOUR, *plain).model, 10)
    assert alone.choices is not None and alone.nominal_share is not None and alone.nominal_share <= 1
    beside = account(compose(*FOUR, *plain, "model.blocks={3: experts_choice}").model, 10)
    assert beside.landed_rows is not None and beside.choices is None and beside.nominal_share is None
    soft = account(compose(*FOUR, *plain, "model.blocks={3: soft}").model, 10)
    assert soft.choices == alone.choices / 2 and soft.nominal_share == pytest.approx(alone.nominal_share)


def test_groups_are_whole_in_every_block() -> None:
    typed = "model.blocks={3: {router: tokens_choice, images_per_group: 4}}"
    model = compose(*FOUR, typed, "model/router=experts_choice", "model.router.images_per_group=2").model
    assert model.images_per_group == 4
    with pytest.raises(UsageError, match=r"batch_size=6 is not a multiple of model.router.images_per_group=4"):
        check_groups("batch_size", 6, model.images_per_group)


def test_another_router_in_a_block_is_another_run() -> None:
    plain, mixed, same = (compose(*FOUR, *words) for words in ((), ("model.blocks={3: tokens_choice}",), ()))
    assert signature(plain, "train", None, None) == signature(same, "train", None, None)
    assert signature(plain, "train", None, None) != signature(mixed, "train", None, None)
    assert not [key for key in flat_science(plain) if key.startswith("model.blocks")]
    assert flat_science(mixed)["model.blocks.3.num_experts"] == 8


@pytest.mark.parametrize(
    ("key", "value", "label"),
    [
        ("model.blocks.3._target_", "softmoe_cli.moe.routers.soft.SoftRouter", "block 3 soft"),
        ("model.blocks.11.num_experts", 8, "block 11 num_experts 8"),
    ],
)
def test_tables_say_of_which_block_a_setting_is(key: str, value: Any, label: str) -> None:
    group: Any = SimpleNamespace(settings={key: value}, runs=[SimpleNamespace(row={})])
    assert groups._part(group, key) == label


@pytest.mark.thorough
def test_from_training_to_a_finetuning(softmoe: Softmoe, tmp_path: Any) -> None:
    words = ("train.steps=4", "train.batch_size=16", "threads=1")
    answer = softmoe("train", *FOUR, *words, "model.blocks={3: {router: tokens_choice, slots_per_expert: null}}")
    assert answer.code == 0, answer.err
    assert "in blocks [1], tokens_choice (num_experts=8" in answer.out
    run = the_run(tmp_path)
    seen = rows(run, "routing.jsonl")
    assert {row["block"]: "dispatch_max" in row for row in seen} == {1: True, 3: False}
    (look, *_) = [row for row in rows(run) if row["split"] == "validation"]
    assert look["routing_utilisation"] == pytest.approx(sum(row["utilisation"] for row in seen[:2]) / 2)
    assert look["routing_dispatch_max"] == seen[0]["dispatch_max"]
    told = softmoe("evaluate", f"checkpoint={run}", "audit=[capacity,experts]")
    assert told.code == 0 and "its blocks have options of their own" in told.out, told
    fewer = softmoe("prune", f"checkpoint={run}", "keep=2", "by=alpha_score", "format=json", "folder=fewer")
    assert fewer.code == 0, fewer.err
    assert softmoe("evaluate", "checkpoint=fewer").code == 0
    other = softmoe("finetune", f"checkpoint={run}", "tracking=off", *words, "model.blocks={3: soft}")
    assert other.code == 2 and "of another architecture: it lacks blocks.3.mlp.router.phi" in other.err, other
    again = softmoe("finetune", f"checkpoint={run}", "tracking=off", *words, "study=again")
    assert again.code == 0, again.err
