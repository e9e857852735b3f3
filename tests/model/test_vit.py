"""Models: official initialisation, published sizes, placement, routers by name, timm backbones, loading weights."""

import math
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from softmoe_cli.config.model import placement
from softmoe_cli.config.run import Config
from softmoe_cli.cost.flop import account
from softmoe_cli.errors import UsageError
from softmoe_cli.model.router import make_router
from softmoe_cli.model.vit import build, count_tokens
from softmoe_cli.model.weights import LoadReport, load_weights, proportional_slots, resized_slots
from softmoe_cli.moe.layer import Experts, MoE
from softmoe_cli.moe.routers.soft import SoftRouter
from tests.oracles import compose

SOFT: dict[str, Any] = {
    "_target_": "softmoe_cli.moe.routers.soft.SoftRouter",
    "num_experts": 4,
    "slots_per_expert": 1,
    "capacity_factor": None,
    "noise_std": 0.0,
}


def make(*overrides: str, num_classes: int = 10) -> VisionTransformer:
    torch.manual_seed(0)
    return build(compose(*overrides).model, num_classes)


def compose_timm(name: str, *overrides: str, router: str = "dense") -> Config:
    return compose(
        "model=vit_nano2_soft", "model/backbone=timm", f"model/router={router}", f"model.backbone.timm={name}",
        "data=cifar10", *overrides,
    )  # fmt: skip


# --- official initialisation ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official() -> VisionTransformer:
    return make(
        "model=vit_ti16_soft", "data=cifar10", "model.image_size=256", "model.backbone.depth=3", "model.moe_blocks=[2]",
        "model.router.num_experts=4", "model.backbone.class_token=true",
    )  # fmt: skip


def std(tensor: Tensor) -> float:
    return tensor.std().item()


def test_head_starts_at_zero_with_the_prior_as_bias(official: VisionTransformer) -> None:
    assert (official.head.weight == 0).all()
    torch.testing.assert_close(official.head.bias.detach(), torch.full((10,), -math.log(10)))
    assert official.head.weight.shape == (10, 192)


def test_class_token_starts_at_zero_and_positions_normal(official: VisionTransformer) -> None:
    assert official.cls_token is not None
    assert (official.cls_token == 0).all()
    assert official.pos_embed.shape == (1, 16 * 16 + 1, 192)
    assert std(official.pos_embed) == pytest.approx(0.02, rel=0.02)
    assert std(make("model=vit_nano2_soft", "data=cifar10").pos_embed) == pytest.approx(1.0, rel=0.03)  # not official
    assert std(make("model=vit_nano2_soft", "model.backbone.pos_std=0.3").pos_embed) == pytest.approx(0.3, rel=0.1)


def test_attention_starts_xavier_per_square_matrix(official: VisionTransformer) -> None:
    d = 192
    bound = math.sqrt(6 / (d + d))
    for block in official.blocks:
        for matrix in (*block.attn.qkv.weight.chunk(3), block.attn.proj.weight):
            assert matrix.shape == (d, d)
            assert 0.99 * bound < matrix.abs().max().item() <= bound
            assert std(matrix) == pytest.approx(bound / math.sqrt(3), rel=0.03)
        assert (block.attn.qkv.bias == 0).all()
        assert (block.attn.proj.bias == 0).all()


def test_dense_mlps_start_xavier_with_tiny_biases(official: VisionTransformer) -> None:
    bound = math.sqrt(6 / (192 + 768))
    for block in official.blocks[:2]:
        for layer in (block.mlp.fc1, block.mlp.fc2):
            assert 0.99 * bound < layer.weight.abs().max().item() <= bound
            assert std(layer.weight) == pytest.approx(bound / math.sqrt(3), rel=0.03)
            assert std(layer.bias) == pytest.approx(1e-6, rel=0.3)


def test_patch_kernel_starts_lecun_normal_and_norms_at_one(official: VisionTransformer) -> None:
    fan = 3 * 16 * 16
    kernel = official.patch_embed.proj.weight
    assert std(kernel) == pytest.approx(1 / math.sqrt(fan), rel=0.05)
    cut = 2 / math.sqrt(fan) / 0.87962566103423978
    assert 0.98 * cut < kernel.abs().max().item() <= cut * (1 + 1e-6)
    assert (official.patch_embed.proj.bias == 0).all()
    for module in official.modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert module.bias is None or (module.bias == 0).all()


def test_architecture_follows_the_official_configs() -> None:
    vit = make("model=vit_nano2_soft", "data=cifar10")
    assert vit.cls_token is None
    assert vit.global_pool == "avg"
    assert count_tokens(vit) == 16 * 16
    assert isinstance(vit.norm, nn.LayerNorm)  # before the pooling, none after it
    assert isinstance(vit.fc_norm, nn.Identity)
    for block in vit.blocks:
        for norm in (block.attn.q_norm, block.attn.k_norm):
            assert norm.weight.shape == (64 // 4,)
            assert norm.bias is None
            assert norm.eps == 1e-6
        assert block.norm1.eps == block.norm2.eps == 1e-6
    assert vit.norm.eps == 1e-6
    assert [isinstance(block.mlp, MoE) for block in vit.blocks] == [False, False, True, True]
    assert all(block.mlp.experts.gelu == "tanh" for block in vit.blocks[2:])


@pytest.mark.parametrize("identical", [True, False])
def test_experts_of_a_model_start_identical_or_not(identical: bool) -> None:
    vit = make("model=vit_nano2_soft", f"model.expert_init={'identical' if identical else 'independent'}")
    experts = [block.mlp.experts for block in vit.blocks if isinstance(block.mlp, MoE)]
    assert len(experts) == 2
    for one in experts:
        assert torch.equal(one.w1[0], one.w1[-1]) is identical
    assert not torch.equal(experts[0].w1, experts[1].w1)


def test_choices_of_the_backbone_reach_the_model() -> None:
    vit = make(
        "model=vit_nano2_dense", "data=cifar10", "model.backbone.qk_norm=affine", "model.backbone.gelu=erf",
        "model.backbone.norm_after_pool=true", "model.backbone.layer_scale=0.1", "model.backbone.drop_path=0.3",
        "model.backbone.class_token=true", "model.backbone.pool=token", "model.backbone.norm_eps=1e-5",
        "model.backbone.init=timm",
    )  # fmt: skip
    assert vit.blocks[0].attn.q_norm.bias is not None
    x = torch.linspace(-3, 3, 50)
    assert torch.equal(vit.blocks[0].mlp.act(x), nn.functional.gelu(x))
    assert torch.equal(make("model=vit_nano2_dense").blocks[0].mlp.act(x), nn.functional.gelu(x, approximate="tanh"))
    assert isinstance(vit.norm, nn.Identity)
    assert isinstance(vit.fc_norm, nn.LayerNorm)
    assert vit.blocks[0].ls1.gamma.detach().unique().tolist() == pytest.approx([0.1])
    assert vit.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert vit.global_pool == "token"
    assert vit.fc_norm.eps == 1e-5
    assert not (vit.head.bias == -math.log(10)).any()
    assert isinstance(make("model.backbone.qk_norm=none").blocks[0].attn.q_norm, nn.Identity)


def test_exact_gelu_reaches_the_experts() -> None:
    assert make("model=vit_nano2_soft", "model.backbone.gelu=erf").blocks[-1].mlp.experts.gelu == "none"


def test_a_seed_decides_the_weights() -> None:
    one, two = make("model=vit_nano2_soft"), make("model=vit_nano2_soft")
    torch.manual_seed(1)
    three = build(compose("model=vit_nano2_soft").model, 10)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.pos_embed, three.pos_embed)


# --- published sizes --------------------------------------------------------------------------------------------------

PUBLISHED = {
    "vit_s16_dense": (33, 10**6),
    "vit_s16_soft": (933, 10**6),
    "vit_s14_soft": (18, 10**8),
    "vit_b16_dense": (108, 10**6),
    "vit_b16_soft": (37, 10**8),
    "vit_l16_dense": (333, 10**6),
    "vit_l16_soft": (131, 10**8),
    "vit_h14_soft": (541, 10**8),
}


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items(), ids=PUBLISHED.keys())
def test_parameters_are_the_papers(name: str, published: tuple[int, int]) -> None:
    digits, unit = published
    model = compose(f"model={name}", "data=folder", "data.root=x").model
    cost = account(model, 29593)
    assert cost.params // unit == digits


# --- placement --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "blocks"),
    [
        ("last_1", [5]), ("last_2", [4, 5]), ("last_6", [0, 1, 2, 3, 4, 5]), ("every_1", [0, 1, 2, 3, 4, 5]),
        ("every_2", [1, 3, 5]), ("every_4", [3]), ("every_6", [5]), ([4, 1], [1, 4]), ([0], [0]), ([], []),
    ],
)  # fmt: skip
def test_placement(words: str | list[int], blocks: list[int]) -> None:
    assert placement(words, 6) == blocks


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("last_0", "N from 1 to 6"), ("last_7", "N from 1 to 6"), ("every_7", "N from 1 to 6"),
        ("first_2", "none of last_N"),
        ("last_", "none of last_N"), ("last_-1", "none of last_N"), ("last_x", "none of last_N"),
        ("", "none of last_N"),
        ([6], "from 0 to 5"), ([-1], "from 0 to 5"), ([1, 1], "at most once"), ([True], "a list like"),
        ([1.0], "a list like"), (3, "a list like"), (None, "a list like"),
    ],
)  # fmt: skip
def test_impossible_placements_are_refused(words: Any, message: str) -> None:
    with pytest.raises(UsageError, match=r"model\.moe_blocks=.*" + message):
        placement(words, 6)


@pytest.mark.parametrize(("words", "blocks"), [("every_2", [1, 3]), ("[0,3]", [0, 3]), ("last_3", [1, 2, 3])])
def test_experts_stand_where_they_are_placed(words: str, blocks: list[int]) -> None:
    vit = make(f"model.moe_blocks={words}")
    assert [i for i, block in enumerate(vit.blocks) if isinstance(block.mlp, MoE)] == blocks


def test_dense_ignores_placement_and_soft_needs_one() -> None:
    assert compose("model/router=dense", "model.moe_blocks=last_99").model.moe_blocks == []
    with pytest.raises(UsageError, match=r"moe_blocks=\[\] leaves router soft without a block"):
        compose("model.moe_blocks=[]")


# --- routers by name --------------------------------------------------------------------------------------------------


def test_make_router_passes_its_options_on() -> None:
    router = make_router(SOFT | {"slots_per_expert": None, "capacity_factor": 2.0, "noise_std": 1.0}, 6, 16)
    assert isinstance(router, SoftRouter)
    assert router.phi.shape == (6, 4, 8)
    assert router.noise_std == 1


def test_whole_numbers_become_floats() -> None:
    router = make_router(SOFT | {"slots_per_expert": None, "capacity_factor": 2, "noise_std": 1}, 6, 16)
    assert router.slots_per_expert == 8
    assert isinstance(router, SoftRouter) and type(router.noise_std) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_expert": 4},
            r"router\.num_expert: SoftRouter has no such option.*'num_experts'.*It has num_experts, slots",
        ),
        ({"dim": 4}, r"router\.dim: SoftRouter has no such option"),
        ({"num_tokens": 4}, r"router\.num_tokens: SoftRouter has no such option"),
        ({"num_experts": "four"}, r"router\.num_experts=four is of type str; it must be int"),
        ({"num_experts": 4.0}, r"router\.num_experts=4.0 is of type float; it must be int"),
        ({"num_experts": True}, r"router\.num_experts=True is of type bool; it must be int"),
        ({"num_experts": None}, r"router\.num_experts=None is of type NoneType; it must be int"),
        ({"slots_per_expert": 1.5}, r"router\.slots_per_expert=1.5 is of type float; it must be int or null"),
        ({"noise_std": None}, r"router\.noise_std=None is of type NoneType; it must be float"),
        ({"noise_std": True}, r"router\.noise_std=True is of type bool; it must be float"),
        ({"num_experts": 0}, r"model\.router: num_experts=0 must be at least 1"),
        ({"_target_": "os.system"}, r"_target_=os\.system is not a subclass of .*Router"),
        ({"_target_": "torch.nn.Linear"}, r"_target_=torch\.nn\.Linear is not a subclass"),
        ({"_target_": "no_such_module_at_all.Router"}, r"_target_=no_such_module_at_all\.Router cannot be imported"),
        ({"_target_": "softmoe_cli.moe.routers.soft.Sotf"}, r"_target_=.*Sotf cannot be imported"),
        ({"_target_": "bare"}, r"_target_=bare cannot be imported"),
    ],
)
def test_wrong_router_options_are_refused(change: dict[str, Any], message: str) -> None:
    make_router(SOFT, 6, 16)
    with pytest.raises(UsageError, match=message):
        make_router(SOFT | change, 6, 16)


@pytest.mark.parametrize("key", sorted(SOFT.keys() - {"_target_"}))
def test_missing_router_options_are_refused(key: str) -> None:
    with pytest.raises(UsageError, match=rf"model\.router\.{key} is missing; SoftRouter needs it"):
        make_router({name: value for name, value in SOFT.items() if name != key}, 6, 16)


# --- timm backbones ---------------------------------------------------------------------------------------------------


def test_timm_backbone_is_timms() -> None:
    torch.manual_seed(0)
    vit = build(compose_timm("vit_tiny_patch16_224", "model.image_size=32").model, 10)
    torch.manual_seed(0)
    own = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10)
    assert list(vit.state_dict()) == list(own.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(vit.eval()(x), own.eval()(x))
    assert vit(x).shape == (2, 10)


def test_experts_go_into_a_timm_backbone() -> None:
    vit = build(compose_timm("vit_tiny_patch16_224", "model.image_size=32", router="soft").model, 10)
    assert [i for i, block in enumerate(vit.blocks) if isinstance(block.mlp, MoE)] == [6, 7, 8, 9, 10, 11]
    moe = vit.blocks[11].mlp
    assert moe.experts.w1.shape == (16, 192, 768)
    assert moe.experts.gelu == "none"  # timm's is exact
    assert moe.router.phi.shape == (192, 16, 1)
    assert count_tokens(vit) == 5
    assert vit(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("resnet18", ["model.image_size=32"], "resnet18"),
        ("swin_tiny_patch4_window7_224", ["model.image_size=224"], "swin_tiny.*not a plain VisionTransformer"),
        (
            "vit_tinny_patch16_224",
            ["model.image_size=32"],
            "timm has no model 'vit_tinny_patch16_224'.*vit_tiny_patch16_224",
        ),
        ("vit_tiny_patch16_224", ["model.moe_blocks=last_13"], "moe_blocks=last_13.*N from 1 to 12"),
    ],
)
def test_unusable_timm_models_are_refused(name: str, overrides: list[str], message: str) -> None:
    config = compose_timm(name, *overrides, router="soft")
    with torch.device("meta"), pytest.raises(UsageError, match=message):
        build(config.model, 10)


def test_gated_mlps_are_refused() -> None:
    config = compose_timm("vit_giant_patch14_reg4_dinov2", "model.image_size=28", router="soft")
    with torch.device("meta"), pytest.raises(UsageError, match="experts replace plain GELU MLPs"):
        build(config.model, 10)


# --- loading weights --------------------------------------------------------------------------------------------------


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


# --- slots ------------------------------------------------------------------------------------------------------------


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


def test_proportional_slots() -> None:
    """16 tokens at 8 pixels and patches of 2; rounded: 3 * 36 / 16 = 6.75 and 3 * 4 / 16 = 0.75; at least one."""
    model = compose("model=vit_nano2_soft", "model.router.slots_per_expert=3").model
    sizes = {8: 3, 12: 7, 16: 12, 4: 1, 2: 1}
    assert {size: proportional_slots(model, replace(model, image_size=size)) for size in sizes} == sizes
    other = compose("model/router=dense").model
    for before, after in ((other, other), (model, other), (other, model)):
        with pytest.raises(UsageError, match=r"slots=proportional: the checkpoint's router is (soft|dense) and the"):
            proportional_slots(before, after)


def test_timms_models_have_stochastic_depth_too() -> None:
    config = compose_timm("test_vit", "model.backbone.drop_path=0.3", "model.image_size=32")
    vit = build(config.model, 10)
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in vit.blocks]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.3) and rates == sorted(rates)
