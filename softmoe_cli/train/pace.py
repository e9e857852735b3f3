"""How long a run takes: told before its first step, from a forward pass, and again from its first steps."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from timm.models.vision_transformer import VisionTransformer

from softmoe_cli.config.recipe import Train
from softmoe_cli.device import wait
from softmoe_cli.model.tasks import any_task
from softmoe_cli.optim import span_length
from softmoe_cli.text import in_words, several
from softmoe_cli.train.progress import Budget, Progress, multiples
from softmoe_cli.train.setup import Setup

WARM_STEPS, PACE_STEPS = 2, 10
"""A run tells its pace after PACE_STEPS steps, or before its first evaluation where that comes earlier. The first
WARM_STEPS ones, which are slower, are left out where there are others."""

TIMED_FLOP = 10**10
"""FLOPs of the forward pass that is timed on a CPU: a few tenths of a second on one core."""
AGAIN_BELOW_S = 0.5
"""A first forward pass that took less is done again, because much of it was setting things up."""


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
        while len(took) < 3 and took[-1] < AGAIN_BELOW_S:
            start = time.perf_counter()
            model(*any_task(model, x))
            wait(device)
            took.append(time.perf_counter() - start)
    model.train(training)
    return min(took[1:]) / images


def looks(total: float, every: float, steps: int | None, done: float = 0.0) -> int:
    """Evaluations on the validation images that are to come after the position `done` of a budget of `total`: one
    after each multiple of the span `every`, and one at the end. `steps` is that budget where it counts steps, since no
    step is followed by two."""
    interval = span_length(every, total)
    if steps is None:
        return max(1, math.ceil(total / interval - 1e-9) - multiples(done, interval))
    if interval < 1:
        return math.ceil(total - done)
    last = multiples(total, interval) > multiples(total - 1, interval)  # the end is such a multiple
    return multiples(total, interval) - multiples(done, interval) + (not last)


def images_of_a_look(train: Train, validation: int, classes: int, *, routed: bool) -> int:
    """Images that go through the model at each evaluation: all validation images; the first ones for the routers'
    statistics; those of the few-shot quality."""
    shots = validation + classes * max(train.fewshot) if train.fewshot else 0
    routing = min(train.eval_batch_size, validation) if routed else 0
    return validation + routing + shots


@dataclass(frozen=True)
class Pace:
    """Seconds of an update, of an evaluation on the validation images and of the one on the test images; None where
    nobody has timed an evaluation (several devices)."""

    step_s: float
    look_s: float | None
    test_s: float | None

    def at(self, step_s: float) -> "Pace":
        """The same pace for the case that an update takes `step_s` seconds: evaluations then take longer in
        proportion."""
        if self.look_s is None or self.test_s is None:
            return Pace(step_s, None, None)
        rate = step_s / self.step_s
        return Pace(step_s, rate * self.look_s, rate * self.test_s)

    def left(self, budget: Budget, progress: Progress, eval_every: float) -> str:
        """How long the rest of the budget takes, in words."""
        rest = max(0.0, budget.total - budget.position(progress))
        steps, training_s = (rest, rest * self.step_s) if budget.steps is not None else (rest / self.step_s, rest)
        evaluations = looks(budget.total, eval_every, budget.steps, progress.evaluated)
        return self.said(steps=steps, training_s=training_s, evaluations=evaluations)

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


def forecast(setup: Setup, model: VisionTransformer) -> Pace:
    """Predicts the time of updates and evaluations from a forward pass: an update takes as many times longer as it has
    more FLOPs."""
    config, cost = setup.config, setup.cost
    part = config.train.batch_size // config.train.accumulate
    image_s = forward_s(model, setup.device, setup.autocast, config.model.image_size, cost.forward_flop, part)
    routed = config.model.router_name != "dense"
    look = images_of_a_look(config.train, len(setup.splits.validation), len(setup.splits.classes), routed=routed)
    step_s = config.train.batch_size * image_s * cost.train_flop / cost.forward_flop
    return Pace(step_s, look * image_s, len(setup.splits.test) * image_s)


class FirstSteps:
    """Tells once, from the first steps of a run, how long the rest of it takes.

    Args:
        forecast: the pace that a forward pass has promised; None: nobody has timed one.
        say: prints a sentence.
    """

    def __init__(
        self, progress: Progress, budget: Budget, eval_every: float, forecast: Pace | None, say: Callable[[str], None]
    ) -> None:
        self._progress, self._budget, self._eval_every = progress, budget, eval_every
        self._forecast, self._say = forecast, say
        self._device_s = [progress.seconds["device"]]
        """Seconds of training at the start, and after each step."""
        self._told = False

    def add(self) -> None:
        """Notes the time after one more step."""
        if not self._told:
            self._device_s.append(self._progress.seconds["device"])
            if len(self._device_s) == PACE_STEPS + 1:
                self.tell()

    def tell(self) -> None:
        """Tells, if there are steps to tell it from and steps to come."""
        made = len(self._device_s) - 1
        skipped = min(WARM_STEPS, max(0, made - 1))
        passed = self._device_s[-1] - self._device_s[skipped]
        if self._told or passed <= 0 or self._budget.position(self._progress) >= self._budget.total:
            return
        self._told = True
        step_s = passed / (made - skipped)
        pace = Pace(step_s, None, None)
        if self._forecast is not None and skipped:
            pace = self._forecast.at(step_s)
        elif self._forecast is not None:  # the very first step is slower than others, which says nothing of evaluations
            pace = replace(self._forecast, step_s=step_s)
        left = pace.left(self._budget, self._progress, self._eval_every)
        self._say(f"{in_words(step_s)} a step: {left}")
