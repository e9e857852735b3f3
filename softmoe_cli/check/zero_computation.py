"""Compares zero_computation with the numbers of MoE++'s released code, and with those of a reference from its paper.

The released class has options that no released model uses, and softmoe has not: a gate of two layers, and inputs of the
experts multiplied by two. Its cases with them try the rest of the layer, from given logits on.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softmoe_cli.moe.layer import Experts
from softmoe_cli.moe.routing import Carried

PLUS_PLUS_KINDS = ("zero_computation_layer", "zero_computation_paper")
Compared = Iterator[tuple[str, Tensor, Tensor]]


def options_of(meta: dict[str, Any]) -> dict[str, Any]:
    """Translates the arguments of a case, defaults included, into options of our router."""
    c = meta["config"]
    options = {"num_experts": c["n_ffn"], "num_zero": c["n_zero"], "num_copy": c["n_copy"]}
    options |= {"num_constant": c["n_constant"], "k": c["top_k"], "batch_priority": False, "images_per_group": 1}
    options |= {"tau": c.get("tau", 1.0), "capacity_factor": c.get("capacity_factor"), "gating_residual": True}
    options["capacity_counts_choices"] = c.get("capacity_counts_choices", True)
    options["logits_norm"] = c["moe_gate_norm_std"] if c.get("moe_use_logits_norm") else None
    if meta["kind"] == "zero_computation_paper":
        return options | {"gates": "softmax", "balance_weight": 1.0}
    return options | {"gates": "top2_softmax" if c["moe_use_mixtral_gating"] else "renormalised", "balance_weight": 0.0}


class GatedExperts(nn.Module):
    """Experts without biases, (silu(first half of a x) * second half) b, on runs of rows."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        sizes = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
        made = []
        for part, up, down in zip(rows[: sum(sizes)].split(sizes), self.up, self.down, strict=True):
            gate, value = F.linear(part, up).chunk(2, dim=1)
            made.append(F.linear(F.silu(gate) * value, down))
        return torch.cat([*made, torch.zeros_like(rows[sum(sizes) :])])


class PlusPlusLayer:
    """A layer of a case with its weights, as `grads` names them: theirs, ours, and whether ours is turned."""

    def __init__(
        self, router_class: type[Any], meta: dict[str, Any], z: dict[str, np.ndarray], place: int,
        tokens: int, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        c, self.of = meta["config"], f"param/{place}/"
        width = z[f"{self.of}experts/const/wg"].shape[2]
        self.router: Any = router_class(width, tokens, **options_of(meta))
        self.scale = 1.0
        if meta["kind"] == "zero_computation_layer":
            self.scale = 1.0 if c["moe_use_mixtral_gating"] or c["moe_feature_no_mul_topk"] else float(c["top_k"])
        if place or "gate_residual" in z:
            self.router.follow(self.router)
        self.deep = [
            nn.Parameter(self._array(z, f"gate/wg/{i}/weight", dtype)) for i in (0, 2) if c.get("moe_2layer_gate")
        ]
        if c["ffn"] == "swiglu":
            given = (self._array(z, f"experts/{name}/weight", dtype) for name in ("up_proj", "down_proj"))
            self.experts: nn.Module = GatedExperts(*given)
        else:
            self.experts = Experts(c["n_ffn"], width, c["ffn_hidden"], gelu="tanh", identical=True)
        self.router.to(dtype).train(meta["kind"] == "zero_computation_paper")
        self.experts.to(dtype)
        with torch.no_grad():
            for theirs, parameter, turned in self.parameters():
                value = self._array(z, theirs, dtype)
                parameter.copy_(value.mT if turned else value)

    def _array(self, z: dict[str, np.ndarray], name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor(z[self.of + name]).to(dtype)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter, bool]]:
        router, experts = self.router, self.experts
        if self.deep:
            yield from ((f"gate/wg/{i}/weight", each, False) for i, each in zip((0, 2), self.deep, strict=True))
        else:
            yield "gate/wg/weight", router.gate.kernel, True
        if router.residual is not None:
            yield "gate/gate_map/weight", router.residual.weight, False
        if router.constants is not None:
            yield "experts/const/v", router.constants.vector, False
            yield "experts/const/wg", router.constants.kernel, False
        if isinstance(experts, GatedExperts):
            yield "experts/up_proj/weight", experts.up, False
            yield "experts/down_proj/weight", experts.down, False
        elif isinstance(experts, Experts):
            yield "experts/fc1/weight", experts.w1, True
            yield "experts/fc1/bias", experts.b1, False
            yield "experts/fc2/weight", experts.w2, True
            yield "experts/fc2/bias", experts.b2, False

    def __call__(self, x: Tensor, carried: Carried) -> tuple[Tensor, Any]:
        keep, shape = torch.ones(x.shape[:2], dtype=torch.bool), (x.shape[0], x.shape[1])
        if self.deep:
            logits = F.linear(F.linear(x, self.deep[0]).tanh(), self.deep[1])
            if self.router.residual is not None:
                logits = logits + self.router.residual(carried.logits)
            routing = self.router.route(logits, self.scale * x, keep, shape)
        elif self.scale != 1:
            routing = self.router.route(self.router.scores(x, carried), self.scale * x, keep, shape)
        else:
            routing = self.router(x, None, carried)
        rows = routing.dispatch(self.scale * x)
        return routing.combine(self.experts(rows, *([] if routing.offsets is None else [routing.offsets]))), routing


def compare_layers(
    router_class: type[Any], case: tuple[dict[str, Any], dict[str, np.ndarray]], dtype: torch.dtype
) -> Compared:
    """Yields (name, our value, theirs) for everything in a case."""
    meta, z = case
    given = torch.tensor(z["x"]).to(dtype).requires_grad_()
    x = given if given.ndim == 3 else given[None]
    before = torch.tensor(z["gate_residual"]).to(dtype).requires_grad_() if "gate_residual" in z else None
    carried = Carried(None if before is None else before.view(*x.shape[:2], -1))
    layers, outs, losses = [], [], []
    for place in range(meta["config"]["layers"]):
        layers.append(PlusPlusLayer(router_class, meta, z, place, x.shape[1], dtype))
        y, routing = layers[-1](x, carried)
        logits = routing.choices.logits
        yield from _decided(place, layers[-1].router, routing, z)
        name = "y_f32" if place == meta["config"]["layers"] - 1 else f"y of layer {place}"
        yield name, y.detach().view(z[f"out/{place}/y"].shape), torch.tensor(z[f"out/{place}/y"])
        outs.append(y)
        losses.append(routing.aux_loss)
        x, carried = x + y, routing.carried or Carried(logits)
    weight = torch.tensor(z["loss_weight"]).view_as(x)
    loss = (weight * outs[-1]).sum() + sum(losses)
    if meta["kind"] == "zero_computation_layer":
        loss = loss + 0.5 * sum((weight * y).sum() for y in outs[:-1])
    yield "loss", loss.detach(), torch.tensor(z["out/loss_f32"])
    loss.backward()
    assert given.grad is not None
    yield "gradient of x", given.grad, torch.tensor(z["grad/x"])
    if before is not None:
        assert before.grad is not None
        yield (
            "gradient of the residual",
            before.grad.view(z["grad/gate_residual"].shape),
            torch.tensor(z["grad/gate_residual"]),
        )
    for layer in layers:
        for theirs, parameter, turned in layer.parameters():
            assert parameter.grad is not None, theirs
            got = parameter.grad.mT if turned else parameter.grad
            yield f"gradient of {layer.of}{theirs}", got, torch.tensor(z[f"grad/{layer.of}{theirs}"])


def _decided(place: int, router: Any, routing: Any, z: dict[str, np.ndarray]) -> Compared:
    """What a layer decided, as far as the case says it."""
    chosen, weights, landed, _, logits, _ = routing.choices
    shares = logits.softmax(dim=2)
    votes = torch.zeros_like(shares[:, 0]).scatter_add(1, chosen.flatten(1), torch.ones_like(weights).flatten(1))
    found = {"logits": logits, "choice": chosen.int(), "choice_gate": weights, "probs": shares}
    found |= {"choice_kept": landed.to(torch.uint8), "f": votes / shares.shape[1], "P": shares.mean(dim=1)}
    found["balance_loss"] = routing.aux_loss
    if router.factor is not None:
        ffn, free = router.room(shares.shape[1])
        found["capacity"] = torch.tensor([ffn] * router.num_experts + [free] * router.num_free, dtype=torch.int32)
    for name, got in found.items():
        if f"out/{place}/{name}" in z:
            want = torch.tensor(z[f"out/{place}/{name}"])
            yield f"{name} of layer {place}", got.detach().view(want.shape), want
