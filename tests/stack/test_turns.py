"""Runs in turns: what a process would have for itself, a turn has."""

import io
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from softmoe_cli.signals import heard, pass_on
from softmoe_cli.stack import turns
from softmoe_cli.stack.turns import at_once, clock, in_turns, member

NOW = [0.0]
"""What the clock shows."""


class Waits:
    """A stack whose pass takes 2 seconds."""

    def __init__(self, handed: list[Any]) -> None:
        self.n = len(handed)

    def holds(self, handed: list[Any]) -> bool:
        return len(handed) == self.n

    def passed(self, handed: list[Any]) -> list[Any]:
        NOW[0] += 2
        if any(each.breaks for each in handed):
            raise ValueError("the pass broke")
        return [each.seed for each in handed]


def run(*works: Callable[[], None]) -> list[str]:
    """Runs them in turns; what each has printed."""
    outs = [io.StringIO() for _ in works]
    before = torch.get_rng_state()
    in_turns(works, outs)
    torch.set_rng_state(before)
    return [out.getvalue() for out in outs]


def hand_in(seed: int, *, breaks: bool = False) -> Any:
    own = member()
    assert own is not None
    given: Any = SimpleNamespace(seed=seed, breaks=breaks)
    return own.passed(given)


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "Stack", Waits)
    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=lambda: NOW[0]))


def test_a_turn_has_its_own_output_numbers_and_time() -> None:
    """Seed 1 takes 3 seconds in a turn, which are none of seed 0's; of a pass each has its share. It ends later, and is
    then alone: nothing is computed for it."""
    drawn: dict[int, list[float]] = {0: [], 1: []}
    made: dict[int, list[Any]] = {0: [], 1: []}
    took: dict[int, float] = {}

    def work(seed: int) -> None:
        torch.manual_seed(seed)
        start = clock()
        for _ in range(2 + seed):
            assert at_once() == 2
            print("seed", seed)
            drawn[seed].append(torch.rand(()).item())
            NOW[0] += 3 * seed
            made[seed].append(hand_in(seed))
        took[seed] = clock() - start

    streams = sys.stdout, sys.stderr
    assert run(lambda: work(0), lambda: work(1)) == ["seed 0\n" * 2, "seed 1\n" * 3]
    assert (sys.stdout, sys.stderr) == streams and member() is None and at_once() == 1
    assert made == {0: [0, 0], 1: [1, 1, None]}
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        assert drawn[seed] == [torch.rand((), generator=generator).item() for _ in range(2 + seed)]
    assert took == {0: 2.0, 1: 11.0}


def test_every_run_says_why_a_pass_broke() -> None:
    reasons = []

    def work(seed: int) -> None:
        try:
            hand_in(seed, breaks=seed == 1)
        except ValueError as error:
            reasons.append((seed, str(error)))

    run(lambda: work(0), lambda: work(1), lambda: work(2))
    assert reasons == [(seed, "the pass broke") for seed in range(3)]


def test_a_signal_is_passed_on_to_the_innermost_listener_of_every_thread() -> None:
    told: list[str] = []

    def listen(name: str) -> None:
        with heard([], lambda _: told.append(f"{name} outer")), heard([], lambda _: told.append(f"{name} inner")):
            pass_on(15)
        pass_on(15)  # nobody listens any more

    for name in ("a", "b"):
        thread = threading.Thread(target=listen, args=(name,))
        thread.start()
        thread.join()
    assert told == ["a inner", "b inner"]
