"""A comparison as one HTML file that needs nothing else: no network, no script or style of others."""

import base64
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from softmoe_cli.compare import LETTERS, Block, Comparison, Group
from softmoe_cli.findings import front, headline, provisos
from softmoe_cli.intervals import Interval
from softmoe_cli.looks import KINDS, reference_points, same_axes, styles
from softmoe_cli.rows import number
from softmoe_cli.runs import AXES, CLOCK, CURVES, FINGERPRINT, QUALITIES, Run
from softmoe_cli.tables import CURVE_NOTE, LEGEND, Table, reference_tables, remarks, tables, units
from softmoe_cli.text import printable, shortened
from softmoe_cli.units import AMOUNTS, Unit, figure


def page(comparison: Comparison, figures: dict[str, bytes], out: Path) -> str:
    """The whole file. `figures` are shown where scripts are off; links to runs lead from the folder `out`."""
    runs = sum(len(group.runs) for group in comparison.groups)
    title = f"{_studies(comparison)}: {QUALITIES[comparison.quality].head} by {AMOUNTS[comparison.cost]}"
    body = [f"<h1>{escape(title)}</h1>"]
    for block in comparison.blocks:
        told = f"<b>{escape(block.title)}.</b> " if len(comparison.blocks) > 1 else ""
        body.append(f'<p class="lead">{told}{escape(" ".join(headline(comparison, block)))}</p>')
    body.append(f"<p>{len(comparison.groups)} groups, {runs} finished runs. {escape(LEGEND)}.</p>")
    found = tables(comparison)
    for index, block in enumerate(comparison.blocks):
        mine = [table for table in found if table.block == block.title]
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
    data = json.dumps(_data(comparison), separators=(",", ":"), allow_nan=False)
    for character in "<>&":  # so that no label can end the script
        data = data.replace(character, f"\\u{ord(character):04x}")
    return PAGE.format(title=escape(title), style=STYLE, body="\n".join(body), data=data, script=SCRIPT)


def _studies(comparison: Comparison) -> str:
    names = sorted({str(run.row.get("study")) for group in comparison.groups for run in group.runs})
    more = f" and {len(names) - STUDIES} more" if len(names) > STUDIES else ""
    return ", ".join(shortened(name, LETTERS) for name in names[:STUDIES]) + more


STUDIES = 3


def _section(index: int, block: Block, mine: list[Table], comparison: Comparison) -> str:
    parts = [f"<section><h2>{escape(block.title)}</h2>", _table(mine[0], cards=True)]
    parts.append(f"<p>{escape(front(comparison, block))}.</p>")
    parts.append(f'<div class="chart" data-pareto="{index}"></div>')
    for table in mine[1:]:
        parts.append(f"<h3>{escape(table.title.removeprefix(f'{block.title}: '))}</h3>{_table(table, cards=True)}")
    parts.append(f'<h3>Curves</h3><div class="chart" data-curves="{index}"></div>')
    routing = _routing(block)
    if routing is not None:
        words = "".join(f"<dt>{name}</dt><dd>{ROUTING[name]}</dd>" for name in routing.head if name in ROUTING)
        legend = f"<details><summary>What the words mean</summary><dl>{words}</dl></details>"
        parts.append(f"<h3>{escape(routing.title)}</h3><p>{escape(routing.note)}</p>{_table(routing)}{legend}")
    return "\n".join([*parts, "</section>"])


ROUTING = {
    "utilisation": "share of slots that hold a token; empty ones are computed all the same",
    "dropped_share": "share of tokens that no expert saw",
    "dead_share": "share of experts with less than a hundredth of the mean load",
    "load_max": "the busiest expert's load over the mean",
    "effective_experts_share": "exp(entropy of the loads) / experts: 1 when all are used alike",
    "gate_mean": "mean over tokens of the sum of their gates (sparse routers)",
    "dispatch_max": "a slot's largest share of one token, mean over slots (soft)",
    "dispatch_min": "a slot's smallest share of one token, mean over slots (soft)",
    "combine_max": "a token's largest share of one slot, mean over tokens (soft)",
    "combine_min": "a token's smallest share of one slot, mean over tokens (soft)",
    "slot_cosine_min": "how alike the slots' parameters are: the least alike pair (soft)",
    "slot_cosine_mean": "how alike the slots' parameters are: the mean over pairs (soft)",
    "slot_cosine_max": "how alike the slots' parameters are: the most alike pair (soft)",
    "scale": "the learned scale of the logits; near 1 the routing is still almost uniform (soft)",
}


def _routing(block: Block) -> Table | None:
    """What the routers did at each run's last look: mean over seeds (and, as the rows hold it, over layers)."""
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
    machines = Counter(f"{run.row.get('hardware')}, torch {run.row.get('torch')}" for run in runs)
    versions = Counter(f"softmoe {run.row.get('softmoe')}, commit {run.row.get('commit')}" for run in runs)
    data = Counter(
        f"{run.row['data']}: {_many(run, 'train_images')} training images, {_many(run, 'test_images')} test images"
        for run in runs
    )
    budgets = Counter(f"{_many(run, 'steps')} updates of {_many(run, 'batch_size')} images" for run in runs)
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


def _many(run: Run, key: str) -> str:
    value = run.row.get(key)
    return f"{value:,.6g}" if number(value) else "?"


def _day(run: Run) -> str:
    return datetime.fromtimestamp(run.finished, UTC).strftime("%Y-%m-%d %H:%M")


def _runs(comparison: Comparison, out: Path) -> str:
    """Every run with a link to its folder."""
    shown = units(comparison)[comparison.cost]
    rows = []
    for group in comparison.groups:
        for run in group.runs:
            way = quote(os.fsencode(os.path.relpath(run.folder, out)))
            cells = [group.label, str(run.row["seed"]), figure(comparison.quality, run.row[comparison.quality]),
                     figure(comparison.cost, run.row[comparison.cost] * shown.factor), _day(run)]  # fmt: skip
            name = escape(shortened(printable(run.folder.name), MOST_LETTERS))
            rest = "".join(f"<td>{escape(text)}</td>" for text in cells)
            rows.append(f'<tr><th scope=row><a href="{way}/">{name}</a></th>{rest}</tr>')
    head = ["run", "group", "seed", QUALITIES[comparison.quality].head, shown.head, "finished, UTC"]
    count = f"<summary>{len(rows)} runs, with links to their folders</summary>"
    return f"<h2>Runs</h2><details>{count}{_framed(head, ''.join(rows))}</details>"


def _table(table: Table, *, cards: bool = False) -> str:
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
    rows = f"<details><summary>{len(table.rows)} rows</summary>{_table(table)}</details>"
    return f"<h2>{escape(table.title)}</h2><p>{escape(table.note)}.</p>{rows}"


def _data(comparison: Comparison) -> dict[str, Any]:
    """What the charts draw."""
    look, shown = styles(comparison.groups), units(comparison)
    data: dict[str, Any] = {
        "quality": QUALITIES[comparison.quality].head,
        "cost": shown[comparison.cost].head,
        "axes": [_axes(block, shown) for block in comparison.blocks],
        "axis": comparison.cost if comparison.cost in AXES else AXES[0],
        "curve": QUALITIES[comparison.quality].curve,
        "blocks": [
            [
                _drawn(comparison, group, shown, *look[group.label])
                for label in look
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
    return {axis: shown[axis].head for axis in AXES if axis not in CLOCK or len(machines) == 1}


def _drawn(comparison: Comparison, group: Group, shown: dict[str, Unit], colour: int, marker: str) -> dict[str, Any]:
    ys = dict.fromkeys(key for run in group.runs for look in run.looks for key in look)
    names = {key: CURVES.get(key, key.replace("routing_", "routing: ")) for key in ys}
    kept = [key for key in names if key in CURVES or key.startswith("routing_")]
    return {
        "label": group.label,
        "colour": colour,
        "marker": marker,
        "n": len(group.runs),
        "x": _ends(group.figures[comparison.cost], shown[comparison.cost].factor),
        "y": _ends(group.figures[comparison.quality], 1.0),
        "front": group.front,
        "but": provisos(group, comparison.cost),
        "chance": group.front_probability,
        "verdict": ", ".join([group.verdict, *group.conditions]) if group.verdict else None,
        "baseline": group.baseline,
        "names": {key: names[key] for key in kept},
        "runs": [
            {"seed": run.row["seed"]}
            | {axis: [_short(look[axis] * shown[axis].factor) for look in run.looks] for axis in AXES}
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


OURS = b'<meta name="generator" content="softmoe compare">'
"""By which a page is known as made here."""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="softmoe compare">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --soft: #666; --line: #ddd; --head: #f3f3f3;
  --shade: #0005; --c0: #000; --c1: #d55e00; --c2: #0072b2; --c3: #009e73; --c4: #cc79a7; --c5: #e69f00;
  --c6: #56b4e9; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #e8e8e8; --soft: #a5a5a5; --line: #3a3d44;
  --head: #22252b; --shade: #fff6; --c0: #fff; --c1: #ff8a4c; --c2: #4aa8e0; --c3: #2fc79b; --c4: #e79cc5;
  --c5: #f2b23e; --c6: #9ad6f5; } }
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 76rem; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; }
p, li, dd { color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; max-width: 60rem; }
p.lead { color: var(--ink); font-size: 1rem; }
dl { font-size: .9rem; } dt { font-weight: 600; margin-top: .4rem; } dd { margin-left: 1rem; }
a { color: inherit; }
.wide { overflow-x: auto; margin: .8rem 0; background:
  linear-gradient(to left, var(--paper) 30%, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--shade), transparent) right / 1.2rem 100% no-repeat scroll; }
table { border-collapse: separate; border-spacing: 0; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); font-weight: 600;
  min-width: 7rem; max-width: 20rem; overflow-wrap: break-word; }
thead th, thead th:first-child { background: var(--head); vertical-align: bottom; }
thead button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0;
  cursor: pointer; text-align: inherit; }
thead button::after { content: "\\2195"; opacity: .35; padding-left: .3em; }
th[aria-sort=ascending] button::after { content: "\\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: "\\2193"; opacity: 1; }
@media (max-width: 44rem) {
  th:first-child { max-width: 38vw; }
  .cards thead { display: none; }
  .cards, .cards tbody, .cards tr, .cards th, .cards td { display: block; }
  .cards tr { border: 1px solid var(--line); border-radius: 6px; margin: .6rem 0; padding: .3rem .7rem; }
  .cards th, .cards td { border: 0; padding: .15rem 0; max-width: none !important; }
  .cards td { display: grid; grid-template-columns: 1fr auto; gap: 1rem; }
  .cards td:empty { display: none; }
  .cards td::before { content: attr(data-head); text-align: left; color: var(--soft); }
}
.chart { position: relative; margin: .8rem 0; max-width: 64rem; }
.chart svg { display: block; width: 100%; overflow: visible; }
.chart text { fill: var(--ink); font-size: 12px; }
.grid { stroke: var(--line); } .front { stroke: var(--soft); stroke-dasharray: 5 4; fill: none; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem .9rem; margin: .3rem 0 0; }
.legend button, .choose select { font: inherit; font-size: .85rem; color: inherit; background: none; cursor: pointer; }
.legend button { border: 0; padding: .15rem; display: flex; align-items: center; gap: .35rem; text-align: left; }
.legend button[aria-pressed=false] { opacity: .35; text-decoration: line-through; }
.choose { display: flex; flex-wrap: wrap; gap: .5rem 1rem; font-size: .85rem; }
.choose select { border: 1px solid var(--line); border-radius: 4px; padding: .2rem; background: var(--paper); }
.tip { position: absolute; pointer-events: none; background: var(--paper); color: var(--ink); padding: .4rem .6rem;
  border: 1px solid var(--soft); border-radius: 4px; font-size: .82rem; white-space: pre-line; max-width: 17rem;
  z-index: 2; }
.point { cursor: pointer; outline: none; stroke-width: 1.6; }
.point:focus-visible .mark, .point:hover .mark { stroke-width: 4; }
noscript img { max-width: 100%; background: #fff; }
"""

SCRIPT = r"""
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const escaped = s => String(s).replace(/[&<>"']/g, c => "&#" + c.charCodeAt(0) + ";");
const colour = g => `var(--c${g.colour})`;
const unit = {
  o: null, s: [[-.85, -.85], [.85, -.85], [.85, .85], [-.85, .85]], D: [[0, -1.2], [1.2, 0], [0, 1.2], [-1.2, 0]],
  "^": [[0, -1.15], [1.1, .9], [-1.1, .9]], v: [[0, 1.15], [1.1, -.9], [-1.1, -.9]],
  P: [[-.4, -1.1], [.4, -1.1], [.4, -.4], [1.1, -.4], [1.1, .4], [.4, .4], [.4, 1.1], [-.4, 1.1], [-.4, .4],
    [-1.1, .4], [-1.1, -.4], [-.4, -.4]],
  X: [[-1.1, -.6], [-.6, -1.1], [0, -.5], [.6, -1.1], [1.1, -.6], [.5, 0], [1.1, .6], [.6, 1.1], [0, .5], [-.6, 1.1],
    [-1.1, .6], [-.5, 0]],
  "*": [...Array(10).keys()].map(i => { const r = i % 2 ? .55 : 1.3, a = Math.PI * (i / 5 - .5);
    return [r * Math.cos(a), r * Math.sin(a)]; }),
};
function mark(g, x, y, r, filled) {
  const shape = unit[g.marker], fill = filled ? colour(g) : "var(--paper)";
  const look = `class="mark" stroke="${colour(g)}" stroke-width="2" fill="${fill}"`;
  if (!shape) return `<circle cx="${x}" cy="${y}" r="${r}" ${look}/>`;
  return `<polygon points="${shape.map(p => (x + r * p[0]) + "," + (y + r * p[1])).join(" ")}" ${look}/>`;
}
const shown = v => v === 0 ? "0" : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3
  ? v.toExponential(2).replace(/\.?0+e/, "e") : String(+v.toPrecision(4));
function scale(values, from, to, logarithmic) {
  let low = Math.min(...values), high = Math.max(...values);
  const f = logarithmic ? Math.log10 : v => v;
  if (low === high) { low -= Math.abs(low) * .05 || 1; high += Math.abs(high) * .05 || 1; }
  let a = f(low), b = f(high);
  a -= (b - a) * .06; b += (b - a) * .06;
  const at = v => from + (to - from) * (f(v) - a) / (b - a), ticks = [];
  if (logarithmic) {
    const steps = b - a > 2 ? [1] : [1, 2, 5];
    for (let e = Math.floor(a); e <= b; e++) for (const m of steps) {
      const t = e + Math.log10(m); if (t >= a && t <= b) ticks.push(m * 10 ** e); }
  } else {
    const rough = (b - a) / (Math.abs(to - from) > 420 ? 6 : 4), power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].find(m => m * power >= rough) * power;
    for (let i = Math.ceil(a / step); i * step <= b; i++) ticks.push(i * step);
  }
  return { at, ticks };
}
function frame(width, height, x, y, xname, yname) {
  const left = 56, bottom = height - 46;
  let s = "";
  for (const t of y.ticks) s += `<line class="grid" x1="${left}" x2="${width - 8}" y1="${y.at(t)}" y2="${y.at(t)}"/>` +
    `<text x="${left - 6}" y="${y.at(t) + 4}" text-anchor="end">${shown(t)}</text>`;
  for (const t of x.ticks) s += `<line class="grid" y1="24" y2="${bottom}" x1="${x.at(t)}" x2="${x.at(t)}"/>` +
    `<text x="${x.at(t)}" y="${bottom + 18}" text-anchor="middle">${shown(t)}</text>`;
  return s + `<text x="${left}" y="14">${escaped(yname)}</text>` +
    `<text x="${width - 8}" y="${height - 8}" text-anchor="end">${escaped(xname)}</text>`;
}
const area = width => ({ left: 56, right: width - 16, top: 30, bottom: (width < 520 ? 300 : 380) - 46,
  height: width < 520 ? 300 : 380 });
function legend(place, groups, hidden, redraw, extra) {
  const box = document.createElement("div"); box.className = "legend";
  for (const g of groups) {
    const b = document.createElement("button"); b.type = "button"; b.setAttribute("aria-pressed", !hidden.has(g.label));
    b.innerHTML = `<svg width="18" height="16" style="width:18px">${mark(g, 9, 8, 5, extra && g.front)}</svg>` +
      `<span>${escaped(g.label)}${g.n ? ` (n=${g.n})` : ""}</span>`;
    b.onclick = () => { hidden.has(g.label) ? hidden.delete(g.label) : hidden.add(g.label); redraw(); };
    box.append(b);
  }
  const told = document.createElement("span"); told.style.fontSize = ".85rem"; told.textContent = extra;
  box.append(told);
  place.append(box);
}
function tips(place) {
  const tip = document.createElement("div"); tip.className = "tip"; tip.hidden = true; place.append(tip);
  for (const point of place.querySelectorAll(".point")) {
    const show = () => {
      tip.textContent = point.dataset.tip; tip.hidden = false;
      const at = point.querySelector(".mark").getBoundingClientRect(), box = place.getBoundingClientRect();
      tip.style.left = Math.max(0, Math.min(at.x - box.x + 14, box.width - tip.offsetWidth)) + "px";
      tip.style.top = at.y - box.y + 18 + "px";
    };
    point.onpointerenter = point.onfocus = point.onclick = show;
    point.onpointerleave = point.onblur = () => { tip.hidden = true; };
  }
}
const bar = (m, lo, hi) => lo === null || lo === hi ? shown(m) : `${shown(m)} (${shown(lo)} to ${shown(hi)})`;
function pareto(place, groups) {
  const hidden = new Set();
  const draw = () => {
    place.textContent = "";
    const width = place.clientWidth, a = area(width), seen = groups.filter(g => !hidden.has(g.label));
    const behind = data.behind ? data.reference : [];
    const all = (k, i) => seen.flatMap(g => g[k].filter(v => v !== null)).concat(behind.map(p => p[i]));
    const xs = all("x", 0), ys = all("y", 1);
    if (!xs.length) { legend(place, groups, hidden, draw, "everything is hidden"); return; }
    const x = scale(xs, a.left, a.right, Math.min(...xs) > 0 && Math.max(...xs) > 10 * Math.min(...xs));
    const y = scale(ys, a.bottom, a.top, false);
    let s = frame(width, a.height, x, y, data.cost, data.quality);
    for (const p of behind)
      s += `<circle cx="${x.at(p[0])}" cy="${y.at(p[1])}" r="3" fill="var(--soft)" opacity=".4"/>`;
    const front = seen.filter(g => g.front).sort((p, q) => p.x[0] - q.x[0]);
    s += `<path class="front" d="${front.map((g, i) => i ? `H${x.at(g.x[0])}V${y.at(g.y[0])}`
      : `M${x.at(g.x[0])},${y.at(g.y[0])}`).join("")}"/>`;
    for (const g of seen) {
      const px = x.at(g.x[0]), py = y.at(g.y[0]);
      const tip = [`${g.label}, n = ${g.n}`, `${data.quality}: ${bar(...g.y)}`, `${data.cost}: ${bar(...g.x)}`];
      if (g.verdict) tip.push(`against ${g.baseline}: ${g.verdict}`);
      tip.push([g.front ? "on the front" : "not on the front",
        ...(g.chance === null ? [] : [`probability ${Math.round(100 * g.chance)}%`]), ...g.but].join(", "));
      s += `<g class="point" tabindex="0" data-tip="${escaped(tip.join("\n"))}" stroke="${colour(g)}">`;
      if (g.y[1] !== null) s += `<line x1="${px}" x2="${px}" y1="${y.at(g.y[1])}" y2="${y.at(g.y[2])}"/>`;
      if (g.x[1] !== null) s += `<line y1="${py}" y2="${py}" x1="${x.at(g.x[1])}" x2="${x.at(g.x[2])}"/>`;
      s += mark(g, px, py, 6.5, g.front) + "</g>";
    }
    place.innerHTML = `<svg viewBox="0 0 ${width} ${a.height}" height="${a.height}" role="img"
      aria-label="${escaped(data.quality)} against ${escaped(data.cost)}; the table has the numbers">${s}</svg>`;
    legend(place, groups, hidden, draw, "filled, dashed line: Pareto front; bars: 95% intervals" +
      (behind.length ? "; grey: " + data.reference_name + ", not ours" : ""));
    tips(place);
  };
  return draw;
}
function at(xs, ys, v) {
  for (let i = 1; i < xs.length; i++) if (v <= xs[i])
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (v - xs[i - 1]) / (xs[i] - xs[i - 1]);
  return ys[ys.length - 1];
}
function mean(curves) {
  const low = Math.max(...curves.map(c => c[0][0])), high = Math.min(...curves.map(c => c[0][c[0].length - 1]));
  const xs = curves[0][0].filter(v => v >= low && v <= high);
  return [xs, xs.map(v => curves.reduce((sum, c) => sum + at(c[0], c[1], v), 0) / curves.length)];
}
function curves(place, groups, axes) {
  const hidden = new Set(), names = Object.assign({}, ...groups.map(g => g.names));
  let axis = data.axis, key = names[data.curve] ? data.curve : Object.keys(names)[0];
  const choose = (label, choices, value, change) => {
    const l = document.createElement("label"), s = document.createElement("select");
    l.append(label + " ", s);
    for (const [k, name] of Object.entries(choices)) s.add(new Option(name, k, false, k === value));
    s.onchange = () => change(s.value);
    return l;
  };
  const draw = () => {
    place.textContent = "";
    if (!key) { place.textContent = "No run has a curve."; return; }
    const width = place.clientWidth, a = area(width);
    const lines = groups.filter(g => !hidden.has(g.label)).map(g => [g, g.runs.map(r => {
      const kept = (r[key] || []).map((v, i) => v !== null ? i : -1).filter(i => i >= 0);
      return [kept.map(i => r[axis][i]), kept.map(i => r[key][i])]; }).filter(c => c[0].length)]);
    const xs = lines.flatMap(l => l[1].flatMap(c => c[0])), ys = lines.flatMap(l => l[1].flatMap(c => c[1]));
    let s = "";
    if (xs.length) {
      const x = scale(xs, a.left, a.right, false), y = scale(ys, a.bottom, a.top, false);
      const point = (v, w) => x.at(v).toFixed(1) + "," + y.at(w).toFixed(1);
      const path = c => "M" + c[0].map((v, i) => point(v, c[1][i])).join("L");
      s = frame(width, a.height, x, y, axes[axis], names[key]);
      for (const [g, cs] of lines) {
        for (const c of cs) s += `<path d="${path(c)}" fill="none" stroke="${colour(g)}" opacity=".55"/>`;
        if (!cs.length) continue;
        const m = mean(cs), every = Math.max(1, Math.ceil(m[0].length / 8));
        s += `<path d="${path(m)}" fill="none" stroke="${colour(g)}" stroke-width="2.5"/>`;
        m[0].forEach((v, i) => { if (i % every === 0 || i === m[0].length - 1) {
          const tip = `${g.label}, n = ${cs.length}\n${names[key]}: ${shown(m[1][i])}\n${axes[axis]}: ${shown(v)}`;
          const shape = mark(g, x.at(v), y.at(m[1][i]), 4, false);
          s += `<g class="point" data-tip="${escaped(tip)}">${shape}</g>`; } });
      }
    }
    place.innerHTML = `<svg viewBox="0 0 ${width} ${a.height}" height="${a.height}" role="img"
      aria-label="${escaped(names[key])} against ${escaped(axes[axis])}">${s}</svg>`;
    const box = document.createElement("div"); box.className = "choose";
    box.append(choose("show", names, key, v => { key = v; draw(); }),
      choose("against", axes, axis, v => { axis = v; draw(); }));
    place.prepend(box);
    legend(place, groups, hidden, draw, "");
    tips(place);
  };
  return draw;
}
function reference(place) {
  const kinds = Object.fromEntries(Object.entries(data.kinds || {}).map(([kind, name], i) =>
    [kind, { label: name + ", the paper's", colour: i, marker: "osD^"[i] }]));
  return () => {
    place.textContent = "";
    if (data.behind) return;
    const width = place.clientWidth, a = area(width);
    const x = scale(data.reference.map(p => p[0]), a.left, a.right, true);
    const y = scale(data.reference.map(p => p[1]), a.bottom, a.top, false);
    const names = ["training exaFLOP, the paper's convention", "JFT-4B precision@1, % (the paper's)"];
    let s = frame(width, a.height, x, y, ...names);
    for (const p of data.reference) s += `<g class="point" data-tip="${escaped(p[2])}: ${p[1]}% at ${p[0]} exaFLOP">` +
      mark(kinds[p[2]], x.at(p[0]), y.at(p[1]), 3.5, false) + "</g>";
    place.innerHTML = `<svg viewBox="0 0 ${width} ${a.height}" height="${a.height}" role="img"
      aria-label="the paper's own figures">${s}</svg>`;
    legend(place, Object.values(kinds), new Set(), () => {}, "");
    tips(place);
  };
}
const drawings = [];
for (const place of document.querySelectorAll(".chart")) {
  const d = place.dataset;
  if (d.pareto) drawings.push(pareto(place, data.blocks[d.pareto]));
  else if (d.curves) drawings.push(curves(place, data.blocks[d.curves], data.axes[d.curves]));
  else drawings.push(reference(place));
}
const drawAll = () => drawings.forEach(draw => draw());
drawAll();
let drawnAt = innerWidth;
addEventListener("resize", () => { if (innerWidth !== drawnAt) { drawnAt = innerWidth; drawAll(); } });
const value = cell => { const t = cell.textContent.replace(/,/g, ""), n = parseFloat(t.replace(/^[(]/, ""));
  return isNaN(n) ? t : n; };
for (const table of document.querySelectorAll("table")) table.querySelectorAll("thead th").forEach((th, i) => {
  th.onclick = () => {
    const up = th.getAttribute("aria-sort") !== "ascending";
    table.querySelectorAll("thead th").forEach(other => other.removeAttribute("aria-sort"));
    th.setAttribute("aria-sort", up ? "ascending" : "descending");
    const body = table.tBodies[0];
    [...body.rows].sort((p, q) => {
      const a = value(p.cells[i]), b = value(q.cells[i]);
      if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
      return (up ? 1 : -1) * (typeof a === "number" ? a - b : a.localeCompare(b));
    }).forEach(row => body.append(row));
  };
});
"""
