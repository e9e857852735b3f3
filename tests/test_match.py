"""`softmoe match`: requests land within tolerance when their overrides are costed again."""

import json

import pytest

from softmoe_cli.config import COSTS, FREE_KEYS
from softmoe_cli.match import search
from tests.test_ledger import softmoe

REQUESTS = {
    "soft against dense FLOPs": "model=vit_s16_soft to=vit_s16_dense by=forward_gflop free=model.router.num_experts",
    "soft against dense training FLOPs, recomputed":
        "model=vit_b32_soft to=vit_b32_dense by=train_gflop free=model.router.num_experts recompute=true",
    "slots": "model=vit_nano4_soft to=vit_nano4_dense data=fashion_mnist by=forward_gflop "
        "free=model.router.slots_per_expert tolerance=0.05",
    "blocks": "model=vit_s16_soft to=vit_s16_dense by=forward_gflop free=model.moe_blocks tolerance=0.05",
    "depth": "model=vit_b32_dense to=vit_b32_soft by=forward_gflop free=model.backbone.depth tolerance=0.1",
    "width": "model=vit_s16_dense to=vit_s16_soft by=forward_gflop free=model.backbone.width tolerance=0.07",
    "parameters": "model=vit_nano4_soft to=vit_micro4_soft data=fashion_mnist by=params_m "
        "free=model.router.num_experts",
    "active parameters": "model=vit_nano4_tokens_choice to=vit_micro4_dense data=fashion_mnist by=active_params_m "
        "free=model.backbone.width tolerance=0.05",
    "memory": "model=vit_nano4_dense to=vit_nano4_soft data=fashion_mnist by=peak_mib free=model.backbone.width "
        "tolerance=0.1",
    "steps": "model=vit_s16_soft to=vit_s16_dense by=train_pflop steps=1000 free=train.steps tolerance=0.001",
}  # fmt: skip


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS.keys())
def test_requests_land_within_tolerance(request_: str) -> None:
    words = request_.split()
    told = softmoe("match", *words, "format=json")
    assert told.returncode == 0, told.stderr
    row = json.loads(told.stdout)
    by, (override, *rest) = row["by"], row["overrides"]
    model = [w for w in words if w.startswith(("model=", "data=", "recompute="))]
    costs = []
    for setting in ([*model, *(o for o in (override, *rest) if not o.startswith("train."))],
                    [f"model={row['to']}", *model[1:]]):  # fmt: skip
        again = softmoe("cost", *setting, "format=json")
        assert again.returncode == 0, again.stderr
        costs.append(json.loads(again.stdout))
    if by == "train_pflop":
        mine, others = int(override.partition("=")[2]) * costs[0]["train_gflop"], 1000 * costs[1]["train_gflop"]
    else:
        mine, others = costs[0][by], costs[1][by]
    assert abs(mine / others - 1) <= row["tolerance_pct"] / 100
    assert 100 * (mine / others - 1) == pytest.approx(row["difference_pct"], abs=1e-6)


def test_when_nothing_meets_it_both_sides_are_named() -> None:
    told = softmoe(
        "match", "model=vit_nano4_dense", "to=vit_nano4_soft", "data=fashion_mnist", "free=model.backbone.depth",
        "tolerance=0.001",
    )  # fmt: skip
    assert told.returncode == 1
    assert "nearest below: model.backbone.depth=3 (-" in told.stderr
    assert "nearest above: model.backbone.depth=4 (+" in told.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("to=vit_nano2_dense model=vit_nano2_dense", "router dense has no num_experts"),
        ("to=vit_nano2_dense free=train.steps", "free=train.steps changes no forward_gflop"),
        ("to=vit_nano2_dense by=train_pflop", "steps belong to by=train_pflop"),
        ("to=vit_nano2_dense by=flops", f"by=flops is not one of {', '.join(COSTS)}"),
        ("to=vit_nano2_dense free=depth", f"free=depth is not one of {', '.join(FREE_KEYS)}"),
        ("free=model.moe_blocks", "to has no default"),
        ("to=vit_nano2_dens", "Did you mean 'vit_nano2_dense'?"),
    ],
)
def test_errors_of_use(arguments: str, words: str) -> None:
    told = softmoe("match", *arguments.split())
    assert told.returncode == 2
    assert words in told.stderr
    assert len(told.stderr.splitlines()) == 1


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
