"""A comparison as text: for the terminal, Markdown, LaTeX, CSV and JSON."""

import csv
import io
import json
from dataclasses import asdict, dataclass
from typing import Any

from softmoe_cli.compare import Block, Comparison, Group, setting
from softmoe_cli.intervals import Interval
from softmoe_cli.runs import COSTS, CURVES, QUALITIES
from softmoe_cli.text import aligned

LEGEND = (
    "± is half a 95% t-interval over n seeds; on the front: nothing is at least as good at no more cost; P(front): how "
    "often the group is there when its means are drawn anew given their seeds"
)
CURVE_NOTE = (
    "Quality on the validation images, each run's curve interpolated linearly and never extrapolated; a point inside a "
    "curve was reached under a schedule made for the whole run"
)
REFERENCE = "Published or given figures as they are: other runs, perhaps other data, hardware and conventions"


@dataclass(frozen=True)
class Table:
    """A head and rows of cells, the first column being words; `block` is the title of the block that it tells of."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]
    block: str = ""


def tables(comparison: Comparison) -> list[Table]:
    """Per block: groups with their figures; then quality at equal cost."""
    found = []
    for block in comparison.blocks:
        found.append(_groups(comparison, block))
        found += _budgets(comparison, block)
    return found


def reference_tables(comparison: Comparison) -> list[Table]:
    """The rows that --reference names, as they are."""
    if not comparison.reference:
        return []
    head = list(comparison.reference[0])
    rows = [[row[key] for key in head] for row in comparison.reference]
    return [Table(f"Reference, not ours: {comparison.reference_name}", REFERENCE, head, rows)]


def _groups(comparison: Comparison, block: Block) -> Table:
    quality, cost = comparison.quality, comparison.cost
    columns = [key for key in comparison.columns if key not in (quality, cost)]
    head = ["group", "n", QUALITIES[quality].head]
    judged = any(group.difference for group in block.groups)
    baselines = dict.fromkeys(group.baseline for group in block.groups if group.baseline)
    if judged:
        head += [f"minus {next(iter(baselines))}" if len(baselines) == 1 else "minus its baseline", "verdict"]
    head += [COSTS[cost], "front", "P(front)", *(named(key) for key in columns)]
    rows = []
    for group in block.groups:
        row = [group.label, str(len(group.runs)), cell(quality, group.figures[quality])]
        if judged:
            difference = cell(quality, group.difference.interval, signed=True) if group.difference else ""
            is_baseline = "baseline" if group.label in baselines else ""
            row += [difference, group.verdict or is_baseline]
        chance = "" if group.front_probability is None else f"{100 * group.front_probability:.0f}%"
        row += [cell(cost, group.figures[cost]), "yes" if group.front else "", chance]
        row += [cell(key, group.figures[key]) if key in group.figures else setting(group, key) for key in columns]
        rows.append(row)
    return Table(block.title, LEGEND, head, rows, block.title)


def _budgets(comparison: Comparison, block: Block) -> list[Table]:
    """A table per axis: groups down, budgets across."""
    found = []
    key = QUALITIES[comparison.quality].curve
    for axis in dict.fromkeys(each.axis for each in block.groups[0].budgets):
        places = [i for i, each in enumerate(block.groups[0].budgets) if each.axis == axis]
        titles = [f"at {block.groups[0].budgets[i].budget:,.6g}" for i in places]
        rows = []
        for group in block.groups:
            cells = [group.budgets[i] for i in places]
            rows.append([group.label, str(len(group.runs)), *(_at(key, each) for each in cells)])
        title = f"{block.title}: {CURVES[key]} at equal {COSTS[axis]}"
        found.append(Table(title, CURVE_NOTE, ["group", "n", *titles], rows, block.title))
    return found


def _at(key: str, each: Any) -> str:
    if each.interval is None:
        return f"({each.reason})"
    return cell(key, each.interval) + (f" {each.verdict}" if each.verdict in ("better", "worse") else "")


def named(key: str) -> str:
    """What a figure or setting is called in a head."""
    return COSTS.get(key) or (QUALITIES[key].head if key in QUALITIES else key)


def cell(key: str, interval: Interval | None, *, signed: bool = False) -> str:
    """`96.47 ± 0.80`; a spread of nothing is not shown, an unknown one neither."""
    if interval is None:
        return ""
    text = figure(key, interval.mean)
    if signed and interval.mean > 0:
        text = f"+{text}"
    if interval.high is None or interval.high == interval.mean:
        return text
    half = interval.high - interval.mean
    return f"{text} ± {figure(key, half) if key in QUALITIES else f'{half:.2g}'}"


def figure(key: str, value: float) -> str:
    if key in QUALITIES:
        return f"{value:.2f}" if key.endswith("_pct") else f"{value:.4f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def remarks(comparison: Comparison) -> list[str]:
    """Every note, and a line per folder that was left out."""
    notes = list(comparison.notes)
    for block in comparison.blocks:
        notes += [f"{block.title}: {note}" if len(comparison.blocks) > 1 else note for note in block.notes]
    return notes + [f"left out: {folder}: {reason}" for folder, reason in comparison.left_out]


def terminal(comparison: Comparison) -> str:
    parts = []
    for table in tables(comparison):
        parts.append(f"{table.title}\n{aligned([table.head, *table.rows], markdown=False)}")
    if comparison.reference:
        parts.append(
            f"{len(comparison.reference)} rows of reference, not ours, are in the files: {comparison.reference_name}"
        )
    parts.append("\n".join(f"- {note}" for note in [LEGEND, CURVE_NOTE, *remarks(comparison)]))
    return "\n\n".join(parts)


def markdown(comparison: Comparison) -> str:
    parts = []
    for table in [*tables(comparison), *reference_tables(comparison)]:
        rows = [[_plain(text).replace("|", "\\|") for text in row] for row in [table.head, *table.rows]]
        parts.append(f"## {_plain(table.title)}\n\n{aligned(rows, markdown=True)}\n\n{table.note}.")
    notes = [_plain(note) for note in remarks(comparison)]
    return "\n\n".join([*parts, *(["## Notes\n\n" + "\n".join(f"- {note}" for note in notes)] if notes else [])]) + "\n"


def _plain(text: str) -> str:
    """On one line, with what Markdown and HTML would take as theirs made harmless."""
    text = " ".join(text.split())
    for character in "\\`*<>[]":
        text = text.replace(character, f"\\{character}")
    return text


TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "–": "--", "…": r"\ldots{}",
}  # fmt: skip


def latex(comparison: Comparison) -> str:
    """booktabs tables to \\input. One that is wider than the text is shrunk to it."""
    parts = [r"% \usepackage[T1]{fontenc} \usepackage{booktabs} \usepackage{graphicx}"]
    for table in tables(comparison):
        rows = [" & ".join(map(_tex, row)) + r" \\" for row in table.rows]
        parts += [
            r"\begin{table}", r"\centering", r"\footnotesize", r"\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{_tex(table.title)}. {_tex(table.note)}.}}", r"\medskip",
            rf"\setbox0=\hbox{{\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}", r"\toprule",
            " & ".join(map(_tex, table.head)) + r" \\", r"\midrule", *rows, r"\bottomrule", r"\end{tabular}}%",
            r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\box0}\else\box0\fi", r"\end{table}", "",
        ]  # fmt: skip
    return "\n".join(parts)


def _tex(text: str) -> str:
    """Characters that TeX takes as its own are named; those that its fonts may lack are question marks."""
    return "".join(
        TEX.get(c, c if (c.isascii() and c.isprintable()) or ("À" <= c <= "ÿ" and c.isalpha()) else "?")
        for c in " ".join(text.split())
    )


def flat_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One flat row per group with every digit: what table.csv holds."""
    return [_flat(comparison, block, group) for block in comparison.blocks for group in block.groups]


def _flat(comparison: Comparison, block: Block, group: Group) -> dict[str, Any]:
    row: dict[str, Any] = {"block": block.title, "group": group.label, "n": len(group.runs)}
    row["seeds"] = " ".join(str(run.row["seed"]) for run in group.runs)
    for key, interval in group.figures.items():
        row |= _ends(key, interval)
    row |= {key: setting(group, key) for key in comparison.columns if key not in group.figures}
    row["baseline"] = group.baseline
    row |= _ends("difference", group.difference.interval if group.difference else None)
    row |= {
        "method": group.difference.method if group.difference else None,
        "p": group.difference.p if group.difference else None,
        "p_holm": group.p_holm,
        "verdict": group.verdict,
        "on_front": group.front,
        "front_probability": group.front_probability,
    }
    for each in group.budgets:
        row |= _ends(f"{QUALITIES[comparison.quality].curve}_at_{each.axis}_{each.budget!r}", each.interval)
    return row


def _ends(key: str, interval: Interval | None) -> dict[str, float | None]:
    names = (f"{key}_mean", f"{key}_ci95_low", f"{key}_ci95_high")
    values = (interval.mean, interval.low, interval.high) if interval else (None, None, None)
    return dict(zip(names, values, strict=True))


def comma_separated(comparison: Comparison) -> str:
    """Numbers with all their digits: reading them back gives the same ones."""
    rows = flat_rows(comparison)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def everything(comparison: Comparison) -> dict[str, Any]:
    """The whole comparison, with every run's own figures, as JSON holds it."""
    return {
        "quality": comparison.quality,
        "cost": comparison.cost,
        "blocks": [
            {
                "title": block.title,
                "notes": block.notes,
                "groups": [_group(comparison, group) for group in block.groups],
            }
            for block in comparison.blocks
        ],
        "notes": comparison.notes,
        "left_out": [{"folder": folder, "reason": reason} for folder, reason in comparison.left_out],
        "reference": comparison.reference,
    }


def _group(comparison: Comparison, group: Group) -> dict[str, Any]:
    plain = {key: value for key, value in vars(group).items() if key != "runs"}
    plain["figures"] = {key: asdict(each) if each else None for key, each in group.figures.items()}
    plain["difference"] = asdict(group.difference) if group.difference else None
    plain["budgets"] = [asdict(each) for each in group.budgets]
    keys = ("name", "signature", "seed", *dict.fromkeys([comparison.quality, comparison.cost, *comparison.columns]))
    plain["runs"] = [{"folder": str(run.folder)} | {key: run.row.get(key) for key in keys} for run in group.runs]
    return plain


def json_text(comparison: Comparison) -> str:
    return json.dumps(everything(comparison), indent=1, allow_nan=False) + "\n"
