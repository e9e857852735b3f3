"""What training holds in memory, found by a training step on tensors without contents; and what to do when it is more
than there is.

The step runs the program's own operations in its own order and precision on torch's fake tensors, which have a device,
a shape and a lifetime but no storage. What is alive at once is added up, so the peak is that of the real, uncompiled
step but for what single operations borrow inside. torch.compile usually needs less.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softmoe_cli.config import WAYS, Config, Model, Optim, UsageError, group_of
from softmoe_cli.device import free_memory, precision_context
from softmoe_cli.models import build, prepare
from softmoe_cli.moe.divided import DividedExperts, span
from softmoe_cli.moe.layer import Experts, MoE, ragged_experts
from softmoe_cli.moe.processor import borrowed
from softmoe_cli.moe.routing import full_precision, routings
from softmoe_cli.optim import freeze, moment_bytes
from softmoe_cli.parallel import cut_axis, largest_share
from softmoe_cli.text import gibibytes


@dataclass(frozen=True)
class Memory:
    """Bytes of training on one device, uncompiled. `activation_bytes` is what the forward pass of one part of a batch
    keeps for the backward pass. `peak_bytes` is the most that is alive at once; it can be less than the sum, because
    activations go while gradients come, and more, because divided weights are gathered to be computed with."""

    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    average_bytes: int
    activation_bytes: int
    peak_bytes: int
    saving_bytes: int
    """Of what is divided, joined at the end in the memory of the first process's machine."""
    beside_bytes: int = 0
    """Of moments that are kept in the machine's memory instead of the device's."""

    @property
    def state_bytes(self) -> int:
        """Weights, gradients, the optimizer's moments and an average of the weights: what no batch size changes."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.average_bytes


PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm")}


class Live(TorchDispatchMode):
    """Adds up the bytes of the tensors that are alive: `now`, and `peak` since it was last set, which knows what
    products borrow besides."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked at every turn, answered here in a fraction of the time
            return args[0].fake_device
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        if func in PRODUCTS:
            self.peak = max(self.peak, self.now + borrowed(out))
        return out

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Tensors from before, which an operation may return again and which are not to be added."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def divides(router: dict[str, Any], processes: int) -> bool:
    """Whether each of so many processes can have some experts of every MoE layer."""
    return (router.get("num_experts") or 0) >= processes


class _Sent(torch.autograd.Function):
    """Rows that others get, and as many as come from them, there and back: memory without a message."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, arriving: int) -> Tensor:
        ctx.leaving = len(rows)
        return rows.new_empty(arriving, rows.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        sent = gradients[0].contiguous()
        return sent.new_empty(ctx.leaving, sent.shape[1]), None


class _FirstExperts(DividedExperts):
    """What the first of several processes has of a layer's experts, and alone."""

    def __init__(self, whole: Experts, processes: int, groups: list[int]) -> None:
        nn.Module.__init__(self)
        self.gelu, self._groups = whole.gelu, groups
        ends = [span(len(whole.w1), processes, place) for place in range(processes)]
        self._counts = [end - start for start, end in ends]
        self._mesh: Any = SimpleNamespace(get_local_rank=lambda: 0)
        for name, parameter in whole.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter[: self._counts[0]].detach()))

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.w1, self.b1, self.w2, self.b2

    def _exchange(self, rows: Tensor, there: list[int], back: list[int]) -> Tensor:
        arrived: Tensor = _Sent.apply(rows.contiguous(), sum(back))
        return arrived

    def _ragged(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """As if all experts had as many rows: which have more, only the images know."""
        turned = torch.cat(self._exchange(rows, [], [len(rows)]).split(1 + len(rows) // 2))
        made = ragged_experts(turned, offsets[: self._counts[0]], *self._weights(), self.gelu)
        return self._exchange(torch.cat(made.split(1 + len(rows) // 2)), [], [len(rows)])


class _Spread:
    """What torch's fully_shard holds on a process beside what a step holds anyway: memory taken and let go where it
    does that. The model under it stays whole; its weights are not to be counted.

    The weights of a block, or of what lies outside of all blocks, are gathered before it computes, forwards and
    backwards, through a buffer of their size that stays until the next block's is there; on the way back that is before
    the block is done. Its gradients are whole until a second buffer has been filled with them to be added up, and that
    buffer stays until the next block's.
    """

    def __init__(self, vit: VisionTransformer, processes: int, apart: Iterable[nn.Parameter]) -> None:
        """`apart` are the parameters that are not divided, beside those that are single numbers."""
        self._processes = processes
        self._apart = {*apart, *(parameter for parameter in vit.parameters() if not parameter.ndim)}
        blocks = [list(block.parameters()) for block in vit.blocks]
        inside = {parameter for block in blocks for parameter in block}
        outside = [parameter for parameter in vit.parameters() if parameter not in inside]
        self._groups = [[p for p in group if p not in self._apart] for group in (*blocks, outside)]
        self._outside = len(blocks)
        self._device = next(vit.parameters()).device
        self._whole: dict[int, Tensor] = {}
        self._summed: dict[int, Tensor] = {}
        self._waiting = set(range(len(self._groups)))
        self._buffer: Tensor | None = None
        self._sums: Tensor | None = None
        self._on_the_way_back = False
        vit.register_forward_pre_hook(lambda _module, _inputs: self._gather(self._outside))
        for group, block in enumerate(vit.blocks):
            block.register_forward_pre_hook(lambda _module, inputs, group=group: self._before(group, inputs[0]))
            block.register_forward_hook(lambda _module, _inputs, out, group=group: self._after(group, out))
        vit.register_forward_hook(lambda _module, _inputs, out: self._turn(out))

    def own_bytes(self, parameter: nn.Parameter) -> int:
        """Of the process with the largest piece."""
        if parameter in self._apart:
            return parameter.nbytes
        length = parameter.shape[cut_axis(parameter.shape, self._processes)]
        return parameter.numel() // length * -(-length // self._processes) * parameter.element_size()

    def _take(self, parameters: Iterable[nn.Parameter], pieces: int) -> Tensor:
        size = sum(map(self.own_bytes, parameters)) * pieces
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _all_of(self, group: int) -> Tensor:
        return self._take(self._groups[group], self._processes)

    def _copy_out(self, group: int) -> None:
        """Out of the buffer; what was not cut along its first axis is put together on the way."""
        self._whole[group] = self._all_of(group)
        self._take((p for p in self._groups[group] if cut_axis(p.shape, self._processes)), self._processes)

    def _gather(self, group: int) -> None:
        self._buffer = self._all_of(group)  # while the one before is still there
        self._copy_out(group)

    def _before(self, group: int, x: Tensor) -> None:
        if self._on_the_way_back:  # recomputation
            return
        self._gather(group)

        def back(_gradient: Tensor) -> None:
            self._leave(group)
            if group:
                self._enter(group - 1)

        if x.requires_grad:
            x.register_hook(back)

    def _after(self, group: int, out: Tensor) -> None:
        if self._on_the_way_back:
            return
        del self._whole[group]
        if group == self._outside - 1 and out.requires_grad:
            out.register_hook(lambda _gradient: self._enter(group))

    def _turn(self, out: Tensor) -> None:
        self._buffer, self._on_the_way_back = None, True
        self._waiting = set(range(len(self._groups)))
        del self._whole[self._outside]

        def back(_gradient: Tensor) -> None:
            self._buffer = self._all_of(self._outside)
            self._enter(self._outside)

        out.register_hook(back)

    def _enter(self, group: int) -> None:
        self._copy_out(group)
        self._buffer = None
        if group:
            self._buffer = self._all_of(group - 1)

    def _leave(self, group: int) -> None:
        self._whole.pop(group, None)
        self._waiting.discard(group)
        self._sums = None
        trained = [parameter for parameter in self._groups[group] if parameter.grad is not None]
        self._sums = self._take(trained, self._processes)
        for parameter in trained:
            parameter.grad = None
        self._summed.setdefault(group, self._take(trained, 1))  # a later part's is added to the first's and goes

    def finish(self) -> None:
        """The end of a backward pass."""
        for group in sorted(self._waiting):
            self._leave(group)
        self._sums = self._buffer = None
        self._on_the_way_back = False


def predict(
    model: Model,
    num_classes: int,
    *,
    batch: int,
    accumulate: int,
    recompute: bool,
    ema: bool,
    precision: str,
    device: torch.device,
    optim: Optim | None = None,
    processes: int = 1,
    way: str = "ddp",
) -> Memory:
    """The memory of training a config with batches of `batch` images in `accumulate` parts, weights and moments in
    float32. Without `optim` AdamW trains all of it. Of `processes` that share the batch it is that of the one with the
    largest share.

    `way` is how they do that. DistributedDataParallel (`ddp`) takes its memory for gradients for all the time, and
    beside it that of parts whose gradients are not exchanged yet. With `fsdp` weights, gradients, moments and average
    are divided, with `expert` they are too, but a process has its experts whole and the slots of all images for them.

    Raises:
        UsageError: a model that cannot be built, or whose sizes depend on the images.
    """
    if processes > 1 and way == "expert" and not divides(model.router, processes):
        experts = model.router.get("num_experts") or "no"
        raise UsageError(
            f"parallel=expert cannot divide {experts} experts over {processes} devices; use parallel=fsdp or fewer "
            "devices"
        )
    device = torch.device("cpu" if device.type == "mps" else device.type)  # fake tensors know no mps
    ddp, divided = processes > 1 and way == "ddp", processes > 1 and way != "ddp"
    part = batch // accumulate
    groups = -(-part // group_of(model.router))
    ends = [groups * place // processes for place in range(processes + 1)]
    everyones = sorted((end - start for start, end in pairwise(ends)), reverse=True)
    batch = largest_share(part, model.router, processes) * accumulate
    with torch.device("meta"):
        vit = build(model, num_classes)
    layers = [block.mlp for block in vit.blocks if isinstance(block.mlp, MoE)] if divided and way == "expert" else []
    for layer in layers:
        layer.experts = _FirstExperts(layer.experts, processes, everyones)
    with FakeTensorMode(allow_non_fake_inputs=True), Live() as live, routings(vit) as seen:
        vit._apply(lambda shape: torch.empty(shape.shape, dtype=shape.dtype, device=device)).train()  # to_empty, faster
        prepare(vit, device, precision)
        vit.set_grad_checkpointing(recompute)
        if optim is not None:
            freeze(vit, optim.freeze)
        apart = [parameter for layer in layers for parameter in layer.experts.parameters()]
        spread = _Spread(vit, processes, apart) if divided else None
        whole = {parameter: parameter.nbytes for parameter in vit.parameters()}
        own = {parameter: spread.own_bytes(parameter) if spread else size for parameter, size in whole.items()}
        weights = sum(own.values())
        trained = sum(size for parameter, size in own.items() if parameter.requires_grad)
        before = live.now
        x = torch.empty(batch, model.in_chans, *vit.patch_embed.img_size, device=device)
        targets = torch.empty(batch, num_classes, device=device)
        live.peak, kept = live.now, 0
        with precision_context(device.type, precision, cached=not divided):  # as in train.update, with what it keeps
            parts = list(zip(x.chunk(accumulate), targets.chunk(accumulate), strict=True))
            # A second part meets the gradients of the first, and later ones the same as it.
            for part_x, part_targets in (parts[0], parts[-1]) if accumulate > 1 or ddp else parts:
                seen.clear()
                try:
                    logits = vit(part_x)
                except (DataDependentOutputException, DynamicOutputShapeException) as error:
                    raise UsageError(
                        f"{model.router_name} asks what numbers a tensor holds ({error.func}), so that its cost cannot "
                        "be known before a run; write its forward pass with sizes that do not depend on the images"
                    ) from error
                with full_precision(x):
                    loss = F.cross_entropy(logits.float(), part_targets)
                    loss = loss + sum((routing.aux_loss for routing in seen), loss.new_zeros(()))
                    kept = kept or live.now - before
                    loss.backward()
                if spread is not None:
                    spread.finish()
        peak = live.peak - sum(whole.values()) + weights + trained * (ddp and accumulate > 1)
    numbers = [size // 4 for parameter, size in own.items() if parameter.requires_grad]
    every, average = sum(moment_bytes(optim, count) for count in numbers), weights if ema else 0
    kept_as = "fp32" if optim is None else optim.moments
    beside = every * (kept_as == "offload")
    optimizer = every - beside
    if kept_as == "8bit" and device.type == "cpu":  # the update unpacks a whole parameter's moments
        peak = max(peak, weights + trained + UNPACKED_8BIT * 4 * max(numbers))
    saving = (weights + every + average) * processes * divided
    return Memory(weights, trained, optimizer, average, kept, peak + optimizer + average, saving, beside)


def predict_for(
    config: Config, num_classes: int, device: torch.device, processes: int = 1, way: str = "ddp", **changes: Any
) -> Memory:
    """The memory of a configuration's training, with `changes` to what `predict` is told, on each of
    `processes` that share its batch in this way."""
    t = config.train
    setting: dict[str, Any] = {"batch": t.batch_size, "accumulate": t.accumulate, "recompute": t.recompute}
    setting |= {"ema": t.ema is not None, "precision": t.precision, "device": device, "optim": config.optim}
    return predict(config.model, num_classes, processes=processes, way=way, **setting | changes)


def require_place(optim: Optim, device: torch.device, processes: int = 1) -> None:
    """Raises:
    UsageError: the moments cannot be kept so on this device, or on so many.
    """
    if optim.moments == "offload" and device.type != "cuda":
        raise UsageError(
            f"optim.moments=offload has no effect with device={device.type}, whose memory is the machine's; set it to "
            "fp32"
        )
    if optim.moments == "offload" and processes > 1:
        raise UsageError(
            f"optim.moments=offload is for one device, and there are {processes}; set it to fp32, which parallel=fsdp "
            "divides"
        )
    if optim.moments == "8bit" and device.type not in PLACES_8BIT:
        raise UsageError(f"optim.moments=8bit is for {' and '.join(PLACES_8BIT)}, not {device.type}; set it to fp32")


def require_fit(
    config: Config,
    num_classes: int,
    device: torch.device,
    processes: int = 1,
    local_processes: int = 1,
    way: str = "ddp",
) -> Memory:
    """What training will hold on each device, or the refusal of what the device has no room for. Processes of one
    machine share its memory where the device is its CPU.

    Raises:
        UsageError: it cannot fit; the message says what would.
    """
    memory, free = predict_for(config, num_classes, device, processes, way), free_memory(device)
    if device.type == "cpu":
        free //= local_processes
    machine = free_memory(torch.device("cpu"))
    if memory.beside_bytes > machine:
        raise UsageError(
            f"optim.moments=offload keeps {gibibytes(memory.beside_bytes)} in the machine's memory, which has "
            f"{gibibytes(machine)} free; choose a machine with more memory, a smaller model or fewer experts"
        )
    beside = (memory.state_bytes - memory.gradient_bytes) * local_processes if device.type == "cpu" else 0
    if memory.saving_bytes and memory.saving_bytes + beside > machine:
        raise UsageError(
            f"parallel={way} joins {gibibytes(memory.saving_bytes)} of weights and moments in the first process's "
            f"memory at the end, and its machine has {gibibytes(machine)} free; choose a machine with more "
            "memory, a smaller model or fewer experts"
        )

    def needs(memory: Memory) -> int:
        # Uncompiled memory is an upper bound of compiled memory, so only what nothing can save refuses a compiled run.
        return memory.state_bytes if config.train.compile else memory.peak_bytes

    needed = needs(memory)
    if needed <= free:
        return memory
    t = config.train
    each = f" for each process with parallel={way}" if processes > 1 else ""
    have = f"needs {gibibytes(needed)} at its peak and {device.type} has {gibibytes(free)} free{each}"

    def peak(**changes: int) -> int:
        return predict_for(config, num_classes, device, processes, way, **changes).peak_bytes

    ways = _divided(config, num_classes, device, free, memory, processes, way)
    if config.optim.name == "adamw" and config.optim.moments == "fp32" and way == "ddp":
        for moments in ("8bit", "offload"):
            with contextlib.suppress(UsageError):
                other = replace(config.optim, moments=moments)
                require_place(other, device, processes)
                held = predict_for(config, num_classes, device, processes, way, optim=other)
                if needs(held) <= free and held.beside_bytes <= machine:
                    ways.append(f"optim.moments={moments}")
    if memory.state_bytes > free:
        smaller = "choose a smaller model, fewer experts or fewer MoE blocks"
        raise UsageError(
            f"training {config.model.name} {have}; weights, gradients and the optimizer's moments alone take "
            f"{gibibytes(memory.state_bytes)}, so {' or '.join([*(f'set {each}' for each in ways), smaller])}"
        )
    group = group_of(config.model.router)
    divisors = (parts for parts in range(t.accumulate + 1, t.batch_size + 1) if t.batch_size % (parts * group) == 0)
    parts = next((n for n in divisors if peak(accumulate=n) <= free), None)
    if parts is not None:
        ways.append(f"train.accumulate={parts}")
    if not t.recompute and peak(recompute=True) <= free:
        ways.append("train.recompute=true")
    batch = _largest(config, num_classes, device, free, t.batch_size - 1, processes=processes, way=way)
    if batch:
        ways.append(f"train.batch_size={batch}, the largest that fits as it is")
    if not ways:
        ways.append("a smaller model or fewer experts: nothing else fits")
    raise UsageError(f"train.batch_size={t.batch_size} {have}; set {' or '.join(ways)}")


PLACES_8BIT = ("cpu", "cuda")
"""Where bitsandbytes has AdamW."""
UNPACKED_8BIT = 5
"""Float32 tensors of a parameter's size that bitsandbytes makes on a CPU to update it."""
MOST_DEVICES = 1024
"""Nobody is told to take more."""


def _divided(
    config: Config, num_classes: int, device: torch.device, free: int, memory: Memory, processes: int, way: str
) -> list[str]:
    """Other ways to share the training among processes, as many as there are or more, that fit into `free` bytes. More
    processes bring no memory where the device is the machine's CPU."""
    router, found = config.model.router, []
    state = memory.state_bytes * (1 if way == "ddp" else processes)
    groups = config.train.batch_size // config.train.accumulate // group_of(router)
    most = min(groups, MOST_DEVICES if device.type == "cuda" else processes)
    if config.train.precision == "fp16" or config.optim.moments != "fp32":  # what is divided has neither
        return []
    for other in WAYS[max(1, WAYS.index(way)) :]:
        size = 2 * processes if other == way else max(2, processes)
        while size <= most:
            possible = state <= size * free and (other != "expert" or divides(router, size))  # a quick look first
            if possible and predict_for(config, num_classes, device, size, other).peak_bytes <= free:
                found.append(f"parallel={other}" + f" on {size} devices" * (size > processes))
                break
            size *= 2
    return found


def largest_batch(config: Config, num_classes: int, device: torch.device, images: int, sharers: int = 1) -> int:
    """`train.batch_size=auto`: the largest power of two, times train.accumulate and images_per_group, that fits and is
    no more than the `images` there are. A power of two, so that a little less memory another day gives the same run.
    `sharers`: runs among which the device's memory is divided.

    Raises:
        UsageError: not even one image, or group of images, a part fits.
    """
    unit = config.train.accumulate * group_of(config.model.router)
    if (config.augment.mixup or config.augment.cutmix) and unit % 2:
        unit *= 2
    free = free_memory(device) // sharers
    found = _largest(config, num_classes, device, free, max(images, unit), unit)
    if not found:
        raise UsageError(
            f"train.batch_size=auto: {unit} images do not fit into the {gibibytes(free)} that {device.type} has free"
            f"{' for each job' * (sharers > 1)}; set train.recompute=true or choose a smaller model"
        )
    return unit * 2 ** ((found // unit).bit_length() - 1)


def _largest(
    config: Config,
    num_classes: int,
    device: torch.device,
    free: int,
    top: int,
    unit: int | None = None,
    processes: int = 1,
    way: str = "ddp",
) -> int:
    """The largest multiple of `unit` up to `top` whose peak is within `free` bytes; 0 if there is none."""
    if unit is None:
        group, parts = group_of(config.model.router), config.train.accumulate
        unit = parts * group if parts > 1 or config.train.batch_size % group == 0 else 1

    def peak(units: int) -> int:
        return predict_for(config, num_classes, device, processes, way, batch=units * unit).peak_bytes

    return unit * last_within(peak, free, top // unit)


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
