"""What a run writes is what run/rows.py declares, no key more and no key less."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from softmoe_cli.config.commands import MATCHED
from softmoe_cli.config.launch import FORESEEN, SEARCHED
from softmoe_cli.config.run import Config
from softmoe_cli.model.router import make_router
from softmoe_cli.options.conf_files import files, load_yaml
from softmoe_cli.options.help import options
from softmoe_cli.run import rows
from softmoe_cli.run.rows import COSTS, EVERY, FEWSHOT, LOOK, QUALITIES, RESULT, ROUTING, TRAIN
from tests.conftest import TINY, Softmoe
from tests.routers import ROUTERS


def test_a_run_writes_what_is_declared(softmoe: Softmoe, tmp_path: Path) -> None:
    told = softmoe("train", *TINY, "threads=1", "train.steps=2", "train.log_every=1", "train.fewshot=[1]")
    assert told.code == 0, told.err
    (run,) = (tmp_path / "outputs" / "default").iterdir()
    written = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    extra = {"train": set(TRAIN), "test": set(LOOK), "validation": {*LOOK, FEWSHOT.format(1)}}
    statistics = set()
    for row in written:
        found = row.keys() - EVERY.keys()
        statistics |= {key for key in found if key.startswith("routing_")}
        assert {key for key in found if not key.startswith("routing_")} == extra[row["split"]]
        assert (EVERY.keys() - row.keys()) <= {"energy_kj"}
        assert not rows.fault(row, EVERY | (TRAIN if row["split"] == "train" else LOOK))
    assert {row["split"] for row in written} == extra.keys()
    layers = rows.lines(run / "routing.jsonl", ROUTING)
    assert statistics == {f"routing_{key}" for key in layers[0].keys() - {"format", "step", "block"}}

    result = rows.row(run / "result.json", RESULT)
    settings = {option.key for option in options(Config)}
    settings |= {f"model.router.{key}" for key in load_yaml(files("model/router")["soft"])}
    assert result.keys() - settings - RESULT.keys() == {f"validation_{FEWSHOT.format(1)}"}
    no_choices = {"landed_share", "nominal_share"}  # tokens of a soft router make none
    assert no_choices <= RESULT.keys() - result.keys() <= {"energy_kj"} | no_choices
    assert result["metrics_rows"] == len(written)
    assert rows.metrics_digest((run / "metrics.jsonl").read_bytes()).items() <= result.items()


def test_every_statistic_is_some_routers() -> None:
    found: set[str] = set()
    for name, own_options in ROUTERS.items():
        router = make_router(own_options, 16, 16)
        own = router(torch.randn(4, 16, 16)).statistics() | router.statistics()
        assert own.keys() <= ROUTING.keys(), name
        found |= own.keys()
    assert found == ROUTING.keys() - {"format", "step", "block", "beside", "task_changes"}  # of looks, not of routers


def test_what_is_declared_fits_together() -> None:
    for key, each in RESULT.items():
        assert bool(each.better) + bool(each.amount) <= 1, key
        assert each.title or each.meaning, key
        assert each.unit in each.title, key
    assert all(each.curve in LOOK for each in QUALITIES.values())
    assert all(key in EVERY for key in rows.AXES)
    assert {*SEARCHED} <= QUALITIES.keys() and {*FORESEEN} <= COSTS.keys()
    assert {*MATCHED} - {"latency_ms", "train_step_ms"} <= COSTS.keys()


@pytest.mark.parametrize("value", [None, 2, "1", True, [1]])
def test_another_format_is_one_sentence(value: Any) -> None:
    told = rows.fault({"format": value, "step": 1}, rows.FORMAT_KEY)
    assert re.fullmatch(r"has format .*, and this softmoe reads format 1", told)
    assert "format none" in rows.fault({"step": 1}, rows.FORMAT_KEY)
    assert not rows.fault({"format": 1}, rows.FORMAT_KEY)


def test_documents_tell_the_declared_words() -> None:
    """The tables of routing statistics and of training's rows, wherever a README has them."""
    texts = [path.read_text() for path in Path(__file__).parents[2].glob("**/README.md") if ".venv" not in path.parts]
    lines = {line for text in texts for line in text.splitlines()}
    for key, each in (ROUTING | TRAIN).items():
        if each.optional or key in TRAIN:
            assert f"| `{key}` | {each.meaning} |" in lines
