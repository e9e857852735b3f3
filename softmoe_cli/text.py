"""Numbers, names and tables as text."""

import re
import unicodedata
from collections.abc import Sequence


def si(number: float) -> str:
    """1234567 -> 1.23M"""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:g}"


FLOP = (("FLOP", 1.0), ("kFLOP", 1e3), ("MFLOP", 1e6), ("GFLOP", 1e9), ("TFLOP", 1e12), ("PFLOP", 1e15),
        ("EFLOP", 1e18))  # fmt: skip
"""The units of FLOPs, smallest first."""


def flop(number: float) -> str:
    """24250000 -> 24.25 MFLOP"""
    name, size = max((each for each in FLOP if each[1] <= number), key=lambda each: each[1], default=FLOP[0])
    return f"{four_digits(number / size)} {name}"


def four_digits(number: float) -> str:
    """Four digits in all, and every digit before the point: 24.25, 12,346"""
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def gibibytes(number: float) -> str:
    """In GiB; less than a tenth of a GiB in MiB."""
    return f"{number / 2**30:.2f} GiB" if number >= 0.1 * 2**30 else f"{number / 2**20:.1f} MiB"


def in_words(seconds: float) -> str:
    """0.0234 -> 23.4 ms, 63 -> 1 min 3 s, 3900 -> 1 h 5 min"""
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes and rest else f"{minutes} min" if minutes else f"{rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 72:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{seconds / 86400:.1f} days"


def word_of(key: str, value: object) -> str:
    """KEY=VALUE as it is typed."""
    return f"{key}={'null' if value is None else value}"


def several(number: float, noun: str) -> str:
    """1 step, 1,200 steps"""
    return f"{number:,.0f} {noun}" if round(number) == 1 else f"{number:,.0f} {noun}s"


OBEYED = {"Cc", "Cs", "Zl", "Zp", "LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
"""Unicode's classes of characters that move, colour, hide or turn round the text beside them, and of half
characters."""


def printable(text: str) -> str:
    """A name that somebody else chose, on one line: characters that a terminal would obey or cannot show become
    escapes.

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


def shortened(text: str, most: int, gap: str = "…") -> str:
    """At most `most` letters: of a longer text its beginning and its end."""
    kept = most - len(gap)
    return text if len(text) <= most else f"{text[: kept - kept // 2]}{gap}{text[len(text) - kept // 2 :]}"


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


def width_of(text: str) -> int:
    """How many columns of a terminal a text takes: Chinese, Japanese and Korean letters two each, accents none."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


def padded(text: str, width: int, *, right: bool) -> str:
    """The text with spaces before it (`right`) or behind it, so that it takes `width` columns."""
    spaces = " " * (width - width_of(text))
    return spaces + text if right else text + spaces


def row_of(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Cells of a row, the first to the left and the others to the right."""
    return [padded(cell, width, right=i > 0) for i, (cell, width) in enumerate(zip(cells, widths, strict=True))]


def aligned(rows: list[list[str]], markdown: bool) -> str:
    """A table with its first column to the left and the others to the right; the first row is its head."""
    rows = [[" ".join(cell.split("\n")) for cell in row] for row in rows]
    widths = [max(width_of(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [row_of(row, widths) for row in rows]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    rule = [("-" * width if i == 0 else "-" * max(1, width - 1) + ":") for i, width in enumerate(widths)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def folded(rows: list[list[str]], width: int) -> str:
    """As `aligned`, no wider than a terminal where that can be: cells are broken between words, the widest column
    first; numbers stay with their uncertainty."""
    whole = [[" ".join(cell.split()).replace(" ± ", "\u00a0±\u00a0") for cell in row] for row in rows]
    together = list(zip(*whole, strict=True))
    widths = [max(map(width_of, column)) for column in together]
    least = [max(width_of(word) for cell in column for word in (cell.split(" ") or [""])) for column in together]
    while sum(widths) + 2 * (len(widths) - 1) > width:
        room = [i for i, (now, low) in enumerate(zip(widths, least, strict=True)) if now > low]
        if not room:
            break
        widths[max(room, key=widths.__getitem__)] -= 1
    lines = []
    for row in whole:
        cells = [_broken(cell, most) for cell, most in zip(row, widths, strict=True)]
        for i in range(max(map(len, cells))):
            parts = [cell[i] if i < len(cell) else "" for cell in cells]
            lines.append("  ".join(row_of(parts, widths)).rstrip())
    return "\n".join(lines).replace("\u00a0", " ")


def _broken(cell: str, width: int) -> list[str]:
    """The cell's words in lines of at most `width` columns."""
    lines = [""]
    for word in cell.split(" "):
        longer = f"{lines[-1]} {word}".lstrip(" ")
        lines[-1:] = [longer] if width_of(longer) <= width or not lines[-1] else [lines[-1], word]
    return lines


def printable_lines(text: str) -> str:
    """Text of several lines with the escapes of `printable` in each."""
    return "\n".join(map(printable, text.split("\n")))


def patterns(keys: list[str]) -> dict[str, None]:
    """Names of weights in their order, with a * for the number of the block, each once."""
    return dict.fromkeys(re.sub(r"\bblocks\.\d+\.", "blocks.*.", key) for key in keys)
