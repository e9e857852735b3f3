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
from softmoe_cli.stack.turns import at_once, clock, going_on, in_turns, member, prepared_s

NOW = [0.0]
"""What the clock shows."""


THREADS: list[int] = []
"""With how many passes were made."""


class Waits:
    """A stack whose pass takes 4 seconds to be written down, and then 2 each time."""

    def __init__(self, handed: list[Any]) -> None:
        NOW[0] += 4
        self.n = len(handed)

    def holds(self, handed: list[Any]) -> bool:
        return len(handed) == self.n

    def passed(self, handed: list[Any]) -> list[Any]:
        NOW[0] += 2
        THREADS.append(torch.get_num_threads())
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


def test_writing_a_pass_down_is_told_apart_and_done_again_for_those_that_go_on() -> None:
    told: dict[int, list[tuple[float, float, int]]] = {0: [], 1: [], 2: []}

    def work(seed: int) -> None:
        for _ in range(3 if seed else 1):
            start = clock()
            hand_in(seed)
            told[seed].append((clock() - start, prepared_s(), going_on()))

    run(*(lambda seed=seed: work(seed) for seed in range(3)))
    pass_of_all, of_two = pytest.approx((2 / 3, 4 / 3)), (1.0, 2.0)
    assert {seed: [each[:2] for each in of_one] for seed, of_one in told.items()} == {
        0: [pass_of_all], 1: [pass_of_all, of_two, (1.0, 0.0)], 2: [pass_of_all, of_two, (1.0, 0.0)]
    }  # fmt: skip
    assert [[each[2] for each in told[seed]] for seed in range(3)] == [[3], [2, 2, 2], [2, 2, 1]]
    assert prepared_s() == 0 and going_on() == 1


def test_passes_are_made_with_the_threads_of_the_runs() -> None:
    """Each thread of a process has its own number of them, and the main one's was fixed before runs were there."""
    before = torch.get_num_threads()
    THREADS.clear()

    def work(seed: int) -> None:
        torch.set_num_threads(before + 1)
        hand_in(seed)

    try:
        run(lambda: work(0), lambda: work(1))
        assert [before + 1] == THREADS
    finally:
        torch.set_num_threads(before)


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
