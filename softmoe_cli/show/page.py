"""A run as one HTML file that needs nothing else. The frame, its style and its charts are those of softmoe compare."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from softmoe_cli.compare.page import filled_page, html_table
from softmoe_cli.compare.tables import Table
from softmoe_cli.run.rows import AXES, COSTS, CURVES, ROUTING
from softmoe_cli.run.status import ago
from softmoe_cli.show.made import made_told, receipt_tables
from softmoe_cli.show.record import Record, changed_settings, curve, routing_curves, statistics_of
from softmoe_cli.text import flop, four_digits, in_words, printable, shortened

if TYPE_CHECKING:
    from softmoe_cli.evaluate.quality import Outcomes
    from softmoe_cli.show.paint import Sheet

SHOWN_MARK = b'<meta name="generator" content="softmoe show">'
MOST_COUNTED = 20
"""Up to so many classes their confusion is a square; above it is a list."""
LISTED = 20
OPENED = 12
"""Settings that are shown at once; more are unfolded."""
REFRESH = '<meta name="viewport"'


@dataclass(frozen=True)
class Shown:
    """What a page has beside what the run's files say.

    Attributes:
        of: a sentence that says which checkpoint did what to which images; why nothing did, where nothing did.
        said: the predictions of `classes`.
        sheets: pictures, by the heading that they stand below.
        layers: what was found of each layer, as JSON has it.
    """

    of: str
    said: "Outcomes | None" = None
    classes: list[str] = field(default_factory=list)
    sheets: dict[str, "list[Sheet]"] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)


def run_page(record: Record, shown: Shown, *, refresh_s: float | None = None) -> str:
    """The whole file; with `refresh_s` a browser asks for it again after so many seconds."""
    body = [f"<h1>{escape(record.name)}</h1>", f'<p class="lead">{escape(state_told(record))}</p>']
    body += [f"<p>{escape(note)}</p>" for note in record.notes]
    body += ["<section>", *(_told_by_files(record) if record.receipt is None else _receipt(record.receipt))]
    body += ["<h2>Predictions and routing</h2>", f"<p>{escape(shown.of)}</p>"]
    body += [f"<p>{escape(note)}</p>" for note in shown.notes]
    if shown.said is not None:
        body += _calibration(shown.said) + _confusion(shown.said, shown.classes)
    for heading, sheets in shown.sheets.items():
        if sheets:
            body.append(f"<h2>{escape(heading)}</h2>")
            body += [_sheet(sheet, heading) for sheet in sheets]
    body.append("</section>")
    page = filled_page("show", f"{record.name}: softmoe show", body, _data(record))
    if refresh_s is not None:
        page = page.replace(REFRESH, f'<meta http-equiv="refresh" content="{refresh_s:g}">\n{REFRESH}', 1)
    return page


def _told_by_files(record: Record) -> list[str]:
    body = [_table(_qualities(record)), "<h2>Curves</h2>", '<div class="chart" data-curves="0"></div>']
    return [*body, "<h2>Cost</h2>", _table(_costs(record)), *_settings(record), *_routing(record)]


def _receipt(receipt: Mapping[str, Any]) -> list[str]:
    """What a folder that is no run says of itself."""
    *changed, rest = receipt_tables(receipt)
    body = [part for table in changed for part in (f"<h2>{table.title}</h2>", html_table(table))]
    return [
        *body,
        "<h2>Receipt</h2>",
        f"<details><summary>{len(rest.rows)} lines</summary>{html_table(rest)}</details>",
    ]


def state_told(record: Record) -> str:
    """One sentence: what it is, how far it is, how good."""
    if record.receipt is not None:
        return made_told(record)
    state, said = record.state, record.settings
    far = "" if state.progress is None or state.state == "done" else f" at {100 * state.progress:.0f}%"
    words = [f"{state.state}{far}"]
    if record.result is not None:
        words.append(f"test top-1 {record.result['top1_pct']:.2f}% of {record.result['test_images']:,} images")
    if state.top1_pct is not None:
        words.append(f"validation top-1 {state.top1_pct:.2f}%")
    if state.age_s is not None and record.result is None:
        words.append(f"last row {ago(state.age_s)}")
    seed = f", seed {said['seed']}" if "seed" in said else ""
    what = f"{record.name.rpartition('-')[0] or record.name}{seed}: {', '.join(words)}."
    return f"{what} {state.reason}." if state.reason else what


def _table(table: Table | None) -> str:
    return "" if table is None else html_table(table)


def _qualities(record: Record) -> Table | None:
    """A row for each part of the images that was looked at: at the last look, and of the test images."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    looks = record.of("validation")
    if looks:
        found.append((f"validation, step {looks[-1]['step']:,}", looks[-1]))
    found += [(f"test, step {row['step']:,}", row) for row in record.of("test")[-1:]]
    if not found:
        return None
    cells = [
        [name, *(_number(key, row[key]) if row.get(key) is not None else "" for key in CURVES)] for name, row in found
    ]
    heads = [CURVES[key].title.removeprefix("validation ") for key in CURVES]
    return Table("Quality", "", ["images", *heads], cells)


def _number(key: str, value: float) -> str:
    return f"{value:.2f}" if key.endswith("_pct") else f"{value:.4f}"


def _costs(record: Record) -> Table | None:
    """What it has cost so far, and what its model costs, as far as it is known."""
    last = record.rows[-1] if record.rows else {}
    known = {key: value for key, value in {**last, **(record.result or {})}.items() if key in COSTS}
    cells = [[COSTS[key].amount, _cost(key, known[key])] for key in COSTS if key in known]
    return Table("Cost", "", ["cost", "amount"], cells) if cells else None


def _cost(key: str, value: float) -> str:
    unit = COSTS[key].unit
    if unit in ("PFLOP", "GFLOP"):
        return flop(value * (1e15 if unit == "PFLOP" else 1e9))
    return in_words(value) if unit == "s" else f"{four_digits(value)} {unit}".strip()


def _settings(record: Record) -> list[str]:
    if not record.settings:
        return []
    rows = [[key, _said(value), _said(usual)] for key, value, usual in changed_settings(record)]
    note = "Settings that differ from what softmoe train does where nothing is typed."
    if not rows:
        return ["<h2>Settings</h2>", "<p>All are as softmoe train has them where nothing is typed.</p>"]
    table = html_table(Table("Settings", note, ["setting", "here", "usual"], rows))
    count = f"<summary>{len(rows)} settings</summary>"
    return [
        "<h2>Settings</h2>",
        f"<p>{note}</p>",
        f"<details{' open' if len(rows) <= 12 else ''}>{count}{table}</details>",
    ]


def _said(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return shortened(printable(text), 200)


def _routing(record: Record) -> list[str]:
    """The routers' own statistics: over training, and at the last look."""
    layers = routing_curves(record)
    if not layers:
        return ["<h2>Routing statistics</h2>", "<p>There are none: no layer with experts has been looked at.</p>"]
    keys = statistics_of(layers)
    cells = [
        [name, *(f"{each[key][-1]:.4g}" if key in each and each[key][-1] is not None else "" for key in keys)]
        for name, each in layers.items()
    ]
    words = "".join(f"<dt>{key}</dt><dd>{escape(ROUTING[key].meaning)}</dd>" for key in keys if key in ROUTING)
    return [
        "<h2>Routing statistics</h2>", '<div class="chart" data-curves="1"></div>',
        "<p>At the last look, on the first validation images, always the same:</p>",
        html_table(Table("Routing", "", ["layer", *keys], cells)),
        f"<details><summary>What the words mean</summary><dl>{words}</dl></details>",
    ]  # fmt: skip


def _calibration(said: "Outcomes") -> list[str]:
    """How often predictions of a probability are right, as a drawing."""
    from softmoe_cli.evaluate.quality import calibration_error, reliability

    bins, parts, left, size = reliability(said.probability, said.right), [], 44, 240
    width = size / len(bins)
    for place, (images, right, probability) in enumerate(bins.tolist()):
        if not images:
            continue
        y, tall = 10 + (1 - right) * size, right * size
        tip = f"{images:.0f} images: {100 * right:.0f}% right, mean probability {100 * probability:.0f}%"
        at = f'x="{left + place * width:.1f}" y="{y:.1f}" width="{width - 1:.1f}" height="{tall:.1f}"'
        parts.append(f'<rect {at} fill="var(--c6)"><title>{tip}</title></rect>')
        parts.append(f'<circle cx="{left + probability * size:.1f}" cy="{y:.1f}" r="3" fill="var(--c1)"/>')
    for tick in (0, 0.5, 1):
        parts.append(f'<text x="{left + tick * size}" y="{size + 26}" text-anchor="middle">{tick:g}</text>')
        parts.append(f'<text x="{left - 6}" y="{14 + (1 - tick) * size}" text-anchor="end">{tick:g}</text>')
    parts += [
        f'<line class="front" x1="{left}" y1="{10 + size}" x2="{left + size}" y2="10"/>',
        f'<text x="{left + size / 2}" y="{size + 42}" text-anchor="middle">probability of the prediction</text>',
        f'<text transform="translate(12 {10 + size / 2}) rotate(-90)" text-anchor="middle">share that is right</text>',
    ]
    error = 100 * calibration_error(said.probability, said.right)
    told = (
        f"Expected calibration error {error:.2f}%, {said.top1_pct:.2f}% of {len(said.label):,} images right. "
        "A bar for each range of probabilities, a dot at the mean probability there; dashed: no error."
    )
    box = f'class="fixed" viewBox="0 0 {left + size + 12} {size + 50}" role="img"'
    return ["<h2>Calibration</h2>", f"<p>{told}</p>", f"<svg {box}>{''.join(parts)}</svg>"]


def _confusion(said: "Outcomes", classes: Sequence[str]) -> list[str]:
    """Images by label and prediction: a square, or of many classes the commonest mistakes."""
    names = [printable(name) for name in classes]
    if len(classes) > MOST_COUNTED:
        wrong = sorted((pair for pair in said.pairs.tolist() if pair[0] != pair[1]), key=lambda pair: -pair[2])
        rows = [[names[label], names[guess], f"{count:,}"] for label, guess, count in wrong[:LISTED]]
        table = html_table(Table("Confusion", "", ["label", "prediction", "images"], rows))
        return ["<h2>Confusion</h2>", f"<p>The {len(rows)} commonest mistakes.</p>", table]
    counts = said.confusion.tolist()
    head = "".join(f"<th scope=col>{escape(shortened(name, 10))}</th>" for name in names)
    lines = []
    for label, row in enumerate(counts[: len(names)]):
        cells = "".join(
            f'<td{" class=right" if label == guess else ""} style="--share:{100 * count / max(1, sum(row)):.0f}%">'
            f"{count or ''}</td>"
            for guess, count in enumerate(row[: len(names)])
        )
        lines.append(f"<tr><th scope=row>{escape(shortened(names[label], 20))}</th>{cells}</tr>")
    table = f'<table class="counts"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return ["<h2>Confusion</h2>", "<p>A row for each label, a column for each prediction.</p>",
            f'<div class="wide" tabindex="0">{table}</div>']  # fmt: skip


def _sheet(sheet: "Sheet", heading: str) -> str:
    from softmoe_cli.show.paint import png

    swatches = "".join(
        f'<span><i style="background:rgb{colour}"></i>{escape(word)}</span>' for word, colour in sheet.legend
    )
    rows = "".join(
        '<div class="strip">'
        + "".join(
            f'<figure><img alt="{escape(cell.caption)}" src="data:image/png;base64,'
            f'{base64.b64encode(png(cell.pixels)).decode()}"><figcaption>{escape(cell.caption)}</figcaption></figure>'
            for cell in row
        )
        + "</div>"
        for row in sheet.rows
    )
    legend = f'<div class="swatches">{swatches}</div>' if swatches else ""
    title = f"<h3>{escape(sheet.title)}</h3>" if sheet.title != heading else ""
    return f"{title}<p>{escape(sheet.note)}</p>{legend}{rows}"


def _data(record: Record) -> dict[str, Any]:
    """What the charts draw: the run's curves, and those of its layers."""
    titles = {key: each.title.removeprefix("validation ") for key, each in CURVES.items()}
    runs = {"training": curve(record.of("train")), "validation": curve(record.of("validation"))}
    axes = {axis: COSTS[axis].title for axis in AXES}
    return {
        "quality": "", "cost": "", "axes": [axes, axes], "axis": "images", "curve": "loss", "reference": [],
        "blocks": [_drawn(runs, titles), _drawn(routing_curves(record), {})],
    }  # fmt: skip


def _drawn(curves: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "label": name, "colour": place % 7, "marker": "osD^vPX*"[place % 8], "n": 0,
            "names": {key: titles.get(key, key.replace("_", " ")) for key in statistics_of({"": each})},
            "runs": [each],
        }
        for place, (name, each) in enumerate(curves.items())
        if each
    ]  # fmt: skip
