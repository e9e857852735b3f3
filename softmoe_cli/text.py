"""Numbers and tables as text."""


def count(number: float) -> str:
    """1234567 -> 1.23M"""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:g}"


def flop(number: float) -> str:
    """24250000 -> 24.25 MFLOP"""
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {prefix}FLOP"
    return f"{number:g} FLOP"


def gibibytes(number: float) -> str:
    """In GiB; what would be less than a tenth of one, in MiB."""
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


def several(number: float, noun: str) -> str:
    """1 step, 1,200 steps"""
    return f"{number:,.0f} {noun}" + "s" * (round(number) != 1)


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
