"""Several seeds as one stack: each run is the run alone, whatever its router draws, keeps or balances."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from softmoe_cli import cli
from softmoe_cli.stack.turns import in_turns
from tests.conftest import TINY, thinned
from tests.runs import CLOCKS

COMMON = (*TINY, "threads=1", "train.steps=50", "train.batch_size=8", "train.log_every=1", "train.eval_every=25")
ROUNDING = 2e-4
"""As a share of what is compared; of weights after 50 updates, of their tensor's largest."""


def together(arguments: Sequence[str], seeds: Sequence[int]) -> list[tuple[int, str]]:
    """Runs seeds as one stack; returns the exit status and the reason of each."""
    told: list[tuple[int, str]] = []
    works = [lambda seed=seed: told.append(cli.run(["train", *arguments, f"seed={seed}"])) for seed in seeds]
    outs = [io.StringIO() for _ in seeds]
    in_turns(works, outs)
    return told


def rows(folder: Path, file: str) -> list[dict[str, Any]]:
    path = folder / file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def close(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    return bool(one == pytest.approx(other, rel=ROUNDING, abs=1e-6)) if isinstance(one, float) else bool(one == other)


def require_alike(one: Path, other: Path) -> None:
    """Every number that a run has written down but clocks, and all tensors of its last checkpoint."""
    for file in ("metrics.jsonl", "routing.jsonl"):
        ours, theirs = rows(one, file), rows(other, file)
        assert len(ours) == len(theirs)
        for mine, yours in zip(ours, theirs, strict=True):
            assert mine.keys() == yours.keys()
            for key in mine.keys() - CLOCKS:
                assert close(mine[key], yours[key]), (file, mine["step"], key, mine[key], yours[key])
    for file in ("model.safetensors", "training.safetensors"):
        mine, yours = (load_file(sorted(run.glob("checkpoints/last-*"))[-1] / file) for run in (one, other))
        assert mine.keys() == yours.keys()
        for name, tensor in mine.items():
            if name.startswith("random."):
                assert torch.equal(tensor, yours[name]), name
            else:
                apart = (tensor.double() - yours[name].double()).abs().max()
                assert apart <= ROUNDING * yours[name].double().abs().max().clamp(min=1e-3), name


def require_as_alone(folder: Path, arguments: Sequence[str], seeds: Sequence[int] = (0, 1)) -> None:
    ours, alone = ((*arguments, f"output_root={folder / name}", "study=x") for name in ("stack", "alone"))
    assert together(ours, seeds) == [(0, "")] * len(seeds)
    for seed in seeds:
        assert cli.run(["train", *alone, f"seed={seed}"]) == (0, "")
    runs = sorted((folder / "alone/x").iterdir())
    assert len(runs) == len(seeds)
    for run in runs:
        require_alike(folder / "stack/x" / run.name, run)


ROUTERS = {
    "dense": (),
    "soft": ("model.router.noise_std=1",),
    "tokens_choice": ("model.router.load_weight=0", "model.router.bias_rate=0.01", "model.backbone.drop_path=0.3"),
    "tokens_choice_bpr": ("train.accumulate=2",),
    "experts_choice": ("train.ema=0.9",),
    "zero_computation": (),
    "image_choice": (),
    "soft_uniform": ("optim.name=sgd", "optim.momentum=0.9"),
    "uniform_soft": ("model.expert_init=independent",),
    "uniform": ("model.expert_init=independent",),
    "tokens_choice_dropless": (),
    "identity": (),
}


@pytest.mark.parametrize("router", thinned(ROUTERS, 1))
def test_each_run_is_the_run_alone(router: str, tmp_path: Path) -> None:
    """Rows of losses, norms, validation and routing, weights, moments and random state over 50 updates."""
    tiny = [word for word in COMMON if router not in ("dense", "identity") or not word.startswith("model.router")]
    require_as_alone(tmp_path, [*tiny, f"model/router={router}", *ROUTERS[router]])
