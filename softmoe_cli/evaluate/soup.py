"""Averages of the weights of several checkpoints of one architecture: model soups (Wortsman et al., 2022),
https://arxiv.org/abs/2203.05482"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Weights = dict[str, Tensor]


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
