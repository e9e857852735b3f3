"""What tuning found as text, as JSON and as files beside its runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from softmoe_cli.compare.units import cell
from softmoe_cli.files import write_atomically
from softmoe_cli.run.rows import QUALITIES
from softmoe_cli.settle.tune import Tuned, changed_order
from softmoe_cli.text import aligned, flop, four_digits, in_words, several


def tuning_text(found: Sequence[Tuned], key: str) -> str:
    """Quality against the value for every arm, what was chosen, and what that says."""
    by = found[0].by
    searched = found[0].searched
    rows = [["trial" if searched else key, *(each.arm for each in found)]]
    for place, trial in enumerate(found[0].trials):
        line = [str(place + 1 if searched else trial.value)]
        for each in found:
            mine = each.trials[place]
            mean = cell(by, mine.mean(by)) or f"{several(mine.failed, 'seed')} failed"
            value = f"{four_digits(mine.value)}: " if searched else ""
            line.append(f"{value}{mean}{' *' if mine is each.best else ''}")
        rows.append(line)
    rows.append(["training", *(flop(1e15 * each.spent.pflop) for each in found)])
    rows.append(["time", *(in_words(each.spent.seconds) for each in found)])
    n = len(found[0].trials[0].runs) + found[0].trials[0].failed
    told = [
        f"tune={key}: mean {QUALITIES[by].title} of {several(n, 'seed')}, which are not used again; * is chosen",
        aligned(rows, markdown=False),
        *tuning_sentences(found, key),
    ]
    return "\n".join(told)


def tuning_sentences(found: Sequence[Tuned], key: str) -> list[str]:
    """Which optima lie at an end of the list, whether they are shared, and whether tuning changed the order."""
    told = []
    for each in found:
        if each.best and each.at_end:
            side = "below" if each.at_end == "smallest" else "above"
            way_out = "better ones may lie outside tune_range; try a wider one in another study" if each.searched else (
                f"the list was too short; add values {side} it to tune_values")  # fmt: skip
            told.append(f"- {each.arm} is best at the {each.at_end} value tried, {each.best.value}: {way_out}")
    values = {each.arm: each.best.value for each in found if each.best}
    shared = len({str(value) for value in values.values()}) == 1
    each_own = "; ".join(f"{arm} {value}" for arm, value in values.items())
    told.append(f"- the best {key} is {'the same for all arms' if shared else f'not shared: {each_own}'}")
    orders = changed_order(found)
    if orders is None:
        told.append(
            f"- whether tuning changed the order of the arms is not known: not every arm's default of {key} was tried"
        )
    elif orders[0] == orders[1]:
        told.append(f"- tuning did not change the order of the arms by their means: {' > '.join(orders[0])}")
    else:
        told.append(
            f"- tuning changed the order of the arms by their means: {' > '.join(orders[0])} with the defaults, "
            f"{' > '.join(orders[1])} tuned"
        )
    return told


def tuning_rows(found: Sequence[Tuned], key: str) -> dict[str, Any]:
    """What tuning found, for programs."""
    orders = changed_order(found)
    by = found[0].by
    arms = []
    for each in found:
        trials = []
        for trial in each.trials:
            mean = trial.mean(by)
            trials.append(
                {
                    "value": trial.value,
                    by: mean.mean if mean else None,
                    "seeds": len(trial.runs),
                    "failed": trial.failed,
                }
            )
        arms.append(
            {
                "arm": each.arm, "best": each.best.value if each.best else None, "at_end": each.at_end or None,
                "default": each.default, "train_pflop": each.spent.pflop, "seconds": each.spent.seconds,
                "trials": trials,
            }
        )  # fmt: skip
    return {
        "key": key, "by": by, "arms": arms, "order_changed": None if orders is None else orders[0] != orders[1],
        "order_default": orders[0] if orders else None, "order_tuned": orders[1] if orders else None,
    }  # fmt: skip


def write_tuning(found: Sequence[Tuned], key: str, study: Path) -> None:
    """tuning.json, and the figure in every form, in the study of the trials."""
    from softmoe_cli.settle.figure import tuning_figure

    write_atomically(study / "tuning.json", json.dumps(tuning_rows(found, key), indent=1) + "\n")
    for name, content in tuning_figure(found, key).items():
        write_atomically(study / name, content)
