"""Processor seconds before a command speaks: this checkout beside another one, start by start in turns.

python experiments/startup/bench.py OTHER [--starts 7] [--csv FILE] [--only NAME ...]

OTHER is a second checkout of softmoe, as `git worktree add OTHER COMMIT` makes one. Every start is a new process of
this Python in which the checkout's package is found first. What it prints goes through a stream that notes, at the end
of each line, the processor time that the process has taken until then (user and system, children included). A start
ends when what is asked for has been said. A first start of each, in which files are read from the disk and byte code is
written, is not counted.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
SMALL = (
    "train", "tracking=off", "model.backbone.width=16", "model.backbone.depth=2", "model.backbone.heads=2",
    "model.backbone.mlp_width=32", "model.router.num_experts=4", "model.moe_blocks=last_1", "train.steps=1",
)  # fmt: skip
COMMANDS: dict[str, tuple[str, ...]] = {
    "header": ("train", "tracking=off"),
    "finished": SMALL,
    "finished finetuning": ("finetune", "checkpoint=RUN", "tracking=off", "train.steps=1", "study=second"),
    "finished pruning": ("prune", "checkpoint=RUN", "data=digits", "keep=2", "by=random"),
    "finished export": ("export", "checkpoint=RUN", "images=8"),
    "no checkpoint to export": ("export", "checkpoint=nowhere"),
    "no model to match": ("match", "model=vit_nano2_soft", "to=nothing"),
    "no such data.root": ("train", "data=folder", "data.root=nowhere"),
    "no such checkpoint": ("finetune", "checkpoint=nowhere", "data=digits"),
    "cost": ("cost", "model=vit_nano2_soft"),
    "data check": ("data", "check"),
}
"""What is typed; RUN stands for the folder of a finished run."""
LAST = "  time "
"""The beginning of a header's last line, which ends a start; without such a line the command's own end does."""

CHILD = """
import io, os, resource, sys
words, last, told, moments = sys.argv[2:], sys.argv[1], int(os.environ["TOLD"]), []

def note():
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    moments.append(sum(used.ru_utime + used.ru_stime for used in both))

def tell():
    note()
    os.write(told, b"%.4f %.4f" % (moments[0], moments[-1]))
    os._exit(0)

class Heard(io.TextIOWrapper):
    line = ""
    def write(self, text):
        for piece in text.splitlines(keepends=True):
            self.line += piece
            if piece.endswith("\\n"):
                if not moments:
                    note()
                if self.line.startswith(last):
                    tell()
                self.line = ""
        return super().write(text)

sys.stdout = Heard(sys.stdout.detach(), encoding="utf-8", line_buffering=True)
sys.argv = ["softmoe", *words]
from softmoe_cli.cli import main
try:
    main()
except SystemExit:
    tell()
"""
"""In the child: the first word is LAST; TOLD is where the seconds go, those of the first line and those of the end."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("other", type=Path)
    parser.add_argument("--starts", type=int, default=7)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    typed = parser.parse_args()
    sides = {"now": HERE, "then": typed.other.resolve()}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        folders = {side: Path(root) / side for side in sides}
        for side, folder in folders.items():
            folder.mkdir()
            start(sides[side], folder, SMALL, "never said")  # the run that `finished` finds
            for command in typed.only:
                if command.startswith("finished "):
                    start(sides[side], folder, COMMANDS[command], "never said")
        for number in range(typed.starts + 1):
            for command in typed.only:
                words = COMMANDS[command]
                took = {side: start(sides[side], folders[side], words) for side in sides}
                moments = {"first line": 0, "header": 1} if command == "header" else {command: 1}
                for what, place in moments.items():
                    if number:
                        seconds = {f"{side}_cpu_s": took[side][place] for side in sides}
                        rows.append({"what": what, "start": number, **seconds})
    for what in dict.fromkeys(row["what"] for row in rows):
        mine, theirs = ([row[f"{side}_cpu_s"] for row in rows if row["what"] == what] for side in sides)
        ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
        print(f"{what:<23} {statistics.median(mine):6.2f} {statistics.median(theirs):6.2f} {ratio:6.2f}")
    if typed.csv is not None:
        with typed.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], "hardware", "torch"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(row | {"hardware": hardware(), "torch": version("torch")} for row in rows)


def start(checkout: Path, folder: Path, words: Sequence[str], last: str = LAST) -> tuple[float, float]:
    """Processor seconds of one start until its first line, and until its end."""
    reader, writer = os.pipe()
    environment = os.environ | {"PYTHONPATH": str(checkout), "TOLD": str(writer)}
    run = next((str(run) for run in sorted(folder.glob("outputs/default/*"))), "")
    line = [sys.executable, "-c", CHILD, last, *(word.replace("RUN", run) for word in words)]
    with (folder / "said.txt").open("a") as said:
        subprocess.run(line, cwd=folder, env=environment, stdout=said, stderr=said, pass_fds=[writer], check=False)
    os.close(writer)
    with os.fdopen(reader) as told:
        first, end = told.read().split()
    return float(first), float(end)


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


main()
