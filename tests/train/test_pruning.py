"""Experts that go while a model is finetuned: the rule in its windows, costs, checkpoints, kills."""

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from softmoe_cli.check.official import official_cases, read_case
from softmoe_cli.config.run import Config
from softmoe_cli.cost.fit import training_cost
from softmoe_cli.cost.flop import account
from softmoe_cli.cost.load import Load
from softmoe_cli.cost.memory import predict
from softmoe_cli.data.batches import Batch
from softmoe_cli.model.router import make_layer
from softmoe_cli.model.vit import build
from softmoe_cli.moe.layer import MoE
from softmoe_cli.options import inherit
from softmoe_cli.parallel import ALONE
from softmoe_cli.run import rows as declared
from softmoe_cli.terminal import Screen
from softmoe_cli.train.loop import Step, _logits
from softmoe_cli.train.progress import Budget, Progress
from softmoe_cli.train.pruning import Decision, Pruning, deadline
from tests.conftest import TINY, Softmoe
from tests.moe.layers import QUIET
from tests.oracles import compose
from tests.processes import Started, torchrun
from tests.routers import ROUTERS
from tests.runs import finish, last, rows, same, saved

CASES = {name: meta for name, meta in official_cases().items() if meta["kind"] == "expert_pruning"}
LINE = ("threads=1", "tracking=off", "train.steps=12", "train.batch_size=8", "train.eval_every=4", "prune.windows=3")
"""A finetuning that decides at steps 2 and 4, and at its deadline, 6."""


def pruning_by(**options: Any) -> Config:
    config = compose()
    return replace(config, prune=replace(config.prune, **options))


@pytest.mark.parametrize("compare", ["window", "cumulative"])
@pytest.mark.parametrize("by", ["alpha_score", "hit_rate"])
@pytest.mark.parametrize("name", CASES)
def test_numbers_from_the_rule(
    name: str, by: str, compare: str, record_property: Callable[[str, object], None]
) -> None:
    """A real router, whose logits are the case's, goes through all windows."""
    record_property("case", name)
    record_property("kind", CASES[name]["kind"])
    meta, z = read_case(name)
    given, logits = meta["config"], torch.tensor(z["logits"])
    steps, _, experts = logits.shape
    options = ROUTERS["tokens_choice_dropless"] | QUIET | {"num_experts": experts, "k": given["k"]}
    layer = make_layer(options, experts, 4, 1, gelu="tanh", identical=False).double().eval()
    assert isinstance(layer, MoE)
    with torch.no_grad():
        layer.router.get_parameter("gate.kernel").copy_(torch.eye(experts))
    layer.prunable()
    config = pruning_by(
        keep=given["keep"], by=by, threshold=given["beta"], windows=given["until_step"] // given["window_steps"],
        until=given["until_step"] / steps, compare="window" if compare == "window" else "all",
    )  # fmt: skip
    zeros = {0: torch.zeros(experts, dtype=torch.float64)}
    load = Load.of(config, 10, torch.device("cpu"))
    pruning = Pruning(config, load, Budget(steps, None), {0: layer}, dict(zeros), {0: zeros[0].clone()})
    progress, taken = Progress(), []
    for step in range(steps):
        pruning.see([layer.router(logits[step][None])])
        pruning.add(ALONE)
        progress.step += 1
        if decisions := pruning.decide(progress):
            decision = decisions[0]
            taken.append(progress.step)
            want = z[f"out/{by}/{compare}/share"][len(taken) - 1]
            want = want[decision.left] / want[decision.left].sum()  # the case's last shares are of those that went too
            assert decision.shares == pytest.approx(want.tolist(), rel=0, abs=1e-12)
            layer.leave(decision.stay)
            assert layer.alive.int().tolist() == z[f"out/{by}/{compare}/alive"][len(taken) - 1].tolist()
    assert taken == z["out/decision_step"].tolist() and not pruning.open(progress)


@pytest.mark.parametrize(
    ("steps", "until", "windows", "want"),
    [
        (20, 0.5, 5, [2, 4, 6, 8, 10]), (20, 0.5, 1, [10]), (20, 0.01, 10, [1]), (3, 1.0, 100, [1, 2, 3]),
        (7, 0.5, 3, [2, 3, 4]),
    ],
)  # fmt: skip
def test_when_windows_end(steps: int, until: float, windows: int, want: list[int]) -> None:
    """At whole steps; windows that are shorter than a step end together."""
    config = pruning_by(keep=1, windows=windows, until=until)
    pruning = Pruning(config, Load.of(config, 10, torch.device("cpu")), Budget(steps, None), {})
    progress, ended = Progress(), []
    for progress.step in range(1, steps + 1):
        before = progress.window
        pruning.decide(progress)
        if progress.window > before:
            ended.append(progress.step)
    assert ended == want and progress.window == windows and deadline(pruning.budget, until) == want[-1]


def test_blocks_may_have_different_numbers_of_experts() -> None:
    """What is measured in a block with 4 experts and in one with 2 is added up apart from each other."""
    config = pruning_by(keep=1)
    layers: dict[int, MoE] = {}
    for place, experts in enumerate((4, 2)):
        options = ROUTERS["tokens_choice_dropless"] | QUIET | {"num_experts": experts, "k": 1}
        layer = make_layer(options, 8, 4, 1, gelu="tanh", identical=False).double().eval()
        assert isinstance(layer, MoE)
        layer.prunable()
        layers[place] = layer
    window, total = ({place: torch.zeros(len(each.left), dtype=torch.float64) for place, each in layers.items()}
                     for _ in range(2))  # fmt: skip
    pruning = Pruning(config, Load.of(config, 10, torch.device("cpu")), Budget(4, None), layers, window, total)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    routings = [layer.router(x) for layer in layers.values()]
    pruning.see(routings)
    pruning.add(ALONE)
    for place, routing in enumerate(routings):
        torch.testing.assert_close(pruning.window[place], routing.measured(config.prune.by).double())


def finetuned(softmoe: Softmoe, source: Path, *overrides: str, root: str = "outputs") -> Path:
    control = () if any(word.startswith("prune.keep=") for word in overrides) else ("prune.keep=null",)
    answer = softmoe("finetune", f"checkpoint={source}", *LINE, *control, *overrides, f"output_root={root}")
    assert answer.code == 0, answer
    return next(Path(root, "default").iterdir())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return saved(tmp_path / "start.safetensors", 0, "model/router=tokens_choice_dropless", "model.moe_blocks=[0,1]")


def test_a_run_ends_with_one_expert_and_says_so(
    softmoe: Softmoe, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, costs, the weights, evaluation without an option, and the plain ViT."""
    see = Pruning.see
    measured: list[int] = []

    def counted(pruning: Pruning, decided: Any) -> None:
        measured.append(len(decided))
        see(pruning, decided)

    monkeypatch.setattr(Pruning, "see", counted)
    run = finetuned(softmoe, source, "prune.keep=1", "train.log_every=1", "prune.threshold=0.9")
    assert len(measured) == 6, "nothing is measured once none can go"
    decided = [row for row in rows(run, "routing.jsonl") if "window" in row]
    assert [(row["step"], row["block"]) for row in decided] == [(s, b) for s in (2, 4, 6) for b in (0, 1)]
    for block in (0, 1):
        own = [row for row in decided if row["block"] == block]
        assert own[0]["of"] == [0, 1, 2, 3] and own[-1]["experts_left"] == 1
        for before, after in pairwise(own):
            assert after["of"] == [e for e in before["of"] if e not in before["dropped"]]
        assert all(sum(row["shares"]) == pytest.approx(1, abs=1e-12) for row in own)
    assert any(row["logit_change_max"] > 0 for row in decided)
    metrics = [row for row in rows(run) if row["split"] == "train"]
    assert [metrics[i]["experts_left_block_0"] for i in (0, -1)] == [4, 1]
    result = json.loads((run / "result.json").read_text())
    assert result["experts_left"] == "1,1" and result["served_as"] == "dense"
    assert (result["best_step"], result["prune.keep"]) >= (6, 1), "the best is one of the pruned ones"
    config = compose(*TINY, "model/router=dense")
    dense = account(config.model, 10)
    assert result["served_forward_gflop"] == dense.forward_flop / 1e9 < result["forward_gflop"]
    assert result["served_params_m"] < result["params_m"]
    weights = load_file(last(run) / "model.safetensors")
    assert [int(weights[f"blocks.{b}.mlp.alive"].sum()) for b in (0, 1)] == [1, 1]
    assert declared.row(run / "result.json", declared.RESULT)["served_as"] == "dense"
    assert len(declared.lines(run / "routing.jsonl", declared.ROUTING)) > 6


class Parts(torch.nn.Module):
    """Remembers how many images it is given at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.images.append(len(x))
        return x[:, None]


def test_outputs_are_compared_in_as_many_parts_as_updates() -> None:
    model, x = Parts(), torch.arange(8.0)
    config = compose(*TINY, "train.batch_size=8", "train.accumulate=4")
    optimizer, scaler = torch.optim.SGD([x]), torch.amp.GradScaler("cpu", enabled=False)
    quiet = torch.autocast("cpu", enabled=False)
    step = Step(model, model, optimizer, scaler, quiet, [], config)
    assert torch.equal(_logits(step, Batch(x, x)), x[:, None]) and model.images == [2, 2, 2, 2] and model.training


@pytest.mark.thorough
def test_what_is_left_becomes_a_plain_vit(softmoe: Softmoe, source: Path) -> None:
    """Evaluation needs no option, before and after."""
    run = finetuned(softmoe, source, "prune.keep=1")
    told = [softmoe("evaluate", f"checkpoint={run}", "format=json")]
    answer = softmoe("prune", f"checkpoint={run}", "to=dense", "folder=dense")
    assert answer.code == 0, answer.err
    told.append(softmoe("evaluate", "checkpoint=dense", "format=json"))
    one, other = (json.loads(each.out) for each in told)
    assert one["top1_pct"] == other["top1_pct"] and one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    answer = softmoe("export", f"checkpoint={run}")
    assert answer.code == 2 and "softmoe prune checkpoint=" in answer.err


@pytest.mark.thorough
def test_costs_are_of_what_was_computed(softmoe: Softmoe, tmp_path: Path) -> None:
    """Against the formula, step by step; k falls with the experts that are left."""
    source = saved(tmp_path / "two.safetensors", 0, "model/router=tokens_choice_dropless", "model.router.k=2",
                   "model.moe_blocks=[0,1]")  # fmt: skip
    run = finetuned(softmoe, source, "prune.keep=1", "train.log_every=1", "prune.threshold=0.9")
    model = replace(compose(*TINY, "model/router=tokens_choice_dropless", "model.router.k=2").model, moe_blocks=[0, 1])
    left, flop = {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}, 0.0
    decided = {(row["step"], row["block"]): row for row in rows(run, "routing.jsonl") if "window" in row}
    for row in (row for row in rows(run) if row["split"] == "train"):
        flop += 8 * account(model, 10, batch=8, left=left).train_flop
        assert row["train_pflop"] * 1e15 == pytest.approx(flop, rel=1e-12)
        assert row["landed_pflop"] == pytest.approx(row["train_pflop"], rel=1e-12), "no row is empty"
        for block in left:
            if (row["step"], block) in decided:
                left[block] = [e for e in left[block] if e not in decided[row["step"], block]["dropped"]]
        assert row["forward_gflop"] * 1e9 in (
            pytest.approx(account(model, 10, left=left).forward_flop, rel=1e-12), account(model, 10).forward_flop
        )  # fmt: skip
    assert account(model, 10, batch=8, left=left).train_flop < account(model, 10, batch=8).train_flop


@pytest.mark.thorough
def test_keeping_all_is_plain_finetuning(softmoe: Softmoe, source: Path, tmp_path: Path) -> None:
    """The same bits."""
    plain = finetuned(softmoe, source, root="plain")
    kept = finetuned(softmoe, source, "prune.keep=4", root="kept")
    mine, others = (load_file(last(run) / "model.safetensors") for run in (kept, plain))
    assert all(torch.equal(mine[key], value) for key, value in others.items())
    assert {key for key in mine if key not in others} == {f"blocks.{b}.mlp.alive" for b in (0, 1)}
    numbers = [[row["loss"] for row in rows(run)] for run in (kept, plain)]
    assert numbers[0] == numbers[1]


HARD = {
    "alpha_score": ("prune.keep=1", "train.ema=0.9", "train.accumulate=2"),
    "hit_rate": ("prune.keep=2", "prune.by=hit_rate", "prune.compare=all", "train.recompute=true"),
    "router_change": ("prune.keep=1", "prune.by=router_change", "optim.lr=0.05"),
    "random": ("prune.keep=1", "prune.by=random", "prune.until=1"),
    "kept": ("prune.keep=1", "prune.balance=kept", "model.backbone.drop_path=0.2"),
}  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("name", HARD)
def test_every_step_resumes_to_the_same_bits(name: str, softmoe: Softmoe, source: Path, tmp_path: Path) -> None:
    """From a checkpoint in the middle of a window, between scoring and dropping; before, at and after the deadline."""
    line = (*HARD[name], "train.save_seconds=0", "prune.threshold=0.9")
    whole = finetuned(softmoe, source, *line, root="whole")
    middle = tmp_path / "kept"
    for step in (1, 2, 3, 6, 7):
        _stopped_at(step, source, middle / str(step), line)
        again = next((middle / str(step) / "outputs" / "default").iterdir())
        finish(_started(source, middle / str(step), line))
        same(whole, again)


def _started(source: Path, folder: Path, line: tuple[str, ...], first: Callable[[], object] = int) -> Started:
    return Started(folder, ["finetune", f"checkpoint={source}", *LINE, *line], {}, first=first)


class _Killed:
    """Kills its own process after the update of one step: before the deadline, when the scores of that step are known
    and nothing has gone by them yet."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self) -> None:
        decide, add_loss = Pruning.decide, Progress.add_loss

        def die(progress: Progress) -> None:
            if progress.step == self.step:
                time.sleep(0.3)  # the checkpoint of the step before is being written
                os.kill(os.getpid(), signal.SIGKILL)

        def deadly_decide(this: Pruning, progress: Progress) -> dict[int, Decision]:
            die(progress)
            return decide(this, progress)

        def deadly_loss(progress: Progress, loss: float, aux_loss: float) -> None:
            if self.step > 6:
                die(progress)
            add_loss(progress, loss, aux_loss)

        patch = pytest.MonkeyPatch()  # never undone: this process ends
        patch.setattr(Pruning, "decide", deadly_decide)
        patch.setattr(Progress, "add_loss", deadly_loss)


def _stopped_at(step: int, source: Path, folder: Path, line: tuple[str, ...]) -> None:
    code, out = _started(source, folder, line, _Killed(step)).wait()
    assert code == -signal.SIGKILL, out


@pytest.mark.thorough
def test_finetuning_goes_on_with_what_is_left(softmoe: Softmoe, source: Path) -> None:
    """A finetuning from a pruned run goes on with what is left, and costs as much."""
    run = finetuned(softmoe, source, "prune.keep=2")
    answer = softmoe("finetune", f"checkpoint={run}", "threads=1", "tracking=off", "train.steps=2", "study=on")
    assert answer.code == 0, answer
    result = json.loads(next(Path("outputs/on").glob("*/result.json")).read_text())
    assert result["experts_left"] == "2,2" and result["served_as"] == "experts"
    before, after = (load_file(last(each) / "model.safetensors") for each in (run, next(Path("outputs/on").iterdir())))
    assert all(torch.equal(before[key], after[key]) for key in before if key.endswith(".alive"))


@pytest.mark.parametrize(
    ("router", "words", "said"),
    [
        pytest.param("soft", ["prune.keep=9"], "prune.keep=9: block 1 has 4 experts", marks=pytest.mark.thorough),
        pytest.param(
            "soft",
            ["prune.keep=1", "prune.by=hit_rate"],
            "prune.by=hit_rate tells no experts of soft apart",
            marks=pytest.mark.thorough,
        ),
        ("identity", ["prune.keep=1"], "experts of identity cannot be pruned: a token's expert is chosen by its place"),
        pytest.param("dense", ["prune.keep=1"], "dense has no experts to prune", marks=pytest.mark.thorough),
        pytest.param(
            "soft", ["prune.keep=1", "prune.until=0"], "prune.until=0 is out of range", marks=pytest.mark.thorough
        ),
    ],
)
def test_what_cannot_be_pruned(router: str, words: list[str], said: str, softmoe: Softmoe, tmp_path: Path) -> None:
    tiny = [word for word in TINY if router != "dense" or "num_experts" not in word]
    source = saved(tmp_path / "start.safetensors", 0, f"model/router={router}", tiny=tiny)
    answer = softmoe("finetune", f"checkpoint={source}", *LINE, *words)
    assert answer.code == 2 and said in answer.err, answer
    assert not list(tmp_path.glob("outputs/default/*/metrics.jsonl"))


def test_options_of_no_pruning_are_refused(softmoe: Softmoe) -> None:
    """A control may say that all stay."""
    answer = softmoe("train", *TINY, "prune.by=random")
    assert answer.code == 2 and "prune.by=random has no effect without prune.keep" in answer.err
    inherit.refuse_idle_pruning(compose(*TINY), ["prune.keep=null", "prune.by=random"])


def test_training_does_not_prune(softmoe: Softmoe) -> None:
    answer = softmoe("train", *TINY, "prune.keep=1")
    assert answer.code == 2 and "prune.keep=1 belongs to softmoe finetune" in answer.err


@pytest.mark.thorough
def test_memory_knows_of_larger_slots() -> None:
    """A router with capacity gives each expert more slots when others go."""
    config = compose(*TINY, "model/router=tokens_choice", "train.batch_size=64")
    load = Load.of(config, 10, torch.device("cpu"))
    assert predict(replace(load, keep=1)).peak_bytes > predict(load).peak_bytes


@pytest.mark.thorough
def test_memory_knows_of_slots_that_go() -> None:
    """A soft router's slots go with their experts, and before that all are there."""
    config = compose(*TINY, "model.router.slots_per_expert=40", "train.batch_size=64")
    load = Load.of(config, 10, torch.device("cpu"))
    for way in ("ddp", "fsdp"):
        whole, pruned = (predict(each, 2, way) for each in (load, replace(load, keep=1)))
        assert whole == pruned


def test_a_pruned_source_costs_what_a_smaller_model_does() -> None:
    """Slots of a router with capacity are as many as with so few experts from the start."""
    config = compose(*TINY, "model/router=tokens_choice", "train.batch_size=64")
    small = compose(*TINY, "model/router=tokens_choice", "train.batch_size=64", "model.router.num_experts=1")
    load, alone = (Load.of(each, 10, torch.device("cpu")) for each in (config, small))
    some = replace(load, left={1: [2]})
    assert training_cost(some).train_flop == pytest.approx(training_cost(alone).train_flop, rel=0.02)
    whole, pruned, fresh = (predict(each).activation_bytes for each in (load, some, alone))
    assert pruned == pytest.approx(fresh, rel=0.003) != pytest.approx(whole, rel=0.003), (whole, pruned, fresh)


@pytest.mark.thorough
@pytest.mark.parametrize("left", [2, 3])
def test_a_pruned_source_needs_what_a_smaller_model_does_where_experts_are_divided(left: int) -> None:
    """With as many experts as a process has of all, and with more."""
    words = (*TINY, "train.batch_size=64", "model.router.slots_per_expert=8")
    whole, small = (
        Load.of(compose(*words, f"model.router.num_experts={number}"), 10, torch.device("cpu")) for number in (4, left)
    )
    pruned, fresh, other = (
        predict(each, 2, "expert").activation_bytes for each in (replace(whole, left={1: range(left)}), small, whole)
    )
    assert pruned == pytest.approx(fresh, rel=0.01) != pytest.approx(other, rel=0.01)


def test_router_change_is_of_the_norm(source: Path) -> None:
    """Since the run's first weights, against a slow sum."""
    config = compose(*TINY, "model/router=tokens_choice_dropless", "prune.keep=1", "prune.by=router_change")
    torch.manual_seed(0)
    model = build(replace(config.model, moe_blocks=[1]), 10)
    pruning = Pruning.of(config, Load.of(config, 10, torch.device("cpu")), Budget(10, None), model, Screen(quiet=True))
    kernel = model.blocks[1].mlp.router.gate.kernel
    before = [sum(x * x for x in column) ** 0.5 for column in kernel.detach().double().T.tolist()]
    with torch.no_grad():
        kernel.add_(torch.randn_like(kernel))
    after = [sum(x * x for x in column) ** 0.5 for column in kernel.detach().double().T.tolist()]
    got = pruning._scores(1, of_all=True)
    assert got == pytest.approx([b - a for a, b in zip(before, after, strict=True)], rel=1e-12)


ROUTERS_OF_SEVERAL = {
    "tokens_choice_dropless": ("ddp", "fsdp", "expert"), "tokens_choice": ("expert",), "soft": ("fsdp",),
}  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    ("router", "way"), [(router, way) for router, ways in ROUTERS_OF_SEVERAL.items() for way in ways]
)
def test_several_processes_prune_the_same_experts(router: str, way: str, size: int, tmp_path: Path) -> None:
    """As one process does: rows and weights agree, in float64 but for torch's grouped product, which has none."""
    dtype, tolerance = ("", 1e-4) if router == "tokens_choice_dropless" else ("float64", 1e-9)
    source = saved(tmp_path / "start.safetensors", 0, f"model/router={router}", "model.moe_blocks=[0,1]")
    words = ["finetune", f"checkpoint={source}", *LINE, "prune.keep=1", "prune.threshold=0.9", "train.save_seconds=0"]
    finish(Started(tmp_path / "one", words, {}, dtype=dtype))
    several = [
        Started(tmp_path / "several", [*words, f"parallel={way}"], environment, f"{rank}.txt", dtype)
        for rank, environment in enumerate(torchrun(size))
    ]
    for each in several:
        finish(each)
    one, other = (next((tmp_path / name / "outputs/default").iterdir()) for name in ("one", "several"))
    for mine, theirs in zip(rows(one, "routing.jsonl"), rows(other, "routing.jsonl"), strict=True):
        if "window" in mine:
            assert (mine["of"], mine["dropped"], mine["why"]) == (theirs["of"], theirs["dropped"], theirs["why"])
            assert mine["shares"] == pytest.approx(theirs["shares"], rel=tolerance)
    a, b = (load_file(last(run) / "model.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], atol=tolerance, rtol=tolerance)
    x, y = (json.loads((run / "result.json").read_text()) for run in (one, other))
    assert (x["experts_left"], x["train_pflop"]) == (y["experts_left"], pytest.approx(y["train_pflop"], rel=1e-12))


def test_what_checkpoints_hold(source: Path) -> None:
    """Scores of the running window and of all come back as they were."""
    config = compose(*TINY, "model/router=tokens_choice_dropless", "prune.keep=1", "train.steps=10")
    torch.manual_seed(0)
    load, budget, quiet = Load.of(config, 10, torch.device("cpu")), Budget(10, None), Screen(quiet=True)
    model = build(config.model, 10)
    pruning = Pruning.of(config, load, budget, model, quiet)
    pruning.see([model.blocks[1].mlp.router(torch.randn(4, 16, 16))])
    pruning.add(ALONE)
    again = Pruning.of(config, load, budget, model, quiet)
    again.restore(pruning.tensors())
    assert again.tensors().keys() == {"prune.1.window", "prune.1.total"}
    for key, value in pruning.tensors().items():
        assert value.dtype == torch.float64 and value.any() and torch.equal(again.tensors()[key], value)
