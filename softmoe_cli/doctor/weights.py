"""A checkpoint's weights as far as a doctor needs them, read in part: no model is built, torch is not needed."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from softmoe_cli.run import rows
from softmoe_cli.run.sealed import WEIGHTS, numbered

OF_EXPERTS = re.compile(r"(.*)\.experts\.(w1|w2)")
MOST_OF_EXPERTS, MOST_OF_OTHERS = 2**18, 2**12
"""The most numbers that are taken of one tensor, the first ones of every expert, so that large checkpoints take hardly
longer than small ones do."""


@dataclass(frozen=True)
class Weighed:
    """What a checkpoint says of its weights.

    Attributes:
        step: of the checkpoint.
        alike: place of a layer of experts -> mean cosine between two of its experts.
        usual: root mean square of the numbers in matrices, count: how many these are.
        classes: of the head; None where there is no plain one.
    """

    step: int
    alike: dict[str, float]
    usual: float
    count: int
    classes: int | None


def weighed(folder: Path) -> Weighed:
    """Those of a run's newest checkpoint.

    Raises:
        rows.Unreadable: there is none that can be read.
    """
    checkpoints = numbered(folder / "checkpoints", "last") or numbered(folder / "checkpoints", "best")
    if not checkpoints:
        raise rows.Unreadable("there is no checkpoint yet")
    path = checkpoints[0] / WEIGHTS
    try:
        with safe_open(path, framework="numpy") as file:
            return _weights(file, int(checkpoints[0].name.rpartition("-")[2]))
    except FileNotFoundError as error:
        raise rows.Unreadable("the weights of the newest checkpoint are not there, or in pieces") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise rows.Unreadable(f"the weights of the newest checkpoint cannot be read ({error})") from error


def _weights(file: Any, step: int) -> Weighed:
    cosines: dict[str, list[float]] = defaultdict(list)
    squares, numbers, count, classes = 0.0, 0, 0, None
    for name in file.keys():  # noqa: SIM118 (it is no mapping)
        part = file.get_slice(name)
        shape = part.get_shape()
        if part.get_dtype() != "F32" or len(shape) < 2:
            continue
        layer = OF_EXPERTS.fullmatch(name)
        taken = _first(part, shape, MOST_OF_EXPERTS if layer else MOST_OF_OTHERS)
        squares, numbers = squares + float(np.square(taken, dtype=np.float64).sum()), numbers + taken.size
        count += math.prod(shape)
        if layer and len(shape) == 3 and shape[0] > 1:
            cosines[layer[1]].append(mean_cosine(taken.reshape(shape[0], -1)))
        if name == "head.weight":
            classes = shape[0]
    if not math.isfinite(squares):
        raise rows.Unreadable("the weights of the newest checkpoint are not all finite")
    alike = {place: sum(each) / len(each) for place, each in cosines.items()}
    return Weighed(step, alike, (squares / max(numbers, 1)) ** 0.5, count, classes)


def _first(part: Any, shape: Sequence[int], most: int) -> np.ndarray[Any, Any]:
    """The first numbers of a tensor; of three axes the first of each matrix."""
    axis = 1 if len(shape) == 3 else 0
    rows_taken = min(shape[axis], max(1, most * shape[axis] // max(1, math.prod(shape))))
    return np.asarray(part[:, :rows_taken] if axis else part[:rows_taken])


def mean_cosine(vectors: np.ndarray[Any, Any]) -> float:
    """Mean cosine between two different ones of m vectors (m d): of unit vectors, (|their sum|^2 - m) / (m (m - 1)). A
    vector of zeros has cosine 0 with all."""
    wide = vectors.astype(np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    unit = wide / np.where(length > 0, length, 1)
    m = len(unit)
    return float((np.square(unit.sum(axis=0)).sum() - np.square(unit).sum()) / (m * (m - 1)))
