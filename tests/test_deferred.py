"""Packages whose __init__ waits until something of it is asked for, and is then what it always is."""

import ast
import importlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import timm

from softmoe_cli import deferred

INIT = """
from outer import log
log.ran.append("outer")
from outer.inner import number
from outer.log import told as told
__version__ = "1"
other = number + 1
"""
INNER = """
import outer
from outer.log import ran
ran.append("inner")
from .light import number as number
number_of = {"outer": outer.__name__}
if ran.broken:
    raise ValueError("broken")
"""
LOG = "class Ran(list):\n    broken = False\nran, told = Ran(), 'told'"


@pytest.fixture
def outer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A package with a submodule `log`, and in it a package `inner` with a submodule `light`; both are deferred."""
    (tmp_path / "outer/inner").mkdir(parents=True)
    texts = {
        "__init__": INIT, "log": LOG, "inner/__init__": INNER, "inner/light": "number = 3", "version": "__version__='1'"
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / "outer" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(deferred, "PACKAGES", {"outer": {"__version__": "version"}, "outer.inner": {}})
    deferred.defer_packages()
    deferred.defer_packages()
    yield importlib.import_module("outer")
    for name in [name for name in sys.modules if name.partition(".")[0] == "outer"]:
        del sys.modules[name]


def ran() -> list[str]:
    return list(importlib.import_module("outer.log").ran)


def test_submodules_are_there_without_their_packages(outer: ModuleType) -> None:
    from outer.inner.light import number  # type: ignore[import-not-found]

    assert number == 3 and ran() == []
    assert outer.__version__ == "1" and ran() == [], "a name that has a submodule of its own"
    assert not hasattr(outer, "__wrapped__") and ran() == [], "what is asked of every module"


def test_a_name_runs_the_package_after_those_around_it(outer: ModuleType) -> None:
    inner = importlib.import_module("outer.inner")
    assert inner.number == 3 and ran() == ["outer", "inner"]
    assert (outer.other, outer.told, inner.number_of) == (4, "told", {"outer": "outer"})
    assert type(outer) is type(inner) is ModuleType and ran() == ["outer", "inner"], "once"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = outer.nothing
    assert "other" in dir(outer)


def test_all_names_and_the_list_of_names(outer: ModuleType) -> None:
    scope: dict[str, object] = {}
    exec("from outer import *", scope)
    assert scope["other"] == 4 and {"other", "inner", "told"} <= set(dir(outer))


def test_what_breaks_breaks_again(outer: ModuleType) -> None:
    importlib.import_module("outer.log").ran.broken = True
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            _ = outer.other
    importlib.import_module("outer.log").ran.broken = False
    assert outer.other == 4


def test_threads_wait_for_the_whole(outer: ModuleType) -> None:
    seen: list[int] = []
    threads = [threading.Thread(target=lambda: seen.append(outer.other)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [4] * 8 and ran() == ["outer", "inner"]


REAL = """
import json, sys
from softmoe_cli.deferred import defer_packages

defer_packages()
import softmoe_cli.train.loop

before = [name in sys.modules for name in ("timm.models.resnet", "torchvision.ops.roi_align", "timm.utils.summary")]
import timm, torch
from timm.data import create_transform
from timm.models import *
from torchvision.ops import nms, roi_align

boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2], [4, 4, 6, 6]])
kept = nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist()
with torch.device("meta"):
    meta = list(roi_align(torch.empty(1, 3, 8, 8), torch.empty(2, 5), 4).shape)
made = sum(parameter.numel() for parameter in timm.create_model("resnet18").parameters())
print(json.dumps([before, kept, meta, made, timm.list_models(), timm.__version__, "resnet18" in globals()]))
"""


@pytest.mark.thorough
def test_timm_and_torchvision_are_whole_when_they_are_asked_for() -> None:
    ran = subprocess.run([sys.executable, "-W", "error", "-c", REAL], capture_output=True, text=True, check=True)
    before, kept, meta, made, models, version, star = json.loads(ran.stdout)
    assert before == [False] * 3 and star
    assert (kept, meta, made) == ([0, 2], [2, 3, 4, 4], 11_689_512)
    plain = "import json, timm; print(json.dumps(timm.list_models()))"  # not here, where tests may have added models
    whole = subprocess.run([sys.executable, "-c", plain], capture_output=True, text=True, check=True)
    assert (models, version) == (json.loads(whole.stdout), timm.__version__)


def test_no_file_asks_a_deferred_package_for_a_name() -> None:
    """At its top, where it would run the whole package; model/hub.py asks on purpose, as timm's own register does."""
    found = []
    for file in Path(deferred.__file__).parent.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "") in deferred.PACKAGES:
                known = deferred.PACKAGES[node.module or ""]
                found += [file.name for each in node.names if each.name not in known]
    assert set(found) == {"hub.py"}
