"""Device mistakes, found without a device: commands with `device=cuda` on the pretended card of tests/card.py. A tensor
that is made on the CPU and meets one of the card ends them, as it would on a card; and the numbers are the CPU's."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from softmoe_cli.data import batches
from softmoe_cli.data.pixels import pixel_statistics
from softmoe_cli.device import precision_context
from softmoe_cli.errors import UsageError
from softmoe_cli.evaluate.quality import evaluate, features, routing_statistics
from softmoe_cli.model.vit import build, prepare
from softmoe_cli.moe.routing import routings
from softmoe_cli.optim import optimizer_of
from softmoe_cli.parallel import Average
from softmoe_cli.train.looks import Looks
from softmoe_cli.train.loop import Step, update
from tests.card import card
from tests.conftest import TINY, Answer, Softmoe, thinned
from tests.mixes import mix, write_clothes
from tests.oracles import compose
from tests.routers import ROUTERS, start
from tests.runs import last, rows, same

MIXING: dict[str, Callable[[Tensor, Tensor], object]] = {
    "sum": lambda there, here: there + here,
    "product": lambda there, here: there @ here.T,
    "concatenation": lambda there, here: torch.cat([there, here]),
    "one number": lambda there, here: there * here.sum(),
    "one number of the card": lambda there, here: here * there.sum(),
    "card by index": lambda there, here: there[here[:, 0].long()],
    "CPU by index": lambda there, here: here[there[:, 0].long()],
    "index_select": lambda there, here: there.index_select(0, here[:, 0].long()),
    "written by index": lambda there, here: there.index_put((there[:, 0].long(),), here),
    "chosen": lambda there, here: torch.where(there > 0, there, here),
    "filled": lambda there, here: there.masked_fill(here > 0, 0),
    "copied": lambda there, here: there.copy_(here),
    "in place": lambda there, here: here.add_(there),
    "one number in place": lambda there, here: here.sum().add_(there.sum()),
    "one number in place of the card": lambda there, here: there.sum().add_(here.sum()),
    "out": lambda there, here: torch.add(there, 1, out=here),
    "one number out": lambda there, here: torch.add(there.sum(), 1, out=here.sum()),
    "one_hot": lambda there, here: F.one_hot(there[0].long(), 3).float() + here,
    "one_hot of the CPU": lambda there, here: F.one_hot(here[0].long(), 3).float() + there,
    "one_hot where it is": lambda there, here: F.one_hot(there[0].long(), 3).float() + there,
    "several": lambda there, here: torch._foreach_mul([there, there], here.sum()),
    "moved": lambda there, here: there.cpu() + here,
    "after it": lambda there, here: there + here.to(there),
    "like it": lambda there, here: there + there.new_zeros(3, 3) + torch.zeros_like(there),
    "where it is": lambda there, here: there + torch.ones(3, 3, device=there.device),
    "made anywhere": lambda there, here: there + torch.ones(3, 3),
}


@pytest.mark.parametrize("how", MIXING)
def test_its_rules_are_those_of_torch(how: str) -> None:
    """Whether an operation takes tensors of both places, asked of torch's fake tensors, which know devices."""

    def refused() -> bool:
        try:
            MIXING[how](torch.zeros(3, 3, device="cuda"), torch.zeros(3, 3))
        except RuntimeError:
            return True
        return False

    with FakeTensorMode():
        wanted = refused() or how == "CPU by index"  # which they let pass, and kernels do not
    with card():
        assert refused() == wanted


def test_what_only_a_card_refuses() -> None:
    with card():
        x, linear = torch.ones(2, 3, device="cuda"), torch.nn.Linear(3, 2)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        with pytest.raises(TypeError, match="numpy"):
            np.asarray(x)
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device="cuda", generator=torch.Generator())
        with pytest.raises(RuntimeError, match="cuda and on cpu"):
            linear(x)
        y = linear.to(x.device)(x).sum()
        y.backward()
        assert linear.weight.grad is not None
        assert (linear.weight.grad.device.type, linear.weight.grad.tolist()) == ("cuda", [[2.0] * 3] * 2)
        assert x.cpu().numpy().sum() == 6
    assert linear.weight.device.type == "cpu", "nothing is left of it"


def on_devices(work: Callable[[torch.device], dict[str, float]]) -> None:
    """The same numbers on the CPU and on the card, bit for bit."""
    wanted = work(torch.device("cpu"))
    with card():
        assert work(torch.device("cuda")) == wanted
    assert all(value == value for value in wanted.values())


@pytest.mark.parametrize("router", thinned([(router,) for router in ["dense", *ROUTERS]], 4))
def test_every_layer_learns_and_is_evaluated(router: str) -> None:
    """Two updates in two parts with recomputation, of the model and of an average, and what is looked at."""
    some: tuple[str, ...] = () if router == "dense" else (start(router), "model.moe_blocks=last_2")
    some += ("model.router.num_tasks=1",) if "num_tasks" in ROUTERS.get(router, {}) else ()
    config = compose(*TINY, f"model/router={router}", "train.accumulate=2", "optim.clip_norm=0.1", *some)

    def work(device: torch.device) -> dict[str, float]:
        torch.manual_seed(0)
        model = build(config.model, 10).train()
        prepare(model, device, "fp32")
        model.set_grad_checkpointing(True)
        average = Average(model, decay=0.9)
        for each in (model, average.module):
            each.to(device)
        chance, autocast = torch.Generator().manual_seed(0), precision_context(device.type, "fp32")
        x = torch.randn(16, 1, 8, 8, generator=chance).to(device)
        labels = (torch.arange(16) % 10).to(device)
        batch = batches.Batch(x, torch.nn.functional.one_hot(labels, 10).float())
        numbers: dict[str, float] = {}
        with routings(model) as seen:
            landed = torch.zeros((), dtype=torch.int64, device=device)
            optimizer, scaler = optimizer_of(model, config.optim), torch.amp.GradScaler(device.type, enabled=False)
            step = Step(model, model, optimizer, scaler, autocast, seen, config, landed=landed)
            for number in range(2):
                numbers |= {f"{key}{number}": v for key, v in zip("lan", update(step, batch, 0.01), strict=True)}
                average.update(model)
        asked = [batches.Batch(x, labels)]
        numbers |= dict(evaluate(average.module, asked, loss="softmax", autocast=autocast))
        numbers["features"] = features(model, asked, autocast).double().sum().item()
        for place, said, _ in routing_statistics(model, asked[0], autocast):
            numbers |= {f"{place['block']} {key}": value for key, value in said.items()}
        return numbers | {"landed": landed.item()}

    on_devices(work)


def on_card(softmoe: Softmoe, command: str, *line: str) -> Answer:
    with card():
        answer = softmoe(command, *line, "device=cuda")
    assert answer.code == 0, answer.err
    return answer


def run_of(study: str) -> Path:
    """From the working folder of the command line."""
    (run,) = Path("outputs", study).iterdir()
    return run


def test_a_run_is_the_cpus(softmoe: Softmoe) -> None:
    """Rows, routing, weights, moments and random states of a whole run; its checkpoint is evaluated on the card too."""
    line: tuple[str, ...] = (
        "train",
        *TINY,
        "train.steps=2",
        "train.eval_every=1.0",
        "train.accumulate=2",
        "train.recompute=true",
    )
    line += ("train.ema=0.9", "optim.clip_norm=0.1", "augment.hflip=0.5", "augment.mixup=0.2", "train.fewshot=[2]")
    assert softmoe(*line, "study=cpu", "device=cpu").code == 0
    on_card(softmoe, *line, "study=card")
    one, other = run_of("cpu"), run_of("card")
    assert rows(one) == rows(other) != []
    assert rows(one, "routing.jsonl") == rows(other, "routing.jsonl") != []
    first, second = (load_file(last(run) / "model.safetensors") for run in (one, other))
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    look = ("evaluate", f"checkpoint={other}", "audit=[experts,slots]", "audit_images=16", "format=json")
    told = [json.loads(softmoe(*look, "device=cpu").out), json.loads(on_card(softmoe, *look).out)]
    assert told[0]["audit"] == told[1]["audit"] != []


def test_a_mistake_ends_a_run(softmoe: Softmoe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of the pixels is left on the CPU."""
    monkeypatch.setattr(batches, "pixel_statistics", lambda data, _: pixel_statistics(data, torch.device("cpu")))
    with card():
        answer = softmoe("train", *TINY, "train.steps=1", "device=cuda")
    assert answer.code == 1
    assert "operands on cuda and on cpu" in answer.err


OPTIONS: list[tuple[str, ...]] = [
    ("train.precision=bf16", "model/router=tokens_choice", "model.backbone.drop_path=0.3"),  # counts what has landed
    ("train.precision=bf16", "train.recompute=true", "model.router.noise_std=1.0", "model.backbone.drop_path=0.3"),
    ("recipe=finetune_sgd", "model/router=tokens_choice_dropless"),
    ("train.batch_size=auto",),
    ("augment.randaugment=[2,9]", "augment.erase=0.5", "augment.cutmix=1.0", "augment.crop=resized"),
    ("augment.crop=shift", "augment.shift=0.2"),
    ("train.precision=fp16", "recipe=strong", "train.accumulate=2", "train.recompute=true"),
    ("optim.moments=offload",),
    ("train.loss=sigmoid", "model.head=mumoe_cp", "model.head_experts=4"),
    ("model/router=experts_choice", "model.backbone.layer_scale=0.1", "model.backbone.qk_norm=scale"),
]


@pytest.mark.parametrize("options", thinned([(case,) for case in OPTIONS], 2), ids=" ".join)
def test_every_option_of_a_run(softmoe: Softmoe, options: tuple[str, ...]) -> None:
    on_card(softmoe, "train", *TINY, "train.steps=3", "train.eval_every=0.5", *options)


@pytest.mark.thorough
def test_a_run_goes_on(softmoe: Softmoe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by an error after four updates, it comes to the same end, moments and random states included."""
    line = ("train", *TINY, "train.steps=8", "train.eval_every=0.5", "model.router.noise_std=1.0", "train.ema=0.9")
    on_card(softmoe, *line, "output_root=whole")

    def broken(*_: object) -> dict[str, object]:
        raise UsageError("no further")

    with monkeypatch.context() as patch, card():
        patch.setattr(Looks, "validation", broken)
        assert softmoe(*line, "output_root=parted", "device=cuda").code == 2
    assert "going on from step" in on_card(softmoe, *line, "output_root=parted").out
    same(*(next(Path(root, "default").iterdir()) for root in ("whole", "parted")))


@pytest.mark.thorough
def test_checkpoints_are_looked_at(softmoe: Softmoe) -> None:
    """Averaged, and shown: images of the data, and one of a file."""
    for study, seed in (("first", "seed=0"), ("second", "seed=1")):
        on_card(softmoe, "train", *TINY, "train.steps=2", "train.eval_every=1.0", f"study={study}", seed)
    first, second = run_of("first"), run_of("second")
    on_card(softmoe, "evaluate", f"checkpoint=[{first},{second}]")
    Image.fromarray(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)).save("one.png")
    for image in ((), ("image=one.png",)):
        on_card(softmoe, "show", str(first), *image, f"folder=shown{len(image)}")


@pytest.mark.parametrize("adapter", thinned(["none", "soft_moa", "dense_moa", "lora", "bottleneck"], 1))
def test_finetuning(softmoe: Softmoe, adapter: str) -> None:
    """And pruning on the way, after it, and what is said of the result."""
    on_card(softmoe, "train", *TINY, "train.steps=2", "train.eval_every=1.0", "study=first")
    some = ("prune.keep=2",) if adapter == "none" else ()
    begin = f"checkpoint={run_of('first')}"
    on_card(softmoe, "finetune", begin, "tracking=off", "train.steps=6", f"adapter={adapter}", "study=second", *some)
    on_card(softmoe, "evaluate", f"checkpoint={run_of('second')}", "fewshot=[1]", "contrast=[drop_1,flat,skip]")
    if adapter == "none":
        on_card(softmoe, "prune", begin, "keep=1", "clock=true", "repeats=3")


@pytest.mark.thorough
@pytest.mark.parametrize("router", ["task_choice", "static_tasks"])
def test_a_mix(softmoe: Softmoe, tmp_path: Path, router: str) -> None:
    line = [word for word in mix(write_clothes(tmp_path / "clothes")) if not word.startswith("model/router")]
    line += [f"model/router={router}", "model.expert_init=independent"]
    on_card(softmoe, "train", *line, "train.steps=3", "train.eval_every=0.5", "study=mixed")
    for command in ("evaluate", "extract"):
        on_card(softmoe, command, f"checkpoint={run_of('mixed')}", "task=digits")


@pytest.mark.thorough
def test_files(softmoe: Softmoe, tmp_path: Path) -> None:
    """Images that workers decode: what they made is copied from pinned memory."""
    for split in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / "tree" / split / name
            folder.mkdir(parents=True)
            for i in range(8):
                pixels = np.random.default_rng(i).integers(0, 255, (12, 12, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    of = ("data=folder", f"data.root={tmp_path / 'tree'}", "model.image_size=8", "train.batch_size=4")
    on_card(softmoe, "train", *TINY, *of, "train.steps=3", "data.workers=1")


@pytest.mark.thorough
@pytest.mark.parametrize("router", ["dense", "soft", "tokens_choice", "zero_computation"])
def test_what_a_model_costs(softmoe: Softmoe, router: str) -> None:
    some = ("recompute=true", "accumulate=2", "batch_size=4", "clock=true", "repeats=3")
    on_card(softmoe, "cost", f"model=vit_nano2_{router}", *some)
