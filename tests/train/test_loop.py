"""The loop through its real parts: its options, updates, rows and result."""

import functools
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from softmoe_cli import device
from softmoe_cli.moe.processor import CPU_PRODUCTS
from softmoe_cli.parallel import Average
from tests.conftest import TINY, Softmoe, thinned
from tests.processes import forked, until, with_little_disk
from tests.runs import finish, last, rows, start, the_run


def test_a_router_without_parameters_is_told_of_updates(softmoe: Softmoe, monkeypatch: pytest.MonkeyPatch) -> None:
    identity, told = pytest.importorskip("softmoe_cli.moe.routers.identity").IdentityRouter, list[Any]()
    monkeypatch.setattr(identity, "after_update", lambda router: told.append(router))
    answer = softmoe("train", *TINY, "model/router=identity", "train.steps=3")
    assert answer.code == 0, answer
    assert len(told) == 3


def test_full_disk(tmp_path: Path) -> None:
    """A file size limit stands for the disk, above all rows and below moments: the failing checkpoint is one sentence,
    the one before stays good."""
    options = ("train.steps=200", "train.save_seconds=0", "train.batch_size=8")
    process = start(tmp_path, *options)
    until(lambda: list(tmp_path.glob("outputs/*/*/checkpoints/last-*")), process)
    process.send(signal.SIGTERM)
    finish(process, 130)
    told = tmp_path / "told.txt"
    assert forked(told, with_little_disk, tmp_path, ["train", *TINY, "threads=1", *options]) == 1
    assert "cannot write a checkpoint" in told.read_text()
    assert "earlier checkpoints are untouched" in told.read_text()
    assert "Traceback" not in told.read_text()
    assert "going on from step" in finish(start(tmp_path, *options))


def test_accumulation_gives_the_large_batch_update(softmoe: Softmoe, tmp_path: Path) -> None:
    for parts in (1, 4):
        line = ("train", *TINY, "train.steps=8", f"train.accumulate={parts}", f"study=parts{parts}")
        assert softmoe(*line).code == 0
    one, four = (next((tmp_path / "outputs" / f"parts{n}").iterdir()) for n in (1, 4))
    x, y = (load_file(last(run) / "model.safetensors") for run in (one, four))
    for key in x:
        torch.testing.assert_close(x[key], y[key], atol=2e-4, rtol=1e-3)
    first = [rows(run)[0]["loss"] for run in (one, four)]
    assert first[0] == pytest.approx(first[1], rel=1e-5)


@pytest.mark.parametrize(
    "options",
    thinned([(options,) for options in [
        ("train.precision=bf16", "train.recompute=true"),
        ("train.precision=fp16", "model.expert_init=independent", "model.backbone.layer_scale=0.1",
         "model.backbone.norm_after_pool=true"),
        ("train.loss=sigmoid", "optim.schedule=rsqrt", "optim.warmup=2", "optim.cooldown=2",
         "model.backbone.qk_norm=affine", "model.backbone.gelu=erf", "model.backbone.init=timm"),
        ("recipe=strong",),
        ("train.images=100", "augment.randaugment=[2,9]"),
        ("train.epochs=0.1", "optim.schedule=constant", "model/router=dense", "model.backbone.class_token=true",
         "model.backbone.pool=token"),
        ("train.minutes=0.005", "optim.schedule=linear"),
    ]], 4),
    ids=lambda options: options[0],
)  # fmt: skip
def test_options_run(options: tuple[str, ...], softmoe: Softmoe, tmp_path: Path) -> None:
    budget = [] if any(o.startswith(("train.im", "train.ep", "train.min")) for o in options) else ["train.steps=6"]
    answer = softmoe("train", *TINY, *options, *budget)
    assert answer.code == 0, answer
    row = json.loads((the_run(tmp_path) / "result.json").read_text())
    assert np.isfinite(row["loss"]) and 0 <= row["top1_pct"] <= row["top5_pct"] <= 100
    assert row["images"] == row["steps"] * row["batch_size"]


def test_fp16_updates_that_overflow_are_left_out(
    softmoe: Softmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are logged without a norm, and neither the average of weights nor a balancing bias sees them."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**24))
    settled: list[float] = []
    averaged: list[int] = []
    choice = pytest.importorskip("softmoe_cli.moe.routers.tokens_choice").TokensChoiceRouter
    settle, average = choice.after_update, Average.update

    def after_update(router: Any) -> None:
        settled.append(float(router.balance.demand.sum()))
        settle(router)

    def update(ema: Any, *arguments: Any) -> None:
        averaged.append(1)
        average(ema, *arguments)

    monkeypatch.setattr(choice, "after_update", after_update)
    monkeypatch.setattr(Average, "update", update)
    answer = softmoe(
        "train", *TINY, "model/router=tokens_choice", "model.router.bias_rate=0.01", "model.router.load_weight=0",
        "train.precision=fp16",
        "train.steps=14", "train.log_every=1", "train.ema=0.9",
    )  # fmt: skip
    assert answer.code == 0, answer
    norms = [row["grad_norm"] for row in rows(the_run(tmp_path)) if row["split"] == "train"]
    made = [norm for norm in norms if norm is not None]
    assert len(norms) == 14 > len(made) == len(settled) == len(averaged) > 0 and norms[0] is None
    assert len(set(settled)) == 1, "one batch's tokens each"


@pytest.mark.long
@pytest.mark.thorough
def test_compile(tmp_path: Path) -> None:
    """In a process of its own, where no shape checker is in the way; the losses are the eager ones."""
    alone = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # each process that it would have help from imports torch first
    for flag in ("true", "false"):
        options = ("train.steps=5", "model.backbone.depth=1", f"train.compile={flag}")
        finish(start(tmp_path / flag, *options, **alone))
    compiled, eager = (the_run(tmp_path / flag) for flag in ("true", "false"))
    for x, y in zip(rows(compiled), rows(eager), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)
    assert not any(key.startswith("_orig_mod") for key in load_file(last(compiled) / "model.safetensors"))


def test_rows_and_result(softmoe: Softmoe, tmp_path: Path) -> None:
    """Cost stands in every row and only grows; the result is the last of them and counts each test image once."""
    assert softmoe("train", *TINY, "train.steps=50", "train.eval_batch_size=50", "seed=3").code == 0
    run = the_run(tmp_path)
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for key in ("step", "images", "train_pflop", "device_s", "eval_s", "save_s"):
        values = [row[key] for row in found]
        assert values == sorted(values), key
    assert [row["split"] for row in found].count("test") == 1 and found[-1]["split"] == "test"
    result = json.loads((run / "result.json").read_text())
    assert result["test_images"] == 359 and result["seed"] == 3
    assert result["train_pflop"] == found[-1]["train_pflop"]
    assert result["train_pflop"] == pytest.approx(50 * 32 * result["train_gflop"] / 1e6, rel=1e-12)
    assert 2.9 < result["train_gflop"] / result["forward_gflop"] < 3  # pixels have no gradient
    assert result["peak_mib"] > 16 * result["params_m"] * 1e6 / 2**20
    assert result["signature"] == run.name.rpartition("-")[2]
    layers = {row["block"] for row in rows(run, "routing.jsonl")}
    assert layers == {1}


@pytest.mark.parametrize(
    ("products", "narrow", "precision", "reason"),
    thinned(
        [
            ("fast", 0, "bf16", "this CPU has instructions for it"),
            ("fast", 192, "fp32", "a mixture 16 wide gains nothing from bf16 on a CPU"),
            ("emulated", 0, "fp32", "this CPU has no instructions for bf16"),
        ],
        1,
    ),
)
def test_precision_auto_is_the_run_of_the_precision_that_it_takes(
    products: str, narrow: int, precision: str, reason: str, softmoe: Softmoe, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(CPU_PRODUCTS, torch.bfloat16, products)
    monkeypatch.setattr(device, "NARROW_MIXTURE", narrow)
    line = ("train", *TINY, "train.steps=1")
    told = softmoe(*line, "train.precision=auto")
    assert f"train.precision=auto: {precision}, as {reason}; type train.precision={precision}" in told.out
    assert f"thread, {precision}" in told.out
    for again in (precision, "auto"):
        assert "is finished" in softmoe(*line, f"train.precision={again}").out
    assert json.loads((the_run(tmp_path) / "result.json").read_text())["precision"] == precision


def test_batch_size_auto_is_the_run_of_its_number(softmoe: Softmoe, tmp_path: Path) -> None:
    """All 1,295 images fit here, so the largest power of two among them; the signature is that of the number."""
    told = softmoe("train", *TINY, "train.steps=1", "train.batch_size=auto")
    assert "train.batch_size=auto: 1024" in told.out
    assert "is finished" in softmoe("train", *TINY, "train.steps=1", "train.batch_size=1024").out
    assert yaml.safe_load((the_run(tmp_path) / "config.yaml").read_text())["train"]["batch_size"] == 1024
