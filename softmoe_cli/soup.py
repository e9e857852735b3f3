"""Averages of the weights of several checkpoints of one architecture: model soups (Wortsman et al., 2022),
https://arxiv.org/abs/2203.05482"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from softmoe_cli.config import CUT, UsageError
from softmoe_cli.record import Source

Weights = dict[str, Tensor]
COMMON = ("model", "classes", "loss", "precision")


def check_alike(sources: Sequence[Source]) -> None:
    """Raises UsageError unless all are of one model for the same classes, loss, precision and pixels, and those of one
    data set of the same cut of it: of another, some would have been trained on the images that choose and score."""
    first = sources[0]
    for other in sources[1:]:
        keys = ["mean", "std", *(CUT if first.card["data"].get("name") == other.card["data"].get("name") else ())]
        said = [{**s.card, **{f"data.{key}": s.card["data"].get(key) for key in keys}} for s in (first, other)]
        odd = [key for key in said[0] if key in COMMON or key.startswith("data.") if said[0][key] != said[1][key]]
        shapes = [{key: value.shape for key, value in s.weights.items()} for s in (first, other)]
        odd += [key for key in shapes[0] | shapes[1] if shapes[0].get(key) != shapes[1].get(key)]
        if odd:
            raise UsageError(
                f"checkpoint={first.label} and {other.label} differ in {odd[0]}; only checkpoints of the same "
                "architecture, and of the same cut of a data set, can be averaged"
            )


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
