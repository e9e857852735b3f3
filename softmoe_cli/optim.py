"""Parameter groups that know experts, and schedules as functions of the step."""

import math
import re
from collections.abc import Callable

import torch
from torch import nn

from softmoe_cli.config import Optim, UsageError

HEAD = re.compile(r"head\.weight")
KERNELS = re.compile(r".*((experts|shared)\.w[12]|router\.scale|router\.gate\.kernel)")


def decay_of(name: str, parameter: nn.Parameter, optim: Optim) -> float:
    """Weight decay of one parameter: of kernels, stacked or not, the sparse routers' gates among them, and of the
    soft router's scale.

    Biases (stacked ones are 2-D), norms, position tables, tokens and slot parameters (`phi`) have none. These are
    the official patterns: `head/kernel`, any other `kernel`, `Moe/Router/scale`.
    """
    if HEAD.fullmatch(name):
        return optim.head_weight_decay
    if KERNELS.fullmatch(name) or (name.endswith(".weight") and parameter.ndim > 1):
        return optim.weight_decay
    return 0.0


def adamw(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW over one group per weight decay; decay is decoupled and multiplied by the learning rate."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(decay_of(name, parameter, optim), []).append(parameter)
    device = next(model.parameters()).device
    return torch.optim.AdamW(
        [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()],
        lr=optim.lr,
        betas=(optim.betas[0], optim.betas[1]),
        eps=optim.eps,
        fused=device.type in ("cpu", "cuda"),  # the unfused update makes temporaries as large as the weights
    )


def span(value: float, total: float) -> float:
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
    warmup, cooldown = span(optim.warmup, total), span(optim.cooldown, total)
    if warmup + cooldown > total:
        raise UsageError(
            f"optim.warmup={optim.warmup:g} and optim.cooldown={optim.cooldown:g} do not fit a budget of {total:g}; "
            "shorten them or give shares below 1"
        )
    match optim.schedule:
        case "rsqrt":
            return lambda t: rsqrt(t, total, peak=optim.lr, warmup=warmup, cooldown=cooldown, timescale=optim.timescale)
        case "cosine":
            return lambda t: cosine(t, total, peak=optim.lr, warmup=warmup, final=optim.final_lr)
        case "linear":
            return lambda t: linear(t, total, peak=optim.lr, warmup=warmup, final=optim.final_lr)
        case _:
            return lambda t: constant(t, total, peak=optim.lr, warmup=warmup, cooldown=cooldown)
