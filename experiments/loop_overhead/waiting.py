"""How long an update of two threads takes beside another program, by how long threads look before they sleep.

python experiments/loop_overhead/waiting.py [turns=2] [updates=25] [OVERRIDES...]

GNU's OpenMP reads that when a process starts, so each way has a process of its own; the ways take turns, first with the
machine to themselves, then beside a program that holds one core. Prints the median of the updates, on the wall; a way
that is not at its end after LIMIT_S seconds is stopped.
"""

import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack

LIMIT_S = 60
WAYS: dict[str, tuple[int, dict[str, str]]] = {
    "one thread": (1, {}),
    "two, by default": (2, {}),
    "two, 10,000 looks": (2, {"GOMP_SPINCOUNT": "10000"}),
    "two, 1,000 looks": (2, {"GOMP_SPINCOUNT": "1000"}),
    "two, asleep at once": (2, {"OMP_WAIT_POLICY": "passive"}),
}
NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


def child(threads: int, updates: int, words: list[str]) -> None:
    import torch
    from steps import RATE, batch_of, step_of

    from softmoe_cli.options.compose import compose
    from softmoe_cli.train.loop import update

    torch.set_num_threads(threads)
    config, took = compose("tracking=off", *words), list[float]()
    with ExitStack() as hooks:
        step, batch = step_of(config, hooks), batch_of(config)
        for turn in range(-3, updates):  # the first three warm up
            start = time.perf_counter()
            update(step, batch, RATE)
            if turn >= 0:
                took.append(time.perf_counter() - start)
    print(1e3 * statistics.median(took))


def timed(threads: int, beside: dict[str, str], updates: int, words: list[str]) -> str:
    mine = {name: value for name, value in os.environ.items() if name not in NAMES}
    command = [sys.executable, __file__, "child", str(threads), str(updates), *words]
    try:
        ran = subprocess.run(
            command, env=mine | beside, capture_output=True, text=True, timeout=LIMIT_S, check=True
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"stopped after {LIMIT_S} s"
    return f"{float(ran.stdout):.0f} ms"


def main() -> None:
    given = dict(word.split("=") for word in sys.argv[1:] if word.startswith(("turns=", "updates=")))
    words = [word for word in sys.argv[1:] if not word.startswith(("turns=", "updates="))]
    turns, updates = int(given.get("turns", 2)), int(given.get("updates", 25))
    hold = "import os; os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})\nwhile True: pass"
    for busy in (False, True):
        other = subprocess.Popen([sys.executable, "-c", hold], start_new_session=True) if busy else None
        found: dict[str, list[str]] = {name: [] for name in WAYS}
        try:
            for _ in range(turns):
                for name, (threads, beside) in WAYS.items():
                    found[name].append(timed(threads, beside, updates, words))
        finally:
            if other is not None:
                other.kill()
        print("a program holds one core" if busy else "nothing else runs")
        for name, each in found.items():
            print(f"  {name}: {', '.join(each)}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    else:
        main()
