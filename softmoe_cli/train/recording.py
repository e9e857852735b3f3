"""What a run writes down on its way: rows and checkpoints in its folder, and the rows on Weights & Biases."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from torch import Tensor

from softmoe_cli.device import Energy
from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.model.vit import portable
from softmoe_cli.run import mirror, rows
from softmoe_cli.run.events import Events
from softmoe_cli.run.folder import Run
from softmoe_cli.run.identity import flat_science, origin
from softmoe_cli.run.mirror import Mirror
from softmoe_cli.run.trackio import Trackio
from softmoe_cli.stack.turns import going_on
from softmoe_cli.train.progress import Progress
from softmoe_cli.train.pruning import Decision
from softmoe_cli.train.resume import Trained
from softmoe_cli.train.setup import Setup
from softmoe_cli.train.summary import PINNED, wandb_settings


@dataclass
class Recording:
    """Every row and checkpoint says what the run has cost until then."""

    setup: Setup
    run: Run
    progress: Progress
    trained: Trained
    landed: Tensor
    """What this process has to add to `Progress.landed`, int64, on the device; read where something is written down."""
    say: Callable[[str], None]
    """Prints a sentence."""
    card: dict[str, Any] = field(init=False)
    """What a weights file says of its model, whatever the step."""

    def __post_init__(self) -> None:
        config, writes = self.setup.config, self.setup.crew.first
        self.card = {
            "model": portable(config.model, self.trained.model),
            "data": config.data.on_card(),
            "classes": self.setup.splits.classes,
            "loss": config.train.loss,
            "precision": config.train.precision,
            **({} if self.trained.delta is None else {"base": self.trained.delta.base}),
        }
        science = flat_science(config) | {"data.identity": self.setup.images_digest}
        self._origin = origin(self.setup.command, science, self.setup.source)
        self._energy = Energy(self.setup.device)
        earlier = self.run.rows("metrics.jsonl") if writes else []
        settings = wandb_settings(self.setup, self.run.folder)
        self._mirrors: list[Mirror | Events | Trackio] = []
        if writes and "tensorboard" in config.tracking:  # a word, or a list of words
            self._mirrors.append(Events(self.run.folder, earlier, self.say))
        if writes and "trackio" in config.tracking:
            self._mirrors.append(Trackio(settings, self.run.folder.name, earlier, self.say))
        wandb = Mirror(
            mirror.tracking_of(config.tracking) if writes else "off",
            settings,
            self.run.folder,
            earlier,
            self.say,
            PINNED,
        )
        self._mirrors.append(wandb)

    def row(self, split: str, values: Mapping[str, float | None]) -> dict[str, Any]:
        """Writes a row of metrics, with where the run stands and what it has cost."""
        progress = self.progress
        images = progress.step * self.setup.config.train.batch_size
        row = {"step": progress.step, "images": images, "epoch": images / len(self.setup.splits.train), "split": split}
        self._book()
        row |= {**values, **self._experts_left(), **self.setup.pflop(progress), **progress.spent}
        self.run.append("metrics.jsonl", row)
        for each in self._mirrors:
            each.row(row)
        return row

    def decide(self, changed: float, decisions: dict[int, Decision]) -> None:
        """Writes down which experts go after this step. `changed`: the largest change of a logit on its images."""
        for block, decision in decisions.items():
            row = {"step": self.progress.step, "block": block, **decision.row(), "logit_change_max": changed}
            self.run.append("routing.jsonl", row)
            if decision.goes:
                gone = f"{len(decision.goes)} of {len(decision.left)} experts go ({', '.join(map(str, decision.goes))})"
                self.say(f"step {self.progress.step:,}, block {block}: {gone}: {decision.why}")

    def _experts_left(self) -> dict[str, float]:
        """What is left, and what the model would cost if it were served like that, where experts may go."""
        if self.trained.pruning is None:
            return {}
        left = {
            rows.EXPERTS_LEFT.format(block): len(layer.left) for block, layer in self.trained.pruning.layers.items()
        }
        flop = self.progress.phases[-1][-1] if self.progress.phases else self.setup.cost.forward_flop
        return left | {"forward_gflop": flop / 1e9}

    def save(self, kind: str, *, end: bool = False) -> None:
        """Writes a checkpoint: `last`, to go on from, or `best`, weights only."""
        progress, budget = self.progress, self.setup.budget
        # Weights that differ only by chance have one origin. The step at which a run is best depends on chance, and so
        # does its last step if the budget is in minutes.
        at: str | int = progress.step
        if kind == "best":
            at = "best"
        elif end or progress.step == budget.steps:
            at = "end"
        with progress.booked("save"):
            self._book()
            self.run.checkpoints.save(
                kind,
                progress.step,
                self.trained.weights(),
                {} if kind == "best" else self.trained.tensors(),
                self.trained.state(progress),
                self.card | {"origin": f"{self._origin}-{at}", "train_pflop": self.setup.pflop_in_all(progress)},
                end=end,
            )

    def finish(self, result: dict[str, Any]) -> None:
        """Writes the result, which ends the run."""
        self.run.finish(result)
        for each in self._mirrors:
            each.close(result)

    def __enter__(self) -> "Recording":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the run without a result if it has broken off inside, and writes down why, unless a signal asked."""
        if isinstance(error, RunError | UsageError):
            self.run.fail(str(error))
        if kind is not None:
            for each in self._mirrors:
                each.close(None)

    def _book(self) -> None:
        """Adds the energy that the devices have used since the last time, and the choices that experts have
        computed."""
        used = self._energy.used()  # by all runs of this process that go on
        own = None if used is None else used / going_on()
        self.progress.used(self.setup.crew.joules(own, self.setup.device))
        if self.setup.cost.landed_row_flop is not None:
            self.progress.landed += int(self.setup.crew.add(self.landed))
            self.landed.zero_()
