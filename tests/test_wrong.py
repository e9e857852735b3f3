"""A command that cannot work ends with one sentence and the right status: no traceback, silence, hang, crash or lost
file."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests import synthetic
from tests.conftest import TINY
from tests.processes import Attempt, attempt
from tests.runs import saved
from tests.wrong import Case, everything, images

NEIGHBOURS = {
    ".git/HEAD": "ref", ".env": "KEY=1", ".bashrc": "alias", ".config/x": "x", ".kept": "x", "kept/file": "mine",
    ".predictions.csv": "x", "kept/index.html": "mine",
}  # fmt: skip
"""Files that no command may touch."""

CASES = everything({"model": {"router": {}, "backbone": {}}, "data": {}})
GROUPS = [pytest.param(name, marks=[pytest.mark.thorough] if "thorough" in name else []) for name in CASES]


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The good files, by the words that stand for them in a case's line."""
    folder = tmp_path_factory.mktemp("fine")
    images(folder / "images")
    synthetic.study(folder / "runs")
    return {
        "FINE": str(saved(folder / "fine.safetensors", 0)),
        "DENSE": str(saved(folder / "dense.safetensors", 0, "model=vit_nano2_dense", tiny=TINY[:5])),
        "IMAGES": str(folder / "images"),
        "RUNS": str(folder / "runs"),
    }


def snapshot(folder: Path) -> dict[str, str]:
    """Every regular file below a folder, by its contents."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def faults(case: Case, answer: Attempt, before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What is wrong with how a command ended."""
    found = []
    said = answer.out + answer.err
    if answer.code is None:
        return ["it hangs"]
    if answer.code not in case.status:
        found.append(f"status {answer.code}, not {' or '.join(map(str, case.status))}")
    if "Traceback" in said or "Exception ignored" in said:
        found.append("a traceback")
    if odd := re.findall(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]|[\u202a-\u202e\u2066-\u2069]", said):
        found.append(f"control characters {odd[:3]}")
    if answer.code in (1, 2, 130):
        last = answer.err.strip().splitlines()[-1:] or [""]
        if answer.code == 2 and not last[0].startswith("softmoe: "):
            found.append("no sentence")
        if not said.strip():
            found.append("silence")
        if len(last[0]) > 1000:
            found.append(f"a sentence of {len(last[0])} letters")
    lost = [name for name, content in before.items() if after.get(name) != content]
    if lost:
        found.append(f"lost: {lost[:3]}")
    others = ("/multirun.yaml", ".pyc")  # Hydra's record of a sweep's command; Python's of a file of one's own
    new = sorted(name for name in after.keys() - before.keys() if not name.endswith(others))
    if answer.code == 2 and new:
        found.append(f"left behind: {new[:3]}")
    return found


@pytest.mark.long
@pytest.mark.parametrize("group", GROUPS)
def test_what_cannot_work(group: str, fine: dict[str, str], tmp_path: Path) -> None:
    with safe_open(fine["FINE"], framework="pt") as file:
        card: dict[str, Any] = json.loads(file.metadata()["softmoe"])
    bad = {}
    os.environ["FINE_CHECKPOINT"] = fine["FINE"]
    for number, (name, case) in enumerate(everything(card)[group].items()):
        folder = tmp_path / str(number)
        for path, text in NEIGHBOURS.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        case.prepare(folder)
        before = snapshot(folder)
        line = [re.sub("FINE|DENSE|IMAGES|RUNS", lambda word: fine[word[0]], word) for word in case.line]
        answer = attempt(folder, line, tmp_path / f"{number}-said", timeout=60)
        if wrong := faults(case, answer, before, snapshot(folder)):
            end = (answer.err or answer.out).strip()[-600:]
            bad[name] = f"{'; '.join(wrong)}\n  {line}\n  {end!r}"
    assert not bad, f"{len(bad)} of {number + 1}:\n\n" + "\n\n".join(f"{name}: {text}" for name, text in bad.items())


def test_there_are_enough_of_them() -> None:
    """Also without the thorough ones."""
    short = {name: cases for name, cases in CASES.items() if "thorough" not in name}
    assert sum(map(len, short.values())) >= 300
    assert {name.split()[0] for name in short} == {name.split()[0] for name in CASES}
