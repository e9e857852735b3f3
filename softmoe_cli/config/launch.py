"""The options of the places where the jobs of a sweep run."""

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

from softmoe_cli.config.option import MISSING, Section, option
from softmoe_cli.errors import UsageError


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
    seeds_at_once: int = option("seeds of one model that a job computes as one; also typed seeds_at_once=N", low=1)
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


LAUNCHERS: dict[str, type[Launcher]] = {"local": LocalLauncher, "slurm": SlurmLauncher, "ray": RayLauncher}
"""The options of hydra.launcher, by place."""
