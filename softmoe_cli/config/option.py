"""What an option is: a field with its type, its meaning and its bounds, and the check of its value.

The dataclasses of this room hold no numbers: those stand in `conf/`, once each. `option` keeps an option's meaning and
bounds beside its type; `softmoe train --help` prints them, and `check` enforces them.
"""

import dataclasses
import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from softmoe_cli.errors import UsageError, nearest

MISSING: Any = "???"
"""omegaconf's mark of a value that `conf/` must give; importing omegaconf takes a tenth of a second."""


def typed(value: Any) -> str:
    """A value as one types it: 2 for 2.0, [0.5,1] for [0.5, 1.0], null for None."""
    if isinstance(value, list):
        return f"[{','.join(map(typed, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def option(
    meaning: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    choices: tuple[str, ...] = (),
    absent: bool = False,
) -> Any:
    """A dataclass field without a default: `conf/` chooses. low <= value <= high, value > above. `absent`: a key that
    only some files in conf/ and some checkpoints have; elsewhere it is null."""
    limits = {"meaning": meaning, "low": low, "high": high, "above": above, "choices": choices, "absent": absent}
    return field(default=MISSING, metadata=limits)


def absent_keys(section: "type[Section]") -> list[str]:
    """The keys of a section that may be absent."""
    return [f.name for f in dataclasses.fields(section) if f.metadata.get("absent")]


def _check_values(section: "Section") -> None:
    """Checks every value of a section against the bounds that stand beside its type."""
    for f in dataclasses.fields(section):
        value, limits = getattr(section, f.name), f.metadata
        key = ".".join(filter(None, [section.path, f.name]))
        if value is None or not limits:
            continue
        if isinstance(value, str) and not value.strip() and section.path != "wandb":  # wandb's own check says more
            raise UsageError(f"{key}={value} is empty, as $NAME is where NAME is not set; give it a value")
        if isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
            raise UsageError(f"{key}={typed(value)} is a list that holds others; write [a,b]")
        for word in value if isinstance(value, list) else [value]:
            if limits["choices"] and word not in limits["choices"]:
                raise UsageError(
                    f"{key}={word} is not one of {', '.join(limits['choices'])}.{nearest(str(word), limits['choices'])}"
                )
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if not math.isfinite(number):
                raise UsageError(f"{key}={value} is not a finite number")
            if not (limits["low"] <= number <= limits["high"] and number > limits["above"]):
                signs = {">": limits["above"], ">=": limits["low"], "<=": limits["high"]}
                bounds = [f"{sign} {bound:.15g}" for sign, bound in signs.items() if math.isfinite(bound)]
                raise UsageError(f"{key}={typed(value)} is out of range: it must be {' and '.join(bounds)}")


@dataclass
class Section:
    """A part of a configuration, or the whole of a command's."""

    path: ClassVar[str]
    """Where its keys are, such as model.backbone; empty for a command's own."""

    def settled(self) -> Self:
        """A checked copy, with what its choices imply filled in.

        Raises:
            UsageError: the first value or combination that cannot work.
        """
        _check_values(self)
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        inner: dict[str, Any] = {name: value.settled() for name, value in values.items() if isinstance(value, Section)}
        settled = replace(self, **inner, **{key: None for key in absent_keys(type(self)) if values[key] == MISSING})
        settled.check()
        return settled.filled()

    def check(self) -> None:
        """Raises UsageError where the values, whose bounds are kept, do not go together. Changes nothing."""

    def filled(self) -> Self:
        """A copy with the values that its choices imply; itself if they imply nothing."""
        return self
