"""Checkpoints that are deltas: only the weights that differ from those of another checkpoint, their base, and the
digest of that one. A run that trains adapters on a frozen backbone writes such checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from softmoe_cli.errors import UsageError
from softmoe_cli.run.checkpoint import digest_of
from softmoe_cli.run.header import Source

HEAD = "head."
NAMED_BY_THE_USER = ("timm:", "hf-hub:")
"""Bases that are fetched only if the user names them: a file may name any."""


@dataclass(frozen=True)
class Delta:
    """What a run's checkpoints hold: the weights of these names. `base` is what their card says of the rest."""

    names: frozenset[str]
    base: dict[str, Any]

    @classmethod
    def of(cls, source: Source, weights: Mapping[str, Tensor], trained: set[str], loaded: set[str]) -> "Delta":
        """The delta of a model against the base of `source`, or `source` itself where it is whole.

        Args:
            weights: all of the model's, by name.
            trained: names of those that are trained.
            loaded: names of those that were loaded from `source` as they are.
        """
        of_base = loaded - trained - source.own
        if any(name.startswith(HEAD) for name in trained):  # a head is held whole, with what of it is frozen or counted
            of_base = {name for name in of_base if not name.startswith(HEAD)}
        base = source.card.get("base") or {"checkpoint": source.label, "digest": digest_of(source.weights)}
        rest = source.weights.keys() - source.own if source.own else source.weights.keys()
        left_out = sorted(name for name in rest if name not in weights and not name.startswith(HEAD))
        before = base.get("left_out", [])
        return cls(frozenset(weights) - of_base, base | {"left_out": sorted({*before, *left_out})})


def base_name(delta: Source, named: str | None) -> str:
    """What the base of a delta is read from: what the user has `named`, or else what the delta says.

    Raises:
        UsageError: it would have to be fetched although only the file names it.
    """
    said: str = delta.card["base"]["checkpoint"]
    if named is not None:
        return named
    if said.startswith(NAMED_BY_THE_USER):
        raise UsageError(
            f"checkpoint={delta.label} holds adapters alone, and only the file says that they belong to {said}; add "
            f"base={said} to have that read"
        )
    return said


def composed(delta: Source, base: Source) -> Source:
    """The weights of both: those of the delta, and all others of its base.

    Raises:
        UsageError: the base is another one.
    """
    said = delta.card["base"]
    if digest_of(base.weights) != said["digest"]:
        raise UsageError(
            f"checkpoint={delta.label} holds adapters that belong to other weights than those of {base.label}: their "
            f"digest is not {said['digest'][:10]}…, that of {said['checkpoint']}; name the right ones with base="
        )
    own_head = any(name.startswith(HEAD) for name in delta.weights)
    rest = {
        name: value
        for name, value in base.weights.items()
        if name not in said["left_out"] and not (own_head and name.startswith(HEAD))
    }
    return replace(delta, weights=rest | delta.weights, own=frozenset(delta.weights))
