"""How much longer an update takes than its matrix products alone.

python experiments/loop_overhead/products.py [rounds=300] [OVERRIDES...]

The products of one update of `train/loop.py` are noted with their shapes, strides and order, attention and the
convolution among them, forwards and backwards; then updates and those products, on tensors of the same shapes, take
turns in one process on one thread, so that whatever else the machine does meets both alike. Time is that of the process
(processor seconds). Prints the ratio of the medians, and the quartiles of the ratios within a round. With
`train.compile=true` the products are those of the same update in eager mode.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from steps import CPU, RATE, asked, batch_of, step_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from softmoe_cli.device import hardware
from softmoe_cli.options.compose import compose
from softmoe_cli.train.loop import update

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_grouped_mm")
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


class Noted(TorchDispatchMode):
    """The products of what runs inside, each with its operands replaced by random ones that lie the same way."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in PRODUCTS or name.startswith(ATTENTION):
            given = tree_map_only(Tensor, _alike, (args, kwargs or {}))
            self.calls.append(lambda: func(*given[0], **given[1]))
        return out


def _alike(tensor: Tensor) -> Tensor:
    """Random numbers of the same shape in the same order in memory."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return made.normal_() if made.is_floating_point() else made.copy_(tensor)


def main() -> None:
    words, rounds = asked(300)
    torch.set_num_threads(1)
    config = compose("tracking=off", *words)
    ratios: list[float] = []
    both: tuple[list[float], list[float]] = ([], [])
    with ExitStack() as hooks:
        step, batch = step_of(config, hooks), batch_of(config)
        for _ in range(3):
            update(step, batch, RATE)
        with Noted() as noted:
            update(step, batch, RATE)
        if config.train.compile:
            step = step_of(config, hooks, compile=True)
        for round_ in range(-10, rounds):
            start = time.process_time()
            update(step, batch, RATE)
            middle = time.process_time()
            for call in noted.calls:
                call()
            end = time.process_time()
            if round_ >= 0:
                both[0].append(middle - start)
                both[1].append(end - middle)
                ratios.append((middle - start) / (end - middle))
    low, middle_, high = statistics.quantiles(ratios, n=4)
    whole, products = (1e3 * statistics.median(each) for each in both)
    mode = "compiled" if config.train.compile else "eager"
    print(f"{config.model.name}, {mode}, {config.train.batch_size} images")
    print(f"{hardware(CPU)}, torch {torch.__version__}, {rounds} rounds")
    print(f"an update {whole:.2f} ms, its {len(noted.calls)} products {products:.2f} ms: {whole / products:.3f}")
    print(f"within a round: {middle_:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
