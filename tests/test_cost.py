"""Costs against torch's own counter, published figures, and what memory must do."""

import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from softmoe_cli.config import Model, UsageError
from softmoe_cli.cost import Cost, account, forward_flop
from softmoe_cli.models import build, count_tokens
from softmoe_cli.moe.layer import MoE
from softmoe_cli.moe.routers.soft import SoftRouter
from tests.oracles import compose

MODELS = sorted(path.stem for path in (Path(__file__).parent.parent / "conf/model").glob("[!_]*.yaml"))
FEW_LAYERS = 4


def composed(name: str, *overrides: str) -> Model:
    return compose(f"model={name}", "data=fashion_mnist", *overrides).model  # 28 pixels: patches of 1, 2, 4 and 7 fit


def counted(model: Model, num_classes: int) -> tuple[int, int]:
    """FLOPs of a full group of images by torch's counter and by the formula, on the meta device."""
    with torch.device("meta"):
        vit = build(model, num_classes).eval()
        group = math.lcm(*(block.mlp.router.images_per_group for block in vit.blocks if isinstance(block.mlp, MoE)))
        images = torch.empty(group, model.in_chans, model.image_size, model.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vit(images)
    return counter.get_total_flops(), group * forward_flop(vit)


def test_every_model_is_listed() -> None:
    assert len(MODELS) >= 34
    assert {"vit_s16_dense", "vit_h14_soft", "vit_nano7_soft"} <= set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_formula_equals_torchs_counter(name: str) -> None:
    model = composed(name)
    assert model.backbone.depth is not None
    if model.backbone.depth > 6:  # two blocks of each kind: the others are repetitions
        model.backbone.depth = FEW_LAYERS
        model.moe_blocks = [2, 3] if model.moe_blocks else []
    got, want = counted(model, 10)
    assert got == want
    assert got > 0


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("vit_s16_soft", []),
        ("vit_s16_dense", ["model.backbone.class_token=true", "model.backbone.pool=token"]),
        ("vit_nano2_soft", ["model.moe_blocks=[1]", "model.router.num_experts=3", "model.router.slots_per_expert=5"]),
        ("vit_nano2_soft", ["model.router.slots_per_expert=null", "model.router.capacity_factor=2.0"]),
        ("vit_nano2_soft", ["model.backbone.mlp_width=100", "model.backbone.qk_norm=none", "model.in_chans=3"]),
    ],
)  # fmt: skip
def test_formula_equals_torchs_counter_for_whole_models_and_options(name: str, overrides: list[str]) -> None:
    got, want = counted(composed(name, *overrides), 1000)
    assert got == want


@pytest.mark.parametrize(("name", "giga"), [("vit_ti16_dense", 2.507), ("vit_s16_dense", 9.198)])
def test_dense_flops_are_the_published_ones(name: str, giga: float) -> None:
    model = composed(name, "model.backbone.class_token=true", "model.backbone.pool=token")
    with torch.device("meta"):
        vit = build(model, 1000)
    assert count_tokens(vit) == 197
    assert forward_flop(vit) / 1e9 == pytest.approx(giga, rel=1e-3)


def test_flops_of_a_soft_layer_by_hand() -> None:
    """Against the dense model: two MLPs on 196 tokens become two on 16 slots, with three products each around."""
    n, d, h, slots = 196, 64, 256, 16
    with torch.device("meta"):
        dense, soft = (build(composed(f"vit_nano2_{kind}"), 10) for kind in ("dense", "soft"))
    moe = soft.blocks[3].mlp
    assert isinstance(moe, MoE)
    assert isinstance(moe.router, SoftRouter)
    assert moe.router.slots_per_expert * moe.router.num_experts == slots
    change = 2 * (4 * slots * d * h + 6 * n * slots * d - 4 * n * d * h)
    assert forward_flop(soft) - forward_flop(dense) == change


def test_unknown_mlps_have_no_formula() -> None:
    with torch.device("meta"):
        vit = build(composed("vit_nano2_dense"), 10)
    vit.blocks[1].mlp = torch.nn.Identity()
    with pytest.raises(UsageError, match="no FLOP formula for Identity blocks"):
        forward_flop(vit)


# --- parameters and memory --------------------------------------------------------------------------------------------


def costed(*, name: str = "vit_nano2_soft", batch: int = 4, recompute: bool = False, ema: bool = False) -> Cost:
    return account(composed(name), 10, batch=batch, recompute=recompute, ema=ema)


@pytest.mark.parametrize("name", ["vit_nano2_soft", "vit_nano2_dense"])
def test_parameters_by_part_sum_to_the_real_model(name: str) -> None:
    cost, vit = costed(name=name), build(composed(name), 10)
    assert cost.params == sum(p.numel() for p in vit.parameters())
    assert sum(cost.params_by_part.values()) == cost.params
    d, h, e = 64, 256, 16
    mlp = 2 * d * h + h + d
    layers = {
        "attn": 4 * (4 * d * d + 4 * d + 2 * 16),
        "head": 10 * d + 10,
        "embedding and norms": 196 * d + 4 * d + d + (2 * 4 + 1) * 2 * d,
    }
    if name.endswith("soft"):
        layers |= {"mlp": 2 * mlp, "experts": 2 * e * mlp, "router": 2 * (d * e + 1)}
    else:
        layers["mlp"] = 4 * mlp
    assert cost.params_by_part == layers


def test_states_are_weights_gradients_and_moments() -> None:
    cost = costed()
    assert cost.state_bytes == 16 * cost.params
    assert costed(ema=True).state_bytes == 20 * cost.params
    assert cost.train_bytes == cost.state_bytes + cost.activation_bytes
    assert cost.tokens == 14 * 14


def test_training_flops() -> None:
    cost = costed()
    assert cost.train_flop(False) == 3 * cost.forward_flop
    assert cost.train_flop(True) == 4 * cost.forward_flop


@pytest.mark.parametrize("name", ["vit_nano2_soft", "vit_nano2_dense"])
def test_activations_grow_with_the_batch_and_shrink_with_recomputation(name: str) -> None:
    one, two, four, eight = (costed(name=name, batch=batch).activation_bytes for batch in (1, 2, 4, 8))
    assert one > 4 * 196 * 64 * 4  # at the least each block's input
    assert one < two < four < eight
    assert eight - four == 2 * (four - two)  # what grows grows with the images
    assert 4 * 4 * 196 * 64 * 4 <= costed(name=name, recompute=True).activation_bytes < four / 2


def test_counting_leaves_no_trace_of_the_weights() -> None:
    """54 billion parameters are counted, not allocated."""
    with torch.device("meta"):
        assert all(p.device.type == "meta" for p in build(composed("vit_h14_soft"), 10).parameters())
    before = torch.get_rng_state()
    costed()
    assert torch.equal(torch.get_rng_state(), before)
