"""A comparison as text: for the terminal, Markdown and LaTeX."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from softmoe_cli.compare.findings import closing, findings, front, headline, provisos, sentences
from softmoe_cli.compare.groups import EQUAL_COST, Block, Comparison, Group, setting
from softmoe_cli.compare.units import Unit, cell, chance_cell, difference_cell, figure, measure_name, titled, unit
from softmoe_cli.compare.verdicts import TASK_MEASURE
from softmoe_cli.run.rows import AXES, COSTS, CURVES, QUALITIES
from softmoe_cli.text import aligned, folded

LEGEND = (
    "± is half a 95% t-interval over n seeds, and (a to b) an any-time 95% interval; on the front: nothing is at least "
    f"as good at no more cost, where costs that all lie within {EQUAL_COST:.0%} are one; P(front): how often the group "
    "is there when its means are drawn anew given their seeds; P(better): how often a new run is better than the "
    "baseline's of the same seed"
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
TASKS_NOTE = (
    "Each task's own test images, among its own classes; one family of verdicts over tasks times comparisons: they "
    "say where a difference comes from, and never replace the main measure's"
)
CURVE_NOTE = (
    "Quality on the validation images, each run's curve interpolated linearly and never extrapolated; a point inside a "
    "curve was reached under a schedule made for the whole run"
)
CUTS_TITLE = "cuts and seeds apart"
CUTS_NOTE = (
    "Each cut draws other training, validation and test images from the same ones; a cut's mean over its seeds is one "
    "number, and n counts cuts. Deviations are of a one-way random effects analysis of variance: between seeds "
    "the root of the mean square within cuts, between cuts without the seeds' part. ± is half a 95% t-interval over "
    "cuts of these images; for new images it is wider, by the root of 1 + cuts times test images over training images "
    "(Nadeau and Bengio, 2003), as cuts share most of their images"
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
            values[axis] += [run.looks[-1][axis] for run in group.runs if run.looks and axis in run.looks[-1]]
    return {key: unit(key, found) for key, found in values.items()}


def tables(comparison: Comparison) -> list[Table]:
    """Per block: groups with their figures; of a mix then each task; quality at equal cost; the second measure."""
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
        row = [group.label, group.count, reached]
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
    text = cell(cost, group.intervals[cost], shown.factor) or "not stated"
    if any(cost in run.row.get("computed", ()) for run in group.runs):
        text = f"{text}\ncomputed"
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
                row = [group.label, group.count, figure(axis, each.budget * shown[axis].factor), reached]
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
        *_tasks(block),
        *_budgets(comparison, block, shown),
        *_reached(comparison, block, shown),
        *_cuts(comparison, block),
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


def _cuts(comparison: Comparison, block: Block) -> list[Table]:
    """A table of how much cuts and seeds vary, where there are several cuts."""
    key, rows = comparison.quality, []
    for group in block.groups:
        told = [(group.label, group.spread), (f"{group.label} minus {group.baseline}", group.difference_spread)]
        for name, each in told:
            if each is not None:
                between, within = ("" if v is None else figure(key, v) for v in (each.between, each.within))
                wider = "" if each.new_images_half is None else f"± {figure(key, each.new_images_half)}"
                of = f"{each.runs} in {each.cuts}"
                rows.append([name, of, between, within, cell(key, each.mean, signed=name != group.label), wider])
    if not rows:
        return []
    head = ["group", "runs in cuts", "deviation between cuts", "between seeds", QUALITIES[key].title, "for new images"]
    return [Table(f"{block.title}: {CUTS_TITLE}", CUTS_NOTE, head, rows, block.title)]


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
            group.label, group.count, cell(key, told.interval), difference_cell(key, told.difference),
            ",\n".join(words), chance_cell(told.p_better),
        ])  # fmt: skip
    head = ["group", "n", QUALITIES[key].title, _minus(block), "verdict", "P(better)"]
    return [
        Table(f"{block.title}: {QUALITIES[key].title}, beside the main measure", SECOND_NOTE, head, rows, block.title)
    ]


def _tasks(block: Block) -> list[Table]:
    """A table with the test top-1 of each task, where the runs are of a mix."""
    baselines = {group.baseline for group in block.groups}
    judged = any(group.difference for group in block.groups)
    rows = []
    for name in block.groups[0].tasks:
        for group in block.groups:
            own = group.tasks[name]
            row = [group.label, group.count, name, cell(TASK_MEASURE, own.interval)]
            if judged:
                verdict = own.verdict or ("baseline" if group.label in baselines else "")
                words = [verdict, *(group.conditions if own.verdict else [])]
                row += [difference_cell(TASK_MEASURE, own.difference), ",\n".join(words), chance_cell(own.p_better)]
            rows.append(row)
    if not rows:
        return []
    head = ["group", "n", "task", QUALITIES[TASK_MEASURE].title]
    head += [_minus(block), "verdict", "P(better)"] if judged else []
    return [Table(f"{block.title}: {measure_name(TASK_MEASURE)} of each task", TASKS_NOTE, head, rows, block.title)]


def remarks(comparison: Comparison) -> list[str]:
    """Every note, and a line per folder that was left out."""
    notes = list(comparison.notes)
    for block in comparison.blocks:
        notes += [f"{block.title}: {note}" if len(comparison.blocks) > 1 else note for note in block.notes]
    return notes + [f"left out: {folder}: {reason}" for folder, reason in comparison.left_out]


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
