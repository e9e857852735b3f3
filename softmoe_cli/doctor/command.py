"""`softmoe doctor`: every sign of every run below some folders, from their files alone."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softmoe_cli import programs
from softmoe_cli.doctor.chart import Chart, read_chart
from softmoe_cli.doctor.experts import of_experts
from softmoe_cli.doctor.learning import of_learning
from softmoe_cli.doctor.seconds import of_seconds
from softmoe_cli.doctor.signs import SIGNS, Reading, as_row, read, unseen
from softmoe_cli.doctor.weights import Weighed, weighed
from softmoe_cli.errors import UsageError
from softmoe_cli.run import rows
from softmoe_cli.run.status import State, read_states
from softmoe_cli.text import aligned, printable, several

NOT_BEGUN = ("waiting", "queued", "held", "over the limit")
COLUMNS_WIDE = 100


@dataclass(frozen=True)
class Examined:
    """A run, and what was found of each sign, in the order of SIGNS."""

    state: State
    readings: list[Reading]

    @property
    def findings(self) -> list[Reading]:
        return [reading for reading in self.readings if reading.ill]


def doctor_as_typed(arguments: Sequence[str]) -> int:
    """Prints what is wrong with the runs; 1 if anything is.

    Raises:
        UsageError: a folder that is none, or holds no run; an option that does not exist.
    """
    unknown = [word for word in arguments if word.startswith("-")]
    if unknown:
        raise UsageError(f"softmoe doctor has no option {unknown[0]}; it has {programs.FLAG}")
    folders = [Path(word) for word in arguments if not word.startswith("-")]
    if not folders:
        raise UsageError("softmoe doctor needs a run, a study or a sweep, such as softmoe doctor outputs/default")
    states = read_states(folders)
    begun = [state for state in states if state.state not in NOT_BEGUN]
    examined = [examine(state) for state in begun]
    later = len(states) - len(begun)
    programs.reply(report(examined, later)) if programs.listen() else print(show(examined, later))
    return 1 if any(each.findings for each in examined) else 0


def examine(state: State) -> Examined:
    """Looks at all that a run's files tell."""
    chart = read_chart(state)
    try:
        weights: Weighed | str = weighed(chart.folder)
    except rows.Unreadable as error:
        weights = str(error)
    found = [*_run(chart), *of_learning(chart, weights), *of_experts(chart, weights), *of_seconds(chart)]
    order = list(SIGNS)
    return Examined(state, sorted(found, key=lambda reading: order.index(reading.sign)))


def _run(chart: Chart) -> Iterable[Reading]:
    """Whether the run has its files, and its end."""
    state = chart.state
    faults = [f"{file} {printable(why)}" for file, why in chart.faults.items()]
    if state.state == "damaged" and not faults:
        faults = [str(state.reason)]
    turn = "restore the file, or remove the folder and type the command again"
    yield read("damaged", len(faults), where="; ".join(faults), turn=turn)
    if state.progress is None:
        yield unseen("unfinished", "what the budget is cannot be read")
    elif state.state == "running or killed":
        yield unseen("unfinished", "a process of another machine may hold it: softmoe status tells when it last wrote")
    else:
        turn = f"to go on: {state.resume}" if state.resume else "type its command again"
        where = f"{state.state}: {state.reason}" if state.reason else state.state
        at_rest = state.state in ("stopped", "failed", "damaged")
        used = 100 * state.progress
        yield Reading("unfinished", used, 100, at_rest, where, turn if at_rest else "")


def report(examined: Sequence[Examined], later: int) -> dict[str, Any]:
    """Everything that was looked at, with limits and their sources."""
    runs = [
        {
            "run": each.state.folder,
            "state": each.state.state,
            "healthy": not each.findings,
            "findings": [reading.sign for reading in each.findings],
            "readings": [as_row(reading) for reading in each.readings],
        }
        for each in examined
    ]
    ill = sum(not run["healthy"] for run in runs)
    return {"healthy": len(runs) - ill, "ill": ill, "not_begun": later, "runs": runs}


def show(examined: Sequence[Examined], later: int) -> str:
    """The findings of each run in a table, then what each finding means and what to turn; healthy runs in a line each,
    with what was looked at; and what could not be looked at."""
    parts = [_findings(each) for each in examined if each.findings]
    parts += [_meant([reading for each in examined for reading in each.findings])]
    healthy: dict[str, list[str]] = {}
    for each in examined:
        if not each.findings:
            looked = ", ".join(SIGNS[reading.sign].title for reading in each.readings if not reading.unseen)
            healthy.setdefault(looked, []).append(f"{_named(each)}: healthy")
    parts += ["\n".join(names) + f"; looked at: {looked}" for looked, names in healthy.items()]
    parts.append(_not_looked_at(examined))
    if later:
        parts.append(f"{several(later, 'run')} not begun: nothing to look at")
    return "\n\n".join(part for part in parts if part)


def _named(each: Examined) -> str:
    return f"{printable(each.state.folder)} ({each.state.state})"


def _findings(each: Examined) -> str:
    table = [["  finding", "measured", "bad", "where"]]
    for reading in each.findings:
        sign = SIGNS[reading.sign]
        bad = f"{sign.side} {reading.limit:.3g}"
        table.append([f"  {sign.title}", f"{reading.figure:.4g}", bad, printable(reading.where)])
    return f"{_named(each)}: {several(len(each.findings), 'finding')}\n{aligned(table, markdown=False)}"


def _meant(findings: Sequence[Reading]) -> str:
    """One paragraph for each different finding and what to turn for it."""
    told = dict.fromkeys((reading.sign, reading.turn) for reading in findings)
    return "\n".join(
        _filled(f"{SIGNS[sign].title}: {SIGNS[sign].measured}. Turn: {printable(turn)}.") for sign, turn in told
    )


def _filled(text: str) -> str:
    return textwrap.fill(text, COLUMNS_WIDE, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _not_looked_at(examined: Sequence[Examined]) -> str:
    """The signs that could not be looked at, by the reason, and in how many runs, where there are several."""
    why: dict[str, dict[str, set[str]]] = {}
    for each in examined:
        for reading in each.readings:
            if reading.unseen:
                runs = why.setdefault(reading.unseen, {}).setdefault(SIGNS[reading.sign].title, set())
                runs.add(each.state.folder)
    lines = []
    for reason, titles in why.items():
        runs = set.union(*titles.values())
        many = f" in {several(len(runs), 'run')}" if len(examined) > 1 else ""
        lines.append(_filled(f"not looked at{many}: {', '.join(titles)}: {printable(reason)}"))
    return "\n".join(lines)
