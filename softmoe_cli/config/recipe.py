"""The options of a recipe: how images are changed, what the optimizer does, how long training takes."""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, ClassVar, Self

from softmoe_cli.config.option import Section, option, typed
from softmoe_cli.errors import UsageError


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
    precision: str = option(
        "arithmetic under autocast; weights stay fp32; auto: bf16 where that is faster, else fp32",
        choices=("fp32", "bf16", "fp16", "auto"),
    )
    compile: bool = option("torch.compile the model; runs of the same shapes find it compiled")
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
