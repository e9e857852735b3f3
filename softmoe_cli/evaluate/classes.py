"""The classes that a checkpoint knows, and those of the data: which output is whose."""

from collections import Counter
from typing import Any

from softmoe_cli.errors import UsageError
from softmoe_cli.run.header import Source


def named_by_order(
    source: Source, known: list[str], found: list[str], by_number: bool
) -> tuple[list[str], dict[str, Any]]:
    """The names of a head's outputs, and what to say of them. Those of a checkpoint without names are the data's, in
    their order, where there are as many."""
    if not source.card.get("unnamed") or len(known) != len(found) or by_number:
        return known, {}
    return found, {"classes": "in the order of the data's names: the checkpoint has none"}


def outputs_for(known: list[str], found: list[str], by_number: bool) -> list[int] | None:
    """The head's output for each class of the data, by name or by number; None: some classes have no output.

    Raises:
        UsageError: several outputs have one of the names.
    """
    if not by_number and found == known:
        return list(range(len(known)))
    times = Counter(known)
    twice = [name for name in found if times[name] > 1]
    if twice and not by_number and set(found) <= set(known):
        raise UsageError(
            f"the checkpoint has {times[twice[0]]} outputs called '{twice[0]}', so that it is open which one "
            "the data's class of that name is; set data.class_numbers=true if the data's classes are outputs' numbers"
        )
    place = {str(i) if by_number else name: i for i, name in enumerate(known)}
    return [place[name] for name in found] if set(found) <= set(place) else None
