"""One model's updates, as `train/loop.py` makes them, on drawn images: what the benchmarks of this folder time."""

import sys
from contextlib import ExitStack

import torch
from torch.nn.functional import one_hot

from softmoe_cli.config.run import Config
from softmoe_cli.data.batches import Batch
from softmoe_cli.device import compiled, keep_freed_memory, precision_context
from softmoe_cli.model.vit import build, prepare
from softmoe_cli.moe.routing import routings
from softmoe_cli.optim import optimizer_of
from softmoe_cli.train.loop import Step

CPU, CLASSES, RATE = torch.device("cpu"), 10, 1e-4
keep_freed_memory(CPU, 2**28, 2**40)


def asked(rounds: int) -> tuple[list[str], int]:
    """The words that were typed but for rounds=, and the rounds that it says or these."""
    words = [word for word in sys.argv[1:] if not word.startswith("rounds=")]
    typed = [int(word.partition("=")[2]) for word in sys.argv[1:] if word.startswith("rounds=")]
    return words, [rounds, *typed][-1]


def batch_of(config: Config) -> Batch:
    b, side = config.train.batch_size, config.model.image_size
    images = torch.randn(b, config.model.in_chans, side, side)
    return Batch(images, one_hot(torch.arange(b) % CLASSES, CLASSES).float())


def step_of(config: Config, hooks: ExitStack, precision: str = "fp32", *, compile: bool = False) -> Step:
    """What `update` takes; `hooks` holds what the model's routers are read with."""
    model = build(config.model, CLASSES).train()
    prepare(model, CPU, precision)
    scaler, autocast = torch.amp.GradScaler("cpu", enabled=False), precision_context("cpu", precision)
    forward, seen = compiled(model) if compile else model, hooks.enter_context(routings(model))
    return Step(model, forward, optimizer_of(model, config.optim), scaler, autocast, seen, config)
