"""Chooses what suits the images: their side where data.image_size=auto, and the small backbone for that side."""

import io
import statistics
from collections.abc import Sequence

from softmoe_cli.config.data import Data
from softmoe_cli.errors import UsageError

BACKBONES = {16: "vit_nano2", 32: "vit_nano4", 96: "vit_micro8"}
"""Largest side in pixels -> the backbone of conf/model/backbone: some 16 to 64 tokens, and no more than 144."""
LARGE = "vit_micro16"
"""For larger images."""
SIDES = (8, 12, 16, 20, 24, 28, 32, 48, 64, 96, 128, 160, 192, 224)
"""Sides that `auto` chooses from, in pixels: few of them, so that adding or removing a few files gives the same run."""
SIZES_READ = 64
"""Images whose size is read."""


def backbone_for(side: int) -> str:
    """The name of the small backbone for square images."""
    return next((name for most, name in BACKBONES.items() if side <= most), LARGE)


def side_for(shorter: Sequence[int], patch: int | None) -> int:
    """The largest of SIDES that the median image fills, and a multiple of the patch where that is given."""
    middle = statistics.median(shorter)
    side = max((each for each in SIDES if each <= middle), default=SIDES[0])
    return side if patch is None else max(patch, side - side % patch)


def shorter_sides(data: Data) -> list[int]:
    """Pixels on the shorter side of SAMPLE training images, evenly spread over the list of them. One that cannot be
    read is left out here; loading will name it.

    Raises:
        UsageError: the files are no set to train on, or none of these images can be read.
    """
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    from softmoe_cli.data.listing import usable
    from softmoe_cli.data.picture import IMAGE_FORMATS, opened

    stored, _ = next(iter(usable(data).parts.values()))
    sides = []
    for i in np.unique(np.linspace(0, max(0, len(stored) - 1), min(SIZES_READ, len(stored))).astype(int)).tolist():
        try:
            with Image.open(io.BytesIO(stored.read(i)), formats=IMAGE_FORMATS) as image:
                sides.append(min(image.size))
        except (OSError, EOFError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
            continue
    if not sides:
        opened(stored, 0, data.channels, data.max_megapixels)  # says why it cannot be read
        raise UsageError(f"data.image_size=auto: no image in data.root={data.root} could be read; try again")
    return sides
