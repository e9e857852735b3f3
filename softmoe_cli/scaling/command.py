"""`softmoe scaling`: its options, what it prints, and the files that it writes."""

import argparse
import base64
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softmoe_cli import programs
from softmoe_cli.compare.command import listed, no_study, parsed_options
from softmoe_cli.compare.written import PAGE, files_told, write_files
from softmoe_cli.errors import UsageError, nearest

if TYPE_CHECKING:
    from softmoe_cli.compare.runs import FinishedRun
    from softmoe_cli.compare.tables import Table
    from softmoe_cli.scaling.decide import Aim
    from softmoe_cli.scaling.fit import LawFit
    from softmoe_cli.scaling.points import Family
    from softmoe_cli.scaling.report import Report

SCALING_OPTIONS: dict[str, tuple[str, str]] = {
    "quality": ("KEY", "what is fitted: a loss, or the error of an accuracy; without it validation_loss"),
    "where": ("KEY=VALUE,VALUE", "only runs that have this; may be given several times"),
    "law": ("NAME,NAME", "only these laws; the best of them decides"),
    "delta": (
        "NUMBER",
        "Huber's, of log loss; without it 1.345 times the scatter of seeds, or of the law that leaves least",
    ),
    "draws": ("COUNT", "of the bootstrap; without it 400"),
    "train-pflop": ("PFLOP", "the most that training may take"),
    "device-s": ("SECONDS", "the same in seconds of training, summed over devices; runs of one machine only"),
    "total-pflop": ("PFLOP", "the most that training and serving --served images may take"),
    "total-s": ("SECONDS", "the same in seconds; needs --costs of the runs' machine"),
    "loss": ("LOSS", "the loss that must be reached: what reaches it at least cost"),
    "served": ("IMAGES", "how many images will be served"),
    "forward-gflop": ("GFLOP", "the most that serving an image may take"),
    "latency-ms": ("MS", "the most that a batch may take to serve; needs --costs"),
    "images-per-s": ("NUMBER", "the least images a second to serve; needs --costs"),
    "costs": ("FILE", "measured serving costs: what softmoe cost -m ... clock=true format=json printed"),
    "batch": ("IMAGES", "with --costs: the batch that is served, where it has several"),
    "device-mib": ("MIB", "memory of a device that serves: weights fill whole ones, at 4 bytes"),
    "devices": ("COUNT", "with --device-mib: the most of them"),
    "experts": ("COUNT,COUNT", "numbers of experts to choose among, dense always; without it those of the runs"),
    "extrapolate": ("", "answer also beyond ten times the runs, and beyond the images that are different"),
    "next": ("", "the cheapest next run that would narrow the answer"),
    "check": ("RUN", "hold a finished run against what a law fitted without it predicts"),
    "published": ("NAME,NAME", "the papers' tables from their coefficients, laws on the Soft MoE paper's rows; or all"),
    "out": ("FOLDER", "where the files go; without it scaling/ in the first folder"),
    "wandb": ("", "send tables, figure and files to Weights & Biases as a run of the study's group"),
    "project": ("NAME", "with --wandb: its project; without it softmoe"),
}
NUMBERS = (
    "delta", "train-pflop", "device-s", "total-pflop", "total-s", "loss", "served", "forward-gflop", "latency-ms",
    "images-per-s", "device-mib",
)  # fmt: skip
WHOLE_NUMBERS = ("draws", "batch", "devices")
BUDGETS_OF = ("train-pflop", "device-s", "total-pflop", "total-s")
ASKED = (*BUDGETS_OF, "loss")
"""Options that ask for a decision."""
DRAWN = 400
OURS_SCALING = b'<meta name="generator" content="softmoe scaling">'


def run_scaling(arguments: Sequence[str]) -> int:
    """Fits, decides, writes and prints; 1 where no law beats the predictors without one.

    Raises:
        UsageError: an option, a folder or a key that cannot work.
    """
    chosen = scaling_options(arguments)
    if chosen.published is not None:
        return _published(chosen)
    from softmoe_cli.compare.blocks import kept_apart, usable_runs, version_notes
    from softmoe_cli.compare.question import Question
    from softmoe_cli.compare.send import tracking_mode
    from softmoe_cli.scaling.answer import read_one
    from softmoe_cli.scaling.fit import Unidentified
    from softmoe_cli.scaling.points import check_quality, families

    mode = tracking_mode() if chosen.wandb else "off"
    quality = chosen.quality or "validation_loss"
    check_quality(quality)
    seconds = chosen.device_s is not None or chosen.total_s is not None or bool(chosen.served and chosen.costs)
    question = Question(quality, "device_s" if seconds else "train_pflop", where=chosen.where)
    runs, left_out, _ = usable_runs(chosen.folders, question)
    held = read_one(chosen.check) if chosen.check is not None else None
    runs, more = _of_scratch(runs, held)
    left_out += more
    parts, varying = kept_apart(runs, question)
    if len(parts) > 1:
        titles = "; ".join(title for title, _ in parts)
        raise UsageError(f"runs that differ in {', '.join(varying)} fit no law together; choose with --where: {titles}")
    reports, lacking = [], []
    for family in families(runs, quality):
        try:
            reports.append(_report(family, quality, chosen, held, seconds))
        except Unidentified as error:
            lacking.append(str(error))
    if not reports:
        raise UsageError("; ".join(lacking))
    if held is not None and not any(report.checked for report in reports):
        names = ", ".join(report.family.name for report in reports)
        raise UsageError(f"--check {held.place}: its router is {held.row['router']}, and the laws are of {names}")
    notes = [*lacking, *version_notes(runs, False), *(f"left out: {folder}: {reason}" for folder, reason in left_out)]
    out = chosen.out or chosen.folders[0] / "scaling"
    files = _write(reports, notes, left_out, out)
    if programs.listen():
        told = json.loads((out / "scaling.json").read_text(encoding="utf-8"))
        programs.reply(told | {"folder": str(out), "files": files})
    else:
        _show(reports, notes, files, out)
    if mode != "off":
        _send(mode, chosen, reports, out, files)
    return 0 if any(not why for report in reports for why in report.why.values()) else 1


def scaling_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Every option, checked against the others as far as no run is needed."""
    types: dict[str, Any] = dict.fromkeys(NUMBERS, float) | dict.fromkeys(WHOLE_NUMBERS, int)
    types |= {"law": listed, "out": Path, "costs": Path, "check": Path, "experts": _counts}
    chosen = parsed_options("scaling", SCALING_OPTIONS, types, ("where",), arguments)
    for name in (*NUMBERS, *WHOLE_NUMBERS):
        value = getattr(chosen, name.replace("-", "_"))
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"--{name} {value}: must be above 0")
    if chosen.published is not None:
        given = [name for name in SCALING_OPTIONS if name not in ("published", "out") and _given(chosen, name)]
        if given or chosen.folders:
            word = f"--{given[0]}" if given else str(chosen.folders[0])
            raise UsageError(f"{word} has no effect with --published, which reads the papers' figures alone")
        return chosen
    if not chosen.folders:
        raise UsageError(no_study("scaling"))
    if chosen.project is not None and not chosen.wandb:
        raise UsageError(f"--project {chosen.project} has no effect without --wandb")
    budgets = [name for name in BUDGETS_OF if _given(chosen, name)]
    if len(budgets) > 1:
        raise UsageError(f"--{budgets[0]} and --{budgets[1]} are two budgets; give one")
    asks = [name for name in ASKED if _given(chosen, name)]
    limits = ("served", "forward-gflop", "latency-ms", "images-per-s", "device-mib", "experts", "next", "costs")
    idle = [name for name in limits if _given(chosen, name)]
    if idle and not asks:
        raise UsageError(f"--{idle[0]} has no effect without one of {', '.join(f'--{name}' for name in ASKED)}")
    for name, needed in (("latency-ms", "costs"), ("images-per-s", "costs"), ("batch", "costs"),
                         ("devices", "device-mib"), ("total-pflop", "served"), ("total-s", "served"),
                         ("total-s", "costs")):  # fmt: skip
        if _given(chosen, name) and not _given(chosen, needed):
            raise UsageError(f"--{name} needs --{needed}")
    if _given(chosen, "latency-ms") and _given(chosen, "images-per-s"):
        raise UsageError("--latency-ms and --images-per-s are two limits of the same; give one")
    if _given(chosen, "costs") and (_given(chosen, "total-pflop") or _given(chosen, "forward-gflop")):
        name = "total-pflop" if _given(chosen, "total-pflop") else "forward-gflop"
        raise UsageError(f"--{name} counts FLOPs and --costs seconds; leave one out")
    if chosen.served and chosen.costs and _given(chosen, "train-pflop"):
        raise UsageError("--served with --costs counts seconds; give --device-s instead of --train-pflop")
    if chosen.served and not chosen.costs and _given(chosen, "device-s"):
        raise UsageError("--served without --costs counts FLOPs; give --train-pflop instead of --device-s, or --costs")
    if chosen.loss is not None and (_given(chosen, "total-pflop") or _given(chosen, "total-s")):
        raise UsageError("--loss with one total budget asks for nothing to be made least; leave one out")
    if chosen.served and not (chosen.loss is not None or _given(chosen, "total-pflop") or _given(chosen, "total-s")):
        raise UsageError("--served has no effect on the least loss of a training budget; give --loss or --total-pflop")
    if chosen.loss is not None and not chosen.served and not budgets:
        raise UsageError("--loss needs a budget (--train-pflop, --device-s), or --served images to be cheapest for")
    return chosen


def _given(chosen: argparse.Namespace, name: str) -> bool:
    return getattr(chosen, name.replace("-", "_")) not in (None, False, ())


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(word) for word in listed(text))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text}: write numbers of experts, such as 4,8,16")
    return counts


def _of_scratch(
    runs: list["FinishedRun"], held: "FinishedRun | None"
) -> tuple[list["FinishedRun"], list[tuple[str, str]]]:
    """The runs that began with random weights, without the one that is to be checked; and the others with reasons."""
    kept, left_out = [], []
    for run in runs:
        if run.row["checkpoint"] is not None:
            left_out.append((run.place, "it began with a checkpoint, whose images no law counts"))
        elif held is not None and run.row["signature"] == held.row["signature"]:
            left_out.append((run.place, "it is held against the law, which is fitted without it"))
        else:
            kept.append(run)
    if not kept:
        raise UsageError(f"no run began with random weights; left out are {len(left_out)}")
    return kept, left_out


def _report(
    family: "Family", quality: str, chosen: argparse.Namespace, held: "FinishedRun | None", seconds: bool
) -> "Report":
    """One router's laws, and the decision where one is asked for.

    Raises:
        Unidentified: the runs identify none; the message says what they lack.
    """
    from softmoe_cli.scaling.answer import held_against, may_decide
    from softmoe_cli.scaling.fit import Unidentified, bootstrap, identified, one_delta
    from softmoe_cli.scaling.forms import FORMS
    from softmoe_cli.scaling.holdout import ranked, trial, trivial_errors, verdict
    from softmoe_cli.scaling.report import Report

    for name in chosen.law or ():
        if name not in FORMS:
            raise UsageError(f"--law {name}: no such law.{nearest(name, FORMS)} Laws: {', '.join(FORMS)}")
    forms, lacks = identified(family.points, chosen.law or ())
    if not forms:
        others = f" ({len(lacks) - 1} other laws lack something too; --law NAME says what)" if len(lacks) > 1 else ""
        raise Unidentified(f"{family.name}: the runs identify no law: {lacks[0]}{others}")
    delta = chosen.delta or one_delta(forms, family.points)
    tested = ranked([trial(form, family.points, delta) for form in forms])
    trivial = trivial_errors(family.points)
    report = Report(family, quality, tested, trivial, verdict(tested, trivial), lacks)
    wants = any(_given(chosen, name) for name in ASKED)
    allowed = [each for each in tested if not report.why[each.name]]
    cannot = {each.name: may_decide(each.fit, family) for each in tested}
    report.cannot = cannot
    able = [each for each in allowed if not cannot[each.name]]
    first = next(iter((able if wants else allowed) or allowed or tested))
    report.chosen = first.fit
    report.draws = bootstrap(first.fit, family.points, chosen.draws or DRAWN)
    if held is not None and held.row["router"] in ("dense", family.name):
        report.checked = held_against(family, first.fit, report.draws, held, quality)
    if wants:
        if able:
            _decide(report, first.fit, chosen, seconds)
        elif allowed:
            report.undecided = f"the best law is {allowed[0].name}, and {cannot[allowed[0].name]}"
        else:
            report.undecided = f"the best law, {first.name}, is not good enough: {report.why[first.name]}"
    return report


def _aim(chosen: argparse.Namespace, batch: int | None) -> "Aim":
    from softmoe_cli.scaling.decide import Aim

    serve = None
    if chosen.latency_ms is not None:
        assert batch is not None
        serve = chosen.latency_ms / 1000 / batch
    elif chosen.images_per_s is not None:
        serve = 1 / chosen.images_per_s
    elif chosen.forward_gflop is not None:
        serve = chosen.forward_gflop / 1e6
    return Aim(
        train=chosen.train_pflop if chosen.train_pflop is not None else chosen.device_s,
        total=chosen.total_pflop if chosen.total_pflop is not None else chosen.total_s,
        loss=chosen.loss, served=chosen.served or 0.0, serve=serve, devices=chosen.devices,
    )  # fmt: skip


def _decide(report: "Report", fit: "LawFit", chosen: argparse.Namespace, seconds: bool) -> None:
    """Adds the decision, what would test it, and the next run."""
    from softmoe_cli.scaling.answer import decision, next_run, predicted, prices, proposal, sizes_at, with_room
    from softmoe_cli.scaling.costs import clock_rows
    from softmoe_cli.scaling.report import experts_said

    family, size = report.family, fit.form.law.sizes[0]
    clock, where = clock_rows(chosen.costs, chosen.batch) if chosen.costs is not None else (None, "")
    if clock and seconds and chosen.served:
        machines = {str(run.row["hardware"]) for run in family.runs}
        if not all(f"{clock[0]['hardware']}, ".startswith(f"{machine}, ") for machine in machines):
            told = f"{clock[0]['hardware']}, and the runs on {' and '.join(sorted(machines))}"
            raise UsageError(f"--costs was measured on {told}: seconds of both cannot be added")
    cost = prices(family, size, clock, where, seconds=seconds)
    aim = _aim(chosen, clock[0]["batch_size"] if clock else None)
    wanted = chosen.experts or tuple(int(e) for e in sorted(set(family.points.sizes["E"].tolist())))
    experts = [1.0, *(float(e) for e in sorted(set(wanted)) if e > 1)]
    if not {"E", "S"} & set(fit.form.law.sizes):  # the runs have one number then
        experts = [float(family.points.sizes["E"][0])]
    made = decision(family, fit, report.draws, aim, cost, experts, chosen.device_mib, far=chosen.extrapolate)
    report.decision = made
    if made.best is None:
        report.undecided = "; ".join(f"{experts_said(each.experts)}: {each.reason}" for each in made.choices)
        return
    best = made.best
    offered = proposal(family, size, best.size, best.images, best.experts)
    images = (float(family.points.sizes["D"].min()), float(family.points.sizes["D"].max()))
    report.proposal = with_room(family, fit, made, offered, images, chosen.device_mib)
    ledger = sizes_at(family, report.proposal.size, float(report.proposal.images), best.experts)
    report.proposed = predicted(family, fit, report.draws, ledger)
    if chosen.next:
        report.next = next_run(family, fit, report.draws, made, far=chosen.extrapolate)


# --- what it prints and writes ----------------------------------------------------------------------------------------


def _published(chosen: argparse.Namespace) -> int:
    """Prints the papers' tables; with --out they are files too."""
    from softmoe_cli.compare.tables import printed_table, wrapped_line
    from softmoe_cli.scaling.published import published_tables

    shown = published_tables(chosen.published)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    if programs.listen():
        programs.reply([{"title": table.title, "note": table.note, "head": table.head, "rows": table.rows}
                        for table in shown])  # fmt: skip
    print("\n\n".join(f"{printed_table(table, width)}\n{wrapped_line(f'- {table.note}', width)}" for table in shown))
    if chosen.out is not None:
        files = write_files(_texts("published laws", [], shown, [], {}, [], []), chosen.out, OURS_SCALING)
        print(f"\n{files_told(files, chosen.out, width)}")
    return 0


def _texts(
    title: str, lines: Sequence[str], shown: Sequence["Table"], notes: Sequence[str], drawn: dict[str, bytes],
    rows: list[dict[str, Any]], extra: Sequence[tuple[str, str]],
) -> dict[str, bytes]:  # fmt: skip
    """Every file but the figures by name: the page, the tables, and what `extra` has."""
    from softmoe_cli.compare.flat import csv_of
    from softmoe_cli.compare.page import filled_page, html_table
    from softmoe_cli.compare.tables import latex_of, markdown_of

    body = [f"<h1>{escape(title)}</h1>", *(f'<p class="lead">{escape(line)}</p>' for line in lines)]
    for table in shown:
        body += [f"<h2>{escape(table.title)}</h2>", html_table(table, cards=True), f"<p>{escape(table.note)}.</p>"]
    for name, content in drawn.items():
        if name.endswith(".svg"):
            image = base64.b64encode(content).decode()
            body.append(f'<img alt="{escape(name)}" src="data:image/svg+xml;base64,{image}" style="max-width:100%">')
    if notes:
        body.append(f"<h2>Notes</h2><ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>")
    texts = {PAGE: filled_page("scaling", title, body, {}), "table.md": markdown_of(shown, [*lines, *notes]),
             "table.tex": latex_of(shown), **({"table.csv": csv_of(rows)} if rows else {}), **dict(extra)}  # fmt: skip
    return {name: text.encode() for name, text in texts.items()} | drawn


def _write(reports: list["Report"], notes: list[str], left_out: list[tuple[str, str]], out: Path) -> list[str]:
    from softmoe_cli.scaling.bands import law_figures
    from softmoe_cli.scaling.report import answer_lines, data_line, law_rows, report_notes, report_tables, reports_json

    lines = [line for report in reports for line in (data_line(report), *answer_lines(report))]
    shown = [table for report in reports for table in report_tables(report)]
    told = [note for report in reports for note in report_notes(report)] + notes
    rows = [row for report in reports for row in law_rows(report)]
    extra = [("scaling.json", reports_json(reports, notes, left_out))]
    title = f"Laws of {', '.join(report.family.name for report in reports)}"
    files = _texts(title, lines, shown, told, law_figures(reports), rows, extra)
    return write_files(files, out, OURS_SCALING)


def _show(reports: list["Report"], notes: list[str], files: list[str], out: Path) -> None:
    from softmoe_cli.compare.tables import printed_table, wrapped_line
    from softmoe_cli.scaling.report import answer_lines, data_line, report_notes, report_tables

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for report in reports:
        print(wrapped_line(data_line(report), width))
        for table in report_tables(report):
            print(f"\n{printed_table(table, width)}")
        print()
        for note in dict.fromkeys(table.note for table in report_tables(report)):
            print(wrapped_line(f"- {note}", width))
        for note in report_notes(report):
            print(wrapped_line(f"- {note}", width))
        lines = answer_lines(report)
        if lines:
            print()
            print("\n".join(line if line.startswith("  ") else wrapped_line(line, width) for line in lines))
    for note in notes:
        print(wrapped_line(f"- {note}", width))
    print(f"\n{files_told(files, out, width)}")


def _send(mode: str, chosen: argparse.Namespace, reports: list["Report"], out: Path, files: list[str]) -> None:
    from softmoe_cli.run.mirror import publish
    from softmoe_cli.scaling.report import law_rows

    studies = sorted({str(run.row.get("study")) for report in reports for run in report.family.runs})
    asked_for = {key: str(value) for key, value in sorted(vars(chosen).items()) if value not in (None, False, ())}
    mark = hashlib.sha256(json.dumps([studies, asked_for], sort_keys=True).encode()).hexdigest()[:10]
    settings = {
        "id": f"scaling-{mark}", "project": chosen.project or "softmoe", "group": "+".join(studies),
        "job_type": "scaling", "name": f"scaling of {reports[0].quality}", "config": asked_for,
    }  # fmt: skip
    rows = [row for report in reports for row in law_rows(report)]
    publish(mode, settings, out, rows, ("dearest_rms", "aicc"), files, print)
