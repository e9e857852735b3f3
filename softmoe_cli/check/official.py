"""Reads the numbers of the official JAX code and compares a router with them, for `softmoe check` and the tests.

The numbers lie in vectors/, and vectors/README.md says how they were made. This is the one file outside moe/ that knows
the names of routers' options and parameters: it translates the official ones.
"""

import contextlib
import json
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from softmoe_cli.check import mumoe, sentence, zero_computation
from softmoe_cli.errors import UsageError, first_line
from softmoe_cli.moe.kind import Decider
from softmoe_cli.moe.layer import Experts, MoE
from softmoe_cli.moe.routing import Router, SparseRouting
from softmoe_cli.moe.sparse import choose, grouped_tokens, gshard_loss, importance_loss, load_loss

Case = tuple[dict[str, Any], dict[str, np.ndarray]]


def vectors_folder() -> Path:
    """The folder of the official numbers: SOFTMOE_VECTORS, or else the package's own.

    Raises:
        UsageError: SOFTMOE_VECTORS is not a folder.
    """
    given = os.environ.get("SOFTMOE_VECTORS")
    if given is None:
        return Path(__file__).resolve().parent / "vectors"
    if not Path(given).is_dir():
        raise UsageError(f"SOFTMOE_VECTORS={given} is not a folder")
    return Path(given)


def official_cases() -> dict[str, dict[str, Any]]:
    """The description of every case in the folder, by name.

    Raises:
        UsageError: SOFTMOE_VECTORS is not a folder, or something in it is not a case.
    """
    folder = vectors_folder()
    return {path.stem: _description(path) for path in sorted(folder.glob("*.npz"))}


def _description(arrays: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(arrays):
        raise UsageError(f"{arrays} is broken or no file of arrays; fetch it again or take it out of its folder")
    try:
        meta: dict[str, Any] = json.loads(arrays.with_suffix(".json").read_text())
        if isinstance(meta["kind"], str):
            return meta
        fault: object = f"kind={meta['kind']}"
    except (OSError, ValueError, TypeError, KeyError) as error:
        fault = f"{type(error).__name__}: {first_line(error)}"
    raise UsageError(
        f"{arrays} is no official case, because {arrays.stem}.json beside it does not say a kind ({fault}); set "
        "SOFTMOE_VECTORS to a folder of official cases alone"
    )


def read_case(name: str) -> Case:
    """A case's description and its arrays."""
    path = vectors_folder() / f"{name}.npz"
    with np.load(path, allow_pickle=False) as arrays:
        return _description(path), dict(arrays)


def numbers_of_kinds(kinds: Iterable[str]) -> str:
    """ "2 ec_layer, 8 soft_layer" """
    return ", ".join(f"{number} {kind}" for kind, number in sorted(Counter(kinds).items()))


def case_options(meta: dict[str, Any]) -> dict[str, Any]:
    """Translates the official arguments of a layer case, defaults included, into options of our router."""
    if meta["kind"] in mumoe.MUMOE_KINDS:
        return mumoe.mumoe_options(meta)
    if meta["kind"] in zero_computation.PLUS_PLUS_KINDS:
        return zero_computation.options_of(meta)
    if meta["kind"] in sentence.SENTENCE_KINDS:
        return sentence.sentence_options(meta)
    config, router = meta["config"], meta["config"]["router"]
    options: dict[str, Any] = {"num_experts": config["num_experts"], "noise_std": router.get("noise_std", 1.0)}
    if meta["kind"] == "soft_layer":
        slots = router["num_slots"]
        return options | {"slots_per_expert": slots, "capacity_factor": None if slots else router["capacity_factor"]}
    dispatcher = router["dispatcher"]
    options |= {
        "slots_per_expert": dispatcher.get("capacity"),
        "capacity_factor": dispatcher.get("capacity_factor"),
        "capacity_rounding": dispatcher.get("capacity_ceil_or_round", "ceil"),
        "capacity_multiple": dispatcher.get("capacity_multiple_of", 4) or 1,
    }
    options["renormalise"] = False
    if meta["kind"] == "ec_layer":
        return options
    return options | {
        "gate": "softmax",
        "k": router.get("num_selected_experts", 1),
        "importance_weight": router.get("importance_loss_weight", 1.0),
        "load_weight": router.get("load_loss_weight", 1.0) if options["noise_std"] else 0.0,
        "gshard_weight": router.get("gshard_loss_weight", 0.0),
        "bias_rate": 0.0,
        "shared_experts": 0,
    }


def is_case_of(router_class: type[Decider], meta: dict[str, Any]) -> bool:
    """Whether the official numbers of a case are for this router or for a parent class of it: `Router.official`."""
    return router_class.official is not None and _whose(meta) == router_class.official


def _whose(meta: dict[str, Any]) -> str | None:
    """The value of `Router.official` of the router that a case belongs to; None if the case has no layer."""
    if meta["kind"] in mumoe.MUMOE_KINDS:
        return f"{meta['kind']}, {meta['config']['layer']}"
    if meta["kind"] in zero_computation.PLUS_PLUS_KINDS:
        return "zero_computation"
    if meta["kind"] in sentence.SENTENCE_KINDS:
        return "sentence_gate"
    if meta["kind"] not in ("soft_layer", "tc_layer", "ec_layer"):
        return None
    by_priority = meta["config"]["router"].get("dispatcher", {}).get("batch_priority", False)
    return "tc_layer, surest first" if meta["kind"] == "tc_layer" and by_priority else meta["kind"]


def case_layer(router_class: type[Router], meta: dict[str, Any], z: dict[str, np.ndarray], dtype: torch.dtype) -> MoE:
    """Builds the layer of a case, with the case's weights."""
    config = meta["config"]
    tokens = z["x_seqs"].shape[1] if "x_seqs" in z else config["tokens"]
    options = case_options(meta)
    if meta["kind"] != "soft_layer":
        options["images_per_group"] = config["group_size"] // tokens
    router = router_class(config["width"], tokens, **options)
    layer = MoE(router, Experts(config["num_experts"], config["width"], config["mlp_dim"], gelu="tanh", identical=True))
    layer.to(dtype).load_state_dict(layer_weights(z, "param/Mlp", "param/Router"))
    return layer.train(not config.get("deterministic", "noise" not in z))


def layer_weights(z: dict[str, np.ndarray], mlp: str, router: str) -> dict[str, Tensor]:
    """Flax names to ours: an MoE layer's stacked weights have the same layout."""
    names = {
        "experts.w1": f"{mlp}/Dense_0/kernel", "experts.b1": f"{mlp}/Dense_0/bias",
        "experts.w2": f"{mlp}/Dense_1/kernel", "experts.b2": f"{mlp}/Dense_1/bias",
        "router.phi": f"{router}/mu", "router.scale": f"{router}/scale",
        "router.gate.kernel": f"{router}/dense/kernel",
    }  # fmt: skip
    return {ours: torch.tensor(z[theirs]) for ours, theirs in names.items() if theirs in z}


@contextlib.contextmanager
def drawn(noise: np.ndarray | None) -> Iterator[None]:
    """While open, torch's normal draws return the noise that the official code was given."""
    if noise is None:
        yield
        return
    draw = torch.tensor(noise)
    with mock.patch("torch.randn_like", lambda like: draw.to(like.dtype).view_as(like)):
        yield


def compare_case(router_class: type[Decider], case: Case, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields (name, our value, official value) for everything in a layer case. Integers must be equal, the rest
    close."""
    meta, z = case
    if meta["kind"] in mumoe.MUMOE_KINDS:
        yield from mumoe.compare_mumoe(router_class, case, dtype)
        return
    if meta["kind"] in sentence.SENTENCE_KINDS:
        yield from sentence.compare_sentence(router_class, case, dtype)
        return
    if meta["kind"] in zero_computation.PLUS_PLUS_KINDS:
        yield from zero_computation.compare_layers(router_class, case, dtype)
        return
    assert issubclass(router_class, Router)
    layer = case_layer(router_class, meta, z, dtype)
    x = torch.tensor(z["x_seqs"] if "x_seqs" in z else z["x"]).to(dtype).requires_grad_()
    with drawn(z.get("noise")):
        routing = layer.router(x)
        found: dict[str, Tensor] = {}
        if meta["kind"] != "soft_layer":
            found |= _gated(layer.router, x)
    rows = routing.dispatch(x)
    outputs = layer.experts(rows)
    y = routing.combine(outputs)
    found |= {"y_f32": y, "y_bf16": rounded(layer, x, routing)}
    e, slots = layer.router.num_experts, layer.router.slots_per_expert
    if slots is None:
        raise ValueError("it has no slots_per_expert, which the official numbers have")
    found |= {
        key: value.unflatten(1, (-1, slots)).transpose(0, 1)
        for key, value in (("expert_inputs", rows), ("expert_outputs", outputs))
    }
    if isinstance(routing, SparseRouting):
        g, s = z["x"].shape[:2]
        token = torch.where(routing.token < g * s, routing.token % s, s).view(e, g, slots).transpose(0, 1)
        group, expert, position = (token < s).nonzero(as_tuple=True)
        found["kept"] = torch.stack([group, token[group, expert, position], expert, position], dim=1)
        found["capacity"] = torch.tensor(slots)
        dense = torch.zeros(g, s + 1, e, slots, dtype=routing.gate.dtype)
        gate = routing.gate.view(e, g, slots).transpose(0, 1)
        found["combine_weights"] = dense.scatter(1, token[:, None], gate[:, None])[:, :-1]
        found["tokens_without_expert"] = (found["combine_weights"].flatten(2).count_nonzero(dim=2) == 0).sum(dim=1)
    else:
        found |= {"dispatch_weights": routing.dispatch_weights, "combine_weights": routing.combine_weights}
        numbers = routing.statistics() | layer.router.statistics()
        for ours, theirs in SOFT_METRICS.items():
            if ours in numbers:
                # The official largest cosine is never below the 0 that it puts on the diagonal.
                value = max(0.0, numbers[ours]) if ours == "slot_cosine_max" else numbers[ours]
                found[f"metric/{theirs}"] = torch.tensor(value)
    for key, value in found.items():
        if f"out/{key}" in z:
            yield key, value.detach(), torch.tensor(z[f"out/{key}"])
    yield "auxiliary loss", routing.aux_loss.detach(), torch.tensor(z["out/metric/auxiliary_loss"]).mean()
    if "loss_weight" in z:
        loss = (torch.tensor(z["loss_weight"]) * y).sum() + routing.aux_loss
        yield "loss", loss.detach(), torch.tensor(z["out/loss_f32"])
        loss.backward()
        assert x.grad is not None
        yield "gradient of x", x.grad, torch.tensor(z.get("grad/x_seqs", z.get("grad/x")))
        want = layer_weights({k.removeprefix("grad/"): v for k, v in z.items()}, "param/Mlp", "param/Router")
        for key, parameter in layer.named_parameters():
            got = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            yield f"gradient of {key}", got, want[key]


SOFT_METRICS = {
    "dispatch_min": "dispatch_weights_min_mean", "dispatch_max": "dispatch_weights_max_mean",
    "combine_min": "combine_weights_min_mean", "combine_max": "combine_weights_max_mean",
    "slot_cosine_min": "mu_similarity_min", "slot_cosine_max": "mu_similarity_max",
    "slot_cosine_mean": "mu_similarity_mean",
}  # fmt: skip


def _gated(router: Any, x: Tensor) -> dict[str, Tensor]:
    """A sparse router's gates and, where tokens choose, the choices and each loss by itself, under their official
    names."""
    tokens, keep = grouped_tokens(x, None, router.images_per_group)
    clean, noisy = router.gate(tokens, router.images_per_group)
    gates, quiet = router.gate.activate(noisy), router.gate.activate(clean)
    numbers = {"gates": gates, "gates_clean": quiet}
    if router.official != "ec_layer":
        numbers["choice_expert"] = choose(gates, router.k)
        numbers["metric/importance_loss"] = importance_loss(quiet)
        numbers["metric/gshard_loss"] = gshard_loss(gates, keep)
        if noisy is not clean:
            numbers["metric/load_loss"] = load_loss(clean, noisy, router.gate.std, router.k, keep)
    return numbers


def rounded(layer: MoE, x: Tensor, routing: Any) -> Tensor:
    """Computes as the official bfloat16 path does: rounds tokens and the experts' rows, and nothing else."""
    rows = layer.experts(routing.dispatch(x.bfloat16().to(x.dtype)))
    out: Tensor = routing.combine(rows.bfloat16().to(x.dtype))
    return out


ROUNDING = {torch.float64: 1e-6, torch.float32: 2e-6}
"""The allowed error by our precision, as a share of the largest value of an array; official numbers are float32."""


def allowed(least: float, want: Tensor, dtype: torch.dtype) -> float:
    """The allowed distance between our numbers and the official ones: `least`, or more where the official ones are
    large."""
    if not want.numel() or want.dtype == torch.float64:
        return least
    return max(least, ROUNDING[dtype] * want.abs().max().item())


def tolerance(what: str, want: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """(absolute, relative) as the vectors' README states them, for figures of any size."""
    if not want.is_floating_point():
        return 0.0, 0.0
    if what == "y_bf16":  # a value at a rounding boundary may fall to the other side
        return max(5e-3, 1e-3 * want.abs().max().item()), 0.0
    relative = 1e-4 if what.startswith("gradient") else 0.0
    return allowed(5e-5 if what == "loss" else 1e-5, want, dtype), relative
