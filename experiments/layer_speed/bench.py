"""The MoE layer's time and memory beside the dense MLP's and the layers that others publish, in one process, in turns.

pip install soft-moe-pytorch==0.1.9 soft-moe==0.0.1 soft-mixture-of-experts==0.2.0 mixture-of-experts==0.2.3 \\
    st-moe-pytorch==0.1.8
cd experiments/layer_speed
python bench.py results.csv dtype=fp32,bf16 width=192,384,768 experts=8,32,128,256 batch=8,32,128

Every contender maps (batch, 196, width) to the same shape through experts of hidden width 4 x width, with as many slots
as there are tokens, as near as whole slots per expert allow, and with the exact GELU, which not all of them let go of.
Freed memory is kept, for all alike, as `softmoe` has it on a CPU. All share one buffer of weights, so that all fit in
memory and stay in it; values do not matter to the time. A round times each contender once, in an order drawn anew;
ratios are taken within a round, and their median's 95% interval from their order statistics (of fewer than six rounds,
which `rounds=3` allows, it is the whole spread, and less sure). Of a contender whose first step took over three times
as long as one of `soft`, that step's times stand, as one round, although it was not warmed up and its memory was
recorded; one that took over five times as long, and over 20 s, was stopped between two of its operators: it has no
rounds, and its figures are the least that they can be. Appends a row per contender to the file and prints it. Without
`dtype` it times the soft layer alone, with 8 to 256 experts of 256 slots in all, or, with `experts`, zero_computation
beside tokens_choice; without a grid it sums up what a file holds:

python bench.py flat.csv width=192,384 batch=128,512
python bench.py cheaper.csv width=384,768 experts=8,16 batch=8,32
python bench.py results.csv
"""

import contextlib
import csv
import ctypes
import itertools
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from scipy.stats import quantile_test
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from softmoe_cli.device import give_back_freed_memory, hardware, keep_freed_memory
from softmoe_cli.model.router import make_router
from softmoe_cli.moe.layer import Experts, MoE
from softmoe_cli.moe.routers.soft import SoftRouter
from softmoe_cli.moe.routing import Router

TOKENS, SECONDS, MOST = 196, 10.0, 41
FEWEST = 6  # rounds from which on their median has a 95% interval
OURS = ("soft", "tokens_choice", "tokens_choice_bpr", "experts_choice", "tokens_choice_dropless")
ROUTERS = Path(__file__).parents[2] / "conf/model/router"


class Mlp(nn.Sequential):
    """The dense layer: what each expert is."""

    def __init__(self, d: int) -> None:
        super().__init__(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))


def ours(name: str, d: int, e: int) -> nn.Module:
    options = yaml.safe_load((ROUTERS / f"{name}.yaml").read_text()) | {"num_experts": e}
    if "slots_per_expert" in options:
        options |= {"slots_per_expert": slots(e), "capacity_factor": None}
    router = make_router(options, d, TOKENS)
    assert isinstance(router, Router)
    return MoE(router, Experts(e, d, 4 * d, gelu="none", identical=True))


def slots(e: int) -> int:
    return round(TOKENS / e)


def soft_moe_pytorch(d: int, e: int) -> nn.Module:
    from soft_moe_pytorch import SoftMoE

    return SoftMoE(d, num_experts=e, num_slots=slots(e), expert_mult=4, offload_unused_experts_to_cpu=False)


def soft_moe(d: int, e: int) -> nn.Module:
    from soft_moe import SoftMoELayerWrapper

    return SoftMoELayerWrapper(d, e, slots(e), Mlp, d=d)


def soft_mixture_of_experts(d: int, e: int) -> nn.Module:
    """Its layer is a single linear map; two of its stacked maps with a GELU between are an MLP."""
    from soft_mixture_of_experts.multi_expert import MultiExpertLayer
    from soft_mixture_of_experts.soft_moe import SoftMoE

    layer = SoftMoE(d, d, e, slots(e))
    layer.experts = nn.Sequential(MultiExpertLayer(d, 4 * d, e), nn.GELU(), MultiExpertLayer(4 * d, d, e))
    return layer


def mixture_of_experts(d: int, e: int) -> nn.Module:
    """Two choices; at least four slots per expert."""
    from mixture_of_experts import MoE as Theirs

    return Theirs(
        d, e, hidden_dim=4 * d, activation=nn.GELU, capacity_factor_train=slots(e) * e / TOKENS,
        capacity_factor_eval=1.0,
    )  # fmt: skip


def st_moe_pytorch(d: int, e: int) -> nn.Module:
    """Two choices; at least four slots per expert."""
    from st_moe_pytorch import MoE as Theirs

    return Theirs(
        d, e, experts=nn.ModuleList(Mlp(d) for _ in range(e)), gating_top_n=2,
        capacity_factor_train=slots(e) * e / TOKENS, capacity_factor_eval=1.0,
    )  # fmt: skip


PEERS: tuple[Callable[[int, int], nn.Module], ...] = (
    soft_moe_pytorch, soft_moe, soft_mixture_of_experts, mixture_of_experts, st_moe_pytorch,
)  # fmt: skip


def contenders(d: int, e: int, batch: int) -> dict[str, nn.Module]:
    made: dict[str, nn.Module] = {}
    with torch.device("meta"):
        made |= {name: ours(name, d, e) for name in OURS}
        made["dense"] = Mlp(d)
        made |= {peer.__name__: peer(d, e) for peer in PEERS}
    size = max(sum(p.numel() for p in module.parameters()) for module in made.values())
    buffer = torch.empty(size)
    for piece in buffer.split(1 << 24):
        piece.normal_(std=0.02)
    for module in made.values():
        share(module, buffer)
    global crowded
    needed = 2 * 4 * size + 4 * 4 * batch * slots(e) * e * 4 * d  # the last: about four hidden activations
    crowded = 4 * needed > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if crowded and sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-4, 65536)  # M_MMAP_MAX as it was: large blocks lie by themselves, and leave no holes
    return made


crowded = False
"""Whether freed memory is given back after each turn: where a step needs a quarter of the machine's memory, what
differently shaped contenders leave free in it would fill the rest."""


def forget(module: nn.Module, x: Tensor) -> None:
    """What a turn leaves is freed."""
    module.zero_grad(set_to_none=True)
    x.grad = None
    if crowded:
        give_back_freed_memory()


def share(module: nn.Module, buffer: Tensor) -> None:
    """Gives a module without storage parameters that are parts of one buffer, one after the other."""
    start = 0
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            part = buffer[start : start + parameter.numel()].view(parameter.shape)
            setattr(owner, name, nn.Parameter(part))
            start += parameter.numel()
        for name, values in list(owner.named_buffers(recurse=False)):
            owner.register_buffer(name, torch.zeros(values.shape, dtype=values.dtype))


def output(module: nn.Module, x: Tensor) -> Tensor:
    y = module(x)
    return y if isinstance(y, Tensor) else y[0]


def run(module: nn.Module, x: Tensor, half: bool, backward: bool) -> float:
    """Seconds of one forward pass, or of one with its backward pass."""
    start = time.perf_counter()
    with torch.set_grad_enabled(backward), torch.autocast("cpu", torch.bfloat16, enabled=half):
        y = output(module, x)
    if backward:
        y.backward(torch.ones_like(y))
    seconds = time.perf_counter() - start
    forget(module, x)
    return seconds


class Limit(TorchDispatchMode):
    """Raises TimeoutError before an operator that would begin later."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.end = time.perf_counter() + seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.perf_counter() > self.end:
            raise TimeoutError
        return func(*args, **(kwargs or {}))


class First(NamedTuple):
    """Seconds of a step and of the forward pass within, whether they were let end, and the most that the step held
    beside the weights, gradients included."""

    seconds: dict[str, float]
    ended: dict[str, bool]
    peak_mib: float


def first_step(module: nn.Module, x: Tensor, half: bool, limit: float) -> First:
    ends: list[float] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        start = time.perf_counter()
        with contextlib.suppress(TimeoutError), Limit(limit):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                y = output(module, x)
            ends.append(time.perf_counter() - start)
            y.backward(torch.ones_like(y))
            ends.append(time.perf_counter() - start)
        stopped = time.perf_counter() - start
    forget(module, x)
    held = most = 0
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    names = ("forward", "step")
    seconds = dict(zip(names, [*ends, stopped, stopped], strict=False))
    return First(seconds, {name: i < len(ends) for i, name in enumerate(names)}, most / 2**20)


def rates() -> tuple[float, float]:
    """FLOP/s of a large float32 product, and bytes/s of a copy, the best of five each."""
    a, b, c = torch.randn(1536, 1536), torch.randn(1536, 1536), torch.empty(1536, 1536)
    source, target = torch.randn(1 << 25), torch.empty(1 << 25)

    def best(what: Callable[[], Any]) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            what()
            times.append(time.perf_counter() - start)
        return min(times)

    return 2 * 1536**3 / best(lambda: torch.mm(a, b, out=c)), 8 * (1 << 25) / best(lambda: target.copy_(source))


def floor_s(module: nn.Module, batch: int, d: int, backward: bool, flop_rate: float, byte_rate: float) -> float:
    """The larger of arithmetic and memory traffic: weights read (twice and a gradient written with the backward pass),
    tokens in and out, and with it the hidden activations written and read once."""
    if isinstance(module, MoE):
        flop, rows = batch * module.flop(TOKENS), batch * module.router.rows(TOKENS)
    else:
        rows = float(batch * TOKENS)
        flop = round(rows * 16 * d * d)
    weights = 4 * sum(p.numel() for p in module.parameters())
    tokens = 4 * batch * TOKENS * d
    traffic = 3 * weights + 4 * tokens + 2 * 4 * rows * 4 * d if backward else weights + 2 * tokens
    return max((3 if backward else 1) * flop / flop_rate, traffic / byte_rate)


def in_turns(
    modules: dict[str, nn.Module], x: Tensor, half: bool, backward: bool, fewest: int
) -> dict[str, list[float]]:
    """Seconds of each module in rounds."""
    order = list(modules)
    times: dict[str, list[float]] = {name: [] for name in modules}
    drawn, began = random.Random(0), time.perf_counter()
    for turn in range(MOST):
        if turn >= fewest and time.perf_counter() - began > SECONDS:
            break
        drawn.shuffle(order)
        for name in order:
            times[name].append(run(modules[name], x, half, backward))
    return times


def middle(times: list[float], others: list[float]) -> tuple[float, float, float]:
    """The median of the rounds' ratios, and its 95% interval, or their spread where rounds are too few for one."""
    ratios = [mine / other for mine, other in zip(times, others, strict=False)]
    if len(ratios) < FEWEST:
        return statistics.median(ratios), min(ratios), max(ratios)
    interval = quantile_test(ratios, p=0.5).confidence_interval(0.95)
    return statistics.median(ratios), interval.low, interval.high


def point(dtype: str, d: int, e: int, batch: int, fewest: int) -> list[dict[str, Any]]:
    modules = contenders(d, e, batch)
    x = torch.randn(batch, TOKENS, d, requires_grad=True)
    half = dtype == "bf16"
    flop_rate, byte_rate = rates()
    made = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    print(f"\n{made}, width {d}, {e} experts, batch {batch}: {flop_rate / 1e9:.0f} GFLOP/s, {byte_rate / 1e9:.1f} GB/s")
    run(modules["soft"], x, half, backward=True)  # warms up, as the first steps do for what is timed again
    first = {"soft": first_step(modules["soft"], x, half, math.inf)}
    once = first["soft"].seconds["step"]
    for name in [name for name in modules if name != "soft"]:
        first[name] = first_step(modules[name], x, half, max(20.0, 5 * once))
    fast = {name: module for name, module in modules.items() if first[name].seconds["step"] < 3 * once}
    rows: list[dict[str, Any]] = []
    for what in ("forward", "step"):
        times = in_turns(fast, x, half, what == "step", fewest)
        for name, module in modules.items():
            if name in fast:
                ratio, low, high = middle(times[name], times["soft"])
            else:
                times[name] = [first[name].seconds[what]]
                ratio = low = high = times[name][0] / statistics.median(times["soft"])
            rounds = len(times[name]) if name in fast or first[name].ended[what] else 0
            floor = floor_s(module, batch, d, what == "step", flop_rate, byte_rate)
            rows.append(
                {
                    "dtype": dtype, "width": d, "experts": e, "batch": batch, "what": what, "contender": name,
                    "slots": TOKENS if name in ("dense", "tokens_choice_dropless") else slots(e) * e,
                    "ms": 1e3 * statistics.median(times[name]), "ms_min": 1e3 * min(times[name]),
                    "ms_max": 1e3 * max(times[name]), "over_soft": ratio,
                    "over_soft_low": low, "over_soft_high": high, "rounds": rounds,
                    "peak_mib": first[name].peak_mib, "floor_ms": 1e3 * floor if name in ("dense", *OURS) else None,
                    "gflop_per_s": flop_rate / 1e9, "gb_per_s": byte_rate / 1e9, **machine(),
                }
            )  # fmt: skip
            row = rows[-1]
            above = f"{row['ms'] / row['floor_ms']:5.2f}x floor" if row["floor_ms"] else ""
            print(
                f"  {what:<8}{name:<24}{row['ms']:10.1f} ms {ratio_of(row):>7}x soft{spread_of(row):<17}"
                f"{row['peak_mib']:9.0f} MiB {above}",
                flush=True,
            )
    return rows


def flat(d: int, batch: int, fewest: int) -> list[dict[str, Any]]:
    """Training steps of the soft layer with more and more experts, and with 256 slots each."""
    modules: dict[str, nn.Module] = {}
    for e in (8, 32, 128, 256):
        with torch.device("meta"):
            router = SoftRouter(d, TOKENS, num_experts=e, slots_per_expert=256 // e, capacity_factor=None, noise_std=0)
            modules[str(e)] = MoE(router, Experts(e, d, 4 * d, gelu="none", identical=True))
    buffer = torch.empty(sum(p.numel() for p in modules["256"].parameters())).normal_(std=0.02)
    for module in modules.values():
        share(module, buffer)
    x = torch.randn(batch, TOKENS, d, requires_grad=True)
    for module in modules.values():
        run(module, x, half=False, backward=True)
    times = in_turns(modules, x, half=False, backward=True, fewest=fewest)
    rows = []
    for name, found in times.items():
        ratio, low, high = middle(found, times["8"])
        row = {"width": d, "batch": batch, "experts": name, "ms": 1e3 * statistics.median(found), "over_8": ratio}
        rows.append(row | {"over_8_low": low, "over_8_high": high, "rounds": len(found)} | machine())
        print(f"  {d:4} {batch:4} {name:>4} experts {row['ms']:9.1f} ms {ratio:5.2f} ({low:.2f} to {high:.2f})")
    return rows


def cheaper(d: int, e: int, batch: int, fewest: int) -> list[dict[str, Any]]:
    """Training steps of zero_computation, tau 0.75, four experts without an MLP, and of tokens_choice, two choices and
    as many experts with one. Either has room for the choices that its balance aims at, the former for a tenth more."""
    options: dict[str, dict[str, Any]] = {
        "tokens_choice": {"k": 2, "renormalise": True},
        "zero_computation": {"num_constant": 2, "balance_weight": 0.01},
    }
    modules: dict[str, nn.Module] = {}
    for name, chosen in options.items():
        given = yaml.safe_load((ROUTERS / f"{name}.yaml").read_text()) | {"num_experts": e} | chosen
        made = make_router(given, d, TOKENS)
        assert isinstance(made, Router)
        modules[name] = MoE(made, Experts(e, d, 4 * d, gelu="none", identical=True))
    x = torch.randn(batch, TOKENS, d, requires_grad=True)
    for module in modules.values():
        run(module, x, half=False, backward=True)
    times = in_turns(modules, x, half=False, backward=True, fewest=fewest)
    ratio, low, high = middle(times["tokens_choice"], times["zero_computation"])
    ms = {f"{name}_ms": 1e3 * statistics.median(found) for name, found in times.items()}
    row = {"width": d, "experts": e, "batch": batch, **ms, "faster": ratio, "faster_low": low, "faster_high": high}
    print(f"  {d:4} {e:4} experts {batch:4} images {ratio:5.2f} ({low:.2f} to {high:.2f})", flush=True)
    return [row | {"rounds": len(times["tokens_choice"])} | machine()]


def machine() -> dict[str, str]:
    return {"hardware": hardware(torch.device("cpu")), "torch": torch.__version__}


SOFT_PEERS = ("soft_moe_pytorch", "soft_moe", "soft_mixture_of_experts")
SPARSE_PEERS = ("mixture_of_experts", "st_moe_pytorch")


def summary(file: Path) -> None:
    """A Markdown row per grid point for training steps, and the medians over points."""
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    keys = ("dtype", "width", "experts", "batch")
    points = dict.fromkeys(tuple(row[key] for key in keys) for row in rows)
    print(
        "| | width | experts | batch | soft ms | over floor | over dense and weights | MiB | dense | soft peers "
        "| tokens choice | sparse peers |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
    )
    against: dict[str, list[float]] = {"soft": [], "tokens_choice": []}
    sides = {of: dict.fromkeys(("slower", "not told apart", "faster"), 0) for of in ("soft peer", "tokens_choice")}
    for where in points:
        found = {
            row["contender"]: row for row in rows if row["what"] == "step" and tuple(row[key] for key in keys) == where
        }
        soft, tokens_choice = found["soft"], float(found["tokens_choice"]["over_soft"])
        ratio = {name: float(row["over_soft"]) for name, row in found.items()}
        best_soft = min(SOFT_PEERS, key=lambda name: ratio[name])
        best_sparse = min(SPARSE_PEERS, key=lambda name: ratio[name])
        against["soft"].append(ratio[best_soft])
        against["tokens_choice"].append(ratio[best_sparse] / tokens_choice)
        for of, name in (("soft peer", best_soft), ("tokens_choice", "tokens_choice")):
            sides[of][side(found[name])] += 1
        d, e = int(soft["width"]), int(soft["experts"])
        weights_ms = 3 * 4 * e * (8 * d * d + 5 * d) / float(soft["gb_per_s"]) / 1e6
        print(
            f"| {' | '.join(where)} | {float(soft['ms']):.0f} | {float(soft['ms']) / float(soft['floor_ms']):.2f} "
            f"| {1 / (ratio['dense'] + weights_ms / float(soft['ms'])):.2f} | {float(soft['peak_mib']):.0f} "
            f"| {ratio_of(found['dense'])} | {ratio_of(found[best_soft])}{spread_of(found[best_soft])} {best_soft} "
            f"| {ratio_of(found['tokens_choice'])}{spread_of(found['tokens_choice'])} "
            f"| {ratio_of(found[best_sparse])} {best_sparse} |"
        )
    stopped = ", or longer where it was stopped" if any(int(row["rounds"]) == 0 for row in rows) else ""
    for name, ratios in against.items():
        print(
            f"{name}: its fastest peer takes {min(ratios):.2f} to {max(ratios):.2f} times as long, "
            f"median {statistics.median(ratios):.2f}, over {len(ratios)} points{stopped}"
        )
    for of, counts in sides.items():
        print(f"{of} beside soft, by its interval: {', '.join(f'{which} at {n}' for which, n in counts.items())}")


def ratio_of(row: dict[str, Any]) -> str:
    """A contender's time over soft's, with > where that is the least that it can be."""
    return f"{'' if int(row['rounds']) else '>'}{float(row['over_soft']):.2f}"


def spread_of(row: dict[str, Any]) -> str:
    """Its interval, or its spread over rounds, if there were several."""
    low, high = float(row["over_soft_low"]), float(row["over_soft_high"])
    return f" ({low:.2f} to {high:.2f})" if int(row["rounds"]) > 1 else ""


def side(row: dict[str, Any]) -> str:
    """Where a contender stands beside soft by the 95% interval, or because it took over three times as long."""
    low, high, rounds = (float(row[key]) for key in ("over_soft_low", "over_soft_high", "rounds"))
    if low > 3 or (rounds >= FEWEST and low > 1):
        return "slower"
    return "faster" if rounds >= FEWEST and high < 1 else "not told apart"


def asked(summary: Callable[[Path], None]) -> tuple[Path, dict[str, list[str]]]:
    """The file and the grid that were typed; a file alone is summed up, and that is all."""
    file = Path(sys.argv[1])
    if len(sys.argv) == 2:
        summary(file)
        sys.exit()
    return file, {key: values.split(",") for key, values in (argument.split("=") for argument in sys.argv[2:])}


def main() -> None:
    file, grid = asked(summary)
    unknown = grid.keys() - {"dtype", "width", "experts", "batch", "rounds"}
    if unknown:
        sys.exit(f"there is no {', '.join(unknown)}; see the first lines of this file")
    fewest = max(int(rounds) for rounds in grid.get("rounds", [FEWEST]))
    keep_freed_memory(torch.device("cpu"))
    if "dtype" not in grid and "experts" in grid:
        for d, e, batch in itertools.product(grid["width"], grid["experts"], grid["batch"]):
            write(file, cheaper(int(d), int(e), int(batch), fewest))
        return
    if "dtype" not in grid:
        for d, batch in itertools.product(grid["width"], grid["batch"]):
            write(file, flat(int(d), int(batch), fewest))
        return
    for dtype, d, e, batch in itertools.product(grid["dtype"], grid["width"], grid["experts"], grid["batch"]):
        write(file, point(dtype, int(d), int(e), int(batch), fewest))


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    new = not file.exists()
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
