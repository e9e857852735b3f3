"""Signs of routers and experts: from the last look in routing.jsonl, and from a checkpoint's weights."""

from collections.abc import Iterator, Sequence

from softmoe_cli.doctor.chart import Chart
from softmoe_cli.doctor.signs import Reading, read, unseen
from softmoe_cli.doctor.weights import Weighed
from softmoe_cli.run.rows import Row

TOKENS_EACH = 20
"""Tokens that an expert must get on average for one without any to mean something: chance leaves exp(-20)."""
DROPS_OF_EXPERTS_CHOICE = 50.0
OF_SOFT = {"dispatch_min", "dispatch_max", "combine_min", "combine_max"}
DROPPED_CHOICES = 200 / 3
"""Of zero_computation's choices of MLPs; a token whose choice is dropped has others."""
ALMOST_UNIFORM = 1.5
"""A mean largest share below so many times the uniform one, as the soft router says it."""

EPOCHS_TO_PART = 10
"""Whole epochs before which experts that began equal are not held against the limit, which comes from longer runs."""


def of_experts(chart: Chart, weights: Weighed | str) -> Iterator[Reading]:
    """The signs of what a run has: nothing of a model without experts. `weights` as text: why there are none."""
    if not chart.router() and not chart.routing:
        return
    if not chart.routing:
        why = chart.faults.get("routing.jsonl") or "no row in routing.jsonl yet"
        for sign in ("dead", "collapsed", "dropped"):
            yield unseen(sign, why)
    else:
        yield from _loads(chart)
        yield _dropped(chart)
        yield from _slots(chart)
    yield _alike(chart, weights)


def _place(row: Row) -> str:
    beside = f", {row['beside']}" if "beside" in row else ""
    return f"block {row['block']}{beside}, step {row['step']:,}"


def _loads(chart: Chart) -> Iterator[Reading]:
    """Whether experts are idle. Experts that are given to tasks are idle where others' images are looked at."""
    rows = [row for row in chart.routing if "dead_share" in row and "effective_experts_share" in row]
    why = "" if rows else "routing.jsonl has no loads"
    rows = [row for row in rows if "task_experts" not in row]
    if not rows:
        why = why or "the experts are chosen for tasks, and a look sees the tasks' images in turn"
    counted = [row for row in rows if _tokens_each(chart, row) >= TOKENS_EACH]
    if rows and not counted:
        why = f"an expert had fewer than {TOKENS_EACH} tokens of a look on average; train.eval_batch_size sets how many"
    if why:
        yield from (unseen(sign, why) for sign in ("dead", "collapsed"))
        return
    worst = max(counted, key=lambda row: row["dead_share"])
    turn = _balance(chart, worst["block"])
    yield read("dead", 100 * worst["dead_share"], where=_place(worst), turn=turn)
    worst = min(counted, key=lambda row: row["effective_experts_share"])
    turn = _balance(chart, worst["block"])
    yield read("collapsed", 100 * worst["effective_experts_share"], where=_place(worst), turn=turn)


def _tokens_each(chart: Chart, row: Row) -> float:
    """Choices of a look over experts, without those of experts that compute nothing. Dense weights are no sample of
    choices: every token counts for each expert."""
    if "dispatch_max" in row or "coefficient_max" in row:
        return float("inf")
    options, images = chart.router(row["block"]), chart.amount("train.eval_batch_size")
    number = _number(options, "num_experts")
    if images is None or not number or not chart.looks:
        return float("inf")
    images = min(images, chart.looks[-1]["images_evaluated"])
    by_image = "image_choice" in str(options.get("_target_"))
    tokens = 1 if by_image else chart.tokens
    choices = (_number(options, "k") or 1) * row.get("ffn_share", 1.0)
    return float("inf") if tokens is None else images * tokens * choices / number


def _number(options: dict[str, object], key: str) -> float | None:
    try:
        return float(str(options.get(key)))
    except ValueError:
        return None


def _balance(chart: Chart, block: int) -> str:
    """The options with which this router evens loads."""
    options, where = chart.router(block), chart.router_key(block)
    own = [key for key in ("load_weight", "importance_weight", "balance_weight", "bias_rate") if key in options]
    ways = [f"{', '.join(f'{where}.{key} ({options[key]})' for key in own)} up"] if own else []
    number = options.get("num_experts")
    return "; ".join([*ways, *([f"fewer {where}.num_experts ({number})"] if number else [])])


def _dropped(chart: Chart) -> Reading:
    """The worst block by its own limit: blocks may have routers of their own."""
    found = [_dropped_in(chart, row) for row in chart.routing if "dropped_share" in row]
    if not found:
        return unseen("dropped", "routing.jsonl has no dropped_share")
    return max(found, key=lambda reading: (reading.figure or 0.0) / reading.limit)


def _dropped_in(chart: Chart, row: Row) -> Reading:
    choices = "ffn_dropped_share" in row  # an evaluation of these drops nothing
    key, what = ("ffn_dropped_share", ", of choices of MLPs in training") if choices else ("dropped_share", "")
    options, where = chart.router(row["block"]), chart.router_key(row["block"])
    by_expert = "experts_choice" in str(options.get("_target_"))
    slots = "capacity_factor" if _number(options, "capacity_factor") else "slots_per_expert"
    ways = [f"{where}.{slots} ({options.get(slots)}) up"]
    if choices:
        ways.append(f"{where}.images_per_group ({options.get('images_per_group')}) up")
    elif not by_expert:
        ways.append(f"{'model/router' if where == 'model.router' else where}=tokens_choice_dropless")
    limit = DROPPED_CHOICES if choices else DROPS_OF_EXPERTS_CHOICE if by_expert else None
    return read("dropped", 100 * row[key], where=_place(row) + what, turn=", or ".join(ways), limit=limit)


def _slots(chart: Chart) -> Iterator[Reading]:
    """The signs of soft routing."""
    rows = [row for row in chart.routing if "slot_cosine_mean" in row]
    if rows:
        worst = max(rows, key=lambda row: row["slot_cosine_mean"])
        turn = "fewer model.router.slots_per_expert, more model.router.num_experts; or a longer training"
        yield read("slots_alike", worst["slot_cosine_mean"], where=_place(worst), turn=turn)
    rows = [row for row in chart.routing if row.keys() >= OF_SOFT]
    if rows:
        worst = max(rows, key=_peak)
        turn = f"optim.lr ({chart.setting('optim.lr')}) down, optim.weight_decay up: it holds the scale of the logits"
        yield read("saturated", _peak(worst), where=_place(worst), turn=turn)
    if rows and any("scale" in row for row in rows):
        yield _scale(chart, rows)


def _peak(row: Row) -> float:
    """The larger of the two mean largest weights; of one that has no choice (a single token, or slot) nothing."""
    free = [name for name in ("dispatch", "combine") if row[f"{name}_min"] < row[f"{name}_max"]]
    return max((float(row[f"{name}_max"]) for name in free), default=0.0)


def _scale(chart: Chart, rows: Sequence[Row]) -> Reading:
    if chart.young:
        return unseen("scale_idle", chart.young)
    if chart.tokens is None:
        return unseen("scale_idle", "how many tokens an image has is told by result.json")
    furthest = max((row for row in rows if "scale" in row), key=lambda row: abs(row["scale"] - 1))
    uniform = sum(row["dispatch_max"] for row in rows) / len(rows) < ALMOST_UNIFORM / chart.tokens
    where = f"scale {furthest['scale']:.3g}, {_place(furthest)}"
    turn = f"optim.lr ({chart.setting('optim.lr')}) up, or a longer training: a scale moves by lr in an update at most"
    return read("scale_idle", abs(furthest["scale"] - 1), where=where, turn=turn, only_if=uniform)


def _alike(chart: Chart, weights: Weighed | str) -> Reading:
    if chart.young or isinstance(weights, str):
        return unseen("experts_alike", chart.young or str(weights))
    if not weights.alike:
        return unseen("experts_alike", "the checkpoint has no experts with weights of their own")
    found, epochs = weights.alike, chart.last["epoch"] if chart.last else 0.0
    if chart.setting("model.expert_init") != "independent" and round(epochs) < EPOCHS_TO_PART:
        found = {
            place: cosine for place, cosine in found.items() if place.endswith("_adapter")
        }  # which begin different
    if not found:
        why = (
            f"the experts began equal (model.expert_init={chart.setting('model.expert_init') or 'null'}), and fewer "
            f"than {EPOCHS_TO_PART} epochs of training tell little of whether they part"
        )
        return unseen("experts_alike", why)
    place = max(found, key=lambda name: found[name])
    turn = "a longer training; model.expert_init=independent; of softmoe upcycle expert_redraw=0.5 or expert_noise=0.1"
    return read("experts_alike", found[place], where=f"{place}, step {weights.step:,}", turn=turn)
