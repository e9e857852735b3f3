"""The soft layer's training step over its floor in float32: what its products and its traffic cannot take less than.

cd experiments/layer_speed
OMP_NUM_THREADS=1 python floor.py floor.csv width=384,768 experts=8,32,128 batch=8,32

The floor is a sum over the products of a step, of which each takes the longer of

    FLOPs / the rate of a product of exactly that shape     one expert's, or one image's, again and again, so that its
                                                            operands stay in the cache; the best of their four layouts
                                                            and of one piece as often as there are pieces
    bytes / the bandwidth of a copy                         what it must fetch or leave in memory: weights (each pass),
                                                            gradients of weights, hidden units (written, then read),
                                                            tokens and what they became (each pass)

as if transfers went on behind arithmetic, and anything that is no product took no time. `waiting_ms` is the same sum
with arithmetic and transfers one after the other. Two sides, `now` and `plain` (every product handed to torch as it
is), take turns in one process, in an order drawn anew each round, by processor time: other programs on the core do not
count in it, although they take its caches. `products_ms`, `gelu_ms`, `softmax_ms` and `rest_ms` say where a step's time
goes, each operator timed by itself: medians of three steps.
"""

import csv
import itertools
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench import TOKENS, asked, machine, middle, ours, share, slots, write
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from softmoe_cli.device import keep_freed_memory
from softmoe_cli.moe import few_rows

ROUNDS = 9
KINDS = {"mm": "products", "addmm": "products", "bmm": "products", "baddbmm": "products", "gelu": "gelu",
         "gelu_backward": "gelu", "_softmax": "softmax", "_softmax_backward_data": "softmax"}  # fmt: skip


class Product(NamedTuple):
    """`times` products of (m, k) and (k, n), and the bytes that all of them fetch or leave."""

    times: int
    m: int
    k: int
    n: int
    traffic: int


def products(d: int, e: int, batch: int) -> tuple[list[Product], list[Product]]:
    """Those of the forward pass and those of the backward pass."""
    m, n, h, b = slots(e) * e, TOKENS, 4 * d, batch
    rows, tokens, weights, hidden = slots(e) * b, 4 * b * n * d, 4 * e * d * h, 4 * b * m * h
    forward = [
        Product(1, b * n, d, m, tokens),  # logits
        Product(b, m, n, d, 0),  # dispatch
        Product(e, rows, d, h, weights + hidden),
        Product(e, rows, h, d, weights),
        Product(b, n, m, d, tokens),  # combine
    ]
    backward = [
        Product(b, n, d, m, tokens),  # of combine's weights
        Product(b, m, n, d, 0),  # of the experts' rows
        Product(e, rows, d, h, weights),
        Product(e, h, rows, d, weights + hidden),
        Product(e, rows, h, d, weights),
        Product(e, d, rows, h, weights),
        Product(b, m, d, n, 0),  # of dispatch's weights
        Product(b, n, m, d, 0),  # of the tokens dispatched
        Product(1, b * n, m, d, tokens),  # of the logits' tokens
        Product(1, d, b * n, m, tokens),  # of the slots' parameters
    ]
    return forward, backward


def best_s(what: Callable[[], Any], times: int = 7) -> float:
    """Processor seconds of a call, the least of some turns of at least 2 ms each."""
    what()
    calls = 1
    while True:
        start = time.process_time()
        for _ in range(calls):
            what()
        found = time.process_time() - start
        if found >= 2e-3:
            break
        calls *= 2
    least = found / calls
    for _ in range(times - 1):
        start = time.process_time()
        for _ in range(calls):
            what()
        least = min(least, (time.process_time() - start) / calls)
    return least


def product_s(m: int, k: int, n: int, known: dict[tuple[int, int, int], float]) -> float:
    """Seconds of one product whose operands are in the cache, in the best way found."""
    if (m, k, n) not in known:
        out = torch.empty(m, n)
        lefts, rights = (torch.randn(m, k), torch.randn(k, m).T), (torch.randn(k, n), torch.randn(n, k).T)
        found = [best_s(partial(torch.mm, a, b, out=out)) for a in lefts for b in rights]
        a, b = lefts[0], rights[0]
        for piece in (32, 128):  # the same piece again and again: of large operands, only a part fits into the cache
            for axis, size in enumerate((m, k, n)):
                if size > piece:
                    rows, inner, columns = (piece if axis == each else None for each in range(3))
                    part = best_s(partial(out[:rows, :columns].addmm_, a[:rows, :inner], b[:inner, :columns]))
                    found.append(part * size / piece)
        known[m, k, n] = min(found)
    return known[m, k, n]


def byte_rate() -> float:
    source, target = torch.randn(1 << 25), torch.empty(1 << 25)
    return 8 * (1 << 25) / best_s(lambda: target.copy_(source))


@contextmanager
def side(name: str) -> Iterator[None]:
    """`plain` hands every product to torch as it is."""
    before = few_rows.PIECED
    if name == "plain":
        few_rows.PIECED = 0
    try:
        yield
    finally:
        few_rows.PIECED = before


class Clock(TorchDispatchMode):
    """Processor seconds of operators, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.process_time()
        made = func(*args, **(kwargs or {}))
        self.seconds[KINDS.get(func.overloadpacket.__name__, "rest")] += time.process_time() - start
        return made


def run(module: torch.nn.Module, x: Tensor, backward: bool) -> float:
    """Processor seconds of a forward pass, or of one with its backward pass."""
    module.zero_grad(set_to_none=True)
    x.grad = None
    start = time.process_time()
    with torch.set_grad_enabled(backward):
        y = module(x)
    if backward:
        y.backward(torch.ones_like(y))
    return time.process_time() - start


def point(d: int, e: int, batch: int, rounds: int, known: dict[tuple[int, int, int], float]) -> list[dict[str, Any]]:
    with torch.device("meta"):
        module = ours("soft", d, e)
    share(module, torch.empty(sum(p.numel() for p in module.parameters())).normal_(std=0.02))
    x = torch.randn(batch, TOKENS, d, requires_grad=True)
    rate, drawn, rows = byte_rate(), random.Random(0), []
    parts = products(d, e, batch)
    for what, made in (("forward", parts[0]), ("step", parts[0] + parts[1])):
        arithmetic = [each.times * product_s(each.m, each.k, each.n, known) for each in made]
        traffic = [each.traffic / rate for each in made]
        floor = 1e3 * sum(map(max, arithmetic, traffic))
        times: dict[str, list[float]] = {"plain": [], "now": []}
        order = list(times)
        for name in order:
            with side(name):
                run(module, x, what == "step")
        for _ in range(rounds):
            drawn.shuffle(order)
            for name in order:
                with side(name):
                    times[name].append(1e3 * run(module, x, what == "step"))
        clocks = []
        for _ in range(3):
            with Clock() as clock:
                run(module, x, what == "step")
            clocks.append(clock.seconds)
        over, low, high = middle(times["now"], [floor] * rounds)
        ratio, least, most = middle(times["now"], times["plain"])
        gflop = sum(2e-9 * each.times * each.m * each.k * each.n for each in made)
        rows.append(
            {
                "width": d, "experts": e, "batch": batch, "what": what, "rows": slots(e) * batch, "gflop": gflop,
                "gb": sum(each.traffic for each in made) / 1e9, "gb_per_s": rate / 1e9, "floor_ms": floor,
                "arithmetic_ms": 1e3 * sum(arithmetic), "waiting_ms": 1e3 * (sum(arithmetic) + sum(traffic)),
                "plain_ms": statistics.median(times["plain"]), "ms": statistics.median(times["now"]),
                "plain_ms_min": min(times["plain"]), "ms_min": min(times["now"]),
                "over_floor": over, "over_floor_low": low, "over_floor_high": high,
                "over_plain": ratio, "over_plain_low": least, "over_plain_high": most, "rounds": rounds,
                **{f"{kind}_ms": 1e3 * statistics.median(each[kind] for each in clocks)
                   for kind in (*dict.fromkeys(KINDS.values()), "rest")},
                **machine(),
            }
        )  # fmt: skip
        row = rows[-1]
        print(" ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                       for key, value in row.items() if key not in ("hardware", "torch")), flush=True)  # fmt: skip
    return rows


def summary(file: Path) -> None:
    """A Markdown row for each point of the grid, first of steps, then of forward passes."""
    with file.open() as lines:
        rows = sorted(csv.DictReader(lines), key=lambda row: (row["what"] != "step", *map(int, list(row.values())[:3])))
    print(
        "| | width | experts | images | rows | floor, ms | arithmetic and traffic in turn | plain | now "
        "| now over plain | products, GELU, softmax, rest |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        of = {key: float(value) for key, value in row.items() if key not in ("what", "hardware", "torch")}
        floor, whole = of["floor_ms"], sum(of[f"{kind}_ms"] for kind in ("products", "gelu", "softmax", "rest"))
        parts = ", ".join(f"{100 * of[f'{kind}_ms'] / whole:.0f}" for kind in ("products", "gelu", "softmax", "rest"))
        print(
            f"| {row['what']} | {row['width']} | {row['experts']} | {row['batch']} | {row['rows']} | {floor:.0f} "
            f"| {of['waiting_ms'] / floor:.2f} | {of['plain_ms'] / floor:.2f} | {of['over_floor']:.2f} "
            f"({of['over_floor_low']:.2f} to {of['over_floor_high']:.2f}) | {of['over_plain']:.2f} "
            f"({of['over_plain_low']:.2f} to {of['over_plain_high']:.2f}) | {parts} |"
        )


def main() -> None:
    file, grid = asked(summary)
    rounds = int(grid.pop("rounds", [str(ROUNDS)])[0])
    if grid.keys() != {"width", "experts", "batch"}:
        sys.exit("width=, experts= and batch= are needed, and rounds= may be given; see the first lines of this file")
    keep_freed_memory(torch.device("cpu"))
    known: dict[tuple[int, int, int], float] = {}
    for d, e, batch in itertools.product(grid["width"], grid["experts"], grid["batch"]):
        write(file, point(int(d), int(e), int(batch), rounds, known))


if __name__ == "__main__":
    main()
