"""What a model costs on this machine: latency, throughput and peak memory, by measuring them.

Every workload is warmed up, then all take turns, so that a machine that slows down slows all of them. Times are medians
with the distance between the quartiles. A figure names the hardware it was measured on, and `rank` compares only
figures of the same hardware.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from softmoe_cli.config.run import check_rows
from softmoe_cli.cost.flop import account
from softmoe_cli.cost.load import Load
from softmoe_cli.cost.memory import Live, predict
from softmoe_cli.device import compiled, free_memory, hardware, keep_freed_memory, precision_context, wait
from softmoe_cli.errors import UsageError
from softmoe_cli.model.tasks import any_task
from softmoe_cli.model.vit import build, prepare
from softmoe_cli.moe.routing import full_precision, routings
from softmoe_cli.optim import adamw_of
from softmoe_cli.text import gibibytes

WARM_UP = 2


@dataclass(frozen=True)
class Timing:
    """Times of one batch; spreads are distances between the quartiles. `peak_bytes` is what a training step held at its
    peak: the allocator's figure on CUDA, the live tensors' elsewhere, None where neither can be told (compiled)."""

    latency_ms: float
    latency_spread_ms: float
    train_step_ms: float
    train_step_spread_ms: float
    peak_bytes: int | None
    hardware: str


def fingerprint(device: torch.device, precision: str, is_compiled: bool) -> str:
    """What a time depends on beside the model: device, driver, threads, torch, precision, eager or compiled."""
    driver = Path("/proc/driver/nvidia/version")
    words = [hardware(device)]
    if device.type == "cuda" and driver.exists():
        words.append(next(f"driver {word}" for word in driver.read_text().split() if word[0].isdigit()))
    return ", ".join([*words, f"torch {torch.__version__}", precision, "compiled" if is_compiled else "eager"])


class Workload:
    """A load's model with a batch of random pixels, and AdamW. Making it gives this process the load's number of
    threads."""

    def __init__(self, load: Load) -> None:
        self.device, self.compiled, self.accumulate = load.device, load.compile, load.accumulate
        self.autocast = precision_context(load.device.type, load.precision)
        if load.threads is not None:
            torch.set_num_threads(load.threads)
        self.threads = torch.get_num_threads()
        self.hardware = fingerprint(load.device, load.precision, load.compile)
        torch.manual_seed(0)
        vit = build(load.model, load.num_classes)
        prepare(vit, self.device, load.precision)
        vit.set_grad_checkpointing(load.recompute)
        self.model = vit.to(self.device)
        self.x = torch.randn(load.batch, load.model.in_chans, *vit.patch_embed.img_size, device=self.device)
        self.targets = torch.randint(load.num_classes, (load.batch,), device=self.device)
        self.optimizer = adamw_of(vit.parameters(), self.device)
        self.call: Callable[..., torch.Tensor] = compiled(vit) if load.compile else vit

    def forward(self) -> None:
        self.model.eval()
        with torch.no_grad(), self.autocast:
            self.call(*any_task(self.model, self.x))

    def step(self) -> None:
        """One update, as training makes it, in as many parts."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with routings(self.model) as seen, self.autocast:
            for x, targets in zip(self.x.chunk(self.accumulate), self.targets.chunk(self.accumulate), strict=True):
                seen.clear()
                logits = self.call(*any_task(self.model, x))
                with full_precision(x):
                    loss = F.cross_entropy(logits.float(), targets)
                    (loss + sum((routing.aux_loss for routing in seen), loss.new_zeros(()))).backward()
        self.optimizer.step()

    def peak(self) -> int | None:
        """Bytes that this workload holds at the peak of a step, without those of other workloads."""
        self.optimizer.zero_grad(set_to_none=True)
        state = [*self.model.parameters(), *self.model.buffers(), self.x]
        state += [t for moments in self.optimizer.state.values() for t in moments.values() if t.device == self.device]
        held = sum(t.untyped_storage().nbytes() for t in state)
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.step()
            return held + torch.cuda.max_memory_allocated(self.device) - before
        if self.compiled:
            return None
        with Live() as live:
            live.forget(state)
            self.step()
        return held + live.peak


def measure(loads: Sequence[Load], repeats: int) -> list[Timing]:
    """Times of every load, each measured `repeats` times in turn with the others.

    Raises:
        UsageError: they do not all fit into memory at once, or one of them cannot be trained.
    """
    for load in loads:
        if load.part == 1:  # the clock measures training too
            cost = account(load.model, load.num_classes)
            check_rows("batch_size", 1, load.model, cost.whole_batches, cost.tokens)
    threads, needed = torch.get_num_threads(), Counter[torch.device]()
    for load in loads:
        needed[load.device] += predict(load).peak_bytes
    for device, size in needed.items():
        free = free_memory(device)
        if size > free:
            names = " and ".join(dict.fromkeys(load.model.name for load in loads))
            raise UsageError(
                f"clock=true: {names} need {gibibytes(size)} and {device.type} has {gibibytes(free)} free; lower "
                "batch_size, measure fewer models at once, or leave clock=false"
            )
        keep_freed_memory(device, size, free)
    workloads = []
    for load in loads:
        torch.set_num_threads(threads)  # the number for loads that name none
        workloads.append(Workload(load))
    times: dict[tuple[int, str], list[float]] = {}
    for turn in range(-WARM_UP, repeats):
        for index, workload in enumerate(workloads):
            torch.set_num_threads(workload.threads)
            for kind, work in (("forward", workload.forward), ("step", workload.step)):
                wait(workload.device)
                start = time.perf_counter()
                work()
                wait(workload.device)
                if turn >= 0:
                    times.setdefault((index, kind), []).append(1000 * (time.perf_counter() - start))
    timings = []
    for index, workload in enumerate(workloads):
        forward, step = times[index, "forward"], times[index, "step"]
        middle = (statistics.median(forward), _spread(forward), statistics.median(step), _spread(step))
        timings.append(Timing(*middle, workload.peak(), workload.hardware))
    torch.set_num_threads(threads)
    return timings


def _spread(values: list[float]) -> float:
    """The distance between the quartiles."""
    low, _, high = statistics.quantiles(values, n=4)
    return high - low


def rank(values: Sequence[tuple[float, str]]) -> list[int | None]:
    """The place, from 1, of each (value, hardware) among the same hardware's, the smallest first; None where there is
    nothing to compare with: figures of different hardware say nothing about each other."""
    places: list[int | None] = []
    for value, here in values:
        rivals = [other for other, where in values if where == here]
        places.append(sum(other < value for other in rivals) + 1 if len(rivals) > 1 else None)
    return places
