"""The mirror on Weights & Biases: what it refuses, what it holds, and that nothing is lost without it."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from softmoe_cli.config.run import Wandb
from softmoe_cli.options.compose import compose
from softmoe_cli.run import mirror
from tests.conftest import Softmoe
from tests.runs import finish, same, start, the_run
from tests.wandb_file import recorded


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "WANDB_MODE",
            "ofline",
            "WANDB_MODE=ofline is not one of online, offline, run, dryrun, disabled. Did",
        ),
        ("WANDB_PROJECT", "a/b", "WANDB_PROJECT=a/b: W&B refuses it (Invalid project name"),
        ("WANDB_TAGS", "a,,b", "WANDB_TAGS=a,,b: W&B refuses it (Tag at index 1 is empty"),
        ("WANDB_RESUME", "maybe", "WANDB_RESUME=maybe: W&B refuses it"),
        ("WANDB_API_KEY", " secret", "WANDB_API_KEY: W&B refuses it (API key cannot start or end with whitespace)"),
    ],
)
def test_the_environment_that_wandb_refuses(
    name: str, value: str, words: str, softmoe: Softmoe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    answer = softmoe("train")
    assert answer.code == 2 and words in answer.err and "secret" not in answer.err
    mirror.check(compose("tracking=off", "study=" + "s" * 200))  # nothing is sent


@pytest.mark.parametrize("tags", [[], ["t" * 64], ["t" * 65], [""]])
@pytest.mark.parametrize("project", ["a" * 128, "a b.c", "/", "a" * 129])
def test_wandbs_limits_are_these(project: str, tags: list[str]) -> None:
    """The same names are refused by the installed W&B itself."""
    import wandb

    theirs = refused(lambda: wandb.Settings(project=project, run_tags=tuple(tags)))
    assert refused(Wandb(project, None, None, tags, None).check) == theirs


def refused(check: Callable[[], object]) -> bool:
    try:
        check()
    except Exception:
        return True
    return False


@pytest.mark.parametrize(("mode", "meant"), [("dryrun", "offline"), ("run", "online"), ("disabled", "off")])
def test_wandbs_older_words(mode: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    assert mirror.tracking_of("auto") == meant


def test_wandb_offline_mirrors_the_run(tmp_path: Path) -> None:
    """Group, id, every split, the final row, and quality against images, FLOPs and seconds are in W&B's own file."""
    finish(start(tmp_path, "train.steps=30", "tracking=offline", "wandb.tags=[tagged]"))
    run = the_run(tmp_path)
    file, kept = recorded(run)
    place = hashlib.sha256(f"default/{run.name}".encode()).hexdigest()[:6]
    assert file.name == f"run-{run.name.rpartition('-')[2]}-{place}.wandb", "another study may have the same run"
    content = b"".join(each.SerializeToString() for each in kept)  # in the file itself a block's head may split a word
    for word in ("train/loss", "tagged", "result/top1_pct", "default", "num_experts"):
        assert word.encode() in content, word
    history = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in each.history.item}
        for each in kept
        if each.WhichOneof("record_type") == "history"
    ]
    looks = [row for row in history if "validation/top1_pct" in row]
    assert len(looks) >= 10 and sum("test/top1_pct" in row for row in history) == 1
    steps = {each.metric.name: each.metric.step_metric for each in kept if each.WhichOneof("record_type") == "metric"}
    for key in ("top1_pct", "top5_pct", "loss", "nll", "ece_pct"):
        for axis in ("train_pflop", "device_s"):
            assert steps[f"by_{axis}/{key}"] == axis
            assert all(row[f"by_{axis}/{key}"] == row[f"validation/{key}"] for row in looks)
    assert all({"images", "train_pflop", "device_s"} <= row.keys() for row in looks)
    metrics = {each.metric.name: each.metric for each in kept if each.WhichOneof("record_type") == "metric"}
    best, least = metrics["validation/top1_pct"], metrics["validation/loss"]
    assert (best.summary.max, best.summary.min) == (True, False)
    assert (least.summary.max, least.summary.min) == (False, True)
    assert best.summary.last and best.step_metric == "images"
    said = [update for each in kept if each.WhichOneof("record_type") == "config" for update in each.config.update]
    (pinned,) = [json.loads(each.value_json) for each in said if list(each.nested_key) == ["_wandb", "pinned_keys"]]
    (begun,) = [each.run for each in kept if each.WhichOneof("record_type") == "run"]
    first = {each.key: json.loads(each.value_json) for each in begun.config.update}
    assert pinned == ["router_name", "backbone_name", "data_name", "seed", "checkpoint"]
    assert set(pinned) <= first.keys() and (first["router_name"], first["data_name"]) == ("soft", "digits")
    assert (begun.run_group, begun.job_type) == ("default", "train")


def test_unreachable_wandb_loses_nothing(tmp_path: Path) -> None:
    environment = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40, "WANDB_MODE": ""}
    out = finish(start(tmp_path / "dark", "train.steps=30", "tracking=online", **environment))
    assert "W&B" in out
    finish(start(tmp_path / "off", "train.steps=30"))
    same(the_run(tmp_path / "off"), the_run(tmp_path / "dark"))
