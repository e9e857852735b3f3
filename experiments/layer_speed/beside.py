"""Would bf16 weights beside the float32 masters, written by the update itself, spare what autocast spends on casting?

    cd experiments/layer_speed
    python beside.py width=384,768 experts=32,128 batch=8 rounds=9 half=0,1

For each point, in one process and in turns, one thread: AdamW's update of the layer's matrices and the cast of all of
them to bf16, as a step under autocast has them; and the update in pieces of 65,536 numbers, each cast while it is in
the cache. Prints processor time, and what share of update, cast and a step of the layer, in float32 or in bf16
(`half=1`), would be spared (negative: lost).
"""

import itertools
import statistics
import sys
import time

import torch
from bench import TOKENS, middle, ours, run
from torch import Tensor

from softmoe_cli.device import keep_freed_memory

PIECE = 2**16
STEP = torch.ones(())


def adamw(weights: list[Tensor], gradients: list[Tensor], first: list[Tensor], second: list[Tensor]) -> None:
    torch._fused_adamw_(
        weights, gradients, first, second, [], [STEP] * len(weights),
        lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.05, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip


@torch.no_grad()
def point(d: int, e: int, batch: int, half: bool, rounds: int) -> str:
    layer = ours("soft", d, e)
    x = torch.randn(batch, TOKENS, d, requires_grad=True)
    weights = [each.detach() for each in layer.parameters() if each.dim() > 1]
    gradients, first, second = ([torch.rand_like(each) for each in weights] for _ in range(3))
    halves = [torch.empty_like(each, dtype=torch.bfloat16) for each in weights]
    together = (weights, gradients, first, second, halves)
    pieces = [
        list(zip(*(each.view(-1).split(PIECE) for each in own), strict=True)) for own in zip(*together, strict=True)
    ]

    def update() -> None:
        adamw(weights, gradients, first, second)

    def cast() -> None:
        torch._foreach_copy_(halves, weights)

    def in_pieces() -> None:
        for w, g, m, v, short in itertools.chain(*pieces):
            adamw([w], [g], [m], [v])
            short.copy_(w)

    def step() -> None:
        with torch.enable_grad():
            run(layer, x, half=half, backward=True)

    took: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for what in (update, cast, in_pieces, step):
            start = time.process_time()
            what()
            if turn:  # the first one warms up
                took.setdefault(what.__name__, []).append(time.process_time() - start)
    apart = [a + b for a, b in zip(took["update"], took["cast"], strict=True)]
    ratio, low, high = middle(took["in_pieces"], apart)
    of_all = statistics.median(
        (a - b) / (a + c) for a, b, c in zip(apart, took["in_pieces"], took["step"], strict=True)
    )
    times = ", ".join(f"{name} {1e3 * statistics.median(found):.1f} ms" for name, found in took.items())
    return (
        f"{d} wide, {e} experts, {batch} images, {'bf16' if half else 'fp32'}: {times}; in pieces {ratio:.2f} "
        f"({low:.2f} to {high:.2f}) of update and cast, which spares {of_all:.1%} of all"
    )


def main() -> None:
    grid = {
        key: [int(value) for value in values.split(",")] for key, values in (word.split("=") for word in sys.argv[1:])
    }
    torch.set_num_threads(1)
    keep_freed_memory(torch.device("cpu"))
    for half, d, e, batch in itertools.product(grid.get("half", [0]), grid["width"], grid["experts"], grid["batch"]):
        print(point(d, e, batch, bool(half), *grid.get("rounds", [9])), flush=True)


if __name__ == "__main__":
    main()
