"""The options of `softmoe train` and `softmoe finetune`, and which of them make a run another run."""

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

from softmoe_cli.config.data import Data, check_channels
from softmoe_cli.config.model import Model, check_groups, group_of
from softmoe_cli.config.option import Section, option
from softmoe_cli.config.pruning import Prune
from softmoe_cli.config.recipe import Augment, Optim, Train
from softmoe_cli.errors import UsageError
from softmoe_cli.text import printable

WANDB_WORDS = ("auto", "online", "offline")
"""What tracking= may say of Weights & Biases; without one of them nothing is sent there."""
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


def check_tracking(tracking: Any) -> None:
    """Checks that where rows are mirrored to is a word, or several that go together."""
    words = tracking if isinstance(tracking, list) else [tracking]
    if not words or not all(isinstance(word, str) for word in words):
        raise UsageError(f"tracking={tracking} is no word and no list of words; tracking=off mirrors nothing")
    of_wandb = [word for word in words if word in WANDB_WORDS]
    if len(of_wandb) > 1 or len(set(words)) < len(words) or ("off" in words and len(words) > 1):
        raise UsageError(
            f"tracking=[{','.join(words)}] says more than one thing; write off alone, or one of "
            f"{', '.join(WANDB_WORDS)} with tensorboard, trackio or both, as [offline,tensorboard]"
        )


def check_parts(config: "Config", whole_batches: str | None) -> None:
    """Refuses parts of a batch where a layer needs it whole; `whole_batches` says why, and the way out."""
    if whole_batches is not None and config.train.accumulate > 1:
        raise UsageError(f"train.accumulate={config.train.accumulate}: {whole_batches}")


def check_rows(key: str, images: int, model: Model, whole_batches: str | None, tokens: int) -> None:
    """Refuses a single row where a layer needs the variance of several: `images` of so many `tokens` each, or of one
    row in a head. `whole_batches` says whether there is such a layer; `key` names the number of images."""
    if whole_batches is None or images > 1:
        return
    head = model.head != "linear" and model.head_norm == "batch"
    if head or tokens == 1:
        norm, row = ("model.head_norm", "image") if head else ("model.router.norm", "token")
        raise UsageError(f"{norm}=batch has no variance over one {row}; use a larger {key}, or set {norm}=layer")


def check_devices(devices: int, batch: int, parts: int) -> None:
    """Checks that each device has at least one image of each part of a batch."""
    if batch // parts < devices:
        raise UsageError(f"devices={devices} cannot divide {batch // parts} images; use a larger batch_size")


def check_shared_groups(config: "Config", processes: int) -> None:
    """Checks that where blocks have groups of different sizes all are full in a batch that several processes share: a
    process's share of the groups is its share of each router's auxiliary losses."""
    if processes > 1 and len(set(map(group_of, config.model.routers))) > 1:
        check_groups("train.batch_size", config.train.batch_size, config.model.images_per_group)


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
    prune: Prune = field(default_factory=Prune)
    wandb: Wandb = field(default_factory=Wandb)
    seed: int = option("of weights, order and augmentation", low=0, high=2**31 - 1)
    study: str = option("the folder that a run's folder stands in (experiment)")
    name: str | None = option("what the run's folder is called before its signature; null: model-data")
    output_root: str = option("the folder of all studies")
    checkpoint: str | None = option(
        "finetune: a run folder, a .safetensors file, hf-hub:OWNER/NAME, timm:NAME or vmoe:PATH"
    )
    base: str | None = option("finetune: where the weights are that a checkpoint of adapters belongs to, if they moved")
    allow_unexpected: list[str] = option("finetune: weights that may be left unused, by name or by pattern (*)")
    trust: str | None = option(
        "finetune: a router of the checkpoint's that is not softmoe's, as module.Class: its code will run"
    )
    slots: str = option(
        "finetune: slots per expert as in the checkpoint, or in proportion to the tokens",
        choices=("kept", "proportional"),
    )
    tracking: Any = option(
        "Weights & Biases; auto: WANDB_MODE, else online when a key is configured, else offline; tensorboard: an event "
        "file in the run's folder; trackio: Trackio's database on this machine; [auto,tensorboard]: both",
        choices=(*WANDB_WORDS, "off", "tensorboard", "trackio"),
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
        check_tracking(self.tracking)
        if self.restarts and self.devices == 1:
            raise UsageError(
                f"restarts={self.restarts} has no effect with devices=1; torchrun has --max-restarts of its own"
            )
        if self.prune.keep is not None and self.model.adapter.name != "none":
            raise UsageError(
                f"prune.keep={self.prune.keep} drops experts that are trained, and adapter={self.model.adapter.name} "
                "keeps them frozen; set one of them to null or none"
            )
        paired = "mixup" if self.augment.mixup else "cutmix"
        if self.data.sets is not None and getattr(self.augment, paired):
            raise UsageError(
                f"augment.{paired}={getattr(self.augment, paired):g} mixes two images, which data=mix may have of two "
                "tasks; set augment.mixup=0 and augment.cutmix=0"
            )
        if self.data.sets is not None and self.train.fewshot:
            raise UsageError(
                f"train.fewshot={self.train.fewshot} is of the classes of one set, and data=mix has several; leave it "
                "out, and evaluate the run with task=NAME fewshot=…"
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
        if settled and self.train.accumulate > 1:
            check_groups("train.batch_size", self.train.batch_size, self.model.images_per_group, self.train.accumulate)
        elif settled:
            check_shared_groups(self, self.devices)
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


NOT_SCIENCE = (
    "output_root", "study", "name", "tracking", "wandb", "device", "threads", "devices", "parallel", "restarts",
    "checkpoint", "base", "trust", "data.root", "data.workers", "data.prefetch", "data.memory_gib",
    "data.cache", "data.max_megapixels", "data.crop", "data.area", "train.default_epochs", "train.max_tokens",
    "train.log_every", "train.eval_batch_size", "train.fewshot", "train.save_seconds", "slots",
)  # fmt: skip
"""Keys that are left out of the signature: they change where, when or how fast a run goes but never its numbers, or
only other programs read them. (The number that `slots` becomes stands in model.router.)"""
