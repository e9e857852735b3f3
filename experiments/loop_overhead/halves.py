"""What products in half precision take over those in float32, shape by shape, on this processor.

python experiments/loop_overhead/halves.py [rounds=15] [MxKxN...]

Products of the three kinds take turns in one process on one thread, in processor seconds, at least MS a turn. Prints
GFLOP/s and, of the ratios within a round, the median and the quartiles.
"""

import statistics
import time

import torch
from steps import CPU, asked

from softmoe_cli.device import hardware
from softmoe_cli.moe.processor import CPU_PRODUCTS

SHAPES = ("2048x384x1536", "512x64x256", "512x32x128")
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MS = 5


def took_s(left: torch.Tensor, right: torch.Tensor, calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        torch.mm(left, right)
    return (time.process_time() - start) / calls


def main() -> None:
    words, rounds = asked(15)
    torch.set_num_threads(1)
    verdicts = ", ".join(f"{name} {CPU_PRODUCTS[kind]}" for name, kind in KINDS.items() if kind in CPU_PRODUCTS)
    print(f"{hardware(CPU)}, torch {torch.__version__}, {rounds} rounds; taken as {verdicts}")
    for shape in words or SHAPES:
        m, k, n = map(int, shape.split("x"))
        operands = {name: (torch.randn(m, k).to(kind), torch.randn(k, n).to(kind)) for name, kind in KINDS.items()}
        for pair in operands.values():  # a kernel is made with the first call
            took_s(*pair, 1)
        calls = {name: max(1, round(1e-3 * MS / took_s(*pair, 1))) for name, pair in operands.items()}
        took: dict[str, list[float]] = {name: [] for name in KINDS}
        for round_ in range(-1, rounds):  # the first warms up
            for name, pair in operands.items():
                seconds = took_s(*pair, calls[name])
                if round_ >= 0:
                    took[name].append(seconds)
        for name, all_s in took.items():
            ratios = [each / whole for each, whole in zip(all_s, took["fp32"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            rate = 2e-9 * m * k * n / statistics.median(all_s)
            print(f"{shape} {name}: {rate:.0f} GFLOP/s, {middle:.2f} ({low:.2f} to {high:.2f}) of float32's time")


if __name__ == "__main__":
    main()
