"""What training changes, how it goes into a checkpoint, and how a run takes it back: from its own checkpoint, or from
the weights of another run that it begins with."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from softmoe_cli.config.run import Config
from softmoe_cli.errors import UsageError
from softmoe_cli.model.adapted import trained_names
from softmoe_cli.model.weights import LoadReport, experts_left, load_weights
from softmoe_cli.moe.kind import Layer
from softmoe_cli.moe.layer import MoE
from softmoe_cli.optim import restore, state_of
from softmoe_cli.parallel import Average, Crew, part_of
from softmoe_cli.run.checkpoint import Checkpoint, random_state, set_random_state
from softmoe_cli.run.delta import Delta
from softmoe_cli.run.folder import Run
from softmoe_cli.run.header import Source
from softmoe_cli.run.source import read_moments
from softmoe_cli.terminal import Screen
from softmoe_cli.text import patterns
from softmoe_cli.train.progress import Progress
from softmoe_cli.train.pruning import Decision, Pruning


@dataclass(frozen=True)
class Trained:
    """What training changes. `average` is the average of the weights, if there is one; `delta`, of a model with
    adapters, what checkpoints hold of its weights."""

    model: VisionTransformer
    average: Average | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    pruning: Pruning | None = None
    """Which experts go, if some do."""
    delta: Delta | None = None

    @property
    def evaluated(self) -> nn.Module:
        """The model whose quality counts: the average of the weights where there is one."""
        return self.model if self.average is None else self.average.module

    def weights(self) -> dict[str, Tensor]:
        """The weights of the model that is evaluated, as far as checkpoints hold them."""
        return {key: value.contiguous() for key, value in self._held(self.evaluated).items()}

    def _held(self, model: nn.Module) -> dict[str, Tensor]:
        held = None if self.delta is None else self.delta.names
        return {key: value for key, value in model.state_dict().items() if held is None or key in held}

    def tensors(self) -> dict[str, Tensor]:
        """What resuming needs beside `weights`: optimizer moments by parameter name, random states, and the weights
        that are trained where an average of them is what is evaluated."""
        tensors = random_state()
        if self.average is not None:
            tensors |= {f"weights.{key}": value for key, value in self._held(self.model).items()}
        for name, parameter in self.model.named_parameters():
            for key, value in state_of(self.optimizer, parameter).items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors | ({} if self.pruning is None else self.pruning.tensors())

    def leave(self, decisions: dict[int, Decision]) -> None:
        """Lets experts go, of the model and of its average."""
        for model in (self.model, self.evaluated) if self.average is not None else (self.model,):
            for place, decision in decisions.items():
                layer = model.get_submodule(f"blocks.{place}.mlp")
                assert isinstance(layer, MoE)
                layer.leave(decision.stay)

    def state(self, progress: Progress) -> dict[str, Any]:
        """The plain numbers of a checkpoint."""
        return dataclasses.asdict(progress) | {"scaler": self.scaler.state_dict()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Puts everything back as the checkpoint has it, random states included."""
        raw = {k.removeprefix("weights."): v for k, v in checkpoint.training.items() if k.startswith("weights.")}
        self._restore_weights(self.model, raw or checkpoint.weights)
        if self.average is not None:
            self._restore_weights(self.average.module, checkpoint.weights)
        for name, parameter in self.model.named_parameters():
            prefix = f"optimizer.{name}."
            moments = {k.removeprefix(prefix): v for k, v in checkpoint.training.items() if k.startswith(prefix)}
            restore(self.optimizer, parameter, moments)
        self.scaler.load_state_dict(checkpoint.state["scaler"])
        if self.pruning is not None:
            self.pruning.restore(checkpoint.training)
        set_random_state(checkpoint.training)

    def _restore_weights(self, model: nn.Module, saved: dict[str, Tensor]) -> None:
        """All that checkpoints do not hold is as the source has it, and was loaded from there."""
        own = self._held(model)
        odd = own.keys() ^ saved.keys() or {key for key in own if own[key].shape != saved[key].shape}
        if odd:
            raise UsageError(
                f"the checkpoint to go on from is of another model ({min(odd)}); remove it to go on from the one before"
            )
        model.load_state_dict({key: part_of(value, own[key]) for key, value in saved.items()}, strict=not self.delta)


def resume(run: Run, trained: Trained, screen: Screen, crew: Crew) -> Progress:
    """Goes on from the run's last good checkpoint; a fresh start where there is none.

    Raises:
        UsageError: the checkpoint is of another format or model.
    """
    path, notes = crew.ask_first(run.checkpoints.newest)
    for note in notes:
        screen.say(note)
    if path is None:
        run.rewind({})
        return Progress()
    checkpoint = Checkpoint.read(path)
    checkpoint.check()
    progress = _progress(checkpoint)
    run.rewind(checkpoint.state["sizes"])
    trained.restore(checkpoint)
    screen.say(f"going on from step {progress.step:,} ({path})")
    return progress


def _progress(checkpoint: Checkpoint) -> Progress:
    keys = [field.name for field in dataclasses.fields(Progress)]
    if lacking := [key for key in keys if key not in checkpoint.state]:
        raise UsageError(f"{checkpoint.path}: its state lacks {lacking[0]}; remove it to go on from the one before")
    return Progress(**{key: checkpoint.state[key] for key in keys})


def load_source(
    model: VisionTransformer, source: Source, config: Config, classes: list[str], screen: Screen
) -> LoadReport:
    """Gives a new model the weights that a run begins with, and says which. The head is kept where it was trained for
    the same `classes`."""
    report = load_weights(
        model,
        source.weights,
        keep_head=source.classes == classes
        and getattr(source.weights.get("head.weight"), "shape", None) == model.head.weight.shape,
        allow_unexpected=config.allow_unexpected,
        resize_slots=config.slots == "proportional",
    )
    layers = {place: block.mlp for place, block in enumerate(model.blocks) if isinstance(block.mlp, Layer)}
    slots = {
        place: layer.fixed_options().get("slots_per_expert")
        for place, layer in layers.items()
        if layer.rows(1) is not None
    }
    card = source.card.get("model", {})
    own = {place: (card.get("blocks") or {}).get(str(place), card.get("router", {})) for place in slots}
    before = {place: router.get("slots_per_expert") for place, router in own.items()}
    parts = dict.fromkeys(name.partition(".")[0] for name in report.loaded)
    rows = {
        "from": source.label,
        "loaded": f"{len(report.loaded)} tensors in {', '.join(parts) or 'nothing'}",
        "resized": ", ".join(report.resized) or "none",
        "new": ", ".join(patterns(report.new)) or "none",
        "unexpected": ", ".join(report.unexpected) or "none",
    }
    if slots:
        where = ", as in the checkpoint"
        if any(before.values()) and slots != before:
            why = " in proportion to the tokens" if config.slots == "proportional" else ""
            where = f"{why}; {_each(before)} in the checkpoint"
        rows["slots"] = f"{_each(slots)} per expert{where}"
    left = experts_left(source.weights)
    if left and config.prune.keep is None:
        there = ", ".join(f"{len(experts)} in block {place}" for place, experts in left.items())
        rows["experts left"] = f"{there}; a router that evens their load goes on or begins again with it"
    screen.table("weights", rows)
    return report


def _each(slots: dict[int, int | None]) -> str:
    """The different numbers of slots, in the order of the blocks."""
    return ", ".join(dict.fromkeys(str(p or "any") for p in slots.values()))


def delta_of(model: VisionTransformer, source: Source | None, config: Config, report: LoadReport) -> Delta | None:
    """What checkpoints of a run with adapters hold; None of any other run: they hold everything."""
    if source is None or config.model.adapter.name == "none":
        return None
    return Delta.of(source, model.state_dict(), trained_names(model), set(report.loaded))


def carry_moments(
    model: VisionTransformer,
    optimizer: torch.optim.Optimizer,
    source: Source,
    report: LoadReport,
    config: Config,
    screen: Screen,
) -> None:
    """Starts the optimizer where softmoe upcycle says that the source's stood: with the moments and the count of steps
    of every trained weight that was loaded as it is."""
    carried = source.card.get("receipt", {}).get("optimizer")
    if carried is None:
        return
    if config.optim.name != "adamw" or config.optim.moments == "8bit":
        other = "8-bit ones" if config.optim.name == "adamw" else f"{config.optim.name}'s"
        screen.row("optimizer", f"starts afresh: the checkpoint's moments are AdamW's in fp32, not {other}")
        return
    moments = read_moments(source, carried["digest"])
    fresh = []
    for name, parameter in model.named_parameters():
        state = moments.get(name, {}) if name in report.loaded else {}
        if parameter.requires_grad and state:
            restore(optimizer, parameter, state)
        elif parameter.requires_grad:
            fresh.append(name)
    steps = max((int(state["step"]) for state in optimizer.state.values()), default=0)
    begin = f"; {', '.join(patterns(fresh))} start at zero" if fresh else ""
    screen.row("optimizer", f"goes on: moments of {len(optimizer.state)} tensors after {steps:,} steps{begin}")
