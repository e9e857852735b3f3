"""A router is one file and one yaml: without them all commands and tests are as before, but for its own tests.

A test is a router's own where its function, or one of its cases, names it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.routers import ROOT, ROUTERS

COMMANDS = """
import importlib, pkgutil, sys
import softmoe_cli
from softmoe_cli.cli import run

assert softmoe_cli.__file__.startswith(sys.path[0])
for module in pkgutil.walk_packages(softmoe_cli.__path__, "softmoe_cli."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
short = ["data=digits", "threads=1", "tracking=off", "train.steps=2", "train.batch_size=8"]
for words in (
    ["list"],
    ["cost", "model=vit_nano2_soft"],
    ["train", "--help", "all"],
    ["train", "model=small", "model/router=tokens_choice", *short],
    ["check", "soft"],
):
    code, text = run(words)
    assert code == 0, (words, text)
code, text = run(["train", "model/router=GONE", *short])
assert code == 2 and "GONE" in text, text
"""
OWN = """
import inspect
from pathlib import Path

def pytest_collection_modifyitems(items):
    def stays(item):
        case = getattr(item, "callspec", None)
        named = inspect.getsource(item.function) + repr(case.params if case else "")
        room, others = item.path.parts[len(FOLDER.parts)], ("test_processor", "test_deletion")
        picked = room in ("moe", "model", "check") and item.path.stem not in others
        return picked and "GONE" not in named and "CLASS" not in named
    items[:] = filter(stays, items)

FOLDER = Path(__file__).parent / "tests"
"""


def without(router: str, folder: Path) -> None:
    """A copy of the repository without a router's files and without the models and experiments that name it."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("experiments/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    for own in ("softmoe_cli/moe/routers/{}.py", "conf/model/router/{}.yaml", "tests/moe/routers/test_{}.py"):
        (folder / own.format(router)).unlink()
    for yaml in [*folder.glob("conf/model/*.yaml"), *folder.glob("conf/experiment/**/*.yaml")]:
        if any(router in line.partition("#")[0] for line in yaml.read_text().splitlines()):
            yaml.unlink()


@pytest.mark.long
@pytest.mark.thorough
@pytest.mark.parametrize("router", ["image_choice", "experts_choice"])  # no other is built on them
def test_without_a_router_all_else_stands(router: str, tmp_path: Path) -> None:
    """Every module is imported, commands run with other routers, every test is collected, and those of the rooms
    that know routers best pass."""
    without(router, tmp_path)
    named = ROUTERS[router]["_target_"].rpartition(".")[2]
    (tmp_path / "commands.py").write_text(COMMANDS.replace("GONE", router))
    (tmp_path / "own_tests.py").write_text(OWN.replace("GONE", router).replace("CLASS", named))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for words in (["commands.py"], ["-m", "pytest", "-q", "-n", "0", "-p", "own_tests", "tests"]):
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
        assert str(ROOT / "softmoe_cli") not in done.stdout + done.stderr
