"""What a command answers a program with: JSON on standard output, and nothing else there.

With --json, or format=json where a command has that option, what is said for people goes to standard error. The answer
is one object or list in one line; several jobs of one line of arguments (-m) answer with a line each. What failed
answers {"error": the sentence, "status": the exit status}.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO

from softmoe_cli.errors import UsageError

FLAG = "--json"
FORMATTED = (
    "settle", "upcycle", "prune", "extract", "evaluate", "export", "cost", "match", "data", "show",
)  # fmt: skip
"""Commands with an option `format`, for which --json is format=json."""

_listening: list[int] = []


def listen() -> bool:
    """Whether a program reads what this command prints."""
    return bool(_listening)


def reply(value: Any) -> None:
    """Prints the answer. A figure that is no finite number is null, as JSON has no such numbers."""
    say(json.dumps(_finite(value), allow_nan=False))


def fail(text: str, status: int) -> None:
    """Prints what failed, for whoever still reads."""
    with suppress(BrokenPipeError):
        reply({"error": text, "status": status})


def streams() -> tuple[TextIO, TextIO]:
    """Standard output and error; a process that was started without them gets ones that nobody reads."""
    sys.stdout = sys.stdout or os.fdopen(_as(1), "w")
    sys.stderr = sys.stderr or os.fdopen(_as(2), "w")
    return sys.stdout, sys.stderr


def _as(number: int) -> int:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)
    return number


def say(text: str) -> None:
    """Prints an answer that is text already."""
    if not _listening:
        print(text)
        return
    with os.fdopen(os.dup(_listening[-1]), "w", encoding="utf-8") as out:
        print(text, file=out)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def wanted_by(words: Sequence[str]) -> bool:
    """Whether a command line asks for JSON."""
    formats = [word for word in words if word.startswith("format=")]  # the last one counts
    return FLAG in words or (formats[-1:] == ["format=json"] and words[0] in FORMATTED)


def as_option(words: Sequence[str]) -> list[str]:
    """The command line without --json: with format=json instead, where the command has the option.

    Raises:
        UsageError: another format is asked for as well, or what Hydra shows, which is YAML.
    """
    rest = [word for word in words if word != FLAG]
    if FLAG not in words or rest[:1] in ([], ["help"]) or "--help" in rest or "-h" in rest:
        return rest
    yaml = next((word for word in rest if word in ("--cfg", "-c", "--info", "-i")), None)
    if yaml is not None:
        raise UsageError(f"{yaml} shows YAML and text, for people too; leave out {FLAG}")
    if rest[0] not in FORMATTED:
        return rest
    other = next((word for word in rest if word.startswith("format=") and word != "format=json"), None)
    if other is not None:
        raise UsageError(f"{other} and {FLAG} are two formats; leave one out")
    return rest if "format=json" in rest else [*rest, "format=json"]


@contextmanager
def for_programs() -> Iterator[None]:
    """Inside, `reply` alone prints on standard output: what this process and those that it starts say otherwise goes
    to standard error."""
    sys.stdout.flush()
    _listening.append(os.dup(1))
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        out = _listening.pop()
        os.dup2(out, 1)
        os.close(out)
