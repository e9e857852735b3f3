"""Several processes that train one model: who does what, who has what, and what they tell each other.

Every process runs the same loop. It takes a run of whole routing groups from each part of a batch. Sums are added up
over all processes; what only one process can do (files, W&B, the terminal), the first one does. Every process draws
noise for the whole batch and keeps its own rows, so that the numbers do not depend on the number of processes.

Each process has the whole model (ddp), a part of every weight (fsdp), or some experts of each layer and a part of all
other weights (expert). Parts are DTensors; gradients, moments and averages are divided as the weights are.
"""

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from softmoe_cli.config.run import Config, check_shared_groups
from softmoe_cli.device import cores
from softmoe_cli.errors import RunError, UsageError, first_line
from softmoe_cli.moe.divided import DividedExperts, span
from softmoe_cli.moe.kind import Decider
from softmoe_cli.moe.layer import MoE
from softmoe_cli.moe.routing import of_whole_batch, whole_batch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Shard
    from typing_extensions import TypeIs

T = TypeVar("T")

TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun says to each process that it starts."""
ATTEMPT = "TORCHELASTIC_RESTART_COUNT"
"""How often the processes of this run were started again."""
PATIENCE = timedelta(minutes=30)
"""How long a process waits for another one, which may be writing a checkpoint."""


class Lost(RunError):
    """Another process is gone; that process says why."""


@dataclass(frozen=True)
class Share:
    """Which images of each part of a batch are a process's own: `first` up to, not including, `last` of `total`."""

    first: int
    last: int
    total: int
    of_groups: float
    """Its share of the part's routing groups, over which auxiliary losses are means."""

    @property
    def of_images(self) -> float:
        return (self.last - self.first) / self.total

    def rows(self, parts: int) -> Tensor | slice:
        """The positions of its images in a batch of `parts` parts."""
        if self.last - self.first == self.total:
            return slice(None)
        own = torch.arange(self.first, self.last)
        return torch.cat([own + self.total * part for part in range(parts)])


@dataclass(frozen=True)
class Turns:
    """Which batches of an evaluation belong to this process, and how the findings of all processes come together."""

    batches: int
    crew: "Crew"

    @property
    def own(self) -> list[int]:
        """The batches of this process. Every process gets the same number, because a model with divided weights needs
        all processes for each batch; a batch too many repeats the first one and is not counted."""
        rounds = -(-self.batches // self.crew.size)
        turns = range(self.crew.rank, rounds * self.crew.size, self.crew.size)
        return [turn if turn < self.batches else 0 for turn in turns]

    def collect(self, found: list[T]) -> list[T]:
        """The findings for all batches, in the order of the batches, from the findings for this process's own
        batches."""
        if self.crew.size == 1:
            return found
        everyones = self.crew.gather(tree_map_only(Tensor, Tensor.cpu, found))
        return [item for items in zip(*everyones, strict=True) for item in items][: self.batches]


class Crew:
    """The processes of one run, as one of them sees them. A process that is alone gets its own values back at once."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self._aside: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if dist.is_initialized() else None
        self.way, self.why = "ddp", ""
        """What each has of the model, one of `config.WAYS`, and why: settled once, at the start."""
        self._undivided: list[nn.Parameter] = []

    @property
    def first(self) -> bool:
        """Whether it is this process that writes and speaks."""
        return self.rank == 0

    def share(self, config: Config) -> Share:
        """This process's images of each part of a batch: whole routing groups, as many for each process as for others
        or one more.

        Raises:
            UsageError: too few groups for so many processes, or some that are not full where blocks have others.
        """
        ends = self._ends(config)
        images = config.train.batch_size // config.train.accumulate
        group = config.model.images_per_group
        start, end = ends[self.rank : self.rank + 2]
        return Share(start * group, min(end * group, images), images, (end - start) / ends[-1])

    def _ends(self, config: Config) -> list[int]:
        """Where everyone's routing groups of each part of a batch end, from 0."""
        images = config.train.batch_size // config.train.accumulate
        group = config.model.images_per_group
        check_shared_groups(config, self.size)  # torchrun knows how many there are
        groups = -(-images // group)
        if groups < self.size:
            kind = f"groups of model.router.images_per_group={group} images" if group > 1 else "images"
            raise UsageError(
                f"{self.size} processes cannot divide {groups} {kind}, which is what each of "
                f"train.accumulate={config.train.accumulate} parts of train.batch_size={config.train.batch_size} has; "
                f"use at most {groups} devices, a larger batch or fewer parts"
            )
        return [groups * place // self.size for place in range(self.size + 1)]

    def describe(self, config: Config) -> str:
        """What each does, for the header."""
        share = self.share(config)
        machines = self.size // self.local_size
        where = f" on {machines} machines" if machines > 1 else ""
        has = {
            "ddp": "data parallel (ddp): each has the whole model",
            "fsdp": f"fully sharded (fsdp): each has 1/{self.size} of every weight and gathers a block's to compute it",
            "expert": f"expert parallel (expert): each has 1/{self.size} of a layer's experts, to which all send their "
            "rows, and of all other weights",
        }[self.way]
        own = f"{share.last - share.first} of {share.total} images"
        return f"{self.size}{where}, {has} ({self.why}); this one takes {own} at a time"

    def turns(self, images: int, batch_size: int) -> Turns:
        return Turns(-(-images // batch_size), self)

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest_of_all(self, number: float) -> float:
        """The largest of all processes' numbers, so that all processes decide by the same number."""
        if self.size == 1:
            return number
        known = torch.tensor([number], dtype=torch.float64)
        dist.all_reduce(known, dist.ReduceOp.MAX)
        return known.item()

    def ask_first(self, question: Callable[[], T]) -> T:
        """The first process's answer; no other one is asked."""
        if self.size == 1:
            return question()
        box: list[Any] = [question() if self.first else None]
        dist.broadcast_object_list(box)
        return box[0]

    def gather(self, items: T) -> list[T]:
        """The items of all processes, by rank."""
        if self.size == 1:
            return [items]
        everyones: list[Any] = [None] * self.size
        dist.all_gather_object(everyones, items)
        return everyones

    def gather_aside(self, items: T) -> list[T]:
        """`gather` for the threads that write checkpoints, apart from the messages of the training loops."""
        everyones: list[Any] = [None] * self.size
        dist.all_gather_object(everyones, items, group=self._aside)
        return everyones

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process of each machine goes first, the others when it is done: for files that are downloaded."""
        if self.size > 1 and self.local_rank:
            dist.barrier()
        yield
        if self.size > 1 and not self.local_rank:
            dist.barrier()

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """The processes of a machine one after the other, if they divide the model: each has the whole model in
        here."""
        turns = int(self.largest_of_all(self.local_size)) if self.way != "ddp" else 0
        before = min(self.local_rank, turns)
        for _ in range(before):
            dist.barrier()
        yield
        for _ in range(turns - before):
            dist.barrier()

    def joules(self, own: float | None, device: torch.device) -> float | None:
        """What all devices used; a CPU is counted once, by its first process. None where one does not tell."""
        if self.size == 1:
            return own
        counted = math.nan if own is None else own if device.type != "cpu" or self.local_rank == 0 else 0.0
        total = self.add(torch.tensor(counted, dtype=torch.float64)).item()
        return None if math.isnan(total) else total

    def spread(self, model: VisionTransformer, config: Config, device: torch.device) -> None:
        """Moves this process's part of a model to the device and frees the rest, block by block."""
        if self.way == "ddp":
            model.to(device)
            return
        from torch.distributed.fsdp import fully_shard

        assert dist.group.WORLD is not None
        mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
        apart = {parameter for parameter in model.parameters() if parameter.ndim == 0}  # one number cannot be divided
        for number in apart:
            number.data = number.data.to(device)
        groups = [end - start for start, end in pairwise(self._ends(config))]
        for block in model.blocks:
            if self.way == "expert" and isinstance(block.mlp, MoE):
                block.mlp.experts = DividedExperts(block.mlp.experts, mesh, groups)
                apart |= set(block.mlp.experts.parameters())
        for module in [*model.blocks, model]:
            # The root too gives back what it gathered: an evaluation, and what follows it, must not meet old weights.
            fully_shard(
                module, mesh=mesh, reshard_after_forward=True, shard_placement_fn=self._axis, ignored_params=apart
            )
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def _axis(self, parameter: nn.Parameter) -> "Shard":
        from torch.distributed.tensor import Shard

        return Shard(cut_axis(parameter.shape, self.size))

    def prepare(self, model: nn.Module) -> Callable[..., Tensor]:
        """The forward pass; the gradients of its backward pass are added up over all processes as they are computed."""
        if self.size == 1:
            return model
        for module in list(model.modules()):
            if isinstance(module, Decider):
                module.share_batches()
        draw_elsewhere(model)
        if self.way != "ddp":
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self._undivided = [parameter for parameter in trained if not is_part(parameter)]
            return model
        own = [name for name, _ in model.named_buffers()]  # equal by themselves, or counted by each process
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, own)
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
        parallel.register_comm_hook(None, _add_up)
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view")  # phi's, which are small
        return parallel

    def passing(self, forward: Callable[..., Tensor], share: Share, *, last: bool) -> AbstractContextManager[Any]:
        """Around one part of a batch, forwards and backwards; gradients are exchanged with the last one."""
        if self.size == 1:
            return nullcontext()
        return self._passing(forward, share, last)

    @contextmanager
    def _passing(self, forward: Any, share: Share, last: bool) -> Iterator[None]:
        # Divided gradients are added up with every part: kept whole until the last one, they would fill the memory that
        # dividing them has freed.
        held_back = forward.no_sync() if self.way == "ddp" and not last else nullcontext()
        with whole_batch(share.first, share.total), held_back:
            yield
        gradients = [parameter.grad for parameter in self._undivided if parameter.grad is not None]
        if last and gradients:
            torch._foreach_copy_(gradients, list(self.add(torch.stack(gradients))))

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of all gradients, 0-dim."""
        parts = [gradient for gradient in gradients if is_part(gradient)] if self.size > 1 else []
        if not parts:
            return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients))))  # as get_total_norm
        whole = [gradient for gradient in gradients if not is_part(gradient)]
        own, undivided = nn.utils.get_total_norm([own_part(part) for part in parts]), nn.utils.get_total_norm(whole)
        return (self.add(own.double().square()) + undivided.double().square()).sqrt().to(own.dtype)


ALONE = Crew()


def is_part(tensor: Tensor) -> "TypeIs[DTensor]":
    """Whether a tensor is a process's part of a divided one. Where nobody has imported DTensor there are none, and to
    import it takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; the two share memory."""
    return tensor._local_tensor if is_part(tensor) else tensor


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, given its part `like` of another tensor of that shape, on the same
    device."""
    if not is_part(like) or whole.ndim == 0:
        return whole.to(like.device)
    from torch.distributed.tensor import DTensor

    axis = _axis_of(like)
    first, last = span(whole.shape[axis], like.device_mesh.size(), like.device_mesh.get_local_rank())
    own = whole.narrow(axis, first, last - first).clone(memory_format=torch.contiguous_format).to(like.device)
    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def cut_axis(shape: Sequence[int], size: int) -> int:
    """The first axis that `size` processes can cut evenly, or else the first one."""
    return next((axis for axis, length in enumerate(shape) if length % size == 0), 0)


def _axis_of(tensor: "DTensor") -> int:
    from torch.distributed.tensor import Shard

    (placement,) = tensor.placements
    assert isinstance(placement, Shard)
    return placement.dim


class Average(ModelEmaV3):
    """timm's average of a model's weights, of which each process averages its part."""

    def _foreach_lerp_(self, ema_values: list[Tensor], model_values: list[Tensor], weight: float) -> None:
        super()._foreach_lerp_([own_part(v) for v in ema_values], [own_part(v) for v in model_values], weight)


def largest_share(images: int, group: int, size: int) -> int:
    """The images of a part of `images` images that the busiest of `size` processes has, in whole groups of
    `group`."""
    groups = -(-images // group)
    return min(-(-groups // size) * group, images)


def _add_up(_state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Gradients are added: each process's loss is weighted with its share of the images already."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    done: torch.futures.Future[Tensor] = work.get_future().then(lambda future: future.value()[0])
    return done


class WholeBatchDropPath(DropPath):
    """timm's stochastic depth with the draws of the whole batch, of which a process keeps its images'."""

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        drawn = of_whole_batch(x.new_empty(len(x), *[1] * (x.ndim - 1)), lambda whole: whole.bernoulli_(keep))
        return x * (drawn / keep if self.scale_by_keep else drawn)


def draw_elsewhere(model: nn.Module) -> None:
    """Puts it in the place of timm's: what is drawn for a batch is then for `of_whole_batch` to say."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is DropPath:
                setattr(module, name, WholeBatchDropPath(child.drop_prob, child.scale_by_keep))


@contextmanager
def joined(config: Config) -> Iterator[Crew]:
    """Joins the processes that torchrun, or `devices=`, has started for this run; alone where nobody has.

    Raises:
        UsageError: torchrun's words are incomplete, or there are fewer devices than processes.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        if config.parallel != "auto":
            raise UsageError(f"parallel={config.parallel} has no effect in one process; set devices, or leave it out")
        yield ALONE
        return
    missing = [name for name in TOLD if name not in os.environ]
    if missing:
        raise UsageError(f"RANK={os.environ['RANK']} says that torchrun started this, but {missing[0]} is not set")
    rank, size, local_rank, local_size = (int(os.environ[name]) for name in TOLD[:4])
    if config.device == "mps":
        raise UsageError(f"device=mps is one device: {size} processes cannot share it; use device=cpu")
    if config.devices not in (1, size):
        raise UsageError(f"devices={config.devices}, but torchrun has started {size} processes; leave devices out")
    if config.train.batch_size == "auto":
        raise UsageError(f"train.batch_size=auto knows one device, and there are {size}; give a number")
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    if cuda:
        if local_size > torch.cuda.device_count():
            raise UsageError(f"{local_size} processes on a machine with {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(local_rank)
    elif config.threads is None:
        torch.set_num_threads(cores())  # or each process would take them all
    with _contact():
        store, *_ = next(rendezvous("env://", timeout=PATIENCE))
        # The launcher's store outlives a restart, and with it the addresses of processes that are gone.
        store = PrefixStore(f"attempt {os.environ.get(ATTEMPT, 0)}", store)
        kinds = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(kinds, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        yield Crew(rank, size, local_rank, local_size)
    dist.destroy_process_group()  # not after an error: others may never come


@contextmanager
def _contact() -> Iterator[None]:
    """Turns torch's error about a process that is gone into Lost."""
    try:
        yield
    except RunError:
        raise  # our own error, whatever its text
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error):
            raise Lost(f"lost contact with another process ({first_line(error)})") from error
        raise
