"""How long a run takes: told before its first step, from a forward pass, and again from its first steps."""

import math
import time
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import VisionTransformer

from softmoe_cli.config import Train
from softmoe_cli.optim import span
from softmoe_cli.text import in_words, several

WARM_STEPS, PACE_STEPS = 2, 10
"""A run tells its pace after the later of these steps, or before its first evaluation where that comes earlier; the
first ones, which are slower, are left out where there are others."""

TIMED_FLOP = 10**10
"""Of a forward pass that is timed on a CPU: a few tenths of a second on one core."""
TWICE_S = 0.5
"""A first forward pass that took less is done again: it sets things up."""


def forward_s(
    model: VisionTransformer, device: torch.device, autocast: torch.autocast, side: int, flop: int, most: int
) -> float:
    """Seconds that the forward pass of an image of `flop` FLOPs takes, by one of up to `most` black images. No weight,
    statistic or random state is changed by it."""
    images = most if device.type != "cpu" else max(1, min(most, TIMED_FLOP // flop))
    x = torch.zeros(images, model.patch_embed.proj.in_channels, side, side, device=device)
    training, took = model.training, [0.0]
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad(), autocast:
        while len(took) < 3 and took[-1] < TWICE_S:
            start = time.perf_counter()
            model(x)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            elif device.type == "mps":
                torch.mps.synchronize()
            took.append(time.perf_counter() - start)
    model.train(training)
    return min(took[1:]) / images


def looks(total: float, every: float, steps: int | None, done: float = 0.0) -> int:
    """Evaluations on the validation images that are to come after the position `done` of a budget of `total`: one
    after each multiple of the span `every`, and one at the end. `steps` is that budget where it counts steps, since no
    step is followed by two."""
    interval = span(every, total)
    if steps is None:
        return max(1, math.ceil(total / interval - 1e-9) - math.floor(done / interval + 1e-9))
    if interval < 1:
        return math.ceil(total - done)
    last = total // interval > (total - 1) // interval  # the end is such a multiple
    return int(total // interval - done // interval) + (not last)


def images_of_a_look(train: Train, validation: int, classes: int, *, routed: bool) -> int:
    """Images that go through the model at each evaluation: all validation images; the first ones for the routers'
    statistics; those of the few-shot quality."""
    shots = validation + classes * max(train.fewshot) if train.fewshot else 0
    return validation + min(train.eval_batch_size, validation) * routed + shots


@dataclass(frozen=True)
class Pace:
    """Seconds of an update, of an evaluation on the validation images and of the one on the test images; None where
    nobody has timed an evaluation (several devices)."""

    step_s: float
    look_s: float | None
    test_s: float | None

    def at(self, step_s: float) -> "Pace":
        """The same, where an update is found to take so long."""
        if self.look_s is None or self.test_s is None:
            return Pace(step_s, None, None)
        rate = step_s / self.step_s
        return Pace(step_s, rate * self.look_s, rate * self.test_s)

    def said(self, *, steps: float, training_s: float, evaluations: int) -> str:
        """What is left of a run, in words."""
        training = f"{in_words(training_s)} of training, {several(steps, 'step')} of {in_words(self.step_s)}"
        if self.look_s is None or self.test_s is None:
            return training
        evaluation_s = evaluations * self.look_s + self.test_s
        text = (
            f"about {in_words(training_s + evaluation_s)}: {training}; {in_words(evaluation_s)} of evaluation, "
            f"{'once' if evaluations == 1 else f'{evaluations} times'} on validation images and once on test images"
        )
        if evaluation_s > training_s and evaluations > 2:
            text += " (train.eval_every=0.5 evaluates twice)"
        return text


class FirstSteps:
    """When each of the first steps of a run was done, in seconds of training, until their pace is told."""

    def __init__(self, device_s: float) -> None:
        self._at = [device_s]
        self._told = False

    def add(self, device_s: float) -> bool:
        """A step more; whether it is time to tell."""
        self._at.append(device_s)
        return len(self._at) == PACE_STEPS + 1

    def step_s(self) -> float | None:
        """Seconds of a step, once; None where none was made that counts, and after that."""
        made = len(self._at) - 1
        skipped = min(WARM_STEPS, max(0, made - 1))
        passed = self._at[-1] - self._at[skipped]
        if self._told or passed <= 0:
            return None
        self._told = True
        return passed / (made - skipped)
