"""Finetuning with adapters as it is typed: checkpoints are deltas, which belong to one base, go on, and leave as a
whole model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from softmoe_cli.model.adapted import is_adapters
from softmoe_cli.run.checkpoint import digest_of
from softmoe_cli.run.delta import Delta, composed
from softmoe_cli.run.header import Source
from tests.adapters.adapters import OPTIONS
from tests.conftest import Softmoe
from tests.oracles import compose
from tests.processes import Started, torchrun
from tests.runs import finish as ended
from tests.runs import kill_five_times, last, rows, same, saved, the_run
from tests.test_parallel import alike, finish

DENSE = (
    "model/router=dense", "model.backbone.width=16", "model.backbone.depth=2", "model.backbone.heads=2",
    "model.backbone.mlp_width=32",
)  # fmt: skip
QUICK = (
    "tracking=off",
    "threads=1",
    "train.steps=2",
    "train.batch_size=8",
    "train.eval_every=2",
    "recipe=finetune_adapter",
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tmp_path / "base.safetensors", 0, tiny=DENSE)


def card_of(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="pt") as opened:
        card: dict[str, Any] = json.loads(opened.metadata()["softmoe"])
    return card


def finetuned(softmoe: Softmoe, tmp_path: Path, *arguments: str, root: str = "outputs") -> Path:
    before = set((tmp_path / root).glob("default/*"))
    answer = softmoe("finetune", *QUICK, f"output_root={root}", *arguments)
    assert answer.code == 0, answer.err
    (run,) = set((tmp_path / root).glob("default/*")) - before
    return run


def test_a_checkpoint_holds_what_was_trained_and_the_rest_stays_to_the_bit(
    softmoe: Softmoe, tmp_path: Path, base: Path
) -> None:
    """And belongs to its base: another one is refused, a moved one is named."""
    run = finetuned(softmoe, tmp_path, f"checkpoint={base}", "adapter=soft_moa", "model.adapter.num_adapters=3")
    file = last(run) / "model.safetensors"
    held, weights, card = load_file(file), load_file(base), card_of(file)
    result = json.loads((run / "result.json").read_text())
    outside = {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    inside = {f"blocks.{i}.norm1.{leaf}" for i in range(2) for leaf in ("weight", "bias")}
    parts = ("router.phi", "experts.w1", "experts.b1", "experts.w2", "experts.b2")
    assert held.keys() == outside | inside | {f"blocks.{i}.attn_adapter.{leaf}" for i in range(2) for leaf in parts}
    assert sum(value.numel() for value in held.values()) == round(1e6 * result["trained_params_m"])
    head = held["head.weight"].numel() + held["head.bias"].numel()
    assert round(1e6 * (result["trained_params_m"] - result["trained_body_params_m"])) == head
    assert result["adapter"] == result["model.adapter.name"] == "soft_moa" and "model.adapter.alpha" not in result
    assert card["base"] == {"checkpoint": str(base), "digest": digest_of(weights), "left_out": []}

    places = {(row["block"], row["beside"]) for row in rows(run, "routing.jsonl")}
    assert places == {(0, "attn"), (1, "attn")} and rows(run)[-2]["routing_utilisation"] == 1.0

    good = softmoe("evaluate", f"checkpoint={run}", "format=json")
    assert json.loads(good.out)["top1_pct"] == pytest.approx(result["top1_pct"], abs=1e-9)
    moved = tmp_path / "elsewhere.safetensors"
    base.rename(moved)
    refused = softmoe("evaluate", f"checkpoint={run}")
    assert refused.code == 2 and "cannot be read" in refused.err and "say where it is now with base=" in refused.err
    again = softmoe("evaluate", f"checkpoint={run}", f"base={moved}", "format=json")
    assert {**json.loads(again.out), "eval_s": 0} == {**json.loads(good.out), "eval_s": 0}
    saved(base, 1, tiny=DENSE)
    refused = softmoe("evaluate", f"checkpoint={run}")
    assert refused.code == 2 and "belong to other weights than those of" in refused.err
    refused = softmoe("evaluate", f"checkpoint={moved}", f"base={base}")
    assert refused.code == 2 and "has no effect" in refused.err and len(refused.err.splitlines()) == 1
    other = dict(weights, **{"norm.bias": weights["norm.bias"] + 1e-7})
    save_file(other, base, metadata={"softmoe": json.dumps(card_of(moved))})
    assert softmoe("export", f"checkpoint={run}").code == 2


def test_a_delta_holds_a_trained_head_whole() -> None:
    """With what is frozen of it, or counted: what is put together again is the model that was trained."""
    base = {name: torch.zeros(2) for name in ("norm.weight", "head.weight", "head.bias", "head.norm.mean", "old")}
    source = Source("base", "", base, {})
    trained = base | {"head.weight": torch.ones(2), "head.norm.mean": torch.ones(2), "a.q_adapter.w": torch.ones(2)}
    del trained["old"]
    delta = Delta.of(source, trained, {"head.weight", "a.q_adapter.w"}, set(base) - {"old"})
    assert delta.names == {"head.weight", "head.bias", "head.norm.mean", "a.q_adapter.w"}
    held = Source("delta", "", {name: trained[name] for name in delta.names}, {"base": delta.base})
    whole = composed(held, source).weights
    assert whole.keys() == trained.keys() and all(torch.equal(whole[name], trained[name]) for name in trained)
    frozen = Delta.of(source, trained, {"a.q_adapter.w"}, set(base) - {"old"})
    assert frozen.names == {"a.q_adapter.w"}


def test_experts_that_are_gone_are_cut_away_before_adapters_come(softmoe: Softmoe, tmp_path: Path) -> None:
    """And a command that takes no adapters says so though their base is not there any more."""
    mixture = saved(tmp_path / "mixture.safetensors", 0, "model/router=tokens_choice_dropless")
    card = card_of(mixture)
    weights = load_file(mixture) | {"blocks.1.mlp.alive": torch.tensor([True, False, True, True])}
    save_file(weights, tmp_path / "masked.safetensors", metadata={"softmoe": json.dumps(card)})
    refused = softmoe("finetune", *QUICK, "checkpoint=masked.safetensors", "adapter=lora")
    assert refused.code == 2 and "first softmoe prune checkpoint=masked.safetensors" in refused.err
    card["model"]["adapter"] |= {"name": "lora", "width": 2, "alpha": 2.0}
    card["base"] = {"checkpoint": "gone", "digest": "0", "left_out": []}
    save_file(weights, tmp_path / "delta.safetensors", metadata={"softmoe": json.dumps(card)})
    for command in (("prune", "keep=1"), ("upcycle", "model/router=soft", "model.moe_blocks=last_1")):
        refused = softmoe(*command, "checkpoint=delta.safetensors")
        assert refused.code == 2 and "has adapters (lora), which softmoe" in refused.err, refused


@pytest.mark.thorough
def test_it_trains_further_with_other_images_and_keeps_its_base(softmoe: Softmoe, tmp_path: Path, base: Path) -> None:
    """A position table that was resampled goes into the delta, a frozen adapter of the source's stays in it."""
    first = finetuned(softmoe, tmp_path, f"checkpoint={base}", "adapter=bottleneck")
    second = finetuned(
        softmoe, tmp_path, f"checkpoint={first}", "model.image_size=16", "optim.freeze=[blocks.0.mlp_adapter.*]",
        root="second",
    )  # fmt: skip
    files = [last(run) / "model.safetensors" for run in (first, second)]
    old, new = map(load_file, files)
    assert card_of(files[0])["base"] == card_of(files[1])["base"]
    assert new.keys() - old.keys() == {"pos_embed"} and new["pos_embed"].shape[1] == 4 * 16
    still = {key for key in old if torch.equal(old[key], new[key])}
    assert still == {key for key in old if key.startswith("blocks.0.mlp_adapter.")}
    assert softmoe("evaluate", f"checkpoint={second}").code == 0
    refused = softmoe("finetune", *QUICK, f"checkpoint={second}", "adapter=lora")
    assert refused.code == 2 and "has adapters (bottleneck), and model.adapter.name=lora is not theirs" in refused.err
    refused = softmoe("finetune", *QUICK, f"checkpoint={second}", "adapter=none")
    assert refused.code == 2 and "model.adapter.name=none is not theirs" in refused.err
    refused = softmoe("finetune", *QUICK, f"checkpoint={base}", "adapter=bottleneck", f"base={base}")
    assert refused.code == 2 and "has no effect" in refused.err
    refused = softmoe("upcycle", f"checkpoint={second}", "model/router=soft", "model.moe_blocks=last_1")
    assert refused.code == 2 and "has adapters (bottleneck), which softmoe upcycle does not know" in refused.err
    refused = softmoe("prune", f"checkpoint={second}", "keep=1")
    assert refused.code == 2 and "has adapters (bottleneck), which softmoe prune does not know" in refused.err
    refused = softmoe("finetune", *QUICK, f"checkpoint={second}", "prune.keep=1")
    assert refused.code == 2 and "prune.keep=1 drops experts" in refused.err
    refused = softmoe("train", *QUICK, "adapter=bottleneck")
    assert refused.code == 2 and "adapter=bottleneck belongs to softmoe finetune" in refused.err


@pytest.mark.parametrize("name", ["soft_moa", pytest.param("lora", marks=pytest.mark.thorough)])
def test_a_stopped_run_goes_on_to_the_same_bits(name: str, softmoe: Softmoe, tmp_path: Path) -> None:
    """Adapters beside soft mixtures of experts."""
    base = saved(tmp_path / "soft.safetensors", 0)
    line = (f"checkpoint={base}", f"adapter={name}", "train.steps=6", "train.save_seconds=0", "train.eval_every=3",
            "train.ema=0.9", "augment.mixup=0.4")  # fmt: skip
    whole = finetuned(softmoe, tmp_path, *line, root="whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    stopped = next((tmp_path / "stopped" / "default").iterdir())
    (stopped / "result.json").unlink()
    shutil.rmtree(last(stopped))
    answer = softmoe("finetune", *QUICK, *line, "output_root=stopped")
    assert answer.code == 0 and "going on from step" in answer.out, answer
    same(whole, stopped)


@pytest.mark.thorough
def test_the_way_out_where_layers_are_to_change(softmoe: Softmoe, tmp_path: Path, base: Path) -> None:
    """What a refusal names works: LoRA is exported, other adapters come to what was made of their base."""
    upcycling = ("upcycle", "model/router=soft", "model.router.num_experts=2", "model.moe_blocks=last_1", "images=2")
    lora = finetuned(softmoe, tmp_path, f"checkpoint={base}", "adapter=lora", root="lora")
    refused = softmoe(*upcycling, f"checkpoint={lora}")
    assert refused.code == 2 and f"first softmoe export checkpoint={last(lora)}" in refused.err
    assert softmoe("export", f"checkpoint={lora}", "folder=whole").code == 0
    answer = softmoe(*upcycling, "checkpoint=whole", "folder=up")
    assert answer.code == 0, answer.err

    other = finetuned(softmoe, tmp_path, f"checkpoint={base}", "adapter=bottleneck", root="other")
    refused = softmoe(*upcycling, f"checkpoint={other}")
    assert refused.code == 2 and f"softmoe upcycle takes what they belong to, {base}, and" in refused.err
    assert softmoe(*upcycling, f"checkpoint={base}", "folder=mixture").code == 0
    finetuned(softmoe, tmp_path, "checkpoint=mixture", "adapter=bottleneck", root="beside")

    mixture = saved(tmp_path / "mixture.safetensors", 0, "model/router=tokens_choice_dropless")
    lora = finetuned(softmoe, tmp_path, f"checkpoint={mixture}", "adapter=lora", root="sparse")
    refused = softmoe("prune", f"checkpoint={lora}", "keep=2")
    assert refused.code == 2 and "first softmoe export" in refused.err
    assert softmoe("export", f"checkpoint={lora}", "folder=sparse_whole").code == 0
    answer = softmoe("prune", "checkpoint=sparse_whole", "keep=2", "folder=pruned")
    assert answer.code == 0, answer.err
    finetuned(softmoe, tmp_path, "checkpoint=pruned", "adapter=soft_moa", root="pruned_beside")


@pytest.mark.long
@pytest.mark.thorough
def test_five_kills_change_nothing(tmp_path: Path) -> None:
    """SIGKILL at random moments, some of them while a delta is being written."""
    base = saved(tmp_path / "soft.safetensors", 0)
    line = ["finetune", *QUICK, f"checkpoint={base}", "adapter=soft_moa", "model.adapter.location=both",
            "train.steps=600", "train.save_seconds=0", "train.eval_every=200", "train.ema=0.99",
            "augment.mixup=0.2"]  # fmt: skip
    ended(Started(tmp_path / "whole", line, {}))
    kill_five_times(lambda: Started(tmp_path / "killed", line, {}), tmp_path / "killed")
    ended(Started(tmp_path / "killed", line, {}))
    same(the_run(tmp_path / "whole"), the_run(tmp_path / "killed"))


@pytest.mark.thorough
@pytest.mark.parametrize("name", OPTIONS)
def test_an_exported_model_is_whole(name: str, softmoe: Softmoe, tmp_path: Path, base: Path) -> None:
    """LoRA's is the plain model again, within 1e-6 of what was trained; others have their adapters in it. And so are
    the programs."""
    run = finetuned(softmoe, tmp_path, f"checkpoint={base}", f"adapter={name}", "train.steps=4", "optim.lr=0.05")
    answer = softmoe("export", f"checkpoint={run}", "format=json", "folder=out", "formats=[torch_export,onnx]")
    assert answer.code == 0, answer.err
    receipt, weights = json.loads(answer.out), load_file(tmp_path / "out" / "model.safetensors")
    off = {program: each["max_difference"] for program, each in receipt["programs"].items()}
    assert off["timm"] <= 1e-6 * max(1, receipt["largest_output"])
    assert off.keys() == {"timm", "torch_export", "onnx"} and max(off.values()) < 1e-5
    card = card_of(tmp_path / "out" / "model.safetensors")
    assert "base" not in card and card["model"]["adapter"]["name"] == ("none" if name == "lora" else name)
    assert any("_adapter." in key for key in weights) == (name != "lora")
    if name == "lora":
        changed = {key for key, value in load_file(base).items() if not torch.equal(value, weights[key])}
        qkv = {f"blocks.{i}.attn.qkv.weight" for i in range(2)}
        assert changed == qkv | {"norm.weight", "norm.bias", "head.weight", "head.bias"}
        keys = weights["blocks.0.attn.qkv.weight"][16:32]
        assert torch.equal(keys, load_file(base)["blocks.0.attn.qkv.weight"][16:32])
    base.unlink()
    there = softmoe("evaluate", "checkpoint=out", "format=json")
    assert json.loads(there.out)["top1_pct"] == json.loads((run / "result.json").read_text())["top1_pct"]
    assert softmoe("finetune", *QUICK, "checkpoint=out").code == 0


@pytest.mark.thorough
def test_timms_weights_need_their_name_again(softmoe: Softmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only a file names is not fetched."""
    vit = timm.create_model("test_vit", pretrained=False)
    monkeypatch.setattr(timm, "create_model", _offline(timm.create_model, vit.state_dict()))
    arguments = ("checkpoint=timm:test_vit", "adapter=soft_moa", "model.image_size=32")
    run = finetuned(softmoe, tmp_path, *arguments)
    refused = softmoe("evaluate", f"checkpoint={run}")
    assert refused.code == 2 and "add base=timm:test_vit to have that read" in refused.err
    answer = softmoe("evaluate", f"checkpoint={run}", "base=timm:test_vit")
    assert answer.code == 0, answer.err


VITS = {
    "class token": ("vit_tiny_patch16_224", ""),
    "CLIP's norm before the blocks": ("vit_xsmall_patch16_clip_224", ""),
    "registers, LayerScale, mean of tokens": ("test_vit2", ""),
    "RMSNorm": ("test_vit4", ""),
    "DeiT's distillation token": ("deit_tiny_distilled_patch16_224", "VisionTransformerDistilled"),
    "pooling by attention": ("test_vit3", "AttentionPoolLatent"),
    "SwiGLU": ("aimv2_large_patch14_224", "SwiGLU"),
}


@pytest.mark.thorough
@pytest.mark.parametrize("family", VITS)
def test_timms_families(family: str, softmoe: Softmoe, tmp_path: Path) -> None:
    """From a file of random weights and timm's name: each adapter trains, and what it saves is read back."""
    name, refusal = VITS[family]
    words = ("checkpoint=timm.safetensors", f"model.backbone.timm={name}", "model.image_size=32")
    weights = timm.create_model(name, img_size=32).state_dict() if not refusal else {"none": torch.zeros(1)}
    save_file(weights, tmp_path / "timm.safetensors")
    for adapter in OPTIONS:
        if refusal:
            refused = softmoe("finetune", *QUICK, *words, f"adapter={adapter}")
            assert refused.code == 2 and f"timm's {name} " in refused.err and refusal in refused.err
            continue
        run = finetuned(softmoe, tmp_path, *words, f"adapter={adapter}", root=adapter)
        held = load_file(last(run) / "model.safetensors")
        assert not {key for key, value in held.items() if key in weights and torch.equal(value, weights[key])}
        told = softmoe("evaluate", f"checkpoint={run}", "format=json")
        assert json.loads(told.out)["loss"] == pytest.approx(json.loads((run / "result.json").read_text())["loss"])


def _offline(create: Any, weights: dict[str, torch.Tensor]) -> Any:
    """timm's create_model with these weights for pretrained ones."""

    def made(name: str, pretrained: bool = False, **arguments: Any) -> Any:
        model = create(name, pretrained=False, **arguments)
        if pretrained:
            model.load_state_dict(weights)
        return model

    return made


def test_the_recipe_is_the_official_one() -> None:
    """hparams/train.yaml and main.py of PETL_AST: lr 0.005, AdamW's betas, eps and decay; cosine without warmup."""
    optim = compose("recipe=finetune_adapter").optim
    assert (optim.name, optim.lr, optim.betas, optim.eps) == ("adamw", 0.005, [0.9, 0.98], 1e-6)
    assert (optim.weight_decay, optim.head_weight_decay, optim.clip_norm) == (0.1, 0.1, None)
    assert (optim.schedule, optim.warmup, optim.final_lr) == ("cosine", 0.0, 0.0)


EVERYWHERE = {
    "soft_moa": ("model.adapter.location=both", "model.adapter.normalised=true"), "dense_moa": (),
    "bottleneck": ("model.adapter.location=both", "model.adapter.insert=sequential"), "lora": (),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.thorough
@pytest.mark.parametrize("name", EVERYWHERE)
def test_two_processes_train_what_one_does(name: str, tmp_path: Path) -> None:
    """Adapters beside soft mixtures of experts, of which each process holds all, a part, or some experts whole; with
    averaged weights, in parts of a batch, and recomputed."""
    base = saved(tmp_path / "soft.safetensors", 0)
    line = ["finetune", *QUICK, f"checkpoint={base}", f"adapter={name}", *EVERYWHERE[name], "train.steps=4",
            "train.ema=0.9", "train.accumulate=2", "train.recompute=true"]  # fmt: skip

    def started(name: str, size: int, *more: str) -> list[Started]:
        folder = tmp_path / name
        return [
            Started(folder, [*line, *more], environment, f"{rank}.txt", "float64")
            for rank, environment in enumerate(torchrun(size))
        ]

    finish(started("alone", 1))
    for way in ("ddp", "fsdp", "expert"):
        finish(started(way, 2, f"parallel={way}"))
        alike(the_run(tmp_path / "alone"), the_run(tmp_path / way), 1e-10)
        held = load_file(last(the_run(tmp_path / way)) / "model.safetensors")
        assert any(map(is_adapters, held)) and not any(".experts.w1" in key for key in held if not is_adapters(key))
