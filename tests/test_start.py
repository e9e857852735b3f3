"""What a command has imported when it speaks: in real processes, line by line."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from softmoe_cli.process import SPINS
from tests.conftest import TINY, Softmoe
from tests.mixes import mix, write_clothes
from tests.runs import saved

ROOT = Path(__file__).resolve().parents[1]
CHILD = """
import gc, io, json, os, sys

said = []

def note(line):
    looks = sum(each["collections"] for each in gc.get_stats())
    said.append((line, sorted(sys.modules), looks))

class Heard(io.TextIOWrapper):
    line = ""

    def write(self, text):
        for piece in text.splitlines(keepends=True):
            self.line += piece
            if piece.endswith("\\n"):
                note(self.line.rstrip())
                self.line = ""
        return super().write(text)

for name in ("stdout", "stderr"):
    setattr(sys, name, Heard(getattr(sys, name).detach(), encoding="utf-8", line_buffering=True))
file, *sys.argv[1:] = sys.argv[1:]
from softmoe_cli.cli import main

try:
    main()
finally:
    note("")
    with open(file, "w") as told:
        json.dump(said, told)
"""
HEAVY = {"torch", "torchvision", "timm", "wandb", "sklearn", "matplotlib"}
"""Packages that take long to import."""
NEVER = {
    "wandb", "sklearn", "matplotlib", "torchvision.ops.roi_align", "torchvision.datasets.cifar", "timm.models.resnet",
    "timm.data.loader", "timm.utils.summary",
}  # fmt: skip
"""What no command imports for a model of ours on images of ours: trackers, drawing, detectors, other families."""
MODULES_OF_A_LINE, MODULES_OF_A_HEADER = 500, 2800
"""The most modules that are imported when a training command says what runs (438 with Python 3.11), and when its header
is complete (2,718 with torch 2.15): what nobody has named above shows here."""


def said(folder: Path, *words: str, code: int = 0) -> list[tuple[str, set[str]]]:
    """Each line that the command says, in both streams, with the names of all modules that are imported by then; at
    last those of its end, with an empty line."""
    return [(line, modules) for line, modules, _ in heard(folder, *words, code=code)]


def heard(folder: Path, *words: str, code: int = 0) -> list[tuple[str, set[str], int]]:
    """As `said`, with how often Python has looked for circles of garbage by then."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    file = folder / "said.json"
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(file), *words],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == code, ran.stderr
    return [(line, set(modules), looks) for line, modules, looks in json.loads(file.read_text())]


def packages(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


WRONG = {
    "a folder": ("train data=folder data.root=nowhere", "data.root=nowhere is not a folder"),
    "too few images": ("train data=folder data.root=few data.image_size=8", "leaves no image of class a"),
    "too few classes": ("train data=folder data.root=few data.image_size=8 data.num_classes=1", "a class needs 3"),
    "a checkpoint": ("finetune checkpoint=nowhere data=digits", "checkpoint=nowhere does not exist"),
    "too few images to finetune": (
        "finetune checkpoint=base.safetensors data=folder data.root=few data.channels=1",
        "leaves no image of class a",
    ),
    "no checkpoint": ("evaluate checkpoint=few", "checkpoint=few holds no checkpoint"),
    "a folder to check": ("data check data=folder data.root=nowhere", "data.root=nowhere is not a folder"),
    "a checkpoint to prune": ("prune checkpoint=nowhere keep=2", "checkpoint=nowhere does not exist"),
    "a checkpoint to extract from": ("extract checkpoint=nowhere task=a", "checkpoint=nowhere does not exist"),
    "a checkpoint to export": ("export checkpoint=nowhere", "checkpoint=nowhere does not exist"),
    "no checkpoint to export": ("export checkpoint=few", "checkpoint=few holds no checkpoint"),
    "a checkpoint to upcycle": (
        "upcycle checkpoint=nowhere model/router=soft model.moe_blocks=last_1",
        "checkpoint=nowhere does not exist",
    ),
    "a model to match": ("match model=vit_nano2_soft to=nothing", "to=nothing: no such choice"),
    "a key": ("train sede=1", "Did you mean 'seed'?"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_paths_and_files_is_said_without_torch(name: str, tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / "few" / label).mkdir(parents=True)
        (tmp_path / "few" / label / "1.png").write_bytes(b"not looked at")
    if "base.safetensors" in WRONG[name][0]:
        saved(tmp_path / "base.safetensors", 0)
    words, sentence = WRONG[name]
    *_, (last, _), (_, modules) = said(tmp_path, *words.split(), code=2)
    assert sentence in last
    assert "torch" not in packages(modules)


def test_a_finished_run_is_known_without_torch(softmoe: Softmoe, tmp_path: Path) -> None:
    words = ("train", *TINY, "train.steps=1")
    before = softmoe(*words).out.splitlines()
    lines = said(tmp_path, *words)
    first, modules = lines[0]
    assert first == before[0] and packages(modules).isdisjoint(HEAVY | {"numpy"})
    assert len(modules) <= MODULES_OF_A_LINE
    told = [line for line, _ in lines[:-1]]
    assert told[1].endswith("is finished; nothing to do")
    assert told[2:] == before[before.index("result") :]
    assert packages(lines[-1][1]).isdisjoint(HEAVY)


def test_a_finished_finetuning_is_known_without_torch(softmoe: Softmoe, tmp_path: Path) -> None:
    assert softmoe("train", *TINY, "train.steps=1", "study=first").code == 0
    (run,) = (tmp_path / "outputs/first").iterdir()
    words = ("finetune", f"checkpoint={run}", "tracking=off", "train.steps=1", "study=second")
    before = softmoe(*words)
    assert before.code == 0, before.err
    lines = said(tmp_path, *words)
    told, modules = [line for line, _ in lines], lines[0][1]
    first = next(line for line in before.out.splitlines() if line.startswith("vit_nano2"))
    assert told[0] == first and packages(modules).isdisjoint(HEAVY | {"numpy"})
    assert told[1].endswith("is finished; nothing to do")
    assert packages(lines[-1][1]).isdisjoint(HEAVY)


DENSE = ("model/router=dense", *(word for word in TINY if "num_experts" not in word))
UPCYCLE = "upcycle model/router=soft model.router.num_experts=4 model.moe_blocks=last_1"
SET_APART = "expert_redraw=0.5 model.expert_width=16 folder=made data=fashion_mnist data.root=clothes data.image_size=8"
BEFORE: dict[str, tuple[Sequence[str] | None, str]] = {
    "pruned": (None, "prune keep=2 by=random"),
    "exported": (None, "export images=8"),
    "upcycled with moments": (DENSE, UPCYCLE),
    "experts set apart": (DENSE, f"{UPCYCLE} {SET_APART} carry_optimizer=false"),
    "extracted": (mix(Path("clothes")), "extract task=digits"),
}
"""How a checkpoint is trained (None: it is not), and a command that makes another one of it."""
SLOWER = ("experts set apart", "extracted")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.thorough] * (name in SLOWER)) for name in BEFORE]
)
def test_what_was_made_before_is_known_without_torch(name: str, softmoe: Softmoe, tmp_path: Path) -> None:
    training, line = BEFORE[name]
    write_clothes(tmp_path / "clothes")
    if training is None:
        source = saved(tmp_path / "base.safetensors", 0)
    else:
        assert softmoe("train", *training, "train.steps=1", "study=first").code == 0
        (source,) = (tmp_path / "outputs/first").iterdir()
    words = (*line.split(), f"checkpoint={source}")
    before = softmoe(*words)
    assert before.code == 0, before.err
    *lines, (_, modules) = said(tmp_path, *words)
    told = [line for line, _ in lines]
    assert told[0].endswith("holds this already; nothing to do") and told[1:] == before.out.splitlines()
    assert packages(modules).isdisjoint(HEAVY)


def test_a_configuration_is_shown_without_torch(tmp_path: Path) -> None:
    *_, (_, modules) = said(tmp_path, "train", "--cfg", "job")
    assert packages(modules).isdisjoint(HEAVY | {"numpy"})


@pytest.mark.thorough
def test_what_a_run_has_imported_when_it_speaks(tmp_path: Path) -> None:
    lines = heard(tmp_path, "train", *TINY, "train.steps=1")
    assert packages(lines[0][1]).isdisjoint(HEAVY | {"numpy"})
    assert lines[1][0] == "train" and "torch" in lines[1][1]
    (memory,) = [looks for line, _, looks in lines if line.startswith("  memory ")]
    assert memory == lines[0][2], "what is imported is no garbage"
    (header,) = [modules for line, modules, _ in lines if line.startswith("  time ")]
    goodbye = lines[-1][1]
    assert header < goodbye and goodbye.isdisjoint(NEVER), goodbye & NEVER
    assert len(header) <= MODULES_OF_A_HEADER


@pytest.mark.thorough
@pytest.mark.parametrize(
    "words", ["cost model=vit_nano2_soft", "data check", "match model=vit_nano2_soft to=vit_nano2_dense"]
)
def test_what_other_commands_have_imported_in_the_end(words: str, tmp_path: Path) -> None:
    *_, (_, modules) = said(tmp_path, *words.split())
    assert modules.isdisjoint(NEVER), modules & NEVER


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings GNU's OpenMP on Linux alone")
@pytest.mark.parametrize(
    ("typed", "spins"), [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")]
)
def test_threads_that_wait_sleep_soon(typed: dict[str, str], spins: str) -> None:
    """torch's OpenMP says itself what it has read."""
    code = "from softmoe_cli.process import settle_in; settle_in(); import torch"
    mine = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = mine | {"PYTHONPATH": str(ROOT), "OMP_DISPLAY_ENV": "verbose"} | typed
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = '{spins}'" in ran.stderr
