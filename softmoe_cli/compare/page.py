"""A comparison as one HTML file that needs nothing else: no network, no script or style of others. page.html beside
this file is the frame, with style and script; its `{{ ... }}` are filled in here."""

import base64
import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from softmoe_cli.compare.findings import closing, front, headline, provisos, sentences
from softmoe_cli.compare.groups import EQUAL_COST, LABEL_LETTERS, Block, Comparison, Group
from softmoe_cli.compare.intervals import Interval
from softmoe_cli.compare.runs import FINGERPRINT, FinishedRun, said_seed
from softmoe_cli.compare.styles import KINDS, reference_points, same_axes, styles
from softmoe_cli.compare.tables import CURVE_NOTE, LEGEND, Table, reference_tables, remarks, tables, units
from softmoe_cli.compare.units import Unit, figure
from softmoe_cli.run.rows import AXES, COSTS, CURVES, QUALITIES, ROUTING, number
from softmoe_cli.text import printable, shortened

TEMPLATE = Path(__file__).with_suffix(".html")
PAGE_MARK = b'<meta name="generator" content="softmoe compare">'
"""Marks a page as written by this command: only a folder with such a page is written over."""


def page(comparison: Comparison, figures: dict[str, bytes], out: Path) -> str:
    """The whole file. `figures` are shown where scripts are off; links to runs lead from the folder `out`."""
    runs = sum(len(group.runs) for group in comparison.groups)
    title = f"{_studies(comparison)}: {QUALITIES[comparison.quality].title} by {COSTS[comparison.cost].amount}"
    body = [f"<h1>{escape(title)}</h1>"]
    for block in comparison.blocks:
        told = f"<b>{escape(block.title)}.</b> " if len(comparison.blocks) > 1 else ""
        lead = " ".join(filter(None, [*headline(comparison, block), closing(comparison, block)]))
        body.append(f'<p class="lead">{told}{escape(lead)}</p>')
    body.append(f"<p>{len(comparison.groups)} groups, {runs} finished runs. {escape(LEGEND)}.</p>")
    all_tables = tables(comparison)
    for index, block in enumerate(comparison.blocks):
        mine = [table for table in all_tables if table.block == block.title]
        body.append(_section(index, block, mine, comparison))
    body += [_details(table) for table in reference_tables(comparison)]
    if comparison.reference:
        body.append('<div class="chart" data-reference="1"></div>')
    notes = "".join(f"<li>{escape(note)}</li>" for note in remarks(comparison))
    body.append(f"<h2>Notes</h2><ul>{notes}<li>{escape(CURVE_NOTE)}</li></ul>")
    body += [_made(comparison), _runs(comparison, out)]
    images = "".join(
        f'<img alt="{name}" src="data:image/svg+xml;base64,{base64.b64encode(figures[f"{name}.svg"]).decode()}">'
        for name in ("pareto", "curves")
    )
    body.append(f"<noscript>{images}</noscript>")
    return filled_page("compare", title, body, _data(comparison))


def filled_page(command: str, title: str, body: Sequence[str], data: dict[str, Any]) -> str:
    """The frame with what a command shows in it; `data` is what its charts are drawn from."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":  # so that no label can end the script
        text = text.replace(character, f"\\u{ord(character):04x}")
    parts = {"command": command, "title": escape(title), "body": "\n".join(body), "data": text}
    frame = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{ (command|title|body|data) \}\}", lambda place: parts[place[1]], frame)


def _studies(comparison: Comparison) -> str:
    names = sorted({str(run.row.get("study")) for group in comparison.groups for run in group.runs})
    more = f" and {len(names) - STUDIES} more" if len(names) > STUDIES else ""
    return ", ".join(shortened(name, LABEL_LETTERS) for name in names[:STUDIES]) + more


STUDIES = 3


def _section(index: int, block: Block, mine: list[Table], comparison: Comparison) -> str:
    parts = [f"<section><h2>{escape(block.title)}</h2>", html_table(mine[0], cards=True)]
    parts.append(f"<p>{escape(front(comparison, block))}.</p>")
    parts += [f"<p>{escape(each)}</p>" for each in sentences(comparison, block)]
    parts.append(f'<div class="chart" data-pareto="{index}"></div>')
    for table in mine[1:]:
        parts.append(f"<h3>{escape(table.title.removeprefix(f'{block.title}: '))}</h3>{html_table(table, cards=True)}")
    parts.append(f'<h3>Curves</h3><div class="chart" data-curves="{index}"></div>')
    routing = _routing(block)
    if routing is not None:
        words = "".join(f"<dt>{name}</dt><dd>{ROUTING[name].meaning}</dd>" for name in routing.head if name in ROUTING)
        legend = f"<details><summary>What the words mean</summary><dl>{words}</dl></details>"
        parts.append(f"<h3>{escape(routing.title)}</h3><p>{escape(routing.note)}</p>{html_table(routing)}{legend}")
    return "\n".join([*parts, "</section>"])


def _routing(block: Block) -> Table | None:
    """What the routers did at each run's last look: mean over seeds (and over layers, because the rows hold such
    means)."""
    rows: list[dict[str, float]] = []
    for group in block.groups:
        lasts = [run.looks[-1] for run in group.runs if run.looks]
        keys = [key for key in (lasts[0] if lasts else ()) if all(key in last for last in lasts)]
        rows.append({
            key.removeprefix("routing_"): math.fsum(last[key] for last in lasts) / len(lasts)
            for key in keys
            if key.startswith("routing_")
        })  # fmt: skip
    names = list(dict.fromkeys(key for row in rows for key in row))
    if not names:
        return None
    cells = [
        [group.label, *(f"{row[name]:.4g}" if name in row else "" for name in names)]
        for group, row in zip(block.groups, rows, strict=True)
        if row
    ]
    note = "Mean over MoE layers and seeds, on the first validation images."
    return Table("Routing at the last look", note, ["group", *names], cells)


def _made(comparison: Comparison) -> str:
    """What was run: commands, when, on what, with which versions and data, for how long."""
    runs = [run for group in comparison.groups for run in group.runs]
    days = sorted({_day(run)[:10] for run in runs})
    own = [run for run in runs if run.chosen is None]
    machines = Counter(f"{run.row.get('hardware')}, torch {run.row.get('torch')}" for run in own)
    versions = Counter(f"softmoe {run.row.get('softmoe')}, commit {run.row.get('commit')}" for run in own)
    data = Counter(
        f"{run.row['data']}: {_many(run, 'train_images')} training images, {_many(run, 'test_images')} test images"
        for run in runs
    )
    budgets = Counter(f"{_many(run, 'steps')} updates of {_many(run, 'batch_size')} images" for run in own)
    told = {
        "commands": comparison.commands,
        "finished": [" to ".join(dict.fromkeys([days[0], days[-1]])) + " (UTC, when the results were written)"],
        **{name: [f"{text} ({count} runs)" for text, count in sorted(kinds.items())] for name, kinds in
           {"machine": machines, "version": versions, "data": data, "budget": budgets}.items()},
    }  # fmt: skip
    rows = "".join(
        f"<dt>{name}</dt>" + "".join(f"<dd>{escape(shortened(each, MOST_LETTERS))}</dd>" for each in each_of)
        for name, each_of in told.items()
    )
    return f"<h2>What was run</h2><dl>{rows}</dl>"


MOST_LETTERS = 1000


def _many(run: FinishedRun, key: str) -> str:
    value = run.row.get(key)
    return f"{value:,.6g}" if number(value) else "?"


def _day(run: FinishedRun) -> str:
    return datetime.fromtimestamp(run.finished, UTC).strftime("%Y-%m-%d %H:%M")


def _runs(comparison: Comparison, out: Path) -> str:
    """Every run with a link to its folder."""
    shown = units(comparison)[comparison.cost]
    rows = []
    for group in comparison.groups:
        for run in group.runs:
            way = quote(os.fsencode(os.path.relpath(run.folder, out)))
            cells = [group.label, said_seed(run), figure(comparison.quality, run.row[comparison.quality]),
                     _of(run.row.get(comparison.cost), comparison.cost, shown.factor), _day(run)]  # fmt: skip
            end, said = ("/", run.folder.name) if run.chosen is None else ("", run.row["name"])
            name = escape(shortened(printable(said), MOST_LETTERS))
            rest = "".join(f"<td>{escape(text)}</td>" for text in cells)
            rows.append(f'<tr><th scope=row><a href="{way}{end}">{name}</a></th>{rest}</tr>')
    head = ["run", "group", "seed", QUALITIES[comparison.quality].title, shown.head, "finished, UTC"]
    count = f"<summary>{len(rows)} runs, with links to their folders</summary>"
    return f"<h2>Runs</h2><details>{count}{_framed(head, ''.join(rows))}</details>"


def _of(value: float | None, key: str, factor: float) -> str:
    return "" if value is None else figure(key, value * factor)


def html_table(table: Table, *, cards: bool = False) -> str:
    """With `cards` a narrow screen shows a card for each row instead of a table that is cut."""
    rows = "".join(
        "<tr>"
        + "".join(_cell(i, name, text) for i, (name, text) in enumerate(zip(table.head, row, strict=True)))
        + "</tr>"
        for row in table.rows
    )
    return _framed(table.head, rows, "cards" if cards else "")


def _framed(names: Sequence[str], rows: str, kind: str = "") -> str:
    """A table that scrolls where it is wider than the page, with a shadow on the side that is hidden."""
    head = "".join(f"<th scope=col><button>{escape(name.replace('_', ' '))}</button></th>" for name in names)
    table = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="wide" tabindex="0">{table}</div>'


def _cell(column: int, name: str, text: str) -> str:
    shown = escape(text.replace(" ± ", "\u00a0±\u00a0")).replace("\n", "<br>")
    return f'<td data-head="{escape(name)}">{shown}</td>' if column else f"<th scope=row>{shown}</th>"


def _details(table: Table) -> str:
    rows = f"<details><summary>{len(table.rows)} rows</summary>{html_table(table)}</details>"
    return f"<h2>{escape(table.title)}</h2><p>{escape(table.note)}.</p>{rows}"


def _data(comparison: Comparison) -> dict[str, Any]:
    """What the charts draw."""
    marks, shown = styles(comparison.groups), units(comparison)
    data: dict[str, Any] = {
        "quality": QUALITIES[comparison.quality].title,
        "cost": shown[comparison.cost].head,
        "equal_cost": EQUAL_COST,
        "axes": [_axes(block, shown) for block in comparison.blocks],
        "axis": comparison.cost if comparison.cost in AXES else AXES[0],
        "curve": QUALITIES[comparison.quality].curve,
        "blocks": [
            [
                _drawn(comparison, group, shown, *marks[group.label])
                for label in marks
                for group in block.groups
                if group.label == label
            ]
            for block in comparison.blocks
        ],
        "reference": [],
    }
    if comparison.reference:
        factor = shown[comparison.cost].factor if same_axes(comparison) else 1
        data["reference"] = [(_short(x * factor), y, kind) for x, y, kind in reference_points(comparison)]
        data["kinds"] = KINDS
        data["behind"] = same_axes(comparison)
        data["reference_name"] = comparison.reference_name
    return data


def _axes(block: Block, shown: dict[str, Unit]) -> dict[str, str]:
    """What curves can be drawn against: seconds only where all are of one machine."""
    machines = {tuple(str(run.row.get(key)) for key in FINGERPRINT) for group in block.groups for run in group.runs}
    return {axis: shown[axis].head for axis in AXES if not COSTS[axis].clocked or len(machines) == 1}


def _drawn(comparison: Comparison, group: Group, shown: dict[str, Unit], colour: int, marker: str) -> dict[str, Any]:
    ys = dict.fromkeys(key for run in group.runs for look in run.looks for key in look)
    names = {key: CURVES[key].title if key in CURVES else key.replace("routing_", "routing: ") for key in ys}
    kept = [key for key in names if key in CURVES or key.startswith("routing_")]
    return {
        "label": group.label,
        "colour": colour,
        "marker": marker,
        "n": len(group.runs),
        "x": _ends(group.intervals[comparison.cost], shown[comparison.cost].factor),
        "y": _ends(group.intervals[comparison.quality], 1.0),
        "front": group.front,
        "but": provisos(group, comparison.cost),
        "chance": group.front_probability,
        "verdict": ", ".join([group.verdict, *group.conditions]) if group.verdict else None,
        "baseline": group.baseline,
        "names": {key: names[key] for key in kept},
        "runs": [
            {"seed": run.row["seed"]}
            | {axis: [_short(look[axis] * shown[axis].factor) if axis in look else None for look in run.looks]
               for axis in AXES}
            | {key: [_short(look.get(key)) for look in run.looks] for key in kept}
            for run in group.runs
            if run.looks
        ],
    }  # fmt: skip


def _short(value: float | None) -> float | None:
    """Six digits: a pixel has fewer."""
    return None if value is None else float(f"{value:.6g}")


def _ends(interval: Interval | None, factor: float) -> list[float | None]:
    ends = (interval.mean, interval.low, interval.high) if interval else (None, None, None)
    return [None if end is None else end * factor for end in ends]
