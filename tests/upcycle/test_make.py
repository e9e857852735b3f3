"""Upcycling: experts as slow loops make them, functions that are preserved and those that are not, receipts, timm."""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.layers import Mlp
from torch import Tensor, nn

from softmoe_cli.data import sets
from softmoe_cli.model.pretrained import read_checkpoint
from softmoe_cli.model.router import make_layer
from softmoe_cli.model.vit import build
from softmoe_cli.moe.layer import Experts, MoE
from softmoe_cli.moe.routers.zero_computation import ZeroComputationRouter
from softmoe_cli.moe.routing import Carried
from softmoe_cli.run.card import CARD_FORMAT
from softmoe_cli.run.checkpoint import digest_of
from softmoe_cli.run.sealed import damage
from softmoe_cli.terminal import Screen
from softmoe_cli.train.loop import train
from softmoe_cli.train.setup import begin
from softmoe_cli.upcycle.make import fill_experts, redraw_units, tie_parts
from tests.conftest import Softmoe, thinned
from tests.mixes import mix, write_clothes
from tests.oracles import compose
from tests.routers import ROUTERS

DIM, HIDDEN, TOKENS, IMAGES = 6, 8, 5, 4
QUIET = {"importance_weight": 0.0, "load_weight": 0.0, "noise_std": 0.0}


@pytest.fixture(scope="module")
def mlp() -> Mlp:
    torch.manual_seed(0)
    dense = Mlp(DIM, HIDDEN).double()
    for parameter in dense.parameters():
        nn.init.normal_(parameter)
    return dense


def layer(mlp: Mlp, name: str, parts: int = 1, tokens: int = TOKENS, **changes: Any) -> MoE:
    """A layer in evaluation mode, made from `mlp`."""
    torch.manual_seed(1)
    options = ROUTERS[name] | {"num_experts": 4}
    options |= {key: value for key, value in (QUIET | changes).items() if key in options}
    moe = make_layer(options, DIM, HIDDEN // parts, tokens, gelu="none", identical=True).double()
    assert isinstance(moe, MoE)
    with torch.no_grad():
        assert fill_experts(moe, mlp) == parts
        tie_parts(moe.router, parts)
    return moe.eval()


def tokens(n: int = TOKENS) -> Tensor:
    return torch.randn(IMAGES, n, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_experts_as_slow_loops_make_them(mlp: Mlp) -> None:
    """Two parts and one shared copy, each of which counts a half: every number is computed by hand."""
    g, width, copies = 2, HIDDEN // 2, 2
    moe = layer(mlp, "tokens_choice", parts=g, shared_experts=2)
    for expert in range(4):
        for unit in range(width):
            there = (expert % g) * width + unit
            assert moe.experts.b1[expert, unit] == mlp.fc1.bias[there]
            for d in range(DIM):
                assert moe.experts.w1[expert, d, unit] == mlp.fc1.weight[there, d]
                assert moe.experts.w2[expert, unit, d] == g * mlp.fc2.weight[d, there] / copies
        assert all(moe.experts.b2[expert, d] == mlp.fc2.bias[d] / copies for d in range(DIM))
    assert moe.shared is not None
    for unit in range(HIDDEN):
        assert moe.shared.b1[0, unit] == mlp.fc1.bias[unit]
        for d in range(DIM):
            assert moe.shared.w1[0, d, unit] == mlp.fc1.weight[unit, d]
            assert moe.shared.w2[0, unit, d] == mlp.fc2.weight[d, unit] / copies
    assert all(moe.shared.b2[0, d] == mlp.fc2.bias[d] / copies for d in range(DIM))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_weighed_alike_sum_to_the_mlp(mlp: Mlp, parts: int) -> None:
    x = tokens().flatten(0, 1)
    outputs = layer(mlp, "soft", parts=parts).experts(x.expand(4, -1, -1))
    assert (outputs.mean(dim=0) - mlp(x)).abs().max() < 1e-12


ROOM = {"slots_per_expert": TOKENS, "capacity_factor": None}
PRESERVING: dict[str, tuple[str, int, dict[str, Any]]] = {
    "tokens choice": ("tokens_choice", 1, {"k": 2, "renormalise": True, **ROOM}),
    "sigmoid gates": ("tokens_choice", 1, {"k": 3, "gate": "sigmoid", "renormalise": True, **ROOM}),
    "all experts": ("tokens_choice", 1, {"k": 4, **ROOM}),
    "groups of two images": (
        "tokens_choice", 1, {"k": 2, "renormalise": True, "images_per_group": 2, **ROOM, "slots_per_expert": 10}
    ),
    "in parts": ("tokens_choice", 2, {"k": 2, "renormalise": True, **ROOM}),
    "with shared experts": ("tokens_choice", 1, {"k": 2, "renormalise": True, "shared_experts": 3, **ROOM}),
    "surest first": ("tokens_choice_bpr", 1, {"k": 2, "renormalise": True, **ROOM}),
    "dropless": ("tokens_choice_dropless", 1, {"k": 2, "renormalise": True}),
    "dropless in parts, shared": (
        "tokens_choice_dropless", 2, {"k": 2, "gate": "sigmoid", "renormalise": True, "shared_experts": 2}
    ),
    "experts choice with room for all": ("experts_choice", 1, ROOM),
    "experts choice in parts": ("experts_choice", 2, ROOM),
    "experts choice, gates add up to one": ("experts_choice", 1, {"renormalise": True, **ROOM}),
    "identity": ("identity", 1, {}),
    "given experts in parts": ("static_tasks", 2, {"num_tasks": 1, "k": 2, "assigned": [[1, 2]]}),
    "a zero expert": ("zero_computation", 1, {"num_copy": 0, "num_constant": 0}),
    "no free experts": ("zero_computation", 2, {"num_zero": 0, "num_copy": 0, "num_constant": 0, "tau": 1.0}),
}  # fmt: skip
OTHER: dict[str, tuple[str, int, dict[str, Any], str]] = {
    "gates as they are": ("tokens_choice", 1, {"k": 2, **ROOM}, "do not add up to one"),
    "sigmoid, all experts": ("tokens_choice", 1, {"k": 4, "gate": "sigmoid", **ROOM}, "do not add up to one"),
    "overflow": ("tokens_choice", 1, {"k": 2, "renormalise": True}, "set model.router.slots_per_expert=5"),
    "half a copy": ("tokens_choice", 4, {"k": 2, "renormalise": True, **ROOM}, "a multiple"),
    "dropless": ("tokens_choice_dropless", 1, {"k": 2}, "do not add up to one"),
    "experts choice": ("experts_choice", 1, {}, "set model.router.slots_per_expert=5"),
    "experts choice, gates add up to one": (
        "experts_choice",
        1,
        {"renormalise": True},
        "a token that no expert takes gets nothing",
    ),
    "identity in parts": ("identity", 2, {}, "one part of the MLP only"),
    "a part twice": (
        "static_tasks",
        2,
        {"num_tasks": 1, "k": 2, "assigned": [[0, 2]]},
        "experts 0, 2 of a task do not hold whole",
    ),
    "copies": ("zero_computation", 1, {}, "copy and constant experts are no copies of the MLP"),
    "the paper's gates": (
        "zero_computation",
        1,
        {"num_copy": 0, "num_constant": 0, "gates": "softmax"},
        "do not add up to one",
    ),
    "a zero expert that keeps its gate": (
        "zero_computation",
        1,
        {"num_copy": 0, "num_constant": 0, "gates": "top2_softmax"},
        "keeps its gate",
    ),
    "two zero experts": (
        "zero_computation",
        1,
        {"num_copy": 0, "num_constant": 0, "num_zero": 2},
        "can be zero experts",
    ),
    "half a copy beside zero": ("zero_computation", 2, {"num_copy": 0, "num_constant": 0}, "whole copies of 2 parts"),
    "soft": ("soft", 1, {}, "mixtures of 5 tokens"),
    "uniform": ("uniform", 1, {}, "mixtures of 5 tokens"),
}


def test_parts_are_tied_in_what_a_layer_takes_of_an_earlier_one() -> None:
    bare = {"num_constant": 0, "num_copy": 0, "num_zero": 0, "tau": 1.0}
    options = ROUTERS["zero_computation"] | {"num_experts": 4, **bare}
    made = make_layer(options, 6, 8, TOKENS, gelu="none", identical=True)
    assert isinstance(made, MoE) and isinstance(made.router, ZeroComputationRouter)
    made.router.follow(made.router)
    with torch.no_grad():
        tie_parts(made.router, 2)
    logits = made.router.scores(torch.randn(2, TOKENS, 6), Carried(torch.randn(2, TOKENS, 4)))
    assert torch.equal(logits[..., ::2], logits[..., 1::2]) and not torch.equal(logits[..., 0], logits[..., 2])


@pytest.mark.parametrize("name", PRESERVING)
def test_function_is_preserved(mlp: Mlp, name: str) -> None:
    router, parts, options = PRESERVING[name]
    moe, x = layer(mlp, router, parts, **options), tokens()
    assert moe.router.departs_from_mlp(TOKENS, parts) is None
    assert (moe(x) - mlp(x)).abs().max() < 1e-12


@pytest.mark.parametrize("name", OTHER)
def test_function_is_not_preserved(mlp: Mlp, name: str) -> None:
    router, parts, options, words = OTHER[name]
    moe, x = layer(mlp, router, parts, **options), tokens()
    assert words in str(moe.router.departs_from_mlp(TOKENS, parts))
    assert (moe(x) - mlp(x)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["soft", "soft_uniform", "uniform_soft", "uniform"])
@pytest.mark.parametrize("parts", [1, 2])
def test_mixtures_of_a_single_token_are_that_token(mlp: Mlp, name: str, parts: int) -> None:
    moe, x = layer(mlp, name, parts, tokens=1), tokens(1)
    assert moe.router.departs_from_mlp(1, parts) is None
    assert (moe(x) - mlp(x)).abs().max() < 1e-12


def test_soft_experts_in_parts_are_soft_experts_whole(mlp: Mlp) -> None:
    """Virtual groups: the parts of a copy share their slot, so four halves are two experts."""
    parts, whole, x = layer(mlp, "soft", 2), layer(mlp, "soft", 1, num_experts=2), tokens()
    with torch.no_grad():
        whole.router.get_parameter("phi").copy_(parts.router.get_parameter("phi")[:, ::2])
    assert (parts(x) - whole(x)).abs().max() < 1e-12


def test_redrawn_units_are_new_and_others_are_not(mlp: Mlp) -> None:
    moe = layer(mlp, "soft", num_experts=4)
    before = copy.deepcopy(moe.experts)
    with torch.no_grad():
        redraw_units(moe.experts, 0.5)
    for e in range(4):
        moved = (moe.experts.w1[e] != before.w1[e]).all(dim=0)
        assert moved.sum() == HIDDEN // 2
        assert torch.equal(moved, (moe.experts.w1[e] != before.w1[e]).any(dim=0))
        assert torch.equal(moved, moe.experts.b1[e] != before.b1[e])
        assert torch.equal(moved, (moe.experts.w2[e] != before.w2[e]).all(dim=1))
    assert not torch.equal(moe.experts.w1[0], moe.experts.w1[1])
    assert torch.equal(moe.experts.b2, before.b2)


def test_redrawn_units_have_the_statistics_of_what_they_replace() -> None:
    torch.manual_seed(0)
    experts = Experts(1, 200, 400, gelu="none", identical=True)
    with torch.no_grad():
        experts.w1.normal_(mean=0.7, std=0.2)
        redraw_units(experts, 1.0)
    assert experts.w1.mean().item() == pytest.approx(0.7, abs=0.01)
    assert experts.w1.std().item() == pytest.approx(0.2, rel=0.02)


# --- the command ------------------------------------------------------------------------------------------------------

TINY = (
    "model=vit_nano2_dense", "model.backbone.width=16", "model.backbone.depth=2", "model.backbone.heads=2",
    "model.backbone.mlp_width=32",
)  # fmt: skip
BLOCKS = ("model.moe_blocks=last_1",)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model's weights, as one of our runs would save them."""
    config = compose(*TINY)
    torch.manual_seed(0)
    vit = build(config.model, 10)
    nn.init.normal_(vit.head.weight)
    card = {
        "format": CARD_FORMAT,
        "model": asdict(config.model),
        "data": asdict(config.data),
        "classes": sets.load(config.data).classes,
    }
    card |= {"loss": "softmax", "precision": "fp32"}
    path = tmp_path_factory.mktemp("dense") / "dense.safetensors"
    save_file(vit.state_dict(), path, metadata={"softmoe": json.dumps(card)})
    return path


@pytest.mark.parametrize("name", thinned([name for name in ROUTERS if not name.startswith("mumoe_")], 4))
def test_every_router(name: str, source: Path, softmoe: Softmoe) -> None:
    noise = ["expert_noise=0.1"] if name.startswith(("uniform", "static")) else []
    noise += ["model.router.num_tasks=1"] if "num_tasks" in ROUTERS[name] else []
    answer = softmoe(
        "upcycle", f"checkpoint={source}", f"model/router={name}", *BLOCKS, *noise, "folder=up", "images=8"
    )
    assert answer.code == 0, answer
    up, receipt = Path("up"), json.loads(Path("up/receipt.json").read_text())
    weights = load_file(up / "model.safetensors")
    with safe_open(up / "model.safetensors", framework="pt") as file:
        card = json.loads(file.metadata()["softmoe"])
    assert damage(up, files=("model.safetensors", "receipt.json")) is None
    assert card["receipt"] == receipt
    assert receipt["keys"].keys() == weights.keys()
    assert receipt["result"]["digest"] == digest_of(weights)
    old = load_file(source)
    for key, fate in receipt["keys"].items():
        if fate["how"] == "copied":
            assert torch.equal(weights[key], old[key])
        assert fate["from"] is None or fate["from"] in old
    assert {fate["from"] for fate in receipt["keys"].values()} - {None} == old.keys()
    assert receipt["cost"]["after"]["params"] == sum(
        value.numel() for key, value in weights.items() if not key.endswith(".shares")
    )
    told = softmoe("evaluate", "checkpoint=up", "format=json", "split=validation")
    assert told.code == 0, told


@pytest.mark.thorough
def test_a_preserving_start_goes_on(source: Path, softmoe: Softmoe, tmp_path: Path) -> None:
    """Nothing changes but the cost; the result is evaluated like its source, and finetuned with its head."""
    line = (
        "upcycle", f"checkpoint={source}", "model/router=tokens_choice_dropless", "model.router.k=2",
        "model.router.renormalise=true", "model.moe_blocks=every_1", "folder=up", "preserve=true",
    )  # fmt: skip
    assert softmoe(*line).code == 0
    receipt = json.loads((tmp_path / "up/receipt.json").read_text())
    assert receipt["max_change"] < 1e-12 and receipt["precision"] == "float64"
    assert receipt["loss_after"] == pytest.approx(receipt["loss_before"], abs=1e-6)
    rows = [json.loads(softmoe("evaluate", f"checkpoint={c}", "format=json").out) for c in (source, "up")]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)
    assert rows[0]["top1_pct"] == rows[1]["top1_pct"]
    tune = ("finetune", "checkpoint=up", "train.steps=2", "train.eval_every=1.0", "tracking=off")
    answer = softmoe(*tune)
    assert answer.code == 0, answer
    assert "resized none new none unexpected none" in " ".join(answer.out.split())
    assert "is finished; nothing to do" in softmoe(*tune).out
    again = softmoe(*line)
    assert again.code == 0 and "holds this already" in again.out
    other = softmoe(*line, "seed=1")
    assert other.code == 2 and "folder=up exists, and what exists is not overwritten" in other.err


@pytest.mark.thorough
@pytest.mark.parametrize("copies", [3, 7])
def test_thirds_and_sevenths_of_weights_are_preserving(
    copies: int, source: Path, softmoe: Softmoe, tmp_path: Path
) -> None:
    """Weights as large as trained ones are rounded to float32 when they are divided: outputs change by that."""
    torch.manual_seed(0)
    weights = {key: value + 0.2 * torch.randn_like(value) for key, value in load_file(source).items()}
    card = {"softmoe": json.dumps(read_checkpoint(str(source)).card)}
    save_file(weights, tmp_path / "large.safetensors", metadata=card)
    words = ("model/router=tokens_choice_dropless", "model.router.k=2", "model.router.renormalise=true",
             f"model.router.shared_experts={copies - 1}", "preserve=true", "folder=up")  # fmt: skip
    answer = softmoe("upcycle", "checkpoint=large.safetensors", *BLOCKS, *words)
    assert answer.code == 0, answer.err
    receipt = json.loads((tmp_path / "up/receipt.json").read_text())
    assert 1e-9 < receipt["max_change"] < 1e-7 * receipt["mean_size"]


def test_same_inputs_give_same_bytes_and_a_seed_others(source: Path, softmoe: Softmoe, tmp_path: Path) -> None:
    line = (
        "upcycle", f"checkpoint={source}", "model/router=soft", *BLOCKS, "expert_noise=0.5", "expert_redraw=0.25",
        "model.expert_width=16",
    )  # fmt: skip
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert softmoe(*line, f"folder={folder}", f"seed={seed}").code == 0
    for file in ("model.safetensors", "receipt.json", "SHA256SUMS"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in "ac")
    for name in ("experts.w1", "experts.w2", "router.phi"):
        assert not torch.equal(one[f"blocks.1.mlp.{name}"], two[f"blocks.1.mlp.{name}"])
    assert torch.equal(one["blocks.0.mlp.fc1.weight"], two["blocks.0.mlp.fc1.weight"])
    assert one["blocks.1.mlp.experts.w1"].shape == (8, 16, 16)
    assert softmoe("evaluate", "checkpoint=a").code == 0
    receipt = json.loads((tmp_path / "a/receipt.json").read_text())
    how = "4 copies, in 2 parts, noise 0.5, 0.25 of the units redrawn, transposed, times 2"
    assert receipt["keys"]["blocks.1.mlp.experts.w2"] == {"from": "blocks.1.mlp.fc2.weight", "how": how}


def test_noise_is_relative(source: Path, softmoe: Softmoe, tmp_path: Path) -> None:
    line = ("upcycle", f"checkpoint={source}", "model/router=soft", "model.router.num_experts=64", *BLOCKS)
    assert softmoe(*line, "expert_noise=0.5", "folder=up").code == 0
    old, new = load_file(source), load_file(tmp_path / "up/model.safetensors")
    dense = old["blocks.1.mlp.fc1.weight"].T
    spread = (new["blocks.1.mlp.experts.w1"] - dense).std().item()
    assert spread == pytest.approx(0.5 * dense.std().item(), rel=0.05)


def test_a_named_point_and_other_images(source: Path, softmoe: Softmoe, tmp_path: Path) -> None:
    """A named point whose backbone agrees, and images of other classes: the head is new, the features are compared."""
    point = [word for word in TINY if word.startswith("model.")]
    answer = softmoe(
        "upcycle", f"checkpoint={source}", "model=vit_nano2_soft", *point, *BLOCKS, "data.num_classes=12", "folder=up"
    )
    assert answer.code == 0, answer
    receipt = json.loads((tmp_path / "up/receipt.json").read_text())
    assert receipt["outputs"] == "features" and receipt["loss_before"] is None
    assert receipt["keys"]["head.weight"] == {"from": None, "how": "new"}


@pytest.mark.thorough
def test_a_model_of_several_sets_goes_on_with_one(softmoe: Softmoe, tmp_path: Path) -> None:
    """What only a mix has is nothing of the set that is named."""
    config = compose(*mix(write_clothes(tmp_path / "sets/clothes")), "model/router=dense")
    card = {"format": CARD_FORMAT, "model": asdict(config.model), "data": config.data.on_card(), "loss": "softmax"}
    card |= {"classes": sets.load(config.data).classes, "precision": "fp32"}
    save_file(build(config.model, 20).state_dict(), "mix.safetensors", metadata={"softmoe": json.dumps(card)})
    line = ("upcycle", "checkpoint=mix.safetensors", "model/router=identity", *BLOCKS, "images=8")
    for words, outputs in ((("data=digits", "folder=one"), "features"), (("folder=both",), "logits")):
        answer = softmoe(*line, *words)
        assert answer.code == 0, answer
        receipt = tmp_path / words[-1].removeprefix("folder=") / "receipt.json"
        assert json.loads(receipt.read_text())["outputs"] == outputs


WRONG = {
    "without a checkpoint": ("model/router=soft", "needs checkpoint="),
    "no such file": ("checkpoint=nowhere model/router=soft", "does not exist"),
    "without a router": ("checkpoint=SOURCE", "needs a router"),
    "dense": ("checkpoint=SOURCE model/router=dense", "needs a router"),
    "without blocks": ("checkpoint=SOURCE model/router=soft", "model.moe_blocks=[]"),
    "another backbone": ("checkpoint=SOURCE model=vit_nano2_soft", "has width=64, but"),
    "a key of it": ("checkpoint=SOURCE model/router=soft model.backbone.gelu=erf", "has gelu=erf, but"),
    "expert_init": ("checkpoint=SOURCE model/router=soft model.expert_init=independent", "has no effect here"),
    "uniform": ("checkpoint=SOURCE model/router=uniform model.moe_blocks=[1]", "stay equal; set expert_noise"),
    "width": ("checkpoint=SOURCE model/router=soft model.moe_blocks=[1] model.expert_width=5", "does not divide"),
    "parts": (
        "checkpoint=SOURCE model/router=soft model.moe_blocks=[1] model.expert_width=8 model.router.num_experts=6",
        "cuts an MLP into 4 parts",
    ),
    "soft cannot preserve": (
        "checkpoint=SOURCE model/router=soft model.moe_blocks=[1] preserve=true", "mixtures of 16 tokens"
    ),
    "noise cannot preserve": (
        "checkpoint=SOURCE model/router=identity model.moe_blocks=[1] preserve=true expert_noise=0.1", "set both to 0"
    ),
    "groups": (
        "checkpoint=SOURCE model/router=tokens_choice model.moe_blocks=[1] model.router.images_per_group=3",
        "images=64 is not a multiple",
    ),
    "a key": ("checkpoint=SOURCE model/router=soft expert_nose=1", "Did you mean 'expert_noise'?"),
    "timm offline": ("checkpoint=timm:test_vit model/router=soft model.moe_blocks=[1] data=digits", "could not fetch"),
}  # fmt: skip


@pytest.mark.parametrize("name", thinned(WRONG, 8))
def test_wrong_line(name: str, source: Path, softmoe: Softmoe, tmp_path: Path) -> None:
    line, words = WRONG[name]
    answer = softmoe("upcycle", *line.replace("SOURCE", str(source)).split())
    assert answer.code == 2, answer
    assert words in answer.err
    assert list(tmp_path.iterdir()) == [], "nothing may be written"


def test_what_has_a_router_is_refused(source: Path, softmoe: Softmoe) -> None:
    line = ("upcycle", "model/router=soft", *BLOCKS)
    assert softmoe(*line, f"checkpoint={source}", "folder=up").code == 0
    assert "has a router already" in softmoe(*line, "checkpoint=up").err


# --- timm -------------------------------------------------------------------------------------------------------------

ARCHITECTURES = {
    "plain": ("vit_tiny_patch16_224", 32, ""),
    "CLIP's norm before the blocks": ("vit_xsmall_patch16_clip_224", 32, ""),
    "DeiT's distillation token": ("deit_tiny_distilled_patch16_224", 32, "VisionTransformerDistilled"),
    "registers and LayerScale": ("test_vit2", 32, ""),
    "SwiGLU": ("vit_giant_patch14_dinov2", 28, "vit_giant_patch14_dinov2 has GluMlp; softmoe knows ViTs with plain"),
    "another GELU": ("vit_base_patch32_clip_quickgelu_224", 32, "Mlp blocks with QuickGELU; experts replace"),
}


@pytest.mark.parametrize("architecture", thinned(ARCHITECTURES, 1))
def test_timm(architecture: str, softmoe: Softmoe, tmp_path: Path) -> None:
    """From a file of random weights and timm's name: a function-preserving checkpoint that can be read back, or a
    sentence, said before a giant is allocated."""
    name, size, refusal = ARCHITECTURES[architecture]
    state = {} if refusal else timm.create_model(name, img_size=size).state_dict()
    save_file(state or {"none": torch.zeros(1)}, "timm.safetensors")
    answer = softmoe(
        "upcycle", "checkpoint=timm.safetensors", f"model.backbone.timm={name}", f"model.image_size={size}",
        "data=digits", "model/router=tokens_choice_dropless", "model.router.k=2", "model.router.num_experts=2",
        "model.router.renormalise=true", "model.moe_blocks=last_1", "images=2", "preserve=true", "folder=up",
    )  # fmt: skip
    if refusal:
        assert answer.code == 2 and refusal in answer.err, answer
        assert not (tmp_path / "up").exists()
        return
    assert answer.code == 0, answer
    receipt = json.loads((tmp_path / "up/receipt.json").read_text())
    assert receipt["outputs"] == "features" and receipt["max_change"] < 1e-12
    new = {key for key, fate in receipt["keys"].items() if fate["from"] is None}
    assert len(new) == 3 and all(key.startswith("head.") or key.endswith("mlp.router.gate.kernel") for key in new)
    weights = load_file(tmp_path / "up/model.safetensors")
    assert all(torch.equal(weights[key], state[key]) for key in state.keys() & weights.keys() - new)
    assert state.keys() - weights.keys() == {key for key in state if ".mlp." in key and key not in weights}
    told = softmoe("evaluate", "checkpoint=up", "split=validation", "format=json")
    assert told.code == 0, told


# --- moments ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run's checkpoint, with moments."""
    folder = tmp_path_factory.mktemp("trained")
    config = compose(*TINY, "tracking=off", f"output_root={folder}", "train.steps=20")
    with begin(config, "train", None, Screen()) as begun:
        train(begun)
    return next(folder.glob("*/*/checkpoints/last-*"))


def moments_of(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(folder / "training.safetensors")
    return {key: value for key, value in tensors.items() if key.startswith("optimizer.")}


def test_moments_of_experts_as_slow_loops_make_them(trained: Path, softmoe: Softmoe) -> None:
    """Halves of an MLP and a shared copy: every expert has the moments of the units that it was made from."""
    answer = softmoe(
        "upcycle", f"checkpoint={trained}", "model/router=tokens_choice", "model.router.num_experts=4", *BLOCKS,
        "model.router.shared_experts=4", "model.expert_width=16", "folder=up",
    )  # fmt: skip
    assert answer.code == 0, answer
    assert "moments of 39 tensors after 20 steps carried; blocks.*.mlp.router.gate.kernel start at zero" in answer.out
    old, new = moments_of(trained), moments_of(Path("up"))
    for kind in ("exp_avg", "exp_avg_sq"):
        dense, experts, shared = (
            {key.split(".")[-2]: value for key, value in tensors.items() if place in key and key.endswith(f".{kind}")}
            for tensors, place in ((old, "blocks.1.mlp.fc"), (new, ".experts."), (new, ".shared."))
        )
        w1, b1, w2, b2 = (old[f"optimizer.blocks.1.mlp.{name}.{kind}"] for name in
                          ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"))  # fmt: skip
        assert w1.any() and dense
        for expert in range(4):
            for unit in range(16):
                there = (expert % 2) * 16 + unit
                assert experts["b1"][expert, unit] == b1[there]
                assert torch.equal(experts["w1"][expert, :, unit], w1[there])
                assert torch.equal(experts["w2"][expert, unit], w2[:, there])
            assert torch.equal(experts["b2"][expert], b2)
        for unit in range(64):
            assert shared["b1"][0, unit] == b1[unit % 32]
            assert torch.equal(shared["w1"][0, :, unit], w1[unit % 32])
            assert torch.equal(shared["w2"][0, unit], w2[:, unit % 32])
        assert torch.equal(shared["b2"][0], b2)
    others = {key for key in old if ".1.mlp." not in key}
    assert others == {key for key in new if ".1.mlp." not in key}
    assert all(torch.equal(old[key], new[key]) for key in others)
    assert {value.item() for key, value in new.items() if key.endswith(".step")} == {20.0}


@pytest.mark.thorough
def test_a_finetuning_starts_from_carried_moments(trained: Path, softmoe: Softmoe, tmp_path: Path) -> None:
    """One step with them and one without, on the same gradients: the moments differ by what the old ones decayed to."""
    line = ("upcycle", f"checkpoint={trained}", "model/router=soft", *BLOCKS, "model.router.num_experts=4")
    assert softmoe(*line, "folder=with").code == 0
    without = softmoe(*line, "folder=without", "carry_optimizer=false")
    assert without.code == 0 and "optimizer        starts afresh" in without.out
    assert not (tmp_path / "without/training.safetensors").exists()
    tune = ("finetune", "tracking=off", "train.steps=1", "train.eval_every=1.0", "optim.warmup=0")
    lasts = {}
    for name in ("with", "without"):
        answer = softmoe(*tune, f"checkpoint={name}", f"study={name}")
        assert answer.code == 0, answer
        told = "goes on: moments of 35 tensors after 20 steps; blocks.*.mlp.router.phi, blocks.*.mlp.router.scale"
        assert (told in answer.out) == (name == "with")
        lasts[name] = moments_of(next(tmp_path.glob(f"outputs/{name}/*/checkpoints/last-*")))
    carried = moments_of(tmp_path / "with")
    assert lasts["with"].keys() == lasts["without"].keys() > carried.keys()
    for key, fresh in lasts["without"].items():
        kind = key.rpartition(".")[2]
        decay = {"exp_avg": 0.9, "exp_avg_sq": 0.999, "step": 1.0}[kind]
        old = carried.get(key, torch.zeros_like(fresh))
        torch.testing.assert_close(lasts["with"][key], fresh + decay * old, rtol=1e-5, atol=1e-9)
    other = softmoe(*tune, "checkpoint=with", "optim.name=sgd", "optim.momentum=0.9", "study=sgd")
    assert other.code == 0 and "starts afresh: the checkpoint's moments are AdamW's in fp32, not sgd's" in other.out
    (tmp_path / "alone.safetensors").write_bytes((tmp_path / "with/model.safetensors").read_bytes())
    lost = softmoe(*tune, "checkpoint=alone.safetensors", "study=alone")
    assert lost.code == 2 and "upcycle with carry_optimizer=false" in lost.err


def test_units_that_are_drawn_again_have_no_moments(trained: Path, softmoe: Softmoe) -> None:
    line = ("upcycle", f"checkpoint={trained}", "model/router=soft", *BLOCKS, "model.router.num_experts=4")
    answer = softmoe(*line, "expert_redraw=0.5", "folder=up")
    assert answer.code == 0, answer
    kept = {key.split(".")[5] for key in moments_of(Path("up")) if ".experts." in key}
    assert kept == {"b2"}
