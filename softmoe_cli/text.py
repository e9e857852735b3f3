"""Numbers, names and tables as text."""

import unicodedata


def count(number: float) -> str:
    """1234567 -> 1.23M"""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:g}"


def gibibytes(number: float) -> str:
    return f"{number / 2**30:.2f} GiB"


def first_line(error: object) -> str:
    """Of an error's message, or of any other text."""
    return (str(error).strip().splitlines() or ["no message"])[0]


OBEYED = {"Cc", "Cs", "Zl", "Zp", "LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
"""Unicode's classes of what moves, colours, hides or turns round what stands beside it, and of half characters."""


def printable(text: str) -> str:
    """A name of somebody else's, on one line: what a terminal would obey or cannot show becomes an escape.

    ESC becomes \\x1b, a line break \\n, and a byte of a name that is not UTF-8 (which Python holds as half a character)
    \\xe9. Everything else stays as it is, in every script.
    """
    if text.isprintable():  # nearly always
        return text
    return "".join(_escape(c) if {unicodedata.category(c), unicodedata.bidirectional(c)} & OBEYED else c for c in text)


def _escape(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:  # Python's surrogateescape: a byte as it stands in the name
        return f"\\x{number - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def spreadsheet_cell(value: object) -> object:
    """A cell of a CSV file. Words that a spreadsheet would compute get an apostrophe before them, as people type it
    there; numbers and words that are numbers stay as they are."""
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def aligned(rows: list[list[str]], markdown: bool) -> str:
    """A table with its first column to the left and the others to the right; the first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    rule = [("-" * width if i == 0 else "-" * max(1, width - 1) + ":") for i, width in enumerate(widths)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
