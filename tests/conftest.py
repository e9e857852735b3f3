"""What every test shares: no network, one thread, a working folder of its own, and the command line in-process."""

import gc
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_CACHE"] = os.devnull  # nor from files that were fetched before
os.environ["WANDB_MODE"] = "offline"
for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "RANK", "WORLD_SIZE"):
    os.environ.pop(name, None)
torch.set_num_threads(1)  # tests are small: a second thread costs more than it brings


def pytest_collection_finish() -> None:
    """What all tests have imported is no longer searched for garbage."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs long tests first: so no worker is left alone with a long one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints which official numbers were compared and which were passed over, by the kind that
    tests/check/test_official.py notes."""
    kinds: dict[str, set[tuple[str, str]]] = {"compared": set(), "passed over, because nothing handles them": set()}
    compared, passed_over = kinds.values()
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            noted = dict(getattr(report, "user_properties", ()))
            if "kind" in noted and outcome in ("passed", "failed", "skipped"):
                (passed_over if outcome == "skipped" else compared).add((noted["case"], noted["kind"]))
    for what, cases in kinds.items():
        if cases:
            numbers = Counter(kind for _, kind in cases)
            told = ", ".join(f"{number} {kind}" for kind, number in sorted(numbers.items()))
            folder = os.environ.get("SOFTMOE_VECTORS", "softmoe_cli/check/vectors")
            terminalreporter.write_line(f"official cases of {folder} {what}: {told}")


@pytest.fixture(autouse=True)
def _nothing_goes_on() -> Iterator[None]:
    yield
    if "tests.processes" in sys.modules:
        sys.modules["tests.processes"].end_all()


def thinned(cases: Iterable[Any], keep: int) -> list[Any]:
    """Cases of a parametrized test: `keep` of them, spread evenly, are for make test, and all others for make long."""
    cases = list(cases)
    short = {len(cases) * i // keep for i in range(keep)}
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)), marks=[] if i in short else [pytest.mark.thorough]
        )
        for i, case in enumerate(cases)
    ]


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Softmoe = Callable[..., Answer]


@pytest.fixture
def softmoe(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Softmoe:
    """Runs a command line as `softmoe` would, in a fresh working folder; returns exit status and output."""
    from softmoe_cli import cli
    from tests.processes import share_server

    share_server(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["softmoe", *arguments])
        capfd.readouterr()
        root = logging.getLogger()
        handlers, level = root.handlers[:], root.level
        with pytest.raises(SystemExit) as left:
            cli.main()
        root.handlers, root.level = handlers, level  # Hydra's --info logs to this test's output and never stops
        out, err = capfd.readouterr()
        return Answer(int(left.value.code or 0), out, err)

    return run


TINY = (
    "tracking=off", "model.backbone.width=16", "model.backbone.depth=2", "model.backbone.heads=2",
    "model.backbone.mlp_width=32", "model.router.num_experts=4", "model.moe_blocks=last_1",
)  # fmt: skip
"""Overrides that make the default experiment take a second."""
