"""What the figures and the page share: how a group looks, and what is shown of a reference. Without matplotlib, which
takes half a second to import."""

from collections.abc import Iterable

from softmoe_cli.compare.groups import Comparison, Group, natural

COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito, Color Universal Design (2008), without the yellow, which is hard to see on white paper."""
MARKERS = "osD^vPX*"


def styles(groups: Iterable[Group]) -> dict[str, tuple[int, str]]:
    """Label -> (number of the colour, marker), the same in every figure. Baselines come first, in black. Labels that
    begin alike (mostly a router) share a colour if all groups still look different, and those that end alike (mostly a
    number of experts) share a marker if several of a colour do."""
    groups = list(groups)
    baselines = {group.baseline for group in groups}
    labels = sorted({group.label for group in groups}, key=lambda label: (label not in baselines, natural(label)))
    families: dict[str, list[str]] = {}
    for label in labels:
        families.setdefault(label.partition(", ")[0], []).append(label)
    ends = sorted({label.partition(", ")[2] for label in labels}, key=natural)
    if 1 < len(families) <= len(COLOURS) and max(map(len, families.values())) <= len(MARKERS):
        marker = {label: ends.index(label.partition(", ")[2]) for label in labels}
        if len(ends) == 1 or len(ends) > min(len(MARKERS), len(labels) - 1):
            marker = {
                label: (c + m) % len(MARKERS) for c, f in enumerate(families.values()) for m, label in enumerate(f)
            }
        at = {label: (c, marker[label]) for c, f in enumerate(families.values()) for label in sorted(f, key=natural)}
    else:
        at = {label: (i % len(COLOURS), (i + 2 * (i // len(COLOURS))) % len(MARKERS)) for i, label in enumerate(labels)}
    return {label: (colour, MARKERS[marker]) for label, (colour, marker) in at.items()}


PUBLISHED = ("train_exaflop", "jft_prec1_pct")
"""The paper's own cost and quality."""


def same_axes(comparison: Comparison) -> bool:
    """Whether the reference has our cost and quality and can lie behind our points."""
    return bool(comparison.reference) and {comparison.quality, comparison.cost} <= comparison.reference[0].keys()


def reference_points(comparison: Comparison) -> list[tuple[float, float, str]]:
    """(cost, quality, kind) of the rows that have both."""
    x, y = (comparison.cost, comparison.quality) if same_axes(comparison) else PUBLISHED
    points = []
    for row in comparison.reference:
        kind = row.get("routing") or ("Soft" if "Soft" in row.get("model", "") else "Dense")
        if row[x] and row[y]:
            points.append((float(row[x]), float(row[y]), kind))
    return points


KINDS = {"Dense": "Dense", "Soft": "Soft MoE", "EC": "Experts Choice", "TC": "Tokens Choice"}
