"""Everything that the documents say of a CUDA card and that no other machine can show, on one card, in twelve minutes.

python experiments/gpu/bench.py OUT.csv [minutes=12] [device=cuda] [size=full|pico] [only=PART,PART...]

OUT.csv is a new file: figures are not written over.

Every part is a process of its own with a time limit, the most valuable ones first. A part that fails or is too slow is
a row that says why, and the next one begins; what there is no time for is a row too. Rows are on disk when they happen.
"""

import csv
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLUMNS = (
    "part", "model", "train_samples_per_sec", "train_step_time", "train_batch_size", "train_img_size", "param_count",
    "train_gflop", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "infer_img_size", "infer_gmacs",
    "precision", "mode", "mfu_pct", "of_products_pct", "peak_mib", "predicted_mib", "measure", "value", "seconds",
    "why", "hardware",
)  # fmt: skip
"""timm's names where timm has one: step times in ms, param_count in millions, infer_gmacs in billions of
multiply-adds for an image. train_gflop and all else are softmoe's: 1 multiply-add is 2 FLOPs."""
PEAK_TFLOPS = {
    "NVIDIA H200": 989.4, "NVIDIA H100 80GB HBM3": 989.4, "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA A100-PCIE-40GB": 312.0, "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA L40S": 362.0, "NVIDIA L4": 121.0, "NVIDIA A10G": 70.0,
}  # fmt: skip
"""Dense bf16 products, by the card's data sheet; for mfu_pct. Whole names: an H200 NVL or an L40 is another card."""
SIZES = {"full": (224, 128, 4.0), "pico": (16, 4, 0.0)}
"""Pixels of a side, images of a batch, seconds that each of both clocks runs at least."""


@dataclass(frozen=True)
class Part:
    name: str
    limit_s: float
    rows: Callable[["Bench"], Iterator[Row]]


@dataclass(frozen=True)
class Bench:
    """What every part is given. `work`: a folder that all parts share, with the runs that they compare."""

    device: str
    size: str
    work: Path

    def settings(self, model: Sequence[str]) -> list[str]:
        """The overrides of a model of this size. A pico one is 16 numbers wide and two blocks deep."""
        pixels, *_ = SIZES[self.size]
        words = ["data=imagenet", "data.root=.", f"model.image_size={pixels}", *model]
        if self.size == "pico":
            width, patch = ("model.backbone.width=16", "model.backbone.mlp_width=32"), "model.backbone.patch_size=8"
            words += [*width, patch, "model.backbone.depth=2", "model.backbone.heads=2"]
            dense = any(word.endswith("dense") for word in model)
            words += [] if dense else ["model.moe_blocks=last_1", "model.router.num_experts=4"]
        return words


# --- throughput -------------------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], object], bench: Bench) -> float:
    """The median time of one call, warm."""
    import torch

    from softmoe_cli.device import wait

    *_, least = SIZES[bench.size]
    device, times = torch.device(bench.device), list[float]()
    for _ in range(3):
        work()
    wait(device)
    while sum(times) < least or len(times) < 3:
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def products(bench: Bench) -> Iterator[Row]:
    """What a large product reaches here, in bf16, for of_products_pct."""
    import torch

    side = 8192 if bench.size == "full" else 64
    a = torch.randn(side, side, device=bench.device, dtype=torch.bfloat16)
    rate = 2 * side**3 / seconds_of(lambda: torch.mm(a, a), bench) / 1e12
    (bench.work / "products").write_text(str(rate))
    yield {"measure": f"tflops of a bf16 product of {side} x {side}", "value": rate, "precision": "bf16"}


def throughput(name: str, model: Sequence[str], mode: str, bench: Bench) -> Iterator[Row]:
    """Updates (AdamW) and evaluation of one model in bf16, with the memory predicted and taken."""
    import torch

    from softmoe_cli.cost.clock import Workload
    from softmoe_cli.cost.flop import account_model, on_meta
    from softmoe_cli.cost.load import Load
    from softmoe_cli.cost.memory import predict
    from softmoe_cli.device import hardware
    from softmoe_cli.options.compose import compose

    pixels, batch, _ = SIZES[bench.size]
    words = [*bench.settings(model), f"train.batch_size={batch}", "train.precision=bf16"]
    load = Load.of(compose(*words), 1000, torch.device(bench.device))
    load = replace(load, compile=mode == "compiled", optim=None)
    cost = account_model(on_meta(load.model, 1000), batch=batch, recompute=False)
    workload = Workload(load)
    step, forward = seconds_of(workload.step, bench), seconds_of(workload.forward, bench)
    rate = cost.train_flop * batch / step / 1e12
    peak = PEAK_TFLOPS.get(hardware(torch.device(bench.device)))
    reached = bench.work / "products"
    taken = workload.peak()
    yield {
        "model": name, "train_samples_per_sec": batch / step, "train_step_time": 1e3 * step, "train_batch_size": batch,
        "train_img_size": pixels, "param_count": cost.params / 1e6, "train_gflop": cost.train_flop / 1e9,
        "infer_samples_per_sec": batch / forward, "infer_step_time": 1e3 * forward, "infer_batch_size": batch,
        "infer_img_size": pixels, "infer_gmacs": cost.forward_flop / 2e9, "precision": "bf16", "mode": mode,
        "mfu_pct": None if peak is None else 100 * rate / peak,
        "of_products_pct": 100 * rate / float(reached.read_text()) if reached.exists() else None,
        "peak_mib": None if taken is None else taken / 2**20,
        "predicted_mib": predict(load).peak_bytes / 2**20 if mode == "eager" else None,
    }  # fmt: skip


def layers_of_others(package: str, bench: Bench) -> Iterator[Row]:
    """A layer of S/16 with eight experts of which each token chooses two, theirs over ours without capacity."""
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"{package} is not installed; pip install {package}")
    import torch

    from softmoe_cli.model.router import make_layer
    from softmoe_cli.options.compose import compose

    dim, hidden, experts, k, tokens = 384, 1536, 8, 2, 196
    words = ("model/router=tokens_choice_dropless", f"model.router.num_experts={experts}", f"model.router.k={k}")
    options = compose(*words, "model.expert_init=independent").model.router
    ours = make_layer(options, dim, hidden, tokens, gelu="tanh", identical=False, where="model.router")
    x = torch.randn(SIZES[bench.size][1], tokens, dim, device=bench.device, requires_grad=True)
    ours.to(bench.device).train()

    def step(call: Callable[[Any], Any]) -> None:
        with torch.autocast(bench.device, dtype=torch.bfloat16):
            call(x).float().square().mean().backward()

    theirs = globals()[package](dim, hidden, experts, k, bench.device)
    own, other = seconds_of(lambda: step(ours), bench), seconds_of(lambda: step(theirs), bench)
    yield {"measure": f"step of {package}'s layer over tokens_choice_dropless", "value": other / own, "mode": "eager"}


def megablocks(dim: int, hidden: int, experts: int, k: int, device: str) -> Callable[[Any], Any]:
    import torch
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import dMoE

    layer = dMoE(
        Arguments(
            hidden_size=dim, ffn_hidden_size=hidden, moe_num_experts=experts, moe_top_k=k, mlp_impl="grouped",
            bf16=True, fp16=False, device=torch.device(device),
        )
    )  # fmt: skip

    def call(x: Any) -> Any:
        made = layer(x.transpose(0, 1).bfloat16())
        return made[0] if isinstance(made, tuple) else made

    return call


def scattermoe(dim: int, hidden: int, experts: int, k: int, device: str) -> Callable[[Any], Any]:
    import torch
    from scattermoe.mlp import MLP

    gate = torch.nn.Linear(dim, experts, bias=False, device=device)
    mlp = MLP(input_size=dim, hidden_size=hidden, num_experts=experts, top_k=k, activation=torch.nn.GELU()).to(device)

    def call(x: Any) -> Any:
        weights, chosen = gate(x.flatten(0, 1)).float().softmax(dim=-1).topk(k)
        return mlp(x.flatten(0, 1), weights, chosen)

    return call


# --- runs, as they are typed ------------------------------------------------------------------------------------------


def losses(bench: Bench, words: Sequence[str], *, torchrun: bool = False) -> list[float]:
    """The losses of every step of a run on digits in the shared folder; a run that is finished is not done again.

    Raises:
        RuntimeError: the command failed; the message is its last line.
    """
    study = "torchrun" if torchrun else "".join(each if each.isalnum() else "_" for each in " ".join(words)) or "as_is"
    common = ["tracking=off", f"study={study}", "train.steps=30", "train.log_every=1", "train.eval_every=1.0"]
    small = ["model.backbone.width=16", "model.backbone.depth=2", "model.backbone.heads=2", "train.batch_size=16"]
    common += small if bench.size == "pico" else ["train.batch_size=128"]
    device = [] if any(word.startswith("device=") for word in words) else [f"device={bench.device}"]
    told = ("-m", "torch.distributed.run", "--nproc-per-node=1", "--master-port=0") if torchrun else ()
    line = [sys.executable, *told, "-m", "softmoe_cli", "train", *common, *device, *words]
    said = subprocess.run(line, cwd=bench.work, capture_output=True, text=True, check=False)
    if said.returncode:
        raise RuntimeError(f"exit status {said.returncode}: {last_line(said.stderr)}")
    (run,) = (bench.work / "outputs" / study).iterdir()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]


def compared(words: Sequence[str], to: Sequence[str], bench: Bench, *, torchrun: bool = False) -> Iterator[Row]:
    """How far the losses of a run with `words` are from those of the run with `to` instead."""
    own, plain = losses(bench, words, torchrun=torchrun), losses(bench, to)
    off = max(abs(a - b) / abs(b) for a, b in zip(own, plain, strict=True))
    yield {"measure": "largest relative difference of a loss in 30 steps", "value": off, "model": "vit_nano2_soft"}


def resumed(bench: Bench) -> Iterator[Row]:
    """A run that is stopped in the middle and goes on, and one that is not: on a CPU they are equal to the bit."""
    line = [sys.executable, "-m", "softmoe_cli", "train", "tracking=off", f"device={bench.device}", "train.steps=300"]
    line += ["train.log_every=1", "train.save_seconds=0", "model.router.noise_std=1.0", "train.batch_size=16"]
    process = subprocess.Popen(
        [*line, "study=stopped"], cwd=bench.work, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while process.poll() is None and not list(bench.work.glob("outputs/stopped/*/checkpoints/last-*")):
        time.sleep(0.02)
    process.terminate()
    _, error = process.communicate()
    if process.returncode not in (0, 130, 143, -15):
        raise RuntimeError(f"exit status {process.returncode}: {last_line(error.decode())}")
    both = []
    for study in ("stopped", "whole"):
        said = subprocess.run([*line, f"study={study}"], cwd=bench.work, capture_output=True, text=True, check=False)
        if said.returncode:
            raise RuntimeError(f"exit status {said.returncode}: {last_line(said.stderr)}")
        (run,) = (bench.work / "outputs" / study).iterdir()
        rows = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
        both.append([row["loss"] for row in rows if row["split"] == "train"])
    off = max(abs(a - b) / abs(b) for a, b in zip(*both, strict=True))
    yield {"measure": "largest relative difference of a loss after a stop", "value": off, "model": "vit_nano2_soft"}


# --- the parts, the most valuable first -------------------------------------------------------------------------------


SPARSE = ("tokens_choice", "tokens_choice_dropless", "experts_choice", "zero_computation")
MODELS: dict[str, tuple[str, ...]] = {
    f"vit_{size}_{kind}": (f"model=vit_{size}_{kind}",) for size in ("s16", "b16", "l16") for kind in ("dense", "soft")
}
MODELS |= {
    f"vit_s16_{kind}": (
        "model/backbone=vit_s16", f"model/router={kind}", "model.moe_blocks=last_6", "model.expert_init=independent",
        "model.router.num_experts=32",
    )
    for kind in SPARSE
}  # fmt: skip
FIRST = ("vit_s16_dense", "vit_s16_soft", *(f"vit_s16_{kind}" for kind in SPARSE), *list(MODELS)[2:6])
PARTS = (
    Part("products", 60, products),
    Part("as on a cpu", 90, partial(compared, (), ("device=cpu",))),
    *(Part(f"{name} eager", 60, partial(throughput, name, MODELS[name], "eager")) for name in FIRST),
    Part("fp16 scaler", 60, partial(compared, ("train.precision=fp16",), ())),
    Part("offload", 60, partial(compared, ("optim.moments=offload",), ())),
    Part("8bit moments", 60, partial(compared, ("optim.moments=8bit",), ())),
    Part("nccl with one rank", 60, partial(compared, (), (), torchrun=True)),
    Part("compile", 120, partial(compared, ("train.compile=true",), ())),
    *(
        Part(f"{name} compiled", 120, partial(throughput, name, MODELS[name], "compiled"))
        for name in ("vit_s16_soft", "vit_s16_dense", "vit_s16_tokens_choice", "vit_b16_soft", "vit_b16_dense")
    ),
    Part("goes on after a stop", 90, resumed),
    Part("recomputation", 60, partial(compared, ("train.recompute=true", "train.accumulate=2"), ())),
    Part("megablocks", 60, partial(layers_of_others, "megablocks")),
    Part("scattermoe", 60, partial(layers_of_others, "scattermoe")),
    *(
        Part(f"{name} compiled", 120, partial(throughput, name, MODELS[name], "compiled"))
        for name in ("vit_l16_soft", "vit_l16_dense")
    ),
)


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "nothing said"


def child(name: str, bench: Bench) -> None:
    """One part, in its process: prints its rows, a line of JSON for each."""
    (part,) = (part for part in PARTS if part.name == name)
    from softmoe_cli.cost.clock import fingerprint

    if bench.device == "cuda":
        import torch

        torch.cuda.init()  # fails here and says why, where there is no card
    for row in part.rows(bench):
        import torch

        where = fingerprint(torch.device(bench.device), row.get("precision", "fp32"), row.get("mode") == "compiled")
        print(json.dumps(row | {"hardware": where}), flush=True)


def rows_of(part: Part, line: Sequence[str], limit_s: float) -> list[Row]:
    """The rows of a part's process; of one that failed or took too long, a row that says so."""
    start = time.monotonic()
    # In a session of its own: what it started goes with it.
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, err = process.communicate(timeout=limit_s)
        why = "" if process.returncode == 0 else f"exit status {process.returncode}: {last_line(err)}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, _ = process.communicate()
        why = f"stopped after {limit_s:.0f} s"
    rows = [json.loads(text) for text in out.splitlines() if text.startswith("{")]
    took = {"part": part.name, "seconds": round(time.monotonic() - start, 1)}
    return [row | took for row in rows] + ([took | {"why": why}] if why else [])


def main(words: Sequence[str], parts: Sequence[Part] = PARTS, begin: Sequence[str] = (__file__,)) -> int:
    """Runs all parts, or those of `only=`, as long as there is time; 1 if one gave no figure. `begin`: what a part's
    process is started with."""
    options = {"minutes": "12", "device": "cuda", "size": "full", "only": ""}
    given = dict(word.split("=", 1) for word in words if "=" in word)
    files, names = [Path(word) for word in words if "=" not in word], [part.name for part in parts]
    if unknown := [key for key in given if key not in options]:
        sys.exit(f"there is no key {', '.join(unknown)}; keys: {', '.join(options)}")
    options |= given
    wanted = options["only"].split(",") if options["only"] else names
    if unknown := [name for name in wanted if name not in names]:
        sys.exit(f"only: there is no part {', '.join(unknown)}; parts: {', '.join(names)}")
    if len(files) != 1:
        sys.exit("name one file for the figures; see the first lines of this file")
    (out,) = files
    if out.exists():
        sys.exit(f"{out} has figures already; name another file")
    until, failed = time.monotonic() + 60 * float(options["minutes"]), 0
    with tempfile.TemporaryDirectory() as work, out.open("x", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for part in (part for part in parts if part.name in wanted):
            left = until - time.monotonic()
            line = [sys.executable, *begin, "--part", part.name, options["device"], options["size"], work]
            if left < 1:
                rows: list[Row] = [{"part": part.name, "why": "no time left"}]
            else:
                rows = rows_of(part, line, min(part.limit_s, left))
            for row in rows:
                table.writerow(row)
                file.flush()
                shown = {key: value for key, value in row.items() if value is not None and key not in ("hardware",)}
                print(", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items()))
            failed += any("why" in row for row in rows)
    print(f"{out}: {failed} parts without a figure")
    return int(failed > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        name, device, size, work = sys.argv[2:]
        child(name, Bench(device, size, Path(work)))
    else:
        sys.exit(main(sys.argv[1:]))
