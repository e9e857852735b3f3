"""What is done to the pixels of a batch, as pure functions."""

import math
import random

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn import functional as F

from softmoe_cli.config.data import Data

CACHED = 2**18
"""Numbers that a CPU's cache holds, so that pixels stay in it from one operation to the next."""


def pixel_statistics(data: Data, device: torch.device) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    return torch.tensor(data.mean, device=device), torch.tensor(data.std, device=device)


def normalise(
    raw: UInt8[Tensor, "b c s s"], in_chans: int, mean: Float[Tensor, " m"], std: Float[Tensor, " m"]
) -> Float[Tensor, "b c2 s s"]:
    """Pixels as the model takes them; grey is repeated first, so that each channel has its own mean and deviation."""
    x = torch.empty(len(raw), in_chans, *raw.shape[2:], device=raw.device)
    at_once = len(raw) if raw.is_cuda else max(1, CACHED // x[0].numel())
    for part, source in zip(x.split(at_once), raw.split(at_once), strict=True):
        part.copy_(source).div_(255).sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
    return x


def resize(x: Float[Tensor, "b c s s"], side: int) -> Float[Tensor, "b c t t"]:
    if x.shape[-1] == side:
        return x.contiguous()
    return F.interpolate(x, size=(side, side), mode="bilinear", antialias=True)


def shift_crop(
    x: Float[Tensor, "b c s s"], shift: Int64[Tensor, "2 b"], fill: Float[Tensor, " c"]
) -> Float[Tensor, "b c s s"]:
    """Each image moved by its own (down, right) pixels; what comes in from outside is `fill`."""
    b, c, s, _ = x.shape
    reach = int(shift.abs().max())
    padded = fill.view(1, c, 1, 1).repeat(b, 1, s + 2 * reach, s + 2 * reach)
    padded[:, :, reach : reach + s, reach : reach + s] = x
    along = torch.arange(s, device=x.device)
    rows = (along + reach - shift[0, :, None])[:, None, :, None]
    columns = (along + reach - shift[1, :, None])[:, None, None, :]
    images = torch.arange(b, device=x.device).view(b, 1, 1, 1)
    channels = torch.arange(c, device=x.device).view(1, c, 1, 1)
    return padded[images, channels, rows, columns]


def boxes(count: int, area: float, rng: torch.Generator) -> Float[Tensor, "b 4"]:
    """Random crops (top, left, height, width) as shares of the side: area uniform in [area, 1], aspect log-uniform
    in [3/4, 4/3], cut to the image where one side would stick out."""
    areas = torch.empty(count).uniform_(area, 1, generator=rng)
    aspect = torch.empty(count).uniform_(math.log(3 / 4), math.log(4 / 3), generator=rng).exp()
    height, width = (areas / aspect).sqrt().clamp(max=1), (areas * aspect).sqrt().clamp(max=1)
    top, left = torch.rand(2, count, generator=rng)
    return torch.stack([top * (1 - height), left * (1 - width), height, width], dim=1)


def resized_crop(x: Float[Tensor, "b c s s"], box: Float[Tensor, "b 4"], side: int) -> Float[Tensor, "b c t t"]:
    """Each image's box, bilinearly resized to `side` pixels in one pass."""
    top, left, height, width = box.unbind(1)
    theta = torch.zeros(len(x), 2, 3, device=x.device)
    theta[:, 0, 0], theta[:, 1, 1] = width, height
    theta[:, 0, 2], theta[:, 1, 2] = 2 * left + width - 1, 2 * top + height - 1
    grid = F.affine_grid(theta, [len(x), x.shape[1], side, side], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def randaugment(
    raw: UInt8[Tensor, "b c s s"], operations: list[int], seeds: Int64[Tensor, " b"]
) -> UInt8[Tensor, "b c s s"]:
    """torchvision's RandAugment, image by image; it draws from torch's own random state, which is put back."""
    from torchvision.transforms.v2 import RandAugment

    change = RandAugment(num_ops=operations[0], magnitude=operations[1])
    changed = []
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(raw, seeds.tolist(), strict=True):
            torch.default_generator.manual_seed(seed)
            changed.append(change(image))
    return torch.stack(changed)


def erased(probability: float, x: Float[Tensor, "b c s s"], seeds: Int64[Tensor, " b"]) -> Float[Tensor, "b c s s"]:
    """timm's random erasing with noise, of 2% to 33% of an image's area, image by image. It draws boxes from Python's
    and noise from torch's random state; both are put back. Noise is drawn on the CPU: the same on every device."""
    erase = RandomErasing(probability, mode="pixel", device="cpu")
    before = random.getstate()
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(x := x.contiguous(), seeds.tolist(), strict=True):
            random.seed(seed)
            torch.default_generator.manual_seed(seed)
            erase(image)  # in place
    random.setstate(before)
    return x


def mixed_images(
    mixup: Mixup, x: Float[Tensor, "b c s s"], labels: Int64[Tensor, " b"], seed: int
) -> tuple[Float[Tensor, "b c s s"], Float[Tensor, "b classes"]]:
    """timm's mixup and cutmix; they draw from numpy's global state, which is put back."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    mixed: tuple[Tensor, Tensor] = mixup(x.contiguous(), labels)
    np.random.set_state(before)
    return mixed[0], mixed[1].to(x.dtype)
