"""Several seeds as one stack, beside the run alone: what an update takes per seed, side by side in turns.

python experiments/seeds_at_once/bench.py CSV [model/backbone=vit_pico7 ...] [seeds=4,8] [rounds=15] [threads=1]
python experiments/seeds_at_once/bench.py batches data=exemplars data.root=PATH [...]

The second form says what making a batch takes beside an update, which no stacking of models shortens. Sides of the
first, on drawn images and labels (what they show changes no time):

- `alone`: train/loop.py's own update of one model; every other side is compared with it.
- `stack`: what a run of `seeds_at_once=N` does in its place: forward and backward pass of all, norms, clipping, AdamW.
- `alone, N times the images`: one model on N batches at once, which computes as much, with fewer weights.
- `alone, compiled` and `stack, compiled`: in the place of the latter two with train.compile=true. `alone` stays as it
  is without.

Time is this process's processor time, on one thread: other programs on the machine take the core away, and time on the
wall with it, but not this. They still take caches, from all sides alike. With several threads it is time on the wall,
which asks for a machine with nothing else to do.

Before any clock runs, models are trained for 50 updates alone and as a stack, on the same batches; what is printed is
the largest difference of a loss, of a weight as a share of its tensor's largest, and what writing down the pass took.
"""

import csv
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from softmoe_cli.data import sets
from softmoe_cli.data.batches import Batch, train_batches
from softmoe_cli.device import compiled, hardware, keep_freed_memory, precision_context
from softmoe_cli.model.vit import build
from softmoe_cli.moe.routing import routings
from softmoe_cli.optim import optimizer_of
from softmoe_cli.options.compose import compose
from softmoe_cli.run.checkpoint import random_state, set_random_state
from softmoe_cli.stack.passing import Stack, own_draws
from softmoe_cli.train.loop import Step, handed, update

CPU = torch.device("cpu")
CLASSES, UPDATES, EACH = 10, 50, 2


def step_of(model: VisionTransformer, config: Any, hooks: ExitStack, *, compile: bool = False) -> Step:
    """What updates of a model work with, as a run makes them."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    autocast, seen = precision_context("cpu", "fp32", cached=True), hooks.enter_context(routings(model))
    forward = compiled(model, dynamic=False) if compile else model
    return Step(model, forward, optimizer_of(model, config.optim), scaler, autocast, seen, config)


def alone(step: Step) -> Callable[[Tensor, Tensor, float], float]:
    state = random_state()

    def one(images: Tensor, targets: Tensor, lr: float) -> float:
        set_random_state(state)
        loss = update(step, Batch(images, targets), lr)[0]
        state.update(random_state())
        return loss

    return one


def as_stack(steps: Sequence[Step]) -> Callable[[Tensor, Tensor, float], list[float]]:
    stack: list[Stack] = []
    states = [random_state() for _ in steps]

    def all_at_once(images: Tensor, targets: Tensor, lr: float) -> list[float]:
        given = [handed(step, Batch(*own), lr) for step, *own in zip(steps, images, targets, strict=True)]
        with own_draws(states):
            if not stack:
                stack.append(Stack(given))
            made = stack[0].passed(given)
        return [each.update[0] for each in made if each.update is not None]

    return all_at_once


def new_model(config: Any, seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    return build(config.model, CLASSES).train()


def drawn(config: Any, n: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (n b c s s) and targets (n b classes)."""
    m, b = config.model, config.train.batch_size
    images = torch.randn(n, b, m.in_chans, m.image_size, m.image_size, generator=chance)
    return images, F.one_hot(torch.randint(CLASSES, (n, b), generator=chance), CLASSES).float()


def check(config: Any, n: int) -> str:
    """Alone against the stack, over UPDATES updates."""
    chance = torch.Generator().manual_seed(0)
    apart, first_s = 0.0, 0.0
    with ExitStack() as hooks:
        ours, theirs = ([step_of(new_model(config, seed), config, hooks) for seed in range(n)] for _ in range(2))
        stack, each = as_stack(ours), [alone(step) for step in theirs]
        for turn in range(UPDATES):
            images, targets = drawn(config, n, chance)
            start = time.process_time()
            losses = stack(images, targets, config.optim.lr)
            first_s = first_s if turn else time.process_time() - start
            of_each = [run(x, y, config.optim.lr) for run, x, y in zip(each, images, targets, strict=True)]
            apart = max(apart, *(abs(a - b) for a, b in zip(losses, of_each, strict=True)))
    shares = [
        ((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item()
        for mine, other in zip(ours, theirs, strict=True)
        for a, b in zip(mine.model.parameters(), other.model.parameters(), strict=True)
    ]
    return (
        f"{n} seeds, {UPDATES} updates: losses differ by at most {apart:.1e}, weights by {max(shares):.1e}; the first "
        f"update took {first_s:.1f} s"
    )


def batches_beside(config: Any) -> str:
    """What making a batch takes, and the update on it."""
    images = sets.load(config.data)
    classes = sets.num_classes(config.data, images)
    m, took = config.model, []
    made = train_batches(
        images.train, config.data, config.augment, image_size=m.image_size, in_chans=m.in_chans, num_classes=classes,
        batch_size=config.train.batch_size, label_smoothing=0.0, seed=0, first_step=0, device=CPU,
    )  # fmt: skip
    with ExitStack() as hooks:
        run = alone(step_of(build(m, classes).train(), config, hooks))
        for _ in range(UPDATES):
            start = time.process_time()
            batch = next(made)
            between = time.process_time()
            run(batch.images, batch.labels, config.optim.lr)
            took.append((1000 * (between - start), 1000 * (time.process_time() - between)))
    making, updating = (statistics.median(each) for each in zip(*took[5:], strict=True))
    return f"{m.name}, {config.train.batch_size} images: batch {making:.2f} ms, update {updating:.2f} ms"


def main() -> None:
    file, *words = sys.argv[1:]
    own = ("seeds=", "rounds=", "threads=")
    asked = {word.partition("=")[0]: word.partition("=")[2] for word in words if word.startswith(own)}
    config = compose(*[word for word in words if word.partition("=")[0] not in asked])
    numbers, rounds = [int(n) for n in asked.get("seeds", "4,8").split(",")], int(asked.get("rounds", "15"))
    threads = int(asked.get("threads", "1"))
    now = time.process_time if threads == 1 else time.perf_counter
    torch.set_num_threads(threads)
    keep_freed_memory(CPU, 2**30, 2**34)
    if file == "batches":
        print(batches_beside(config))
        return
    print(check(config, numbers[0]), flush=True)
    with ExitStack() as hooks:
        sides: dict[tuple[str, int], Callable[[], Any]] = {}
        lr, chance = config.optim.lr, torch.Generator().manual_seed(0)
        compiles = config.train.compile
        for n in (1, *numbers):
            images, targets = drawn(config, n, chance)
            flat = images.flatten(0, 1), targets.flatten(0, 1)
            name = "alone" if n == 1 else "alone, N times the images"
            if n == 1 or not compiles:
                sides[name, n] = partial(alone(step_of(new_model(config, 0), config, hooks)), *flat, lr)
            if n == 1 and compiles:
                step = step_of(new_model(config, 0), config, hooks, compile=True)
                sides["alone, compiled", n] = partial(alone(step), *flat, lr)
            if n > 1:
                stack = as_stack([step_of(new_model(config, seed), config, hooks) for seed in range(n)])
                sides["stack, compiled" if compiles else "stack", n] = partial(stack, images, targets, lr)
        took: dict[tuple[str, int], list[float]] = {side: [] for side in sides}
        order = list(sides)
        for turn in range(rounds + 2):
            random.Random(turn).shuffle(order)
            for side in order:
                start = now()
                for _ in range(EACH):
                    sides[side]()
                if turn >= 2:
                    took[side].append(1000 * (now() - start) / EACH)
    write(Path(file), config, took)


def write(file: Path, config: Any, took: dict[tuple[str, int], list[float]]) -> None:
    """A row for each side: milliseconds per seed, and the time of `alone` over it within a round, with the 95% interval
    of the median."""
    new = not file.exists()
    with file.open("a", newline="") as out:
        table = csv.writer(out)
        if new:
            head = "model,router,batch,side,seeds,ms_per_seed,speedup,low,high,rounds,hardware,torch"
            table.writerow(head.split(","))
        for (side, n), own in took.items():
            ratios = sorted(n * a / b for a, b in zip(took["alone", 1], own, strict=True))
            out_of = int(stats.binom.ppf(0.025, len(ratios), 0.5))
            low, middle, high = ratios[max(0, out_of - 1)], statistics.median(ratios), ratios[-max(1, out_of)]
            m = config.model
            row = [
                m.name, m.router_name, config.train.batch_size, side, n, f"{statistics.median(own) / n:.2f}",
                f"{middle:.2f}", f"{low:.2f}", f"{high:.2f}", len(ratios), hardware(CPU), torch.__version__,
            ]  # fmt: skip
            table.writerow(row)
            print(*row[:10], sep="  ")


if __name__ == "__main__":
    main()
