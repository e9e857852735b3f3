"""Several seeds as one stack: each run is the run alone, whatever its router draws, keeps or balances."""

import copy
import functools
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softmoe_cli import cli
from softmoe_cli.data.batches import Batch
from softmoe_cli.device import precision_context
from softmoe_cli.errors import UsageError
from softmoe_cli.launch.places import Attempt
from softmoe_cli.launch.plan import Job
from softmoe_cli.launch.tables import Entry, stacks
from softmoe_cli.model.vit import build
from softmoe_cli.moe.routers.tokens_choice import TokensChoiceRouter
from softmoe_cli.moe.routing import SparseRouting, routings
from softmoe_cli.optim import optimizer_of
from softmoe_cli.run.checkpoint import random_state, set_random_state
from softmoe_cli.stack.passing import Stack, own_draws
from softmoe_cli.stack.refused import check_stack
from softmoe_cli.stack.turns import in_turns
from softmoe_cli.stack.updating import alike
from softmoe_cli.train import loop
from softmoe_cli.train.loop import Step, handed, update
from tests.conftest import TINY, Softmoe
from tests.oracles import compose
from tests.stack.alike import require_alike

COMMON = (*TINY, "threads=1", "train.batch_size=8", "train.log_every=1", "train.eval_every=0.5")


def together(arguments: Sequence[str], seeds: Sequence[int]) -> list[tuple[int, str]]:
    """Runs seeds as one stack; returns the exit status and the reason of each."""
    told: list[tuple[int, str]] = []
    works = [lambda seed=seed: told.append(cli.run(["train", *arguments, f"seed={seed}"])) for seed in seeds]
    outs = [io.StringIO() for _ in seeds]
    in_turns(works, outs)
    return told


def require_as_alone(folder: Path, arguments: Sequence[str], seeds: Sequence[int] = (0, 1)) -> None:
    ours, alone = ((*arguments, f"output_root={folder / name}", "study=x") for name in ("stack", "alone"))
    assert together(ours, seeds) == [(0, "")] * len(seeds)
    for seed in seeds:
        assert cli.run(["train", *alone, f"seed={seed}"]) == (0, "")
    runs = sorted((folder / "alone/x").iterdir())
    assert len(runs) == len(seeds)
    for run in runs:
        require_alike(folder / "stack/x" / run.name, run)


def new_step(config: Any, seed: int, hooks: ExitStack, device: str = "cpu") -> Step:
    torch.manual_seed(seed)
    model = build(config.model, 10).train().to(device)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    autocast, seen = precision_context("cpu", "fp32", cached=True), hooks.enter_context(routings(model))
    landed = torch.zeros((), dtype=torch.int64, device=device)
    return Step(model, model, optimizer_of(model, config.optim), scaler, autocast, seen, config, landed=landed)


NOISE = ("model.router.noise_std=1",)
BIASED = (
    "model/router=tokens_choice", "model.router.load_weight=0", "model.router.importance_weight=0.1",
    "model.router.bias_rate=0.01", "model.backbone.drop_path=0.3",
)  # fmt: skip


class Replaces(TokensChoiceRouter):
    """Has a new tensor for its buffer each time."""

    def forward(self, x: Tensor, keep: Tensor | None = None) -> SparseRouting:
        routing = super().forward(x, keep)
        if self.training:
            self.balance.bias = self.balance.bias + routing.gate.detach().mean() * torch.linspace(0, 0.1, 4)
        return routing


PRECISE = {
    "soft": NOISE,
    "tokens_choice": BIASED,
    "tokens_choice with noise": ("model/router=tokens_choice", *NOISE),
    "tokens_choice_bpr": ("model/router=tokens_choice_bpr", "train.accumulate=2"),
    "experts_choice": ("model/router=experts_choice", *NOISE),
    "zero_computation": ("model/router=zero_computation",),
    "one further": BIASED,
    "a buffer that is replaced": (*BIASED, f"model.router._target_={__name__}.Replaces"),
}


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_updates_of_a_stack_are_those_of_each_alone() -> None:
    require_updates_as_alone(("model.backbone.depth=1", *NOISE), of_losses=5e-6, of_weights=6e-5)


@pytest.mark.thorough
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", PRECISE)
def test_updates_in_float64(name: str) -> None:
    """Where tokens or experts choose, too: no two choices are so near here that rounding would decide."""
    words = ("model.moe_blocks=last_2", "model.expert_init=independent", *PRECISE[name])
    require_updates_as_alone(words, of_losses=1e-9, of_weights=1e-9, apart=name == "one further")


def require_updates_as_alone(
    words: tuple[str, ...], *, of_losses: float, of_weights: float, apart: bool = False
) -> None:
    """Losses, norms, what has landed, weights, moments, what a router keeps and random states over 50 updates; `apart`:
    where the runs have made different numbers of updates before. Bounds are shares of a number, and of the largest of a
    tensor's."""
    config, updates = compose(*TINY, *words, "train.batch_size=4", "optim.clip_norm=0.1"), 50
    torch.manual_seed(9)
    images = torch.randn(updates + 1, 2, 4, config.model.in_chans, 8, 8)
    targets = F.one_hot(torch.randint(10, (updates + 1, 2, 4)), 10).to(images.dtype)
    with ExitStack() as hooks:
        ours, theirs = ([new_step(config, seed, hooks) for seed in (0, 1)] for _ in range(2))
        states = {(id(steps), seed): random_state() for steps in (ours, theirs) for seed in (0, 1)}

        def alone(steps: list[Step], seed: int, turn: int) -> tuple[float, float, float]:
            set_random_state(states[id(steps), seed])
            told = update(steps[seed], Batch(images[turn, seed], targets[turn, seed]), 1e-2)
            states[id(steps), seed] = random_state()
            return told

        if apart:
            alone(ours, 1, updates), alone(theirs, 1, updates)
        stack: Stack | None = None
        for turn in range(updates):
            given = [
                handed(step, Batch(images[turn, seed], targets[turn, seed]), 1e-2) for seed, step in enumerate(ours)
            ]
            with own_draws([states[id(ours), seed] for seed in (0, 1)]):
                stack = stack or Stack(given)
                made = stack.passed(given)
            for seed in (0, 1):
                told, mine = alone(theirs, seed, turn), made[seed]
                assert (mine.update is None) == apart
                if mine.update is None:
                    assert mine.losses.tolist() == pytest.approx(told[:2], rel=of_losses, abs=of_losses)
                    torch.nn.utils.clip_grad_norm_(ours[seed].model.parameters(), 0.1)
                    for group in ours[seed].optimizer.param_groups:
                        group["lr"] = 1e-2 * group["lr_scale"]
                    ours[seed].optimizer.step()
                else:
                    assert mine.update == pytest.approx(told, rel=of_losses, abs=of_losses)
    for seed in (0, 1):
        one, other = ours[seed], theirs[seed]
        assert int(one.landed) == int(other.landed) and (int(one.landed) > 0) == (config.model.router_name != "soft")
        assert torch.equal(states[id(ours), seed]["random.cpu"], states[id(theirs), seed]["random.cpu"])
        torch.testing.assert_close(dict(one.model.named_buffers()), dict(other.model.named_buffers()))
        for (name, a), b in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
            kept, wanted = one.optimizer.state[a], other.optimizer.state[b]
            assert (
                kept.keys() == wanted.keys() and float(kept["step"]) == float(wanted["step"]) == updates + seed * apart
            )
            for x, y in ((a, b), *((kept[key], wanted[key]) for key in ("exp_avg", "exp_avg_sq"))):
                assert (x - y).abs().max() <= of_weights * y.abs().max().clamp(min=1e-3), name


def test_what_follows_the_seed_beside_the_numbers_is_refused_or_kept_apart() -> None:
    """As a batch size, an architecture or a decay may be written with ${seed} in it."""
    base = compose(*TINY)
    others = {"the batch": "train.batch_size=2", "pos_embed": "model.backbone.width=32",
              "model.backbone.drop_path": "model.backbone.drop_path=0.5", "train.loss": "train.loss=sigmoid",
              "": "optim.weight_decay=0.5"}  # fmt: skip
    for odd, word in others.items():
        with ExitStack() as hooks:
            given = []
            for config in (base, compose(*TINY, word)):
                step, m = new_step(config, 0, hooks), config.model
                images = torch.zeros(2 if odd == "the batch" and config is not base else 4, m.in_chans, 8, 8)
                given.append(handed(step, Batch(images, torch.zeros(len(images), 10)), 1e-2))
            models, optimizers = [each.model for each in given], [each.optimizer for each in given]
            assert alike(models[:1] * 2, optimizers[:1] * 2)
            if odd:
                with pytest.raises(UsageError, match=rf"differ in more than the seed \({odd}\)"):
                    Stack(given)
            else:
                assert not alike(models, optimizers)


def test_jobs_that_differ_in_nothing_but_the_seed_are_gathered() -> None:
    words = ["a seed=0", "b seed=0", "a ++seed=1", "b seed=1", "a seed=2"]
    entries = [Entry(Job(each, each.split(), Path(each), 1, images=each), Path("log")) for each in words]
    assert [[entry.job.run for entry in stack] for stack in stacks(entries, 2)] == [
        ["a seed=0", "a ++seed=1"], ["b seed=0", "b seed=1"], ["a seed=2"]
    ]  # fmt: skip
    assert [len(stack) for stack in stacks(entries, 1)] == [1] * 5


def test_what_has_failed_is_not_called_running_while_its_stack_goes_on(tmp_path: Path) -> None:
    going = cast(Attempt, object())
    entry = Entry(Job("a", ["a"], tmp_path / "run", 1), tmp_path / "00.log", attempt=going)
    assert entry.state(local=True).state == "running"
    (tmp_path / "00.json").write_text('{"reason": "why"}')
    assert (entry.state(local=True).state, entry.state(local=True).reason) == ("failed", "why")


REFUSED: dict[str, tuple[str, Any]] = {
    "train.precision": ("train.precision", "bf16"), "train.recompute": ("train.recompute", True),
    "train.minutes": ("train.minutes", 1.0), "devices": ("devices", 2),
    "prune.keep": ("prune.keep", 1), "adapter": ("model.adapter.name", "lora"),
    "model.head": ("model.head", "mumoe_cp"), "data=": ("data.sets", {"a": {}}), "data= ": ("data.format", "folder"),
    "model/router=mumoe_cp": ("model.router", {"_target_": "softmoe_cli.moe.routers.mumoe_cp.MuMoECPRouter"}),
    "model/router=image_choice gives each expert its own": (
        "model.router", {"_target_": "softmoe_cli.moe.routers.image_choice.ImageChoiceRouter"}
    ),
}  # fmt: skip


def test_what_cannot_be_stacked_is_refused() -> None:
    """By key, with the way out; alone each of it is a run."""
    config = compose("model.moe_blocks=last_1")
    config.data.workers = 2  # of which a set that is in memory has no use
    check_stack(config, 4)
    for said, (key, value) in REFUSED.items():
        *sections, leaf = key.split(".")
        other = copy.deepcopy(config)
        setattr(functools.reduce(getattr, sections, other), leaf, value)
        check_stack(other, 1)
        with pytest.raises(UsageError, match=rf"^seeds_at_once=4: {said.strip()}.*; .*, or leave seeds_at_once out$"):
            check_stack(other, 4)


@pytest.mark.parametrize("more", [("model.router.noise_std=1",), ("model.backbone.drop_path=0.1",)])
def test_what_draws_is_not_compiled_for_several(more: tuple[str, ...]) -> None:
    config = compose("model.moe_blocks=last_1", "train.compile=true", *more)
    with pytest.raises(
        UsageError, match=r"seeds_at_once=4: train.compile=true may change the order .*; set train.comp"
    ):
        check_stack(config, 4)
    with pytest.raises(UsageError, match=r"^train.compile=true may change the order .* leave seeds_at_once out$"):
        require_updates_as_alone(("train.compile=true", *more), of_losses=0, of_weights=0)


@pytest.mark.long
@pytest.mark.thorough
def test_updates_of_a_compiled_stack_are_those_of_each_alone() -> None:
    require_updates_as_alone(("train.compile=true", "train.accumulate=2"), of_losses=5e-6, of_weights=6e-5)


@pytest.mark.long
@pytest.mark.thorough
@pytest.mark.usefixtures("float64")
def test_a_compiled_stack_counts_what_its_router_keeps() -> None:
    words = (*BIASED, "model.router.noise_std=0", "model.backbone.drop_path=0", "train.compile=true")
    require_updates_as_alone(words, of_losses=1e-9, of_weights=1e-9)


@pytest.mark.long
@pytest.mark.thorough
def test_runs_of_a_compiled_stack(tmp_path: Path) -> None:
    """They end, and say what compiling took."""
    words = (*COMMON, "train.compile=true", "train.steps=6", f"output_root={tmp_path}", "study=x")
    assert together(words, (0, 1)) == [(0, "")] * 2
    for run in (tmp_path / "x").iterdir():
        result = json.loads((run / "result.json").read_text())
        assert result["compile_s"] > result["device_s"]


class Asks(TokensChoiceRouter):
    """Wants to know a number, after it has drawn some and counted."""

    def forward(self, x: Tensor, keep: Tensor | None = None) -> SparseRouting:
        routing = super().forward(x, keep)
        assert routing.gate.sum().item() >= 0
        return routing


class Draws(TokensChoiceRouter):
    """Draws random numbers by itself, where `noise_like` would draw each run's own."""

    def forward(self, x: Tensor, keep: Tensor | None = None) -> SparseRouting:
        routing = super().forward(x, keep)
        routing.gate = routing.gate * torch.rand_like(routing.gate)
        return routing


class Counts(TokensChoiceRouter):
    """Keeps what it has seen in no buffer."""

    calls = 0

    def forward(self, x: Tensor, keep: Tensor | None = None) -> SparseRouting:
        routing = super().forward(x, keep)
        self.calls += self.training
        routing.aux_loss = routing.aux_loss * self.calls
        return routing


def cannot(words: str) -> str:
    return rf"these models cannot be computed 2 at once \({words}.*\); leave seeds_at_once out$"


def require_equal(one: nn.Module, other: nn.Module) -> None:
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (dict(getattr(model, kind)()) for model in (one, other))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


OWN = (*BIASED, "model.router.noise_std=1")
CANNOT = {Asks: r"vmap: It looks like you're calling \.item\(\)", Draws: "vmap: called random operation",
          Counts: r"Counts\.calls changes in a pass, and is no buffer"}  # fmt: skip


@pytest.mark.parametrize("router", CANNOT)
def test_what_cannot_be_written_down_leaves_its_models_as_they_were(router: type[TokensChoiceRouter]) -> None:
    """Buffers, gradients and random states; each is updated alone from there on."""
    config = compose(*TINY, *OWN, f"model.router._target_={router.__module__}.{router.__name__}")
    batch = Batch(torch.randn(4, 1, 8, 8), F.one_hot(torch.arange(4), 10).float())
    with ExitStack() as hooks:
        steps, other = [new_step(config, seed, hooks) for seed in (0, 1)], new_step(config, 1, hooks)
        state = random_state()
        states = [dict(state) for _ in steps]
        kept = [copy.deepcopy(step.model) for step in steps]
        with pytest.raises(UsageError, match=cannot(CANNOT[router])), own_draws(states):
            Stack([handed(step, batch, 1e-2) for step in steps])
        assert all(torch.equal(own["random.cpu"], state["random.cpu"]) for own in states)
        for step, before in zip(steps, kept, strict=True):
            require_equal(step.model, before)
            assert all(parameter.grad is None for parameter in step.parameters)
        told = []
        for step in (steps[1], other):
            set_random_state(state)
            told.append(update(step, batch, 1e-2))
        assert told[0] == told[1]
        require_equal(steps[1].model, other.model)
        assert steps[1].landed == other.landed


@pytest.mark.thorough
def test_its_runs_end_with_the_reason(tmp_path: Path) -> None:
    own = (*OWN, f"model.router._target_={Draws.__module__}.Draws")
    told = together([*COMMON, *own, "train.steps=2", f"output_root={tmp_path}", "study=x"], (0, 1))
    assert [code for code, _ in told] == [2, 2]
    assert all(re.match(cannot(CANNOT[Draws]), reason) for _, reason in told), told
    assert not list(tmp_path.glob("x/*/result.json"))


@pytest.mark.thorough
def test_a_run_that_breaks_costs_itself_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed 1 gets an image that is no number; the others go on, and are the runs alone."""
    batches_of = loop._batches

    def spoilt(setup: Any, *more: Any) -> Any:
        for step, batch in enumerate(batches_of(setup, *more)):
            if setup.config.seed == 1 and step == 3:
                batch.images[0, 0, 0, 0] = float("nan")
            yield batch

    monkeypatch.setattr(loop, "_batches", spoilt)
    line = (*COMMON, "model/router=soft", "model.router.noise_std=1", "train.steps=8", "optim.clip_norm=0.1")
    told = together([*line, f"output_root={tmp_path / 'stack'}", "study=x"], (0, 1, 2))
    assert [code for code, _ in sorted(told)] == [0, 0, 1]
    assert "not finite" in max(told)[1] and "at step 3" in max(told)[1]
    for seed in (0, 2):
        assert cli.run(["train", *line, f"output_root={tmp_path / 'alone'}", "study=x", f"seed={seed}"]) == (0, "")
    for run in sorted((tmp_path / "alone/x").iterdir()):
        require_alike(tmp_path / "stack/x" / run.name, run)
        result = json.loads((tmp_path / "stack/x" / run.name / "result.json").read_text())
        assert result["compile_s"] > result["device_s"] / 8  # the pass of two was written down too


def test_without_several_seeds_there_is_nothing_to_gather(softmoe: Softmoe) -> None:
    answer = softmoe("train", "-m", *TINY, "optim.lr=1e-3,1e-2", "seeds_at_once=2")
    assert answer.code == 2 and "hydra.launcher.seeds_at_once=2 has no effect: no two jobs" in answer.err


def test_without_m_there_are_no_seeds(softmoe: Softmoe) -> None:
    answer = softmoe("train", "seeds_at_once=2")
    assert answer.code == 2 and "seeds_at_once=2 is about the jobs of a sweep; it goes with -m" in answer.err


ROUTERS = {
    "dense": (),
    "soft": ("model.router.noise_std=1",),
    "tokens_choice": ("model.router.load_weight=0", "model.router.bias_rate=0.01", "model.backbone.drop_path=0.3"),
    "tokens_choice_bpr": ("train.accumulate=2",),
    "experts_choice": ("train.ema=0.9",),
    "zero_computation": (),
    "soft_uniform": ("optim.name=sgd", "optim.momentum=0.9"),
    "uniform_soft": ("model.expert_init=independent",),
    "uniform": ("model.expert_init=independent",),
    "identity": (),
}


@pytest.mark.thorough
@pytest.mark.parametrize("router", ROUTERS)
def test_each_run_is_the_run_alone(router: str, tmp_path: Path) -> None:
    """Rows of losses, norms, validation and routing, weights, moments and random state over 50 updates; over 12 where
    tokens or experts choose, as later rounding may decide between two that are nearly equal."""
    steps = 12 if "choice" in router or router == "zero_computation" else 50
    tiny = [word for word in COMMON if router not in ("dense", "identity") or not word.startswith("model.router")]
    require_as_alone(tmp_path, [*tiny, f"train.steps={steps}", f"model/router={router}", *ROUTERS[router]])
