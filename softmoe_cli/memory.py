"""What training holds in memory, found by a training step on tensors without contents; and what to do when it is more
than there is.

The step runs the program's own operations in its own order and precision on torch's fake tensors, which have a device,
a shape and a lifetime but no storage. What is alive at once is added up, so the peak is that of the real, uncompiled
step but for what single operations borrow inside. torch.compile usually needs less.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softmoe_cli.config import Config, Model, Optim, UsageError
from softmoe_cli.device import free_memory, precision_context, prepare_attention
from softmoe_cli.models import build
from softmoe_cli.moe.routing import full_precision, routings
from softmoe_cli.optim import freeze, moments
from softmoe_cli.parallel import largest_share
from softmoe_cli.terminal import gibibytes


@dataclass(frozen=True)
class Memory:
    """Bytes of training, uncompiled. `activation_bytes` is what the forward pass of one part of a batch keeps for the
    backward pass. `peak_bytes` is the most that is alive at once; it can be less than the sum, because activations go
    while gradients come."""

    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    average_bytes: int
    activation_bytes: int
    peak_bytes: int

    @property
    def state_bytes(self) -> int:
        """Weights, gradients, the optimizer's moments and an average of the weights: what no batch size changes."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.average_bytes


class Live(TorchDispatchMode):
    """Adds up the bytes of the tensors that are alive: `now`, and `peak` since it was last set."""

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
    gradients_kept: bool = False,
) -> Memory:
    """The memory of training a config with batches of `batch` images in `accumulate` parts, weights and moments in
    float32. Without `optim` AdamW trains all of it. `gradients_kept`: as with DistributedDataParallel, whose memory
    for gradients is taken all the time, and beside it that of parts whose gradients are not exchanged yet.

    Raises:
        UsageError: a model that cannot be built, or whose sizes depend on the images.
    """
    device = torch.device("cpu" if device.type == "mps" else device.type)  # fake tensors know no mps
    with torch.device("meta"):
        vit = build(model, num_classes)
    with FakeTensorMode(allow_non_fake_inputs=True), Live() as live, routings(vit) as seen:
        vit._apply(lambda shape: torch.empty(shape.shape, dtype=shape.dtype, device=device)).train()  # to_empty, faster
        prepare_attention(vit, device, precision)
        vit.set_grad_checkpointing(recompute)
        if optim is not None:
            freeze(vit, optim.freeze)
        weights = sum(p.numel() * p.element_size() for p in vit.parameters())
        trained = sum(p.numel() * p.element_size() for p in vit.parameters() if p.requires_grad)
        before = live.now
        x = torch.empty(batch, model.in_chans, *vit.patch_embed.img_size, device=device)
        targets = torch.empty(batch, num_classes, device=device)
        live.peak, kept = live.now, 0
        with precision_context(device.type, precision):  # as in train.update, with what autocast keeps
            parts = list(zip(x.chunk(accumulate), targets.chunk(accumulate), strict=True))
            # A second part meets the gradients of the first, and later ones the same as it.
            for part_x, part_targets in (parts[0], parts[-1]) if accumulate > 1 or gradients_kept else parts:
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
        peak = live.peak + trained * (gradients_kept and accumulate > 1)
    optimizer, average = trained * (2 if optim is None else moments(optim)), weights if ema else 0
    return Memory(weights, trained, optimizer, average, kept, peak + optimizer + average)


def predict_for(config: Config, num_classes: int, device: torch.device, processes: int = 1, **changes: Any) -> Memory:
    """The memory of a configuration's training, with `changes` to its batch, accumulate or recompute; of each of
    several processes that share its batch, of the one with the largest share."""
    t = config.train
    setting: dict[str, Any] = {"batch": t.batch_size, "accumulate": t.accumulate, "recompute": t.recompute} | changes
    part = setting["batch"] // setting["accumulate"]
    setting["batch"] = largest_share(part, config.model.router, processes) * setting["accumulate"]
    setting |= {"ema": t.ema is not None, "precision": t.precision, "device": device, "optim": config.optim}
    setting["gradients_kept"] = processes > 1
    return predict(config.model, num_classes, **setting)


def require_fit(
    config: Config, num_classes: int, device: torch.device, processes: int = 1, local_processes: int = 1
) -> Memory:
    """What training will hold on each device, or the refusal of what the device has no room for. Processes of one
    machine share its memory where the device is its CPU.

    Raises:
        UsageError: it cannot fit; the message says what would.
    """
    memory, free = predict_for(config, num_classes, device, processes), free_memory(device)
    if device.type == "cpu":
        free //= local_processes
    # Uncompiled memory is an upper bound of compiled memory, so only what nothing can save refuses a compiled run.
    needed = memory.state_bytes if config.train.compile else memory.peak_bytes
    if needed <= free:
        return memory
    t = config.train
    ways: list[str] = []
    each = " for each process" if processes > 1 else ""
    have = f"needs {gibibytes(needed)} at its peak and {device.type} has {gibibytes(free)} free{each}"
    if memory.state_bytes > free:
        raise UsageError(
            f"training {config.model.name} {have}; weights, gradients and the optimizer's moments alone take "
            f"{gibibytes(memory.state_bytes)}, so choose a smaller model, fewer experts or fewer MoE blocks"
        )
    divisors = (parts for parts in range(t.accumulate + 1, t.batch_size + 1) if t.batch_size % parts == 0)
    parts = next(
        (n for n in divisors if predict_for(config, num_classes, device, processes, accumulate=n).peak_bytes <= free),
        None,
    )
    if parts is not None:
        ways.append(f"train.accumulate={parts}")
    if not t.recompute and predict_for(config, num_classes, device, processes, recompute=True).peak_bytes <= free:
        ways.append("train.recompute=true")
    batch = _largest(config, num_classes, device, free, t.batch_size - 1, processes=processes)
    if batch:
        ways.append(f"train.batch_size={batch}, the largest that fits as it is")
    if not ways:
        ways.append("a smaller model or fewer experts: nothing else fits")
    raise UsageError(f"train.batch_size={t.batch_size} {have}; set {' or '.join(ways)}")


def largest_batch(config: Config, num_classes: int, device: torch.device, images: int) -> int:
    """`train.batch_size=auto`: the largest power of two, times train.accumulate, that fits and is no more than the
    `images` there are. A power of two, so that a little less memory another day gives the same run.

    Raises:
        UsageError: not even one image a part fits.
    """
    unit = config.train.accumulate
    if (config.augment.mixup or config.augment.cutmix) and unit % 2:
        unit *= 2
    free = free_memory(device)
    found = _largest(config, num_classes, device, free, max(images, unit), unit)
    if not found:
        raise UsageError(
            f"train.batch_size=auto: {unit} images do not fit into the {gibibytes(free)} that {device.type} has free; "
            "set train.recompute=true or choose a smaller model"
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
) -> int:
    """The largest multiple of `unit` up to `top` whose peak is within `free` bytes; 0 if there is none."""
    unit = unit or config.train.accumulate

    def peak(units: int) -> int:
        return predict_for(config, num_classes, device, processes, batch=units * unit).peak_bytes

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
