"""What was fitted and decided, as tables, sentences, rows and JSON."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from softmoe_cli.compare.tables import Table
from softmoe_cli.compare.units import quantity
from softmoe_cli.scaling.answer import Answer, Next, Proposal
from softmoe_cli.scaling.decide import Choice
from softmoe_cli.scaling.fit import LawFit, intervals, seed_scatter
from softmoe_cli.scaling.holdout import SHARE, Tested
from softmoe_cli.scaling.points import Family
from softmoe_cli.text import in_words, several, si

OF_LOSSES = "log loss over configurations: 0.01 is 1% of the loss"
OF_ERRORS = "the error's logit over configurations: 0.01 is 1% of the odds of an error"
LAW_NOTE = (
    "errors are root mean squares of {}; the dearest fifth and each size were held out in turn and predicted by a fit "
    "to the others; a law decides only if it beats the predictors without a law on the dearest fifth"
)
COEFFICIENT_NOTE = (
    "95% intervals of a bootstrap over configurations and seeds; a coefficient whose interval spans a factor of 100 is "
    "not identified, although predictions may be right"
)
DECISION_NOTE = (
    "95% intervals and how often each is the best, by a bootstrap over configurations and seeds; costs are "
    "interpolated between the runs' own"
)


@dataclass
class Report:
    """One family's laws and what follows from them. `why`: of each law, why it may not decide; empty where it may.
    `cannot`: what else keeps a law from deciding. `lacks`: what is missing for the laws that were not fitted."""

    family: Family
    quality: str
    tested: list[Tested]
    trivial: dict[str, float]
    why: dict[str, str]
    lacks: list[str]
    cannot: dict[str, str] = field(default_factory=dict)
    chosen: LawFit | None = None
    draws: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    decision: Answer | None = None
    undecided: str = ""
    proposal: Proposal | None = None
    proposed: tuple[float, float, float] | None = None
    next: Next | None = None
    checked: str = ""


def data_line(report: Report) -> str:
    """soft: 45 runs of 15 configurations, 3 sizes, 1 to 16 experts, 55k to 220k images; seeds scatter by 1.2%"""
    points = report.family.points
    configs = len(np.unique(points.config))
    sizes, experts = len(np.unique(points.size)), np.unique(points.sizes["E"])
    images = np.unique(points.sizes["D"])
    told = "dense only" if len(experts) == 1 and experts[0] == 1 else f"{_list(experts)} experts"
    scatter = seed_scatter(points)
    seeds = f"seeds of one scatter by {100 * scatter:.2g}%" if scatter else "no seed is repeated"
    return (
        f"{report.family.name}, {report.quality}: {several(len(points.loss), 'run')} of "
        f"{several(configs, 'configuration')}, {several(sizes, 'size')}, {told}, {_list(images)} images; {seeds}"
    )


def _list(values: np.ndarray) -> str:
    told = [si(float(value)) for value in values]
    return ", ".join(told) if len(told) <= 5 else f"{told[0]} to {told[-1]}"


def law_table(report: Report) -> Table:
    """The laws, the best on the dearest runs first, then the predictors without a law."""
    rows = []
    for each in report.tested:
        fit = each.fit
        rows.append([
            each.name, str(len(fit.free)), _error(each.largest), _error(each.by_size), _number(fit.aicc),
            f"{fit.agree} of {fit.starts}", report.why[each.name] or report.cannot.get(each.name) or "may decide",
        ])  # fmt: skip
    rows += [[name, "", _error(error), "", "", "", "no law"] for name, error in report.trivial.items()]
    head = ["law", "numbers", f"dearest {100 * SHARE:.0f}%", "each size", "AICc", "starts that agree", ""]
    note = LAW_NOTE.format(OF_ERRORS if report.family.points.share else OF_LOSSES)
    return Table(f"Laws of {report.family.name}: error where they were not fitted", note, head, rows)


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _number(value: float) -> str:
    return f"{value:,.1f}" if math.isfinite(value) else ""


FIXED = {"E_start": "log_start", "E_max": "log_most"}
"""Coefficients that few numbers of experts do not decide, and their free numbers."""


def coefficient_table(report: Report) -> Table:
    """The chosen law's coefficients with intervals."""
    fit = report.chosen
    assert fit is not None
    rows, told = [], fit.coefficients()
    for name, (low, high, known) in intervals(fit, report.draws).items():
        fixed = name in FIXED and FIXED[name] not in fit.names
        span = "fixed: too few numbers of experts" if fixed else f"{low:.4g} to {high:.4g}"
        rows.append([name.rstrip("_"), f"{float(told[name]):.4g}", span, "" if known or fixed else "not identified"])
    title = f"{fit.form.law.name}: {fit.form.law.formula} ({fit.form.law.source}); Huber delta {fit.delta:.2g}"
    return Table(title, COEFFICIENT_NOTE, ["coefficient", "value", "95% interval", ""], rows)


def asked(made: Answer) -> str:
    """The question in words: least loss for 0.5 PFLOP of training, at most 4 ms to serve an image"""
    aim, unit, serve = made.aim, made.cost.unit, made.cost.serve_unit
    goal = {"loss": "least loss", "serve": "cheapest to serve", "total": "cheapest to train and serve"}[aim.goal]
    parts = []
    if aim.loss is not None:
        parts.append(f"loss at most {aim.loss:g}")
    if aim.train is not None:
        parts.append(f"training at most {spent(aim.train, unit)}")
    if aim.total is not None:
        parts.append(f"training and serving at most {spent(aim.total, unit)}")
    if aim.served:
        parts.append(f"{si(aim.served)} images served")
    if aim.serve is not None:
        parts.append(f"serving an image at most {_serving(aim.serve, serve)}")
    if aim.devices is not None:
        parts.append(f"weights on at most {several(aim.devices, 'device')}")
    return f"{goal}: {', '.join(parts)}"


def _serving(value: float, unit: str) -> str:
    return f"{1000 * value:.4g} ms" if unit == "s" else quantity("forward_gflop", 1e6 * value)


def spent(value: float, unit: str) -> str:
    """A cost of training: 500 GFLOP, 1 h 5 min"""
    return in_words(value) if unit == "s" else quantity("train_pflop", value)


def experts_said(experts: float) -> str:
    return "dense" if experts == 1 else f"{experts:.0f} experts"


def decision_table(report: Report) -> Table:
    made = report.decision
    assert made is not None
    rows = []
    for each in made.choices:
        name = experts_said(each.experts)
        if each.reason:
            rows.append([name, "", "", "", "", "", "", each.reason])
            continue
        span, factor = made.spans[each.experts], made.factors[each.experts]
        rows.append([
            name, f"{100 * made.shares[each.experts]:.0f}%", _with(each.size, span["size"], si),
            _with(each.images, span["images"], si), _with(each.loss, span["loss"], lambda x: f"{x:.4f}"),
            spent(each.train, made.cost.unit), _serving(each.price, made.cost.serve_unit),
            _state(made, each, factor),
        ])  # fmt: skip
    head = ["", "best in", made.size, "images", "loss", "training", "serving an image", ""]
    return Table(f"{report.family.name}, {asked(made)}", f"{DECISION_NOTE}; serving by {made.cost.told}", head, rows)


def _with(value: float, span: tuple[float, float], form: Any) -> str:
    ends = "" if not all(map(math.isfinite, span)) else f" [{form(span[0])}, {form(span[1])}]"
    return f"{form(value)}{ends}"


def _state(made: Answer, each: Choice, factor: float) -> str:
    parts = ["best"] if made.best is each else []
    if factor > 1 + 1e-6:
        parts.append(f"extrapolated by a factor of {factor:.3g}")
    if each.images > made.aim.images * (1 - 1e-6):
        parts.append("all images that are fresh to the law")
    if each.devices > 1:
        parts.append(f"on {each.devices} devices")
    return ", ".join(parts)


def answer_lines(report: Report) -> list[str]:
    """The answer in sentences, with what to type."""
    made = report.decision
    lines = []
    if report.undecided:
        lines.append(f"{report.family.name}: no decision: {report.undecided}.")
    if made is not None and made.best is not None:
        best = made.best
        what = "a dense model" if best.experts == 1 else experts_said(best.experts)
        span = made.spans[best.experts]
        lines.append(
            f"{report.family.name}: {what}, {made.size} {_with(best.size, span['size'], si)}, on "
            f"{_with(best.images, span['images'], si)} images: loss {best.loss:.4f}; the best in "
            f"{100 * made.shares[best.experts]:.0f}% of the bootstrap{_others(made)}."
        )
        if made.second is not None:
            other, more = made.second
            name = experts_said(other.experts)
            of = {"loss": "a loss", "serve": "a serving cost", "total": "a cost"}[made.aim.goal]
            lines.append(f"The second best, {name}, has {of} {100 * more:.2g}% higher.")
    if report.proposal is not None and report.proposed is not None:
        middle, low, high = report.proposed
        lines.append(f"To test it (predicted {report.quality} {middle:.4f} [{low:.4f}, {high:.4f}]):")
        lines.append(f"  {report.proposal.command}")
    if report.next is not None:
        unit = made.cost.unit if made is not None else "PFLOP"
        lines.append(
            f"The cheapest next run that narrows the answer ({spent(report.next.cost, unit)}; its spread by "
            f"{100 * report.next.narrower:.0f}%):"
        )
        lines.append(f"  {report.next.proposal.command}")
    if report.checked:
        lines.append(report.checked)
    return lines


def _others(made: Answer) -> str:
    others = [
        f"{experts_said(e)} in {100 * share:.0f}%"
        for e, share in sorted(made.shares.items(), key=lambda each: -each[1])
        if made.best is not None and e != made.best.experts and share > 0.005
    ]
    return f", {', '.join(others)}" if others else ""


def report_notes(report: Report) -> list[str]:
    return [*report.family.notes, *(f"not fitted: {lack}" for lack in report.lacks),
            *(report.decision.notes if report.decision else [])]  # fmt: skip


def report_tables(report: Report) -> list[Table]:
    found = [law_table(report)]
    if report.chosen is not None and len(report.draws):
        found.append(coefficient_table(report))
    if report.decision is not None:
        found.append(decision_table(report))
    return found


def law_rows(report: Report) -> list[dict[str, Any]]:
    """A flat row for each law and each choice, with every digit."""
    rows: list[dict[str, Any]] = []
    for each in report.tested:
        row: dict[str, Any] = {"family": report.family.name, "kind": "law", "law": each.name}
        row |= {
            "runs": each.fit.runs,
            "dearest_rms": each.largest,
            "size_rms": each.by_size,
            "aicc": _finite_or_none(each.fit.aicc),
        }
        row |= {"may_not_decide": report.why[each.name], "delta": each.fit.delta}
        row |= {f"coefficient_{name}": _finite_or_none(value) for name, value in each.fit.coefficients().items()}
        rows.append(row)
    for name, error in report.trivial.items():
        rows.append({"family": report.family.name, "kind": "no law", "law": name, "dearest_rms": error})
    made = report.decision
    for choice in made.choices if made else []:
        assert made is not None
        row = {
            "family": report.family.name,
            "kind": "choice",
            "law": report.chosen.form.law.name if report.chosen else "",
        }
        row |= {"experts": choice.experts, "size_is": made.size, "refused": choice.reason}
        if not choice.reason:
            row |= {"size": choice.size, "images": choice.images, "loss": choice.loss, "training": choice.train,
                    "serving": choice.price, "devices": choice.devices, "outside": made.factors[choice.experts],
                    "wins": made.shares[choice.experts]}  # fmt: skip
            for key, (low, high) in made.spans[choice.experts].items():
                row |= {f"{key}_low": _finite_or_none(low), f"{key}_high": _finite_or_none(high)}
        rows.append(row)
    return rows


def _finite_or_none(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def reports_json(reports: list[Report], notes: list[str], left_out: list[tuple[str, str]]) -> str:
    """Everything, with the points of the fits."""
    told = []
    for report in reports:
        points, made = report.family.points, report.decision
        told.append({
            "family": report.family.name,
            "quality": report.quality,
            "rows": law_rows(report),
            "chosen": report.chosen.form.law.name if report.chosen else None,
            "intervals": {
                name: {"low": _finite_or_none(low), "high": _finite_or_none(high), "identified": known}
                for name, (low, high, known) in intervals(report.chosen, report.draws).items()
            } if report.chosen and len(report.draws) else {},
            "question": asked(made) if made else None,
            "units": {"training": made.cost.unit, "serving": made.cost.serve_unit} if made else None,
            "undecided": report.undecided,
            "command": report.proposal.command if report.proposal else None,
            "predicted": report.proposed,
            "next": report.next.proposal.command if report.next else None,
            "checked": report.checked or None,
            "notes": report_notes(report),
            "points": [
                {"folder": run.place, "loss": float(points.loss[i]), "seed": int(points.seed[i]),
                 **{name: float(values[i]) for name, values in points.sizes.items()}}
                for i, run in enumerate(report.family.runs)
            ],
        })  # fmt: skip
    left = [{"folder": folder, "reason": reason} for folder, reason in left_out]
    return json.dumps({"families": told, "notes": notes, "left_out": left}, indent=1, allow_nan=False) + "\n"
