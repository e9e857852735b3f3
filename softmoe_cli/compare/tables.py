"""A comparison as text: for the terminal, Markdown, LaTeX, CSV and JSON."""

import csv
import io
import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from softmoe_cli.compare.checklist import checklist
from softmoe_cli.compare.findings import best, closing, front, headline, power_line, provisos
from softmoe_cli.compare.groups import Block, Comparison, Group, setting
from softmoe_cli.compare.intervals import Interval
from softmoe_cli.compare.units import Unit, cell, chance_cell, difference_cell, figure, titled, unit
from softmoe_cli.run.rows import AXES, COSTS, CURVES, QUALITIES
from softmoe_cli.text import aligned, folded, spreadsheet_cell

LEGEND = (
    "± is half a 95% t-interval over n seeds, and (a to b) an any-time 95% interval; on the front: nothing is at least "
    "as good at no more cost; P(front): how often the group is there when its means are drawn anew given their seeds; "
    "P(better): how often a new run is better than the baseline's of the same seed"
)
SECOND_NOTE = (
    "A second measure, with a family of verdicts of its own: it may support what the main measure says, and never "
    "replaces it"
)
REACHED_NOTE = (
    "The cost at which the best look so far first reached the quality, linear between looks, geometric mean over "
    "seeds; the ratio is the baseline's cost over the group's, paired by seed where seeds are shared, with the 95% "
    "interval of its logarithm; where a seed never got there, the mean of these seeds has a bound alone"
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


def units(comparison: Comparison) -> dict[str, Unit]:
    """How each cost is shown, in every table and figure of a comparison."""
    values: dict[str, list[float]] = {key: [] for key in (comparison.cost, *AXES, *comparison.columns) if key in COSTS}
    for group in comparison.groups:
        for key, interval in group.intervals.items():
            if key in values and interval is not None:
                values[key].append(interval.mean)
        for axis in AXES:
            values[axis] += [run.looks[-1][axis] for run in group.runs if run.looks]
    return {key: unit(key, found) for key, found in values.items()}


def tables(comparison: Comparison) -> list[Table]:
    """Per block: groups with their figures; then quality at equal cost; then the second measure."""
    shown, found = units(comparison), []
    for block in comparison.blocks:
        found.append(_groups(comparison, block, shown))
        found += _beside(comparison, block, shown)
    return found


def reference_tables(comparison: Comparison) -> list[Table]:
    """The rows that --reference names, as they are."""
    if not comparison.reference:
        return []
    head = list(comparison.reference[0])
    rows = [[row[key] for key in head] for row in comparison.reference]
    return [Table(f"Reference, not ours: {comparison.reference_name}", REFERENCE, head, rows)]


def _groups(comparison: Comparison, block: Block, shown: dict[str, Unit], *, brief: bool = False) -> Table:
    """Groups with their figures; a brief one has what a terminal has room for, and the columns that were asked for."""
    quality, cost = comparison.quality, comparison.cost
    columns = [key for key in (comparison.typed if brief else comparison.columns) if key not in (quality, cost)]
    head = ["group", "n", QUALITIES[quality].title]
    judged = any(group.difference for group in block.groups)
    if judged:
        head += [_minus(block), "verdict", *(() if brief else ("P(better)",))]
    head += [shown[cost].head, *(() if brief else ("front", "P(front)"))]
    head += [shown[key].head if key in shown else titled(key) for key in columns]
    baselines = {group.baseline for group in block.groups}
    rows = []
    for group in block.groups:
        reached = cell(quality, group.intervals[quality]) + ("\nat chance" if group.at_chance else "")
        row = [group.label, str(len(group.runs)), reached]
        if judged:
            verdict = group.verdict or ("baseline" if group.label in baselines else "")
            row += [difference_cell(quality, group.difference), ",\n".join([verdict, *group.conditions])]
            row += [] if brief else [chance_cell(group.p_better)]
        row.append(_cost(group, cost, shown[cost]))
        if not brief:
            chance = "" if group.front_probability is None else f"{100 * group.front_probability:.0f}%"
            row += [",\n".join(["yes", *provisos(group, cost)]) if group.front else "", chance]
        for key in columns:
            factor = shown[key].factor if key in shown else 1.0
            row.append(cell(key, group.intervals[key], factor) if key in group.intervals else setting(group, key))
        rows.append(row)
    return Table(block.title, LEGEND, head, rows, block.title)


def _minus(block: Block) -> str:
    """The head of the column of differences; it names the baseline if there is only one and its label is short."""
    baselines = {group.baseline for group in block.groups if group.baseline}
    (name, *others) = baselines or {"its baseline"}
    return f"minus {name}" if not others and "," not in name and len(name) < 25 else "minus its baseline"


def _cost(group: Group, cost: str, shown: Unit) -> str:
    """A group's cost, and what its checkpoints had cost before."""
    text = cell(cost, group.intervals[cost], shown.factor)
    if not group.pretrained or not COSTS[cost].trained:
        return text
    before = group.checkpoint_pflop if cost == "train_pflop" else None
    if group.source_counted and before is not None:
        return f"{text}\n{figure(cost, before * shown.factor)} of it its checkpoint's"
    if before is None:
        return f"{text}\n+ pretraining, not counted"
    return f"{text}\n+ {figure(cost, before * shown.factor)} of its checkpoint"


def _budgets(comparison: Comparison, block: Block, shown: dict[str, Unit]) -> list[Table]:
    """A table per axis: budgets one below the other, and the groups under each."""
    found = []
    key = QUALITIES[comparison.quality].curve
    judged = any(each.difference for group in block.groups for each in group.budgets)
    for axis in dict.fromkeys(each.axis for each in block.groups[0].budgets):
        rows = []
        for place, first in enumerate(block.groups[0].budgets):
            if first.axis != axis:
                continue
            for group in block.groups:
                each = group.budgets[place]
                reached = cell(key, each.interval) if each.interval else f"({each.reason})"
                row = [group.label, str(len(group.runs)), figure(axis, each.budget * shown[axis].factor), reached]
                if judged:
                    baseline = "baseline" if group.label in {other.baseline for other in block.groups} else ""
                    words = [
                        each.verdict or baseline,
                        *(["any-time"] if each.difference and each.difference.method == "any-time" else []),
                        *(provisos(group, axis)[-1:] if each.verdict and group.pretrained else []),
                    ]
                    row += [difference_cell(key, each.difference), ",\n".join(words)]
                rows.append(row)
        head = ["group", "n", f"at {shown[axis].head}", CURVES[key].title]
        if judged:
            head += [_minus(block), "verdict"]
        title = f"{block.title}: {CURVES[key].title} at equal {COSTS[axis].amount}"
        found.append(Table(title, CURVE_NOTE, head, rows, block.title))
    return found


def _beside(comparison: Comparison, block: Block, shown: dict[str, Unit]) -> list[Table]:
    """The tables beside a block's first one."""
    return [
        *_budgets(comparison, block, shown),
        *_reached(comparison, block, shown),
        *_second(comparison, block),
    ]


def _reached(comparison: Comparison, block: Block, shown: dict[str, Unit]) -> list[Table]:
    """A table of the costs at which groups first reached a quality, where --to-quality asks for it."""
    found = [(group, group.reached) for group in block.groups if group.reached]
    if not found:
        return []
    axis, key = found[0][1].axis, QUALITIES[comparison.quality].curve
    rows = []
    for group, told in found:
        if told.ratio is not None:
            low, high = told.ratio.low, told.ratio.high
            ratio = f"{told.ratio.mean:.3g}" + (f" ({low:.3g} to {high:.3g})" if low and high else "")
        else:
            bounds = {"below": told.below, "above": told.above}
            ratio = " ".join(f"{word} {bound:.3g}" for word, bound in bounds.items() if bound) or "cannot be told"
        cost = "" if told.cost is None else figure(axis, told.cost * shown[axis].factor)
        times = [f"{count} of {n}" for count, n in ((told.reached, told.n), (told.baseline_reached, told.baseline_n))]
        words = provisos(group, axis)[-1:] if group.pretrained else []
        rows.append([group.label, *times, cost, ",\n".join([ratio, *words])])
    goal = (
        "the baseline's" if comparison.to_quality == "baseline" else f"a {CURVES[key].title} of {comparison.to_quality}"
    )
    goal = f"{goal} {CURVES[key].title}" if comparison.to_quality == "baseline" else goal
    against = _minus(block).replace("minus ", "")
    head = ["group", "reached it", f"{against} did", shown[axis].head, f"times cheaper than {against}"]
    title = f"{block.title}: {COSTS[axis].amount} to reach {goal}"
    return [Table(title, REACHED_NOTE, head, rows, block.title)]


def _second(comparison: Comparison, block: Block) -> list[Table]:
    """A table with the second measure, where groups are judged by it."""
    key, rows = comparison.second, []
    baselines = {group.baseline for group in block.groups}
    if not any(group.second and group.second.difference for group in block.groups):
        return []
    for group in block.groups:
        told = group.second
        assert told is not None
        verdict = told.verdict or ("baseline" if group.label in baselines else "")
        words = [verdict, *(group.conditions if told.verdict else [])]
        rows.append([
            group.label, str(len(group.runs)), cell(key, told.interval), difference_cell(key, told.difference),
            ",\n".join(words), chance_cell(told.p_better),
        ])  # fmt: skip
    head = ["group", "n", QUALITIES[key].title, _minus(block), "verdict", "P(better)"]
    return [
        Table(f"{block.title}: {QUALITIES[key].title}, beside the main measure", SECOND_NOTE, head, rows, block.title)
    ]


def sentences(comparison: Comparison, block: Block) -> list[str]:
    """What a table says in all: which groups may be the best, what it could have seen, and the paragraph for a paper's
    checklist."""
    told = [best(block), power_line(comparison, block)]
    return [f"{each}." for each in told if each] + [f"Checklist. {checklist(comparison, block)}"]


def remarks(comparison: Comparison) -> list[str]:
    """Every note, and a line per folder that was left out."""
    notes = list(comparison.notes)
    for block in comparison.blocks:
        notes += [f"{block.title}: {note}" if len(comparison.blocks) > 1 else note for note in block.notes]
    return notes + [f"left out: {folder}: {reason}" for folder, reason in comparison.left_out]


def findings(comparison: Comparison, block: Block) -> list[str]:
    """Sentences for files that have no headline: each table's, with its title where there are several."""
    told = [*headline(comparison, block), *sentences(comparison, block), closing(comparison, block)]
    return [f"{block.title}: {each}" if len(comparison.blocks) > 1 else each for each in told if each]


def terminal(comparison: Comparison, width: int | None = None) -> str:
    """What is printed: on a terminal no wider than `width`, in a file one line per group and note."""
    shown, parts = units(comparison), []

    def laid_out(table: Table) -> str:
        return printed_table(table, width)

    def wrapped(text: str) -> str:
        return wrapped_line(text, width)

    for block in comparison.blocks:
        parts.append(laid_out(_groups(comparison, block, shown, brief=True)))
        told = [f"{front(comparison, block)}.", *sentences(comparison, block)]
        parts.append("\n".join(map(wrapped, told)))
        parts += [laid_out(table) for table in _beside(comparison, block, shown)]
    if comparison.reference:
        parts.append(
            f"{len(comparison.reference)} rows of reference, not ours, are in the files: {comparison.reference_name}"
        )
    parts.append("\n".join(wrapped(f"- {note}") for note in [LEGEND, CURVE_NOTE, *remarks(comparison)]))
    for block in comparison.blocks:
        title = [] if len(comparison.blocks) == 1 else [block.title]
        last = [*title, *headline(comparison, block), closing(comparison, block)]
        parts.append("\n".join(wrapped(each) for each in last if each))
    return "\n\n".join(parts)


def printed_table(table: Table, width: int | None) -> str:
    """A table under its title, folded to a terminal's width."""
    rows = [table.head, *table.rows]
    title = wrapped_line(table.title, width)
    return f"{title}\n{aligned(rows, markdown=False) if width is None else folded(rows, width)}"


def wrapped_line(text: str, width: int | None) -> str:
    if width is None:
        return text
    return textwrap.fill(text, width, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def markdown(comparison: Comparison) -> str:
    told = [each for block in comparison.blocks for each in findings(comparison, block)]
    return markdown_of([*tables(comparison), *reference_tables(comparison)], [*told, *remarks(comparison)])


def markdown_of(shown: Sequence[Table], told: Sequence[str]) -> str:
    """Tables, and notes below them."""
    parts = []
    for table in shown:
        rows = [[escaped(text).replace("|", "\\|") for text in row] for row in [table.head, *table.rows]]
        parts.append(f"## {escaped(table.title)}\n\n{aligned(rows, markdown=True)}\n\n{table.note}.")
    notes = [escaped(note) for note in told]
    return "\n\n".join([*parts, *(["## Notes\n\n" + "\n".join(f"- {note}" for note in notes)] if notes else [])]) + "\n"


def escaped(text: str) -> str:
    """The text on one line, with the special characters of Markdown and HTML escaped."""
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
    told = [each for block in comparison.blocks for each in findings(comparison, block)]
    return "\n".join([latex_of(tables(comparison)), r"\begin{sloppypar}", *map(_tex, told), r"\end{sloppypar}", ""])


def latex_of(shown: Sequence[Table]) -> str:
    """booktabs tables to \\input. One that is wider than the text is shrunk to it."""
    parts = [r"% \usepackage[T1]{fontenc} \usepackage{booktabs} \usepackage{graphicx}"]
    for table in shown:
        rows = [" & ".join([_tex(row[0]), *map(_tex_number, row[1:])]) + r" \\" for row in table.rows]
        parts += [
            r"\begin{table}", r"\centering", r"\footnotesize", r"\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{_tex(table.title)}. {_tex(table.note)}.}}", r"\medskip",
            rf"\setbox0=\hbox{{\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}", r"\toprule",
            " & ".join(map(_tex, table.head)) + r" \\", r"\midrule", *rows, r"\bottomrule", r"\end{tabular}}%",
            r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\box0}\else\box0\fi", r"\end{table}", "",
        ]  # fmt: skip
    return "\n".join(parts)


def _tex(text: str) -> str:
    """TeX's special characters become commands; characters that its fonts may lack become question marks."""
    return "".join(
        TEX.get(c, c if (c.isascii() and c.isprintable()) or ("À" <= c <= "ÿ" and c.isalpha()) else "?")
        for c in " ".join(text.split())
    )


def _tex_number(text: str) -> str:
    """A cell; if it begins with a number, the number's sign is a minus instead of a hyphen."""
    return f"$-${_tex(text[1:])}" if re.match(r"-[\d.]", text) else _tex(text)


def flat_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """One flat row per group with every digit: what table.csv holds."""
    return [_flat(comparison, block, group) for block in comparison.blocks for group in block.groups]


def _flat(comparison: Comparison, block: Block, group: Group) -> dict[str, Any]:
    row: dict[str, Any] = {"block": block.title, "group": group.label, "n": len(group.runs)}
    row["seeds"] = " ".join(str(run.row["seed"]) for run in group.runs)
    for key, interval in group.intervals.items():
        row |= _ends(key, interval)
    row |= {key: setting(group, key) for key in comparison.columns if key not in group.intervals}
    row["baseline"] = group.baseline
    row |= _ends("difference", group.difference.interval if group.difference else None)
    row |= {
        "method": group.difference.method if group.difference else None,
        "p": group.difference.p if group.difference else None,
        "p_holm": group.p_holm,
        "p_equal_holm": group.p_equal_holm,
        "verdict": group.verdict,
        **_chance("p_better", group.p_better),
        "may_be_best": group.may_be_best,
        "cost_ratio": group.cost_ratio,
        "conditions": "; ".join(group.conditions),
        "chance_pct": group.chance_pct,
        "at_chance": group.at_chance,
        "pretrained": group.pretrained,
        "source_counted": group.source_counted,
        "checkpoint_train_pflop": group.checkpoint_pflop,
        "on_front": group.front,
        "front_probability": group.front_probability,
    }
    row |= _flat_outlook(block, group) | _flat_reached(group) | _flat_second(comparison, group)
    for each in group.budgets:
        name = f"{QUALITIES[comparison.quality].curve}_at_{each.axis}_{each.budget!r}"
        row |= _ends(name, each.interval)
        row |= _ends(f"{name}_difference", each.difference.interval if each.difference else None)
        row[f"{name}_verdict"] = each.verdict
    return row


def _flat_outlook(block: Block, group: Group) -> dict[str, Any]:
    """What the table could have seen is the same in all rows of a table."""
    seen = block.outlook
    needed = seen.needed.get(group.label) if seen else None
    return {
        "sees": seen.sees if seen else None,
        "deviation": seen.deviation.mean if seen else None,
        "seeds_needed": needed.seeds if needed else None,
        "seeds_needed_fewest": needed.fewest if needed else None,
        "seeds_needed_most": needed.most if needed else None,
    }


def _flat_reached(group: Group) -> dict[str, Any]:
    told = group.reached
    if told is None:
        return {}
    row: dict[str, Any] = {"reached": told.reached, f"reached_at_{told.axis}": told.cost}
    return (
        row
        | _chance("times_cheaper", told.ratio)
        | {"times_cheaper_below": told.below, "times_cheaper_above": told.above}
    )


def _flat_second(comparison: Comparison, group: Group) -> dict[str, Any]:
    key, told = comparison.second, group.second
    if told is None:
        return {}
    row = {} if key in group.intervals else _ends(key, told.interval)
    row |= _ends(f"{key}_difference", told.difference.interval if told.difference else None)
    verdict = {f"{key}_p_holm": told.p_holm, f"{key}_verdict": told.verdict}
    return row | verdict | _chance(f"{key}_p_better", told.p_better)


def _chance(key: str, interval: Interval | None) -> dict[str, float | None]:
    return {key if name.endswith("_mean") else name: value for name, value in _ends(key, interval).items()}


def _ends(key: str, interval: Interval | None) -> dict[str, float | None]:
    names = (f"{key}_mean", f"{key}_ci95_low", f"{key}_ci95_high")
    values = (interval.mean, interval.low, interval.high) if interval else (None, None, None)
    return dict(zip(names, values, strict=True))


def comma_separated(comparison: Comparison) -> str:
    return csv_of(flat_rows(comparison))


def csv_of(rows: Sequence[dict[str, Any]]) -> str:
    """Numbers with all their digits: reading them back gives the same ones."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: spreadsheet_cell(value) for key, value in row.items()} for row in rows)
    return out.getvalue()


def everything(comparison: Comparison) -> dict[str, Any]:
    """The whole comparison, with every run's own figures, as JSON holds it."""
    return {
        "quality": comparison.quality,
        "second": comparison.second,
        "margin": comparison.margin,
        "to_quality": comparison.to_quality,
        "cost": comparison.cost,
        "blocks": [
            {
                "title": block.title,
                "notes": block.notes,
                "outlook": asdict(block.outlook) if block.outlook else None,
                "sentences": findings(comparison, block),
                "groups": [_group(comparison, group) for group in block.groups],
            }
            for block in comparison.blocks
        ],
        "notes": comparison.notes,
        "commands": comparison.commands,
        "left_out": [{"folder": folder, "reason": reason} for folder, reason in comparison.left_out],
        "reference": comparison.reference,
    }


def _group(comparison: Comparison, group: Group) -> dict[str, Any]:
    plain = {"figures" if key == "intervals" else key: value for key, value in vars(group).items() if key != "runs"}
    plain["figures"] = {key: asdict(each) if each else None for key, each in group.intervals.items()}
    plain |= {"pretrained": group.pretrained, "source_counted": group.source_counted}
    plain |= {"checkpoint_train_pflop": group.checkpoint_pflop}
    plain["difference"] = asdict(group.difference) if group.difference else None
    plain["p_better"] = asdict(group.p_better) if group.p_better else None
    plain["second"] = asdict(group.second) if group.second else None
    plain["reached"] = asdict(group.reached) if group.reached else None
    plain["budgets"] = [asdict(each) for each in group.budgets]
    keys = ("name", "signature", "seed", *dict.fromkeys([comparison.quality, comparison.cost, *comparison.columns]))
    plain["runs"] = [{"folder": run.place} | {key: run.row.get(key) for key in keys} for run in group.runs]
    return plain


def json_text(comparison: Comparison) -> str:
    return json.dumps(everything(comparison), indent=1, allow_nan=False) + "\n"
