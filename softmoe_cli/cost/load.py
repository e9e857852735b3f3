"""The work that a device is given: memory, clock and cost are all computed for a Load."""

from dataclasses import dataclass

import torch

from softmoe_cli.config import Config, Model, Optim


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

    @classmethod
    def of(cls, config: Config, num_classes: int, device: torch.device) -> "Load":
        """The load of training with this configuration, whose `train.batch_size` must be a number."""
        t = config.train
        return cls(
            config.model, num_classes, t.batch_size, device, t.accumulate, t.recompute, t.precision, t.compile,
            config.threads, config.optim, t.ema is not None,
        )  # fmt: skip

    @property
    def part(self) -> int:
        """Images that go through the model at once."""
        return self.batch // self.accumulate
