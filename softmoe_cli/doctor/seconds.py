"""Signs of time that was no training: from the seconds in the last row, and from what the result says of precision."""

from collections.abc import Iterator

from softmoe_cli.doctor.chart import Chart
from softmoe_cli.doctor.signs import Reading, read, unseen

LEAST_S = 60.0
"""Seconds that must be lost: of a run of seconds the shares say nothing."""
LOST = {
    "loading": ("load_s", "data.workers ({}) up, data=arrow or webdataset, smaller files", "data.workers"),
    "evaluation": ("eval_s", "train.eval_every ({}) up, fewer data.validation_fraction or train.fewshot",
                   "train.eval_every"),
    "saving": ("save_s", "train.save_seconds ({}) up, or a faster disk for output_root", "train.save_seconds"),
    "compilation": ("compile_s", "train.compile ({}): false for runs as short as this", "train.compile"),
}  # fmt: skip
"""Sign -> its seconds in a row, what to turn, and the setting that is said in that."""


def of_seconds(chart: Chart) -> Iterator[Reading]:
    last = chart.last
    if last is None:
        yield from (unseen(sign, chart.faults.get("metrics.jsonl") or "no row yet") for sign in LOST)
    else:
        trained = last["device_s"] / chart.devices  # device_s adds devices up
        whole = trained + last["eval_s"] + last["save_s"] + last["compile_s"]
        for sign, (key, turn, setting) in LOST.items():
            if key not in last or whole <= 0:
                yield unseen(sign, f"the rows have no {key}" if key not in last else "no second has passed")
                continue
            where = f"{last[key]:,.0f} of {whole:,.0f} s"
            told = turn.format(chart.setting(setting) or "null")
            yield read(sign, 100 * last[key] / whole, where=where, turn=told, only_if=last[key] >= LEAST_S)
    yield _precision(chart)


def _precision(chart: Chart) -> Reading:
    precision = chart.setting("train.precision")
    if precision == "fp32":
        return read("precision", 0, where="fp32")
    if chart.result is None or "fp32_is_faster" not in chart.result:
        return unseen("precision", "result.json tells it at the end, and the header of softmoe train at the start")
    hardware = chart.result.get("hardware", "")
    slow = int(bool(chart.result["fp32_is_faster"]))
    return read("precision", slow, where=f"{precision} on {hardware}", turn="train.precision=fp32, or auto")
