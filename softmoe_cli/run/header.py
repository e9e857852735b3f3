"""What a checkpoint's file says at its beginning, before any number of its weights is read: torch is not needed."""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softmoe_cli.run import rows
from softmoe_cli.run.card import read_card
from softmoe_cli.run.sealed import TRAINING, WEIGHTS, piece_files, require_there, sha256, weights_in

if TYPE_CHECKING:
    from torch import Tensor

FIRST_WEIGHT = "patch_embed.proj.weight"
"""A name that every ViT's weights have."""
LONGEST_HEADER = 2**27
"""Bytes of a header that is read; safetensors' own limit is 100 million."""
MOMENTS = {"exp_avg", "exp_avg_sq", "step"}
"""What AdamW keeps of a parameter."""


@dataclass(frozen=True)
class Source:
    """Weights to start from or to evaluate: `card` is what the file says of its model and classes, `prefix` what every
    name in the file began with and does not here. Of a delta, `own` are the names in the file itself: the other weights
    are its base's. `assumed` is what of its model was taken as given because no file says it, `damaged` what is wrong
    with newer checkpoints of the run."""

    label: str
    digest: str
    weights: "dict[str, Tensor]"
    card: dict[str, Any]
    prefix: str = ""
    own: frozenset[str] = frozenset()
    assumed: str = ""
    damaged: str = ""

    @property
    def train_pflop(self) -> float | None:
        """What its training had cost, from the first weights on; None where the file does not say."""
        cost: Any = self.card.get("train_pflop")
        return float(cost) if rows.number(cost) and cost >= 0 else None

    @property
    def classes(self) -> list[str] | None:
        """What its outputs are called; None where no file says it, and numbers stand for the names (`unnamed`)."""
        found: list[str] | None = None if self.card.get("unnamed") else self.card.get("classes")
        return found


def read_header(checkpoint: str) -> Source | None:
    """What `checkpoint=` names, without its weights; None where they are needed to know what it is: in pieces, of
    adapters, with experts gone, or not softmoe's.

    Raises:
        UsageError: nothing there, nothing undamaged, or a card that this version cannot read.
    """
    path = require_there(checkpoint)
    try:
        path, damaged = weights_in(path) if path.is_dir() else (path, "")
        header = _header(path)
        digest = sha256(path)
    except (OSError, ValueError, RecursionError):  # whoever reads the weights says why
        return None
    if not isinstance(said := header.pop("__metadata__", None), dict):
        return None
    text, whole = said.get("softmoe"), FIRST_WEIGHT in header and not any(name.endswith(".alive") for name in header)
    if not isinstance(text, str) or not whole:
        return None
    card = read_card(text, path)
    return None if "base" in card else Source(str(path), digest, {}, card, damaged=damaged)


def has_moments(source: Source) -> bool | None:
    """Whether AdamW's moments lie beside a checkpoint's weights; None where a file's beginning does not tell."""
    training = Path(source.label).with_name(TRAINING)
    if Path(source.label).name != WEIGHTS:
        return False
    if not training.is_file():
        return None if piece_files(training) else False
    kinds: defaultdict[str, set[str]] = defaultdict(set)
    try:
        for key in _header(training):
            name, _, kind = key.rpartition(".")
            kinds[name].add(kind)
    except (OSError, ValueError, RecursionError):
        return None
    return any(name.startswith("optimizer.") and found == MOMENTS for name, found in kinds.items())


def _header(path: Path) -> dict[str, Any]:
    """What a safetensors file says at its beginning.

    Raises:
        OSError, ValueError, RecursionError: it is none.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length)) if length < LONGEST_HEADER else None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is no safetensors file")
    return header
