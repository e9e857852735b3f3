"""Products of half precision: what each kind of processor does with them, decided, taken and told. A machine has one
kind; the others are put in its place, and where oneDNN can be told to use less it is."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from softmoe_cli.cost.memory import Live
from softmoe_cli.device import slower
from softmoe_cli.moe import layer, processor
from softmoe_cli.moe.layer import Experts, MoE
from softmoe_cli.moe.processor import CPU_PRODUCTS
from softmoe_cli.moe.routers.soft import SoftRouter
from tests.conftest import thinned

BF16, FP16 = torch.bfloat16, torch.float16
SIDES = ("fast", "slow", "emulated", "loops")
every_side = pytest.mark.parametrize("side", SIDES)


@pytest.mark.parametrize(
    ("dtype", "has", "instructions", "machine", "most", "want"),
    [
        (BF16, True, "amx_tile", "x86_64", "", "fast"),
        (BF16, True, "avx512_bf16", "AMD64", "", "fast"),
        (BF16, True, "", "x86_64", "", "emulated"),
        (BF16, False, "", "x86_64", "", "loops"),
        (BF16, True, "", "aarch64", "", "fast"),
        (BF16, False, "", "arm64", "", "loops"),
        (BF16, True, "avx512_bf16", "x86_64", "avx512_core", "emulated"),
        (BF16, True, "amx_tile", "x86_64", "AVX512_CORE_VNNI", "emulated"),
        (BF16, True, "amx_tile", "x86_64", "AVX512_CORE_BF16", "fast"),
        (FP16, True, "amx_fp16", "x86_64", "", "fast"),
        (FP16, True, "amx_tile", "x86_64", "", "slow"),
        (FP16, True, "", "aarch64", "", "fast"),
        (FP16, False, "avx512_bf16", "x86_64", "", "loops"),
    ],
)
def test_products_are_fast_where_instructions_are(
    dtype: torch.dtype, has: bool, instructions: str, machine: str, most: str, want: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in ("bf16", "fp16"):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: has)
    for name in ("amx_tile", "amx_fp16", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name == instructions)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    variables = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
    for variable in variables:
        for each in variables:
            monkeypatch.delenv(each, raising=False)
        monkeypatch.setenv(variable, most)
        assert processor._products(dtype) == want, variable


def test_the_first_name_for_less_is_the_one_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX")
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX512_CORE")
    assert processor._products(BF16) == "fast"


@every_side
def test_the_layer_multiplies_in_what_is_fast(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 where its products are, else in float32; the output is bfloat16 and nearly the same."""
    torch.manual_seed(0)
    router = SoftRouter(16, 9, num_experts=4, slots_per_expert=2, capacity_factor=None, noise_std=0.0)
    moe = MoE(router, Experts(4, 16, 24, gelu="tanh", identical=False))
    x = torch.randn(3, 9, 16)
    want, seen = moe(x), []

    def gelu(rows: Tensor, approximate: str) -> Tensor:
        seen.append(rows.dtype)
        return F.gelu(rows, approximate=approximate)

    monkeypatch.setattr(layer, "F", type("Functional", (), {"gelu": staticmethod(gelu)}))
    monkeypatch.setitem(CPU_PRODUCTS, BF16, side)
    with torch.autocast("cpu", BF16):
        y = moe(x)
    assert seen == [BF16 if side == "fast" else torch.float32]
    assert y.dtype == BF16
    assert (y - want).norm() < 0.01 * want.norm()


@every_side
def test_the_header_says_where_half_precision_costs_time(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {"fast": "", "slow": " (fp32 is no slower: this CPU's instructions for {} gain nothing)"}
    want = words.get(side, " (fp32 is faster: this CPU has no instructions for {})")
    for dtype, precision in ((BF16, "bf16"), (FP16, "fp16")):
        monkeypatch.setitem(CPU_PRODUCTS, dtype, side)
        for mixture, width in ((False, None), (False, 128), (True, None), (True, 192)):
            assert slower(torch.device("cpu"), precision, width, mixture=mixture) == want.format(precision)
        for kind, width in (("model", 127), ("mixture", 191)):
            narrow = want.format(precision) or f" (fp32 is no slower for a {kind} {width} wide)"
            assert slower(torch.device("cpu"), precision, width, mixture=kind == "mixture") == narrow
        assert slower(torch.device("cuda"), precision, 64, mixture=False) == ""
        assert slower(torch.device("cpu"), "fp32", 64, mixture=False) == ""


@every_side
def test_what_a_product_borrows_is_in_the_peak(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CPU_PRODUCTS, BF16, side)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    rows, batch, bias = (torch.ones(size, dtype=BF16) for size in ((40, 8), (5, 6, 8), (40,)))
    for make, buffer in (
        (lambda: rows @ rows.T, 4 * 40 * 40),
        (lambda: F.linear(rows, rows, bias), 4 * 40 * 40),
        (lambda: batch @ batch.mT, 4 * 2 * 6 * 6),
        (lambda: torch.baddbmm(batch[:, :1, :6], batch, batch.mT), 4 * 2 * 6 * 6),
    ):
        with Live() as live:
            live.forget((rows, batch, bias))
            made = make()
            assert live.now == made.nbytes
            assert live.peak - live.now == (buffer + 128 if side == "emulated" else 0)
    single = rows.float()
    with Live() as live:
        made = single @ single.T
        assert live.peak == single.nbytes + made.nbytes, "float32 borrows nothing"


MEASURE = """
import json, torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from softmoe_cli.moe.processor import CPU_PRODUCTS, borrowed

torch.set_num_threads(1)
half = torch.bfloat16
a, b, bias = torch.ones(300, 64, dtype=half), torch.ones(200, 64, dtype=half), torch.ones(200, dtype=half)
c, d = torch.ones(6, 50, 64, dtype=half), torch.ones(6, 64, 40, dtype=half)
found = []
for make in (lambda: a @ b.T, lambda: F.linear(a, b, bias), lambda: c @ d, lambda: torch.baddbmm(bias[:40], c, d)):
    made = make()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as watched:
        made = make()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    found.append((peak - made.nbytes, borrowed(made)))
print(json.dumps([CPU_PRODUCTS[half], found]))
"""


@pytest.mark.parametrize("most", thinned(["AVX2", "AVX512_CORE"], 1))
def test_what_is_borrowed_is_the_allocators(most: str) -> None:
    """In a fresh process, because oneDNN asks once how much of the processor it may use. Of a processor with AVX-512
    this tries both sides, of another the one it has."""
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": most, "PYTHONPATH": root}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE], env=environment, capture_output=True, text=True, check=True
    )
    side, found = json.loads(ran.stdout)
    if platform.machine() in ("x86_64", "AMD64"):
        assert side == ("emulated" if most == "AVX512_CORE" and torch.cpu._is_avx512_supported() else "loops")
    for taken, predicted in found:
        assert taken == pytest.approx(predicted, rel=0.05, abs=256), (side, found)
