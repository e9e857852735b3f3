"""Models from overrides."""

import torch
from timm.models.vision_transformer import VisionTransformer

from softmoe_cli.model.vit import build
from tests.oracles import compose


def make(*overrides: str, num_classes: int = 10) -> VisionTransformer:
    torch.manual_seed(0)
    return build(compose(*overrides).model, num_classes)
