"""Models: official initialisation, published sizes, placement, timm backbones."""

import math
from typing import Any

import pytest
import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from softmoe_cli.config.model import placement
from softmoe_cli.config.run import Config
from softmoe_cli.cost.flop import account
from softmoe_cli.errors import UsageError
from softmoe_cli.model.vit import build, count_tokens, mlp_ratio
from softmoe_cli.moe.layer import MoE
from softmoe_cli.prune.fold import timm_entry
from tests.model.models import make
from tests.oracles import compose


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


def test_mlps_have_the_hidden_units_that_are_asked_for() -> None:
    """timm takes a ratio and rounds what it makes of it down: 98 * (99 / 98) is below 99."""
    sizes = (
        "model.backbone.depth=1",
        "model.backbone.heads=2",
        "model.backbone.width=98",
        "model.backbone.mlp_width=99",
    )
    model = compose("model=vit_nano2_dense", *sizes).model
    assert build(model, 10).blocks[0].mlp.fc1.out_features == 99
    assert make("model/router=soft", "model.moe_blocks=last_1", *sizes).blocks[0].mlp.experts.w1.shape[2] == 99
    entry = timm_entry(model)
    assert timm.create_model(entry["architecture"], **entry["model_args"]).blocks[0].mlp.fc1.out_features == 99
    for width in range(1, 200):
        assert all(int(width * mlp_ratio(hidden, width)) == hidden for hidden in range(1, 400))


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


def test_convolutions_before_the_patches_are_refused() -> None:
    """No formula counts them."""
    config = compose_timm("vit_tiny_r_s16_p8_224", "model.image_size=32", router="dense")
    with torch.device("meta"), pytest.raises(UsageError, match="has HybridEmbed; softmoe knows ViTs with plain patc"):
        build(config.model, 10)


def test_gated_mlps_are_refused() -> None:
    config = compose_timm("vit_giant_patch14_reg4_dinov2", "model.image_size=28", router="soft")
    with torch.device("meta"), pytest.raises(UsageError, match="has GluMlp; softmoe knows"):
        build(config.model, 10)


@pytest.mark.parametrize("class_token", ["false", "true"])
def test_norms_get_tokens_that_lie_in_order_and_are_timms(class_token: str) -> None:
    vit = make("model=vit_nano2_soft", f"model.backbone.class_token={class_token}")
    in_order: list[bool] = []
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm) and module.normalized_shape == (vit.embed_dim,):
            module.register_forward_pre_hook(lambda _, given: in_order.append(given[0].is_contiguous()))
    x = torch.randn(2, 1, 8, 8)
    vit(x)
    assert in_order == [True] * 9
    theirs = PatchEmbed.forward(vit.patch_embed, x)
    assert not theirs.is_contiguous() and torch.equal(vit.patch_embed(x), theirs)


def test_timms_models_have_stochastic_depth_too() -> None:
    config = compose_timm("test_vit", "model.backbone.drop_path=0.3", "model.image_size=32")
    vit = build(config.model, 10)
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for block in vit.blocks]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.3) and rates == sorted(rates)
