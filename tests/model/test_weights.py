"""Weights go from a checkpoint into a model, or are refused; slots are resized."""

import math
from dataclasses import replace

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from softmoe_cli.errors import UsageError
from softmoe_cli.model.weights import LoadReport, load_weights, proportional_slots, resized_slots
from softmoe_cli.moe.layer import Experts, MoE
from softmoe_cli.moe.routers.soft import SoftRouter
from tests.model.models import make
from tests.oracles import compose


def load(vit: VisionTransformer, state: dict[str, Tensor], *allowed: str, keep_head: bool = True) -> LoadReport:
    return load_weights(vit, state, keep_head=keep_head, allow_unexpected=list(allowed))


def source(*overrides: str) -> dict[str, Tensor]:
    """Weights that no freshly built model has, the zero head's included."""
    vit = make("model=vit_nano2_soft", *overrides)
    torch.manual_seed(7)
    return {key: torch.randn_like(value) for key, value in vit.state_dict().items()}


def test_everything_is_loaded_with_the_head() -> None:
    vit, state = make("model=vit_nano2_soft"), source()
    report = load(vit, state)
    assert all(torch.equal(value, state[key]) for key, value in vit.state_dict().items())
    assert sorted(report.loaded) == sorted(state)
    assert (report.new, report.resized, report.unexpected) == ([], [], [])


@pytest.mark.parametrize("classes", [10, 3])
def test_head_is_left_new(classes: int) -> None:
    vit, state = make("model=vit_nano2_soft", num_classes=classes), source()
    report = load(vit, state, keep_head=False)
    for key, value in vit.state_dict().items():
        if not key.startswith("head."):
            assert torch.equal(value, state[key]), key
    assert (vit.head.weight == 0).all()
    assert sorted(report.new) == ["head.bias", "head.weight"]
    assert not any(key.startswith("head.") for key in report.loaded)


def test_kept_head_of_other_classes_is_refused() -> None:
    with pytest.raises(UsageError, match=r"another architecture: head\.weight is \(10, 64\) there and \(3, 64\)"):
        load(make("model=vit_nano2_soft", num_classes=3), source())


@pytest.mark.parametrize("prefix", [0, 1])
def test_positions_are_resampled_as_timm_does(prefix: int) -> None:
    token = f"model.backbone.class_token={'true' if prefix else 'false'}"
    vit, state = make("model.image_size=12", token), source("model.image_size=8", token)
    report = load(vit, state)
    want = resample_abs_pos_embed(state["pos_embed"], new_size=[6, 6], old_size=[4, 4], num_prefix_tokens=prefix)
    assert vit.pos_embed.shape == (1, 36 + prefix, 64)
    assert torch.equal(vit.pos_embed.detach(), want)
    assert torch.equal(vit.pos_embed[:, :prefix].detach(), state["pos_embed"][:, :prefix])
    assert report.resized == [f"pos_embed {16 + prefix} -> {36 + prefix} positions"]
    assert "pos_embed" not in report.loaded
    assert report.new == []


def test_positions_of_no_square_grid_are_refused() -> None:
    state = source() | {"pos_embed": torch.zeros(1, 17, 64)}
    with pytest.raises(UsageError, match=r"pos_embed is \(1, 17, 64\) there.*no square"):
        load(make("model=vit_nano2_soft"), state)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.backbone.mlp_width=128"], r"fc1\.weight is \(128, 64\) there and \(256, 64\) in the model"),
        (
            ["model=vit_nano2_soft", "model.router.num_experts=4"],
            r"router\.phi is \(64, 4, 1\) there and \(64, 16, 1\)",
        ),
        (["model.in_chans=3"], r"patch_embed\.proj\.weight is .*\(its patch size, width or model\.in_chans\)"),
        (["model.backbone.width=32"], "another architecture"),
    ],
)
def test_other_architectures_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=f"another architecture.*{message}|{message}"):
        load(make("model=vit_nano2_soft"), source(*overrides))


def test_missing_weights_are_refused_and_nothing_is_loaded() -> None:
    vit, state = make("model=vit_nano2_soft"), source("model.backbone.depth=3", "model.moe_blocks=[2]")
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    with pytest.raises(UsageError, match=r"another architecture: it lacks blocks\.3\..* and 13 more"):
        load(vit, state)
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())
    one = source()
    del one["blocks.0.norm1.weight"]
    with pytest.raises(UsageError, match=r"it lacks blocks\.0\.norm1\.weight$"):
        load(vit, one)


def test_a_missing_head_is_new() -> None:
    vit, state = make("model=vit_nano2_soft"), source()
    report = load(vit, {key: value for key, value in state.items() if not key.startswith("head.")})
    assert sorted(report.new) == ["head.bias", "head.weight"]


def test_half_a_head_is_refused() -> None:
    vit, state = make("model=vit_nano2_soft"), source()
    with pytest.raises(UsageError, match=r"it lacks head\.bias$"):
        load(vit, {key: value for key, value in state.items() if key != "head.bias"})


@pytest.mark.parametrize("allowed", [["extra.weight", "extra.bias"], ["extra.*"], ["*"], ["extra.w*", "*.bias"]])
def test_unexpected_weights_may_be_allowed(allowed: list[str]) -> None:
    vit, state = make("model=vit_nano2_soft"), source()
    more = state | {"extra.weight": torch.zeros(2), "extra.bias": torch.zeros(2)}
    report = load(vit, more, *allowed)
    assert sorted(report.unexpected) == ["extra.bias", "extra.weight"]
    assert torch.equal(vit.pos_embed.detach(), state["pos_embed"])


@pytest.mark.parametrize(("allowed", "count"), [([], 2), (["extra.weight"], 1), (["extra"], 2), (["*.weigh"], 2)])
def test_unexpected_weights_are_refused(allowed: list[str], count: int) -> None:
    more = source() | {"extra.weight": torch.zeros(2), "extra.bias": torch.zeros(2)}
    with pytest.raises(
        UsageError, match=rf"holds {count} unexpected weights: .*extra\.bias.*allow_unexpected=\['extra\."
    ):
        load(make("model=vit_nano2_soft"), more, *allowed)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["blocks.1.norm1.bias", "head.weight"])
def test_weights_that_are_not_finite_are_refused(value: float, key: str) -> None:
    state = source()
    state[key].view(-1)[0] = value
    with pytest.raises(UsageError, match=rf"{key} in the checkpoint holds values that are not finite"):
        load(make("model=vit_nano2_soft"), state)


def test_experts_of_a_checkpoint_do_not_load_into_a_dense_model() -> None:
    with pytest.raises(UsageError, match=r"it lacks blocks\.2\.mlp\.fc1"):
        load(make("model=vit_nano2_dense"), source())
    assert isinstance(make("model=vit_nano2_soft").blocks[2].mlp.experts, Experts)


def test_more_slots_that_are_copies_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without their noise: each expert's slots are as many times there, so that its share of every token stays."""
    torch.manual_seed(0)
    few, many = (
        SoftRouter(8, 5, num_experts=3, slots_per_expert=p, capacity_factor=None, noise_std=0.0).double()
        for p in (2, 6)
    )
    experts = Experts(3, 8, 4, gelu="tanh", identical=False).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        monkeypatch.setattr("softmoe_cli.model.weights.SLOT_NOISE", 0.0)
        many.phi.copy_(resized_slots(few.phi, 2, 6))
        many.scale.copy_(few.scale.fill_(20.0))
        assert (MoE(many, experts)(x) - MoE(few, experts)(x)).abs().max() < 1e-12


def test_slots_are_the_nearest_old_ones_and_copies_differ_a_little() -> None:
    torch.manual_seed(0)
    phi = torch.randn(200, 4, 3)
    assert torch.equal(resized_slots(phi, 2, 3), phi)
    assert torch.equal(resized_slots(phi, 2, 2), phi[:, :, [0, 1]])
    more = resized_slots(phi, 2, 7)  # floor(3 j / 7) = 0 0 0 1 1 2 2
    assert torch.equal(more[:, :, [0, 3, 5]], phi)
    change = more - phi[:, :, [0, 0, 0, 1, 1, 2, 2]]
    copies = change[:, :, [1, 2, 4, 6]]
    assert copies.std().item() == pytest.approx(0.1, rel=0.1)


def test_slots_are_resized_only_when_asked() -> None:
    state = source()
    vit = make("model=vit_nano2_soft", "model.router.slots_per_expert=3")
    with pytest.raises(UsageError, match=r"router\.phi is \(64, 16, 1\) there"):
        load(vit, state)
    report = load_weights(vit, state, keep_head=True, allow_unexpected=[], resize_slots=True)
    assert report.resized == [f"blocks.{i}.mlp.router.phi 1 -> 3 slots per expert" for i in (2, 3)]
    assert torch.equal(vit.blocks[2].mlp.router.phi[:, :, 0].detach(), state["blocks.2.mlp.router.phi"][:, :, 0])
    same = make("model=vit_nano2_soft")
    report = load_weights(same, state, keep_head=True, allow_unexpected=[], resize_slots=True)
    assert not report.resized and report.loaded == list(state), "as many slots as before are loaded as they are"


def test_proportional_slots() -> None:
    """16 tokens at 8 pixels and patches of 2; rounded: 3 * 36 / 16 = 6.75 and 3 * 4 / 16 = 0.75; at least one."""
    model = compose("model=vit_nano2_soft", "model.router.slots_per_expert=3").model
    sizes = {8: 3, 12: 7, 16: 12, 4: 1, 2: 1}
    assert {size: proportional_slots(model, replace(model, image_size=size)) for size in sizes} == sizes
    of_tasks = replace(model, tasks={"digits": 10, "letters": 26})
    assert proportional_slots(of_tasks, replace(of_tasks, image_size=16)) == 12
    other = compose("model/router=dense").model
    for before, after in ((other, other), (model, other), (other, model)):
        with pytest.raises(UsageError, match=r"slots=proportional: the checkpoint's router is (soft|dense) and the"):
            proportional_slots(before, after)
