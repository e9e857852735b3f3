"""Numbers and tables as text."""


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


def aligned(rows: list[list[str]], markdown: bool) -> str:
    """A table with its first column to the left and the others to the right; the first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    rule = [("-" * width if i == 0 else "-" * max(1, width - 1) + ":") for i, width in enumerate(widths)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
