"""The loop through its real parts: processes, signals, files. Same configuration, same numbers, whatever happens."""

import functools
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from softmoe_cli.cli import main
from softmoe_cli.parallel import Average
from softmoe_cli.train.stop import Interrupted, Stop
from softmoe_cli.train.summary import _commit
from tests.conftest import TINY, Softmoe, thinned
from tests.processes import forked
from tests.runs import finish, last, rows, same, start, the_run
from tests.wandb_file import recorded


@pytest.mark.long
@pytest.mark.thorough
def test_five_kills_change_nothing(tmp_path: Path) -> None:
    """SIGKILL at random moments, some of them while a checkpoint is being written."""
    options = (
        "train.steps=600", "train.batch_size=8", "train.save_seconds=0", "train.ema=0.99", "augment.mixup=0.2",
        "augment.crop=resized", "model.router.noise_std=0.1", "model.backbone.drop_path=0.1",
    )  # fmt: skip
    finish(start(tmp_path / "whole", *options))
    rng, kills, saving = random.Random(0), 0, 0
    while kills < 5:
        process = start(tmp_path / "killed", *options)
        moment = None
        while not process.ended:
            writing = list(tmp_path.glob("killed/outputs/*/*/checkpoints/.last-*"))  # one comes with the first step
            if writing and moment is None:
                moment = time.monotonic() + rng.uniform(0, 0.4)
            if moment is not None and (writing if kills % 2 else time.monotonic() > moment):
                saving += bool(writing)
                break
            time.sleep(0.001)
        assert not process.ended
        process.send(signal.SIGKILL)
        process.wait()
        kills += 1
    finish(start(tmp_path / "killed", *options))
    assert saving >= 2, "too few kills met a checkpoint being written"
    same(the_run(tmp_path / "whole"), the_run(tmp_path / "killed"))


@pytest.mark.long
def test_signals_save_and_leave(tmp_path: Path) -> None:
    """SIGTERM, then SIGINT, then SIGUSR1: the run saves and leaves each time, and ends as if it had never stopped."""
    options = ("train.steps=500", "train.batch_size=8", "train.log_every=10")
    finish(start(tmp_path / "whole", *options))
    before = 0
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        process = start(tmp_path / "stopped", *options)
        metrics = tmp_path / "stopped" / "outputs"
        while sum(file.stat().st_size for file in metrics.glob("*/*/metrics.jsonl")) <= before:
            time.sleep(0.005)
        process.send(getattr(signal, name))
        assert f"stopped by {name}; type the same command to go on" in finish(process, 130)
        assert not (the_run(tmp_path / "stopped") / "result.json").exists()
        before = sum(file.stat().st_size for file in metrics.glob("*/*/metrics.jsonl"))
    assert "going on from step" in finish(start(tmp_path / "stopped", *options))
    same(the_run(tmp_path / "whole"), the_run(tmp_path / "stopped"))
    found = (the_run(tmp_path / "stopped") / "metrics.jsonl").read_text().splitlines()
    for key in ("device_s", "eval_s", "save_s"):  # what was spent before a stop stays booked
        spent = [json.loads(line)[key] for line in found]
        assert spent == sorted(spent) and spent[-1] > 0, key


def test_damaged_last_checkpoint(softmoe: Softmoe, tmp_path: Path) -> None:
    """A flipped byte is noticed by its checksum, and the checkpoint before goes on to the same end."""
    line = ("train", *TINY, "train.steps=60", "train.save_seconds=0")
    assert softmoe(*line, "output_root=whole").code == 0
    assert softmoe(*line, "output_root=damaged").code == 0
    whole, damaged = (next((tmp_path / root / "default").iterdir()) for root in ("whole", "damaged"))
    (damaged / "result.json").unlink()
    newest, before = sorted((damaged / "checkpoints").glob("last-*"), reverse=True)
    raw = bytearray((newest / "model.safetensors").read_bytes())
    raw[-100] ^= 1
    (newest / "model.safetensors").write_bytes(raw)
    answer = softmoe(*line, "output_root=damaged")
    assert answer.code == 0
    assert f"{newest.name} is damaged (model.safetensors does not match its checksum)" in answer.out
    assert f"({before.relative_to(tmp_path)})" in answer.out
    same(whole, damaged)


HARD = {
    "adamw": (
        "optim.layer_decay=0.7", "optim.freeze=[blocks.0.*,*.scale]", "augment.erase=0.5", "augment.randaugment=[1,5]",
        "augment.mixup=0.4", "model.backbone.drop_path=0.3", "train.ema=0.9", "train.recompute=true",
    ),
    "sgd": ("optim.name=sgd", "optim.momentum=0.9", "optim.layer_decay=0.7", "augment.erase=0.5", "optim.lr=0.1"),
    "what the images cost": (
        "model/router=zero_computation", "model.moe_blocks=every_1", "train.recompute=true", "train.accumulate=2",
        "train.log_every=1",
    ),
    "8bit": ("optim.moments=8bit", "model.backbone.mlp_width=256"),
}  # fmt: skip


@pytest.mark.parametrize("name", thinned(HARD, 2))
def test_finetune_options_resume_to_the_same_bits(name: str, softmoe: Softmoe, tmp_path: Path) -> None:
    """From the checkpoint before the last, in the middle of the run."""
    line = ("train", *TINY, "train.steps=6", "train.batch_size=8", "train.save_seconds=0", "train.eval_every=3",
            *HARD[name])  # fmt: skip
    assert softmoe(*line, "output_root=whole").code == 0
    whole = next((tmp_path / "whole" / "default").iterdir())
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    stopped = next((tmp_path / "stopped" / "default").iterdir())
    (stopped / "result.json").unlink()
    shutil.rmtree(last(stopped))
    before = load_file(last(stopped) / "model.safetensors")
    answer = softmoe(*line, "output_root=stopped")
    assert answer.code == 0 and "going on from step" in answer.out, answer
    same(whole, stopped)
    kept, end = load_file(last(whole) / "training.safetensors"), load_file(last(whole) / "model.safetensors")
    moments = {key.split(".", 1)[1].rpartition(".")[0] for key in kept if key.startswith("optimizer.")}
    frozen = {key for key in end if name == "adamw" and (key.startswith("blocks.0.") or key.endswith(".scale"))}
    assert moments == end.keys() - frozen
    assert {key for key, value in end.items() if torch.equal(before[key], value)} == frozen
    bytes_kept = {key for key, value in kept.items() if value.dtype == torch.uint8 and key.startswith("optimizer.")}
    assert bool(bytes_kept) == (name == "8bit")


def test_the_images_are_part_of_what_a_run_is(softmoe: Softmoe, tmp_path: Path) -> None:
    for name, change in (("a", 0), ("b", 1)):
        for label, grey in (("x", 40), ("y", 200)):
            (tmp_path / name / label).mkdir(parents=True)
            for i in range(12):
                Image.new("L", (8, 8 + change), grey + i).save(tmp_path / name / label / f"{i}{change}.png")
    line = (
        "train",
        *TINY,
        "data=folder",
        "data.image_size=8",
        "data.channels=1",
        "train.steps=2",
        "train.batch_size=4",
    )
    assert softmoe(*line, "data.root=a").code == 0
    assert "is finished" not in softmoe(*line, "data.root=b").out
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    assert "is finished" in softmoe(*line, "data.root=moved").out
    assert softmoe(*line, "data.root=nowhere").code == 2
    assert len(list(tmp_path.glob("outputs/default/*/result.json"))) == 2


def test_a_signal_to_the_whole_group_saves(tmp_path: Path) -> None:
    """As Slurm and containers send it: the processes that decode images leave it to the one that trains."""
    for label, grey in (("x", 40), ("y", 200)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(12):
            Image.new("L", (8, 8), grey + i).save(tmp_path / "images" / label / f"{i}.png")
    process = start(
        tmp_path, "data=folder", "data.root=images", "data.image_size=8", "data.channels=1", "data.memory_gib=0",
        "data.workers=2", "train.steps=100000", "train.batch_size=4", "train.log_every=2",
    )  # fmt: skip
    while not list(tmp_path.glob("outputs/*/*/metrics.jsonl")):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    out = finish(process, 130)
    assert "stopped by SIGTERM" in out and out.count("saving and leaving") == 1
    assert last(the_run(tmp_path)).is_dir()


def test_a_stop_during_validation_leaves_no_row(
    softmoe: Softmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("train", *TINY, "train.steps=40", "train.eval_every=20", "train.log_every=10")
    assert softmoe(*line, "output_root=whole").code == 0
    watch, calls = Stop.watch, 0

    def stopped(self: Stop, items: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:  # the validation at step 40
            self.name = "SIGTERM"
        return watch(self, items)

    monkeypatch.setattr(Stop, "watch", stopped)
    assert softmoe(*line, "output_root=stopped").code == 130
    assert calls == 2
    assert softmoe(*line, "output_root=stopped").code == 0
    whole, resumed = (next((tmp_path / root / "default").iterdir()) for root in ("whole", "stopped"))
    same(whole, resumed)
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (whole, resumed)]
    assert f"best-{json.loads((whole / 'result.json').read_text())['best_step']:08d}" in names[0]
    assert set(names[0]) <= {*names[1], *[name for name in names[0] if name.startswith("last")]}


def test_a_router_without_parameters_is_told_of_updates(softmoe: Softmoe, monkeypatch: pytest.MonkeyPatch) -> None:
    identity, told = pytest.importorskip("softmoe_cli.moe.routers.identity").IdentityRouter, list[Any]()
    monkeypatch.setattr(identity, "after_update", lambda router: told.append(router))
    answer = softmoe("train", *TINY, "model/router=identity", "train.steps=3")
    assert answer.code == 0, answer
    assert len(told) == 3


def test_the_only_checkpoint_damaged(softmoe: Softmoe, tmp_path: Path) -> None:
    line = ("train", *TINY, "train.steps=10")
    assert softmoe(*line).code == 0
    run = the_run(tmp_path)
    (run / "result.json").unlink()
    with (last(run) / "model.safetensors").open("ab") as file:
        file.write(b"x")
    answer = softmoe(*line)
    assert answer.code == 0 and "no undamaged checkpoint is left: starting afresh" in answer.out
    assert list((run / "checkpoints").glob("damaged-last-*"))


def test_weights_that_explode_in_the_last_update_are_no_result(softmoe: Softmoe, tmp_path: Path) -> None:
    answer = softmoe("train", *TINY, "train.steps=1", "optim.warmup=0", "optim.lr=1e38", "optim.clip_norm=null")
    assert answer.code == 1, answer
    assert "validation loss" in answer.err and "lower optim.lr" in answer.err
    run = the_run(tmp_path)
    assert not (run / "result.json").exists() and not list((run / "checkpoints").iterdir())


def test_a_machine_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert _commit() is None


def test_full_disk(tmp_path: Path) -> None:
    """A file size limit stands for the disk: the failing checkpoint is one sentence, the one before stays good."""
    options = ("train.steps=200", "train.save_seconds=0", "train.batch_size=8")
    process = start(tmp_path, *options)
    while not list(tmp_path.glob("outputs/*/*/checkpoints/last-*")):
        time.sleep(0.01)
    process.send(signal.SIGTERM)
    finish(process, 130)
    told = tmp_path / "told.txt"
    assert forked(told, with_little_disk, tmp_path, [*TINY, "threads=1", *options]) == 1
    assert "cannot write a checkpoint" in told.read_text()
    assert "earlier checkpoints are untouched" in told.read_text()
    assert "Traceback" not in told.read_text()
    assert "going on from step" in finish(start(tmp_path, *options))


def with_little_disk(folder: Path, arguments: list[str]) -> None:
    os.chdir(folder)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))  # all rows are smaller, moments larger
    sys.argv = ["softmoe", "train", *arguments]
    main()


def test_not_finite_stops_with_layer_step_and_batch(softmoe: Softmoe, tmp_path: Path) -> None:
    answer = softmoe("train", *TINY, "optim.lr=1e30", "optim.clip_norm=null", "train.steps=20", "optim.warmup=0")
    assert answer.code == 1, answer
    assert "not finite first in the output of blocks." in answer.err or "in the gradient of" in answer.err
    assert "at step " in answer.err and "batch of images" in answer.err
    assert not list(tmp_path.glob("outputs/*/*/result.json"))


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


def test_a_signal_that_nobody_can_be_told_of_still_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(_fd: int, _text: bytes) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", closed)
    stop = Stop()
    stop.hear(signal.SIGTERM)
    with pytest.raises(Interrupted):
        stop.check()


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


def test_batch_size_auto_is_the_run_of_its_number(softmoe: Softmoe, tmp_path: Path) -> None:
    """All 1,295 images fit here, so the largest power of two among them; the signature is that of the number."""
    told = softmoe("train", *TINY, "train.steps=1", "train.batch_size=auto")
    assert "train.batch_size=auto: 1024" in told.out
    assert "is finished" in softmoe("train", *TINY, "train.steps=1", "train.batch_size=1024").out
    assert yaml.safe_load((the_run(tmp_path) / "config.yaml").read_text())["train"]["batch_size"] == 1024


def test_the_first_steps_tell_the_pace(softmoe: Softmoe) -> None:
    assert " of training, 18 steps of " in softmoe("train", *TINY, "train.steps=20").out


def test_signature_is_what_the_run_computes(softmoe: Softmoe, tmp_path: Path) -> None:
    line = ("train", *TINY, "train.steps=2")
    for other in ("seed=0", "output_root=other", "threads=1", "wandb.project=p", "train.eval_batch_size=7"):
        assert softmoe(*line, other).code == 0
    names = {path.parent.name for path in tmp_path.glob("*/default/*/result.json")}
    assert len(names) == 1
    assert softmoe(*line, "seed=1").code == 0
    assert softmoe(*line, "optim.lr=0.1").code == 0
    assert len({path.parent.name for path in tmp_path.glob("*/default/*/result.json")}) == 3


def test_dense_control_is_one_run_whatever_the_rivals_sweep(softmoe: Softmoe, tmp_path: Path) -> None:
    options = ("tracking=off", "train.steps=2", "model/router=dense", "model.backbone.width=16")
    for other in ("model.moe_blocks=last_1", "model.moe_blocks=last_2"):
        assert softmoe("train", *options, other).code == 0
    the_run(tmp_path)


def test_moved_checkpoints_do_not_need_their_run(softmoe: Softmoe, tmp_path: Path) -> None:
    assert softmoe("train", *TINY, "train.steps=2").code == 0
    shutil.copy(last(the_run(tmp_path)) / "model.safetensors", tmp_path / "alone.safetensors")
    shutil.rmtree(tmp_path / "outputs")
    assert softmoe("evaluate", "checkpoint=alone.safetensors").code == 0


def test_wandb_offline_mirrors_the_run(tmp_path: Path) -> None:
    """Group, id, every split, the final row, and quality against images, FLOPs and seconds are in W&B's own file."""
    finish(start(tmp_path, "train.steps=30", "tracking=offline", "wandb.tags=[tagged]"))
    run = the_run(tmp_path)
    file, kept = recorded(run)
    assert file.name == f"run-{run.name.rpartition('-')[2]}.wandb"
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


def test_unreachable_wandb_loses_nothing(tmp_path: Path) -> None:
    environment = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40, "WANDB_MODE": ""}
    out = finish(start(tmp_path / "dark", "train.steps=30", "tracking=online", **environment))
    assert "W&B" in out
    finish(start(tmp_path / "off", "train.steps=30"))
    same(the_run(tmp_path / "off"), the_run(tmp_path / "dark"))
