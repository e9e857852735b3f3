"""Compares routing by image with the numbers of Google's code (google/praxis)."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from softmoe_cli.moe.layer import Experts, MoE
from softmoe_cli.moe.sparse import choose, image_means

SENTENCE_KINDS = ("sentence_gate",)
_Case = tuple[dict[str, Any], dict[str, np.ndarray]]


def sentence_options(meta: dict[str, Any]) -> dict[str, Any]:
    """Translates the arguments of a case into options of our router."""
    losses = dict.fromkeys(("importance_weight", "load_weight", "gshard_weight", "bias_rate", "noise_std"), 0.0)
    options = {"num_experts": meta["config"]["num_experts"], "k": meta["config"]["k"], "gate": "softmax"}
    return options | losses | {"renormalise": True, "images_per_group": 1, "shared_experts": 0}


def compare_sentence(
    router_class: Any, case: _Case, dtype: torch.dtype, level: str = "sentence"
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields (name, our value, official value) for one of the levels in a case of `SENTENCE_KINDS`. What the official
    code computes at padding is nobody's."""
    meta, z = case
    (_, n, d), hidden = z["x"].shape, z["param/Mlp/Dense_0/kernel"].shape[2]
    router = router_class(d, n, **sentence_options(meta))
    layer = MoE(router, Experts(router.num_experts, d, hidden, gelu="tanh", identical=True)).to(dtype).eval()
    names = {"experts.w1": "Mlp/Dense_0", "experts.w2": "Mlp/Dense_1", "router.gate.kernel": "Router/dense"}
    state = {ours: torch.tensor(z[f"param/{theirs}/kernel"]) for ours, theirs in names.items()}
    biases = {f"experts.{name}": torch.zeros_like(layer.experts.get_parameter(name)) for name in ("b1", "b2")}
    layer.load_state_dict(state | biases)
    x, keep = torch.tensor(z["x"]).to(dtype), torch.tensor(z["keep"]).bool()
    seen = image_means(x, keep).expand_as(x) if level == "sentence" else x
    if level == "sentence":
        yield "mean", seen[keep], torch.tensor(z["mid/sentence/embedding"])[keep]
    gates = router.gate.activate(router.gate(seen)[0])
    yield "softmax", gates[keep].detach(), torch.tensor(z[f"mid/{level}/softmax"])[keep]
    yield "chosen", choose(gates, router.k)[keep], torch.tensor(z[f"mid/{level}/chosen"])[keep].long()
    routing = router(x, keep)
    experts = torch.zeros(*x.shape[:2], router.num_experts, dtype=torch.bool)
    rows = torch.arange(len(routing.token))
    place = torch.searchsorted(routing.offsets, rows, right=True)
    experts.view(-1, router.num_experts)[routing.token, place] = True
    wanted = torch.zeros_like(experts)
    wanted[keep] = wanted[keep].scatter(1, torch.tensor(z[f"mid/{level}/chosen"])[keep].long(), True)
    yield "experts of tokens", experts[keep].long(), wanted[keep].long()
    yield "output", layer(x, keep).detach(), torch.tensor(z[f"out/{level}/y"])
