"""Parameter groups that know experts, and schedules as functions of the step."""

import difflib
import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from softmoe_cli.config.recipe import Optim
from softmoe_cli.errors import UsageError
from softmoe_cli.moe.kind import Decider, Layer
from softmoe_cli.parallel import part_of
from softmoe_cli.text import aligned, several

STEM = ("patch_embed.", "pos_embed", "cls_token", "reg_token", "norm_pre.")
FEWEST_8BIT, BLOCK_8BIT = 4096, 256
"""bitsandbytes: parameters of fewer numbers keep fp32 moments; others share a float32 scale in runs of so many."""
FUSED = ("cpu", "cuda")
"""Devices with fused updates: others make temporaries as large as the weights."""
STACKED = re.compile(r".*(experts|shared)\.w[12]")


def decays(model: nn.Module, optim: Optim) -> dict[str, float]:
    """Weight decay of each parameter: kernels, stacked or not, have it, and so do the parameters that a router
    or layer names.

    Biases (stacked ones are 2-D), norms, position tables and tokens have none. These are the official patterns:
    `head/kernel`, any other `kernel`, `Moe/Router/scale`.
    """
    decay_of = {}
    for name, parameter in model.named_parameters():
        matrix = STACKED.fullmatch(name) or (name.endswith(".weight") and parameter.ndim > 1)
        decay_of[name] = optim.weight_decay if matrix else 0.0
    for place, module in model.named_modules():
        if isinstance(module, Decider | Layer) and module.decays is not None:
            for name, _ in module.named_parameters():
                decay_of[f"{place}.{name}"] = optim.weight_decay if name in module.decays else 0.0
    for name in decay_of:
        if name.startswith("head.") and name != "head.bias":
            decay_of[name] = optim.head_weight_decay
    return decay_of


def layer_of(name: str, depth: int) -> int:
    """0 for what makes tokens (patches, positions, class token, registers), i + 1 for block i, depth + 1 for the rest:
    the final norm and the head. As in BEiT (Bao et al., 2022); timm counts the final norm to the last block."""
    if name.startswith(STEM):
        return 0
    return 1 + int(name.split(".")[1]) if name.startswith("blocks.") else depth + 1


@dataclass(frozen=True)
class Setting:
    """What an optimizer does with one parameter."""

    name: str
    parameter: nn.Parameter
    layer: int
    lr_scale: float
    weight_decay: float

    @property
    def frozen(self) -> bool:
        return not self.parameter.requires_grad

    def told(self) -> dict[str, Any]:
        """The row for a program."""
        row = {"parameter": self.name, "shape": list(self.parameter.shape), "layer": self.layer, "frozen": self.frozen}
        return row | {"lr_scale": self.lr_scale, "weight_decay": self.weight_decay}


def settings(model: nn.Module, optim: Optim) -> list[Setting]:
    """A row for every parameter. Stacked experts are in their block's layer, with the decay of the matrices and biases
    that they are stacks of; what is frozen has neither rate nor decay."""
    depth = len({name.split(".")[1] for name, _ in model.named_parameters() if name.startswith("blocks.")})
    decay_of, rows = decays(model, optim), []
    for name, parameter in model.named_parameters():
        layer, trained = layer_of(name, depth), parameter.requires_grad
        scale = 1.0 if optim.layer_decay is None else optim.layer_decay ** (depth + 1 - layer)
        decay = decay_of[name]
        rows.append(Setting(name, parameter, layer, scale if trained else 0.0, decay if trained else 0.0))
    return rows


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Parameters whose names match one of the shell patterns get no gradient any more.

    Raises:
        UsageError: a pattern that matches nothing, or nothing that is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            places = {f"{name[:i]}.*" for name in names for i, letter in enumerate(name) if letter == "."}
            near = difflib.get_close_matches(pattern, [*names, *sorted(places)], n=3, cutoff=0.4)
            some = near or sorted({place for place in places if place.count(".") == 1})
            raise UsageError(f"optim.freeze: '{pattern}' matches no parameter; there are {', '.join(some)}")
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"optim.freeze={list(patterns)} leaves nothing to train; take a pattern away")


def optimizer_of(model: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """The optimizer of all parameters that are not frozen, with one group per weight decay and share of the learning
    rate (`lr_scale`, for the code that sets the rate). AdamW's decay is decoupled and multiplied by the learning rate;
    SGD's is a part of the gradient. SGD's momentum is a plain sum of gradients, as in optax: buffer = momentum * buffer
    + gradient."""
    groups: dict[tuple[float, float, type[Tensor]], list[nn.Parameter]] = {}
    for row in settings(model, optim):
        if not row.frozen:
            kind = type(row.parameter.data)  # parts of divided weights are updated apart from whole ones
            groups.setdefault((row.weight_decay, row.lr_scale, kind), []).append(row.parameter)
    device = next(model.parameters()).device
    params = [
        {"params": parameters, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale, _), parameters in groups.items()
    ]
    if optim.name == "sgd":
        assert optim.momentum is not None
        whole = all(kind is Tensor for *_, kind in groups)  # torch has no fused update of parts
        return torch.optim.SGD(params, lr=optim.lr, momentum=optim.momentum, fused=device.type in FUSED and whole)
    betas = (optim.betas[0], optim.betas[1])
    if optim.moments == "8bit":
        import bitsandbytes  # an extra, which takes seconds to import

        return bitsandbytes.optim.AdamW8bit(params, lr=optim.lr, betas=betas, eps=optim.eps, min_8bit_size=FEWEST_8BIT)
    if optim.moments == "offload":
        return OffloadedAdamW(params, lr=optim.lr, betas=betas, eps=optim.eps, fused=False)
    return adamw_of(params, device, lr=optim.lr, betas=betas, eps=optim.eps)


def adamw_of(params: Iterable[Any], device: torch.device, **rates: Any) -> torch.optim.AdamW:
    """AdamW with moments in float32 of parameters that all lie on this device."""
    fused = device.type in FUSED
    return (FusedAdamW if fused else torch.optim.AdamW)(params, fused=fused, **rates)


class FusedAdamW(torch.optim.AdamW):
    """AdamW with one fused operation for a group. torch's own `step` makes that call too, but for parameters on several
    devices, tensors as rates and more that does not occur here; of a model with 60 small parameters that takes as long
    as the update (experiments/loop_overhead)."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        updated = [[each for each in group["params"] if each.grad is not None] for group in self.param_groups]
        first = any(not self.state[each] for parameters in updated for each in parameters)
        if first or getattr(self, "found_inf", None) is not None:  # moments are made; or a scaler's scale counts
            super().step()
            return
        for group, parameters in zip(self.param_groups, updated, strict=True):
            if not parameters:
                continue
            states = [self.state[each] for each in parameters]
            gradients, steps = [each.grad for each in parameters], [state["step"] for state in states]
            torch._foreach_add_(steps, [torch.ones_like(steps[0])] * len(steps))  # 1 would be cast for each
            torch._fused_adamw_(
                parameters, gradients, [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states], [], steps, lr=group["lr"], beta1=group["betas"][0],
                beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
                maximize=False,
            )  # fmt: skip


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW with its moments in the machine's memory, where it computes: of each parameter the weight and the gradient
    go there, and the weight comes back. (As ZeRO-Offload, Ren et al., 2021, but one after the other.)"""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rates = {key: group[key] for key in ("lr", "weight_decay", "eps")}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state |= {key: torch.zeros_like(parameter, device="cpu") for key in ("exp_avg", "exp_avg_sq")}
                weight = parameter.cpu()
                beta1, beta2 = group["betas"]
                adamw(
                    [weight], [parameter.grad.cpu()], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
                    fused=True, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2, **rates,
                )  # fmt: skip
                parameter.copy_(weight)


def state_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer keeps of a parameter; empty before its first update."""
    state = optimizer.state.get(parameter, {})
    return {key: torch.as_tensor(value) for key, value in state.items() if not key.startswith("qmap")}  # a constant


def restore(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
    """Lets the optimizer go on from what `state_of` has given, or afresh from nothing."""
    optimizer.state.pop(parameter, None)
    if isinstance(optimizer, OffloadedAdamW) and state:
        optimizer.state[parameter] = dict(state)
    elif "state1" in state:  # bitsandbytes
        kept: dict[str, Any] = {key: value.to(parameter.device) for key, value in state.items()}
        kept["step"] = int(state["step"])
        if "absmax1" in kept:
            codes = {"qmap1": "dynamic", "qmap2": "udynamic"}
            maps = vars(optimizer)["name2qmap"]
            kept |= {key: maps[code].to(parameter.device) for key, code in codes.items()}
        optimizer.state[parameter] = kept
    elif state:
        optimizer.state[parameter] = {key: part_of(value, parameter) for key, value in state.items()}


def table(model: nn.Module, optim: Optim) -> str:
    """A line for each parameter: shape, layer, share of the learning rate, weight decay; and what they add up to."""
    head = ["parameter", "shape", "layer", "lr scale", "weight decay"]
    rows = settings(model, optim)
    lines = [
        [row.name, "x".join(map(str, row.parameter.shape)) or "1", str(row.layer)]
        + (["frozen", ""] if row.frozen else [f"{row.lr_scale:.4g}", f"{row.weight_decay:g}"])
        for row in rows
    ]
    trained = [row for row in rows if not row.frozen]
    groups = len({(row.weight_decay, row.lr_scale) for row in trained})
    some, every = (sum(row.parameter.numel() for row in part) for part in (trained, rows))
    end = f"{optim.name} trains {some:,} of {every:,} parameters in {several(groups, 'group')}"
    return f"{aligned([head, *lines], False)}\n\n{end}"


def moment_bytes(optim: Optim | None, numbers: int) -> int:
    """Bytes of the moments of a parameter of so many numbers; without `optim`, of AdamW's moments in float32."""
    if optim is not None and optim.name == "sgd":
        return 4 * numbers if optim.momentum else 0
    if optim is not None and optim.moments == "8bit" and numbers >= FEWEST_8BIT:
        return 2 * (numbers + 4 * math.ceil(numbers / BLOCK_8BIT))
    return 8 * numbers


def span_length(value: float, total: float) -> float:
    """A span of the config: below 1 a share of the budget `total`, else the same unit as `total`."""
    return value * total if value < 1 else value


def rsqrt(t: float, total: float, *, peak: float, warmup: float, cooldown: float, timescale: float) -> float:
    """big_vision's inverse square root: peak / sqrt(1 + (t - warmup) / timescale), frozen where the cooldown begins.

    The cooldown is linear to 0 at `total` and goes on below it, as the official code does.
    """
    if t < warmup:
        return peak * t / warmup
    if t < total - cooldown or cooldown == 0:
        return peak / math.sqrt(1 + (t - warmup) / timescale)
    return peak / math.sqrt(1 + (total - warmup - cooldown) / timescale) * (total - t) / cooldown


def cosine(t: float, total: float, *, peak: float, warmup: float, final: float) -> float:
    """Linear warmup from 0, then half a cosine to `final` at `total`."""
    if t < warmup:
        return peak * t / warmup
    done = min(1.0, (t - warmup) / max(total - warmup, 1e-12))
    return final + (peak - final) * (1 + math.cos(math.pi * done)) / 2


def linear(t: float, total: float, *, peak: float, warmup: float, final: float) -> float:
    """Linear warmup from 0, then a line to `final` at `total`, constant after."""
    if t < warmup:
        return peak * t / warmup
    return peak + (final - peak) * min(1.0, (t - warmup) / max(total - warmup, 1e-12))


def constant(t: float, total: float, *, peak: float, warmup: float, cooldown: float) -> float:
    """Linear warmup from 0, constant, linear cooldown to 0 at `total`."""
    if t < warmup:
        return peak * t / warmup
    return peak * min(1.0, (total - t) / cooldown) if cooldown else peak


def schedule(optim: Optim, total: float) -> Callable[[float], float]:
    """The learning rate as a function of the position: steps of `total` steps, or seconds of `total` seconds."""
    warmup, cooldown = span_length(optim.warmup, total), span_length(optim.cooldown, total)
    if warmup + cooldown > total * (1 + 1e-9):  # shares that add up to one may be above it by a rounding
        raise UsageError(
            f"optim.warmup={optim.warmup:g} and optim.cooldown={optim.cooldown:g} do not fit a budget of {total:g}; "
            "shorten them or give shares below 1"
        )
    cooldown = min(cooldown, total - warmup)
    match optim.schedule:
        case "rsqrt":
            return lambda t: rsqrt(t, total, peak=optim.lr, warmup=warmup, cooldown=cooldown, timescale=optim.timescale)
        case "cosine":
            return lambda t: cosine(t, total, peak=optim.lr, warmup=warmup, final=optim.final_lr)
        case "linear":
            return lambda t: linear(t, total, peak=optim.lr, warmup=warmup, final=optim.final_lr)
        case _:
            return lambda t: constant(t, total, peak=optim.lr, warmup=warmup, cooldown=cooldown)
