"""The options of a model: its backbone, its router, and which blocks hold experts."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from softmoe_cli.config.adapter import AdapterOptions
from softmoe_cli.config.data import WIDEST
from softmoe_cli.config.option import Section, option
from softmoe_cli.errors import UsageError

LARGEST_SIZE = 2**31 - 1
"""The largest width, the largest number among a router's options, and the most rows of experts that an image can have:
much larger ones are beyond what torch can represent."""


@dataclass
class Backbone(Section):
    """A timm VisionTransformer. The defaults of conf/model/backbone follow the official Soft MoE code."""

    path: ClassVar[str] = "model.backbone"
    name: str = option("what tables call it, such as vit_s16")
    timm: str | None = option("a timm ViT by name; every choice below but drop_path is then timm's and stays null")
    patch_size: int | None = option("pixels on a patch's side", low=1)
    width: int | None = option("d, numbers per token", low=1, high=LARGEST_SIZE)
    depth: int | None = option("blocks", low=1)
    heads: int | None = option("attention heads; they divide the width", low=1)
    mlp_width: int | None = option("h, hidden width of a dense MLP and of an expert", low=1, high=LARGEST_SIZE)
    class_token: bool | None = option("put a learned token before the patches")
    pool: str | None = option("avg: mean over tokens; token: the class token", choices=("avg", "token"))
    norm_after_pool: bool | None = option("final LayerNorm after pooling (timm's fc_norm) or before it (official)")
    qk_norm: str | None = option(
        "LayerNorm on queries and keys: scale (official) has no bias", choices=("none", "scale", "affine")
    )
    gelu: str | None = option("tanh approximation (official, JAX) or exact erf (timm)", choices=("tanh", "erf"))
    norm_eps: float | None = option("LayerNorm epsilon", above=0)
    pos_std: float | None = option("standard deviation that the position table starts with (official 0.02)", above=0)
    layer_scale: float | None = option("initial LayerScale of both residual branches; null: none", above=0)
    drop_path: float | None = option(
        "stochastic depth: chance of the last block to be left out; earlier ones less", low=0, high=0.99
    )
    init: str | None = option(
        "official: Xavier kernels, zero head, bias -ln(classes); timm: timm's", choices=("official", "timm")
    )
    pre_logits: bool | None = option("a layer of the model's width, and tanh, before the head (V-MoE)", absent=True)

    def check(self) -> None:
        chosen = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("name", "timm")}
        if self.timm is not None:
            extra = [name for name, value in chosen.items() if value is not None and name != "drop_path"]
            if extra:
                raise UsageError(
                    f"model.backbone.timm={self.timm} brings its own {extra[0]}; leave model.backbone.{extra[0]} null"
                )
            return
        missing = [
            name for name, value in chosen.items() if value is None and name not in ("layer_scale", "pre_logits")
        ]
        if missing:
            raise UsageError(f"model.backbone.{missing[0]}=null needs a value unless model.backbone.timm names a model")
        assert self.width is not None and self.heads is not None
        if self.width % self.heads:
            raise UsageError(f"model.backbone.heads={self.heads} does not divide model.backbone.width={self.width}")
        if self.pool == "token" and not self.class_token:
            raise UsageError("model.backbone.pool=token needs model.backbone.class_token=true")
        if self.pre_logits and self.norm_after_pool:
            raise UsageError(
                "model.backbone.pre_logits=true stands where model.backbone.norm_after_pool=true puts its norm; choose "
                "one"
            )

    def filled(self) -> Self:
        return replace(self, pre_logits=self.pre_logits or None)


@dataclass
class Model(Section):
    """A backbone, a router, and which of the backbone's MLPs the router's experts replace."""

    path: ClassVar[str] = "model"
    backbone: Backbone = field(default_factory=Backbone)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    router: Any = option("a router and its options (model/router=NAME); dense has none")
    image_size: int = option("pixels on the side of the square that the model sees", low=1, high=WIDEST)
    in_chans: int = option("colour channels of its input; grey images are repeated", low=1)
    moe_blocks: Any = option(
        "last_N, last_half, every_N (every Nth block, from the Nth), or a list of block numbers from 0"
    )
    blocks: Any = option(
        "blocks among these with a router of their own: {3: soft}, {3: {router: soft, num_experts: 8}}, or with "
        "options of model.router alone {3: {num_experts: 8}}; null: none"
    )
    expert_init: str = option(
        "identical: all experts of a layer start equal (official)", choices=("identical", "independent")
    )
    expert_width: int | None = option(
        "hidden width of an expert; null: that of the MLP it replaces", low=1, high=LARGEST_SIZE
    )
    tasks: Any = option(
        "the tasks that it knows, with the number of each one's classes, as data=mix says; null: one, which needs no "
        "name",
        absent=True,
    )
    head: str = option("linear, or a router of linear experts (mumoe_cp) that make one layer with as many parameters")
    head_experts: int | None = option("experts of a head that is not linear", low=1)
    head_norm: str | None = option(
        "its gate's normalisation: over a batch, or over the experts of an image", choices=("batch", "layer")
    )

    def check(self) -> None:
        if not isinstance(self.router, dict) or "_target_" not in self.router:
            raise UsageError(f"model.router={self.router}: choose one with model/router=NAME (softmoe list shows them)")
        if self.mixture and str(self.router["_target_"]).count(".") < 1:
            raise UsageError(
                f"model.router._target_={self.router['_target_']} is not of the form module.Class; "
                "choose a router with model/router=NAME"
            )
        routed, depth = self.mixture, self.backbone.depth
        if routed and depth is not None and not placement(self.moe_blocks, depth):
            raise UsageError(
                f"model.moe_blocks=[] leaves router {self.router_name} without a block and the model dense; "
                "use model/router=dense or name blocks, such as model.moe_blocks=last_2"
            )
        if routed:
            check_blocks(self.blocks, None if depth is None else placement(self.moe_blocks, depth))
        if self.head != "linear" and (self.head_experts is None or self.head_norm is None):
            raise UsageError(f"model.head={self.head} needs model.head_experts and model.head_norm")
        patch = self.backbone.patch_size
        if patch is not None and self.image_size % patch:
            raise UsageError(
                f"model.image_size={self.image_size} is not a multiple of model.backbone.patch_size={patch}; "
                f"the nearest sizes that are: {max(1, self.image_size // patch) * patch}, "
                f"{(self.image_size // patch + 1) * patch}"
            )

    def filled(self) -> Self:
        """Replaces words for blocks by block numbers. A dense control has no placement and no router options, so that
        it is the same run whatever its rivals sweep over."""
        head: dict[str, Any] = {} if self.head != "linear" else {"head_experts": None, "head_norm": None}
        if not self.mixture:
            bare = {"_target_": None}
            return replace(
                self, moe_blocks=[], blocks={}, router=bare, expert_init="identical", expert_width=None, **head
            )
        apart = dict(sorted((self.blocks or {}).items(), key=lambda each: int(each[0])))
        if self.backbone.depth is None:
            return replace(self, blocks=apart, **head)
        return replace(self, moe_blocks=placement(self.moe_blocks, self.backbone.depth), blocks=apart, **head)

    @property
    def router_name(self) -> str:
        """The word that tables use: the router's module name, or `dense`; of several, all with + between them."""
        if not self.mixture:
            return "dense"
        return "+".join(dict.fromkeys(str(each["_target_"]).split(".")[-2] for each in self.routers))

    @property
    def mixture(self) -> bool:
        """Whether it has a router."""
        return self.router["_target_"] is not None

    @property
    def routers(self) -> list[dict[str, Any]]:
        """The options of `router` and of the routers of single blocks."""
        return [self.router, *(self.blocks or {}).values()]

    def router_of(self, block: int) -> dict[str, Any]:
        """The options of a block's router."""
        options: dict[str, Any] = (self.blocks or {}).get(str(block), self.router)
        return options

    def router_key(self, block: int) -> str:
        """Where these options stand, such as model.router."""
        return f"model.blocks.{block}" if str(block) in (self.blocks or {}) else "model.router"

    def with_routers(self, options: Mapping[int, dict[str, Any]]) -> Self:
        """The same model with these options of the routers of its blocks, by block; of none it stays as it is."""
        if not options:
            return self
        router = next(iter(options.values()))
        apart = {str(place): each for place, each in options.items() if each != router}
        return replace(self, router=router, blocks=apart)

    @property
    def images_per_group(self) -> int:
        """Images that make full routing groups in every block."""
        return math.lcm(*map(group_of, self.routers))

    @property
    def name(self) -> str:
        adapter = "" if self.adapter.name == "none" else f"_{self.adapter.name}"
        return f"{self.backbone.name}_{self.router_name}{adapter}"


def placement(moe_blocks: Any, depth: int) -> list[int]:
    """Block numbers, from 0, of `last_N` (the last N), `last_half` (of an odd number the smaller half, at least one),
    `every_N` (N-1, 2N-1, …) or an explicit list."""
    if moe_blocks == "last_half":
        return list(range(depth - max(1, depth // 2), depth))
    if isinstance(moe_blocks, str):
        kind, _, count = moe_blocks.partition("_")
        if kind not in ("last", "every") or not re.fullmatch("[0-9]{1,9}", count) or not 1 <= int(count) <= depth:
            raise UsageError(
                f"model.moe_blocks={moe_blocks} is none of last_N, last_half, every_N with N from 1 to {depth}, or a "
                "list as [1,3]"
            )
        n = int(count)
        return list(range(depth - n, depth)) if kind == "last" else list(range(n - 1, depth, n))
    if not isinstance(moe_blocks, list) or not all(type(block) is int for block in moe_blocks):
        raise UsageError(f"model.moe_blocks={moe_blocks} is none of last_N, last_half, every_N or a list like [1,3]")
    bad = [block for block in moe_blocks if not 0 <= block < depth]
    if bad or len(set(moe_blocks)) != len(moe_blocks):
        raise UsageError(f"model.moe_blocks={moe_blocks}: block numbers run from 0 to {depth - 1}, each at most once")
    return sorted(moe_blocks)


def check_blocks(blocks: Any, placed: list[int] | None) -> None:
    """Checks the routers of single blocks; `placed`: the blocks that have routers, where they are known.

    Raises:
        UsageError: no routers, or of blocks without experts.
    """
    if blocks is None:
        return
    if not isinstance(blocks, dict):
        raise UsageError(f"model.blocks={blocks} is no group of blocks with their routers, such as {{3: soft}}")
    for block, router in blocks.items():
        if not re.fullmatch("0|[1-9][0-9]{0,8}", str(block)):  # in one way: elsewhere it is looked up by this name
            raise UsageError(f"model.blocks.{block}: a block is called by its number, from 0, without zeros before it")
        if not isinstance(router, dict) or str(router.get("_target_")).count(".") < 1:
            raise UsageError(
                f"model.blocks.{block}={router} names no router; say a name, or its options with router=NAME among "
                "them; a block without experts is left out of model.moe_blocks"
            )
        if placed is not None and int(block) not in placed:
            raise UsageError(
                f"model.blocks.{block} is about a block without experts: model.moe_blocks has "
                f"{', '.join(map(str, placed))}"
            )
    if placed is not None and len(blocks) == len(placed) > 0:
        raise UsageError(
            "model.blocks names every block of model.moe_blocks, so that model.router has no effect; leave one out and "
            "choose its router with model/router=NAME"
        )


def check_groups(key: str, images: int, group: int, parts: int = 1) -> None:
    """Checks that batches, or each of several parts of one, are whole routing groups, so that their size changes no
    result."""
    if images % (parts * group):
        at_once = "" if parts == 1 else f" is computed in train.accumulate={parts} parts, each of which"
        raise UsageError(
            f"{key}={images}{at_once} is not a multiple of model.router.images_per_group={group}, so that which images "
            f"make a group would depend on it; use {max(1, images // (parts * group)) * parts * group}"
        )


def group_of(router: dict[str, Any]) -> int:
    """A router's `images_per_group`; 1 if it has none, or one that its constructor will refuse."""
    group = router.get("images_per_group", 1)
    return group if isinstance(group, int) and group > 0 else 1
