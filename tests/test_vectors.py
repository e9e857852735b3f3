"""Agreement with the official JAX code, on numbers it computed: every case in tests/vectors, found by its kind,
or in the folder that SOFTMOE_VECTORS names. A case of a kind that nothing here handles is skipped by name."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from softmoe_cli.config import Backbone, Model
from softmoe_cli.models import build
from softmoe_cli.moe.layer import Experts, MoE
from softmoe_cli.moe.routers.soft import SoftRouter, l2_normalize, soft_logits, soft_weights
from softmoe_cli.moe.routing import DenseRouting, routings
from softmoe_cli.optim import linear, rsqrt

FOLDER = Path(os.environ.get("SOFTMOE_VECTORS", Path(__file__).parent / "vectors"))
Case = tuple[dict[str, Any], dict[str, np.ndarray]]
ROUNDING = {torch.float64: 0.0, torch.float32: 2e-6}
"""What float32 sums may lose of the largest gradient, on top of the stated tolerances, which float64 must meet."""


def read(name: str) -> Case:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as arrays:
        return json.loads((FOLDER / f"{name}.json").read_text()), dict(arrays)


def tensor(array: np.ndarray) -> Tensor:
    return torch.tensor(np.asarray(array))


def close(got: Tensor, want: np.ndarray, what: str, *, atol: float, rtol: float = 0.0) -> None:
    torch.testing.assert_close(
        got.detach().reshape(want.shape).double(), tensor(want).double(), atol=atol, rtol=rtol,
        msg=lambda text: f"{what}: {text}",
    )  # fmt: skip


def close_gradient(got: Tensor | None, want: np.ndarray, what: str, *, rtol: float) -> None:
    assert got is not None, what
    close(got, want, what, rtol=rtol, atol=1e-5 + ROUNDING[got.dtype] * float(np.abs(want).max()))


def soft_layer(meta: dict[str, Any], z: dict[str, np.ndarray], dtype: torch.dtype) -> None:
    """Section 4 of the vectors' README: logits, weights, slots, output, diagnostics and gradients."""
    config, router = meta["config"], meta["config"]["router"]
    dim, e = config["width"], config["num_experts"]
    layer = MoE(
        SoftRouter(
            dim, config["tokens"], num_experts=e, slots_per_expert=router["num_slots"],
            capacity_factor=None if router["num_slots"] else router["capacity_factor"], noise_std=router["noise_std"],
        ),
        Experts(e, dim, config["mlp_dim"], gelu="tanh", identical=True),
    )  # fmt: skip
    assert isinstance(layer.router, SoftRouter)
    assert layer.router.slots_per_expert == config["slots_per_expert"]
    layer.to(dtype).load_state_dict(moe_state(z, "param/Mlp", "param/Router"))
    x = tensor(z["x"]).to(dtype).requires_grad_()

    logits = soft_logits(x, layer.router.phi, layer.router.scale)
    if "noise" in z:
        logits = logits + router["noise_std"] * tensor(z["noise"])
    routing = DenseRouting(*soft_weights(logits), logits.new_zeros(()))
    if "noise" not in z:
        own = layer.router(x)
        torch.testing.assert_close(own.dispatch_weights, routing.dispatch_weights, atol=0, rtol=0)
        torch.testing.assert_close(own.combine_weights, routing.combine_weights, atol=0, rtol=0)
    slots = routing.dispatch(x)
    outputs = layer.experts(slots)
    y = routing.combine(outputs)

    computed = {
        "mu_unit": l2_normalize(layer.router.phi, dim=0),
        "logits": logits,
        "dispatch_weights": routing.dispatch_weights,
        "combine_weights": routing.combine_weights,
        "expert_inputs": by_group(slots, config),
        "expert_outputs": by_group(outputs, config),
    }
    for name in computed.keys() & {key.removeprefix("out/") for key in z}:  # larger cases leave some out
        close(computed[name], z[f"out/{name}"], name, atol=1e-5)
    close(y, z["out/y_f32"], "y", atol=1e-5)
    statistics = routing.statistics()
    for side in ("dispatch", "combine"):
        for end in ("min", "max"):
            want = z[f"out/metric/{side}_weights_{end}_mean"]
            close(torch.tensor(statistics[f"{side}_{end}"]), want, f"{side} {end}", atol=1e-5)
    if "loss_weight" in z:
        loss = (tensor(z["loss_weight"]) * y).sum()
        close(loss, z["out/loss_f32"], "loss", atol=5e-5)
        loss.backward()
        close_gradient(x.grad, z["grad/x"], "gradient of x", rtol=1e-4)
        gradients = moe_state({k.removeprefix("grad/"): v for k, v in z.items()}, "param/Mlp", "param/Router")
        for name, parameter in layer.named_parameters():
            close_gradient(parameter.grad, gradients[name].numpy(), f"gradient of {name}", rtol=1e-4)


def by_group(rows: Tensor, config: dict[str, Any]) -> Tensor:
    """e (b p) d -> b e p d"""
    return rows.reshape(config["num_experts"], config["groups"], config["slots_per_expert"], -1).transpose(0, 1)


def moe_state(z: dict[str, np.ndarray], mlp: str, router: str) -> dict[str, Tensor]:
    """Flax names to ours: an MoE layer's stacked weights have the same layout."""
    names = {
        "experts.w1": f"{mlp}/Dense_0/kernel", "experts.b1": f"{mlp}/Dense_0/bias",
        "experts.w2": f"{mlp}/Dense_1/kernel", "experts.b2": f"{mlp}/Dense_1/bias",
        "router.phi": f"{router}/mu", "router.scale": f"{router}/scale",
    }  # fmt: skip
    return {ours: tensor(z[theirs]) for ours, theirs in names.items() if theirs in z}


def vit(meta: dict[str, Any], z: dict[str, np.ndarray], dtype: torch.dtype) -> None:
    """Section 9: the whole network with its activations, and gradients."""
    config = meta["config"]
    encoder, moe = config["encoder"], config["encoder"].get("moe") or {}
    name = str(moe.get("router", {}).get("name", ""))
    if moe.get("layers") and not name.endswith("SoftRouter"):
        pytest.skip(f"{meta['case']}: no router of ours for {name}")
    model = build_vit(config, encoder, moe)
    model.to(dtype).load_state_dict(vit_state(z, encoder, moe))
    images = tensor(z["images"]).to(dtype).permute(0, 3, 1, 2).requires_grad_()
    mid: dict[str, Tensor] = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _m, _i, out, i=i: mid.__setitem__(f"encoderblock_{i}/out", out))
        if i in moe.get("layers", ()):
            block.mlp.register_forward_hook(
                lambda _m, inputs, out, i=i: mid.update(
                    {f"encoderblock_{i}/moe_in": inputs[0], f"encoderblock_{i}/moe_out": out}
                )
            )
    model.norm.register_forward_hook(lambda _m, _i, out: mid.__setitem__("encoder_norm", out))
    model.norm_pre.register_forward_hook(lambda _m, _i, out: mid.__setitem__("embedded", out))
    model.fc_norm.register_forward_hook(lambda _m, _i, out: mid.__setitem__("pre_logits", out))
    with routings(model) as seen:
        logits = model(images)
    for i, routing in zip(moe.get("layers", ()), seen, strict=True):
        assert isinstance(routing, DenseRouting)
        mid[f"encoderblock_{i}/dispatch"] = routing.dispatch_weights
        mid[f"encoderblock_{i}/combine"] = routing.combine_weights
    for key in (k for k in z if k.startswith("mid/")):
        close(mid[key.removeprefix("mid/")], z[key], key, atol=5e-5)
    close(logits, z["out/logits_f32"], "logits", atol=5e-5)
    loss = (tensor(z["loss_weight"]) * logits).sum()
    close(loss, z["out/loss_f32"], "loss", atol=5e-5)
    loss.backward()
    assert images.grad is not None
    close_gradient(images.grad.permute(0, 2, 3, 1), z["grad/images"], "gradient of images", rtol=1e-3)
    gradients = flax_gradients(model, encoder["num_layers"])
    for i, key in enumerate(meta["grad_param_order"]):
        g, size = gradients[key].double(), z["grad/param_l2"][i] * gradients[key].numel() ** 0.5
        close(g.norm(), z["grad/param_l2"][i], f"norm of the gradient of {key}", rtol=1e-3, atol=1e-5)
        # A sum can cancel to nothing: the official float32 sums are good to 1e-6 of norm times root of the count.
        close(g.sum(), z["grad/param_sum"][i], f"sum of the gradient of {key}", rtol=1e-3, atol=1e-5 + 1e-6 * size)


def build_vit(config: dict[str, Any], encoder: dict[str, Any], moe: dict[str, Any]) -> VisionTransformer:
    router: dict[str, Any] = {"_target_": None}
    if moe.get("layers"):
        router = {
            "_target_": "softmoe_cli.moe.routers.soft.SoftRouter",
            "num_experts": moe["num_experts"],
            "slots_per_expert": moe["router"]["num_slots"],
            "capacity_factor": None,
            "noise_std": 0.0,
        }
    backbone = Backbone(
        name="case", timm=None, patch_size=config["patch_size"][0], width=config["hidden_size"],
        depth=encoder["num_layers"], heads=encoder["num_heads"], mlp_width=encoder["mlp_dim"],
        class_token=config["classifier"] == "token", pool="token" if config["classifier"] == "token" else "avg",
        norm_after_pool=False, qk_norm="scale" if encoder.get("attention_qk_norm") else "none", gelu="tanh",
        norm_eps=1e-6, pos_std=0.02, layer_scale=None, drop_path=0.0, init="official",
    )  # fmt: skip
    model = Model(backbone, router, config["image_size"], 3, list(moe.get("layers", [])), "identical")
    model.check()
    return build(model, config["num_classes"])


def flax_names(layers: int) -> dict[str, str]:
    """Our key -> theirs, for what is one to one; q, k and v share a tensor of ours."""
    names = {
        "patch_embed.proj.weight": "embedding/kernel", "patch_embed.proj.bias": "embedding/bias",
        "pos_embed": "Encoder/posembed_input/pos_embedding", "cls_token": "cls",
        "norm.weight": "Encoder/encoder_norm/scale", "norm.bias": "Encoder/encoder_norm/bias",
        "head.weight": "head/kernel", "head.bias": "head/bias",
    }  # fmt: skip
    for i in range(layers):
        ours, theirs = f"blocks.{i}", f"Encoder/encoderblock_{i}"
        names |= {
            f"{ours}.norm{n + 1}.{a}": f"{theirs}/LayerNorm_{n}/{b}"
            for n in (0, 1)
            for a, b in (("weight", "scale"), ("bias", "bias"))
        }
        for n in (0, 1):
            names[f"{ours}.mlp.fc{n + 1}.weight"] = f"{theirs}/Mlp/Dense_{n}/kernel"
            names[f"{ours}.mlp.fc{n + 1}.bias"] = f"{theirs}/Mlp/Dense_{n}/bias"
            names[f"{ours}.mlp.experts.w{n + 1}"] = f"{theirs}/Moe/Mlp/Dense_{n}/kernel"
            names[f"{ours}.mlp.experts.b{n + 1}"] = f"{theirs}/Moe/Mlp/Dense_{n}/bias"
        names |= {f"{ours}.mlp.router.phi": f"{theirs}/Moe/Router/mu"}
        names |= {f"{ours}.mlp.router.scale": f"{theirs}/Moe/Router/scale"}
        names |= {f"{ours}.attn.proj.weight": f"{theirs}/SelfAttention/out/kernel"}
        names |= {f"{ours}.attn.proj.bias": f"{theirs}/SelfAttention/out/bias"}
        names |= {f"{ours}.attn.{a}_norm.weight": f"{theirs}/SelfAttention/{b}_ln/scale" for a, b in QK.items()}
    return names


QK = {"q": "query", "k": "key"}


def vit_state(z: dict[str, np.ndarray], encoder: dict[str, Any], moe: dict[str, Any]) -> dict[str, Tensor]:
    width = z["param/head/kernel"].shape[0]
    state = {}
    for ours, theirs in flax_names(encoder["num_layers"]).items():
        if f"param/{theirs}" not in z:
            continue
        value = tensor(z[f"param/{theirs}"])
        if ours == "patch_embed.proj.weight":
            value = value.permute(3, 2, 0, 1)
        elif ours.endswith("attn.proj.weight"):
            value = value.reshape(width, width).mT
        elif value.ndim == 2 and ours.endswith(".weight"):
            value = value.mT
        state[ours] = value
    for i in range(encoder["num_layers"]):
        attention = f"param/Encoder/encoderblock_{i}/SelfAttention"
        parts = [tensor(z[f"{attention}/{n}/kernel"]).reshape(width, width).mT for n in ("query", "key", "value")]
        state[f"blocks.{i}.attn.qkv.weight"] = torch.cat(parts)
        biases = [tensor(z[f"{attention}/{n}/bias"]).reshape(width) for n in ("query", "key", "value")]
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat(biases)
    return state


def flax_gradients(model: VisionTransformer, layers: int) -> dict[str, Tensor]:
    names, gradients = flax_names(layers), {}
    for ours, parameter in model.named_parameters():
        assert parameter.grad is not None, ours
        if ".qkv." in ours:
            theirs = f"Encoder/encoderblock_{ours.split('.')[1]}/SelfAttention"
            leaf = "kernel" if ours.endswith("weight") else "bias"
            for part, gradient in zip(("query", "key", "value"), parameter.grad.chunk(3), strict=True):
                gradients[f"{theirs}/{part}/{leaf}"] = gradient
        else:
            gradients[names[ours]] = parameter.grad
    return gradients


def lr_schedule(meta: dict[str, Any], z: dict[str, np.ndarray], _dtype: torch.dtype) -> None:
    """Section 10: every listed step of both official schedules."""
    c = meta["config"]
    peak, total = c["peak_value"], c["total_steps"]
    for step, want in zip(z["steps"].tolist(), z["out/lr_f64"].tolist(), strict=True):
        if c["schedule"] == "big_vision_rsqrt":
            warmup, cooldown = c.get("warmup_steps", 0), c.get("cooldown_steps", 0)
            got = rsqrt(step, total, peak=peak, warmup=warmup, cooldown=cooldown, timescale=c["timescale"])
        else:
            got = linear(step, total, peak=peak, warmup=c["warmup_steps"], final=c["end_value"])
        assert got == pytest.approx(want, abs=1e-6 * peak), f"step {step}"


HANDLERS = {"soft_layer": soft_layer, "vit": vit, "lr_schedule": lr_schedule}


@pytest.mark.parametrize("dtype", ROUNDING, ids=["float64", "float32"])
@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.npz")))
def test_official_numbers(name: str, dtype: torch.dtype) -> None:
    meta, arrays = read(name)
    if meta["kind"] not in HANDLERS:
        pytest.skip(f"{name}: nothing handles kind {meta['kind']} yet")
    HANDLERS[meta["kind"]](meta, arrays, dtype)


def test_there_are_cases() -> None:
    kinds = {read(path.stem)[0]["kind"] for path in FOLDER.glob("*.npz")}
    assert kinds & set(HANDLERS), f"{FOLDER} holds no case of {', '.join(HANDLERS)}"
