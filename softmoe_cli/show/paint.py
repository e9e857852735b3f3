"""Maps of patches as pixels: one colour for each expert, or a scale of colours for a weight. Plain arrays; nothing here
knows models."""

import colorsys
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

Pixels = UInt8[np.ndarray, "s s 3"]
SIDE = 128
"""Pixels of a side that a picture has at least."""
CLEAR = 0.75
"""How much of a map's colour is seen before the image that shines through it."""
DROPPED_GREY, CROSS, FRAME = (128, 128, 128), (0, 0, 0), (255, 0, 160)
"""Of a dropped patch, of the cross in it, and of the frame around a patch that is meant."""
FIRST_COLOURS = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
    (148, 103, 255),
)  # fmt: skip
"""Those of Okabe and Ito, which people with any kind of sight can tell apart, and one more."""
HEAT = (
    (68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99),
    (170, 220, 50), (253, 231, 37),
)  # fmt: skip
"""viridis at nine places: brighter is more, in grey too."""


@dataclass(frozen=True)
class Cell:
    """One picture of a sheet with its words."""

    pixels: Pixels
    caption: str


@dataclass(frozen=True)
class Sheet:
    """Rows of pictures that belong together. `name` is that of its file; `legend` a word for each colour."""

    name: str
    title: str
    note: str
    rows: list[list[Cell]]
    legend: list[tuple[str, tuple[int, int, int]]] = field(default_factory=list)


def colours(number: int) -> UInt8[np.ndarray, "e 3"]:
    """A colour for each of so many experts; the first ones are the same whatever the number."""
    found = list(FIRST_COLOURS[:number])
    for i in range(len(found), number):  # steps of the golden ratio around the wheel: neighbours lie far apart
        hue, saturation, value = (0.13 + i * 0.6180339887) % 1, (0.55, 0.8, 0.95)[i % 3], 0.95 - i % 2 / 4
        red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, saturation, value))
        found.append((red, green, blue))
    return np.array(found, np.uint8).reshape(-1, 3)


def enlarged(picture: UInt8[np.ndarray, "s s 3"]) -> UInt8[np.ndarray, "t t 3"]:
    """Every pixel as a square of pixels, so that a side has SIDE at least."""
    factor = max(1, -(-SIDE // len(picture)))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def over_pixels(map_: np.ndarray, side: int) -> np.ndarray:
    """A map of patches (h, w, ...) as one of pixels (side, side, ...)."""
    rows, columns = (np.arange(side) * length // side for length in map_.shape[:2])
    return map_[rows][:, columns]


def expert_map(
    experts: Int[np.ndarray, "h w"], palette: UInt8[np.ndarray, "e 3"], image: UInt8[np.ndarray, "s s 3"]
) -> UInt8[np.ndarray, "t t 3"]:
    """Each patch of an image in the colour of its expert, the image in grey behind it; where there is none (-1), grey
    with a cross."""
    seen = enlarged(image)
    side = len(seen)
    behind = np.broadcast_to(seen.mean(axis=2, keepdims=True), seen.shape)
    colour = np.concatenate([palette, np.array([DROPPED_GREY], np.uint8)])[experts]  # -1 is the last
    painted = (CLEAR * over_pixels(colour, side) + (1 - CLEAR) * behind).round().astype(np.uint8)
    return _crossed(painted, over_pixels(experts < 0, side), experts.shape)


def _crossed(
    picture: UInt8[np.ndarray, "t t 3"], dropped: np.ndarray, grid: tuple[int, ...]
) -> UInt8[np.ndarray, "t t 3"]:
    """Both diagonals of the dropped patches."""
    side, (h, w) = len(picture), grid[:2]
    y, x = np.mgrid[:side, :side]
    down, across = (y * h % side) / side, (x * w % side) / side  # from 0 to 1 within a patch
    near = 1.2 * max(h, w) / side
    cross = (np.abs(down - across) < near) | (np.abs(down + across - 1) < near)
    return np.where((dropped & cross)[..., None], np.array(CROSS, np.uint8), picture)


def heat_map(
    weights: Float[np.ndarray, "h w"], most: float, side: int, least: float = 0.0
) -> UInt8[np.ndarray, "t t 3"]:
    """Weights from `least` to `most` as colours, for an image of `side` pixels."""
    share = (weights - least) / (most - least) if most > least else np.zeros_like(weights)
    place = np.clip(share, 0, 1) * (len(HEAT) - 1)
    scale = np.array(HEAT, float)
    low = np.minimum(place.astype(int), len(HEAT) - 2)
    mixed = scale[low] + (place - low)[..., None] * (scale[low + 1] - scale[low])
    pixels = side * max(1, -(-SIDE // side))
    return over_pixels(mixed.round().astype(np.uint8), pixels)


def patch_in_place(
    image: UInt8[np.ndarray, "s s 3"], patch: int, grid: tuple[int, int], around: int = 2
) -> UInt8[np.ndarray, "t t 3"]:
    """A patch, framed, with up to so many patches on each side of it."""
    (h, w), side = grid, len(image)
    row, column = divmod(patch, w)
    seen = min(h, w, 2 * around + 1)
    top = min(max(0, row - around), h - seen)
    left = min(max(0, column - around), w - seen)
    ys, xs = (slice(start * side // length, (start + seen) * side // length)
              for start, length in ((top, h), (left, w)))  # fmt: skip
    cut = enlarged(image[ys, xs])
    found = cut.copy()
    y0, y1 = ((row - top + i) * len(cut) // seen for i in (0, 1))
    x0, x1 = ((column - left + i) * cut.shape[1] // seen for i in (0, 1))
    found[y0:y1, x0:x1] = FRAME
    found[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2] = cut[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2]
    return found


def png(picture: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """The picture as a file."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG", optimize=True)
    return out.getvalue()


LETTERS, GAP, MOST_CAPTION = 12, 8, 24


def sheet_png(sheet: Sheet) -> bytes:
    """A whole sheet as a file: title, legend, rows of pictures with their words below them."""
    # Pillow's own font has no letter beyond ASCII, and classes are called Übung or Кошка.
    font = ImageFont.truetype(Path(mpl.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", LETTERS - 1)
    line = LETTERS + 4
    wide = max(SIDE, *(cell.pixels.shape[1] for row in sheet.rows for cell in row), 150)
    columns = max(len(row) for row in sheet.rows)
    width = max(GAP + columns * (wide + GAP), 480)
    legend = _rows_of_legend(sheet.legend, width - 2 * GAP, font)
    top = 2 * line + len(legend) * line + GAP
    heights = [max(cell.pixels.shape[0] for cell in row) + 2 * line + GAP for row in sheet.rows]
    page = Image.new("RGB", (width, top + sum(heights) + GAP), "white")
    draw = ImageDraw.Draw(page)
    draw.text((GAP, GAP), sheet.title, "black", font)
    for index, row_of in enumerate(legend):
        for x, word, colour in row_of:
            y = GAP + line + 2 + index * line
            draw.rectangle((x, y, x + LETTERS, y + LETTERS), colour)
            draw.text((x + LETTERS + 4, y), word, "black", font)
    for row, height in zip(sheet.rows, heights, strict=True):
        for place, cell in enumerate(row):
            x = GAP + place * (wide + GAP)
            page.paste(Image.fromarray(cell.pixels), (x, top))
            for number, words in enumerate(_lines(cell.caption, wide, font)):
                draw.text((x, top + cell.pixels.shape[0] + 2 + number * line), words, "black", font)
        top += height
    out = io.BytesIO()
    page.save(out, "PNG")
    return out.getvalue()


def _rows_of_legend(
    legend: Sequence[tuple[str, tuple[int, int, int]]], width: int, font: ImageFont.FreeTypeFont
) -> list[list[tuple[int, str, tuple[int, int, int]]]]:
    """The words of a legend with their places from the left, as many in a row as it takes."""
    found: list[list[tuple[int, str, tuple[int, int, int]]]] = []
    x = width + 1
    for word, colour in legend:
        need = round(font.getlength(word)) + LETTERS + 4 + 2 * GAP
        if x + need > width:
            found.append([])
            x = GAP
        found[-1].append((x, word, colour))
        x += need
    return found


def _lines(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Two lines at most, cut where they would be wider."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines[:2]
