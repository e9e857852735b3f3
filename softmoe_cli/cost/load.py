"""The work that a device is given: memory, clock and cost are all computed for a Load."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from softmoe_cli.config.commands import Measured
from softmoe_cli.config.model import Model
from softmoe_cli.config.recipe import Optim
from softmoe_cli.config.run import Config
from softmoe_cli.device import arithmetic
from softmoe_cli.errors import UsageError

NONE_GONE: Mapping[int, Sequence[int]] = MappingProxyType({})


@dataclass(frozen=True)
class Load:
    """Updates of a model with `batch` images each, computed in `accumulate` parts one after the other. Weights and
    moments are float32; `precision` is that of the arithmetic."""

    model: Model
    num_classes: int
    batch: int
    device: torch.device
    accumulate: int = 1
    recompute: bool = False
    precision: str = "fp32"
    compile: bool = False
    threads: int | None = None
    """None: torch's choice."""
    optim: Optim | None = None
    """None: AdamW trains all weights."""
    ema: bool = False
    """Whether an average of the weights is kept."""
    keep: int | None = None
    """Experts that stay in each block in the end, where some go on the way."""
    left: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """The experts that are left, by block, where some were pruned before."""

    @classmethod
    def of(
        cls, config: Config, num_classes: int, device: torch.device, left: Mapping[int, Sequence[int]] = NONE_GONE
    ) -> "Load":
        """The load of training with this configuration, whose `train.batch_size` must be a number. `left`: the experts
        of the weights that it begins with, as `weights.experts_left` says."""
        t = config.train
        return cls(
            config.model, num_classes, t.batch_size, device, t.accumulate, t.recompute, t.precision, t.compile,
            config.threads, config.optim, t.ema is not None, config.prune.keep, dict(left),
        )  # fmt: skip

    @property
    def part(self) -> int:
        """Images that go through the model at once."""
        return self.batch // self.accumulate


def load_of(config: Measured) -> Load:
    """The load whose cost the configuration asks for.

    Raises:
        UsageError: a number of classes that only the files know, or a device that is not there.
    """
    if config.data.num_classes is None:
        raise UsageError(f"data={config.data.name} does not say how many classes it has; give data.num_classes")
    device, _ = arithmetic(config.device, config.precision, None)
    return Load(
        config.model, config.data.num_classes, config.batch_size, device, config.accumulate, config.recompute,
        config.precision, config.compile, config.threads,
    )  # fmt: skip
