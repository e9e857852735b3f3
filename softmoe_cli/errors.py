"""The two errors that a user reads as one sentence, and what such sentences are made with."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Something the user typed or pointed at cannot work; the message says what and the way out."""


class RunError(RuntimeError):
    """A run that cannot go on; the message says why and what is safe."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the choice closest to `word`, else the empty string."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def first_line(error: object) -> str:
    """The first line of an error's message, or of any other text."""
    return (str(error).strip().splitlines() or ["no message"])[0]
