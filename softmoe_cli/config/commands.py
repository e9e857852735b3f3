"""The options of all other commands, and what each command composes."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from softmoe_cli.config.data import Data, check_channels
from softmoe_cli.config.model import Model
from softmoe_cli.config.option import Section, option, typed
from softmoe_cli.config.pruning import MEASURES
from softmoe_cli.config.run import DEVICES, WAYS, Config, check_devices
from softmoe_cli.errors import UsageError


@dataclass
class DataCheckConfig(Section):
    """What `softmoe data check` composes."""

    path: ClassVar[str] = ""
    data: Data = field(default_factory=Data)
    format: str = option("what is printed", choices=("table", "json"))


def as_list(value: Any) -> list[Any]:
    """A list as it is, one value as a list of it, null as an empty one."""
    return value if isinstance(value, list) else [] if value is None else [value]


AUDITS = ("neighbours", "capacity", "slots", "experts", "kinds")


@dataclass
class EvaluateConfig(Section):
    """What `softmoe evaluate` composes."""

    path: ClassVar[str] = ""
    checkpoint: Any = option(
        "a run folder, a .safetensors file, hf-hub:OWNER/NAME or vmoe:PATH; of a list, the average"
    )
    base: str | None = option("where the weights are that a checkpoint of adapters belongs to, if they moved")
    trust: str | None = option("a router of the checkpoint's that is not softmoe's, as module.Class: its code will run")
    soup: str = option(
        "a list of checkpoints: all of them, or those that do not lower validation top-1", choices=("uniform", "greedy")
    )
    data: Data = field(default_factory=Data)
    task: str | None = option(
        "of a checkpoint that knows several tasks the one that the images are of; null: all, on its own mix of sets"
    )
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
    contrast: Any = option(
        "self-contrast: a weak activation or a list, of rank_R, random_1, top_J; soft: drop_Q, slot_rank_R, flat; skip"
    )
    contrast_beta: Any = option("strengths of the contrast to choose from", above=0)
    contrast_alpha: Any = option(
        "a class must have so large a share of the best one's probability; 0: no such mask, which the paper has not",
        low=0,
        high=1,
    )
    contrast_by: str = option(
        "images whose top-1 chooses among the settings; scored, the paper's rule, is optimistic",
        choices=("validation", "scored"),
    )
    contrast_gates: str = option(
        "weight of experts in a weak pass: as trained, or shares that add up to one, so that a single expert has 1",
        choices=("trained", "one"),
    )
    contrast_draws: int = option("draws of random_1, whose mean and range are told", low=1)
    contrast_seed: int = option("of these draws", low=0)
    contrast_clock: bool = option("measure the time of two passes over that of one")
    format: str = option("what is printed", choices=("table", "json"))
    device: str = option("auto: cuda, else mps, else cpu", choices=DEVICES)
    threads: int | None = option("CPU threads; null: torch's choice", low=1)

    def check(self) -> None:
        words, strengths = as_list(self.contrast), (as_list(self.contrast_beta), as_list(self.contrast_alpha))
        if not all(isinstance(word, str) for word in words) or len(set(words)) < len(words):
            raise UsageError(
                f"contrast={typed(self.contrast)} is no list of weak activations, each once: [rank_2,skip]"
            )
        for key, numbers in zip(("contrast_beta", "contrast_alpha"), strengths, strict=True):
            if not numbers or not all(type(number) in (int, float) for number in numbers):
                raise UsageError(f"{key}={typed(getattr(self, key))} is neither a number nor a list of numbers")
        idle = {
            "soup=greedy": self.soup == "greedy" and not isinstance(self.checkpoint, list),
            f"audit_images={self.audit_images}": self.audit_images is not None and not self.audit,
            f"fewshot_l2={self.fewshot_l2}": self.fewshot_l2 == "scored" and not self.fewshot,
            f"contrast_by={self.contrast_by}": self.contrast_by == "scored" and not words,
            f"contrast_gates={self.contrast_gates}": self.contrast_gates == "one" and not words,
            "contrast_clock=true": self.contrast_clock and not words,
        }
        needs = dict(zip(idle, ("a list of checkpoints", "audit", "fewshot", *["contrast"] * 3), strict=True))
        for word, is_idle in idle.items():
            if is_idle:
                raise UsageError(f"{word} has no effect without {needs[word]}")

    def filled(self) -> Self:
        """One word or number is a list of one."""
        beta, alpha = (list(map(float, as_list(each))) for each in (self.contrast_beta, self.contrast_alpha))
        return replace(self, contrast=as_list(self.contrast), contrast_beta=beta, contrast_alpha=alpha)


@dataclass
class UpcycleConfig(Section):
    """What `softmoe upcycle` composes."""

    path: ClassVar[str] = ""
    checkpoint: str = option(
        "a dense model: a run folder, a .safetensors file, hf-hub:OWNER/NAME, timm:NAME or vmoe:PATH"
    )
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
        if self.preserve and (self.expert_noise or self.expert_redraw):
            raise UsageError(
                f"preserve=true cannot hold with expert_noise={self.expert_noise:g} and "
                f"expert_redraw={self.expert_redraw:g}: experts must stay copies; set both to 0"
            )


@dataclass
class Smaller(Section):
    """What `softmoe prune` and `softmoe extract` have in common: a checkpoint, a smaller one of it, and how they
    are compared."""

    path: ClassVar[str] = ""
    checkpoint: str = option("a run folder, a .safetensors file, hf-hub:OWNER/NAME or vmoe:PATH")
    trust: str | None = option("a router of the checkpoint's that is not softmoe's, as module.Class: its code will run")
    data: Data = field(default_factory=Data)
    batch_size: int = option("images per forward pass", low=1)
    clock: bool = option("measure the latency of both models on this machine, in turns")
    repeats: int = option("times that the clock measures each", low=3)
    folder: str | None = option("where the checkpoint goes; null: output_root/pruned or extracted/NAME-SIGNATURE")
    output_root: str = option("the folder of all studies")
    format: str = option("what is printed", choices=("table", "json"))
    device: str = option("auto: cuda, else mps, else cpu", choices=DEVICES)
    threads: int | None = option("CPU threads; null: torch's choice", low=1)


@dataclass
class PruneConfig(Smaller):
    """What `softmoe prune` composes."""

    keep: int | None = option("experts that stay in each block; null: those that are left", low=1)
    by: str = option(
        "what an expert's worth is: the sum of its gates, its tokens, how its part of the router has grown, or chance",
        choices=MEASURES,
    )
    before: str | None = option("by=router_change: the checkpoint since which routers have changed")
    to: str = option("a mixture of the experts that stay or, of one in each block, a plain ViT",
                     choices=("experts", "dense"))  # fmt: skip
    seed: int = option("of by=random", low=0, high=2**31 - 1)
    images: int = option("training images that alpha_score and hit_rate are taken on, spread over all", low=1)

    def check(self) -> None:
        if (self.by == "router_change") != (self.before is not None):
            raise UsageError(
                f"by={self.by} and before={self.before}: by=router_change needs the checkpoint that the routers are "
                "compared with, and nothing else does"
            )


@dataclass
class ExtractConfig(Smaller):
    """What `softmoe extract` composes, of a checkpoint that was trained with data=mix."""

    task: Any = option("the task to extract, by the name of its set, or a list of some")
    form: str = option(
        "experts: a mixture of the experts that the tasks take; folded: of one task, one expert in each block; dense: "
        "that as a plain ViT",
        choices=("experts", "folded", "dense"),
    )

    def check(self) -> None:
        names = as_list(self.task)
        if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise UsageError(f"task={typed(self.task)} is neither a task nor a list of some, each once")


PROGRAMS = ("torch_export", "onnx")


@dataclass
class ExportConfig(Section):
    """What `softmoe export` composes."""

    path: ClassVar[str] = ""
    checkpoint: str = option("a run folder, a .safetensors file, hf-hub:OWNER/NAME or vmoe:PATH")
    base: str | None = option("where the weights are that a checkpoint of adapters belongs to, if they moved")
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
    "forward_gflop", "train_gflop", "train_pflop", "landed_pflop", "params_m", "active_params_m", "peak_mib",
    "latency_ms", "train_step_ms",
)  # fmt: skip
OF_STEPS = ("train_pflop", "landed_pflop")
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
    steps: int | None = option("by=train_pflop or landed_pflop: updates that the other model is trained", low=1)
    format: str = option("what is printed", choices=("table", "json"))

    def check(self) -> None:
        super().check()
        if (self.by in OF_STEPS) != (self.steps is not None):
            words = " and ".join(f"by={each}" for each in OF_STEPS)
            raise UsageError(f"by={self.by} and steps={self.steps}: steps belong to {words}, which need them")
        if self.free == "train.steps" and self.by not in OF_STEPS:
            raise UsageError(f"free=train.steps changes no {self.by}; use by=train_pflop with steps=")


@dataclass
class ShowConfig(Section):
    """What `softmoe show` composes."""

    path: ClassVar[str] = ""
    run: str = option("the folder of a run; softmoe show RUN is short for softmoe show run=RUN")
    image: str | None = option("an image file of your own to paint the routing on; null: images of the split")
    split: str = option("which images", choices=("validation", "test", "train"))
    images: int = option("images of the split, spread evenly, that all but the curves is made of", low=1)
    painted: int = option("how many of them are painted with their routing", low=1, high=32)
    task: str | None = option(
        "of a checkpoint that knows several tasks the one that the images are of; null: all, on its own mix of sets"
    )
    data: Data = field(default_factory=Data)
    base: str | None = option("where the weights are that a checkpoint of adapters belongs to, if they moved")
    trust: str | None = option("a router of the checkpoint's that is not softmoe's, as module.Class: its code will run")
    batch_size: int = option("images per forward pass", low=1)
    precision: str | None = option("as in train.precision; null: the checkpoint's", choices=("fp32", "bf16", "fp16"))
    folder: str | None = option("where the page and the pictures go; null: show/ in the run's folder")
    wandb: bool = option("send page and pictures to Weights & Biases, as a run of the study's group")
    follow: bool = option("while the run trains, serve its page on this machine and renew it; ends by itself")
    port: int = option("follow: where the page is served; 0: any that is free", low=0, high=65535)
    every_s: float = option("follow: seconds between two looks at the run's files", low=1)
    format: str = option("what is printed", choices=("table", "json"))
    device: str = option("auto: cuda, else mps, else cpu", choices=DEVICES)
    threads: int | None = option("CPU threads; null: torch's choice", low=1)

    def check(self) -> None:
        if self.follow and self.wandb:
            raise UsageError("follow=true and wandb=true: a page that is renewed is not sent; leave one out")
        if self.follow and self.folder is not None:
            raise UsageError(
                f"follow=true and folder={self.folder}: a page that is served is not written; leave one out"
            )
        if self.follow and self.format != "table":
            raise UsageError(f"follow=true and format={self.format}: of a page that is served no row is printed; leave "
                             "one out")  # fmt: skip


SCHEMAS: dict[str, type[Section]] = {
    "train": Config, "finetune": Config, "evaluate": EvaluateConfig, "cost": CostConfig, "match": MatchConfig,
    "upcycle": UpcycleConfig, "prune": PruneConfig, "extract": ExtractConfig, "export": ExportConfig,
    "data": DataCheckConfig, "show": ShowConfig,
}  # fmt: skip
"""What each command composes."""
