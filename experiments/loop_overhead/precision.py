"""What bf16 does to the time of an update on this processor, model by model.

python experiments/loop_overhead/precision.py [rounds=15] MODEL[+OVERRIDE...] [MODEL...]

Two models with weights of their own, one in float32, one in bf16 under autocast, take turns in one process on one
thread, in an order that changes each round, on drawn images: `train/loop.py`'s own update, in processor seconds. Prints
the medians, and the median and quartiles of the ratios within a round.
"""

import statistics
import time
from contextlib import ExitStack

import torch
from steps import CPU, RATE, asked, batch_of, step_of

from softmoe_cli.device import hardware
from softmoe_cli.options.compose import compose
from softmoe_cli.train.loop import update


def point(words: list[str], rounds: int) -> str:
    config = compose("tracking=off", *words)
    batch, took = batch_of(config), dict[str, list[float]](fp32=[], bf16=[])
    with ExitStack() as hooks:
        steps = {precision: step_of(config, hooks, precision) for precision in took}
        for turn in range(-2, rounds):  # the first two warm up
            for precision in sorted(took, reverse=turn % 2 == 0):
                start = time.process_time()
                update(steps[precision], batch, RATE)
                if turn >= 0:
                    took[precision].append(time.process_time() - start)
    low, middle, high = statistics.quantiles(
        (half / whole for whole, half in zip(took["fp32"], took["bf16"], strict=True)), n=4
    )
    whole, half = (1e3 * statistics.median(times) for times in took.values())
    images = config.train.batch_size
    return f"{images} images: fp32 {whole:.1f} ms, bf16 {half:.1f} ms, {middle:.2f} ({low:.2f} to {high:.2f}) of it"


def main() -> None:
    words, rounds = asked(15)
    torch.set_num_threads(1)
    print(f"{hardware(CPU)}, torch {torch.__version__}, {rounds} rounds")
    for word in words:
        print(f"{word}, {point(word.split('+'), rounds)}", flush=True)


if __name__ == "__main__":
    main()
