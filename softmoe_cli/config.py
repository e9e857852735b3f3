"""Every option that exists: its type, its meaning and what values it may take.

The dataclasses hold no numbers: those stand in `conf/`, once each. `option` keeps an option's meaning
and bounds beside its type; `softmoe train --help` prints them, and `check` enforces them.
"""

import dataclasses
import math
import os
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any, ClassVar, Self

from softmoe_cli.errors import UsageError, nearest
from softmoe_cli.text import printable

MISSING: Any = "???"
"""omegaconf's mark of a value that `conf/` must give; importing omegaconf takes a tenth of a second."""


WIDEST = 65_535
"""Pixels on a side that a JPEG may have."""
MOST_CLASSES = 10**7
"""The most classes: a longer list of names takes minutes and gigabytes before the first message."""


def typed(value: Any) -> str:
    """A value as one types it: 2 for 2.0, [0.5,1] for [0.5, 1.0], null for None."""
    if isinstance(value, list):
        return f"[{','.join(map(typed, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def option(
    meaning: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field without a default: `conf/` chooses. low <= value <= high, value > above."""
    limits = {"meaning": meaning, "low": low, "high": high, "above": above, "choices": choices}
    return field(default=MISSING, metadata=limits)


def _check_values(section: "Section") -> None:
    """Checks every value of a section against the bounds that stand beside its type."""
    for f in dataclasses.fields(section):
        value, limits = getattr(section, f.name), f.metadata
        key = ".".join(filter(None, [section.path, f.name]))
        if value is None or not limits:
            continue
        if isinstance(value, str) and not value.strip() and section.path != "wandb":  # wandb's own check says more
            raise UsageError(f"{key}={value} is empty, as $NAME is where NAME is not set; give it a value")
        if isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
            raise UsageError(f"{key}={typed(value)} is a list that holds others; write [a,b]")
        for word in value if isinstance(value, list) else [value]:
            if limits["choices"] and word not in limits["choices"]:
                raise UsageError(
                    f"{key}={word} is not one of {', '.join(limits['choices'])}.{nearest(str(word), limits['choices'])}"
                )
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if not math.isfinite(number):
                raise UsageError(f"{key}={value} is not a finite number")
            if not (limits["low"] <= number <= limits["high"] and number > limits["above"]):
                signs = {">": limits["above"], ">=": limits["low"], "<=": limits["high"]}
                bounds = [f"{sign} {bound:.15g}" for sign, bound in signs.items() if math.isfinite(bound)]
                raise UsageError(f"{key}={typed(value)} is out of range: it must be {' and '.join(bounds)}")


@dataclass
class Section:
    """A part of a configuration, or the whole of a command's."""

    path: ClassVar[str]
    """Where its keys are, such as model.backbone; empty for a command's own."""

    def settled(self) -> Self:
        """A checked copy, with what its choices imply filled in.

        Raises:
            UsageError: the first value or combination that cannot work.
        """
        _check_values(self)
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        inner = {name: value.settled() for name, value in values.items() if isinstance(value, Section)}
        settled = replace(self, **inner)
        settled.check()
        return settled.filled()

    def check(self) -> None:
        """Raises UsageError where the values, whose bounds are kept, do not go together. Changes nothing."""

    def filled(self) -> Self:
        """A copy with the values that its choices imply; itself if they imply nothing."""
        return self


@dataclass
class Backbone(Section):
    """A timm VisionTransformer. The defaults of conf/model/backbone follow the official Soft MoE code."""

    path: ClassVar[str] = "model.backbone"
    name: str = option("what tables call it, such as vit_s16")
    timm: str | None = option("a timm ViT by name; every choice below but drop_path is then timm's and stays null")
    patch_size: int | None = option("pixels on a patch's side", low=1)
    width: int | None = option("d, numbers per token", low=1)
    depth: int | None = option("blocks", low=1)
    heads: int | None = option("attention heads; they divide the width", low=1)
    mlp_width: int | None = option("h, hidden width of a dense MLP and of an expert", low=1)
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

    def check(self) -> None:
        chosen = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("name", "timm")}
        if self.timm is not None:
            extra = [name for name, value in chosen.items() if value is not None and name != "drop_path"]
            if extra:
                raise UsageError(
                    f"model.backbone.timm={self.timm} brings its own {extra[0]}; leave model.backbone.{extra[0]} null"
                )
            return
        missing = [name for name, value in chosen.items() if value is None and name != "layer_scale"]
        if missing:
            raise UsageError(f"model.backbone.{missing[0]}=null needs a value unless model.backbone.timm names a model")
        assert self.width is not None and self.heads is not None
        if self.width % self.heads:
            raise UsageError(f"model.backbone.heads={self.heads} does not divide model.backbone.width={self.width}")
        if self.pool == "token" and not self.class_token:
            raise UsageError("model.backbone.pool=token needs model.backbone.class_token=true")


@dataclass
class Model(Section):
    """A backbone, a router, and which of the backbone's MLPs the router's experts replace."""

    path: ClassVar[str] = "model"
    backbone: Backbone = field(default_factory=Backbone)
    router: Any = option("a router and its options (model/router=NAME); dense has none")
    image_size: int = option("pixels on the side of the square that the model sees", low=1, high=WIDEST)
    in_chans: int = option("colour channels of its input; grey images are repeated", low=1)
    moe_blocks: Any = option(
        "last_N, last_half, every_N (every Nth block, from the Nth), or a list of block numbers from 0"
    )
    expert_init: str = option(
        "identical: all experts of a layer start equal (official)", choices=("identical", "independent")
    )
    expert_width: int | None = option("hidden width of an expert; null: that of the MLP it replaces", low=1)

    def check(self) -> None:
        if not isinstance(self.router, dict) or "_target_" not in self.router:
            raise UsageError(f"model.router={self.router}: choose one with model/router=NAME (softmoe list shows them)")
        if self.router["_target_"] is not None and str(self.router["_target_"]).count(".") < 1:
            raise UsageError(
                f"model.router._target_={self.router['_target_']} is not of the form module.Class; "
                "choose a router with model/router=NAME"
            )
        routed, depth = self.router["_target_"] is not None, self.backbone.depth
        if routed and depth is not None and not placement(self.moe_blocks, depth):
            raise UsageError(
                f"model.moe_blocks=[] leaves router {self.router_name} without a block and the model dense; "
                "use model/router=dense or name blocks, such as model.moe_blocks=last_2"
            )
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
        if self.router["_target_"] is None:
            bare = {"_target_": None}
            return replace(self, moe_blocks=[], router=bare, expert_init="identical", expert_width=None)
        if self.backbone.depth is None:
            return self
        return replace(self, moe_blocks=placement(self.moe_blocks, self.backbone.depth))

    @property
    def router_name(self) -> str:
        """The word that tables use: the router's module name, or `dense`."""
        target = self.router["_target_"]
        return "dense" if target is None else str(target).split(".")[-2]

    @property
    def name(self) -> str:
        return f"{self.backbone.name}_{self.router_name}"


def placement(moe_blocks: Any, depth: int) -> list[int]:
    """Block numbers, from 0, of `last_N` (the last N), `last_half` (of an odd number the smaller half, at least one),
    `every_N` (N-1, 2N-1, …) or an explicit list."""
    if moe_blocks == "last_half":
        return list(range(depth - max(1, depth // 2), depth))
    if isinstance(moe_blocks, str):
        kind, _, count = moe_blocks.partition("_")
        if kind not in ("last", "every") or not count.isdigit() or not 1 <= int(count) <= depth:
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


KNOWN_SETS = ("digits", "fashion_mnist", "cifar10", "cifar100")
DATA_FORMATS = ("folder", "webdataset", "tfds", "arrow")


@dataclass
class Data(Section):
    """A set of images with labels, cut into training, validation and test images once and for all."""

    path: ClassVar[str] = "data"
    name: str = option("which set; of your own files, what tables call it")
    format: str | None = option("how your own files are stored; null: a set that softmoe knows", choices=DATA_FORMATS)
    root: str = option("where its files are, or are downloaded to; unused by digits")
    label: str | None = option("archives: the field, feature or column with the labels; null: cls or label")
    class_numbers: bool = option(
        "evaluation: classes are called by their numbers among the checkpoint's, as in ImageNet-V2"
    )
    num_classes: int | None = option(
        "classes, and width of the model's head; null: as many as the files have", low=1, high=MOST_CLASSES
    )
    image_size: Any = option(
        "pixels on the side of a decoded image; files are resized and cut to it; auto: the model's or, where that "
        "follows the images, what suits them",
        low=1,
        high=WIDEST,
    )
    crop_pct: float | None = option(
        "share of a file's shorter side that the centre square keeps, as in timm; null: all", above=0, high=1
    )
    from_file: bool = option(
        "resize every file once, to model.image_size and with timm's transforms, instead of going through image_size"
    )
    channels: int = option("1 for grey, 3 for colour", low=1, high=3)
    mean: list[float] = option("subtracted from pixels in [0, 1]: one number, or one per channel")
    std: list[float] = option("divides the pixels after that", above=0)
    hflip: float = option("how often a mirrored image would still be natural; recipes read it", low=0, high=1)
    shift: float = option("how far, as a share of its side, an image may be moved; recipes read it", low=0, high=1)
    crop: str = option("which augment.crop suits it; recipes read it", choices=("none", "shift", "resized"))
    area: float = option("which augment.area suits it; recipes read it", above=0, high=1)
    split_seed: int = option(
        "seed of the split where the set brings none, not the run's; for a checkpoint's own set it is the checkpoint's",
        low=0,
    )
    validation_fraction: float = option("share held out of the training images for choices", above=0, high=0.5)
    test_fraction: float = option(
        "share held out as test where the set brings no test images; 1: all are, for evaluation only", above=0, high=1
    )
    workers: int | None = option(
        "processes that decode files that are not in memory; null: one per CPU core; 0: the run's own", low=0
    )
    prefetch: int = option("batches that each of these processes decodes ahead", low=1)
    memory_gib: float = option("files that decode to more than this are read from disk as it goes", low=0)
    max_megapixels: float = option("larger images are refused before they are decoded", above=0)

    def check(self) -> None:
        if "://" in self.root:
            raise UsageError(
                f"data.root={self.root} is an address; a run must find each image again at any time, so download the "
                "set and name its folder"
            )
        check_side(self.name, self.format, self.image_size)
        if self.format is None:
            if self.name not in KNOWN_SETS:
                raise UsageError(
                    f"data.name={self.name} is not one of {', '.join(KNOWN_SETS)}.{nearest(self.name, KNOWN_SETS)} "
                    f"For files of your own set data.format: {', '.join(DATA_FORMATS)}"
                )
            given = {"label": self.label, "crop_pct": self.crop_pct, "from_file": self.from_file or None}
            for key, value in given.items():
                if value is not None:
                    raise UsageError(f"data.{key}={value} has no effect on data={self.name}, which has no files")
        if self.format == "folder" and self.label is not None:
            raise UsageError(f"data.label={self.label} has no effect with data.format=folder: folders are the labels")
        if self.class_numbers and self.test_fraction != 1:
            raise UsageError("data.class_numbers=true is for evaluation only, with data.test_fraction=1")
        if 0.5 < self.test_fraction < 1:
            raise UsageError(f"data.test_fraction={self.test_fraction:g} is neither at most 0.5 nor 1")
        if self.channels == 2:
            raise UsageError("data.channels=2 is neither 1 (grey) nor 3 (colour)")
        for key in ("mean", "std"):
            if len(getattr(self, key)) not in (1, 3):
                raise UsageError(f"data.{key}={getattr(self, key)} needs 1 number, or 3 for three colours")


def check_side(name: str, format: str | None, side: Any) -> None:
    """A number of pixels or, where there are files to look at, auto."""
    if side == "auto" and format is None:
        raise UsageError(f"data.image_size=auto is for files of your own; give data={name} a number of pixels")
    if side not in ("auto", MISSING) and type(side) is not int:
        raise UsageError(f"data.image_size={typed(side)} is neither a whole number of pixels nor auto")


@dataclass
class Augment(Section):
    """What is done to a training image; evaluation sees the whole square."""

    path: ClassVar[str] = "augment"
    crop: str = option(
        "shift: cut after padding; resized: random area and aspect", choices=("none", "shift", "resized")
    )
    shift: float = option("crop=shift: padding on each side, as a share of the image's side", low=0, high=1)
    area: float = option("crop=resized: smallest area, as a share of the image's", above=0, high=1)
    hflip: float = option("probability of mirroring", low=0, high=1)
    randaugment: list[int] | None = option("[operations, magnitude] of RandAugment, such as [2,10]; null: none", low=0)
    mixup: float = option("alpha of mixup; 0: none", low=0)
    cutmix: float = option("alpha of cutmix; 0: none. With both, each batch tosses a coin", low=0)
    erase: float = option("probability that a box of an image becomes noise (random erasing)", low=0, high=1)

    def check(self) -> None:
        if self.randaugment is not None and (len(self.randaugment) != 2 or self.randaugment[1] > 30):
            raise UsageError(
                f"augment.randaugment={self.randaugment} is not [operations, magnitude up to 30], such as [2,10]"
            )


@dataclass
class Optim(Section):
    """The optimizer, what it trains, and its schedule. Spans below 1 are shares of the budget, others steps."""

    path: ClassVar[str] = "optim"
    name: str = option("the optimizer; sgd adds the weight decay to the gradient", choices=("adamw", "sgd"))
    lr: float = option("peak learning rate", above=0)
    betas: list[float] = option("adamw: decay of the two moments", low=0, high=0.99999)
    eps: float = option("adamw: added to the root of the second moment", above=0)
    momentum: float | None = option("sgd: share of the last update that stays; null with adamw", low=0, high=0.99999)
    moments: str = option(
        "adamw's (optimizer state): fp32, 4 bytes a number; 8bit, 1 byte; offload, fp32 in the machine's memory "
        "instead of the GPU's",
        choices=("fp32", "8bit", "offload"),
    )
    weight_decay: float = option("of kernels and of what the router names, multiplied by the learning rate", low=0)
    head_weight_decay: float = option("of the head's kernel", low=0)
    layer_decay: float | None = option(
        "the learning rate of each layer as a share of the next one's, the head's being lr; null: all alike",
        above=0,
        high=1,
    )
    freeze: list[str] = option("parameters that stay as they are, by name or by pattern (*), such as [blocks.0.*]")
    schedule: str = option("after the warmup", choices=("rsqrt", "cosine", "linear", "constant"))
    warmup: float = option("linear from 0 to lr over this span", low=0)
    cooldown: float = option("rsqrt and constant: linear to 0 over this last span", low=0)
    timescale: float = option("rsqrt: lr / sqrt(1 + t / timescale), t steps after the warmup", above=0)
    final_lr: float = option("cosine and linear: where they end", low=0)
    clip_norm: float | None = option("largest global norm of the gradient; null: none", above=0)

    def check(self) -> None:
        if len(self.betas) != 2:
            raise UsageError(f"optim.betas={self.betas} needs two numbers")
        if (self.name == "sgd") != (self.momentum is not None):
            way = "give it, such as 0.9" if self.name == "sgd" else "set it to null, or optim.name=sgd"
            has = "needs a momentum" if self.name == "sgd" else f"has no use for optim.momentum={self.momentum:g}"
            raise UsageError(f"optim.name={self.name} {has}; {way}")
        if self.name != "adamw" and self.moments != "fp32":
            raise UsageError(
                f"optim.moments={self.moments} is a way to keep adamw's moments; set it to fp32, or optim.name=adamw"
            )
        if self.moments == "8bit" and find_spec("bitsandbytes") is None:
            raise UsageError("optim.moments=8bit needs bitsandbytes: pip install 'softmoe-cli[8bit]'")
        idle = {"cosine": "cooldown", "linear": "cooldown", "rsqrt": "final_lr", "constant": "final_lr"}[self.schedule]
        if getattr(self, idle):
            raise UsageError(
                f"optim.{idle}={getattr(self, idle):g} has no effect with optim.schedule={self.schedule}; set it to 0"
            )
        if self.final_lr > self.lr:
            raise UsageError(f"optim.final_lr={self.final_lr} is above optim.lr={self.lr}")


BUDGETS = ("steps", "epochs", "images", "minutes")


@dataclass
class Train(Section):
    """How long, how much at a time, in which arithmetic, and what is looked at on the way."""

    path: ClassVar[str] = "train"
    steps: int | None = option("budget in updates", low=1)
    epochs: float | None = option("budget in passes over the training images", above=0)
    images: int | None = option("budget in images", low=1)
    minutes: float | None = option("budget in minutes of training, evaluation and saving not counted", low=1e-6)
    default_epochs: float = option("the budget when none of the four above is given", above=0)
    batch_size: Any = option(
        "images per update; auto: a power of two that fits beside a sweep's other jobs", low=1, high=2**24
    )
    accumulate: int = option(
        "parts (micro-batches) that a batch is computed in, to save memory (gradient accumulation); same update",
        low=1,
    )
    precision: str = option("arithmetic under autocast; weights stay fp32", choices=("fp32", "bf16", "fp16"))
    compile: bool = option("torch.compile the model")
    recompute: bool = option(
        "recompute activations in the backward pass (activation checkpointing): less memory, a third more time"
    )
    max_tokens: int = option("refuse models of more tokens: attention's cost grows with their square", low=1)
    loss: str = option("sigmoid is summed over classes (the paper's)", choices=("softmax", "sigmoid"))
    label_smoothing: float = option("share of the target spread over all classes", low=0, high=0.99)
    ema: float | None = option(
        "decay of an average of the weights, which is then evaluated; null: none", above=0, high=0.999999
    )
    log_every: float = option("steps (or, below 1, share of the budget) between training rows", low=1e-6)
    eval_every: float = option(
        "steps (or, below 1, share of the budget) between looks at the validation images (validation)", low=1e-6
    )
    eval_batch_size: int = option("images per forward pass in evaluation", low=1)
    fewshot: list[int] = option(
        "shots per class from the training images for few-shot quality at each look; l2 is chosen on the validation "
        "images that are scored (the paper's rule)",
        low=1,
    )
    save_seconds: float = option(
        "shortest time between checkpoints; training waits for them 2% of the time at most", low=0
    )

    def check(self) -> None:
        given = {key: getattr(self, key) for key in BUDGETS if getattr(self, key) is not None}
        if len(given) > 1:
            raise UsageError(
                f"{' and '.join(f'train.{k}={typed(v)}' for k, v in given.items())} are two budgets; set all but one "
                "to null"
            )
        if self.batch_size == "auto":
            return
        if type(self.batch_size) is not int:
            raise UsageError(f"train.batch_size={self.batch_size} is neither a whole number nor auto")
        if self.batch_size % self.accumulate:
            raise UsageError(f"train.accumulate={self.accumulate} does not divide train.batch_size={self.batch_size}")

    def filled(self) -> Self:
        if any(getattr(self, key) is not None for key in BUDGETS):
            return self
        return replace(self, epochs=self.default_epochs)


WANDB_LETTERS = 128
"""Letters that W&B takes in a project, a group or a name."""


@dataclass
class Wandb(Section):
    """Where on Weights & Biases the run is mirrored."""

    path: ClassVar[str] = "wandb"
    project: str = option("project")
    entity: str | None = option("user or team; null: your default")
    group: str | None = option("null: the study")
    tags: list[str] = option("tags")
    name: str | None = option("null: the run's name")

    def check(self) -> None:
        """Checks W&B's own limits: W&B would refuse the run, and the record of the run would be lost."""
        for key in ("project", "entity", "group", "name"):
            value = getattr(self, key)
            if value is not None and not 1 <= len(value) <= WANDB_LETTERS:
                raise UsageError(
                    f"wandb.{key}={value} has {len(value)} characters; W&B takes 1 to {WANDB_LETTERS}"
                    + ("" if key == "project" else ", and null leaves the choice to it")
                )
        for key in ("project", "entity"):
            wrong = [letter for letter in "/\\#?%:" if letter in (getattr(self, key) or "")]
            if wrong:
                raise UsageError(
                    f"wandb.{key}={getattr(self, key)} has '{wrong[0]}' in it; W&B takes none of / \\ # ? % : there"
                )
        for tag in self.tags:
            if not 1 <= len(tag) <= 64:
                raise UsageError(
                    f"wandb.tags={self.tags}: the tag '{tag}' has {len(tag)} characters; W&B takes 1 to 64"
                )


def check_channels(data: Data, in_chans: int) -> None:
    """Grey images can be repeated into colour channels; nothing else converts by itself."""
    if data.channels not in (1, in_chans):
        raise UsageError(
            f"model.in_chans={in_chans} cannot take data.channels={data.channels} of data={data.name}; "
            f"set data.channels={in_chans} to convert the images"
        )
    for key in ("mean", "std"):
        if len(getattr(data, key)) not in (1, in_chans):
            raise UsageError(f"data.{key}={getattr(data, key)} needs 1 or model.in_chans={in_chans} numbers")


def check_tokens(config: "Config", tokens: int) -> None:
    """Refuses very many tokens, which are seldom meant, unless they are asked for."""
    if tokens > config.train.max_tokens:
        m = config.model
        raise UsageError(
            f"{m.name} at model.image_size={m.image_size} has {tokens:,} tokens, more than "
            f"train.max_tokens={config.train.max_tokens}, and attention's cost grows with their square; choose larger "
            "patches (without model= they follow the images) or smaller images (data.image_size, model.image_size), or "
            f"set train.max_tokens={tokens}"
        )


def check_devices(devices: int, batch: int, parts: int) -> None:
    """Checks that each device has at least one image of each part of a batch."""
    if batch // parts < devices:
        raise UsageError(f"devices={devices} cannot divide {batch // parts} images; use a larger batch_size")


def check_groups(key: str, images: int, router: dict[str, Any], parts: int = 1) -> None:
    """Checks that evaluation batches, and each of several parts of a training batch, are whole routing groups, so that
    their size does not change the result."""
    group = group_of(router)
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


NAME_BYTES = 255
"""The most bytes in the name of a file or folder, on nearly every file system; a letter may take four."""


def _bytes(name: str) -> int:
    return len(os.fsencode(name))


DEVICES = ("auto", "cpu", "cuda", "mps")
WAYS = ("ddp", "fsdp", "expert")
"""How several processes train one model, in the order in which `parallel=auto` tries them."""


@dataclass
class Config(Section):
    """What `softmoe train` and `softmoe finetune` compose."""

    path: ClassVar[str] = ""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    wandb: Wandb = field(default_factory=Wandb)
    seed: int = option("of weights, order and augmentation", low=0, high=2**31 - 1)
    study: str = option("the folder that a run's folder stands in (experiment)")
    name: str | None = option("what the run's folder is called before its signature; null: model-data")
    output_root: str = option("the folder of all studies")
    checkpoint: str | None = option("finetune: a run folder, a .safetensors file, hf-hub:OWNER/NAME or timm:NAME")
    allow_unexpected: list[str] = option("finetune: weights that may be left unused, by name or by pattern (*)")
    trust: str | None = option(
        "finetune: a router of the checkpoint's that is not softmoe's, as module.Class: its code will run"
    )
    slots: str = option(
        "finetune: slots per expert as in the checkpoint, or in proportion to the tokens",
        choices=("kept", "proportional"),
    )
    tracking: str = option(
        "Weights & Biases; auto: WANDB_MODE, else online when a key is configured, else offline",
        choices=("auto", "online", "offline", "off"),
    )
    device: str = option("auto: cuda, else mps, else cpu", choices=DEVICES)
    threads: int | None = option("CPU threads; null: torch's choice", low=1)
    devices: int = option("devices of this machine that share each batch, a process on each", low=1)
    parallel: str = option(
        "what each of several processes has: ddp: the whole model; fsdp: a share of every weight; expert: some experts "
        "of each layer, and a share of all else; auto: the first of these that fits",
        choices=("auto", *WAYS),
    )
    restarts: int = option("with devices: how often a failure restarts all of them from the last checkpoint", low=0)

    def check(self) -> None:
        if self.data.test_fraction == 1:
            raise UsageError(
                f"data={self.data.name} has data.test_fraction=1: its images are for softmoe evaluate only"
            )
        if self.restarts and self.devices == 1:
            raise UsageError(
                f"restarts={self.restarts} has no effect with devices=1; torchrun has --max-restarts of its own"
            )
        settled = self.train.batch_size != "auto"
        if settled and (self.augment.mixup or self.augment.cutmix) and self.train.batch_size % 2:
            raise UsageError(
                f"augment.mixup and augment.cutmix pair images: train.batch_size={self.train.batch_size} must be even"
            )
        if self.model.backbone.patch_size is not None:  # else timm knows, when the model is made
            side = self.model.image_size // self.model.backbone.patch_size
            check_tokens(self, side**2 + bool(self.model.backbone.class_token))
        check_channels(self.data, self.model.in_chans)
        check_groups("train.eval_batch_size", self.train.eval_batch_size, self.model.router)
        if settled and self.train.accumulate > 1:
            check_groups("train.batch_size", self.train.batch_size, self.model.router, self.train.accumulate)
        if self.train.minutes is not None:
            spans = {
                "optim.warmup": self.optim.warmup,
                "optim.cooldown": self.optim.cooldown,
                "train.log_every": self.train.log_every,
                "train.eval_every": self.train.eval_every,
            }
            for key, span in spans.items():
                if span >= 1:
                    raise UsageError(
                        f"{key}={span:g} counts steps, which train.minutes={self.train.minutes:g} does not know; "
                        "give a share below 1"
                    )
            if self.optim.schedule == "rsqrt":
                raise UsageError(
                    "optim.schedule=rsqrt counts steps, which train.minutes does not know; "
                    "use cosine, linear or constant"
                )
        if self.devices > 1 and self.train.batch_size != "auto":
            check_devices(self.devices, self.train.batch_size, self.train.accumulate)
        for key, text in {"study": self.study, "name": self.name or "x"}.items():
            if not text or text.startswith(("/", ".")) or ".." in text.split("/") or printable(text) != text:
                raise UsageError(f"{key}={text!a} must be a plain folder name")
        longest = {"study": max(self.study.split("/"), key=_bytes), "name": f"{self.name}-0123456789"}
        for key, text in longest.items():
            if _bytes(text) > NAME_BYTES:
                extra = " with the signature behind it" if key == "name" else ""
                raise UsageError(
                    f"{key}={text[:30]}… has {_bytes(text)} bytes{extra}; a folder's name may have {NAME_BYTES}"
                )


@dataclass
class DataCheckConfig(Section):
    """What `softmoe data check` composes."""

    path: ClassVar[str] = ""
    data: Data = field(default_factory=Data)
    format: str = option("what is printed", choices=("table", "json"))


AUDITS = ("neighbours", "capacity", "slots", "experts")


@dataclass
class EvaluateConfig(Section):
    """What `softmoe evaluate` composes."""

    path: ClassVar[str] = ""
    checkpoint: Any = option("a run folder, a .safetensors file or hf-hub:OWNER/NAME; of a list, the average")
    trust: str | None = option("a router of the checkpoint's that is not softmoe's, as module.Class: its code will run")
    soup: str = option(
        "a list of checkpoints: all of them, or those that do not lower validation top-1", choices=("uniform", "greedy")
    )
    data: Data = field(default_factory=Data)
    split: str = option("which images", choices=("test", "validation", "train"))
    batch_size: int = option("images per forward pass", low=1)
    loss: str | None = option("as in train.loss; null: the checkpoint's", choices=("softmax", "sigmoid"))
    precision: str | None = option("as in train.precision; null: the checkpoint's", choices=("fp32", "bf16", "fp16"))
    calibration_bins: int = option("bins of equal width of the expected calibration error", low=1)
    real: str | None = option(
        "ImageNet's validation images: top-1 by ReaL labels too; a JSON file of theirs, or timm, which brings it"
    )
    predictions: str | None = option("a CSV file for what the model said of each image")
    confusion: str | None = option(
        "a CSV file for the images by label and prediction; above 2,000 classes, the pairs that there are"
    )
    fewshot: list[int] = option("shots per class from the training images, for few-shot quality of the features", low=1)
    fewshot_l2: str = option(
        "which images choose the ridge's l2; scored, the paper's rule, is optimistic", choices=("validation", "scored")
    )
    fewshot_seed: int = option("of the draw of the shots", low=0)
    audit: list[str] = option("what predictions are held against changes of", choices=AUDITS)
    audit_images: int | None = option("look at so many images of the split; null: all", low=1)
    format: str = option("what is printed", choices=("table", "json"))
    device: str = option("auto: cuda, else mps, else cpu", choices=DEVICES)
    threads: int | None = option("CPU threads; null: torch's choice", low=1)

    def check(self) -> None:
        idle = {
            "soup=greedy": self.soup == "greedy" and not isinstance(self.checkpoint, list),
            f"audit_images={self.audit_images}": self.audit_images is not None and not self.audit,
            f"fewshot_l2={self.fewshot_l2}": self.fewshot_l2 == "scored" and not self.fewshot,
        }
        needs = dict(zip(idle, ("a list of checkpoints", "audit", "fewshot"), strict=True))
        for word, is_idle in idle.items():
            if is_idle:
                raise UsageError(f"{word} has no effect without {needs[word]}")


@dataclass
class UpcycleConfig(Section):
    """What `softmoe upcycle` composes."""

    path: ClassVar[str] = ""
    checkpoint: str = option("a dense model: a run folder, a .safetensors file, hf-hub:OWNER/NAME or timm:NAME")
    allow_unexpected: list[str] = option("weights that may be left unused, by name or by pattern (*)")
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    expert_noise: float = option("noise on the copies, as a share of each tensor's standard deviation", low=0)
    expert_redraw: float = option(
        "share of each expert's hidden units that are drawn again (Drop-Upcycling)", low=0, high=1
    )
    carry_optimizer: bool = option("start a finetuning from AdamW's moments too, where the checkpoint has them")
    preserve: bool = option("an error unless the new model computes what the old one did; measured in float64")
    seed: int = option("of the router, the noise and what is drawn again", low=0, high=2**31 - 1)
    images: int = option("validation images, the first ones, on which the receipt compares both models", low=1)
    folder: str | None = option("where the checkpoint goes; null: output_root/upcycled/NAME-SIGNATURE")
    output_root: str = option("the folder of all studies")
    format: str = option("what is printed", choices=("table", "json"))
    threads: int | None = option("CPU threads; null: torch's choice", low=1)

    def check(self) -> None:
        check_channels(self.data, self.model.in_chans)
        check_groups("images", self.images, self.model.router)
        if self.preserve and (self.expert_noise or self.expert_redraw):
            raise UsageError(
                f"preserve=true cannot hold with expert_noise={self.expert_noise:g} and "
                f"expert_redraw={self.expert_redraw:g}: experts must stay copies; set both to 0"
            )


PROGRAMS = ("torch_export", "onnx")


@dataclass
class ExportConfig(Section):
    """What `softmoe export` composes."""

    path: ClassVar[str] = ""
    checkpoint: str = option("a run folder, a .safetensors file or hf-hub:OWNER/NAME")
    trust: str | None = option("a router of the checkpoint's that is not softmoe's, as module.Class: its code will run")
    data: Data = field(default_factory=Data)
    formats: list[str] = option("programs beside the weights, each held against the model on images", choices=PROGRAMS)
    images: int = option("validation images, the first ones, on which outputs are compared", low=1)
    push: str | None = option("OWNER/NAME on the Hugging Face hub, where the folder is copied to; made private if new")
    folder: str | None = option("where everything goes; null: output_root/exported/NAME-SIGNATURE")
    output_root: str = option("the folder of all studies")
    format: str = option("what is printed", choices=("table", "json"))
    threads: int | None = option("CPU threads; null: torch's choice", low=1)


@dataclass
class Measured(Section):
    """What `softmoe cost` and `softmoe match` have in common: a model, and what is measured of it."""

    path: ClassVar[str] = ""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    batch_size: int = option("images per update, for memory and clock", low=1)
    accumulate: int = option("as in train.accumulate", low=1)
    recompute: bool = option("as in train.recompute")
    precision: str = option("as in train.precision", choices=("fp32", "bf16", "fp16"))
    compile: bool = option("torch.compile the model that the clock measures")
    repeats: int = option("times that the clock measures each", low=3)
    device: str = option("auto: cuda, else mps, else cpu", choices=DEVICES)
    threads: int | None = option("CPU threads; null: torch's choice", low=1)

    def check(self) -> None:
        if self.batch_size % self.accumulate:
            raise UsageError(f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}")


@dataclass
class CostConfig(Measured):
    """What `softmoe cost` composes."""

    devices: int = option("devices that share each batch, here or elsewhere: memory is that of each", low=1)
    parallel: str = option("as in softmoe train: what each of several devices has of the model", choices=WAYS)
    clock: bool = option("measure latency, throughput and peak memory on this machine")
    format: str = option("what is printed", choices=("table", "json", "csv", "markdown"))

    def check(self) -> None:
        super().check()
        if self.devices == 1 and self.parallel != "ddp":
            raise UsageError(f"parallel={self.parallel} has no effect with devices=1")
        if self.devices > 1 and self.clock:
            raise UsageError(f"clock=true measures one device; leave out devices={self.devices}")
        check_devices(self.devices, self.batch_size, self.accumulate)


MATCHED = (
    "forward_gflop", "train_gflop", "train_pflop", "params_m", "active_params_m", "peak_mib", "latency_ms",
    "train_step_ms",
)  # fmt: skip
FREE_KEYS = (
    "model.router.num_experts", "model.router.slots_per_expert", "model.moe_blocks", "model.backbone.depth",
    "model.backbone.width", "train.steps",
)  # fmt: skip


@dataclass
class MatchConfig(Measured):
    """What `softmoe match` composes."""

    free: str = option("the one setting to solve for", choices=FREE_KEYS)
    to: str = option("the model whose cost is to be met, as in model=, or BACKBONE_ROUTER where that has no name")
    by: str = option("the cost that is to be the same", choices=MATCHED)
    tolerance: float = option("largest difference, as a share of the other's cost", above=0, high=1)
    steps: int | None = option("by=train_pflop: updates that the other model is trained", low=1)
    format: str = option("what is printed", choices=("table", "json"))

    def check(self) -> None:
        super().check()
        if (self.by == "train_pflop") != (self.steps is not None):
            raise UsageError(f"by={self.by} and steps={self.steps}: steps belong to by=train_pflop, which needs them")
        if self.free == "train.steps" and self.by != "train_pflop":
            raise UsageError(f"free=train.steps changes no {self.by}; use by=train_pflop with steps=")


@dataclass
class Limit(Section):
    """The most that a job of a search may cost; a job's cost is known before it runs."""

    path: ClassVar[str] = "hydra.launcher.limit"
    train_pflop: float | None = option("search: most that a job may cost, or it is not trained", above=0)
    forward_gflop: float | None = option("as train_pflop, an image's forward pass", above=0)
    train_gflop: float | None = option("as train_pflop, an image's training", above=0)
    params_m: float | None = option("as train_pflop, millions of parameters", above=0)
    active_params_m: float | None = option("as train_pflop, millions that a token meets", above=0)
    peak_mib: float | None = option("as train_pflop, predicted memory", above=0)

    @property
    def given(self) -> dict[str, float]:
        return {key: amount for key, amount in vars(self).items() if amount is not None}


SEARCHED = ("validation_top1_pct", "best_validation_top1_pct")
"""Qualities that a search may look at: never those of the test images."""
FORESEEN = tuple(f.name for f in dataclasses.fields(Limit))
"""Costs that are known before a job runs."""


@dataclass
class Launcher(Section):
    """Where and how the jobs of `softmoe train -m` run: hydra.launcher of any place."""

    path: ClassVar[str] = "hydra.launcher"
    _target_: str = MISSING
    where: str = MISSING
    jobs: int | None = option("jobs at a time; null: one per GPU, or one per core; on a cluster: all", low=1)
    objective: list[str] = option(
        "what a searching sweeper (hydra/sweeper=optuna) is told of each job", choices=(*SEARCHED, *FORESEEN)
    )
    limit: Limit = field(default_factory=Limit)
    plan: bool = option("list the jobs with their cost and stop; --plan sets it")

    def check(self) -> None:
        if self.limit.given and (len(self.objective) != 1 or self.objective[0] not in SEARCHED):
            raise UsageError(
                f"hydra.launcher.limit={self.limit.given} goes with one quality as hydra.launcher.objective, such as "
                f"[{SEARCHED[0]}], not with {self.objective}; add +search=quality"
            )


@dataclass
class LocalLauncher(Launcher):
    """Processes of this machine."""


@dataclass
class SlurmLauncher(Launcher):
    """Jobs of Slurm, through submitit."""

    cluster: str = option("local: submitit's own processes on this machine, to try it", choices=("slurm", "local"))
    partition: str | None = option("Slurm's partition; null: its default")
    account: str | None = option("Slurm's account; null: your default")
    gpus: int = option("GPUs of a job", low=0)
    cpus: int = option("CPU cores, and threads, of a job", low=1)
    memory_gib: int = option("memory of a job", low=1)
    timeout_min: int = option("minutes after which Slurm ends a job; it saves before that", low=2)

    def check(self) -> None:
        super().check()
        if self.cluster == "local" and (self.partition or self.account):
            raise UsageError("hydra.launcher.cluster=local has neither partition nor account; leave them null")


@dataclass
class RayLauncher(Launcher):
    """Tasks of Ray, each in a worker process of its own."""

    address: str | None = option("of a running Ray, or auto; null: a Ray on this machine for this sweep only")
    gpus: float = option("GPUs of a job; a fraction shares one", low=0)
    cpus: int = option("CPU cores, and threads, of a job", low=1)


NOT_SCIENCE = (
    "output_root", "study", "name", "tracking", "wandb", "device", "threads", "devices", "parallel", "restarts",
    "checkpoint", "trust", "data.root", "data.workers", "data.prefetch", "data.memory_gib", "data.max_megapixels",
    "data.crop", "data.area", "train.default_epochs", "train.max_tokens", "train.log_every", "train.eval_batch_size",
    "train.fewshot", "train.save_seconds", "slots",
)  # fmt: skip
"""Keys that are left out of the signature: they change where, when or how fast a run goes but never its numbers, or
only other programs read them. (The number that `slots` becomes stands in model.router.)"""


SCHEMAS: dict[str, type[Section]] = {
    "train": Config, "finetune": Config, "evaluate": EvaluateConfig, "cost": CostConfig, "match": MatchConfig,
    "upcycle": UpcycleConfig, "export": ExportConfig, "data": DataCheckConfig,
}  # fmt: skip
"""What each command composes."""

LAUNCHERS: dict[str, type[Launcher]] = {"local": LocalLauncher, "slurm": SlurmLauncher, "ray": RayLauncher}
"""The options of hydra.launcher, by place."""
