"""Views: an image as it might have been seen, turned, cut, covered, lighter and noisier. Pure functions.

Where each of K images is a class of its own, its views are the images of that class (Dosovitskiy et al., 2014,
Discriminative Unsupervised Feature Learning with Convolutional Neural Networks, Section 2,
https://arxiv.org/abs/1406.6909). Moving, scaling, turning and lighting are that paper's kinds of change, covering and
noise are not; its changes of colour are left out, as grey images have none; the ranges are our own.
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

TURN, SHEAR, SCALE, MOVE = 20.0, 0.15, 1.2, 0.1
"""Affine, at strength 1: by up to so many degrees either way; by so much of the height sideways; to between 1 / so many
and so many times the size; by so much of the side in each direction."""
AREA, ASPECT = 0.3, 4 / 3
"""Crop, at strength 1: of the area up to so much is cut off; width by height is between 1 / so much and so much. (At
strength 2, the most there is, at least two fifths of the area stay.)"""
COVERED = 0.4
"""Erasing, at strength 1: a box of one grey has up to so much of the height and of the width."""
BRIGHTNESS = 1.3
"""At strength 1 pixels are multiplied by 1 / so much to so much."""
NOISE = 0.1
"""At strength 1 a view has noise of up to so much of white: each pixel differs by any amount up to that of its view."""


def described(strength: float) -> str:
    """What a view is, in a line."""
    s = strength
    if s == 0:
        return "the image itself (data.strength=0)"
    return (
        f"turned by ±{TURN * s:.3g}°, sheared by ±{SHEAR * s:.2g}, scaled by {SCALE**-s:.2g} to {SCALE**s:.2g}, moved "
        f"by ±{MOVE * s:.2g} of the side, cropped to {1 - AREA * s:.2g} of the area or more, behind a grey box of up "
        f"to {COVERED * s:.2g} of each side, {BRIGHTNESS**-s:.2g} to {BRIGHTNESS**s:.2g} times as bright, with noise "
        f"of up to {NOISE * s:.2g} of white"
    )


@dataclass(frozen=True)
class Views:
    """What is done to each of b images."""

    matrix: Float[Tensor, "b 2 3"]
    """From a view's (x, y, 1) to the image's (x, y); both sides are from -1 to 1."""
    box: Float[Tensor, "b 4"]
    """What is covered: top, left, height, width as shares of the side."""
    grey: Float[Tensor, " b"]
    """Of the box, as a share of white."""
    brightness: Float[Tensor, " b"]
    noise: Float[Tensor, " b"]
    """The most that it changes a pixel, as a share of white."""
    seeds: Int64[Tensor, " b"]
    """Of the noise."""

    def of(self, rows: Int64[Tensor, " r"] | slice, device: torch.device) -> "Views":
        """Those of some of the images."""
        return Views(*(getattr(self, field.name)[rows].to(device) for field in dataclasses.fields(self)))


def drawn_views(count: int, strength: float, chance: torch.Generator) -> Views:
    """A view for each of `count` images. All is drawn on the CPU, so that every device sees the same.

    The matrix is the crop's, then scaling, shearing, turning, moving: it finds for each place of the view the place in
    the image that is seen there. What lies outside the image is black.
    """
    s, b = strength, count
    share = torch.rand(16, b, generator=chance)
    either = share * 2 - 1  # from -1 to 1
    turn, shear, scale = either[0] * (math.radians(TURN) * s), either[1] * (SHEAR * s), SCALE ** (either[2] * s)
    area, aspect = 1 - AREA * s * share[3], ASPECT ** (either[4] * s)
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    across, down = either[5] * (1 - width), either[6] * (1 - height)  # the middle of the crop
    cosine, sine = turn.cos() * scale, turn.sin() * scale
    rows = [cosine, cosine * shear - sine], [sine, sine * shear + cosine]
    moved = either[7:9] * (2 * MOVE * s)
    matrix = [[x * width, y * height, x * across + y * down + by] for (x, y), by in zip(rows, moved, strict=True)]
    sides = COVERED * s * share[9:11]
    corner = share[11:13] * (1 - sides)
    return Views(
        torch.stack([each for row in matrix for each in row], dim=1).view(b, 2, 3),
        torch.cat([corner, sides]).T.contiguous(),
        grey=share[13],
        brightness=BRIGHTNESS ** (either[14] * s),
        noise=share[15] * (NOISE * s),
        seeds=torch.randint(2**62, (b,), generator=chance),
    )


def viewed(raw: UInt8[Tensor, "b c s s"], views: Views) -> UInt8[Tensor, "b c s s"]:
    """The views of images: placed, covered, lit, noisy, and rounded to 8 bits as images are."""
    x = placed(raw.float(), views.matrix)
    x = torch.where(covered(views.box, x.shape[-1]), 255 * views.grey.view(-1, 1, 1, 1), x)
    x *= views.brightness.view(-1, 1, 1, 1)
    x += noise(views.seeds, x[0].numel()).view_as(x) * (255 * views.noise.view(-1, 1, 1, 1))
    return x.clamp_(0, 255).round_().to(torch.uint8)


def placed(x: Float[Tensor, "b c s s"], matrix: Float[Tensor, "b 2 3"]) -> Float[Tensor, "b c s s"]:
    """For each pixel of the view what the image has at the place that the matrix names, between pixels bilinear, and 0
    outside. The grid is made without matrix products: these round an image by how many are beside it."""
    s = x.shape[-1]
    along = (2 * torch.arange(s, device=x.device) + 1) / s - 1
    m = matrix[:, :, :, None, None]
    grid = m[:, :, 0] * along + m[:, :, 1] * along[:, None] + m[:, :, 2]  # b 2 s s
    return F.grid_sample(x, grid.permute(0, 2, 3, 1), padding_mode="zeros", align_corners=False)


def covered(box: Float[Tensor, "b 4"], side: int) -> Bool[Tensor, "b 1 s s"]:
    """Which pixels have their middle in the box."""
    middle = (torch.arange(side, device=box.device) + 0.5) / side
    begin, sides = box[:, :2, None], box[:, 2:, None]
    inside = (begin <= middle) & (middle < begin + sides)  # b 2 s
    return (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]


def noise(seeds: Int64[Tensor, " b"], count: int) -> Float[Tensor, "b n"]:
    """`count` numbers from -1 to 1 for each seed, all equally likely. They are a function of the seed and the number's
    place alone, computed with whole numbers: the same on every device, and whatever other images are beside.

    SplitMix64 (Steele, Lea and Flood, 2014, Fast Splittable Pseudorandom Number Generators), of whose 64 bits each 16
    are a number.
    """
    z = torch.arange(1, -(-count // 4) + 1, device=seeds.device) * -0x61C8864680B583EB + seeds[:, None]
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z ^= (z >> shift) & (2 ** (64 - shift) - 1)  # torch shifts the sign in
        z *= factor
    z ^= (z >> 31) & (2**33 - 1)
    return (z.view(torch.int16)[:, :count].float() + 0.5) / 2**15
