"""Factorised layers in the commands: runs that stop and go on, costs, upcycling, export."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import TINY, Softmoe
from tests.cost.loads import composed, held
from tests.cost.test_memory import allocated_peak
from tests.processes import until
from tests.routers import ROUTERS
from tests.runs import finish, last, same, start, the_run


def routing_rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "routing.jsonl").read_text().splitlines()]


CP = ("model/router=mumoe_cp", "tracking=off")
every_kind = pytest.mark.parametrize("name", [name for name in ROUTERS if name.startswith("mumoe_")])


@pytest.mark.thorough
def test_a_run_that_stops_goes_on_to_the_same_bits(softmoe: Softmoe, tmp_path: Path) -> None:
    """With running means in the weights, in their average and in what is trained."""
    line = ("train", *TINY, *CP, "train.steps=6", "train.batch_size=8", "train.save_seconds=0", "train.ema=0.5",
            "train.eval_every=3", "train.recompute=true")  # fmt: skip
    assert softmoe(*line, "output_root=whole").code == 0
    whole = next((tmp_path / "whole" / "default").iterdir())
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    stopped = next((tmp_path / "stopped" / "default").iterdir())
    (stopped / "result.json").unlink()
    shutil.rmtree(last(stopped))
    answer = softmoe(*line, "output_root=stopped")
    assert answer.code == 0 and "going on from step" in answer.out, answer
    same(whole, stopped)
    average, trained = (load_file(last(whole) / f"{file}.safetensors") for file in ("model", "training"))
    key = "blocks.1.mlp.router.levels.0.norm.variance"
    assert not torch.equal(average[key], trained[f"weights.{key}"]) and not torch.equal(average[key], torch.ones(4))


HEAD = ("model/router=dense", "model.head=mumoe_tr", "model.head_experts=2", "model.head_norm=batch")


@pytest.mark.long
@pytest.mark.thorough
@pytest.mark.parametrize("kind", [("model/router=mumoe_tr",), HEAD], ids=["mumoe_tr", "a head"])
def test_a_kill_changes_no_bit(kind: tuple[str, ...], tmp_path: Path) -> None:
    """SIGKILL behind the first checkpoint."""
    line = ("train.steps=300", "train.batch_size=8", "train.save_seconds=0", "train.ema=0.9", *kind)
    finish(start(tmp_path / "whole", *line))
    process = start(tmp_path / "killed", *line)
    until(lambda: list(tmp_path.glob("killed/outputs/*/*/checkpoints/last-*")), process)
    process.send(signal.SIGKILL)
    process.wait()
    assert not (the_run(tmp_path / "killed") / "result.json").exists()
    assert "going on from step" in finish(start(tmp_path / "killed", *line))
    same(the_run(tmp_path / "whole"), the_run(tmp_path / "killed"))


@every_kind
def test_parts_of_a_batch_are_refused(name: str, softmoe: Softmoe) -> None:
    answer = softmoe("train", *TINY, f"model/router={name}", "train.accumulate=4")
    assert answer.code == 2
    assert (
        "train.accumulate=4: norm=batch normalises over a whole batch; set train.accumulate=1 or "
        "model.router.norm=layer" in answer.err
    )


@every_kind
def test_a_way_to_start_that_they_do_not_have_is_refused(name: str, softmoe: Softmoe) -> None:
    answer = softmoe("train", *TINY, f"model/router={name}", "model.expert_init=independent")
    assert answer.code == 2 and f"model.expert_init=independent has no effect with router {name}" in answer.err, answer


@pytest.mark.thorough
def test_parts_of_a_batch_with_layer_norm_give_the_large_batch_update(softmoe: Softmoe, tmp_path: Path) -> None:
    for parts in (1, 4):
        line = ("train", *TINY, *CP, "model.router.norm=layer", "train.steps=8", f"train.accumulate={parts}")
        assert softmoe(*line, f"study=parts{parts}").code == 0
    x, y = (load_file(last(next((tmp_path / f"outputs/parts{n}").iterdir())) / "model.safetensors") for n in (1, 4))
    for key in x:
        torch.testing.assert_close(x[key], y[key], atol=2e-4, rtol=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize(("precision", "recompute"), [("fp32", False), ("fp32", True), ("bf16", False)])
@every_kind
def test_predicted_peak_is_the_allocators(name: str, precision: str, recompute: bool) -> None:
    config = composed(
        name, "model.router.num_experts=16", "train.batch_size=32", f"train.precision={precision}",
        f"train.recompute={str(recompute).lower()}",
    )  # fmt: skip
    assert held(config).peak_bytes == pytest.approx(allocated_peak(config), rel=0.02)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["mumoe_cp", "mumoe_tr"])
def test_a_factorised_head(name: str, softmoe: Softmoe, tmp_path: Path) -> None:
    """As many parameters as the linear head, counted, trained, evaluated and stopped like it."""
    wide = ("model.backbone.width=48", "model.backbone.heads=4", "model.head_experts=3")
    line = ("train", *TINY, *wide, f"model.head={name}", "train.steps=6", "train.batch_size=8", "train.eval_every=1.0")
    assert softmoe(*line).code == 0
    run = the_run(tmp_path)
    weights = load_file(last(run) / "model.safetensors")
    own = {key: value for key, value in weights.items() if key.startswith("head.") and ".norm." not in key}
    assert 490 <= sum(value.numel() for value in own.values()) < 490 + 240
    assert len(weights["head.weight"]) == 10 and weights["head.router.levels.0.norm.mean"].any()
    row = json.loads(softmoe("evaluate", f"checkpoint={run}", "format=json").out)
    assert row["top1_pct"] == json.loads((run / "result.json").read_text())["top1_pct"]
    (looked,) = [row for row in routing_rows(run) if row.get("beside") == "head" and row["step"] == 6]
    assert looked["block"] == 2 and 0 < looked["coefficient_max"] <= 1 and "utilisation" not in looked
    audited = json.loads(softmoe("evaluate", f"checkpoint={run}", "audit=[experts]", "format=json").out)["audit"]
    assert sum(finding["block"] == "head" for finding in audited) == 3
    assert "the head, one of 3: mean" in softmoe("evaluate", f"checkpoint={run}", "audit=[experts]").out
    counted = json.loads(softmoe("cost", *TINY[1:], *wide, f"model.head={name}", "data=digits", "format=json").out)
    assert counted["forward_gflop"] == pytest.approx(counted["counter_forward_gflop"], rel=1e-12)
    assert counted["train_gflop"] == pytest.approx(counted["counter_train_gflop"], rel=1e-12)
    assert all(part["train_gflop"] == part["counter_train_gflop"] for part in counted["parts"])
    finetune = ("finetune", f"checkpoint={run}", "model.image_size=16", "slots=proportional", "train.steps=1")
    assert softmoe(*finetune, "tracking=off", "study=larger").code == 0  # counts slots of models with any head
    for many in ("batch_size=1", "batch_size=4"):  # one image has no variance, but can be counted
        assert softmoe("cost", *TINY[1:], *wide, f"model.head={name}", "data=digits", many).code == 0
    assert "set train.accumulate=1 or model.head_norm=layer" in softmoe(*line, "train.accumulate=2").err
    assert softmoe(*line, "train.accumulate=2", "model.head_norm=layer").code == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("model.head=mumoe_pc",), "model.head=mumoe_pc is none of linear, mumoe_cp, mumoe_tr"),
        (("model.head=mumoe_cp", "model.head_experts=64"), "with model.head_experts=64: num_experts=64: whatever"),
        (("model.head=mumoe_cp", "train.batch_size=1"),
         "model.head_norm=batch has no variance over one image; use a larger train.batch_size, or set"),
        (("model.head=mumoe_cp", "model.head_norm=null"), "model.head=mumoe_cp needs model.head_experts and"),
    ],
)  # fmt: skip
def test_impossible_heads_are_refused(words: tuple[str, ...], told: str, softmoe: Softmoe) -> None:
    answer = softmoe("train", *TINY, *words)
    assert answer.code == 2 and told in answer.err, answer


def test_one_token_has_no_variance(softmoe: Softmoe, tmp_path: Path) -> None:
    line = ("train", *TINY, *CP, "model.router.norm=batch", "model.backbone.patch_size=8", "train.batch_size=1")
    answer = softmoe(*line)
    assert answer.code == 2 and (
        "model.router.norm=batch has no variance over one token; use a larger train.batch_size, or set "
        "model.router.norm=layer" in answer.err
    ), answer
    assert not list(tmp_path.glob("outputs/*/*"))


@every_kind
def test_experts_that_share_their_weights_are_not_divided(name: str, softmoe: Softmoe) -> None:
    answer = softmoe("cost", f"model/router={name}", "data=fashion_mnist", "model.router.num_experts=8", "devices=2",
                     "parallel=expert")  # fmt: skip
    assert answer.code == 2
    assert (
        "parallel=expert cannot divide experts that share their weights over 2 devices; use parallel=fsdp" in answer.err
    )


@pytest.fixture
def dense(softmoe: Softmoe, tmp_path: Path) -> Path:
    line = ("train", *TINY, "model/router=dense", "train.steps=4", "data=digits")
    assert softmoe(*[word for word in line if "num_experts" not in word]).code == 0
    return the_run(tmp_path)


@pytest.mark.thorough
@every_kind
def test_upcycling_is_exact_or_refused(name: str, dense: Path, softmoe: Softmoe) -> None:
    line = ("upcycle", f"checkpoint={dense}", f"model/router={name}", "model.router.num_experts=4",
            "model.moe_blocks=last_1", "folder=up")  # fmt: skip
    answer = softmoe(*line)
    assert answer.code == 2 and f"model/router={name} cannot start from an MLP: experts of rank=" in answer.err
    rank = answer.err.rpartition("set model.router.rank=")[2].strip()
    assert "expert_noise=0.1: experts of model/router=" in softmoe(*line, "expert_noise=0.1").err
    answer = softmoe(*line, f"model.router.rank={rank}", "preserve=true")
    assert answer.code == 0, answer
    receipt = json.loads(Path("up/receipt.json").read_text())
    assert receipt["max_change"] < 1e-12
    keys = {key: fate["from"] for key, fate in receipt["keys"].items() if ".mlp.experts." in key}
    assert keys["blocks.1.mlp.experts.second.of_input"] == "blocks.1.mlp.fc2.weight"
    assert softmoe("evaluate", "checkpoint=up", "split=validation").code == 0


@pytest.mark.thorough
@every_kind
def test_exported_with_the_same_outputs(name: str, softmoe: Softmoe, tmp_path: Path) -> None:
    assert softmoe("train", *TINY, f"model/router={name}", "train.steps=6").code == 0
    answer = softmoe(
        "export", f"checkpoint={the_run(tmp_path)}", "formats=[torch_export,onnx]", "folder=out", "images=8"
    )
    assert answer.code == 0, answer
    assert "top-1 as the model's on 8 of 8 images" in answer.out
