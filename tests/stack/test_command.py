"""Stacks as they are typed: through real processes, whose runs are those of each seed alone."""

import json
from pathlib import Path

import pytest

from tests.conftest import TINY, Softmoe
from tests.launch.sweeps import runs
from tests.stack.alike import require_alike

OWN = """
import torch
from softmoe_cli.errors import RunError
from softmoe_cli.moe.routers.soft import SoftRouter

class Failing(SoftRouter):
    def forward(self, x, keep=None):
        if not self.training and torch.initial_seed() == 1:
            raise RunError("no more of seed 1")
        return super().forward(x, keep)
"""


@pytest.mark.parametrize("at_once", [2, pytest.param(3, marks=pytest.mark.thorough)])
def test_a_seed_that_fails_and_those_that_go_on(at_once: int, softmoe: Softmoe, tmp_path: Path) -> None:
    """Three seeds in stacks of so many; the second one fails after four updates. Each has its own log and reason, and
    the others are the runs alone. A precision that is float32 here may be left to softmoe."""
    (tmp_path / "own.py").write_text(OWN)
    line = (*TINY, "model.backbone.depth=1", "model.router.noise_std=1", "model.router._target_=own.Failing",
            "threads=1", "train.batch_size=8", "train.steps=8", "train.log_every=1", "train.eval_every=0.5",
            "train.precision=auto")  # fmt: skip
    answer = softmoe("train", "-m", *line, "seed=0,1,2", f"seeds_at_once={at_once}", "study=default")
    assert answer.code == 1 and "1 failed, 2 done" in answer.out, answer
    assert "softmoe: 1 job failed; " in answer.err and "seed=1: no more of seed 1 (" in answer.err
    found, logs = runs(tmp_path), sorted(tmp_path.glob("outputs/*/sweep-*/*.log"))
    for seed, log in enumerate(logs):
        said, together = log.read_text(), min(at_once, 3 - at_once * (seed // at_once))
        assert [other for other in range(3) if f"an update, seed {other}\n" in said] == [seed]
        assert (f"{together} seeds at once" in said) == (together > 1)
        assert said.count("validation  step       4") == (seed != 1) and "Traceback" not in said
        assert (said.splitlines()[-1] == "softmoe: no more of seed 1") == (seed == 1)
    notes = {file.stem: json.loads(file.read_text()) for file in logs[0].parent.glob("0*.json")}
    assert notes == {"01": {"reason": "no more of seed 1"}}
    for seed in (0, 2):
        run = found[f"seed={seed}"]
        assert softmoe("train", *line, f"seed={seed}", "output_root=alone").code == 0
        require_alike(run, tmp_path / "alone/default" / run.name)
    assert not (found["seed=1"] / "result.json").exists()
