"""Where adapters stand in a model, what is trained, and that the start is the frozen model."""

import copy
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from softmoe_cli.cost.flop import account_model
from softmoe_cli.device import compiled
from softmoe_cli.errors import UsageError
from softmoe_cli.model.adapted import AdaptedBlock, adapt, is_adapters, merged, trained_names
from softmoe_cli.model.vit import build, plain_vit
from softmoe_cli.model.weights import load_weights
from softmoe_cli.optim import decays
from tests.adapters.adapters import OPTIONS, options
from tests.conftest import thinned
from tests.oracles import compose
from tests.processes import forked
from tests.routers import ROUTERS, start

TIMM: dict[str, dict[str, Any]] = {
    "mean of tokens": {"global_pool": "avg", "class_token": False, "fc_norm": False},
    "class token, registers": {"reg_tokens": 2},
    "LayerScale, norm after the mean": {"init_values": 0.1, "global_pool": "avg", "drop_path_rate": 0.5},
    "norm before the blocks": {"pre_norm": True, "qk_norm": True},
}
"""Families that upcycle takes as well."""
MIXTURES: dict[str, tuple[str, ...]] = dict.fromkeys(ROUTERS, ()) | {
    "soft, other routers in single blocks": (
        "model.moe_blocks=[1,2,3]", "model.blocks={1: tokens_choice_dropless, 3: {num_experts: 3}}",
    )
} | {name: ("model.router.num_tasks=1",) for name, options in ROUTERS.items() if "num_tasks" in options}  # fmt: skip
"""What is chosen beside a router."""


def timms(name: str) -> VisionTransformer:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=5, **TIMM[name])
    return randomised(vit)


def randomised(vit: VisionTransformer) -> VisionTransformer:
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)
    return vit


def images(chans: int = 3) -> Tensor:
    return torch.randn(4, chans, 8, 8)


def mixed(router: str, *overrides: str) -> VisionTransformer:
    torch.manual_seed(0)
    blocks = ("model.moe_blocks=[1,3]", start(router)) if router != "dense" else ()
    config = compose("model/backbone=vit_nano2", f"model/router={router}", *blocks, *overrides)
    return build(config.model, 10)


@pytest.mark.parametrize("adapter", OPTIONS)
@pytest.mark.parametrize("family", TIMM)
def test_the_start_is_the_frozen_model(family: str, adapter: str) -> None:
    """To the bit, and with every option of place."""
    vit = timms(family).eval()
    x = images()
    before = vit(x)
    for chosen in [{}] if adapter == "lora" else [{"location": place} for place in ("attn", "mlp", "both")]:
        vit = timms(family).eval()
        adapt(vit, options(adapter, **chosen))
        assert torch.equal(vit(x), before)


@pytest.mark.thorough
def test_all_of_timms_vits_take_adapters_or_are_refused_by_name() -> None:
    """With one block each, and one of those that are built of the same parts."""
    taken: dict[object, str] = {}
    refused: dict[str, set[str]] = {}
    for name in timm.list_models(module="vision_transformer"):
        with torch.device("meta"):
            whole = timm.create_model(name, depth=1, num_classes=3)
            try:
                vit = plain_vit(name, whole)
            except UsageError as error:
                kind = re.search(r" (has|is a) (\w+)", str(error))
                refused.setdefault(kind[2] if kind else str(error), set()).add(name)
                continue
            normed = not isinstance(vit.norm_pre, nn.Identity)
            parts = frozenset(map(type, vit.modules())), vit.num_prefix_tokens, vit.global_pool, normed
            if taken.setdefault(parts, name) != name:
                continue
            for adapter in OPTIONS:
                other = copy.deepcopy(vit)
                adapt(other, options(adapter))
                assert other(torch.empty(1, 3, *vit.patch_embed.img_size)).shape == (1, 3), name
                account_model(other, batch=None, recompute=False)
    families = {"test_vit2", "test_vit4", "beit3_base_patch16_224", "vit_base_patch14_reg4_dinov2",
                "vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224"}  # fmt: skip
    assert families <= set(taken.values()), taken.values()
    assert refused.keys() == {
        "AttentionPoolLatent", "DiffAttention", "DiffParallelScalingBlock", "GluMlp", "ParallelScalingBlock",
        "ParallelThingsBlock", "ResPostBlock", "SwiGLU",
    }  # fmt: skip


@pytest.mark.parametrize(("mixture", "adapter"), thinned(product(MIXTURES, OPTIONS), 4))
def test_the_start_is_the_frozen_mixture(mixture: str, adapter: str) -> None:
    """What layers hand on from one to the next goes past the adapters, and three steps move those."""
    router, place = mixture.partition(",")[0], [] if adapter == "lora" else ["model.adapter.location=both"]
    plain = mixed(router, *MIXTURES[mixture])
    vit = mixed(router, *MIXTURES[mixture], f"adapter={adapter}", *place)
    report = load_weights(vit, plain.state_dict(), keep_head=True, allow_unexpected=[])
    assert report.new and all(map(is_adapters, report.new))
    x = images(1)
    assert torch.equal(vit.eval()(x), plain.eval()(x))
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    steps(vit, 3, chans=1)  # the head starts at zero: the first moves nothing else
    moved = {name for name, value in vit.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == trained_names(vit) and {name for name in before if is_adapters(name)} < moved


def steps(vit: VisionTransformer, number: int, chans: int = 3) -> None:
    trained = [parameter for parameter in vit.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    for _ in range(number):
        optimizer.zero_grad()
        nn.functional.cross_entropy(vit.train()(images(chans)), torch.arange(4)).backward()
        optimizer.step()


SITES = {"attn": {"norm1"}, "mlp": {"norm2"}, "both": {"norm1", "norm2"}, None: set()}


@pytest.mark.parametrize("adapter", OPTIONS)
def test_two_steps_move_everything_that_is_trained_and_nothing_else(adapter: str) -> None:
    vit = timms("class token, registers")
    chosen = options(adapter)
    adapt(vit, chosen)
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    steps(vit, 2)
    moved = {name for name, value in vit.state_dict().items() if not torch.equal(value, before[name])}
    norms = {
        f"blocks.{i}.{norm}.{leaf}" for i in range(3) for norm in SITES[chosen.location] for leaf in ("weight", "bias")
    }
    last = {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert moved == trained_names(vit) == {name for name in before if is_adapters(name)} | norms | last
    assert {name for name, p in vit.named_parameters() if p.grad is not None} == moved


def test_both_matrices_at_zero_would_stay_there() -> None:
    """The official class's own start: nothing but the last bias has a gradient. Ours starts with one of them."""
    vit = timms("class token, registers")
    adapt(vit, options("bottleneck"))
    for name, parameter in vit.named_parameters():
        if ".down." in name:
            nn.init.zeros_(parameter)
    steps(vit, 3)
    still = [name for name, p in vit.named_parameters() if is_adapters(name) and not p.any()]
    assert len(still) == 3 * 3 and not any(name.endswith("up.bias") for name in still)


def test_an_adapter_is_added_once_and_outside_of_layer_scale() -> None:
    """Parallel: it reads what the norm gives to its sublayer. Sequential: what the sublayer adds."""
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for insert in ("parallel", "sequential"):
        vit = timms("LayerScale, norm after the mean").eval()
        adapt(vit, options("bottleneck", location="both", insert=insert))
        vit.double()
        block: Any = vit.blocks[1]
        for name, parameter in block.named_parameters():
            if is_adapters(name):
                nn.init.normal_(parameter)
        read = block.norm1(x)
        made = block.ls1(block.attn(read))
        h = x + made + block.attn_adapter(read if insert == "parallel" else made)
        read = block.norm2(h)
        made = block.ls2(block.mlp(read))
        y = h + made + block.mlp_adapter(read if insert == "parallel" else made)
        torch.testing.assert_close(block(x), y, atol=1e-12, rtol=1e-12)


def test_lora_is_its_formula_and_merges_exactly() -> None:
    """q = W_q x + alpha / r B A x, and so v; keys stay."""
    vit = timms("class token, registers").eval()
    adapt(vit, options("lora"))
    vit.double()
    for name, parameter in vit.named_parameters():
        if is_adapters(name):
            nn.init.normal_(parameter)
    qkv: Any = vit.blocks[0].attn.qkv
    x, d = torch.randn(2, 5, 16, dtype=torch.float64), 16
    wanted = nn.functional.linear(x, qkv.weight, qkv.bias)
    for place, each in ((0, qkv.q_adapter), (2, qkv.v_adapter)):
        wanted[..., place * d : (place + 1) * d] += 8.0 / 4 * x @ each.down.weight.T @ each.up.weight.T
    torch.testing.assert_close(qkv(x), wanted, atol=1e-12, rtol=1e-12)
    plain = timms("class token, registers").double().eval()
    plain.load_state_dict(merged(vit.state_dict(), 8.0))
    pixels = images().double()
    torch.testing.assert_close(plain(pixels), vit(pixels), atol=1e-11, rtol=1e-11)


def test_lora_beside_matrices_in_half_precision_merges_as_exactly_as_it_computes() -> None:
    """A base that was saved so: what is added must not be rounded to its precision."""
    vit = timms("class token, registers").eval()
    adapt(vit, options("lora"))
    base = {name: value if is_adapters(name) else value.half() for name, value in vit.state_dict().items()}
    for name in base:
        if is_adapters(name):
            nn.init.normal_(base[name])
    vit.load_state_dict(base)
    plain = timms("class token, registers").eval()
    plain.load_state_dict(merged(base, 8.0))
    pixels = images()
    torch.testing.assert_close(plain(pixels), vit(pixels), atol=1e-5, rtol=1e-5)


COUNTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "Soft-MoA": ("soft_moa", {"slots_per_adapter": 1}, 76_842),
    "Soft-MoA, in both places": ("soft_moa", {"slots_per_adapter": 1, "location": "both"}, 153_684),
    "Soft-MoA, 14 adapters": ("soft_moa", {"slots_per_adapter": 1, "num_adapters": 14}, 152_148),
    "Soft-MoA, normalised": ("soft_moa", {"slots_per_adapter": 1, "normalised": True}, 76_843),
    "Dense-MoA": ("dense_moa", {"location": "attn"}, 76_849),
    "adapter": ("bottleneck", {}, 11_526),
    "adapter, 1/96": ("bottleneck", {"reduction": 96.0}, 14_600),
    "adapter in both places, 1/96": ("bottleneck", {"reduction": 96.0, "location": "both"}, 29_200),
    "adapter in both places, sequential": (
        "bottleneck", {"reduction": 96.0, "location": "both", "insert": "sequential"}, 29_200,
    ),
    "LoRA": ("lora", {"reduction": 64.0}, 36_864),
}  # fmt: skip
"""Trained parameters in each block of width 768, with the norms of the place; r is 1/128 and there are 7, unless said
otherwise. n (2dr + r + d) of n adapters, d n p of slots, d n + n of a dense router, 4dr of LoRA, 2d of a norm."""


@pytest.mark.parametrize("case", COUNTS)
def test_as_many_parameters_are_trained_as_the_formula_says(case: str) -> None:
    name, chosen, of_block = COUNTS[case]
    seven = {"num_adapters": 7} if name.endswith("moa") else {}
    with torch.device("meta"):
        vit = VisionTransformer(img_size=16, depth=12, num_classes=10, weight_init="skip")
        adapt(vit, options(name, **{"width": None, "reduction": 128.0} | seven | chosen))
    assert sum(p.numel() for p in vit.parameters() if p.requires_grad) == 12 * of_block + 2 * 768 + 769 * 10


def test_what_decays() -> None:
    """Matrices of adapters, and phi where its length matters; biases and norms do not."""
    config = compose("model/router=dense", "adapter=soft_moa")
    vit = build(config.model, 10)
    decayed = {name.partition(".attn_adapter.")[2] for name, value in decays(vit, config.optim).items() if value}
    assert decayed == {"", "router.phi", "experts.w1", "experts.w2"}


def test_recomputation_and_blocks_that_carry_give_the_same_gradients() -> None:
    """Adapters between layers that hand something on."""
    grads = []
    x = images(1)
    for recompute in (False, True):
        vit = mixed("zero_computation", "adapter=soft_moa", "model.adapter.location=both")
        assert all(isinstance(block, AdaptedBlock) for block in vit.blocks)
        for name, parameter in vit.named_parameters():
            if is_adapters(name):
                nn.init.constant_(parameter, 0.01)
        vit.set_grad_checkpointing(recompute)
        vit.train()(x).sum().backward()
        grads.append({name: p.grad for name, p in vit.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() == trained_names(vit)
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value)


@pytest.mark.thorough
def test_they_compile_as_one_graph(tmp_path: Path) -> None:
    told = tmp_path / "told.txt"
    assert forked(told, compile_all, timeout=600) == 0, told.read_text()


def compile_all() -> None:
    x = images(1)
    for adapter, router in zip(OPTIONS, ("zero_computation", "dense", "soft", "dense"), strict=True):
        torch.compiler.reset()
        place = [] if adapter == "lora" else ["model.adapter.location=both"]
        vit = randomised(mixed(router, f"adapter={adapter}", *place)).train()
        trained = [parameter for parameter in vit.parameters() if parameter.requires_grad]
        graph = compiled(vit, fullgraph=True, backend="aot_eager")
        want, got = (torch.autograd.grad(each(x).square().sum(), trained) for each in (vit, graph))
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_half_a_set_of_adapters_is_another_architecture() -> None:
    vit = timms("class token, registers")
    adapt(vit, options("soft_moa"))
    weights = {name: value for name, value in vit.state_dict().items() if "blocks.2.attn_adapter" not in name}
    with pytest.raises(UsageError, match=r"it lacks blocks\.2\.attn_adapter\.router\.phi"):
        load_weights(vit, weights, keep_head=True, allow_unexpected=[])


@pytest.mark.parametrize(
    ("name", "chosen", "said"),
    [
        ("soft_moa", {"insert": "parallel"}, "adapter=soft_moa has no use for model.adapter.insert=parallel"),
        ("none", {"width": 4}, "adapter=none has no use for model.adapter.width=4"),
        ("soft_moa", {"num_adapters": None}, "model.adapter.num_adapters=null: adapter=soft_moa needs a value"),
        ("lora", {"reduction": 64.0}, "give one of them and set the other to null"),
        ("lora", {"width": None}, "give one of them and set the other to null"),
        ("bottleneck", {"location": "head"}, "model.adapter.location=head is not one of attn, mlp, both"),
        ("dense_moa", {"num_adapters": 0}, "model.adapter.num_adapters=0 is out of range"),
    ],
)
def test_options_without_effect_are_refused(name: str, chosen: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        options(name, **chosen)
    assert said in str(refused.value)
