"""`softmoe cost` through the real command: the same figures in every format."""

import csv
import io
import json
import resource
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from softmoe_cli.cli import main
from softmoe_cli.config.run import WAYS
from softmoe_cli.cost.command import CONVENTION, UNDIVIDED, costs, show_costs
from softmoe_cli.cost.load import Load
from softmoe_cli.cost.memory import predict
from softmoe_cli.errors import UsageError
from tests.conftest import Softmoe
from tests.oracles import compose
from tests.processes import forked
from tests.runs import costed


def test_formula_counter_and_clock_stand_side_by_side() -> None:
    (row,) = costs([costed(clock=True)])
    for key in (
        "params_m",
        "active_params_m",
        "forward_gflop",
        "train_gflop",
        "latency_ms",
        "images_per_s",
        "peak_mib",
    ):
        assert row[key] > 0
    assert row["forward_gflop"] == row["counter_forward_gflop"] == sum(part["forward_gflop"] for part in row["parts"])
    assert row["train_gflop"] == pytest.approx(row["counter_train_gflop"], rel=1e-12)
    assert row["peak_mib"] == pytest.approx(row["measured_peak_mib"], rel=0.02)
    assert row["images_per_s"] == pytest.approx(8 / row["latency_ms"] * 1000)
    assert "eager" in row["hardware"]
    assert row["latency_rank"] is None


def test_formats_say_the_same() -> None:
    rows = costs([costed(), costed("vit_nano4_dense", recompute=True)])
    for many in (True, False):
        here = rows if many else rows[:1]
        loaded = json.loads(show_costs(here, "json", many=many))
        assert [each["params_m"] for each in (loaded if many else [loaded])] == [row["params_m"] for row in here]
        lines = list(csv.DictReader(io.StringIO(show_costs(here, "csv", many=many))))
        assert [float(line["train_gflop"]) for line in lines if line["model"]] == [row["train_gflop"] for row in here]
        table, markdown = (show_costs(here, form, many=many) for form in ("table", "markdown"))
        assert table.startswith(CONVENTION)
        assert markdown.startswith(CONVENTION)
        assert f"{rows[0]['params_m']:.4g}" in table
        words = [line.split() for line in table.splitlines()]
        assert [w for w in words if w] == [
            line.replace("|", " ").split() for line in markdown.splitlines() if line and "---" not in line
        ]
        if not many:
            assert [line["part"] for line in lines] == [*(part["part"] for part in rows[0]["parts"]), "total"]
            assert UNDIVIDED not in table and UNDIVIDED in show_costs(rows[1:], "table", many=False)


def test_a_folder_has_to_say_its_classes() -> None:
    config = costed()
    config.data.num_classes = None
    with pytest.raises(UsageError, match=r"give data\.num_classes"):
        costs([config])


def test_one_table_for_many_models(softmoe: Softmoe) -> None:
    told = softmoe("cost", "-m", "model=vit_nano4_dense,vit_nano4_soft", "data=fashion_mnist", "format=json")
    assert told.code == 0, told.err
    assert [row["model"] for row in json.loads(told.out)] == ["vit_nano4_dense", "vit_nano4_soft"]


@pytest.mark.thorough
def test_the_largest_model_is_counted_and_not_allocated(tmp_path: Path) -> None:
    """54 billion parameters: 202 GiB of weights that are never there."""
    told = tmp_path / "told.txt"
    assert forked(told, count_the_largest) == 0, told.read_text()
    out, _, peak_kib = told.read_text().rpartition("peak")
    row = json.loads(out)
    assert row["params_m"] > 54_000
    assert row["counter_train_gflop"] == pytest.approx(row["train_gflop"], rel=1e-12)
    assert int(peak_kib) < 2 * 2**20


def count_the_largest() -> None:
    sys.argv = ["softmoe", "cost", "model=vit_h14_soft", "format=json"]
    with pytest.raises(SystemExit, match="0"):
        main()
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def test_errors_of_use(softmoe: Softmoe) -> None:
    for argument, words in {
        "accumulate=3": "accumulate=3 does not divide batch_size=32",
        "format=xml": "format=xml is not one of table, json, csv, markdown",
        "batchsize=3": "Did you mean 'batch_size'?",
    }.items():
        told = softmoe("cost", argument)
        assert told.code == 2
        assert words in told.err
        assert len(told.err.splitlines()) == 1


@pytest.mark.thorough
def test_memory_of_each_of_several_devices(softmoe: Softmoe) -> None:
    """As training predicts it; FLOPs of an image are what they were."""
    line = ("cost", "model=vit_nano4_soft", "data=fashion_mnist", "batch_size=32", "devices=4")
    config = compose("model=vit_nano4_soft", "data=fashion_mnist", "train.batch_size=32")
    load = Load.of(config, 10, torch.device("cpu"))
    fsdp, expert = (predict(load, 4, way).peak_bytes / 2**20 for way in WAYS[1:])
    told = softmoe(*line, "parallel=fsdp", "format=json")
    assert told.code == 0, told.err
    row = json.loads(told.out)
    assert (row["devices"], row["parallel"], row["peak_mib"]) == (4, "fsdp", fsdp)
    assert row["forward_gflop"] == costs([costed()])[0]["forward_gflop"]
    table = softmoe(*line, "parallel=expert").out
    assert "on each of 4 devices, expert" in table and f"{expert:,.4g}" in table.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("parallel=fsdp", "parallel=fsdp has no effect with devices=1"),
        ("devices=4 clock=true", "clock=true measures one device"),
        ("devices=64", "devices=64 cannot divide 32 images"),
        ("devices=2 parallel=expert model=vit_nano4_dense", "cannot divide no experts"),
    ],
)
def test_devices_that_cost_cannot_take(softmoe: Softmoe, words: str, why: str) -> None:
    told = softmoe("cost", "data=fashion_mnist", "model=vit_nano4_soft", *words.split())
    assert told.code == 2 and why in told.err


def test_each_task_stands_beside_the_whole() -> None:
    """Of a model of several sets: its cost alone, its latency where the clock runs, and the mean in the model's row."""
    words = ("data=mix", "data.sets=[digits,{data: folder, name: site, root: x, num_classes: 4, image_size: 8}]",
             "model/backbone=vit_nano2", "model.backbone.width=16", "model.backbone.mlp_width=32",
             "model/router=task_choice", "model.router.num_experts=6", "model.router.k=2")  # fmt: skip
    (row,) = costs([replace(costed(clock=True), model=(config := compose(*words)).model, data=config.data)])
    assert [each["task"] for each in row["served"]] == ["digits", "site"]
    one, other = row["served"]
    assert one["params_m"] - other["params_m"] == pytest.approx(6 * 17e-6), "six classes more"
    experts = 2 * 4 * (2 * 16 * 32 + 32 + 16)  # four fewer in each of the last two blocks
    tables = 2 * (2 * 6 - 2)
    assert row["params_m"] - one["params_m"] == pytest.approx((experts + tables + 4 * 17) / 1e6)
    assert row["served_params_m"] == (one["params_m"] + other["params_m"]) / 2
    assert all(each["latency_ms"] > 0 for each in row["served"])
    table = show_costs([row], "table", many=False)
    assert "digits alone" in table and "site alone" in table
    (line,) = csv.DictReader(io.StringIO(show_costs([row], "csv", many=True)))
    assert float(line["served_params_m"]) == row["served_params_m"] and "served" not in line
    (plain,) = costs([costed()])
    assert plain["served"] == [] and plain["served_params_m"] is None
