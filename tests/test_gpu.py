"""experiments/gpu as far as a CPU can run it: what its parts measure, and that it goes on whatever becomes of one."""

import csv
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from softmoe_cli import device
from tests.oracles import compose

PATH = Path(__file__).resolve().parents[1] / "experiments/gpu/bench.py"
FAKE = """
import sys, time
if sys.argv[2] == "fails":
    sys.exit("ValueError: no card")
print('{"measure": "this", "value": 2.0}', flush=True)
if sys.argv[2] == "hangs":
    time.sleep(60)
"""


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


def test_it_goes_on_after_a_failure_and_stops_in_time(bench: Any, tmp_path: Path) -> None:
    parts = [bench.Part(name, limit, None) for name, limit in (("fails", 30), ("hangs", 1), ("works", 30))]
    out, begin = tmp_path / "out.csv", ("-S", "-c", FAKE)
    assert bench.main([str(out)], parts, begin) == 1
    told = [(row["part"], row["value"], row["why"]) for row in table(out)]
    failed = ("fails", "", "exit status 1: ValueError: no card")
    assert told == [failed, ("hangs", "2.0", ""), ("hangs", "", "stopped after 1 s"), ("works", "2.0", "")]
    one, late = tmp_path / "one.csv", tmp_path / "late.csv"
    assert bench.main([str(one), "only=works"], parts, begin) == 0
    assert [row["part"] for row in table(one)] == ["works"]
    assert bench.main([str(late), "minutes=0"], parts, begin) == 1
    assert {row["why"] for row in table(late)} == {"no time left"} and len(table(late)) == 3


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("new.csv", "minuets=3"), "there is no key minuets; keys: minutes, "),
        (("new.csv", "only=works,nonsense"), "there is no part nonsense; parts: works"),
        (("only=works",), "name one file"),
        (("old.csv",), "old.csv has figures already"),
    ],
)
def test_it_refuses(
    bench: Any, words: tuple[str, ...], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.csv").write_text("earlier figures")
    with pytest.raises(SystemExit, match=why):
        bench.main(words, [bench.Part("works", 30, None)], ("-S", "-c", FAKE))
    assert Path("old.csv").read_text() == "earlier figures" and not Path("new.csv").exists()


@pytest.mark.parametrize(("name", "peak"), [("NVIDIA L4", 121.0), ("NVIDIA L40", None)])
def test_peaks_are_those_of_whole_names(
    bench: Any, name: str, peak: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "hardware", lambda _: name)
    (row,) = bench.throughput(
        "vit_s16_dense", bench.MODELS["vit_s16_dense"], "eager", bench.Bench("cpu", "pico", tmp_path)
    )
    tflops = row["train_gflop"] * row["train_samples_per_sec"] / 1000
    assert row["mfu_pct"] == (None if peak is None else pytest.approx(100 * tflops / peak))


@pytest.mark.parametrize("name", ["vit_s16_soft", "vit_s16_zero_computation"])
def test_throughput_of_a_pico_model(bench: Any, name: str, tmp_path: Path) -> None:
    (tmp_path / "products").write_text("0.5")
    asked = bench.Bench("cpu", "pico", tmp_path)
    (row,) = bench.throughput(name, bench.MODELS[name], "eager", asked)
    assert row.keys() <= set(bench.COLUMNS)
    assert row["train_samples_per_sec"] * row["train_step_time"] == pytest.approx(1000 * row["train_batch_size"])
    tflops = row["train_gflop"] * row["train_samples_per_sec"] / 1000
    assert row["of_products_pct"] == pytest.approx(100 * tflops / 0.5) and row["mfu_pct"] is None
    assert 2 * row["infer_gmacs"] < row["train_gflop"] < 6.01 * row["infer_gmacs"]
    assert row["peak_mib"] == pytest.approx(row["predicted_mib"], rel=0.3), "moments were predicted, too"


CHOSEN = ("vit_s16_dense", "vit_l16_soft", "vit_s16_experts_choice")


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("size", ["full", "pico"])
def test_models_are_what_they_are_called(bench: Any, size: str, name: str, tmp_path: Path) -> None:
    config = compose(*bench.Bench("cpu", size, tmp_path).settings(bench.MODELS[name]))
    assert config.model.router_name == name.partition("16_")[2]
    assert config.model.image_size == bench.SIZES[size][0]
    if size == "full":
        assert config.model.backbone.depth == (24 if "_l16" in name else 12)


def test_parts_have_names_of_their_own(bench: Any) -> None:
    names = [part.name for part in bench.PARTS]
    assert len(names) == len(set(names))
    assert {f"{model} eager" for model in bench.MODELS} < set(names) and len(bench.MODELS) == 10


@pytest.mark.thorough
@pytest.mark.long
def test_parts_in_processes_of_their_own(bench: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    only = "products,as on a cpu,vit_s16_tokens_choice eager,offload,nccl with one rank,goes on after a stop,megablocks"
    parts = [bench.replace(part, limit_s=600) for part in bench.PARTS]
    assert bench.main([str(out), "device=cpu", "size=pico", "minutes=60", f"only={only}"], parts) == 1
    rows = {row["part"]: row for row in table(out)}
    assert [name for name, row in rows.items() if row["why"]] == ["offload", "megablocks"]
    for name in ("as on a cpu", "nccl with one rank", "goes on after a stop"):
        assert float(rows[name]["value"]) == 0, "on a CPU they are the same run, to the bit"
