"""Averages of weights: the mean, in any order; greedy ones never score below the best alone."""

import dataclasses
from typing import Any

import pytest
import torch

from softmoe_cli.errors import UsageError
from softmoe_cli.evaluate.soup import Weights, average, check_alike, greedy
from softmoe_cli.run.header import Source

CARD: dict[str, Any] = {
    "model": {"router": {"_target_": None}}, "classes": ["a"], "loss": "softmax", "precision": "fp32",
    "data": {"mean": [0.5], "std": [0.5]},
}  # fmt: skip


def states() -> list[Weights]:
    rng = torch.Generator().manual_seed(0)
    return [{"a": torch.randn(3, 2, generator=rng), "b": torch.randn(2, generator=rng)} for _ in range(3)]


def test_average_is_the_mean_of_every_number_in_any_order() -> None:
    three = states()
    for key, value in average(three).items():
        assert value.dtype == torch.float32
        for place in range(value.numel()):
            numbers = [state[key].flatten()[place].item() for state in three]
            assert value.flatten()[place].item() == pytest.approx(sum(numbers) / 3, rel=1e-6)
        assert torch.equal(value, average(three[::-1])[key])
    assert all(torch.equal(value, three[0][key]) for key, value in average([three[0]] * 4).items())


def test_greedy_keeps_what_does_not_lower_the_score() -> None:
    numbers = [{"w": torch.tensor([value])} for value in (1.0, 4.0, 3.0, -9.0)]

    def score(state: Weights) -> float:
        return -abs(state["w"].item() - 3.5)

    kept = greedy(numbers, score)
    assert kept == [1, 2]  # 4 and 3, equally good, average to the best there is; 1 and -9 would lower it
    assert score(average([numbers[i] for i in kept])) >= max(map(score, numbers))


def test_others_are_refused() -> None:
    one = Source("one", "", {"w": torch.zeros(2)}, CARD)
    check_alike([one, dataclasses.replace(one, label="two")], CARD["data"])
    for change, word in (
        ({"weights": {"w": torch.zeros(3)}}, "w"),
        ({"weights": {}}, "w"),
        ({"card": CARD | {"classes": ["b"]}}, "classes"),
        ({"card": CARD | {"data": {"mean": [0.1], "std": [0.5]}}}, "data.mean"),
    ):
        two = dataclasses.replace(one, label="two", **change)
        with pytest.raises(UsageError, match=rf"one.* and two.* differ in {word}; "):
            check_alike([one, two], CARD["data"])
    of_mix = [CARD | {"data": CARD["data"] | {"sets": {"site": {"mean": [mean], "std": [1.0]}}}} for mean in (0.1, 0.2)]
    three, four = (dataclasses.replace(one, label=name, card=card) for name, card in zip("34", of_mix, strict=True))
    with pytest.raises(UsageError, match=r"3 and 4 differ in data.sets, site, mean; "):
        check_alike([three, four], CARD["data"])
    seeded = dataclasses.replace(one, label="two", card=CARD | {"data": CARD["data"] | {"split_seed": 1}})
    with pytest.raises(UsageError, match=r"one and two \(1\) differ in data.split_seed"):
        check_alike([one, seeded], CARD["data"])
    check_alike([one, seeded], CARD["data"] | {"name": "other"})  # another set: its cut is no matter
    elsewhere = dataclasses.replace(one, card=CARD | {"data": CARD["data"] | {"name": "other"}})
    with pytest.raises(UsageError, match=r"one and two \(1\) differ in data.split_seed"):
        check_alike([elsewhere, one, seeded], CARD["data"])
