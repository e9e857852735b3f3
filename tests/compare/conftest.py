"""Comparisons that several tests look at."""

from pathlib import Path
from typing import Any

import pytest

from softmoe_cli.compare.blocks import compare
from softmoe_cli.compare.groups import Comparison
from softmoe_cli.compare.question import Question
from tests.synthetic import row, study, write

NASTY = "</script><b>&\"'|`*_x_* ~^#$%{}\\ é [l](u) $\\alpha$"


@pytest.fixture
def compared(tmp_path: Path) -> Comparison:
    return compare([study(tmp_path / "made_up")], Question())


@pytest.fixture
def nasty(tmp_path: Path) -> Comparison:
    """Words that every format takes for its own, in every place that files can put words into."""
    for seed in range(3):
        for kind in ("", NASTY):
            write(
                tmp_path / "runs", row(seed=seed, top1_pct=90 + seed, study=NASTY, model__backbone__name=f"net{kind}")
            )
    (tmp_path / "runs" / "<i>empty").mkdir()
    return compare([tmp_path / "runs"], Question(columns=("study",)))


@pytest.fixture
def odd(tmp_path: Path) -> Comparison:
    """A group at chance, one finetuned from what is known, one from what is not; names that spreadsheets compute."""
    for seed in range(3):
        write(tmp_path / "odd", row(router="dense", seed=seed, top1_pct=40 + 7 * seed, data__num_classes=3))
        write(tmp_path / "odd", row(seed=seed, top1_pct=33.3, data__num_classes=3, train_pflop=1e-4))
        for name, cost in (("=SUM(A1)", 0.002), ("@x", None)):
            tuned: dict[str, Any] = {"command": "finetune", "checkpoint": name, "checkpoint__origin": name}
            tuned |= {"checkpoint__train_pflop": cost, "data__num_classes": 3, "top1_pct": 70 + seed}
            write(tmp_path / "odd", row(seed=seed, model__backbone__name=name, **tuned))
    return compare([tmp_path / "odd"], Question())
