"""How long a run takes, before its first step and after its first ones."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from softmoe_cli.device import precision_context
from softmoe_cli.model.vit import build
from softmoe_cli.train.pace import FirstSteps, Pace, forward_s, images_of_a_look, looks
from softmoe_cli.train.progress import Budget, Progress
from tests.conftest import TINY, Softmoe
from tests.oracles import compose

CPU = torch.device("cpu")


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 12, 100])
@pytest.mark.parametrize("every", [0.1, 0.3, 0.5, 0.07, 1, 3, 1000])
def test_looks_are_those_that_the_loop_makes(steps: int, every: float) -> None:
    """From the start and from the middle, where the run was resumed."""
    budget, made, evaluated = Budget(steps, None), [], 0.0
    for step in range(steps + 1):
        if budget.passed(evaluated, step, every):
            made.append(step)
            evaluated = step
    assert looks(steps, every, steps) == len(made)
    if len(made) > 1:
        half = made[len(made) // 2 - 1]
        assert looks(steps, every, steps, half) == sum(step > half for step in made)


@pytest.mark.parametrize("every", ["0.07", "0.11", "0.28", "0.55", "0.033", "0.0033"])
def test_spans_are_as_they_were_typed(every: str) -> None:
    """By fractions: as floats, 0.07 * 100 is above 7, and three times 0.28 * 100 above 84."""
    for total in (10, 100, 1000):
        span, budget = Fraction(every) * total, Budget(total, None)
        want = [step for step in range(1, total + 1) if step // span > (step - 1) // span or step == total]
        assert [step for step in range(1, total + 1) if budget.passed(step - 1, step, float(every))] == want
        assert looks(total, float(every), total) == len(want)


@pytest.mark.parametrize(
    ("epochs", "images", "batch"), [(1.1, 100, 10), (2.2, 100, 20), (4.4, 100, 8), (1.1, 1437, 32)]
)
def test_epochs_are_as_they_were_typed(epochs: float, images: int, batch: int) -> None:
    """As floats, 100 * 1.1 is above 110, which 11 steps of 10 images are."""
    config = compose(f"train.epochs={epochs}", f"train.batch_size={batch}")
    assert Budget.of(config, images).steps == math.ceil(Fraction(str(epochs)) * images / batch)


def test_the_smallest_budget_is_a_step() -> None:
    assert Budget.of(compose("train.epochs=1e-11"), 1000).steps == 1


def test_looks_of_a_budget_in_minutes() -> None:
    assert looks(300.0, 0.1, None) == 10
    assert looks(300.0, 0.1, None, 151.0) == 5
    assert looks(300.0, 0.3, None) == 4


def test_images_of_a_look() -> None:
    plain = compose().train
    assert images_of_a_look(plain, 143, 10, routed=False) == 143
    assert images_of_a_look(plain, 143, 10, routed=True) == 143 + 64
    assert images_of_a_look(plain, 20, 10, routed=True) == 40
    assert images_of_a_look(compose("train.fewshot=[1,5]").train, 143, 10, routed=False) == 143 + 143 + 50


def test_what_is_said() -> None:
    pace = Pace(step_s=0.5, look_s=2.0, test_s=4.0)
    assert pace.said(steps=126, training_s=63, evaluations=10) == (
        "about 1 min 27 s: 1 min 3 s of training, 126 steps of 500 ms; 24 s of evaluation, 10 times on validation "
        "images and once on test images"
    )
    more = pace.said(steps=10, training_s=5, evaluations=10)
    assert more.startswith("about 29 s: 5.0 s of training") and more.endswith("(train.eval_every=0.5 evaluates twice)")
    assert "1 step of 500 ms; 6.0 s of evaluation, once on" in pace.said(steps=1, training_s=0.5, evaluations=1)
    assert pace.at(1.0) == Pace(1.0, 4.0, 8.0)
    assert Pace(0.5, None, None).said(steps=4, training_s=2, evaluations=1) == "2.0 s of training, 4 steps of 500 ms"
    assert Pace(0.5, None, None).at(1.0) == Pace(1.0, None, None)


def told_after(*seconds: float, total: int, forecast: Pace | None = None) -> list[str]:
    """What is told when steps end at these seconds of training, and once more before an evaluation."""
    progress, told = Progress(), list[str]()
    steps = FirstSteps(progress, Budget(total, None), 1000, forecast, told.append)
    steps.tell()
    assert not told, "of no step"
    for moment in seconds:
        progress.step, progress.seconds["device"] = progress.step + 1, moment
        steps.add()
    steps.tell()
    return told


def test_the_first_steps_are_left_out_where_there_are_others() -> None:
    assert told_after(50, 60, *range(61, 69), total=20) == ["1.0 s a step: 10 s of training, 10 steps of 1.0 s"]
    assert told_after(50, 60, *range(61, 70), total=20)[0].endswith("10 steps of 1.0 s"), "at the tenth"
    assert told_after(5, 6, total=3) == ["1.0 s a step: 1.0 s of training, 1 step of 1.0 s"]
    assert told_after(0.0, total=3) == [], "compiled: booked elsewhere"
    assert told_after(0.0, 3.0, total=3)[0].startswith("3.0 s a step")


def test_a_first_step_says_nothing_of_evaluations() -> None:
    """Its own slowness is not theirs; and where no step is to come, nothing is left to tell."""
    forecast = Pace(0.5, 2.0, 4.0)
    (alone,) = told_after(5, total=2, forecast=forecast)
    assert alone.startswith("5.0 s a step: about 11 s: 5.0 s of training, 1 step of 5.0 s; 6.0 s of evaluation")
    (second,) = told_after(5, 6, total=3, forecast=forecast)
    assert second.startswith("1.0 s a step: about 13 s: 1.0 s of training, 1 step of 1.0 s; 12 s of evaluation")
    assert told_after(5, total=1, forecast=forecast) == told_after(5, 6, total=2, forecast=forecast) == []


@pytest.mark.parametrize("router", ["soft", "tokens_choice"])
def test_a_timed_forward_pass_leaves_no_trace(router: str) -> None:
    options = {"soft": ["model.router.noise_std=1.0"]}.get(
        router, ["model.router.bias_rate=0.1", "model.router.load_weight=0"]
    )
    config = compose(f"model=vit_nano2_{router}", "model.backbone.drop_path=0.5", *options)
    model = build(config.model, 10)
    before = {key: value.clone() for key, value in (*model.state_dict().items(), *model.named_buffers())}
    state = torch.get_rng_state()
    found = forward_s(model, CPU, precision_context("cpu", "bf16"), 8, 10**7, 32)
    assert 0 < found < math.inf
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and all(p.grad is None for p in model.parameters())
    for key, value in (*model.state_dict().items(), *model.named_buffers()):
        assert torch.equal(value, before[key]), key


def test_a_large_model_is_timed_on_few_images() -> None:
    """On a CPU some 10 GFLOP, at least one image and at most a part of a batch."""
    seen: list[int] = []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 1, 1)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return x

    model = Counting()
    vars(model.patch_embed)["proj"] = model.patch_embed["proj"]
    for flop in (10**6, 10**9, 10**12):
        forward_s(model, CPU, precision_context("cpu", "fp32"), 2, flop, 32)
    assert sorted(set(seen), reverse=True) == [32, 10, 1]


def test_resuming_counts_what_is_left() -> None:
    told = Pace(1.0, 0.0, 0.0).left(Budget(100, None), Progress(step=60, evaluated=60.0), 0.1)
    assert "40 s of training, 40 steps of 1.0 s" in told and "4 times on validation images" in told
    minutes = Pace(0.1, 0.0, 0.0).left(Budget(None, 120.0), Progress(), 0.1)
    assert minutes.startswith("about 2 min: 2 min of training, 1,200 steps of 100 ms")


def test_the_first_steps_tell_the_pace(softmoe: Softmoe) -> None:
    assert " of training, 18 steps of " in softmoe("train", *TINY, "train.steps=20").out
