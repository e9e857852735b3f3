"""What a model computes: parameters, and FLOPs by formula and by torch's counter, without allocating a weight.

Conventions. A multiply-add is 2 FLOPs. Only matrix products count: norms, softmaxes, GELU, biases, gathers, sorts and
the optimizer count as 0. Attention counts as its two products, fused or not (a fused backward pass forms the scores
once more, which is the kernel's choice and counts as 0). Training is the forward pass and one product for each operand
that has a gradient, which pixels and fixed routing weights have not; recomputation repeats every block but its last
product, whose result no gradient needs.

The paper (Soft MoE, Puigcerver et al., 2023, Tables 1, 8 and 9) counts evaluation in this way but training with a
multiply-add as 1 and a backward pass as twice the forward pass: its training FLOPs are 1.5 `forward_flop` an image.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from softmoe_cli.adapters.kind import Adapter
from softmoe_cli.config.model import Model
from softmoe_cli.errors import UsageError, first_line
from softmoe_cli.model.adapted import AdaptedBlock, is_adapters
from softmoe_cli.model.blocks import CarryingBlock
from softmoe_cli.model.tasks import any_task
from softmoe_cli.model.vit import build, count_tokens
from softmoe_cli.moe.kind import Decider, Layer
from softmoe_cli.moe.layer import MoE
from softmoe_cli.optim import freeze

PARTS = ("embedding and norms", "attn", "mlp", "router", "experts", "shared", "adapter", "head")


@dataclass(frozen=True)
class Part:
    """One kind of layer, summed over the blocks that have it; FLOPs per image. Router includes dispatch and combine."""

    name: str
    params: int
    active_params: float
    forward_flop: int
    train_flop: float


@dataclass(frozen=True)
class Cost:
    """One model on one image. `tokens` includes class token and registers.

    `active_params` are the parameters that one token passes through, on average: of the routed experts, as many as the
    router uses for one token. `slots_per_token` is the rows of all experts, empty ones included, over the tokens of an
    MoE block, in the mean over these blocks: the capacity factor that is really paid for. `train_flop` is no whole
    number if a group of images was not full.
    """

    parts: tuple[Part, ...]
    tokens: int
    slots_per_token: float | None
    frozen_params: int = 0
    frozen_head_params: int = 0
    """Of these, the head's."""
    whole_batches: str | None = None
    """Why a batch cannot be computed in parts, with the way out; None where it can."""
    counted_train_flop: float | None = None
    """Training FLOPs of a model with frozen parameters, which are fewer than the sum of its parts' training FLOPs."""
    landed_row_flop: float | None = None
    """Training FLOPs of one row of an expert, where a row is of one token (`Decided.landed`)."""
    landed_rows: float | None = None
    """How many rows of all layers hold a token when the load is as even as the router aims at."""
    choices: int | None = None
    """How many experts all tokens choose in all layers whose rows are counted; None where in one they do not choose."""
    full_experts_flop: float = 0.0
    """Training FLOPs of the experts of other layers than those, in whose rows nothing has to land."""

    @property
    def params(self) -> int:
        return sum(part.params for part in self.parts)

    @property
    def trained_params(self) -> int:
        return self.params - self.frozen_params

    @property
    def trained_body_params(self) -> int:
        """The trained parameters outside of the head, whose size is the data's and not the method's."""
        head = sum(part.params for part in self.parts if part.name == "head")
        return self.trained_params - (head - self.frozen_head_params)

    @property
    def active_params(self) -> float:
        return sum(part.active_params for part in self.parts)

    @property
    def forward_flop(self) -> int:
        return sum(part.forward_flop for part in self.parts)

    @property
    def nominal_share(self) -> float | None:
        """The share of all choices that experts with an MLP compute when the load is as even as the router aims at;
        None where tokens do not choose."""
        return None if self.choices is None or self.landed_rows is None else self.landed_rows / self.choices

    @property
    def nominal_landed_flop(self) -> float:
        """Training FLOPs of an image, rows that hold no token not counted, when the load is that even. Unknown where
        frozen parameters take a part of the experts' cost away."""
        return self.landed_train_flop(1, self.landed_rows or 0.0)

    def landed_train_flop(self, images: int, landed: float) -> float:
        """Training FLOPs of so many images with which so many rows have `landed`: rows that hold no token count as 0 in
        it. Where no row is of one token it is as `train_flop` says."""
        if self.landed_row_flop is None:
            return images * self.train_flop
        assert self.counted_train_flop is None  # of frozen experts a row costs something else
        return images * self.rest_train_flop + landed * self.landed_row_flop

    @property
    def rest_train_flop(self) -> float:
        """Training FLOPs of an image without those of experts whose rows are counted."""
        return self.full_experts_flop + sum(part.train_flop for part in self.parts if part.name != "experts")

    @property
    def phase(self) -> list[float]:
        """What is added up of each image, where pruning changes it on the way: training FLOPs, those without
        experts whose rows are counted, choices, and the FLOPs of a forward pass."""
        return [self.train_flop, self.rest_train_flop, self.choices or 0, self.forward_flop]

    @property
    def row(self) -> dict[str, int | float]:
        """What receipts say of it."""
        return {key: getattr(self, key) for key in ("params", "active_params", "forward_flop", "train_flop")}

    @property
    def train_flop(self) -> float:
        return (
            sum(part.train_flop for part in self.parts) if self.counted_train_flop is None else self.counted_train_flop
        )


def account(
    model: Model,
    num_classes: int,
    *,
    batch: int | None = None,
    recompute: bool = False,
    frozen: Sequence[str] = (),
    left: Mapping[int, Sequence[int]] = MappingProxyType({}),
) -> Cost:
    """The cost of a config by formula; training with frozen parameters by the counter, because what needs no gradient
    depends on where they are.

    Args:
        batch: images that go through the model at once in training (a part, under accumulation): where groups of
            images share slots, the last group's are paid for whether it is full or not. None: full groups.
        recompute: whether training recomputes the blocks.
        frozen: patterns as in optim.freeze.
        left: the experts that are left, by block, where some were pruned. Their block's parameters are all there.

    Raises:
        UsageError: a model that cannot be built, whose blocks have no formula, or of which nothing is left to train.
    """
    vit = on_meta(model, num_classes)
    for place, block in enumerate(vit.blocks):
        if place in left and isinstance(block.mlp, MoE) and block.mlp.router.unprunable is None:
            block.mlp.prunable()
            block.mlp.leave(left[place])
    cost = account_model(vit, batch=batch, recompute=recompute)
    if not frozen and model.adapter.name == "none":
        return cost
    freeze(vit, frozen)
    _, step = count_flop(vit, batch=batch, recompute=recompute)
    still = {name: p.numel() for name, p in vit.named_parameters() if not p.requires_grad}
    return replace(
        cost,
        frozen_params=sum(still.values()),
        frozen_head_params=sum(number for name, number in still.items() if _part_of(name) == "head"),
        counted_train_flop=step.flop / step.images,
    )


def account_model(vit: VisionTransformer, *, batch: int | None, recompute: bool) -> Cost:
    """`account` of a model that is already built."""
    tokens = count_tokens(vit)
    layers = [block.mlp for block in vit.blocks if isinstance(block.mlp, Layer)]
    rows = [layer.rows(tokens) for layer in layers]
    known = [each for each in rows if each is not None]
    mean = sum(known) / len(known) if known and len(known) == len(rows) else None
    row_flop = next((layer.landed_row_flop for layer in layers if layer.landed_row_flop is not None), None)
    full = [layer for layer in layers if row_flop is not None and layer.landed_row_flop is None]
    landed = [found for layer in layers if (found := layer.landed_rows(tokens)) is not None]
    counted = [layer.choices(tokens) for layer in layers if layer.landed_row_flop is not None]
    choices = [each for each in counted if each is not None]
    deciders = [module for module in vit.modules() if isinstance(module, Decider)]
    return Cost(
        parts=tuple(_parts(vit, batch, recompute)),
        tokens=tokens,
        slots_per_token=None if mean is None else mean / tokens,
        whole_batches=next((each.whole_batches for each in deciders if each.whole_batches), None),
        landed_row_flop=None if row_flop is None else (4 if recompute else 3) * row_flop,
        full_experts_flop=sum(_experts_train_flop(layer, tokens, batch, recompute) for layer in full),
        landed_rows=sum(landed) if landed else None,
        choices=sum(choices) if choices and len(choices) == len(counted) else None,
    )


def _experts_train_flop(layer: Layer, n: int, batch: int | None, recompute: bool) -> float:
    """Training FLOPs per image of a layer's experts, as `_parts` adds them up."""
    group = layer.router.images_per_group
    filled = 1.0 if batch is None else -(-batch // group) * group / batch
    again = layer.recomputed_flop_by_part(n)["experts"] if recompute else 0
    return filled * (layer.flop_by_part(n)["experts"][1] + again)


def on_meta(model: Model, num_classes: int) -> VisionTransformer:
    """The model of a config with shapes and no weights, for computing its cost.

    Raises:
        UsageError: sizes that torch cannot represent.
    """
    try:
        with torch.device("meta"):
            return build(model, num_classes)
    except (RuntimeError, OverflowError) as error:
        raise UsageError(f"{model.name}: such sizes cannot be ({first_line(error)}); choose smaller ones") from error


def _part_of(name: str) -> str:
    """The part that a parameter belongs to."""
    if name.startswith(("head.", "fc_norm.pre_logits.")):
        return "head"
    if is_adapters(name):
        return "adapter"
    for part in ("experts", "shared", "router", "mlp", "attn"):
        if f".{part}." in name:
            return part
    return "embedding and norms"


def _parts(vit: VisionTransformer, batch: int | None, recompute: bool) -> Iterator[Part]:
    """Every part that the model has, in the order of PARTS."""
    n = count_tokens(vit)
    params, idle = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0.0)
    forward, train = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0.0)
    for name, parameter in vit.named_parameters():
        params[_part_of(name)] += parameter.numel()
    pixels = 2 * vit.patch_embed.num_patches * vit.patch_embed.proj.weight.numel()
    forward["embedding and norms"], train["embedding and norms"] = pixels, 2 * pixels
    for block in vit.blocks:
        here = block_flop(block, n)
        here_train: dict[str, float] = {}
        here_again: dict[str, float] = {}
        if isinstance(block.mlp, Layer):
            parts, group = block.mlp.flop_by_part(n), block.mlp.router.images_per_group
            filled = 1.0 if batch is None else -(-batch // group) * group / batch
            here_train = {part: filled * flop for part, (_, flop) in parts.items() if part != "shared"}
            again_by_part = block.mlp.recomputed_flop_by_part(n)
            here_again = {part: filled * again_by_part[part] for part in here_train}
            idle["experts"] += sum(p.numel() for p in block.mlp.experts.parameters()) * (1 - block.mlp.active_share)
        else:
            filled = 1.0
        again: dict[str, float] = here | here_again
        last, flop = _last_product(block, n)
        again[last] -= flop * (filled if last in here_train else 1)
        for part, flop in here.items():
            forward[part] += flop
            train[part] += here_train.get(part, 3 * flop) + (again[part] if recompute else 0)
    if not isinstance(vit.head, nn.Identity):
        forward["head"] = head_flop(vit)
        train["head"] = 3 * forward["head"]
    for part in PARTS:
        if params[part] or forward[part]:
            yield Part(part, params[part], params[part] - idle[part], forward[part], train[part])


def block_flop(block: Any, n: int) -> dict[str, int]:
    """FLOPs per image of each part of a block in a forward pass of n tokens.

    Raises:
        UsageError: a block without a formula.
    """
    plain = type(block) in (Block, CarryingBlock, AdaptedBlock)
    if not plain or not isinstance(block.mlp, Mlp | Layer):
        kind = type(block.mlp if plain else block).__name__
        raise UsageError(f"no FLOP formula for {kind} blocks; use a ViT with plain blocks and MLPs")
    d, inner = block.attn.qkv.in_features, block.attn.proj.in_features
    here: dict[str, int] = {"attn": 2 * n * d * 3 * inner + 2 * 2 * n * n * inner + 2 * n * inner * d}
    here["adapter"] = sum(part.flop(n) for part in block.modules() if isinstance(part, Adapter))
    if isinstance(block.mlp, Layer):
        return here | {part: flop for part, (flop, _) in block.mlp.flop_by_part(n).items()}
    return here | {"mlp": 2 * n * (block.mlp.fc1.weight.numel() + block.mlp.fc2.weight.numel())}


def head_flop(vit: VisionTransformer) -> int:
    """FLOPs per image of a model's head, and of the layer before it."""
    before = sum(2 * each.weight.numel() for each in vit.fc_norm.modules() if isinstance(each, nn.Linear))
    return int(before + (2 * vit.head.weight.numel() if isinstance(vit.head, nn.Linear) else vit.head.flop()))


def _last_product(block: Block, n: int) -> tuple[str, int]:
    """(part, FLOPs) of a block's last product if no gradient needs its result: torch's checkpoint stops before it,
    because the backward pass asks for nothing later. LayerScale, stochastic depth or gates after it do need its
    result."""
    needed = not isinstance(block.ls2, nn.Identity) or not isinstance(block.drop_path2, nn.Identity)
    if isinstance(block.mlp, Mlp):
        part, flop = "mlp", 2 * n * block.mlp.fc2.weight.numel()
    else:
        part, flop = block.mlp.last_product(n)
    return part, 0 if needed else flop


# --- the counter ------------------------------------------------------------------------------------------------------


def _grouped_mm(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """FLOPs of runs of rows, each times its own matrix, or of the transpose: each row of the longer side meets one
    matrix."""
    return 2 * math.prod(a) * b[-1]


def _matrix_vector(a: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(a)


aten = torch.ops.aten
COUNTED: dict[Any, Callable[..., int]] = {
    aten._grouped_mm: _grouped_mm,
    aten.mv: _matrix_vector,
    aten.dot: _matrix_vector,
    aten.addmv: lambda _, a, *__, **___: _matrix_vector(a),
}
"""Products that torch's own counter does not count."""

FREE = {
    # norms, softmaxes and reductions
    aten.native_layer_norm, aten.native_layer_norm_backward, aten._softmax, aten._softmax_backward_data,
    aten._log_softmax, aten._log_softmax_backward_data, aten.mean, aten.sum, aten.var, aten.amax, aten.amin,
    aten.argmax, aten.argmin, aten.topk, aten.sort, aten.cumsum, aten.max, aten.min, aten.any, aten.all, aten.prod,
    aten.bincount, aten.histc, aten.norm, aten.linalg_vector_norm,
    # shapes, copies and new tensors
    aten.stack, aten.cat, aten.constant_pad_nd, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty,
    aten.new_empty_strided, aten.zeros, aten.zeros_like, aten.new_zeros, aten.ones, aten.ones_like, aten.new_ones,
    aten.full, aten.full_like, aten.new_full, aten.arange, aten.scalar_tensor, aten._to_copy, aten._unsafe_view,
    aten.slice_backward, aten.select_backward, aten.randn_like, aten.rand_like, aten.bernoulli, aten.bernoulli_,
    aten.repeat, aten.flip, aten.roll, aten.eye, aten.tril, aten.triu, aten.lift_fresh, aten.copy_, aten.fill_,
    aten.zero_, aten.masked_fill_, aten.resize_, aten.one_hot, aten.repeat_interleave, aten.split_with_sizes_copy,
    aten.embedding, aten.embedding_dense_backward,
    # looking up and adding up
    aten.gather, aten.gather_backward, aten.scatter, aten.scatter_, aten.scatter_add, aten.scatter_add_,
    aten.scatter_reduce, aten.index, aten.index_put, aten.index_put_, aten._unsafe_index_put, aten.index_select,
    aten.index_select_backward, aten.index_add, aten.index_add_, aten.index_fill, aten.index_copy, aten.searchsorted,
    aten.bucketize, aten.floor_divide, aten.masked_select, aten.nonzero, aten.segment_reduce,
}  # fmt: skip
"""Operations that count as 0 by convention, beside views and what torch calls pointwise."""


class Uncounted(UsageError):
    """Raised for an operation that is neither counted nor free."""


@functools.cache
def _free(func: Any) -> bool:
    """Whether an operation counts as 0 by convention."""
    return func._overloadpacket in FREE or func.is_view or torch.Tag.pointwise in func.tags or func.namespace == "prim"


def _shapes(value: Any) -> Any:
    """An operation's arguments with shapes instead of tensors on the meta device, as a key for looking it up."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(map(_shapes, value)) if isinstance(value, list | tuple) else (type(value), value)


def _like(made: Tensor) -> Tensor:
    return torch.empty_strided(made.shape, made.stride(), dtype=made.dtype, device=made.device)


@functools.cache
def _makes_new(func: Any) -> bool:
    """Whether an operation neither changes its arguments nor returns parts of them."""
    returned = any(each.alias_info is not None for each in func._schema.returns)
    return not (func.is_view or func._schema.is_mutable or returned)


class _Watch(TorchDispatchMode):
    """Raises at an operation that is neither counted nor free.

    torch works out the shapes of most results in Python. An operation that makes new tensors is asked once for each
    set of shapes: a model's blocks repeat themselves.
    """

    def __init__(self, counted: Any) -> None:
        super().__init__()
        self.counted = counted
        self._known: dict[Any, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket not in self.counted and not _free(func):
            raise Uncounted(
                f"nobody counts the FLOPs of {func}: the cost of a model that uses it would be wrong; write it with "
                "other operations, or add it to COUNTED or FREE in softmoe_cli/cost/flop.py"
            )
        if kwargs or not _makes_new(func):
            return func(*args, **(kwargs or {}))
        key = func, _shapes(args)
        if key in self._known:
            return tree_map_only(Tensor, _like, self._known[key])
        out = func(*args)
        if all(made.is_meta for made in tree_leaves(out) if isinstance(made, Tensor)):  # others have contents
            self._known[key] = out
        return out


@contextmanager
def counter() -> Iterator[FlopCounterMode]:
    """torch's counter, extended by COUNTED; `get_total_flops()` and `get_flop_counts()` tell what it saw.

    Raises:
        Uncounted: an operation that is neither in torch's table nor in COUNTED nor free.
    """
    mode = FlopCounterMode(display=False, custom_mapping=COUNTED)
    with _Watch(mode.flop_registry), mode:  # the counter is asked first; the watch sees what it takes apart
        yield mode


@dataclass(frozen=True)
class Count:
    """What the counter saw on `images` images. It cannot tell apart the parts of a step that is recomputed."""

    images: int
    flop: int
    flop_by_part: dict[str, int] | None


def count_forward(vit: VisionTransformer) -> Count:
    """The FLOPs of a forward pass of one full group of images by torch's counter. `vit` is on the meta device.

    Raises:
        Uncounted: an operation that nobody counts.
    """
    images = _images(vit, None)
    with counter() as seen, torch.no_grad():
        vit.eval()(*any_task(vit, images))
    return Count(len(images), seen.get_total_flops(), _by_part(seen, type(vit).__name__))


def count_flop(vit: VisionTransformer, *, batch: int | None = None, recompute: bool = False) -> tuple[Count, Count]:
    """What `count_forward` says, and the FLOPs of a forward and a backward pass of `batch` images (None: one full
    group), in one go where these are full groups and experts have as many rows in training as elsewhere."""
    images, name = _images(vit, batch), type(vit).__name__
    vit.set_grad_checkpointing(recompute)
    with counter() as seen:
        logits = vit.train()(*any_task(vit, images))
        forward = Count(len(images), seen.get_total_flops(), _by_part(seen, name))
        logits.sum().backward()  # losses, auxiliary ones included, have no products
    step = Count(len(images), seen.get_total_flops(), None if recompute else _by_part(seen, name))
    layers = [block.mlp for block in vit.blocks if isinstance(block.mlp, Layer)]
    parts = [layer.flop_by_part(count_tokens(vit))["experts"] for layer in layers]
    alike = len(images) % _group(vit) == 0 and all(train == 3 * flop for flop, train in parts)
    return forward if alike else count_forward(vit), step


def _group(vit: VisionTransformer) -> int:
    """Images that make full groups for every router."""
    return math.lcm(*(block.mlp.router.images_per_group for block in vit.blocks if isinstance(block.mlp, Layer)))


def _images(vit: VisionTransformer, batch: int | None) -> Tensor:
    """Images without contents; the model is told to compute attention as the two products that it counts as."""
    for block in vit.blocks:
        block.attn.fused_attn = False
    return torch.empty(batch or _group(vit), vit.in_chans, *vit.patch_embed.img_size, device="meta")


def _by_part(mode: FlopCounterMode, root: str) -> dict[str, int]:
    """The counter's figures by module, added up by part. Routers have what is left: gradients that come back through
    what a router hands on to the next one are booked on modules in between."""
    total = {name.removeprefix(f"{root}."): sum(ops.values()) for name, ops in mode.get_flop_counts().items()}
    head = total.get("head", 0) + total.get("fc_norm.pre_logits", 0)
    parts = dict.fromkeys(PARTS, 0) | {"embedding and norms": total.get("patch_embed", 0), "head": head}
    for name, flop in total.items():
        inside = r"attn|mlp|mlp\.experts|mlp\.shared|(?:attn\.qkv\.[qv]|attn|mlp)_adapter"
        block = re.fullmatch(rf"blocks\.\d+\.({inside})", name)
        if block is None:
            continue
        if block[1].endswith("adapter"):
            parts["adapter"] += flop
            parts["attn"] -= flop if "qkv" in block[1] else 0
        elif f"{name}.router" not in total and f"{name}.experts" not in total:
            parts[block[1].removeprefix("mlp.")] += flop
    parts["router"] = total.get("Global", 0) - sum(parts.values())
    return parts
