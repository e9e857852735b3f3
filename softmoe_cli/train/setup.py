"""What a run is before its first step: all that is decided once and then only read."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from softmoe_cli import parallel
from softmoe_cli.config.data import Data
from softmoe_cli.config.run import Config, check_parts, check_rows
from softmoe_cli.cost.fit import Fit, with_largest_batch
from softmoe_cli.cost.flop import Cost
from softmoe_cli.data import sets, workers
from softmoe_cli.data.contents import identity
from softmoe_cli.data.splits import Splits
from softmoe_cli.device import arithmetic, fast_precision
from softmoe_cli.errors import UsageError
from softmoe_cli.model.router import check_evaluated
from softmoe_cli.model.weights import experts_left
from softmoe_cli.parallel import Crew
from softmoe_cli.run.folder import Run
from softmoe_cli.run.header import Source
from softmoe_cli.run.identity import run_folder
from softmoe_cli.terminal import Screen
from softmoe_cli.train.first import Images
from softmoe_cli.train.progress import Budget, Progress


@dataclass(frozen=True)
class Begun:
    """A run that has its folder and its processes. `images_digest` is what `contents.identity` says of its images."""

    run: Run
    config: Config
    command: str
    source: Source | None
    images_digest: str | None
    screen: Screen
    crew: Crew


@contextmanager
def begin(
    config: Config, command: str, source: Source | None, screen: Screen, images: Images | None = None
) -> Iterator[Begun]:
    """Joins the processes that train one model and takes the run's folder; lets go of both at the end. `images`: None
    where nobody has looked at their files yet.

    Raises:
        UsageError: its images cannot be used, or no batch fits.
    """
    with parallel.joined(config) as crew:
        if not crew.first:
            screen = Screen(quiet=True)
        if config.train.precision == "auto":
            precision, why = crew.ask_first(
                lambda: fast_precision(
                    arithmetic(config.device, "fp32", config.threads)[0],
                    config.model.backbone.width,
                    mixture=config.model.mixture,
                )
            )
            screen.say(
                f"train.precision=auto: {precision}, as {why}; type train.precision={precision} to have the same run "
                "elsewhere"
            )
            config = replace(config, train=replace(config.train, precision=precision))
        if config.train.batch_size == "auto":
            config = with_largest_batch(config, experts_left(source.weights) if source is not None else {})
            number = config.train.batch_size
            screen.say(
                f"train.batch_size=auto: {number}; type train.batch_size={number} to have the same run elsewhere"
            )
        config = replace(config, devices=crew.size)  # under torchrun it may not say
        images_digest = images.digest if images is not None else images_identity(config.data, crew)
        run = Run(run_folder(config, command, source, images_digest), crew)
        try:
            yield Begun(run, config, command, source, images_digest, screen, crew)
        finally:
            workers.end_workers()  # they share the folder's lock
            run.close()


@dataclass(frozen=True)
class Setup:
    """A run that has not begun. `images_digest` is what `contents.identity` says of its images."""

    config: Config
    command: str
    source: Source | None
    images_digest: str | None
    splits: Splits
    budget: Budget
    device: torch.device
    autocast: torch.autocast
    crew: Crew
    cost: Cost
    fit: Fit

    @property
    def num_classes(self) -> int:
        return sets.num_classes(self.config.data, self.splits)

    def train_pflop(self, progress: Progress) -> float:
        """The cost of this run's training so far."""
        return progress.over_phases(self.config.train.batch_size, self.cost.train_flop, 0) / 1e15

    def pflop(self, progress: Progress) -> dict[str, float]:
        """The cost of this run's training so far as rows have it: by formula, and without the rows of experts that held
        no token; the latter is unknown where frozen parameters take a part of the experts' cost away."""
        cost = self.cost
        row = {"train_pflop": self.train_pflop(progress)}
        if cost.landed_row_flop is None:
            row["landed_pflop"] = row["train_pflop"]
        elif cost.counted_train_flop is None:
            rest = progress.over_phases(self.config.train.batch_size, cost.rest_train_flop, 1)
            row["landed_pflop"] = (rest + progress.landed * cost.landed_row_flop) / 1e15
        return row

    def landed(self, progress: Progress) -> dict[str, float]:
        """The share of the tokens' choices that experts have computed, beside what the router aims at; nothing where
        tokens do not choose."""
        choices, nominal = self.cost.choices, self.cost.nominal_share
        if choices is None or nominal is None:
            return {}
        made = progress.over_phases(self.config.train.batch_size, choices, 2)
        return {"landed_share": progress.landed / max(1, made), "nominal_share": nominal}

    def pflop_in_all(self, progress: Progress) -> float | None:
        """The same with the training of the weights that it began with; None where their file does not say."""
        before = self.source.train_pflop if self.source else 0.0
        return None if before is None else before + self.train_pflop(progress)


def require_batches(config: Config, cost: Cost) -> None:
    """Raises UsageError for batches that the model's routers do not take."""
    check_parts(config, cost.whole_batches)
    check_rows("train.batch_size", config.train.batch_size, config.model, cost.whole_batches, cost.tokens)
    check_evaluated("train.eval_batch_size", config.train.eval_batch_size, config.model)


def images_identity(settings: Data, crew: Crew) -> str | None:
    """`contents.identity`, for which the first process of each machine reads the images, and no other one.

    Raises:
        UsageError: the images cannot be used, or are others on another machine.
    """
    of_each = crew.gather(identity(settings) if crew.local_rank == 0 else None)
    digests = {digest for digest in of_each if digest is not None}
    if len(digests) > 1:
        raise UsageError(f"data.root={settings.root} holds other images on one machine than on another")
    return next(iter(digests), None)
