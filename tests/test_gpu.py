"""experiments/gpu as far as a CPU can run it: what its parts measure, and that it goes on whatever becomes of one."""

import csv
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from softmoe_cli import device
from softmoe_cli.cost.clock import Workload, fingerprint
from tests.oracles import compose

PATH = Path(__file__).resolve().parents[1] / "experiments/gpu/bench.py"
FAKE = """
import signal, subprocess, sys, time
if sys.argv[2] == "fails":
    sys.exit("ValueError: no card")
if sys.argv[2] == "torchrun":  # in a session of its own, and ended by who has started it
    worker = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], start_new_session=True)
    signal.signal(signal.SIGTERM, lambda *_: (worker.kill(), worker.wait(), sys.exit(1)))
    print('row {"value": %d}' % worker.pid, flush=True)
    time.sleep(60)
if sys.argv[2] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stdout.buffer.write(b"{'a library': 'talks \\xff'}\\n")
print('row {"measure": "this", "value": 2.0}', flush=True)
if sys.argv[2] in ("hangs", "stubborn"):
    time.sleep(60)
"""
BEGIN = ("-S", "-c", FAKE)


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_bench", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_bench"] = module  # its dataclasses look there for their types
    spec.loader.exec_module(module)
    return module


def table(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


def test_it_goes_on_after_a_failure(bench: Any, tmp_path: Path) -> None:
    parts = [bench.Part(name, limit, None) for name, limit in (("fails", 30), ("hangs", 1), ("works", 30))]
    out = tmp_path / "out.csv"
    assert bench.main([str(out)], parts, BEGIN) == 1
    told = [(row["part"], row["value"], row["why"]) for row in table(out)]
    failed = ("fails", "", "exit status 1: ValueError: no card")
    assert told == [failed, ("hangs", "2.0", ""), ("hangs", "", "stopped after 1 s"), ("works", "2.0", "")]


def test_typed_again_it_does_what_is_missing(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """First what was not begun, then what has failed; rows are only added."""
    parts, out = [bench.Part(name, 30, None) for name in ("fails", "works", "late")], tmp_path / "out.csv"
    assert bench.main([str(out), "only=fails,works"], parts, BEGIN) == 1
    first = out.read_bytes()
    assert bench.main([str(out), "minutes=0"], parts, BEGIN) == 1
    assert out.read_bytes() == first and "no time left for late" in capsys.readouterr().out
    assert bench.main([str(out)], parts, BEGIN) == 1
    assert out.read_bytes().startswith(first)
    assert [row["part"] for row in table(out)] == ["fails", "works", "late", "fails"]
    assert bench.main([str(out), "only=works,late"], parts, BEGIN) == 0
    assert len(table(out)) == 4


def test_a_row_that_was_cut_short_is_made_again(bench: Any, tmp_path: Path) -> None:
    parts, out = [bench.Part("works", 30, None)], tmp_path / "out.csv"
    assert bench.main([str(out)], parts, BEGIN) == 0
    whole = out.read_bytes()
    out.write_bytes(whole[: whole.index(b"works") + 10])
    assert bench.main([str(out)], parts, BEGIN) == 0
    assert [(row["part"], row["value"]) for row in table(out)] == [("works", None), ("works", "2.0")]


@pytest.mark.parametrize("name", ["hangs", "stubborn"])
def test_time_is_kept(bench: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that takes all of it and does not end when it is told to; the next one is not begun."""
    monkeypatch.setattr(bench, "GRACE_S", 0.5)
    parts, out, start = [bench.Part(each, 60, None) for each in (name, "works")], tmp_path / "out.csv", time.monotonic()
    assert bench.main([str(out), "minutes=0.03"], parts, BEGIN) == 1
    assert time.monotonic() - start < 1.8 + 1  # a busy machine
    assert {row["part"] for row in table(out)} == {name}


def test_nothing_of_a_part_stays(bench: Any, tmp_path: Path) -> None:
    """Not even a process in a session of its own, which torchrun gives to those that it starts."""
    assert bench.main([str(tmp_path / "out.csv")], [bench.Part("torchrun", 1, None)], BEGIN) == 1
    (worker, why) = table(tmp_path / "out.csv")
    assert why["why"] == "stopped after 1 s"
    with pytest.raises(ProcessLookupError):
        os.kill(int(float(worker["value"])), 0)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("new.csv", "minuets=3"), "there is no key minuets; keys: minutes, "),
        (("new.csv", "only=works,nonsense"), "there is no part nonsense; parts: works"),
        (("only=works",), "name one file"),
        (("old.csv",), "old.csv is another kind of file"),
    ],
)
def test_it_refuses(
    bench: Any, words: tuple[str, ...], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.csv").write_text("earlier figures")
    with pytest.raises(SystemExit, match=why):
        bench.main(words, [bench.Part("works", 30, None)], BEGIN)
    assert Path("old.csv").read_text() == "earlier figures" and not Path("new.csv").exists()


@pytest.fixture
def clock(bench: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Evaluation takes a quarter of a second and an update, of 6 joules, a half; lists the FLOPs that they made."""
    made: list[int] = []

    def timed(work: Any, _: Any) -> tuple[float, float]:
        with FlopCounterMode(display=False) as counted:
            work()
        made.append(counted.get_total_flops())
        return {"forward": 0.25, "step": 0.5}[work.__name__], 6.0

    monkeypatch.setattr(bench, "timed", timed)
    return made


@pytest.mark.parametrize("name", ["vit_s16_dense", "vit_s16_soft"])
def test_throughput(bench: Any, name: str, clock: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch of four images, on a card of 312 TFLOP/s of which products reach a millionth of one."""
    monkeypatch.setattr(device, "hardware", lambda _: "NVIDIA A100-SXM4-40GB")
    where = fingerprint(torch.device("cpu"), "bf16", False)
    (tmp_path / "products").write_text(json.dumps([where, 1e-6]))
    asked = bench.Bench("cpu", "pico", tmp_path)
    evaluated, updated = bench.throughput(name, bench.MODELS[name], "eager", asked)
    forward, update = clock
    assert evaluated.keys() | updated.keys() <= set(bench.COLUMNS)
    assert (evaluated["infer_samples_per_sec"], evaluated["infer_step_time"]) == (16, 250)
    assert (updated["train_samples_per_sec"], updated["train_step_time"]) == (8, 500)
    assert evaluated["infer_gmacs"] == pytest.approx(forward / 4 / 2e9)
    assert updated["train_gflop"] == pytest.approx(update / 4 / 1e9, rel=0.01), "attention repeats a product"
    assert updated["mfu_pct"] == pytest.approx(100 * update / 0.5 / 312e12, rel=0.01)
    assert updated["of_products_pct"] == pytest.approx(100 * update / 0.5 / 1e6, rel=0.01)
    assert updated["train_joule_per_sample"] == 1.5
    assert updated["peak_mib"] == pytest.approx(updated["predicted_mib"], rel=0.05), "moments were predicted, too"
    assert updated["experts"] == evaluated["experts"] == (4 if name == "vit_s16_soft" else None)


@pytest.mark.parametrize(("name", "known"), [("NVIDIA L4", True), ("NVIDIA L40", False)])
def test_peaks_are_those_of_whole_names(
    bench: Any, name: str, known: bool, clock: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And products of another machine, earlier in the same table, are not taken for this one's."""
    monkeypatch.setattr(device, "hardware", lambda _: name)
    (tmp_path / "products").write_text('["NVIDIA L4, torch 1.0, bf16, eager", 100.0]')
    asked, model = bench.Bench("cpu", "pico", tmp_path), bench.MODELS["vit_s16_dense"]
    *_, row = bench.throughput("vit_s16_dense", model, "eager", asked)
    assert (row["mfu_pct"] is not None) == known and row["of_products_pct"] is None


def test_evaluation_is_told_before_an_update_fails(
    bench: Any, clock: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(_: Workload) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(Workload, "step", step)
    asked = bench.Bench("cpu", "pico", tmp_path)
    rows = bench.throughput("vit_s16_soft", bench.MODELS["vit_s16_soft"], "eager", asked)
    assert next(rows)["infer_samples_per_sec"] == 16
    with pytest.raises(MemoryError, match="no room"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "free", "batch", "experts"),
    [
        ("vit_s16_soft", 501_176 / 0.95 - 1, 2, 4),  # a byte less than all of it is predicted to need
        ("vit_s16_soft", 440_000 / 0.95, 2, 2),  # less than its state with 4 experts
        ("vit_s16_dense", 440_000 / 0.95, 2, None),
        pytest.param("vit_s16_soft", 501_176 / 0.95 + 1, 4, 4, marks=pytest.mark.thorough),
        pytest.param("vit_s16_soft", 459_000 / 0.95, 1, 4, marks=pytest.mark.thorough),
        pytest.param("vit_s16_soft", 406_500 / 0.95, 1, 1, marks=pytest.mark.thorough),
    ],
)
def test_what_does_not_fit_is_made_smaller(
    bench: Any, name: str, free: float, batch: int, experts: int | None, clock: list[int], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The images first, and then the experts of a card of so many bytes; rows say both."""
    monkeypatch.setattr(device, "free_memory", lambda _: int(free))
    asked = bench.Bench("cpu", "pico", tmp_path)
    evaluated, updated = bench.throughput(name, bench.MODELS[name], "eager", asked, precisions=["fp32"])
    assert (evaluated["infer_batch_size"], evaluated["experts"]) == (batch, experts)
    assert (updated["train_batch_size"], updated["experts"]) == (batch, experts)
    assert updated["train_samples_per_sec"] == 2 * batch and updated["predicted_mib"] <= 0.95 * free / 2**20
    assert updated["mfu_pct"] is None and updated["of_products_pct"] is None, "those are of bf16"


def test_what_nothing_fits_is_said(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "free_memory", lambda _: 200_000)
    asked = bench.Bench("cpu", "pico", tmp_path)
    with pytest.raises(MemoryError, match=r"4 images and 1 experts need 0\.4 MiB, and 95% of 0\.2 MiB may be taken"):
        next(bench.throughput("vit_s16_soft", bench.MODELS["vit_s16_soft"], "eager", asked, precisions=["fp32"]))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "gib", "batch", "experts"),
    [("l16", 139, 128, 64), ("l16", 79, 128, 32), ("l16", 22, 32, 8), ("b16", 79, 128, 128), ("b16", 139, 128, 128)],
)
def test_soft_models_on_cards_that_there_are(
    bench: Any, name: str, gib: int, batch: int, experts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "free_memory", lambda _: gib * 2**30)
    load, memory, found = bench.fitting(bench.MODELS[f"vit_{name}_soft"], "bf16", bench.Bench("cpu", "full", tmp_path))
    assert (load.batch, found) == (batch, experts)
    assert len(load.model.moe_blocks) == 12 if name == "l16" else 6
    assert memory.peak_bytes <= 0.95 * gib * 2**30


CHOSEN = ("vit_s16_dense", "vit_l16_soft", "vit_s16_experts_choice")


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("size", ["full", "pico"])
def test_models_are_what_they_are_called(bench: Any, size: str, name: str, tmp_path: Path) -> None:
    config = compose(*bench.Bench("cpu", size, tmp_path).settings(bench.MODELS[name]))
    assert config.model.router_name == name.partition("16_")[2]
    assert config.model.image_size == bench.SIZES[size][0]
    if size == "full":
        assert config.model.backbone.depth == (24 if "_l16" in name else 12)


def test_parts_and_their_order(bench: Any) -> None:
    """What compiles comes last: it takes longest. What is right comes before that, and each in a minute and a half."""
    names = [part.name for part in bench.PARTS]
    assert len(names) == len(set(names))
    assert {f"{model} eager" for model in bench.MODELS} < set(names) and len(bench.MODELS) == 10
    compiled = [name.endswith(" compiled") for name in names]
    assert compiled == sorted(compiled) and sum(compiled) == 7
    assert names[0] == "products", "others are shares of it"
    assert max(part.limit_s for part in bench.PARTS if not part.name.endswith(" compiled")) <= 90


def measured(bench: Any, out: Path, only: str = "") -> dict[str, dict[str, str]]:
    """The last row of each part, in processes of their own, with pico models on a CPU."""
    parts = [bench.replace(part, limit_s=900) for part in bench.PARTS]
    bench.main([str(out), "device=cpu", "size=pico", "minutes=120", *([f"only={only}"] if only else [])], parts)
    return {row["part"]: row for row in table(out)}


@pytest.mark.long
def test_some_parts_in_processes_of_their_own(bench: Any, tmp_path: Path) -> None:
    rows = measured(bench, tmp_path / "out.csv", "products,vit_s16_soft eager,recomputation")
    assert len(rows) == 3 and not any(row["why"] for row in rows.values()), rows
    assert all(row["hardware"] for row in rows.values())
    assert 0 < float(rows["vit_s16_soft eager"]["of_products_pct"]) < 100
    assert float(rows["recomputation"]["value"]) < 1e-4
    assert float(rows["recomputation"]["predicted_saved_mib"]) > 0


@pytest.mark.thorough
@pytest.mark.long
def test_all_parts_in_processes_of_their_own(bench: Any, tmp_path: Path) -> None:
    rows = measured(bench, tmp_path / "out.csv")
    assert rows.keys() == {part.name for part in bench.PARTS}
    failed = {name: row["why"] for name, row in rows.items() if row["why"]}
    assert failed.keys() == {"offload", "megablocks", "scattermoe"}, failed
    assert "optim.moments=offload" in failed["offload"] and "is not installed" in failed["megablocks"]
    for name in ("as on a cpu", "nccl with one rank", "goes on after a stop"):
        assert float(rows[name]["value"]) == 0, "on a CPU they are the same run, to the bit"
    for name, most in (("compile", 1e-4), ("fp16 scaler", 0.05), ("8bit moments", 0.05)):
        assert float(rows[name]["value"]) < most, name
    assert float(rows["8bit moments"]["predicted_saved_mib"]) > 0
    both = rows["memory in parts"]
    assert float(both["peak_mib"]) == pytest.approx(float(both["predicted_mib"]), rel=0.1)
