"""settle.json in the folder of a study: the question, fixed before the first run."""

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from softmoe_cli.compare.settled import RECORD, asked_before
from softmoe_cli.errors import UsageError
from softmoe_cli.files import not_following, write_atomically
from softmoe_cli.run import rows
from softmoe_cli.settle.arms import science
from softmoe_cli.text import printable


def fix_question(study: Path, asked: dict[str, Any], begun: Callable[[], bool]) -> None:
    """Writes the question down before the first run; afterwards it must be the same. Whoever calls holds the study.

    Args:
        begun: whether a run that verdicts may rest on has a result; asked where no question is there.

    Raises:
        UsageError: it is another one than before, or results were there before the question.
    """
    if agree(study, asked):
        return
    if begun():
        raise UsageError(
            f"{printable(str(study))} has results of these arms already, and a question that is fixed after them "
            "proves little: choose another study=NAME, or seed=N above theirs"
        )
    write_atomically(study / RECORD, json.dumps({"format": rows.FORMAT, **asked}, indent=1) + "\n")


def agree(study: Path, asked: dict[str, Any]) -> bool:
    """Whether the question is written down already.

    Raises:
        UsageError: another one is.
    """
    known = asked_before(study)
    if known is None:
        return False
    for key in asked:
        if _meant(known, key) != _meant(asked, key):
            raise UsageError(
                f"{printable(str(study))} was begun with {_apart(key, known, asked)}: the question is fixed "
                "before the first run; ask as before, or begin another study with study=NAME"
            )
    return True


def _meant(question: dict[str, Any], key: str) -> Any:
    """What a part of the question means, however its words were ordered: labels follow the words."""
    if key == "arms":
        return sorted(science(arm["words"]) for arm in question["arms"])
    if key == "baseline":
        return [science(arm["words"]) for arm in question["arms"] if arm["label"] == question["baseline"]]
    if key == "fairness":
        return {name: value for name, value in question[key].items() if value not in (None, [])}
    return question[key]


def _apart(key: str, *questions: dict[str, Any]) -> str:
    """In what two questions differ: `margin=0.5, not margin=1.0`."""
    before, now = (question[key] for question in questions)
    if key == "fairness":
        odd = [name for name in now if before.get(name) != now[name] and (before.get(name) or now[name])]
        told = [" ".join(f"{name}={json.dumps(each.get(name))}" for name in odd) for each in (before, now)]
    elif key != "arms":
        told = [f"{'seed' if key == 'first_seed' else key}={json.dumps(each)}" for each in (before, now)]
    elif [arm["label"] for arm in before] != [arm["label"] for arm in now]:
        told = ["arms " + "; ".join(arm["label"] for arm in each) for each in (before, now)]
    else:
        sides = [{word for arm in each for word in science(arm["words"])} for each in (before, now)]
        told = [" ".join(sorted(mine - its)) or "less" for mine, its in (sides, sides[::-1])]
    return f"{told[0]}, not {told[1]}"


def given_before(path: Path, question: dict[str, Any]) -> list[Any] | None:
    """What arms were given when this was asked before in the study; None if it was not.

    Raises:
        UsageError: the file is damaged.
    """
    try:
        told = rows.lines(path, {**rows.FORMAT_KEY})
    except FileNotFoundError:
        return None
    except rows.Unreadable as error:
        raise UsageError(f"{printable(str(path))} {error}; choose another study") from error
    asked = json.loads(json.dumps(question))
    return next((row["given"] for row in told if all(row.get(key) == value for key, value in asked.items())), None)


def give(path: Path, question: dict[str, Any], given: list[Any]) -> list[Any]:
    """Writes down what arms are given, once: where another command was faster, what that wrote is theirs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", opener=not_following) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = given_before(path, question)
        if before is not None:
            return before
        file.write(json.dumps({"format": rows.FORMAT, **question, "given": given}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return given
