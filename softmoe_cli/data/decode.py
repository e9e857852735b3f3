"""From an image to a square of pixels."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from softmoe_cli.config.data import Data
from softmoe_cli.data.archives import Stored
from softmoe_cli.data.picture import opened


def squares(stored: Stored, data: Data) -> UInt8[Tensor, "n c s s"]:
    """The centre squares of all images, as `data` has them.

    Raises:
        UsageError: one of them cannot be read.
    """
    with ThreadPoolExecutor() as pool:  # PIL decodes outside Python's lock
        decoded = pool.map(
            lambda i: centre(opened(stored, i, data.channels, data.max_megapixels), data.image_size, data.crop_pct),
            range(len(stored)),
        )
        return torch.stack(list(decoded))


MOST_RESIZED = 10**8
"""The most pixels of an image when it is resized."""


def centre(image: Image.Image, side: int, crop_pct: float | None) -> UInt8[Tensor, "c s s"]:
    """The centre square of an image, `side` pixels large (bicubic, antialiased).

    With crop_pct, timm's evaluation transform: the shorter side becomes floor(side / crop_pct) pixels, and of that the
    centre is kept.
    """
    width, height = image.size
    if crop_pct is None:
        cut = min(width, height)
        left, top = (width - cut) / 2, (height - cut) / 2
        return _pixels(image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + cut, top + cut)))
    shorter = math.floor(side / crop_pct)
    w, h = (int(shorter * length / min(width, height)) for length in (width, height))
    x, y = round((w - side) / 2), round((h - side) / 2)
    if w * h > MOST_RESIZED:  # a very long image, or a very small share of one: only what is kept is made
        box = (x * width / w, y * height / h, (x + side) * width / w, (y + side) * height / h)
        return _pixels(image.resize((side, side), Image.Resampling.BICUBIC, box=box))
    return _pixels(image.resize((w, h), Image.Resampling.BICUBIC).crop((x, y, x + side, y + side)))


def random_square(image: Image.Image, side: int, area: float, hflip: float) -> UInt8[Tensor, "c s s"]:
    """timm's training transform: a random part of random area and aspect, resized (bicubic, antialiased), perhaps
    mirrored. It draws from torch's own random state."""
    top, left, height, width = RandomResizedCrop.get_params(image, [area, 1.0], [3 / 4, 4 / 3])
    square = image.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BICUBIC)
    if hflip and float(torch.rand(())) < hflip:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _pixels(square)


def _pixels(image: Image.Image) -> UInt8[Tensor, "c s s"]:
    return torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)
