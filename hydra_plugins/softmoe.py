"""Hydra takes launchers only from this namespace. Every Hydra application of the environment imports this file, so it
imports nothing of its own until a sweep of softmoe starts."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SweepLauncher(Launcher):
    """Hands a sweep's jobs to softmoe_cli.sweep, with the options of hydra.launcher."""

    def __init__(self, **_options: Any) -> None:
        """Hydra hands the options over here and, with their types, in `setup`."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from softmoe_cli.sweep import Sweep

        self._sweep = Sweep(hydra_context.config_loader, config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        return self._sweep.launch(job_overrides, initial_job_idx)
