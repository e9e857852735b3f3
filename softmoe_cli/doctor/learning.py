"""Signs of a learning rate, a length, data or a size that do not suit: from the rows of training and of validation."""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

from softmoe_cli.doctor.chart import Chart
from softmoe_cli.doctor.signs import Reading, read, unseen
from softmoe_cli.doctor.weights import Weighed
from softmoe_cli.run.rows import Row

WINDOW = 10
"""Rows before a row that it is held against."""
DEVIATIONS = 7
FEWEST_ROWS = 20
"""Rows that a curve must have for its shape to be told."""
LEARNED = 0.05
"""Share of its first value by which a training loss must have fallen for how it fell to mean something."""
MIXED_TARGETS = ("train.label_smoothing", "augment.mixup", "augment.cutmix")
"""Settings that give a training image several labels: its loss then ends above that of validation images."""


def of_learning(chart: Chart, weights: Weighed | str) -> Iterator[Reading]:
    """Every sign of SIGNS that rows tell. `weights` as text: why there are none."""
    yield above_chance(chart, weights)
    if len(chart.train) < 2:
        why = chart.faults.get("metrics.jsonl") or "fewer than two rows of training"
        for sign in ("diverged", "spikes", "idle", "falling", "data_bound", "capacity_bound"):
            yield unseen(sign, why)
        return
    first, end = chart.train[0]["loss"], mean_loss(tenth(chart.train))
    lower = f"optim.lr ({_said(chart, 'optim.lr')}): a third of it, or a longer optim.warmup"
    unclipped = "; optim.clip_norm=1" if chart.amount("optim.clip_norm") is None else ""
    where = f"step {chart.train[-1]['step']:,}"
    rise = end / first if first > 0 else 0.0
    yield read("diverged", rise, where=where, turn=lower + unclipped, only_if=end - first >= 0.1)
    yield _spikes(chart, first, lower + unclipped)
    yield _idle(chart, weights)
    yield from _shape(chart, first, end)


def above_chance(chart: Chart, weights: Weighed | str) -> Reading:
    """Whether the last look is better than guessing."""
    if not chart.looks:
        return unseen("chance", chart.faults.get("metrics.jsonl") or "no row of validation yet")
    if chart.young:
        return unseen("chance", chart.young)
    if chart.result is not None:
        guess = float(chart.result["chance_pct"])
    elif isinstance(weights, Weighed) and weights.classes is not None:
        guess = 100 / weights.classes
    else:
        return unseen("chance", "how many classes there are is told by result.json, or by a checkpoint's plain head")
    from softmoe_cli.compare.intervals import at_chance

    last = chart.looks[-1]
    turn = (
        f"optim.lr ({_said(chart, 'optim.lr')}): ten times less, and more; then the labels: softmoe data check, with "
        "the run's data= words"
    )
    ill = at_chance([last["top1_pct"]], guess, last["images_evaluated"])
    where = f"step {last['step']:,}, {last['images_evaluated']:,} images"
    return Reading("chance", last["top1_pct"], guess, ill, where, turn if ill else "")


def tenth(train: Sequence[Row]) -> Sequence[Row]:
    """The last tenth of rows, one at least."""
    return train[-max(1, len(train) // 10) :]


def mean_loss(train: Sequence[Row]) -> float:
    return sum(row["loss"] for row in train) / len(train)


def _said(chart: Chart, key: str) -> str:
    return chart.setting(key) or "null"


def _spikes(chart: Chart, first: float, turn: str) -> Reading:
    if len(chart.train) <= WINDOW:
        return unseen("spikes", f"{WINDOW} rows of training or fewer")
    found = [
        chart.train[i]["step"]
        for i in range(WINDOW, len(chart.train))
        if spike(chart.train, i, first)
        and not any(chart.train[i - 1]["step"] <= step < chart.train[i]["step"] for step in chart.gone)
    ]
    where = f"steps {', '.join(f'{step:,}' for step in found[:4])}{', …' if found[4:] else ''}" if found else ""
    return read("spikes", len(found), where=where, turn=turn)


def spike(train: Sequence[Row], place: int, first: float) -> bool:
    """Whether a row's loss is DEVIATIONS above the WINDOW rows before it, and by a tenth of the run's first loss."""
    before = [row["loss"] for row in train[place - WINDOW : place]]
    mean = sum(before) / WINDOW
    deviation = math.sqrt(sum((loss - mean) ** 2 for loss in before) / WINDOW)
    return bool(train[place]["loss"] - mean >= max(DEVIATIONS * deviation, 0.1 * first))


def _idle(chart: Chart, weights: Weighed | str) -> Reading:
    """How far a weight can have come, over the usual size of one."""
    if chart.young or isinstance(weights, str):
        return unseen("idle", chart.young or str(weights))
    if not weights.usual:
        return unseen("idle", "the checkpoint's matrices are all zero, or not float32")
    steps = [(row["step"] - before, row) for before, row in pairs(chart.train)]
    way = sum(updates * row["lr"] for updates, row in steps)
    if chart.setting("optim.name") == "sgd":
        clip, momentum = chart.amount("optim.clip_norm"), min(chart.amount("optim.momentum") or 0.0, 0.99999)
        norms = [(updates * row["lr"], row["grad_norm"] or 0.0) for updates, row in steps]
        way = sum(each * (norm if clip is None else min(norm, clip)) for each, norm in norms) / (1 - momentum)
        way /= math.sqrt(weights.count)  # of all weights together, so far
    turn = f"optim.lr ({_said(chart, 'optim.lr')}): a hundred times more; or more of train.steps"
    return read("idle", 100 * way / weights.usual, where=f"step {chart.train[-1]['step']:,}", turn=turn)


def pairs(train: Sequence[Row]) -> Iterator[tuple[int, Row]]:
    """Each row with the step of the row before it."""
    yield 0, train[0]
    for before, row in pairwise(train):
        yield before["step"], row


def _shape(chart: Chart, first: float, end: float) -> Iterator[Reading]:
    """The signs that a curve's shape tells: of finished runs, since a schedule decides how it ends."""
    why = ""
    if not chart.done:
        why = "the run is not finished"
    elif len(chart.train) < FEWEST_ROWS or not chart.looks:
        why = f"fewer than {FEWEST_ROWS} rows of training, or no look"
    elif first <= 0 or first - end < LEARNED * first:
        why = "the training loss has hardly fallen"
    if why:
        for sign in ("falling", "data_bound", "capacity_bound"):
            yield unseen(sign, why)
        return
    last, fall = chart.looks[-1], first - end
    late = 100 * (two_thirds(chart.train) - end) / fall
    longer = f"train.{_budget(chart)}: twice as many, or optim.lr ({_said(chart, 'optim.lr')}): three times more"
    yield read("falling", late, turn=longer)
    mixed = " and ".join(key for key in MIXED_TARGETS if chart.amount(key))
    why = f"with {mixed} a training loss has a part that no learning takes away, and that of validation has not"
    lag = 100 * (last["loss"] - end) / fall
    losses = f"training {end:.3g}, validation {last['loss']:.3g}"
    bound = read("data_bound", lag, where=losses, turn=_for_data(chart))
    yield bound if bound.ill or not mixed else unseen("data_bound", why)  # without that part it would lag more
    if mixed:
        yield unseen("capacity_bound", why)
        return
    flat = last["loss"] <= 1.1 * end and late < 10 and last["epoch"] >= 5
    size = "more experts (model.router.num_experts), " if chart.router() else ""
    larger = f"{size}model.backbone.width and depth up"
    yield read("capacity_bound", 100 * end / first, where=losses, turn=larger, only_if=flat)


def two_thirds(train: Sequence[Row]) -> float:
    """The loss, mean over a tenth of all rows, where two thirds of all learning rates were used up."""
    used = list(accumulate(row["lr"] * (row["step"] - before) for before, row in pairs(train)))
    place = next(place for place, each in enumerate(used) if each >= used[-1] * 2 / 3)
    half = max(1, len(train) // 20)
    return mean_loss(train[max(0, place - half) : place + half + 1])


def _budget(chart: Chart) -> str:
    return next((key for key in ("steps", "epochs", "images", "minutes") if chart.amount(f"train.{key}")), "epochs")


def _for_data(chart: Chart) -> str:
    dense = "model/router=dense would do as well; " if chart.router() else ""
    return f"{dense}more images, or stronger augment.* (recipe=strong), or fewer train.{_budget(chart)}"
