"""settle.json in the folder of a study: the question, fixed before the first run."""

import json
from pathlib import Path
from typing import Any

from softmoe_cli.errors import UsageError
from softmoe_cli.files import not_following
from softmoe_cli.run import rows
from softmoe_cli.text import printable

RECORD = "settle.json"
RECORDED = {
    **rows.FORMAT_KEY,
    "arms": rows.Key(rows.Kind("a list", lambda value: isinstance(value, list)), meaning="label and words of each"),
    "baseline": rows.Key(rows.TEXT, meaning="the label of the arm that others are measured against"),
    "quality": rows.Key(rows.TEXT, meaning="the main measure"),
    "margin": rows.Key(rows.NUMBER, meaning="within which arms are equal", null=True),
    "fairness": rows.Key(
        rows.Kind("settings", lambda value: isinstance(value, dict)), meaning="how arms are made fair"
    ),
    "first_seed": rows.Key(rows.WHOLE, meaning="of the seeds, which follow each other"),
}
"""The keys of settle.json."""


def asked_before(study: Path) -> dict[str, Any] | None:
    """What settle.json says; None where there is none.

    Raises:
        UsageError: it is damaged.
    """
    path = study / RECORD
    try:
        return rows.row(path, RECORDED)
    except FileNotFoundError:
        return None
    except rows.Unreadable as error:
        raise UsageError(f"{printable(str(path))} {error}; choose another study") from error


def fix_question(study: Path, asked: dict[str, Any]) -> None:
    """Writes the question down before the first run; afterwards it must be the same.

    Raises:
        UsageError: it is another one than before.
    """
    known = asked_before(study)
    if known is None:
        with open(study / RECORD, "x", opener=not_following) as file:
            file.write(json.dumps({"format": rows.FORMAT, **asked}, indent=1) + "\n")
        return
    for key in asked:
        if known[key] != asked[key]:
            raise UsageError(
                f"{printable(str(study))} was begun with {_apart(key, known[key], asked[key])}: the question is fixed "
                "before the first run; ask as before, or begin another study with study=NAME"
            )


def _apart(key: str, before: Any, now: Any) -> str:
    """In what two questions differ: `margin=0.5, not margin=1.0`."""
    if key == "fairness":
        odd = [name for name in now if before.get(name) != now[name]]
        told = [" ".join(f"{name}={json.dumps(each.get(name))}" for name in odd) for each in (before, now)]
    elif key != "arms":
        told = [f"{'seed' if key == 'first_seed' else key}={json.dumps(each)}" for each in (before, now)]
    elif [arm["label"] for arm in before] != [arm["label"] for arm in now]:
        told = ["arms " + "; ".join(arm["label"] for arm in each) for each in (before, now)]
    else:
        sides = [{word for arm in each for word in arm["words"]} for each in (before, now)]
        told = [" ".join(sorted(mine - its)) or "less" for mine, its in (sides, sides[::-1])]
    return f"{told[0]}, not {told[1]}"
