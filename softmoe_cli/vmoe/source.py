"""`checkpoint=vmoe:PATH`: official weights as a source like others, with a card that their shapes tell."""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from softmoe_cli.config.adapter import no_adapter
from softmoe_cli.errors import UsageError, nearest
from softmoe_cli.run.checkpoint import digest_of
from softmoe_cli.run.header import Source
from softmoe_cli.run.sealed import unreadable
from softmoe_cli.vmoe.arrays import Fault
from softmoe_cli.vmoe.files import parameters_in
from softmoe_cli.vmoe.layout import Mixture, Shapes, translated

MARK = "vmoe:"
PIXELS = 224
"""The side of images where nobody says another: official models begin with it."""
ROUTERS = "softmoe_cli.moe.routers"
TARGETS = {
    "soft": f"{ROUTERS}.soft.SoftRouter",
    "tokens_choice": f"{ROUTERS}.tokens_choice.TokensChoiceRouter",
    "tokens_choice_bpr": f"{ROUTERS}.tokens_choice_bpr.TokensChoiceBPRRouter",
    "experts_choice": f"{ROUTERS}.experts_choice.ExpertsChoiceRouter",
}
OF_TAKING = ("capacity_factor", "capacity_rounding", "capacity_multiple", "images_per_group")
OF_CHOOSING = ("k", *OF_TAKING)
"""What routers do that their weights do not show, by what `@KEY:VALUE` may say: of experts that take tokens, and of
tokens that choose."""
ROUNDINGS = ("ceil", "round")
_WORDS = re.compile(r"(.*?)((?:@[a-z_]+:[\w.]+)*)", re.DOTALL)
"""A path, which may have an @ itself, and what is said behind it."""


def read_official(checkpoint: str) -> Source:
    """Reads `vmoe:PATH` or `vmoe:PATH@KEY:VALUE...`: weights of vmoe, big_vision or vision_transformer, float32, under
    our names, and their card. What the weights do not show, KEY:VALUE says (`router`, `image_size`, OF_CHOOSING); the
    rest is as in the official configs.

    Raises:
        UsageError: nothing usable there, or a KEY without effect.
    """
    found = _WORDS.fullmatch(checkpoint.removeprefix(MARK))
    assert found is not None  # whatever the path
    name, words = found.groups()
    try:
        said = _said(words.split("@")[1:])
        weights, shapes = translated(parameters_in(Path(name)))
        router, blocks, assumed = _routers(shapes, said)
        side = _image_side(shapes, said)
        for each in (router, *blocks.values()):
            _require_room(each, (side // shapes.patch) ** 2 + shapes.class_token)
        if said:
            raise Fault(f"@{next(iter(said))} has no effect on such weights; leave it out")
    except Fault as fault:
        raise UsageError(f"checkpoint={checkpoint}: {fault}") from fault
    except (OSError, ValueError) as error:
        raise unreadable(checkpoint, error) from error
    if shapes.side is None:
        table = sincos2d(side // shapes.patch, shapes.width)
        weights["pos_embed"] = torch.cat([torch.zeros(int(shapes.class_token), shapes.width), table])[None]
        assumed.append(f"positions are computed (sincos2d), for images of {side} pixels; another size: @image_size:")
    card = _card(shapes, router, blocks, side)
    return Source(checkpoint, digest_of(weights), weights, card, assumed="; ".join(assumed))


def _said(words: Sequence[str]) -> dict[str, Any]:
    """What stands behind the path, as values."""
    known, said = ("router", "image_size", *OF_CHOOSING), {}
    for word in words:
        key, _, text = word.partition(":")
        if key not in known:
            raise Fault(f"@{key} is none of @{', @'.join(known)}.{nearest(key, known)}")
        if key in said:
            raise Fault(f"@{key} is said twice; leave one out")
        said[key] = text if key == "router" else _value(key, text)
    return said


def _value(key: str, text: str) -> str | int | float:
    """A value behind the path: what the routers could take, so that a fault is not laid at the file's door."""
    if key == "capacity_rounding":
        if text not in ROUNDINGS:
            raise Fault(f"@{key}:{text} is none of {', '.join(ROUNDINGS)}")
        return text
    digits = text.replace(".", "", 1)
    number = float(text) if digits.isascii() and digits.isdecimal() else 0.0
    if key == "capacity_factor" and not 0 < number < math.inf:
        raise Fault(f"@{key}:{text} is no number above 0")
    if key != "capacity_factor" and not (1 <= number < 2**31 and number.is_integer()):
        raise Fault(f"@{key}:{text} is no whole number from 1 on")
    return int(number) if number.is_integer() else number


def _routers(shapes: Shapes, said: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The router of most MoE blocks, those of the others, and what is taken as given; takes out of `said` what has an
    effect."""
    if not shapes.mixtures:
        return {"_target_": None}, {}, []
    sparse = [mixture for mixture in shapes.mixtures.values() if mixture.slots is None]
    kind = said.pop("router", "tokens_choice") if sparse else "soft"
    if kind not in TARGETS or (sparse and kind == "soft"):
        choices = [each for each in TARGETS if each != "soft"]
        raise Fault(f"@router:{kind} is none of {', '.join(choices)}.{nearest(str(kind), choices)}")
    given = (
        {key: said.pop(key) for key in (OF_TAKING if kind == "experts_choice" else OF_CHOOSING) if key in said}
        if sparse
        else {}
    )
    options = {place: _options(mixture, kind, given) for place, mixture in shapes.mixtures.items()}
    router = next(iter(options.values()))
    blocks = {str(place): each for place, each in options.items() if each != router}
    if not sparse or given:
        return router, blocks, []
    told = (
        "its experts are taken to choose as many tokens as there are for each; other capacities: @capacity_factor:"
        if kind == "experts_choice"
        else f"its weights do not show how tokens choose, so each is taken to choose {router['k']} experts with room "
        "for all, as in V-MoE; if it was trained otherwise: @k:1, @router:experts_choice, @capacity_factor:"
    )
    return router, blocks, [told]


def _options(mixture: Mixture, kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """A router's options: what the weights show, what was said, and the rest as in the official configs."""
    options: dict[str, Any] = {"_target_": TARGETS[kind if mixture.slots is None else "soft"]}
    options["num_experts"] = mixture.experts
    if mixture.slots is not None:
        return options | {"slots_per_expert": mixture.slots, "capacity_factor": None, "noise_std": 0.0}
    options |= {"slots_per_expert": None, "capacity_factor": 1.0, "capacity_rounding": "round", "capacity_multiple": 1}
    options |= {"images_per_group": 1, "renormalise": False, "noise_std": 1.0}
    if kind != "experts_choice":
        k = given.get("k", min(2, mixture.experts))
        if type(k) is not int or not 0 < k <= mixture.experts:
            raise Fault(f"@k:{k} is no number from 1 to {mixture.experts}, of its experts")
        options |= {"k": k, "gate": "softmax", "capacity_factor": mixture.experts / k}
        options |= {"importance_weight": 0.005, "load_weight": 0.005, "gshard_weight": 0.0, "bias_rate": 0.0}
        options |= {"shared_experts": 0}
    return options | given


def _require_room(router: dict[str, Any], tokens: int) -> None:
    """Checks that each expert has a slot."""
    if router.get("capacity_factor") is None:
        return
    choices = tokens * router["images_per_group"] * router.get("k", 1)
    experts, factor = router["num_experts"], router["capacity_factor"]
    exact = choices * factor / experts
    if (math.ceil(exact) if router["capacity_rounding"] == "ceil" else round(exact)) < 1:
        raise Fault(
            f"@capacity_factor:{factor:g} gives no slot to any of {experts} experts, of {choices:,} choices; say a "
            "larger one"
        )


def _image_side(shapes: Shapes, said: dict[str, Any]) -> int:
    """Pixels on a side of the images that the weights are for."""
    if shapes.side is not None:
        return shapes.side * shapes.patch
    side = said.pop("image_size", PIXELS)
    if type(side) is not int or side % shapes.patch or side <= 0:
        raise Fault(f"images of {side} pixels are no whole patches of {shapes.patch}; say @image_size:")
    return side


def _card(shapes: Shapes, router: dict[str, Any], blocks: dict[str, Any], side: int) -> dict[str, Any]:
    """The card that a checkpoint of ours would have. Classes have no names there: their numbers stand for them."""
    backbone = {
        "name": f"official_{shapes.width}x{shapes.depth}_{shapes.patch}",
        "timm": None,
        "patch_size": shapes.patch,
        "width": shapes.width,
        "depth": shapes.depth,
        "heads": shapes.heads,
        "mlp_width": shapes.mlp_width,
        "class_token": shapes.class_token,
        "pool": "token" if shapes.class_token else "avg",
        "norm_after_pool": False,
        "qk_norm": "scale" if shapes.qk_norm else "none",
        "gelu": "tanh",
        "norm_eps": 1e-6,
        "pos_std": 0.02,
        "layer_scale": None,
        "drop_path": 0.0,
        "init": "official",
        "pre_logits": shapes.pre_logits,
    }
    model = {
        "backbone": backbone,
        "adapter": dataclasses.asdict(no_adapter()),
        "router": router,
        "image_size": side,
        "in_chans": shapes.channels,
        "moe_blocks": sorted(shapes.mixtures),
        "blocks": blocks,
        "expert_init": "identical",
        "expert_width": shapes.expert_width,
        "tasks": None,
        "head": "linear",
        "head_experts": None,
        "head_norm": None,
    }
    return {
        "model": model,
        "data": {"mean": [0.5], "std": [0.5]},
        "classes": [str(number) for number in range(shapes.classes or 0)],
        "unnamed": True,
        "loss": "softmax",
        "precision": "fp32",
    }


def sincos2d(side: int, width: int) -> Float[Tensor, "n d"]:
    """Fixed positions of a square grid of patches, as in MoCo v3 and big_vision (posemb_sincos_2d): sine and cosine of
    the column and of the row, each for width / 4 wavelengths from 2 pi to 20,000 pi patches.

    Raises:
        Fault: a width that has no fourth, or only one wavelength.
    """
    if width % 4 or width < 8:
        raise Fault(f"positions are computed for widths that are multiples of 4 from 8 on, and its width is {width}")
    omega = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4 - 1))
    rows = torch.arange(side, dtype=torch.float64).repeat_interleave(side)[:, None] * omega
    columns = torch.arange(side, dtype=torch.float64).repeat(side)[:, None] * omega
    return torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=1).float()
