"""Agreement with the official JAX code, on numbers it computed: every case in softmoe_cli/check/vectors, found by its
kind, or in the folder that SOFTMOE_VECTORS names. A case of a kind that nothing here handles is skipped by name, and
the last lines say how many were compared and how many not."""

import inspect
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from softmoe_cli.check.official import (
    ROUNDING,
    allowed,
    case_layer,
    case_options,
    compare_case,
    drawn,
    is_case_of,
    official_cases,
    read_case,
    rounded,
    tolerance,
    vectors_folder,
)
from softmoe_cli.config.adapter import no_adapter
from softmoe_cli.config.model import Backbone, Model
from softmoe_cli.evaluate.fewshot import accuracies, best_l2, draws, feature_statistics, ridge, take, whiten
from softmoe_cli.model.router import make_router
from softmoe_cli.model.vit import build
from softmoe_cli.moe.coefficients import entmax15
from softmoe_cli.moe.factorised import FactorisedRouter
from softmoe_cli.moe.kind import Decider
from softmoe_cli.moe.layer import MoE
from softmoe_cli.moe.routing import DenseRouting, Router, SparseRouting, capacity, routings
from softmoe_cli.moe.sparse import choose, place
from softmoe_cli.optim import linear, rsqrt
from tests.routers import ROUTERS

ELSEWHERE = ("scaling_law_", "soft_moa_", "self_contrast_", "expert_pruning")
"""Kinds that tests of the rooms try: scaling/test_laws.py, adapters/test_official.py, evaluate/test_contrast.py and
train/test_pruning.py."""
CASES = {name: meta for name, meta in official_cases().items() if not meta["kind"].startswith(ELSEWHERE)}
ROUTER_CLASSES = {name: type(make_router(options, 16, 16)) for name, options in ROUTERS.items()}
MODULES = "softmoe_cli.moe.routers"


def tensor(array: np.ndarray) -> Tensor:
    return torch.tensor(np.asarray(array))


def close(got: Tensor, want: np.ndarray, what: str, *, atol: float, rtol: float = 0.0) -> None:
    """`atol` is what figures of any size may be off by; large ones may be by more."""
    atol = allowed(atol, tensor(want), got.dtype)
    torch.testing.assert_close(
        got.detach().reshape(want.shape).double(), tensor(want).double(), atol=atol, rtol=rtol, msg=told(what)
    )


def close_gradient(got: Tensor | None, want: np.ndarray, what: str, *, rtol: float) -> None:
    assert got is not None, what
    close(got, want, what, rtol=rtol, atol=1e-5)


def told(what: str) -> Callable[[str], str]:
    return lambda text: f"{what}: {text}"


def layer(meta: dict[str, Any], z: dict[str, np.ndarray], dtype: torch.dtype) -> None:
    """Sections 4 to 6 and 8: weights or slots, rows, output and its bfloat16 variant, losses, metrics, gradients."""
    classes = [router for router in ROUTER_CLASSES.values() if is_case_of(router, meta)]
    if not classes:  # test_official_numbers_are_of says of whom they are
        pytest.skip(f"no router of ours for {meta['case']}")
    compared = 0
    for what, got, want in compare_case(classes[0], (meta, z), dtype):
        absolute, relative = tolerance(what, want, dtype)
        assert got.shape == want.shape, what
        torch.testing.assert_close(got.double(), want.double(), atol=absolute, rtol=relative, msg=told(what))
        compared += 1
    assert compared >= 4


def ties(meta: dict[str, Any], z: dict[str, np.ndarray], dtype: torch.dtype) -> None:
    """Sections 5 and 6, bit for bit: equal gates, gates of exactly zero."""
    gates, slots = tensor(z["gates"]).to(dtype), meta["config"]["capacity"]
    g, s, e = gates.shape
    keep = torch.ones(g, s, dtype=torch.bool)
    if meta["kind"] == "ec_ties":
        taken = pytest.importorskip(f"{MODULES}.experts_choice").choose_tokens(gates, keep, slots)
        assert torch.equal(taken, tensor(z["out/slot_token"]).long())
        rows = [[i, int(taken[i, j, q]), j, q] for i in range(g) for j in range(e) for q in range(slots)]
        assert rows == z["out/kept"].tolist()
        return
    k = meta["config"]["num_selected_experts"]
    chosen, surest_first = choose(gates, k), pytest.importorskip(f"{MODULES}.tokens_choice_bpr").surest_first
    for name, order in (("vanilla", None), ("bpr", surest_first(gates))):
        assert torch.equal(chosen, tensor(z[f"out/{name}/choice_expert"]).long())
        routing = place(gates, chosen, keep, order, slots, gates.new_zeros(()), (g, s))
        token = routing.token.view(e, g, slots).transpose(0, 1)
        group, expert, position = (token < g * s).nonzero(as_tuple=True)
        kept = torch.stack([group, token[group, expert, position] % s, expert, position], dim=1)
        assert kept.tolist() == z[f"out/{name}/kept"].tolist()
        weights = torch.zeros(g, s, e, slots, dtype=dtype)
        weights[kept[:, 0], kept[:, 1], kept[:, 2], kept[:, 3]] = routing.gate.view(e, g, slots)[
            expert, group, position
        ]
        assert torch.equal(weights, tensor(z[f"out/{name}/combine_weights"]).to(dtype))


def capacities(_meta: dict[str, Any], z: dict[str, np.ndarray], _dtype: torch.dtype) -> None:
    """Section 7: the whole table, errors included."""
    columns = ("num_tokens", "num_experts", "capacity_factor_f64", "use_round", "multiple_of", "out/capacity")
    for tokens, e, factor, rounds, multiple, want in zip(*(z[column].tolist() for column in columns), strict=True):
        arguments = (tokens, e, factor, "round" if rounds else "ceil", multiple or 1)
        if want == -1:
            with pytest.raises(ValueError, match="slots per expert"):
                capacity(*arguments)
        else:
            assert capacity(*arguments) == want, arguments


def vit(meta: dict[str, Any], z: dict[str, np.ndarray], dtype: torch.dtype) -> None:
    """Section 9: the whole network with its activations, and gradients."""
    config = meta["config"]
    encoder, moe = config["encoder"], config["encoder"].get("moe") or {}
    model = build_vit(config, encoder, moe).eval()
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
        if isinstance(routing, DenseRouting):
            dispatch, combine = routing.dispatch_weights, routing.combine_weights
        else:
            assert isinstance(routing, SparseRouting)
            dispatch, combine = dense_form(routing, z[f"mid/encoderblock_{i}/combine"].shape)
        mid |= {f"encoderblock_{i}/dispatch": dispatch, f"encoderblock_{i}/combine": combine}
    if moe.get("layers"):
        aux = torch.stack([routing.aux_loss for routing in seen]).sum()
        close(aux, z["out/auxiliary_loss"].mean(), "auxiliary loss", atol=5e-5)
    for key in (k for k in z if k.startswith("mid/")):
        close(mid[key.removeprefix("mid/")], z[key], key, atol=5e-5)
    close(logits, z["out/logits_f32"], "logits", atol=5e-5)
    with mock.patch.object(MoE, "forward", lambda moe, x: rounded(moe, x, moe.router(x))):
        logits_rounded = model(images)
    close(logits_rounded, z["out/logits_bf16"], "logits with rounding", atol=5e-3)
    if moe.get("layers"):  # without which the rounding would not be seen
        off = [(each - tensor(z["out/logits_bf16"])).abs().mean().item() for each in (logits_rounded, logits)]
        assert off[0] < off[1] / 2
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


def dense_form(routing: SparseRouting, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Which token is in which slot, and with which gate: (G, S, E, C)."""
    g, s, e, slots = shape
    token = torch.where(routing.token < g * s, routing.token % s, s).view(e, g, slots).transpose(0, 1)[:, None]
    gate = routing.gate.view(e, g, slots).transpose(0, 1)[:, None]
    empty = gate.new_zeros(g, s + 1, e, slots)
    return empty.scatter(1, token, torch.ones_like(gate))[:, :-1], empty.scatter(1, token, gate)[:, :-1]


def build_vit(config: dict[str, Any], encoder: dict[str, Any], moe: dict[str, Any]) -> VisionTransformer:
    router: dict[str, Any] = {"_target_": None}
    if moe.get("layers"):
        official = moe["router"] | {"num_slots": moe["router"].get("num_slots")}
        name = str(official.get("name", "NoisyTopExpertsPerItemRouter"))
        kind = {"NoisyTopExpertsPerItemRouter": "tc_layer", "NoisyTopItemsPerExpertRouter": "ec_layer"}
        case = {"kind": kind.get(name, "soft_layer"), "config": {"num_experts": moe["num_experts"], "router": official}}
        router_class = next((router for router in ROUTER_CLASSES.values() if is_case_of(router, case)), None)
        if router_class is None:
            pytest.skip(f"no router of ours for {case['kind']}")
        tokens = (config["image_size"] // config["patch_size"][0]) ** 2 + (config["classifier"] == "token")
        groups = {"images_per_group": moe["group_size"] // tokens} if case["kind"] != "soft_layer" else {}
        target = f"{router_class.__module__}.{router_class.__name__}"
        router = {"_target_": target, **case_options(case), **groups}
    backbone = Backbone(
        name="case", timm=None, patch_size=config["patch_size"][0], width=config["hidden_size"],
        depth=encoder["num_layers"], heads=encoder["num_heads"], mlp_width=encoder["mlp_dim"],
        class_token=config["classifier"] == "token", pool="token" if config["classifier"] == "token" else "avg",
        norm_after_pool=False, qk_norm="scale" if encoder.get("attention_qk_norm") else "none", gelu="tanh",
        norm_eps=1e-6, pos_std=0.02, layer_scale=None, drop_path=0.0, init="official",
    )  # fmt: skip
    blocks = list(moe.get("layers", []))
    model = Model(
        backbone=backbone, adapter=no_adapter(), router=router, image_size=config["image_size"], in_chans=3,
        moe_blocks=blocks, blocks=None, expert_init="identical", expert_width=None, head="linear", head_experts=None,
        head_norm=None,
    )  # fmt: skip
    vit = build(model.settled(), config["num_classes"])
    if config.get("representation_size"):  # a layer between pooling and head that no Soft MoE model has
        middle = torch.nn.Linear(config["hidden_size"], config["representation_size"])
        vit.fc_norm = torch.nn.Sequential(OrderedDict(pre_logits=middle, tanh=torch.nn.Tanh()))
        vit.head = torch.nn.Linear(config["representation_size"], config["num_classes"])
    return vit


def flax_names(layers: int) -> dict[str, str]:
    """Our key -> theirs, for what is one to one; q, k and v share a tensor of ours."""
    names = {
        "patch_embed.proj.weight": "embedding/kernel", "patch_embed.proj.bias": "embedding/bias",
        "pos_embed": "Encoder/posembed_input/pos_embedding", "cls_token": "cls",
        "norm.weight": "Encoder/encoder_norm/scale", "norm.bias": "Encoder/encoder_norm/bias",
        "head.weight": "head/kernel", "head.bias": "head/bias",
        "fc_norm.pre_logits.weight": "pre_logits/kernel", "fc_norm.pre_logits.bias": "pre_logits/bias",
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
        names |= {f"{ours}.mlp.router.gate.kernel": f"{theirs}/Moe/Router/dense/kernel"}
        names |= {f"{ours}.attn.proj.weight": f"{theirs}/SelfAttention/out/kernel"}
        names |= {f"{ours}.attn.proj.bias": f"{theirs}/SelfAttention/out/bias"}
        names |= {f"{ours}.attn.{a}_norm.weight": f"{theirs}/SelfAttention/{b}_ln/scale" for a, b in QK.items()}
    return names


QK = {"q": "query", "k": "key"}


def vit_state(z: dict[str, np.ndarray], encoder: dict[str, Any], moe: dict[str, Any]) -> dict[str, Tensor]:
    width = z["param/Encoder/encoder_norm/scale"].shape[0]
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


def fewshot(meta: dict[str, Any], z: dict[str, np.ndarray], dtype: torch.dtype) -> None:
    """Section 10: shots, whitening, weights for every l2, predictions, and the l2 chosen over all data sets."""
    l2, sets = tensor(z["l2_regs"]).double(), sum(key.endswith("/tr_x") for key in z)
    for i, k in enumerate(z["shots"].tolist()):
        accuracy = []
        for name in (f"dataset{j}" for j in range(sets)):
            x, y, test_x, test_y = (tensor(z[f"{name}/{part}"]) for part in ("tr_x", "tr_y", "te_x", "te_y"))
            x, test_x, y, test_y = x.to(dtype).double(), test_x.to(dtype).double(), y.long(), test_y.long()
            want = {key: z[f"out/{name}/shot{k}/{key}"] for key in ("index", "mean", "std", "w", "w_f64", "pred")}
            index = take(draws(y, meta["config"]["permutation_seed"]), k)
            assert index.tolist() == want["index"].tolist()
            mean, std = feature_statistics(x[index])
            close(mean, want["mean"], "mean", atol=1e-5)
            close(std, want["std"], "std", atol=1e-5)
            classes = want["w"].shape[2]
            w = torch.stack([*ridge(whiten(x[index], mean, std), y[index], classes, l2)])
            close(w, want["w_f64"], "weights", atol=1e-9 * np.abs(want["w_f64"]).max(), rtol=1e-6)
            for strength, got, official in zip(l2.tolist(), w, want["w"], strict=True):
                rtol = 1e-2 if strength < 1000 else 1e-4
                close(got, official, f"official weights, l2={strength}", atol=rtol * np.abs(official).max(), rtol=rtol)
            share, predicted = accuracies((x[index], y[index]), (test_x, test_y), classes, l2)
            assert predicted.tolist() == want["pred"].tolist()
            close(share, z[f"out/{name}/accuracy"][i], "accuracy", atol=1e-6)
            accuracy.append(share.numpy())
        best = best_l2(np.stack(accuracy))
        assert best == z["out/best_l2_index"][i]
        close(tensor(np.stack(accuracy)[:, best]), z["out/best_accuracy"][i], "best accuracy", atol=1e-6)


def mumoe_entmax(_meta: dict[str, Any], z: dict[str, np.ndarray], dtype: torch.dtype) -> None:
    """Section 13: ties, gaps and large offsets among the rows."""
    logits = tensor(z["logits"]).to(dtype).requires_grad_()
    shares = entmax15(logits)
    near = 1e-5 if np.abs(z["logits"]).max() > 100 else 1e-6
    close(shares, z["out/p"], "coefficients", atol=near)
    (shares * tensor(z["loss_weight"])).sum().backward()
    assert logits.grad is not None
    close(logits.grad, z["grad/logits"], "gradient", atol=near)


def mumoe_params(meta: dict[str, Any], z: dict[str, np.ndarray], _dtype: torch.dtype) -> None:
    """Section 13: parameters of gate, one or two layers of maps and the norm before them."""
    for row, want in zip(z["rows"].tolist(), z["out/params"].tolist(), strict=True):
        case = dict(zip(meta["config"]["columns"], row, strict=True))
        name = {"CPMuMoE": "mumoe_cp", "TRMuMoE": "mumoe_tr"}[meta["config"]["layer_code"][str(case["layer"])]]
        if name not in ROUTERS:
            continue
        rank = case["rank_or_r1"] if name == "mumoe_cp" else [case["rank_or_r1"], case["r2"], case["r3"]]
        options = ROUTERS[name] | {"num_experts": case["experts"], "rank": rank, "bias": bool(case["use_bias"])}
        with torch.device("meta"):
            router = make_router(options, case["input_dim"], 1)
            assert isinstance(router, FactorisedRouter)
            widths = [case["input_dim"], case["output_dim"], *([case["second_dim"]] if case["second_dim"] else [])]
            modules = [router, *(router.maps(inputs, outputs, rank) for inputs, outputs in pairwise(widths))]
        total = sum(parameter.numel() for module in modules for parameter in module.parameters())
        assert total + 2 * case["input_dim"] * case["apply_ln"] == want, case


def zero_computation_tables(meta: dict[str, Any], z: dict[str, np.ndarray], _dtype: torch.dtype) -> None:
    """Section 14: Equations 8 and 10 and Table 1 of MoE++, before any rounding."""
    module = pytest.importorskip(f"{MODULES}.zero_computation")
    assert meta["config"]["columns"] == ["tokens", "n_ffn", "n_zc", "tau", "gamma"]
    for row, (tokens, ffn, free, tau, gamma) in enumerate(z["rows_f64"].tolist()):
        room = module.capacities(int(tokens), int(ffn), int(free), tau, gamma)
        assert room == pytest.approx(z["out/capacity_f64"][row].tolist(), rel=1e-12)
        share = module.ffn_share(int(ffn), int(free), tau)
        assert share == pytest.approx(z["out/complexity_ratio_f64"][row], rel=1e-12)
    found = [module.num_constants(e, 1, 1) for e in z["n_ffn"].tolist()]
    assert found == pytest.approx(z["out/n_const_f64"].tolist(), rel=1e-12)


HANDLERS = {
    "soft_layer": layer, "tc_layer": layer, "ec_layer": layer, "tc_ties": ties, "ec_ties": ties, "capacity": capacities,
    "vit": vit, "lr_schedule": lr_schedule, "fewshot": fewshot, "mumoe_layer": layer, "mumoe_entmax": mumoe_entmax,
    "mumoe_params": mumoe_params, "zero_computation_layer": layer, "zero_computation_paper": layer,
    "zero_computation_tables": zero_computation_tables, "sentence_gate": layer,
}  # fmt: skip


@pytest.mark.parametrize("dtype", ROUNDING, ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_official_numbers(name: str, dtype: torch.dtype, record_property: Callable[[str, object], None]) -> None:
    kind = CASES[name]["kind"]
    record_property("case", name)
    record_property("kind", kind)
    if kind not in HANDLERS:
        pytest.skip(f"{name}: nothing handles kind {kind} yet")
    HANDLERS[kind](*read_case(name), dtype)


LAYERS = [
    name
    for name, meta in CASES.items()
    if "router" in meta["config"] and any(is_case_of(router, meta) for router in ROUTER_CLASSES.values())
]
every_layer = pytest.mark.parametrize("name", LAYERS)


def float32_case(name: str) -> tuple[MoE, Tensor, dict[str, np.ndarray]]:
    """The layer of a case, its tokens, and all that is known of it."""
    meta, arrays = read_case(name)
    router_class = next(router for router in ROUTER_CLASSES.values() if is_case_of(router, meta))
    x = tensor(arrays["x_seqs"] if "x_seqs" in arrays else arrays["x"])
    assert issubclass(router_class, Router)
    return case_layer(router_class, meta, arrays, torch.float32), x, arrays


@every_layer
def test_under_bf16_autocast_outputs_are_as_near_as_the_official_ones(name: str) -> None:
    """The official layer rounds tokens and the experts' rows to bfloat16."""
    made, x, arrays = float32_case(name)
    with torch.no_grad(), drawn(arrays.get("noise")), torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(x)
    want = tensor(arrays["out/y_bf16"])
    assert y.dtype == torch.bfloat16
    assert (y.float() - want).norm() < 0.01 * want.norm()


KIN: dict[str, tuple[str, ...]] = {
    "soft_layer": ("soft_uniform", "uniform_soft"),
    "tc_layer": ("tokens_choice_dropless",),
    "ec_layer": (),
}
"""Routers of which there are no official numbers, with the parameters of one of which there are."""


@every_layer
def test_choices_under_bf16_autocast_are_those_of_float32(name: str) -> None:
    made, x, arrays = float32_case(name)
    meta, _ = read_case(name)
    options = case_options(meta) | {"images_per_group": made.router.images_per_group}
    kin = [ROUTER_CLASSES[other] for other in KIN[meta["kind"]] if other in ROUTERS]
    routers = [made.router, *(akin(made.router, options, other, x) for other in kin)]
    for router in routers:
        with drawn(arrays.get("noise")):
            plain = router(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                half = router(x)
        for key, value in vars(plain).items():
            if isinstance(value, Tensor):
                got = getattr(half, key)
                assert got.dtype == value.dtype and torch.equal(got, value), f"{type(router).__name__}: {key}"


def akin(router: Router, options: dict[str, Any], other: type[Decider], x: Tensor) -> Decider:
    """Another router with as many of the options as it has, and the parameters."""
    names = [name for name, p in inspect.signature(other).parameters.items() if p.kind is p.KEYWORD_ONLY]
    made = other(x.shape[2], x.shape[1], **{name: options[name] for name in names})
    made.load_state_dict(router.state_dict())
    return made.train(router.training)


OFFICIAL = {
    "soft": "soft_layer", "tokens_choice": "tc_layer", "tokens_choice_bpr": "tc_layer, surest first",
    "experts_choice": "ec_layer", "mumoe_cp": "mumoe_layer, CPMuMoE", "mumoe_tr": "mumoe_layer, TRMuMoE",
    "zero_computation": "zero_computation", "image_choice": "sentence_gate",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in OFFICIAL if name in ROUTERS])
def test_official_numbers_are_of(name: str) -> None:
    """With no other router for them they would be passed over."""
    assert ROUTER_CLASSES[name].official == OFFICIAL[name]


def test_there_are_cases() -> None:
    kinds = {meta["kind"] for meta in CASES.values()}
    assert kinds & set(HANDLERS), f"{vectors_folder()} holds no case of {', '.join(HANDLERS)}"
