"""From the bytes of an image to what Pillow makes of them; without torch."""

import io
import warnings

from PIL import Image, UnidentifiedImageError

from softmoe_cli.data.archives import Stored
from softmoe_cli.errors import UsageError

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are decoded, whatever a file is called: for some other formats Pillow runs programs (PostScript)."""


Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, which nobody could raise: ours is data.max_megapixels
warnings.filterwarnings("ignore", "Palette images with Transparency")  # data check counts them


def opened(stored: Stored, i: int, channels: int, max_megapixels: float) -> Image.Image:
    """Image i, decoded, grey or RGB.

    Raises:
        UsageError: it is no image, is cut short, too large, or cannot be read.
    """
    try:
        with Image.open(io.BytesIO(stored.read(i)), formats=IMAGE_FORMATS) as image:
            if image.width * image.height > max_megapixels * 1e6:  # before anything is decoded
                raise UsageError(
                    f"{stored.place(i)} is {image.width:,} x {image.height:,} pixels, and a few bytes can say that; if "
                    f"it is right, raise data.max_megapixels={max_megapixels:g}"
                )
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"{image.mode} pixels have more than 8 bits; convert it to 8 bits a channel first")
            mode = "L" if channels == 1 else "RGB"
            image.load()
            return image if image.mode == mode else image.convert(mode)
    except UnidentifiedImageError as error:
        raise UsageError(
            f"{stored.place(i)} is not an image that can be read: damaged, or none of {', '.join(IMAGE_FORMATS)}"
        ) from error
    except (OSError, EOFError, SyntaxError, ValueError) as error:
        raise UsageError(f"{stored.place(i)} is not an image that can be read: {error}") from error
