"""What a checkpoint's file says at its beginning, before any number of its weights is read: torch is not needed."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from softmoe_cli.run import rows
from softmoe_cli.run.card import read_card
from softmoe_cli.run.sealed import require_there, sha256, weights_in

if TYPE_CHECKING:
    from torch import Tensor

FIRST_WEIGHT = "patch_embed.proj.weight"
"""A name that every ViT's weights have."""
LONGEST = 2**27
"""Bytes of a header that is read; safetensors' own limit is 100 million."""


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
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < LONGEST else None
        digest = sha256(path)
    except (OSError, ValueError, RecursionError):  # whoever reads the weights says why
        return None
    if not isinstance(header, dict) or not isinstance(said := header.pop("__metadata__", None), dict):
        return None
    text, whole = said.get("softmoe"), FIRST_WEIGHT in header and not any(name.endswith(".alive") for name in header)
    if not isinstance(text, str) or not whole:
        return None
    card = read_card(text, path)
    return None if "base" in card else Source(str(path), digest, {}, card, damaged=damaged)
