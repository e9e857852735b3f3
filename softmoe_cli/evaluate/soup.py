"""Averages of the weights of several checkpoints of one architecture: model soups (Wortsman et al., 2022),
https://arxiv.org/abs/2203.05482"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from softmoe_cli.errors import UsageError
from softmoe_cli.options.inherit import CUT_KEYS, same_set
from softmoe_cli.run.header import Source

Weights = dict[str, Tensor]
COMMON = ("model", "classes", "loss", "precision")


def average(states: Sequence[Weights]) -> Weights:
    """The mean of every weight, summed in float64."""
    return {
        key: torch.stack([state[key].double() for state in states]).mean(dim=0).to(value.dtype)
        for key, value in states[0].items()
    }


def greedy(states: Sequence[Weights], score: Callable[[Weights], float]) -> list[int]:
    """Which states to average (Recipe 1 of the paper): the best first, then each whose addition does not lower the
    score of the average. Of equal ones the earlier goes first."""
    alone = [score(state) for state in states]
    first, *others = sorted(range(len(states)), key=lambda i: -alone[i])
    kept, best = [first], alone[first]
    for i in others:
        now = score(average([states[j] for j in (*kept, i)]))
        if now >= best:
            kept, best = [*kept, i], now
    return kept


def check_alike(sources: Sequence[Source], data: dict[str, Any]) -> None:
    """Raises UsageError unless all sources have the same model, classes, loss, precision and pixels and, where they
    were trained on the set that they are evaluated on, the same cut of it: with another cut, some would have been
    trained on the images that choose and score."""
    own = [source for source in sources if same_set(data, source.card["data"])]
    for other in sources[1:]:
        _check_pair(sources[0], other, ("mean", "std"))
    for other in own[1:]:
        _check_pair(own[0], other, CUT_KEYS)


def _sets(source: Source) -> dict[str, dict[str, Any]]:
    """The sets of a checkpoint's mix, by name, with their own pixels and cuts."""
    sets: dict[str, dict[str, Any]] = source.card["data"].get("sets") or {}
    return sets


def _check_pair(first: Source, other: Source, keys: Sequence[str]) -> None:
    said = [
        {key: s.card[key] for key in COMMON}
        | {f"data.{key}": s.card["data"].get(key) for key in keys}
        | {f"data.sets, {name}, {key}": own[key] for name, own in _sets(s).items() for key in keys if key in own}
        | {key: tuple(value.tolist() if key.endswith(".alive") else value.shape) for key, value in s.weights.items()}
        for s in (first, other)
    ]
    odd = [key for key in said[0] | said[1] if said[0].get(key) != said[1].get(key)]
    if odd:
        values = [f" ({s[odd[0]]})" if isinstance(s.get(odd[0]), int | float | tuple) else "" for s in said]
        raise UsageError(
            f"checkpoint={first.label}{values[0]} and {other.label}{values[1]} differ in {odd[0]}; only "
            "checkpoints of the same architecture, and of the same cut of the data evaluated, can be averaged"
        )
