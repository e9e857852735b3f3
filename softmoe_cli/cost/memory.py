"""What training holds in memory, found by a training step on tensors without contents.

The step runs the program's own operations in its own order and precision on torch's fake tensors, which have a device,
a shape and a lifetime but no storage. What is alive at once is added up, so the peak is that of the real, uncompiled
step but for what single operations borrow inside. torch.compile usually needs less.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from softmoe_cli.cost.load import Load
from softmoe_cli.cost.sharded import FirstExperts, FullyShard, indivisible
from softmoe_cli.device import precision_context
from softmoe_cli.errors import UsageError
from softmoe_cli.model.tasks import any_task
from softmoe_cli.model.vit import build, count_tokens, prepare
from softmoe_cli.moe.layer import MoE
from softmoe_cli.moe.processor import borrowed
from softmoe_cli.moe.routing import full_precision, routings
from softmoe_cli.optim import freeze, moment_bytes
from softmoe_cli.parallel import largest_share


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
    held_bytes: int
    """Bytes of what a checkpoint holds: weights, of a model with adapters those that are trained, an average of them,
    and moments."""
    saving_bytes: int
    """Bytes of divided tensors, which are joined at the end in the memory of the first process's machine."""
    beside_bytes: int = 0
    """Bytes of moments that are kept in the machine's memory instead of the device's."""

    @property
    def state_bytes(self) -> int:
        """Weights, gradients, the optimizer's moments and an average of the weights: what no batch size changes."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.average_bytes


PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm")}


class Live(TorchDispatchMode):
    """Adds up the bytes of all live tensors: `now`, and the largest sum since `peak` was last set. Buffers that matrix
    products borrow while they run are included."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked for at every operation: this answer is faster
            return args[0].fake_device
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        if func in PRODUCTS:
            self.peak = max(self.peak, self.now + borrowed(out))
        return out

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Leaves out tensors that were there before; an operation may return them again."""
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


UNPACKED_8BIT = 5
"""Float32 tensors of a parameter's size that bitsandbytes makes on a CPU to update it."""


def predict(load: Load, processes: int = 1, way: str = "ddp") -> Memory:
    """The memory of training; of several `processes` that share each batch, that of the one with the largest share.
    Where experts go on the way it is that of before or of after, whichever holds more.

    `way` is what each of them has of the model (`config.WAYS`). DistributedDataParallel (`ddp`) keeps the sum of all
    gradients in memory all the time, beside the gradients of parts of a batch that are not exchanged yet. With `fsdp`
    weights, gradients, moments and average are divided. With `expert` they are divided too, but a process has its
    experts whole, and the slots of all images for them.

    Raises:
        UsageError: a model that cannot be built, or whose sizes depend on the images.
    """
    loads = (load,) if load.keep is None else (replace(load, keep=None), load)
    return max((_predicted(each, processes, way) for each in loads), key=lambda memory: memory.peak_bytes)


def _predicted(load: Load, processes: int, way: str) -> Memory:
    device = torch.device("cpu" if load.device.type == "mps" else load.device.type)  # fake tensors know no mps
    ddp, divided = processes > 1 and way == "ddp", processes > 1 and way != "ddp"
    with torch.device("meta"):
        vit = build(load.model, load.num_classes)
    held = indivisible(vit, processes) if processes > 1 and way == "expert" else None
    if held is not None:
        raise UsageError(
            f"parallel=expert cannot divide {held} over {processes} devices; use parallel=fsdp or fewer devices"
        )
    experts = _first_experts(vit, load, processes) if divided and way == "expert" else []
    with FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
        vit._apply(lambda shape: torch.empty(shape.shape, dtype=shape.dtype, device=device)).train()  # to_empty, faster
        prepare(vit, device, load.precision)
        vit.set_grad_checkpointing(load.recompute)
        if load.optim is not None:
            freeze(vit, load.optim.freeze)
        _let_go(vit, load)
        apart = [parameter for each in experts for parameter in each.parameters()]
        shard = FullyShard(vit, processes, apart) if divided else None
        whole = sum(parameter.nbytes for parameter in vit.parameters())
        own = {each: shard.own_bytes(each) if shard else each.nbytes for each in vit.parameters()}
        images = largest_share(load.part, load.model.images_per_group, processes) * load.accumulate
        activations, peak = _step(vit, load, images, shard, live, ddp=ddp)
    weights, trained = sum(own.values()), [size for each, size in own.items() if each.requires_grad]
    peak += weights - whole
    if ddp and load.accumulate > 1:
        peak += sum(trained)
    every, average = sum(moment_bytes(load.optim, size // 4) for size in trained), weights if load.ema else 0
    moments = "fp32" if load.optim is None else load.optim.moments
    beside = every if moments == "offload" else 0
    copied = (weights if load.model.adapter.name == "none" else sum(trained)) * (2 if load.ema else 1) + every
    if moments == "8bit" and device.type == "cpu":  # the update unpacks a whole parameter's moments
        peak = max(peak, weights + sum(trained) + UNPACKED_8BIT * 4 * max(size // 4 for size in trained))
    return Memory(
        weight_bytes=weights,
        gradient_bytes=sum(trained),
        optimizer_bytes=every - beside,
        average_bytes=average,
        activation_bytes=activations,
        peak_bytes=peak + every - beside + average,
        held_bytes=copied,
        saving_bytes=copied * processes if divided else 0,
        beside_bytes=beside,
    )


def _let_go(vit: VisionTransformer, load: Load) -> None:
    """Leaves as many experts as training holds most for, of those numbers that it has once some have gone: experts of a
    router with capacity get more slots then, and the weights of those that are left are copied out."""
    tokens = count_tokens(vit)
    layers = {place: block.mlp for place, block in enumerate(vit.blocks) if isinstance(block.mlp, MoE)}
    for place, layer in layers.items():
        if layer.router.unprunable is not None:  # refused later
            continue
        e, rows = len(layer.left), {}  # of all processes
        there = len(load.left.get(place, range(e)))
        for z in range(there, min(load.keep or there, there) - 1, -1):
            if z < e:
                layer.prunable()
                layer.leave(range(z))
                rows[z] = layer.rows(tokens)
        if rows:
            layer.leave(range(max(rows, key=lambda z: rows[z])))


def _first_experts(vit: VisionTransformer, load: Load, processes: int) -> list[FirstExperts]:
    """Replaces all experts by the first process's experts, and returns those."""
    groups = -(-load.part // load.model.images_per_group)
    ends = [groups * place // processes for place in range(processes + 1)]
    of_each = sorted((end - start for start, end in pairwise(ends)), reverse=True)
    first = []
    for layer in (block.mlp for block in vit.blocks if isinstance(block.mlp, MoE)):
        first.append(FirstExperts(layer.experts, processes, of_each))
        layer.experts = first[-1]
    return first


def _step(
    vit: VisionTransformer, load: Load, images: int, shard: FullyShard | None, live: Live, *, ddp: bool
) -> tuple[int, int]:
    """Forwards and backwards, as `loop.update` does it, with `images` of each batch; inside of `live`. Returns the
    bytes of activations that the first part of the batch keeps, and of all that is alive at the peak."""
    before = live.now
    x = torch.empty(images, load.model.in_chans, *vit.patch_embed.img_size, device=next(vit.parameters()).device)
    targets = torch.empty(images, load.num_classes, device=x.device)
    live.peak, kept = live.now, 0
    parts = list(zip(x.chunk(load.accumulate), targets.chunk(load.accumulate), strict=True))
    if load.accumulate > 1 or ddp:
        parts = [parts[0], parts[-1]]  # the second part meets the first's gradients; later parts are like the second
    # As in training, autocast keeps what it has cast of weights that are not divided.
    with routings(vit) as seen, precision_context(x.device.type, load.precision, cached=shard is None):
        for part_x, part_targets in parts:
            seen.clear()
            try:
                logits = vit(*any_task(vit, part_x))
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise UsageError(
                    f"{load.model.router_name} asks what numbers a tensor holds ({error.func}), so that its cost "
                    "cannot be known before a run; write its forward pass with sizes that do not depend on the images"
                ) from error
            with full_precision(x):
                loss = F.cross_entropy(logits.float(), part_targets)
                loss = loss + sum((routing.aux_loss for routing in seen), loss.new_zeros(()))
                kept = kept or live.now - before
                loss.backward()
            if shard is not None:
                shard.finish()
    return kept, live.peak
