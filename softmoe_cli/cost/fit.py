"""Decides once, before a run begins, how it fits into memory; proposes what would fit where the run does not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from softmoe_cli.config.recipe import Optim
from softmoe_cli.config.run import WAYS, Config
from softmoe_cli.cost.flop import Cost, account, on_meta
from softmoe_cli.cost.load import NONE_GONE, Load
from softmoe_cli.cost.memory import Memory, predict
from softmoe_cli.cost.sharded import indivisible
from softmoe_cli.data import sets
from softmoe_cli.device import arithmetic, free_memory
from softmoe_cli.errors import UsageError
from softmoe_cli.parallel import ALONE, Crew
from softmoe_cli.text import gibibytes

PLACES_8BIT = ("cpu", "cuda")
"""Where bitsandbytes has AdamW."""
MOST_DEVICES = 1024
"""The most devices that a refusal proposes."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Fit:
    """How a run fits: what each process has of the model (one of `config.WAYS`) and why, the memory that each of them
    will hold, and the bytes that were free on the device when this was decided."""

    way: str
    why: str
    memory: Memory
    free: int


def settle(load: Load, parallel: str = "auto", crew: Crew = ALONE, at_once: int = 1) -> Fit:
    """Decides how the processes of a run share the training of `load`. `parallel=auto` takes the first of
    `config.WAYS` that fits on every device, or where none does the one that needs least. `at_once`: so many runs of one
    process share the device.

    Raises:
        UsageError: the run is impossible as configured, or does not fit; the message says what would fit.
    """
    free = free_memory(load.device) // at_once
    free_of_each = _of_each(free, load.device, crew)
    if crew.size == 1:
        way, why, memory = "ddp", "", predict(load)
    elif parallel == "auto":
        way, why, memory = _first_that_fits(load, free_of_each, crew)
    else:
        if (fault := obstacle(parallel, load, crew.size)) is not None:
            raise UsageError(f"parallel={parallel} {fault}")
        way, why, memory = parallel, f"parallel={parallel}", predict(load, crew.size, parallel)
    _require_machine(memory, load.device, crew, way)
    if _needed(load, memory) > free_of_each:
        why = _Room(load, free_of_each, crew.size, way).refusal(memory)
        raise UsageError(why if at_once == 1 else f"{why}; {at_once} seeds at once share what is free")
    return Fit(way, why, memory, free)


def training_cost(load: Load) -> Cost:
    """What an image costs."""
    frozen = load.optim.freeze if load.optim is not None else []
    return account(
        load.model, load.num_classes, batch=load.part, recompute=load.recompute, frozen=frozen, left=load.left
    )


def _of_each(free: int, device: torch.device, crew: Crew) -> int:
    """Free bytes for each process: on a CPU, the processes of one machine share its memory."""
    return free // crew.local_size if device.type == "cpu" else free


def _needed(load: Load, memory: Memory) -> int:
    """Bytes that must be free. A compiled step holds less than predicted, so a compiled run is refused only for what
    compiling cannot save."""
    return memory.state_bytes if load.compile else memory.peak_bytes


def _first_that_fits(load: Load, free: int, crew: Crew) -> tuple[str, str, Memory]:
    tried: dict[str, Memory] = {}
    for way in WAYS:
        if obstacle(way, load, crew.size) is None:
            tried[way] = predict(load, crew.size, way)
            if crew.largest_of_all(_needed(load, tried[way]) - free) <= 0:
                break
    best = min(tried, key=lambda way: _needed(load, tried[way]))
    others = [f"{way} needs {gibibytes(_needed(load, memory))}" for way, memory in tried.items() if way != best]
    return best, f"auto: {', '.join(others) or 'it fits'}", tried[best]


def obstacle(way: str, load: Load, processes: int) -> str | None:
    """Why so many processes cannot share the training in this way, if they cannot."""
    if way == "ddp":
        return None
    if load.precision == "fp16":
        return "has no loss scale for train.precision=fp16; use bf16 or parallel=ddp"
    if load.optim is not None and load.optim.moments == "8bit":
        return "divides moments in fp32, not with optim.moments=8bit; set that to fp32, or parallel=ddp"
    if way == "fsdp":
        return None
    whole = indivisible(on_meta(load.model, load.num_classes), processes)
    if whole is not None:
        return f"cannot divide {whole} over {processes} processes; use parallel=fsdp or fewer devices"
    return None


def require_place(optim: Optim, device: torch.device, processes: int = 1) -> None:
    """Raises UsageError if the optimizer's moments cannot be kept as configured on this device, or in so many
    processes."""
    fault = _misplaced(optim, device, processes)
    if fault is not None:
        raise UsageError(f"optim.moments={optim.moments} {fault}")


def _misplaced(optim: Optim, device: torch.device, processes: int) -> str | None:
    if optim.moments == "offload" and device.type != "cuda":
        return f"has no effect with device={device.type}, whose memory is the machine's; set it to fp32"
    if optim.moments == "offload" and processes > 1:
        return f"is for one device, and there are {processes}; set it to fp32, which parallel=fsdp divides"
    if optim.moments == "8bit" and device.type not in PLACES_8BIT:
        return f"is for {' and '.join(PLACES_8BIT)}, not {device.type}; set it to fp32"
    return None


def _require_machine(memory: Memory, device: torch.device, crew: Crew, way: str) -> None:
    """Raises UsageError if the machine has no room for what is kept or joined in its own memory instead of the
    device's."""
    machine = free_memory(CPU)
    if memory.beside_bytes > machine:
        raise UsageError(
            f"optim.moments=offload keeps {gibibytes(memory.beside_bytes)} in the machine's memory, which has "
            f"{gibibytes(machine)} free; choose a machine with more memory, a smaller model or fewer experts"
        )
    trained_there = (memory.state_bytes - memory.gradient_bytes) * crew.local_size if device.type == "cpu" else 0
    if memory.saving_bytes and memory.saving_bytes + trained_there > machine:
        raise UsageError(
            f"parallel={way} joins {gibibytes(memory.saving_bytes)} of weights and moments in the first process's "
            f"memory at the end, and its machine has {gibibytes(machine)} free; choose a machine with more "
            "memory, a smaller model or fewer experts"
        )


@dataclass(frozen=True)
class _Room:
    """Changes to a load that does not fit, with which it would fit into `free` bytes of each process."""

    load: Load
    free: int
    processes: int
    way: str

    def refusal(self, memory: Memory) -> str:
        """Why the load does not fit, and every single change that would make it fit."""
        load, needed = self.load, gibibytes(_needed(self.load, memory))
        have = f"needs {needed} at its peak and {load.device.type} has {gibibytes(self.free)} free"
        if self.processes > 1:
            have += f" for each process with parallel={self.way}"
        changes = [*self._divided(memory), *self._smaller_moments()]
        if memory.state_bytes > self.free:
            smaller = "choose a smaller model, fewer experts or fewer MoE blocks"
            return (
                f"training {load.model.name} {have}; weights, gradients and the optimizer's moments alone take "
                f"{gibibytes(memory.state_bytes)}, so {' or '.join([*(f'set {each}' for each in changes), smaller])}"
            )
        changes += self._smaller_batches()
        if not changes:
            changes.append("a smaller model or fewer experts: nothing else fits")
        return f"train.batch_size={load.batch} {have}; set {' or '.join(changes)}"

    def _peak(self, load: Load) -> int:
        return predict(load, self.processes, self.way).peak_bytes

    def _divided(self, memory: Memory) -> list[str]:
        """Other ways to share the training, by as many processes or more. More of them bring no memory where the device
        is the machine's CPU."""
        load, changes = self.load, []
        vit = on_meta(load.model, load.num_classes)
        if load.precision == "fp16" or (load.optim is not None and load.optim.moments != "fp32"):
            return []  # neither works with divided weights
        state = memory.state_bytes * (1 if self.way == "ddp" else self.processes)
        groups = load.part // load.model.images_per_group
        most = min(groups, MOST_DEVICES if load.device.type == "cuda" else self.processes)
        for way in WAYS[max(1, WAYS.index(self.way)) :]:
            size = 2 * self.processes if way == self.way else max(2, self.processes)
            while size <= most:
                possible = state <= size * self.free and (way != "expert" or indivisible(vit, size) is None)
                if possible and predict(load, size, way).peak_bytes <= self.free:  # a prediction takes a second
                    changes.append(f"parallel={way} on {size} devices" if size > self.processes else f"parallel={way}")
                    break
                size *= 2
        return changes

    def _smaller_moments(self) -> list[str]:
        optim, found = self.load.optim, []
        if optim is None or optim.name != "adamw" or optim.moments != "fp32" or self.way != "ddp":
            return []
        for moments in ("8bit", "offload"):
            other = replace(optim, moments=moments)
            if _misplaced(other, self.load.device, self.processes) is None:
                held = predict(replace(self.load, optim=other), self.processes, self.way)
                if _needed(self.load, held) <= self.free and held.beside_bytes <= free_memory(CPU):
                    found.append(f"optim.moments={moments}")
        return found

    def _smaller_batches(self) -> list[str]:
        """Smaller batches: more parts, recomputation, fewer images."""
        load, changes, group = self.load, [], self.load.model.images_per_group
        divisors = (n for n in range(load.accumulate + 1, load.batch + 1) if load.batch % (n * group) == 0)
        fitting = (n for n in divisors if self._peak(replace(load, accumulate=n)) <= self.free)
        whole = account(load.model, load.num_classes).whole_batches
        parts = next(fitting, None) if whole is None else None
        if parts is not None:
            changes.append(f"train.accumulate={parts}")
        if not load.recompute and self._peak(replace(load, recompute=True)) <= self.free:
            changes.append("train.recompute=true")
        unit = 1
        if load.accumulate > 1 or load.batch % group == 0:
            unit = load.accumulate * group
        if batch := self.largest(load.batch - 1, unit):
            changes.append(f"train.batch_size={batch}, the largest that fits as it is")
        return changes

    def largest(self, top: int, unit: int) -> int:
        """The largest batch up to `top`, a multiple of `unit`, that fits; 0 if there is none."""
        found = last_within(lambda units: self._peak(replace(self.load, batch=units * unit)), self.free, top // unit)
        return unit * found


def with_largest_batch(config: Config, left: Mapping[int, Sequence[int]] = NONE_GONE, sharers: int = 1) -> Config:
    """The configuration with a number for `train.batch_size=auto`, so that the number is in the signature.

    Args:
        left: the experts of the weights that the run begins with, by block, where some were pruned.
        sharers: runs that will share the device at a time.
    """
    device, _ = arithmetic(config.device, config.train.precision, config.threads)
    require_place(config.optim, device)
    splits = sets.load(config.data)
    load = Load.of(config, sets.num_classes(config.data, splits), device, left)
    paired = bool(config.augment.mixup or config.augment.cutmix)
    batch = largest_batch(load, len(splits.train), paired=paired, sharers=sharers)
    return replace(config, train=replace(config.train, batch_size=batch)).settled()


def largest_batch(load: Load, images: int, *, paired: bool, sharers: int = 1) -> int:
    """The largest power of two, times the parts of a batch and the images of a routing group, that fits and is no more
    than the `images` there are. A power of two, so that a little less memory another day gives the same run.

    Args:
        load: its batch does not count.
        paired: mixup or cutmix mix images two by two.
        sharers: runs among which the device's memory is divided.

    Raises:
        UsageError: not even one image, or group of images, a part fits.
    """
    unit = load.accumulate * load.model.images_per_group
    if paired and unit % 2:
        unit *= 2
    free = free_memory(load.device) // sharers
    found = _Room(load, free, 1, "ddp").largest(max(images, unit), unit)
    if not found:
        each = " for each job" if sharers > 1 else ""
        raise UsageError(
            f"train.batch_size=auto: {unit} images do not fit into the {gibibytes(free)} that {load.device.type} has "
            f"free{each}; set train.recompute=true or choose a smaller model"
        )
    return unit * 2 ** ((found // unit).bit_length() - 1)


def last_within(size: Callable[[int], int], limit: int, top: int) -> int:
    """The largest i from 1 to `top` with size(i) <= limit, 0 if there is none. `size` grows, nearly along a line."""
    if top < 1 or (low_size := size(1)) > limit:
        return 0
    if (high_size := size(top)) <= limit:
        return top
    low, high, halve = 1, top, False
    while high - low > 1:
        share = 0.5 if halve else (limit - low_size) / (high_size - low_size)
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        found = size(middle)
        halve = not halve and min(middle - low, high - middle) > 1
        if found <= limit:
            low, low_size = middle, found
        else:
            high, high_size = middle, found
    return low
