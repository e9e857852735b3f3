"""What an export is of: torch is not needed to know."""

from typing import Any

from softmoe_cli.config.commands import ExportConfig
from softmoe_cli.config.model import Model
from softmoe_cli.run.header import Source
from softmoe_cli.run.identity import settings_of


def settings_of_export(config: ExportConfig, model: Model, source: Source) -> dict[str, Any]:
    """What decides the result, beside the source's weights."""
    chosen = {"formats": sorted(set(config.formats)), "data": settings_of(config.data), "images": config.images}
    chosen["pixels"] = timm_pixels(model, source.card)
    return chosen | ({"base": source.card["base"]["digest"]} if "base" in source.card else {})


def timm_pixels(model: Model, card: dict[str, Any]) -> dict[str, Any]:
    """How timm is to turn images into pixels: as when the model was measured."""
    return {
        "interpolation": "bicubic" if card["data"]["format"] else "bilinear",
        "crop_pct": card["data"]["crop_pct"] or 1.0,
        **{key: (card["data"][key] * model.in_chans)[: model.in_chans] for key in ("mean", "std")},
    }
