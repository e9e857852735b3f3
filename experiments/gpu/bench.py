"""Everything that the documents say of a CUDA card and that no other machine can show, on one card.

python experiments/gpu/bench.py OUT.csv [minutes=12] [device=cuda] [size=full|pico] [only=PART,PART...]

Rows are added to OUT.csv; none is changed. Typed again, it does what OUT.csv has no figures of: first the parts that
have not begun, then those that failed. It ends in `minutes` at the latest.

Every part is a process of its own with a time limit, the most valuable ones first. A part that fails or is too slow is
a row that says why, and the next one begins. Rows are on disk when their part ends.
"""

import csv
import importlib.util
import json
import os
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softmoe_cli.cost.load import Load
    from softmoe_cli.cost.memory import Memory

Row = dict[str, Any]
COLUMNS = (
    "part", "model", "train_samples_per_sec", "train_step_time", "train_batch_size", "train_img_size", "param_count",
    "train_gflop", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "infer_img_size", "infer_gmacs",
    "experts", "precision", "mode", "mfu_pct", "of_products_pct", "train_joule_per_sample", "peak_mib", "predicted_mib",
    "saved_mib", "predicted_saved_mib", "measure", "value", "seconds", "why", "hardware",
)  # fmt: skip
"""timm's names where timm has one: step times in ms, param_count in millions, infer_gmacs in billions of
multiply-adds for an image. train_gflop and all else are softmoe's: 1 multiply-add is 2 FLOPs."""
PEAK_TFLOPS = {
    "NVIDIA H200": 989.4, "NVIDIA H100 80GB HBM3": 989.4, "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA A100-PCIE-40GB": 312.0, "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA L40S": 362.0, "NVIDIA L4": 121.0, "NVIDIA A10G": 70.0,
}  # fmt: skip
"""Dense bf16 products, by the card's data sheet; for mfu_pct. Whole names: an H200 NVL or an L40 is another card."""
SIZES = {"full": (224, 128, 2.0), "pico": (16, 4, 0.0)}
"""Pixels of a side, images of a batch, seconds that each of both clocks runs at least, for five rounds or more."""
ROOM = 0.95
"""The share of the free memory that a prediction may take. It leaves out what single operations borrow inside."""
LEFT_GIB = 8
"""What `automatic` leaves free of a card, so that memory limits the batch, not the number of images."""

MARK = "row "
"""What a line with a row begins with. Other lines are what libraries say."""
GRACE_S = 5.0
"""What the processes of a part have to end in; the last seconds of `minutes` are kept for it."""


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


def timed(work: Callable[[], object], bench: Bench) -> tuple[float, float | None]:
    """The median time of one call, warm, and the joules of one, where the device tells them."""
    import torch

    from softmoe_cli.device import Energy, wait

    *_, least = SIZES[bench.size]
    device, times = torch.device(bench.device), list[float]()
    for _ in range(3):
        work()
    wait(device)
    energy = Energy(device)
    while sum(times) < least or len(times) < 5:
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    used = energy.used()
    return statistics.median(times), None if used is None else used / len(times)


def products(bench: Bench) -> Iterator[Row]:
    """What a large product reaches here, in bf16, for of_products_pct."""
    import torch

    side = 8192 if bench.size == "full" else 64
    a = torch.randn(side, side, device=bench.device, dtype=torch.bfloat16)
    rate = 2 * side**3 / timed(lambda: torch.mm(a, a), bench)[0] / 1e12
    yield {"measure": f"tflops of a bf16 product of {side} x {side}", "value": rate, "precision": "bf16"}


def fitting(model: Sequence[str], precision: str, bench: Bench) -> tuple["Load", "Memory", int | None]:
    """The load of a model that is predicted to fit, the prediction, and the number of experts (None: it has none). Of
    what does not fit, the batch is halved and halved again, and then the experts, to a sixteenth of them.

    Raises:
        MemoryError: not even that fits.
    """
    import torch

    from softmoe_cli.cost.load import Load
    from softmoe_cli.cost.memory import predict
    from softmoe_cli.device import free_memory
    from softmoe_cli.options.compose import compose
    from softmoe_cli.text import gibibytes

    device, (_, most, _) = torch.device(bench.device), SIZES[bench.size]
    words, free = [*bench.settings(model), f"train.precision={precision}"], free_memory(device)
    every = compose(*words).model.router.get("num_experts")
    for experts in [None] if every is None else [every >> halved for halved in range(5) if every >> halved]:
        for batch in (most, most // 2, most // 4):
            fewer = [] if experts is None else [f"model.router.num_experts={experts}"]
            load = replace(Load.of(compose(*words, *fewer, f"train.batch_size={batch}"), 1000, device), optim=None)
            memory = predict(load)
            if memory.peak_bytes <= ROOM * free:
                return load, memory, experts
            if memory.state_bytes > ROOM * free:
                break  # fewer images do not help
    needed = f"{batch} images" + ("" if experts is None else f" and {experts} experts")
    raise MemoryError(f"{needed} need {gibibytes(memory.peak_bytes)}, and {ROOM:.0%} of {gibibytes(free)} may be taken")


def throughput(
    name: str, model: Sequence[str], mode: str, bench: Bench, precisions: Sequence[str] = ("bf16",)
) -> Iterator[Row]:
    """Evaluation of one model, and then its updates (AdamW), with the memory predicted and taken: a row of each."""
    import torch

    from softmoe_cli.cost.clock import Workload, fingerprint
    from softmoe_cli.cost.flop import account_model, on_meta
    from softmoe_cli.device import hardware

    (pixels, *_), device = SIZES[bench.size], torch.device(bench.device)
    for precision in precisions:
        load, memory, experts = fitting(model, precision, bench)
        load, batch = replace(load, compile=mode == "compiled"), load.batch
        cost = account_model(on_meta(load.model, 1000), batch=batch, recompute=False)
        workload = Workload(load)
        same = {
            "model": name, "param_count": cost.params / 1e6, "experts": experts, "precision": precision, "mode": mode
        }  # fmt: skip
        forward, _ = timed(workload.forward, bench)
        yield same | {
            "infer_samples_per_sec": batch / forward, "infer_step_time": 1e3 * forward, "infer_batch_size": batch,
            "infer_img_size": pixels, "infer_gmacs": cost.forward_flop / 2e9,
        }  # fmt: skip
        step, joules = timed(workload.step, bench)
        rate, taken, reached = cost.train_flop * batch / step / 1e12, workload.peak(), bench.work / "products"
        peak = PEAK_TFLOPS.get(hardware(device)) if precision == "bf16" else None
        where, product = json.loads(reached.read_text()) if reached.exists() else ("", None)
        if where != fingerprint(device, "bf16", False) or precision != "bf16":
            product = None  # another machine's, in a table that goes on here
        yield same | {
            "train_samples_per_sec": batch / step, "train_step_time": 1e3 * step, "train_batch_size": batch,
            "train_img_size": pixels, "train_gflop": cost.train_flop / 1e9,
            "mfu_pct": None if peak is None else 100 * rate / peak,
            "of_products_pct": None if product is None else 100 * rate / product,
            "train_joule_per_sample": None if joules is None else joules / batch,
            "peak_mib": None if taken is None else taken / 2**20,
            "predicted_mib": memory.peak_bytes / 2**20 if mode == "eager" else None,
        }  # fmt: skip
        del workload


def memory_of_parts(name: str, model: Sequence[str], bench: Bench) -> Iterator[Row]:
    """The memory that updates take in other ways than whole, predicted and taken."""
    from softmoe_cli.cost.clock import Workload
    from softmoe_cli.cost.memory import predict

    whole, _, experts = fitting(model, "bf16", bench)
    for accumulate, recompute in ((4, False), (1, True), (4, True)):
        load = replace(whole, accumulate=accumulate, recompute=recompute)
        workload = Workload(load)
        workload.step()  # moments are made
        taken = workload.peak()
        yield {
            "model": name, "train_batch_size": load.batch, "experts": experts, "precision": "bf16", "mode": "eager",
            "measure": f"memory with train.accumulate={accumulate} train.recompute={str(recompute).lower()}",
            "peak_mib": None if taken is None else taken / 2**20, "predicted_mib": predict(load).peak_bytes / 2**20,
        }  # fmt: skip
        del workload


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
    (own, _), (other, _) = timed(lambda: step(ours), bench), timed(lambda: step(theirs), bench)
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


@dataclass(frozen=True)
class Trained:
    """A run that is done. `peak_mib`: the most that its process had of a card at once; None where there is none."""

    losses: list[float]
    result: Row
    peak_mib: float | None


def softmoe(words: Sequence[str], bench: Bench, *, torchrun: bool = False) -> list[str]:
    """The line that trains on digits in the shared folder, as it is typed, and notes the memory that it takes."""
    typed, defaults = {word.partition("=")[0] for word in words}, [f"device={bench.device}", "train.eval_every=1.0"]
    defaults += ["tracking=off", "train.steps=30", "train.log_every=1"]
    defaults += ["train.batch_size=128" if bench.size == "full" else "train.batch_size=16"]
    if bench.size == "pico" and "model" not in typed:
        defaults += ["model.backbone.width=16", "model.backbone.depth=2", "model.backbone.heads=2"]
    told = ("-m", "torch.distributed.run", "--nproc-per-node=1", "--master-port=0") if torchrun else ()
    kept = [word for word in defaults if word.partition("=")[0] not in typed]
    return [sys.executable, *told, str(Path(__file__).resolve()), "--train", *kept, *words]


def train(words: Sequence[str]) -> None:
    """Runs `softmoe train`, in this process, and writes into memory/STUDY what it had of a card at most."""
    (study,) = (word.removeprefix("study=") for word in words if word.startswith("study="))
    sys.argv = ["softmoe", "train", *words]
    try:
        runpy.run_module("softmoe_cli", run_name="__main__")
    finally:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            Path("memory").mkdir(exist_ok=True)
            Path("memory", study).write_text(str(torch.cuda.max_memory_allocated() / 2**20))


def trained(words: Sequence[str], bench: Bench, study: str = "", *, torchrun: bool = False) -> Trained:
    """The run with these words; one that is finished is not done again.

    Raises:
        RuntimeError: the command failed; the message is its last line.
    """
    study = study or "".join(each if each.isalnum() else "_" for each in " ".join(words)) or "as_it_is"
    line = softmoe([*words, f"study={study}"], bench, torchrun=torchrun)
    said = subprocess.run(line, cwd=bench.work, capture_output=True, text=True, check=False)
    if said.returncode:
        raise RuntimeError(f"exit status {said.returncode}: {last_line(said.stderr)}")
    (run,), taken = (bench.work / "outputs" / study).iterdir(), bench.work / "memory" / study
    rows = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    peak = float(taken.read_text()) if taken.exists() else None
    return Trained(losses, json.loads((run / "result.json").read_text()), peak)


def apart(own: Trained, other: Trained) -> float:
    """The largest relative difference of a loss."""
    return max(abs(a - b) / abs(b) for a, b in zip(own.losses, other.losses, strict=True))


def compared(words: Sequence[str], to: Sequence[str], bench: Bench, *, torchrun: bool = False) -> Iterator[Row]:
    """How far the losses of a run with `words` are from those of the run with `to` instead, and the memory saved."""
    own, plain = trained(words, bench, "torchrun" if torchrun else "", torchrun=torchrun), trained(to, bench)
    yield {
        "measure": "largest relative difference of a loss in 30 steps", "value": apart(own, plain),
        "model": "vit_nano2_soft", "precision": own.result["precision"],
        "mode": "compiled" if "train.compile=true" in words else "eager",
        "peak_mib": own.peak_mib, "predicted_mib": own.result["peak_mib"],
        "saved_mib": None if own.peak_mib is None or plain.peak_mib is None else plain.peak_mib - own.peak_mib,
        "predicted_saved_mib": plain.result["peak_mib"] - own.result["peak_mib"],
    }  # fmt: skip


def resumed(bench: Bench) -> Iterator[Row]:
    """A run that is killed after a checkpoint was copied while it went on, goes on, is stopped and goes on again, and
    one that is left alone: on a CPU they are equal to the bit."""
    words = ("train.steps=300", "train.save_seconds=0", "model.router.noise_std=1.0", "train.batch_size=16")
    places = "outputs/interrupted/*/checkpoints/last-*"
    for number in (signal.SIGKILL, signal.SIGTERM):
        before, line = set(bench.work.glob(places)), softmoe([*words, "study=interrupted"], bench)
        process = subprocess.Popen(line, cwd=bench.work, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and set(bench.work.glob(places)) <= before:
            time.sleep(0.02)
        process.send_signal(number)
        _, error = process.communicate()
        if process.returncode not in (130, 143, -number):
            raise RuntimeError(f"not stopped: exit status {process.returncode}: {last_line(error.decode())}")
    own, whole = trained(words, bench, "interrupted"), trained(words, bench, "whole")
    what = "largest relative difference of a loss after a kill and a stop"
    yield {"measure": what, "value": apart(own, whole), "model": "vit_nano2_soft"}


def automatic(bench: Bench) -> Iterator[Row]:
    """A run that finds its precision and its batch, with LEFT_GIB of a card free, and one that no batch fits."""
    import torch

    from softmoe_cli.device import free_memory

    full, device = bench.size == "full", torch.device(bench.device)
    model = "vit_s16_dense" if full else "vit_nano2_soft"
    words = ["train.precision=auto", "train.batch_size=auto", "train.steps=3", *([f"model={model}"] if full else [])]
    taken = max(0, free_memory(device) - LEFT_GIB * 2**30) if bench.device == "cuda" else 0
    ballast = torch.empty(taken, dtype=torch.uint8, device=device)
    run = trained(words, bench)
    yield {
        "measure": "batch_size=auto and precision=auto", "model": model,
        "train_batch_size": run.result["batch_size"], "precision": run.result["precision"],
        "peak_mib": run.peak_mib, "predicted_mib": run.result["peak_mib"],
    }  # fmt: skip
    del ballast
    words = ["model=vit_l16_soft", "model.router.num_experts=4096", "train.batch_size=auto", "study=refused"]
    said = subprocess.run(softmoe(words, bench), cwd=bench.work, capture_output=True, text=True, check=False)
    if said.returncode != 2 or "train.batch_size=auto: 1 images do not fit" not in said.stderr:
        raise RuntimeError(f"not refused: exit status {said.returncode}: {last_line(said.stderr)}")
    yield {"measure": "exit status where no batch fits", "value": said.returncode, "model": "vit_l16_soft"}


def of_updates(study: str, bench: Bench) -> dict[int, list[Row]]:
    """The rows of a study's updates, by seed."""
    found = {}
    for file in (bench.work / "outputs" / study).glob("*/result.json"):
        rows = map(json.loads, file.with_name("metrics.jsonl").read_text().splitlines())
        found[json.loads(file.read_text())["seed"]] = [row for row in rows if row["split"] == "train"]
    return found


def at_once(n: int, bench: Bench) -> Iterator[Row]:
    """Seeds 0 to N - 1 in one process, and the first and the last of them alone: how far losses are apart, and how many
    updates of its seeds the stack makes in the time of one alone, from the 21st on."""
    words, study = ("train.precision=fp32", "train.steps=60", "model.router.noise_std=1.0"), f"at_once_{n}"
    seeds = ",".join(map(str, range(n)))
    line = softmoe(["-m", *words, f"seed={seeds}", f"seeds_at_once={n}", f"study={study}"], bench)
    said = subprocess.run(line, cwd=bench.work, capture_output=True, text=True, check=False)
    if said.returncode:
        raise RuntimeError(f"exit status {said.returncode}: {last_line(said.stderr)}")
    for seed in (0, n - 1):
        result = trained([*words, f"seed={seed}"], bench, f"alone_{seed}").result
    own, alone = of_updates(study, bench), of_updates("alone_0", bench) | of_updates(f"alone_{n - 1}", bench)
    pairs = [pair for seed, rows in alone.items() for pair in zip(own[seed], rows, strict=True)]
    far = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in pairs)
    took = [[rows[-1]["device_s"] - rows[19]["device_s"] for rows in of.values()] for of in (own, alone)]
    mine, other = (statistics.mean(each) / 40 for each in took)
    same = {"model": "vit_nano2_soft", "precision": "fp32", "mode": "eager", "train_batch_size": result["batch_size"]}
    yield same | {"measure": f"largest relative difference of a loss of {n} seeds at once in 60 steps", "value": far}
    yield same | {
        "measure": f"updates of {n} seeds at once in the time of one alone", "value": other / mine,
        "train_samples_per_sec": result["batch_size"] / mine, "train_step_time": 1e3 * mine,
    }  # fmt: skip


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
EAGER = ("vit_s16_dense", "vit_s16_soft", *(f"vit_s16_{kind}" for kind in SPARSE), *list(MODELS)[2:6])
COMPILED = (
    "vit_s16_soft", "vit_s16_dense", "vit_s16_tokens_choice", "vit_b16_soft", "vit_b16_dense", "vit_l16_soft",
    "vit_l16_dense",
)  # fmt: skip
DENSE, SOFT = "vit_s16_dense", "vit_s16_soft"
PARTS = (
    Part("products", 60, products),
    *(Part(f"{name} eager", 45, partial(throughput, name, MODELS[name], "eager")) for name in EAGER[:2]),
    Part("as on a cpu", 60, partial(compared, (), ("device=cpu",))),
    Part("fp16 scaler", 45, partial(compared, ("train.precision=fp16",), ())),
    Part("offload", 45, partial(compared, ("optim.moments=offload",), ())),
    Part("8bit moments", 45, partial(compared, ("optim.moments=8bit",), ())),
    Part("nccl with one rank", 45, partial(compared, (), (), torchrun=True)),
    Part("recomputation", 45, partial(compared, ("train.recompute=true", "train.accumulate=2"), ())),
    *(Part(f"{n} seeds at once", 90, partial(at_once, n)) for n in (4, 8)),
    Part("memory in parts", 45, partial(memory_of_parts, SOFT, MODELS[SOFT])),
    Part("automatic", 75, automatic),
    Part("goes on after a stop", 90, resumed),
    Part("megablocks", 60, partial(layers_of_others, "megablocks")),
    Part("scattermoe", 60, partial(layers_of_others, "scattermoe")),
    *(Part(f"{name} eager", 45, partial(throughput, name, MODELS[name], "eager")) for name in EAGER[2:]),
    Part("fp32 and fp16", 45, partial(throughput, DENSE, MODELS[DENSE], "eager", precisions=("fp32", "fp16"))),
    Part("compile", 90, partial(compared, ("train.compile=true",), ())),
    *(Part(f"{name} compiled", 120, partial(throughput, name, MODELS[name], "compiled")) for name in COMPILED),
)


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "nothing said"


def child(name: str, bench: Bench) -> None:
    """One part, in its process: prints its rows, a line of JSON after MARK for each."""
    (part,) = (part for part in PARTS if part.name == name)
    from softmoe_cli.cost.clock import fingerprint

    if bench.device == "cuda":
        import torch

        torch.cuda.init()  # fails here and says why, where there is no card
    for row in part.rows(bench):
        import torch

        where = fingerprint(torch.device(bench.device), row.get("precision", "fp32"), row.get("mode") == "compiled")
        print(f"{MARK}{json.dumps(row | {'hardware': where})}", flush=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a part's processes. They are told first: what torchrun has started, torchrun alone can end."""
    until = time.monotonic() + GRACE_S
    with suppress(ProcessLookupError):  # none is left
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < until:
            time.sleep(0.02)
            process.poll()
            os.killpg(process.pid, 0)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def rows_of(part: Part, line: Sequence[str], limit_s: float) -> list[Row]:
    """The rows of a part's process; of one that failed or took too long, also a row that says so."""
    start = time.monotonic()
    # Files, not pipes: a pipe would be waited for as long as anything that the part has started holds it open.
    text = partial(tempfile.TemporaryFile, "w+", errors="replace")
    with text() as out, text() as err:
        process = subprocess.Popen(line, stdout=out, stderr=err, start_new_session=True)
        try:
            process.wait(limit_s)
            stopped = ""
        except subprocess.TimeoutExpired:
            stopped = f"stopped after {limit_s:.0f} s"
        finally:
            end(process)
        out.seek(0)
        err.seek(0)
        failed = f"exit status {process.returncode}: {last_line(err.read())}" if process.returncode else ""
        rows = [json.loads(line.removeprefix(MARK)) for line in out if line.startswith(MARK)]
    why, took = stopped or failed, {"part": part.name, "seconds": round(time.monotonic() - start, 1)}
    return [row | took for row in rows] + ([took | {"why": why}] if why else [])


def table_so_far(file: Path) -> list[dict[str, str]]:
    """The rows of an earlier call; none where there is no such file. A row that was cut short does not count."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        table = csv.DictReader(lines)
        if tuple(table.fieldnames or ()) != COLUMNS:
            sys.exit(f"{file} is another kind of file; name a new one, or one that this script has begun")
        return [row for row in table if None not in row.values()]


def keep_products(row: Row, work: str) -> None:
    """Puts the figure of `products` where the other parts find it, with the machine that it is of."""
    if row["part"] == "products" and row.get("value"):
        Path(work, "products").write_text(json.dumps([row["hardware"], float(row["value"])]))


def main(words: Sequence[str], parts: Sequence[Part] = PARTS, begin: Sequence[str] = (__file__,)) -> int:
    """Runs all parts, or those of `only=`, that OUT.csv has no figures of, as long as there is time; 1 if one gave no
    figure. `begin`: what a part's process is started with."""
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
    (out,), until, failed = files, time.monotonic() + 60 * float(options["minutes"]), []
    begun, earlier = out.read_bytes() if out.exists() else b"", table_so_far(out)
    why = {row["part"]: row["why"] for row in earlier}  # the last row of a part says how it ended
    to_do = [part for part in parts if part.name in wanted and why.get(part.name, "not begun")]
    to_do.sort(key=lambda part: part.name in why)  # what has failed comes last
    with tempfile.TemporaryDirectory() as work, out.open("a", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        if not begun:
            table.writeheader()
        elif not begun.endswith(b"\n"):  # a row was cut short
            file.write("\r\n")
        for row in earlier:
            keep_products(row, work)
        for part in to_do:
            left = until - time.monotonic() - GRACE_S
            line = [sys.executable, *begin, "--part", part.name, options["device"], options["size"], work]
            if left < 1:
                print(f"no time left for {part.name}", flush=True)
                failed.append(part.name)
                continue
            rows = rows_of(part, line, min(part.limit_s, left))
            for row in rows:
                table.writerow(row)
                file.flush()
                keep_products(row, work)
                shown = {key: value for key, value in row.items() if value is not None and key not in ("hardware",)}
                print(
                    ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items()),
                    flush=True,
                )
            failed += [part.name] if any("why" in row for row in rows) else []
    print(f"{out}: {len(failed)} parts without a figure{'; the same command goes on' if failed else ''}")
    return int(bool(failed))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        name, device, size, work = sys.argv[2:]
        child(name, Bench(device, size, Path(work)))
    elif sys.argv[1:2] == ["--train"]:
        train(sys.argv[2:])
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the part's processes end, too
        sys.exit(main(sys.argv[1:]))
