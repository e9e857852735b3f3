"""`softmoe compare` of 200 runs in 40 groups: this checkout beside another one and `import torch`, in turns.

python experiments/startup/compare.py OTHER [--starts 5]

OTHER is a second checkout of softmoe, as `git worktree add OTHER COMMIT` makes one. Prints for each, and each time, the
seconds until it ends and the processor seconds that it takes (user and system, all its processes). A first start of
each, in which files are read from the disk and byte code is written, is not counted.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
MAKE = """
import sys
from pathlib import Path
from tests.synthetic import row, write
for seed in range(5):
    write(Path(sys.argv[1]), row(router="dense", seed=seed, top1_pct=90 + seed / 7))
for router, most in (("soft", 20), ("tokens_choice", 19)):
    for experts in range(1, most + 1):
        for seed in range(5):
            top1_pct = 90 + experts / 10 + seed / 7 + (router == "soft") + ((seed * 7 + experts * 3) % 5) / 11
            chosen = row(router=router, seed=seed, model__router__num_experts=experts, top1_pct=top1_pct)
            write(Path(sys.argv[1]), chosen)
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("other", type=Path)
    parser.add_argument("--starts", type=int, default=5)
    typed = parser.parse_args()
    compare = ["-m", "softmoe_cli", "compare"]
    with tempfile.TemporaryDirectory() as root:
        sides = {"now": HERE, "then": typed.other.resolve()}
        lines = {"import torch": (HERE, ["-c", "import torch"])}
        for side, checkout in sides.items():
            took(HERE, ["-c", MAKE, f"{root}/{side}"])
            lines[side] = checkout, [*compare, f"{root}/{side}"]
        for number in range(typed.starts + 1):
            for side, (checkout, words) in lines.items():
                wall, processor = took(checkout, words)
                if number:
                    print(f"{number} {side:<12} {wall:6.2f} s, processor {processor:6.2f} s", flush=True)


def took(checkout: Path, words: list[str]) -> tuple[float, float]:
    """Seconds of one start, by the clock and of processors."""

    def processor() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    began, before = time.perf_counter(), processor()
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    subprocess.run([sys.executable, *words], cwd=checkout, env=environment, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began, processor() - before


main()
