"""ReaL: the classes that people saw in ImageNet's validation images, several of them or none in some."""

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from softmoe_cli.data.splits import ImageSet
from softmoe_cli.errors import UsageError


def check_order(real: str, known: list[str]) -> None:
    """Checks that a checkpoint's classes can be in ImageNet's order: in the order of other names they have other
    numbers.

    Raises:
        UsageError: they cannot.
    """
    if real == "timm" and known == sorted(known):
        odd = [name for name in known if not re.match(r"n\d", name)]
        if odd:
            raise UsageError(
                "real=timm numbers classes in the order of ImageNet's own names, such as n01440764; the checkpoint has "
                f"{odd[0]}; give a file of labels in the checkpoint's order"
            )


REAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+")


def real_labels(real: str, images: ImageSet, classes: int) -> list[set[int]]:
    """The classes that are right for each image, by ImageNet's number in its name; an empty set where raters saw none.

    Are we done with ImageNet? (Beyer et al., 2020), https://arxiv.org/abs/2006.07159.

    Raises:
        UsageError: not ReaL's file, or images that are not ImageNet's validation images.
    """
    path = resources.files("timm.data") / "_info" / "imagenet_real_labels.json" if real == "timm" else Path(real)
    try:
        labels = [{int(label) for label in each} for each in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"real={real} is not a JSON list with a list of labels per image: {error}") from error
    if any(not 0 <= label < classes for each in labels for label in each):
        raise UsageError(f"real={real} has labels beyond the {classes} classes that the checkpoint knows")
    places = images.files.places if images.files is not None else [Path("images without names")]
    matches = [(place, REAL_NAME.fullmatch(place.name)) for place in places]
    odd = [place for place, number in matches if number is None or not 1 <= int(number[1]) <= len(labels)]
    if odd:
        raise UsageError(f"real={real} has no labels for {odd[0]}: it must be called ILSVRC2012_val_NUMBER")
    return [labels[int(number[1]) - 1] for _, number in matches if number is not None]


def real_qualities(prediction: Int64[Tensor, " n"], labels: list[set[int]]) -> dict[str, Any]:
    """Share of predictions that are one of an image's labels; images without any do not count.

    Raises:
        UsageError: no image has a label.
    """
    right = [guess in these for guess, these in zip(prediction.tolist(), labels, strict=True) if these]
    if not right:
        raise UsageError("real= has no label for any of these images")
    return {"real_top1_pct": 100 * sum(right) / len(right), "real_images": len(right)}
