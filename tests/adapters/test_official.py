"""Agreement with the official code of Soft-MoA, on numbers it computed: layers, whole blocks with the gradients of
exactly what is trained, and counts of parameters."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from softmoe_cli.adapters.dense_moa import DenseMoA
from softmoe_cli.adapters.lora import AdaptedProjection
from softmoe_cli.adapters.soft_moa import SoftMoA
from softmoe_cli.check.official import official_cases, read_case
from softmoe_cli.config.adapter import AdapterOptions, no_adapter
from softmoe_cli.model.adapted import AdaptedBlock, adapt, merged, trained_names

Arrays = dict[str, np.ndarray]
CASES = {name: meta["kind"] for name, meta in official_cases().items() if meta["kind"].startswith("soft_moa_")}
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def close(got: Tensor, want: np.ndarray, what: str) -> None:
    """Within the tolerances of the vectors' README."""
    atol, rtol = (5e-5, 1e-4) if what.startswith("gradient") else (1e-4, 1e-5) if what == "loss" else (2e-5, 1e-5)
    torch.testing.assert_close(
        got.detach().double(), torch.tensor(want).double(), atol=atol, rtol=rtol, msg=lambda text: f"{what}: {text}"
    )


def options(name: str, **chosen: Any) -> AdapterOptions:
    given = vars(no_adapter()) | {"name": name} | chosen
    return AdapterOptions(**given).settled()


def ours(prefix: str, router: str) -> dict[str, str]:
    """Our names of an adapter's parameters -> theirs; linear weights of theirs are (out, in)."""
    names = {
        f"experts.{leaf}": f"{prefix}{theirs}"
        for leaf, theirs in {"w1": "down/weight", "b1": "down/bias", "w2": "up/weight", "b2": "up/bias"}.items()
    }
    soft = {"router.phi": f"{prefix}slot_params"}
    return names | (soft if not router else {f"router.{leaf}": f"{router}/ff/{leaf}" for leaf in ("weight", "bias")})


def as_ours(name: str, value: np.ndarray) -> np.ndarray:
    return value.swapaxes(1, 2) if name.endswith(("w1", "w2")) else value


def fill(adapter: nn.Module, z: Arrays, names: dict[str, str]) -> None:
    own = dict(adapter.named_parameters())
    assert own.keys() == names.keys()
    for name, theirs in names.items():
        own[name].data.copy_(torch.tensor(as_ours(name, z[f"param/{theirs}"])))


def compare(y: Tensor, x: Tensor, z: Arrays, of: dict[str, Tensor], names: dict[str, str]) -> None:
    """Result, loss, and the gradients of x and of what is trained. `of`: by our names."""
    close(y, z["out/y"], "y")
    loss = (torch.tensor(z["loss_weight"]) * y).sum()
    close(loss, z["out/loss_f32"], "loss")
    loss.backward()
    assert x.grad is not None
    close(x.grad, z["grad/x"], "gradient of x")
    assert {f"grad/param/{theirs}" for theirs in names.values()} == {
        name for name in z if name.startswith("grad/param/")
    }
    for name, theirs in names.items():
        grad = of[name].grad
        assert grad is not None, name
        close(grad, as_ours(name, z[f"grad/param/{theirs}"]), f"gradient of {name}")


def layer(meta: dict[str, Any], z: Arrays, dtype: torch.dtype) -> None:
    c = meta["config"]
    if c["normalize"]:
        miscoded(c, z, dtype)
        return
    made = SoftMoA(c["width"], c["bottleneck"], num_adapters=c["num_adapters"], slots_per_adapter=c["num_slots"],
                   normalised=False).to(dtype)  # fmt: skip
    names = ours("", "")
    fill(made, z, names)
    x = torch.tensor(z["x"]).to(dtype).requires_grad_()
    routing = made.router(x)
    rows = routing.dispatch(x)
    close(made.router.logits(x), z["out/logits"], "logits")
    close(routing.dispatch_weights, z["out/dispatch"], "dispatch")
    close(routing.combine_weights, z["out/combine"], "combine")
    for value, name in ((rows, "slots"), (made.experts(rows), "slot_outputs")):  # e (b p) d
        close(value.unflatten(1, (len(x), -1)).transpose(0, 1), z[f"out/{name}"], name)
    compare(made(x), x, z, dict(made.named_parameters()), names)


def miscoded(c: dict[str, Any], z: Arrays, dtype: torch.dtype) -> None:
    """The official `normalize=True`: tokens of unit length are mixed, not only compared, and slots are divided by their
    norm over the adapters. Our layer does that when it is given such tokens and slots, and never by itself."""
    sizes: dict[str, Any] = {"num_adapters": c["num_adapters"], "slots_per_adapter": c["num_slots"]}
    made = SoftMoA(c["width"], c["bottleneck"], normalised=False, **sizes).to(dtype)
    names = ours("", "")
    fill(made, z, names)
    x, scale = (torch.tensor(z[key]).to(dtype).requires_grad_() for key in ("x", "param/scale"))
    phi = made.router.phi
    slots = scale * phi / (phi.norm(dim=1, keepdim=True) + 1e-6)
    unit = x / (x.norm(dim=2, keepdim=True) + 1e-6)
    y = functional_call(made, {"router.phi": slots}, (unit,))
    compare(y, x, z, dict(made.named_parameters()) | {"router.scale": scale}, names | {"router.scale": "scale"})

    right = SoftMoA(c["width"], c["bottleneck"], normalised=True, **sizes).to(dtype)
    fill(right, z, names | {"router.scale": "scale"})
    assert (right(x) - y).abs().max() > 0.1


def dense_layer(meta: dict[str, Any], z: Arrays, dtype: torch.dtype) -> None:
    c = meta["config"]
    made = DenseMoA(c["width"], c["bottleneck"], num_adapters=c["num_adapters"]).to(dtype)
    names = ours("moa/", "router")
    fill(made, z, names)
    x = torch.tensor(z["x"]).to(dtype).requires_grad_()
    close(made.gates(x), z["out/router_probs"], "gates")
    compare(made(x), x, z, dict(made.named_parameters()), names)


def block(meta: dict[str, Any], z: Arrays, dtype: torch.dtype) -> None:
    """A model of one block, with adapters and frozen weights as finetuning has them."""
    c = meta["config"]
    dense, d = "SoftMoA" not in c["module"], c["width"]
    both = c["adapter_type"] == "Houlsby"
    vit = VisionTransformer(
        img_size=4, patch_size=4, embed_dim=d, depth=1, num_heads=c["heads"], num_classes=3,
        mlp_ratio=(c["ffn_hidden"] + 0.5) / d, norm_layer=partial(nn.LayerNorm, eps=c["layer_norm_eps"]),
    )  # fmt: skip
    extra = {} if dense else {"slots_per_adapter": c["num_slots"], "normalised": False}
    location = "both" if both else {"MHSA": "attn", "FFN": "mlp"}[c["adapter_location"]]
    chosen: dict[str, Any] = {
        "num_adapters": c["num_adapters"],
        "width": c["bottleneck"],
        "location": location,
        **extra,
    }
    adapt(vit, options("dense_moa" if dense else "soft_moa", **chosen))
    made = vit.blocks[0].to(dtype)
    assert isinstance(made, AdaptedBlock)
    frozen = {
        "norm1.{}": "layernorm_before/{}", "norm2.{}": "layernorm_after/{}", "attn.proj.{}": "attention/out/{}",
        "mlp.fc1.{}": "intermediate/{}", "mlp.fc2.{}": "output/{}",
    }  # fmt: skip
    weights = {a.format(leaf): z[f"param/{b.format(leaf)}"] for a, b in frozen.items() for leaf in ("weight", "bias")}
    for leaf in ("weight", "bias"):
        parts = [z[f"param/attention/{part}/{leaf}"] for part in ("query", "key", "value")]
        weights[f"attn.qkv.{leaf}"] = np.concatenate(parts)
    trained: dict[str, str] = {}
    for site, long in {"attn": "mhsa", "mlp": "ffn"}.items():
        adapter = getattr(made, f"{site}_adapter")
        if adapter is None:
            continue
        names = ours(f"moa_{long}/" if both else "moa/", f"router_{long}" if dense else "")
        fill(adapter, z, names)
        trained |= {f"{site}_adapter.{name}": theirs for name, theirs in names.items()}
        norm = {"attn": "norm1", "mlp": "norm2"}[site]
        side = {"attn": "before", "mlp": "after"}[site]
        trained |= {f"{norm}.{leaf}": f"layernorm_{side}/{leaf}" for leaf in ("weight", "bias")}
    own = dict(made.named_parameters())
    for name, value in weights.items():
        own[name].data.copy_(torch.tensor(value))
    assert trained_names(made) == trained.keys()
    assert set(trained.values()) == set(meta["trainable"])

    x = torch.tensor(z["x"]).to(dtype).requires_grad_()
    y = made(x)
    if "ref/y_added_once" in z:
        close(y, z["ref/y_added_once"], "y")
        assert (y - torch.tensor(z["out/y"])).abs().max() > 0.01
        assert made.attn_adapter is not None
        y = y + made.attn_adapter(made.norm1(x))  # the official block's second addition, which the paper has not
    compare(y, x, z, own, trained)


def params(meta: dict[str, Any], z: Arrays, _dtype: torch.dtype) -> None:
    for row, want in zip(z["rows"].tolist(), z["out/params"].tolist(), strict=True):
        kind, sites, d, blocks, adapters, slots, reduction, normalised, classes = row
        with torch.device("meta"):
            vit = VisionTransformer(
                img_size=16, patch_size=16, embed_dim=d, depth=blocks, num_classes=classes, weight_init="skip"
            )
            chosen: dict[str, Any] = {"num_adapters": adapters, "reduction": float(reduction)}
            chosen |= {"location": "both" if sites == 2 else "attn"}
            if not kind:
                chosen |= {"slots_per_adapter": slots, "normalised": bool(normalised)}
            adapt(vit, options("dense_moa" if kind else "soft_moa", **chosen))
        site = sum(p.numel() for p in vit.blocks[0].attn_adapter.parameters())
        inside = sum(p.numel() for p in vit.blocks.parameters() if p.requires_grad)
        every = sum(p.numel() for p in vit.parameters() if p.requires_grad)
        assert [site, inside, every] == want


HANDLERS: dict[str, Callable[[dict[str, Any], Arrays, torch.dtype], None]] = {
    "soft_moa_layer": layer, "soft_moa_dense_layer": dense_layer, "soft_moa_block": block, "soft_moa_params": params,
}  # fmt: skip


TRIED = [
    (name, each) for name, kind in CASES.items() for each in DTYPES if (kind, each) != ("soft_moa_params", "float32")
]


@pytest.mark.parametrize(("name", "precision"), TRIED)
def test_official_numbers_of_adapters(
    name: str, precision: str, record_property: Callable[[str, object], None]
) -> None:
    record_property("case", name)
    record_property("kind", CASES[name])
    HANDLERS[CASES[name]](*read_case(name), DTYPES[precision])


def test_lora_is_that_of_peft() -> None:
    """Numbers of peft 0.21.2 (lora_of_peft.json says which torch) on two separate matrices, for queries and values;
    merged as peft merges them."""
    said = json.loads((Path(__file__).parent / "lora_of_peft.json").read_text())

    def array(value: Any) -> Tensor:
        return torch.tensor(value, dtype=torch.float64)

    x = array(said["x"]).requires_grad_()
    weights = [array(said["q"]["weight"]), torch.randn(4, 5).double(), array(said["v"]["weight"])]
    whole = nn.Linear(5, 12).double()
    whole.weight.data = torch.cat(weights)
    whole.bias.data = torch.cat([array(said["q"]["bias"]), torch.zeros(4).double(), array(said["v"]["bias"])])
    whole.requires_grad_(False)
    qkv = AdaptedProjection(whole, said["r"], alpha=float(said["alpha"])).double()
    adapters = {"q": qkv.q_adapter, "v": qkv.v_adapter}
    for name, adapter in adapters.items():
        adapter.down.weight.data = array(said[name]["A"])
        adapter.up.weight.data = array(said[name]["B"])
    q, k, v = qkv(x).chunk(3, dim=-1)
    loss = array(said["loss_weight"])
    ((loss[0] * q).sum() + (loss[1] * v).sum()).backward()
    alike = partial(torch.testing.assert_close, atol=1e-12, rtol=1e-12)
    alike(q, array(said["y"]["q"]))
    alike(v, array(said["y"]["v"]))
    alike(k, x @ weights[1].T)
    alike(x.grad, array(said["grad_x"]))
    for name, adapter in adapters.items():
        alike(adapter.down.weight.grad, array(said[name]["grad_A"]))
        alike(adapter.up.weight.grad, array(said[name]["grad_B"]))
    together = merged({f"qkv.{name}": value for name, value in qkv.state_dict().items()}, float(said["alpha"]))
    alike(together["qkv.weight"], torch.cat([array(said["merged"]["q"]), weights[1], array(said["merged"]["v"])]))
