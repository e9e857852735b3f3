"""`softmoe match`: requests land within tolerance when their overrides are costed again."""

import functools
import json

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore

from softmoe_cli.config.commands import FREE_KEYS, MATCHED, MatchConfig
from softmoe_cli.cost.match import Trial, cost_of, match, search, show_match
from softmoe_cli.errors import RunError
from softmoe_cli.options.compose import changed, door, other_model, plain
from softmoe_cli.options.conf_files import conf_folder
from tests.conftest import Softmoe, thinned

FASHION = "data=fashion_mnist"
REQUESTS = {
    "soft against dense training FLOPs, recomputed":
        f"model=vit_nano2_soft to=vit_nano2_dense {FASHION} by=train_gflop recompute=true "
        "free=model.router.num_experts",
    "slots": f"model=vit_nano4_soft to=vit_nano4_dense {FASHION} by=forward_gflop free=model.router.slots_per_expert "
        "tolerance=0.05",
    "blocks": f"model/backbone=vit_micro2 to=vit_micro2_dense {FASHION} by=forward_gflop free=model.moe_blocks "
        "tolerance=0.1",
    "width": f"model=vit_nano2_dense to=vit_nano2_soft {FASHION} by=forward_gflop free=model.backbone.width "
        "tolerance=0.05",
    "active parameters": f"model=vit_nano4_tokens_choice to=vit_micro4_dense {FASHION} by=active_params_m "
        "free=model.backbone.width tolerance=0.05",
    "memory": f"model=vit_nano4_soft to=vit_nano4_dense {FASHION} by=peak_mib free=model.moe_blocks tolerance=0.9",
    "steps": f"model/backbone=vit_micro4 to=vit_micro4_dense {FASHION} by=train_pflop steps=1000 free=train.steps "
        "tolerance=0.001",
}  # fmt: skip


def asked(words: list[str]) -> tuple[MatchConfig, MatchConfig, Trial]:
    """What `softmoe match WORDS` composes and finds."""
    ConfigStore.instance().store(name="match_schema", node=MatchConfig)
    with initialize_config_dir(str(conf_folder()), version_base=None):
        tree = plain(hydra_compose("match", [*words, "device=cpu"]), MatchConfig)
        config = door(tree, MatchConfig)
    other = other_model(config.to, words)
    best = match(config, other, functools.partial(changed, tree))
    return config, other, best


@pytest.mark.parametrize("name", thinned(REQUESTS, 3))
def test_requests_land_within_tolerance(name: str) -> None:
    """Their overrides, typed into the same request, cost what the other model does."""
    words = REQUESTS[name].split()
    config, other, best = asked(words)
    typed = [f"{key}={'null' if value is None else value}" for key, value in best.overrides.items()]
    steps = [f"steps={word.removeprefix('train.steps=')}" for word in typed if word.startswith("train.steps=")]
    with initialize_config_dir(str(conf_folder()), version_base=None):
        kept = [word for word in words if not (steps and word.startswith("steps="))]
        again = door(plain(hydra_compose("match", [*kept, *(steps or typed)]), MatchConfig), MatchConfig)
    assert cost_of(again) == best.cost
    assert cost_of(other) == best.other_cost
    assert abs(cost_of(again) / cost_of(other) - 1) <= config.tolerance
    assert typed[0] in show_match(best, config)


def test_when_nothing_meets_it_both_sides_are_named() -> None:
    words = "model=vit_nano4_dense to=vit_nano4_soft data=fashion_mnist free=model.backbone.depth tolerance=0.001"
    with pytest.raises(
        RunError, match=r"nearest below: model\.backbone\.depth=3 \(-.*above: model\.backbone\.depth=4 \(\+"
    ):
        asked(words.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("to=1e-3 model=vit_nano2_soft", "to=0.001: no such choice"),
        ("to=vit_nano2_dense model=vit_nano2_dense", "router dense has no num_experts"),
        ("to=vit_nano2_dense free=train.steps", "free=train.steps changes no forward_gflop"),
        ("to=vit_nano2_dense by=train_pflop", "steps belong to by=train_pflop and by=landed_pflop, which need them"),
        (
            "model=vit_nano2_tokens_choice to=vit_nano2_dense adapter=lora by=landed_pflop steps=9 free=train.steps",
            "adapter=lora leaves the experts of vit_nano2_tokens_choice_lora frozen",
        ),
        ("to=vit_nano2_dense by=flops", f"by=flops is not one of {', '.join(MATCHED)}"),
        ("to=vit_nano2_dense free=depth", f"free=depth is not one of {', '.join(FREE_KEYS)}"),
        ("free=model.moe_blocks", "to has no default"),
        ("to=vit_nano2_dens", "Did you mean 'vit_nano2_dense'?"),
    ],
)
def test_errors_of_use(softmoe: Softmoe, arguments: str, words: str) -> None:
    told = softmoe("match", *arguments.split())
    assert told.code == 2
    assert words in told.err
    assert len(told.err.splitlines()) == 1


def test_the_command_prints_what_to_type(softmoe: Softmoe) -> None:
    words = "match model=vit_nano4_soft to=vit_nano4_dense data=fashion_mnist free=model.router.slots_per_expert"
    told = softmoe(*words.split(), "format=json", "tolerance=0.1")
    assert told.code == 0, told.err
    assert json.loads(told.out)["overrides"][1:] == ["model.router.capacity_factor=null"]


def test_the_search_tries_what_it_must() -> None:
    """The nearest value on a line, on a saw, and where only some values can be."""
    for goal in (3.0, 70.0, 1234.0):
        tried: dict[int, float] = {}

        def line(value: int, goal: float = goal, tried: dict[int, float] = tried) -> float:
            tried[value] = (10 + 3 * value) / goal
            return tried[value]

        search(line, 3)
        assert min(tried, key=lambda v: abs(tried[v] - 1)) == max(1, round((goal - 10) / 3))
    seen = set()

    def few(value: int) -> float | None:
        seen.add(value)
        return value / 100 if 3 <= value <= 9 else None

    search(few, 3)
    assert {3, 9} <= seen
