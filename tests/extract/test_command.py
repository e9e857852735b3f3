"""Models of single tasks, cut out of one that knows several: they compute what it does, in every form."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

from softmoe_cli.config.model import Model
from softmoe_cli.cost.flop import account, on_meta
from softmoe_cli.cost.served import served_tasks
from softmoe_cli.errors import UsageError
from softmoe_cli.extract.command import _asked
from softmoe_cli.extract.cut import cut_out
from softmoe_cli.extract.forms import Made, one_task
from softmoe_cli.model.pretrained import read_checkpoint
from softmoe_cli.model.tasks import TaskVit
from softmoe_cli.model.vit import build
from softmoe_cli.options import inherit
from softmoe_cli.run.header import Source
from softmoe_cli.train.pruning import served
from tests.conftest import TINY, Softmoe
from tests.mixes import mix, write_clothes
from tests.oracles import compose
from tests.runs import the_run

X = torch.randn(6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
MODELS: dict[str, tuple[str, ...]] = {
    "task_choice": (),
    "many experts": ("model.router.num_experts=7", "model.router.k=3"),
    "plain gates": ("model.router.renormalise=false", "model.router.k=1"),
    "shared": ("model.router.shared_experts=1",),
    "static": ("model/router=static_tasks", "model.expert_init=independent", "model.router.num_experts=3"),
    "hybrid": ("model/router=tokens_choice_dropless", "model.blocks={1: task_choice}"),
}


def made(*overrides: str) -> tuple[Model, TaskVit]:
    """A model in float64, with random weights."""
    torch.manual_seed(0)
    config = compose(*mix(Path("x")), "model.moe_blocks=[0,1]", *overrides).model
    vit = build(config, 20)
    assert isinstance(vit, TaskVit)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return config, vit.double().eval()


def made_of_one_set() -> tuple[Model, VisionTransformer]:
    config = compose(*TINY).model
    return config, on_meta(config, 10)


@torch.no_grad()
def off(model: Model, vit: TaskVit, new: Made, name: str) -> float:
    """The largest difference of an output of a task, as a share of the largest output."""
    want = one_task(model, vit, name)(X)
    got = one_task(new.model, new.built(torch.float64), name)(X)
    assert torch.equal(got.argmax(dim=1), want.argmax(dim=1))
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize("name", ["digits", "fashion_mnist"])
@pytest.mark.parametrize("kind", MODELS)
def test_one_task_computes_the_same(kind: str, name: str) -> None:
    """With other tasks' weights overwritten before: what is not a number in them would show."""
    model, vit = made(*MODELS[kind])
    number = list(model.tasks).index(name)
    before = one_task(model, vit, name)(X).detach()
    for block in vit.blocks:
        router = block.mlp.router
        if router.by_task:
            others = sorted(set(range(router.num_experts)) - set(router.settled()[1][number]))
            for parameter in block.mlp.experts.parameters():
                parameter.data[others] = torch.nan
            if hasattr(router, "table"):
                router.table.data[1 - number] = torch.nan
    for parameter in (vit.head.weight, vit.head.bias):
        parameter.data[10 * (1 - number) : 10 * (2 - number)] = torch.nan
    forms = ["experts"] if kind == "hybrid" else ["experts", "folded"]
    for form in forms:
        new = Made.of(form, model, vit, [name])
        assert new.model.tasks is None and len(new.weights["head.weight"]) == 10
        assert all(value.isfinite().all() for value in new.weights.values())
        got = new.built(torch.float64)(X)
        assert ((got - before).abs().max() / before.abs().max()).item() <= 1e-12
        experts = [block.mlp.experts.w1.shape for block in new.built(torch.float64).blocks]
        k, shared = vit.blocks[1].mlp.router.k, vit.blocks[1].mlp.router.shared_experts
        assert experts[1] == ((k, 16, 32) if form == "experts" else (1, 16, 32 * (k + shared)))


@pytest.mark.parametrize("kind", ["task_choice", "many experts", "static", "hybrid"])
def test_all_tasks_together_are_the_whole_model(kind: str) -> None:
    model, vit = made(*MODELS[kind])
    new = Made.of("experts", model, vit, ["digits", "fashion_mnist"])
    assert new.model.tasks == model.tasks
    assert max(off(model, vit, new, name) for name in model.tasks) <= 1e-12
    left = new.built(torch.float64).blocks[1].mlp.router
    taken = {expert for own in vit.blocks[1].mlp.router.settled()[1] for expert in own}
    assert left.num_experts == len(taken) <= 2 * left.k


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_served_is_known_before(kind: str) -> None:
    """The cost that a run tells of one task is that of the model which is extracted."""
    model, vit = made(*MODELS[kind])
    told = served_tasks(model, vit)
    assert list(told) == ["digits", "fashion_mnist"]
    for name, cost in told.items():
        new = Made.of("experts", model, vit, [name])
        assert cost.row == account(new.model, 10).row
        assert cost.params == sum(each.numel() for each in new.built(torch.float32).parameters())
    assert served_tasks(*made_of_one_set()) == {}


def test_what_cannot_be_extracted_is_served_whole() -> None:
    """Twelve experts make a head of 20 classes, and none of the 10 of one task."""
    model, vit = made("model.head=mumoe_cp", "model.head_experts=12")
    cost = account(model, 20)
    with pytest.raises(UsageError, match="only a linear head can be cut"):
        cut_out(model, vit, ["digits"])
    told = served(model, vit, cost)
    assert (told["served_as"], told["served_params_m"]) == (None, cost.params / 1e6)


WIDTHS = {"base": (512, 2048), "big": (1024, 8192)}
TABLES_7_AND_8: list[tuple[str, int, int, float, float, float]] = [
    ("base", 3, 32, 19, 214, 25),  # the encoder
    ("base", 3, 32, 25, 221, 32),  # the decoder
    ("big", 3, 128, 126, 6500, 176),
    ("big", 3, 128, 151, 6500, 201),
]
"""Of Kudugunta et al. (2021), Tables 7 and 8: widths, blocks with experts, experts, and millions of parameters of the
dense model, of the mixture, and of what serves one task with two experts. The 6.5 billion are half of a printed 13, and
176 is not printed: the same sum for the other half."""


@pytest.mark.parametrize(("size", "blocks", "experts", "dense_m", "whole_m", "served_m"), TABLES_7_AND_8)
def test_parameters_of_the_paper(
    size: str, blocks: int, experts: int, dense_m: float, whole_m: float, served_m: float
) -> None:
    """What experts add to a dense model, whole and served, by our count of what a mixture adds to ours."""
    width, hidden = WIDTHS[size]
    words = (
        "model/router=task_choice", f"model.router.num_experts={experts}", "model.router.k=2",
        "model/backbone=vit_nano2", f"model.backbone.width={width}", f"model.backbone.mlp_width={hidden}",
        "model.backbone.depth=6", "model.moe_blocks=every_2",
    )  # fmt: skip
    config = compose("data=mix", "data.sets=[digits,fashion_mnist]", "data.image_size=8", *words).model
    vit = on_meta(config, 20)
    dense = account(replace(config, router={"_target_": None}, moe_blocks=[], tasks=None), 10)
    whole = account(config, 20).params - (width + 1) * 10  # of the other task's classes
    served = served_tasks(config, vit)["digits"].params
    assert len(config.moe_blocks) == blocks
    rounding = 100 if whole_m > 1000 else 1.5  # to whole millions, of a dense model that is printed so as well
    assert dense_m + (whole - dense.params) / 1e6 == pytest.approx(whole_m, abs=rounding)
    assert dense_m + (served - dense.params) / 1e6 == pytest.approx(served_m, abs=1.5)


def test_plain_gates_of_several_tasks_are_refused() -> None:
    model, vit = made(*MODELS["plain gates"])
    with pytest.raises(UsageError, match="each task's outputs would have to be multiplied by another number"):
        cut_out(model, vit, ["digits", "fashion_mnist"])


def test_pruned_experts_stay_pruned() -> None:
    """Of a block that decides by token, whose experts a finetuning on the mix has pruned."""
    model, vit = made(*MODELS["hybrid"])
    vit.blocks[0].mlp.prunable()
    vit.blocks[0].mlp.leave([1, 2])
    new = Made.of("experts", model, vit, ["digits"])
    assert off(model, vit, new, "digits") <= 1e-12
    assert new.built(torch.float32).blocks[0].mlp.left == [1, 2]
    assert new.weights_as(torch.float32)["blocks.0.mlp.alive"].dtype == torch.bool


@pytest.mark.thorough
def test_the_cost_is_that_of_the_experts_that_are_left(softmoe: Softmoe, clothes: Path, tmp_path: Path) -> None:
    words = mix(clothes, "model/router=tokens_choice", "train.steps=1", "threads=1")
    assert softmoe("train", *words).code == 0
    source = read_checkpoint(str(the_run(tmp_path)))
    weights = source.weights | {"blocks.1.mlp.alive": torch.arange(4) == 2}
    save_file(weights, tmp_path / "pruned.safetensors", metadata={"softmoe": json.dumps(source.card)})
    cost = told(softmoe, "extract", "checkpoint=pruned.safetensors", "task=digits", "folder=out")["cost"]
    for when, (checkpoint, classes) in {"before": ("pruned.safetensors", 20), "after": ("out", 10)}.items():
        model = inherit.model_of(read_checkpoint(checkpoint), None)
        assert cost[when] == account(model, classes, left={1: [2]}).row != account(model, classes).row


def test_what_cannot_be_folded() -> None:
    model, vit = made(*MODELS["hybrid"])
    with pytest.raises(UsageError, match="form=folded: block 0 decides by token or image"):
        Made.of("folded", model, vit, ["digits"])
    with pytest.raises(UsageError, match="form=folded: block 0 decides by token or image"):
        Made.of("folded", *made("model/router=tokens_choice_dropless"), ["digits"])
    with pytest.raises(UsageError, match="form=folded: no block has experts that a task takes; leave form=experts"):
        Made.of("folded", *made("model/router=dense"), ["digits"])
    with pytest.raises(UsageError, match="form=dense: MLPs of 64 units in blocks"):
        Made.of("dense", *made("model.moe_blocks=[1]"), ["digits"])


def test_a_plain_vit_of_one_expert_or_of_parts_of_an_mlp() -> None:
    for words in (
        MODELS["plain gates"], ("model.expert_width=16",),
        ("model.expert_width=16", "model.router.k=1", "model.router.renormalise=false", *MODELS["shared"]),
    ):  # fmt: skip
        model, vit = made(*words)
        new = Made.of("dense", model, vit, ["digits"])
        assert new.model.router == {"_target_": None} and off(model, vit, new, "digits") <= 1e-12
        assert [block.mlp.fc1.out_features for block in new.built(torch.float64).blocks] == [32, 32]


# --- as it is typed ---------------------------------------------------------------------------------------------------


@pytest.fixture
def clothes(tmp_path: Path) -> Path:
    return write_clothes(tmp_path / "sets" / "clothes")


def told(softmoe: Softmoe, *words: str) -> dict[str, Any]:
    answer = softmoe(*words, "format=json")
    assert answer.code == 0, answer.err[-1500:]
    row: dict[str, Any] = json.loads(answer.out)
    return row


def test_a_checkpoint_from_before_there_were_tasks_knows_one() -> None:
    assert _asked({}, Source("x", "0123", {}, {"model": {}}), []) is None


def test_a_trained_model_in_every_form(softmoe: Softmoe, clothes: Path, tmp_path: Path) -> None:
    """Evaluations of the whole, of a task of it and of what is extracted agree to the last digit that is printed; the
    folder exports like any other; a plain ViT is timm's."""
    words = mix(clothes, "train.steps=6", "model.moe_blocks=[0,1]", "model.expert_width=16", "threads=1")
    assert softmoe("train", *words).code == 0
    run = f"checkpoint={the_run(tmp_path)}"
    whole = told(softmoe, "evaluate", run)
    assert [each["task"] for each in whole["tasks"]] == ["digits", "fashion_mnist"]
    assert whole["images"] == sum(each["images_evaluated"] for each in whole["tasks"]) == 399
    means = [sum(w * each["top1_pct"] for w, each in zip(v, whole["tasks"], strict=True)) for v in (
        (359 / 399, 40 / 399), (0.5, 0.5))]  # fmt: skip
    assert [whole["top1_pct"], whole["mean_over_tasks_top1_pct"]] == pytest.approx(means)
    for form in ("experts", "folded", "dense"):
        receipt = told(softmoe, "extract", run, "task=fashion_mnist", f"form={form}", f"folder={form}")
        assert receipt["float64_distance"] <= 1e-12 and receipt["of_each"]["fashion_mnist"]["max_change"] < 1e-5
        assert receipt["cost"]["after"]["params"] < receipt["cost"]["before"]["params"]
        test = dict(receipt["of_each"]["fashion_mnist"]["test"])
        assert test.pop("max_change") < 1e-5 and test == {"images": 40, "same_predictions_pct": 100}, "and no quality"
        if form != "dense":
            assert [block["of"] for block in receipt["blocks"].values()] == [4, 4]
        alone, part = (
            told(softmoe, "evaluate", f"checkpoint={form}"),
            told(softmoe, "evaluate", run, "task=fashion_mnist"),
        )
        for key in ("top1_pct", "top5_pct", "loss", "nll", "ece_pct"):
            assert f"{alone[key]:.4f}" == f"{part[key]:.4f}" == f"{whole['tasks'][1][key]:.4f}"
        assert [each["class"] for each in alone["per_class"]][:2] == ["T-shirt/top", "Trouser"]
    theirs = timm.create_model(f"local-dir:{tmp_path / 'dense'}", pretrained=True)
    assert type(theirs).__name__ == "VisionTransformer" and theirs.num_classes == 10
    assert told(softmoe, "export", "checkpoint=experts", "folder=out")["programs"]["timm"]["same_top1"] > 0
    both = told(softmoe, "extract", run, "task=[fashion_mnist,digits]", "folder=both")
    assert both["settings"]["tasks"] == ["digits", "fashion_mnist"]
    for mine, theirs in zip(told(softmoe, "evaluate", "checkpoint=both")["tasks"], whole["tasks"], strict=True):
        assert mine.pop("task") == theirs["task"]
        assert mine == pytest.approx({key: theirs[key] for key in mine}, rel=1e-4)
    tuned = softmoe("finetune", "checkpoint=experts", "data=digits", "train.steps=1", "threads=1", "tracking=off")
    assert tuned.code == 0, tuned.err[-1500:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inherit, "named_source", None)  # known from the file's header, without weights
        again = softmoe("extract", run, "task=fashion_mnist", "folder=experts")
    assert again.code == 0 and "holds this already" in again.out
    timed = softmoe("extract", run, "task=fashion_mnist", "folder=experts", "clock=true")
    assert timed.code == 2 and "clock=true: experts was made without it" in timed.err
    refused = {
        ("extract", run, "task=shoes"): "knows the tasks digits, fashion_mnist",
        ("extract", run, "task=[digits,fashion_mnist]", "form=folded"): "form=folded is of one task",
        ("extract", "checkpoint=experts", "task=digits"): "knows one task; there is nothing to extract",
        ("evaluate", run, "task=shoes"): "knows the tasks digits, fashion_mnist",
        ("evaluate", run, "data=digits"): "an image of an unknown task has no answer",
        ("evaluate", run, "audit=[experts]"): "audit is about one task",
        ("evaluate", run, "contrast=skip"): "first softmoe extract task=NAME",
        ("evaluate", "checkpoint=experts", "task=digits"): "knows one task, which has no name",
        ("export", run): "softmoe extract checkpoint=",
        ("prune", run, "keep=1"): "first make a model of one",
        ("finetune", run, "data=digits", "train.steps=1"): "routes by its tasks, digits, fashion_mnist",
    }
    for typed, says in refused.items():
        answer = softmoe(*typed)
        assert answer.code == 2 and says in answer.err, (typed, answer)
    assert len(load_file("experts/model.safetensors")["blocks.1.mlp.experts.w1"]) == 2
    kept = told(softmoe, "extract", run, "task=digits", "folder=digits")["blocks"]
    for file in clothes.iterdir():
        file.unlink()
    alone = told(softmoe, "evaluate", run, "task=digits")
    assert {key: alone[key] for key in ("top1_pct", "loss", "ece_pct")} == {
        key: whole["tasks"][0][key] for key in ("top1_pct", "loss", "ece_pct")
    }, "an evaluation of one task needs no other task's images and is not changed by them"
    assert told(softmoe, "extract", run, "task=digits", "folder=digits_without")["blocks"] == kept
