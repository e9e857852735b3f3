"""Compares factorised layers with the numbers of muMoE's official code (james-oldfield/muMoE)."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softmoe_cli.moe.factorised import Factorised, FactorisedRouter, Levels, Maps, Pair

MUMOE_KINDS = ("mumoe_layer",)
_Case = tuple[dict[str, Any], dict[str, np.ndarray]]
_NORMS = {"bn": "batch", "ln": "layer"}


def mumoe_options(meta: dict[str, Any]) -> dict[str, Any]:
    """Translates the arguments of a case into options of our router. The middle number of a ring's ranks is ignored, as
    by the official code."""
    c = meta["config"]
    first, second = [*c["expert_dims"], None][:2]
    rank = c["ranks"] if isinstance(c["ranks"], int) else [each[0] for each in c["ranks"]]
    options = {"num_experts": first, "num_experts_2": second, "rank": rank, "gate": c["act"]}
    return options | {"norm": _NORMS[c["normalization"]], "bias": c["use_bias"], "input_norm": c["apply_ln"]}


def compare_mumoe(router_class: Any, case: _Case, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields (name, our value, official value) for everything in a case of `MUMOE_KINDS`."""
    meta, z = case
    c, options = meta["config"], mumoe_options(meta)
    router: FactorisedRouter = router_class(c["input_dim"], 1, **options)
    widths = [c["input_dim"], c["output_dim"], *([c["second_dim"]] if c["second_dim"] else [])]
    maps = [router.maps(inputs, outputs, options["rank"]) for inputs, outputs in pairwise(widths)]
    norm = nn.LayerNorm(c["input_dim"]) if c["apply_ln"] else None
    for module in (router, *maps, *([] if norm is None else [norm])):
        module.to(dtype).train(c["training"])
    own = official_names(router, maps, norm)
    for name, tensor in own.items():
        tensor.data.copy_(turned(torch.tensor(z[name])))

    x = torch.tensor(z["x"]).to(dtype).requires_grad_()
    tokens = x if x.ndim == 3 else x[:, None]
    levels = router(tokens).levels
    if len(maps) > 1:
        hidden: list[Tensor] = []
        maps[0].register_forward_hook(lambda _module, _inputs, out: hidden.append(out.detach()))
        y: Tensor = Factorised(router, Pair(maps[0], maps[1], norm, "none"), c["output_dim"], options["rank"])(tokens)
        yield "hidden", hidden[0], torch.tensor(z["mid/hidden"])
    else:
        y = maps[0](tokens if norm is None else norm(tokens), levels)
    yield "y", y.detach(), torch.tensor(z["out/y"])
    zeros = torch.tensor(sum(int((shares == 0).sum()) for shares in levels))
    yield "coefficients that are zero", zeros, torch.tensor(meta["exact_zero_coefficients"])
    for level, shares in enumerate(levels):
        logits = tokens @ router.get_parameter(f"levels.{level}.kernel")
        yield f"logits {level}", logits.detach(), torch.tensor(z[f"out/expert_logits/{level}"])
        yield f"coefficients {level}", shares.detach(), torch.tensor(z[f"out/expert_coefficients/{level}"])
    yield "first expert", _first_expert(maps[0], levels, c), torch.tensor(z["out/expert_weight_first"])

    loss = (torch.tensor(z["loss_weight"]) * y).sum()
    yield "loss", loss.detach(), torch.tensor(z["out/loss_f32"])
    loss.backward()
    for name, tensor in {"x": x, **own}.items():
        if f"grad/{name}" in z:
            want = torch.tensor(z[f"grad/{name}"])
            got = tensor.grad if tensor.grad is not None else torch.zeros_like(tensor)
            yield f"gradient of {name}", got, want if name == "x" else turned(want)
    if c["training"]:
        router.after_update()
        for name, tensor in own.items():
            if name.startswith("buffer/"):
                yield name, tensor, torch.tensor(z[name.replace("buffer", "out")])


def turned(factor: Tensor) -> Tensor:
    """A parameter or buffer as ours is: cores of rings have their ranks behind the other axis, not around it."""
    return factor.transpose(0, 1) if factor.ndim == 3 else factor


def _first_expert(maps: Maps, levels: Levels, c: dict[str, Any]) -> Tensor:
    """Its matrix, the bias last: what it makes of each unit vector, and of nothing."""
    width = c["input_dim"]
    vectors = torch.cat([torch.eye(width), torch.zeros(1, width)])[None].to(levels[0].dtype)
    alone = [F.one_hot(torch.zeros(1, width + 1, dtype=torch.int64), each.shape[2]) for each in levels]
    with torch.no_grad():
        made: Tensor = maps(vectors, [each.to(vectors.dtype) for each in alone])[0]
    if not maps.bias:
        return made[:-1]
    return torch.cat([made[:-1] - made[-1], made[-1:]])


def official_names(router: FactorisedRouter, maps: Sequence[Maps], norm: nn.LayerNorm | None) -> dict[str, Tensor]:
    """Parameters and buffers by their official names."""
    names = {}
    for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
        _, level, leaf = name.split(".", 2)
        theirs = {"kernel": "param/projs/{}", "norm.mean": "buffer/bn/{}/running_mean"}
        theirs["norm.variance"] = "buffer/bn/{}/running_var"
        if leaf in theirs:
            names[theirs[leaf].format(level)] = tensor
    for name, each in zip(("MuMoE", "MuMoE2"), maps, strict=False):
        factors = [*each.get_submodule("of_experts").parameters(), each.of_input, each.of_output]
        names |= {f"param/{name}/factors/{place}": factor for place, factor in enumerate(factors)}
    if norm is not None:
        names |= {"param/input_ln/weight": norm.weight, "param/input_ln/bias": norm.bias}
    return names
