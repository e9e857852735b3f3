"""What the loop adds to bare PyTorch: the same model, batches and optimizer, step by step in turns.

python experiments/loop_overhead/bench.py [OVERRIDES...]

A real `softmoe train` runs; between any two of its steps a plain step (forward, backward, clipping, update) of a second
copy of the model is made on the batch that it gets next. Both sides are timed, batch after batch, so that
whatever else the machine does meets both alike. Rows are written as in any run; making the batch, which both need, is
added to both. Prints the ratio of the sums, and its 95% interval from the ratios of 20 consecutive stretches.
"""

import contextlib
import io
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from scipy import stats

from softmoe_cli.data import batches
from softmoe_cli.device import hardware
from softmoe_cli.model.vit import build
from softmoe_cli.optim import optimizer_of, schedule
from softmoe_cli.options.compose import compose
from softmoe_cli.terminal import Screen
from softmoe_cli.train.loop import train
from softmoe_cli.train.setup import begin

STEPS, WARMUP, STRETCHES = 1020, 20, 20


def main() -> None:
    plain, looped = list[float](), list[float]()  # seconds of each step
    make_batches = batches.train_batches

    def in_turns(*args: Any, **kwargs: Any) -> Iterator[batches.Batch]:
        made = make_batches(*args, **kwargs)
        model = build(config.model, kwargs["num_classes"]).train()
        optimizer, rate = optimizer_of(model, config.optim), schedule(config.optim, STEPS)
        for step in range(STEPS):
            start = time.perf_counter()
            batch = next(made)
            shared = time.perf_counter() - start
            start = time.perf_counter()
            loss = torch.nn.functional.cross_entropy(model(batch.images), batch.labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm or math.inf)
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
            plain.append(time.perf_counter() - start + shared)
            start = time.perf_counter()
            yield batch
            looped.append(time.perf_counter() - start + shared)

    batches.train_batches = in_turns
    with tempfile.TemporaryDirectory() as root:
        config = compose(
            *sys.argv[1:], "tracking=off", f"output_root={root}", f"train.steps={STEPS}", "train.eval_every=1000000"
        )
        with contextlib.redirect_stdout(io.StringIO()), begin(config, "train", None, Screen()) as begun:
            train(begun)
    ours, bare = looped[WARMUP:], plain[WARMUP : len(looped)]
    size = len(ours) // STRETCHES
    pieces = [slice(i * size, (i + 1) * size) for i in range(STRETCHES)]
    ratios = [sum(ours[piece]) / sum(bare[piece]) for piece in pieces]
    half = stats.t.ppf(0.975, STRETCHES - 1) * statistics.stdev(ratios) / math.sqrt(STRETCHES)
    print(f"{hardware(torch.device('cpu'))}, torch {torch.__version__}, {len(ours)} steps of each")
    print(f"a step: bare {1e3 * sum(bare) / len(bare):.2f} ms, softmoe {1e3 * sum(ours) / len(ours):.2f} ms")
    print(f"ratio {sum(ours) / sum(bare):.4f}, mean of stretches {statistics.mean(ratios):.4f} ± {half:.4f}")


if __name__ == "__main__":
    main()
