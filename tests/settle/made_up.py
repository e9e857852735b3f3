"""Finished runs without any training, and studies of them that are settled as the command would."""

from collections.abc import Callable, Mapping
from pathlib import Path

from softmoe_cli.compare.looks import PastLook, PastLooks
from softmoe_cli.compare.runs import FinishedRun
from softmoe_cli.settle.rounds import Contest, Standing, stand

NO_LOOKS = PastLooks([], [])


def finished(arm: str, seed: int, **row: float) -> FinishedRun:
    values = {"seed": seed, "signature": f"{arm}-{seed}", "data.split_seed": 0, **row}
    return FinishedRun(Path(f"{arm}-{seed}"), values, 0.0, [], "")


def contest(*arms: str, margin: float | None = None, quality: str = "top1_pct", first: int = 0) -> Contest:
    return Contest(arms, "dense", quality, margin, first)


Value = Callable[[str, int], float | None]
"""The quality of an arm with a seed; None where that run fails."""


class Study:
    """Runs that appear when they are asked for, as a launcher would make them."""

    def __init__(self, asked: Contest, value: Value, most: int) -> None:
        self.asked, self.value, self.most = asked, value, most
        self.runs: dict[str, dict[int, FinishedRun]] = {arm: {} for arm in (asked.baseline, *asked.arms)}
        self.failed: set[tuple[str, int]] = set()
        self.looks = PastLooks([], [])

    def stand(self) -> Standing:
        return stand(self.asked, self.runs, self.looks, self.most, self.failed)

    def run(self, arm: str, seed: int) -> None:
        value = self.value(arm, seed)
        if value is None:
            self.failed.add((arm, seed))
        else:
            self.runs[arm][seed] = finished(arm, seed, **{self.asked.quality: value})

    def look(self) -> None:
        """Records what there is, as a look does."""
        shown = frozenset(run.row["signature"] for of_arm in self.runs.values() for run in of_arm.values())
        self.looks = PastLooks([*self.looks.seen, PastLook(len(self.looks.seen), "top1_pct", None, shown)], [])

    def settle(self) -> Standing:
        while (standing := self.stand()).wanted:
            for each in standing.wanted:
                self.run(*each)
        return standing


def words(standing: Standing) -> Mapping[str, str]:
    return {arm: told.word for arm, told in standing.told.items()}
