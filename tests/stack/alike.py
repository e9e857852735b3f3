"""Runs of a stack beside the runs alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.runs import CLOCKS, last

OF_ROWS, OF_WEIGHTS = 5e-6, 1e-4
"""What rounding in float32 may change in 50 updates: shares of a number in a row, and of the largest of a tensor's."""


def rows(folder: Path, file: str) -> list[dict[str, Any]]:
    path = folder / file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def close(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    return bool(one == pytest.approx(other, rel=OF_ROWS, abs=1e-6)) if isinstance(one, float) else bool(one == other)


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
        mine, yours = (load_file(last(run) / file) for run in (one, other))
        assert mine.keys() == yours.keys()
        for name, tensor in mine.items():
            if name.startswith("random."):
                assert torch.equal(tensor, yours[name]), name
            else:
                apart = (tensor.double() - yours[name].double()).abs().max()
                assert apart <= OF_WEIGHTS * yours[name].double().abs().max().clamp(min=1e-3), name
