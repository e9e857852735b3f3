"""How much longer an update takes than its matrix products alone.

python experiments/loop_overhead/products.py [rounds=300] [OVERRIDES...]

The products of one update of `train/loop.py` are noted with their shapes, strides and order, attention and the
convolution among them, forwards and backwards; then updates and those products, on tensors of the same shapes, take
turns in one process on one thread, so that whatever else the machine does meets both alike. Time is that of the process
(processor seconds). Prints the ratio of the medians, and the quartiles of the ratios within a round.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from softmoe_cli.data.batches import Batch
from softmoe_cli.device import hardware, keep_freed_memory, precision_context
from softmoe_cli.model.vit import build, prepare
from softmoe_cli.moe.routing import routings
from softmoe_cli.optim import optimizer_of
from softmoe_cli.options.compose import compose
from softmoe_cli.train.loop import Step, update

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
    words = [word for word in sys.argv[1:] if not word.startswith("rounds=")]
    rounds = int(next((word.split("=")[1] for word in sys.argv[1:] if word.startswith("rounds=")), 300))
    torch.set_num_threads(1)
    config, device = compose("tracking=off", *words), torch.device("cpu")
    keep_freed_memory(device, 2**28, 2**40)
    model = build(config.model, 10).train()
    prepare(model, device, "fp32")
    optimizer, scaler = optimizer_of(model, config.optim), torch.amp.GradScaler("cpu", enabled=False)
    b, side = config.train.batch_size, config.model.image_size
    batch = Batch(torch.randn(b, config.model.in_chans, side, side), one_hot(torch.arange(b) % 10, 10).float())
    ratios: list[float] = []
    both: tuple[list[float], list[float]] = ([], [])
    with routings(model) as seen:
        step = Step(model, model, optimizer, scaler, precision_context("cpu", "fp32"), seen, config)
        for _ in range(3):
            update(step, batch, 1e-4)
        with Noted() as noted:
            update(step, batch, 1e-4)
        for round_ in range(-10, rounds):
            start = time.process_time()
            update(step, batch, 1e-4)
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
    print(f"{config.model.name}, {b} images, {hardware(device)}, torch {torch.__version__}, {rounds} rounds")
    print(f"an update {whole:.2f} ms, its {len(noted.calls)} products {products:.2f} ms: {whole / products:.3f}")
    print(f"within a round: {middle_:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
