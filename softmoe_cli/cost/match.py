"""`softmoe match`: the value of one free setting with which a model costs what another does.

The settings are whole numbers, so a cost can seldom be met exactly. The search doubles the value until the cost is
passed, halves every interval in which it is crossed, and looks at the neighbours of the best value: a rounded capacity
makes some costs go up and down on their way.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from softmoe_cli.config.commands import MatchConfig
from softmoe_cli.cost.clock import measure
from softmoe_cli.cost.flop import account, account_model, on_meta
from softmoe_cli.cost.load import load_of
from softmoe_cli.cost.memory import predict
from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.text import word_of

LARGEST = 2**24
NEIGHBOURS = 3
TIMED = ("latency_ms", "train_step_ms")
LANDED_NOTE = "what lands when the load is as even as routers aim at; the rows of a run say what has landed"
Candidate = Callable[[dict[str, Any]], MatchConfig]


@dataclass(frozen=True)
class Trial:
    """One value of the free setting: the overrides that set it, and its cost over the target cost."""

    overrides: dict[str, Any]
    cost: float
    other_cost: float

    @property
    def ratio(self) -> float:
        return self.cost / self.other_cost

    def says(self) -> str:
        return f"{' '.join(word_of(*each) for each in self.overrides.items())} ({100 * (self.ratio - 1):+.2f}%)"


def match(config: MatchConfig, other: MatchConfig, candidate: Candidate) -> Trial:
    """The best value of `config.free`.

    Args:
        other: the model whose cost is the target.
        candidate: the configuration with some keys changed.

    Raises:
        UsageError: the free setting is not one of the model's.
        RunError: nothing comes within the tolerance; the message names the nearest on both sides.
    """
    if config.by == "landed_pflop":
        for each in (config, other):
            _require_known_rows(each)
        _require_empty_rows(config, other)
    tried: dict[int, Trial | None] = {}
    reason = ""
    timed = config.by in TIMED
    other_cost = 0.0 if timed else cost_of(other)
    one_step = cost_of(dataclasses.replace(config, steps=1)) if config.free == "train.steps" else 0.0

    def trial(value: int) -> Trial | None:
        """None where the model cannot be built with that value."""
        nonlocal reason
        if value not in tried:
            changes = changes_of(config, value)
            try:
                if config.free == "train.steps":
                    tried[value] = Trial(changes, value * one_step, other_cost)
                elif timed:
                    tried[value] = timed_trial(changes, candidate(changes), other)
                else:
                    tried[value] = Trial(changes, cost_of(candidate(changes)), other_cost)
            except UsageError as error:
                tried[value], reason = None, str(error)
        return tried[value]

    changes_of(config, 1)
    search(lambda value: None if (found := trial(value)) is None else found.ratio, 0 if timed else NEIGHBOURS)
    trials = [found for found in tried.values() if found is not None]
    if not trials:
        raise UsageError(f"free={config.free}: {config.model.name} cannot be built with any value of it ({reason})")
    best = min(trials, key=lambda found: abs(found.ratio - 1))
    if timed:  # the best of several measurements was also the luckiest: measure it again
        trials.remove(best)
        best = timed_trial(best.overrides, candidate(best.overrides), other)
        trials.append(best)
    if abs(best.ratio - 1) <= config.tolerance:
        return best
    below = max((found for found in trials if found.ratio < 1), key=lambda found: found.ratio, default=None)
    above = min((found for found in trials if found.ratio > 1), key=lambda found: found.ratio, default=None)
    sides = f"nearest below: {below.says() if below else 'none'}, nearest above: {above.says() if above else 'none'}"
    raise RunError(
        f"no {config.free} brings {config.by} of {config.model.name} within {100 * config.tolerance:g}% of "
        f"{other.model.name}'s {best.other_cost:.4g}; {sides}"
    )


def search(ratio: Callable[[int], float | None], neighbours: int) -> None:
    """Tries values from 1 on until all that matter were tried, and as many `neighbours` of the best on each side.

    `ratio` gives a value's cost over the target cost, or None if no model can be built with the value.
    """
    value, last = 1, 0
    points: list[tuple[int, float]] = []
    while value <= LARGEST:
        value_ratio = ratio(value)
        if value_ratio is not None:
            points.append((value, value_ratio))
        elif points:
            last = value
            break  # no larger value will do either
        if value_ratio is not None and value_ratio > 1 and len(points) > 1:
            break
        value *= 2
    if not points:  # such as a depth below that of the MoE blocks
        points = [(v, value_ratio) for v in range(1, 65) if (value_ratio := ratio(v)) is not None]
    elif last:  # the largest value that will do
        low, high = points[-1][0], last
        while high - low > 1:
            middle = (low + high) // 2
            value_ratio = ratio(middle)
            if value_ratio is None:
                high = middle
            else:
                low = middle
                points.append((middle, value_ratio))
    low, high = points[0][0] // 2 if points else 0, points[0][0] if points else 0
    while high - low > 1:  # the smallest value that will do
        middle = (low + high) // 2
        value_ratio = ratio(middle)
        if value_ratio is None:
            low = middle
        else:
            high = middle
            points.append((middle, value_ratio))
    points.sort()
    for (low, low_ratio), (high, high_ratio) in itertools.pairwise(points):
        if (low_ratio - 1) * (high_ratio - 1) > 0:
            continue
        while high - low > 1:
            middle = (low + high) // 2
            value_ratio = ratio(middle)
            if value_ratio is None:
                break
            if (value_ratio - 1) * (low_ratio - 1) > 0:
                low, low_ratio = middle, value_ratio
            else:
                high = middle
        for near in range(max(1, low - neighbours), high + neighbours + 1):
            ratio(near)


def changes_of(config: MatchConfig, value: int) -> dict[str, Any]:
    """The keys that give the free setting its `value` (a width in units of what heads divide, `moe_blocks` as that many
    last ones), with what has to go along.

    Raises:
        UsageError: the model has no such setting.
    """
    backbone, router = config.model.backbone, config.model.router
    if config.free.startswith("model.router."):
        name = config.free.rpartition(".")[2]
        if name not in router:
            raise UsageError(f"free={config.free}: router {config.model.router_name} has no {name}")
        if name == "slots_per_expert" and "capacity_factor" in router:
            return {config.free: value, "model.router.capacity_factor": None}
        return {config.free: value}
    if config.free == "model.moe_blocks":
        if router["_target_"] is None:
            raise UsageError(f"free={config.free}: {config.model.name} is dense")
        return {config.free: f"last_{value}"}
    if config.free == "train.steps":
        return {config.free: value}
    if backbone.timm is not None:
        raise UsageError(f"free={config.free}: model.backbone.timm={backbone.timm} brings its own")
    if config.free == "model.backbone.depth":
        return {config.free: value}
    # The number of heads stays and the MLP keeps its ratio; heads of an odd width are for toys.
    assert backbone.width is not None and backbone.heads is not None and backbone.mlp_width is not None
    unit = backbone.heads * (2 if backbone.width // backbone.heads >= 32 else 1)
    mlp = round(value * unit * backbone.mlp_width / backbone.width)
    return {config.free: value * unit, "model.backbone.mlp_width": mlp}


def cost_of(config: MatchConfig) -> float:
    """The cost that is to be matched, in the unit of its name, if it needs no clock."""
    load = load_of(config)
    if config.by == "peak_mib":
        return predict(load).peak_bytes / 2**20
    cost = account(load.model, load.num_classes, batch=load.part, recompute=load.recompute)
    values = {
        "forward_gflop": cost.forward_flop / 1e9,
        "train_gflop": cost.train_flop / 1e9,
        "train_pflop": (config.steps or 0) * load.batch * cost.train_flop / 1e15,
        "params_m": cost.params / 1e6,
        "active_params_m": cost.active_params / 1e6,
    }
    if config.by == "landed_pflop":
        return (config.steps or 0) * load.batch * cost.nominal_landed_flop / 1e15
    return values[config.by]


def _require_known_rows(config: MatchConfig) -> None:
    """Raises UsageError where experts stay frozen whose rows are counted: what a row costs is not known then."""
    if config.model.adapter.name == "none":
        return
    vit = on_meta(config.model, load_of(config).num_classes)
    if account_model(vit, batch=None, recompute=False).landed_row_flop is not None:
        raise UsageError(
            f"by=landed_pflop: adapter={config.model.adapter.name} leaves the experts of {config.model.name} frozen, "
            "and what a row of one costs then is not known; use by=train_pflop"
        )


def _require_empty_rows(config: MatchConfig, other: MatchConfig) -> None:
    """Raises UsageError where landed_pflop would be train_pflop for both models."""
    costs = [(cost_of(each), cost_of(dataclasses.replace(each, by="train_pflop"))) for each in (config, other)]
    if all(math.isclose(landed, trained, rel_tol=1e-9) for landed, trained in costs):
        raise UsageError(
            f"by=landed_pflop: when the load is even no expert of {config.model.name} or {other.model.name} has rows "
            "that stay empty, so that this is their train_pflop; use by=train_pflop"
        )


def timed_trial(changes: dict[str, Any], config: MatchConfig, other: MatchConfig) -> Trial:
    """Both models measured in turn."""
    own, others = measure([load_of(config), load_of(other)], max(config.repeats, other.repeats))
    return Trial(changes, getattr(own, config.by), getattr(others, config.by))


def show_match(best: Trial, config: MatchConfig) -> str:
    """What to type, and how close it comes."""
    row = {
        "model": config.model.name,
        "to": config.to,
        "by": config.by,
        "overrides": [word_of(*each) for each in best.overrides.items()],
        config.by: best.cost,
        f"to_{config.by}": best.other_cost,
        "difference_pct": 100 * (best.ratio - 1),
        "tolerance_pct": 100 * config.tolerance,
    }
    if config.by == "landed_pflop":
        row["note"] = LANDED_NOTE
    if config.format == "json":
        return json.dumps(row)
    words = {key: " ".join(value) if isinstance(value, list) else _cell(value) for key, value in row.items()}
    return "\n".join(f"{key:<18}{word}" for key, word in words.items())


def _cell(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
