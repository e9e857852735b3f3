"""Runs and checkpoints that several tests make and read."""

import dataclasses
import json
import math
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from softmoe_cli.config.commands import CostConfig
from softmoe_cli.model.vit import build
from softmoe_cli.run.card import CARD_FORMAT
from tests import oracles
from tests.conftest import TINY
from tests.oracles import compose
from tests.processes import Started


def costed(model: str = "vit_nano4_soft", **changes: Any) -> CostConfig:
    config = compose(f"model={model}", "data=fashion_mnist")
    options: dict[str, Any] = {
        "batch_size": 8, "accumulate": 1, "recompute": False, "precision": "fp32", "compile": False, "clock": False,
        "repeats": 3, "format": "table", "device": "cpu", "threads": 1, "devices": 1, "parallel": "ddp",
    }  # fmt: skip
    return CostConfig(model=config.model, data=config.data, **(options | changes))


def saved(path: Path, seed: int, *overrides: str, tiny: Sequence[str] = TINY) -> Path:
    """A checkpoint file with random weights."""
    config = oracles.compose(*tiny, *overrides)
    torch.manual_seed(seed)
    weights = build(config.model, 10).state_dict()
    torch.nn.init.normal_(weights["head.weight"])
    card: dict[str, Any] = {
        "format": CARD_FORMAT,
        "model": dataclasses.asdict(config.model),
        "data": dataclasses.asdict(config.data),
        "loss": "softmax",
    }
    card |= {"precision": "fp32", "classes": [str(i) for i in range(10)]}
    save_file(weights, path, metadata={"softmoe": json.dumps(card)})
    return path


CLOCKS = {"device_s", "eval_s", "save_s", "compile_s", "load_s", "images_per_s", "energy_kj", "metrics_sha256"}
"""What differs each time: clocks, and the digest of rows that have them."""


def start(folder: Path, *arguments: str, **environment: str) -> Started:
    return Started(folder, ["train", *TINY, "threads=1", *arguments], environment)


def finish(process: Started, code: int = 0) -> str:
    left, out = process.wait()
    assert left == code, out
    return out


def kill_five_times(begin: Callable[[], Started], folder: Path) -> None:
    """SIGKILL to what `begin` starts or goes on with in a folder: at random moments, and every second time while a
    checkpoint is being written."""

    def written() -> set[Path]:
        return set(folder.glob("outputs/*/*/checkpoints/.last-*"))

    rng, saving = random.Random(0), 0
    for kill in range(5):
        left = written()  # of the kill before
        process, moment = begin(), math.inf
        while not process.ended:
            writing = bool(written() - left)  # one comes with the first step
            if writing and moment == math.inf:
                moment = time.monotonic() + rng.uniform(0, 0.4)
            if writing if kill % 2 else time.monotonic() > moment:
                saving += writing
                break
            time.sleep(0.001)
        assert not process.ended
        process.send(signal.SIGKILL)
        process.wait()
    assert saving >= 2, "too few kills met a checkpoint being written"


def the_run(folder: Path) -> Path:
    (run,) = (folder / "outputs" / "default").iterdir()
    return run


def rows(run: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / file).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in found]


def last(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("last-*"))[-1]


def same(a: Path, b: Path) -> None:
    """Every row, every weight and every optimizer moment, bit for bit; random states too."""
    assert rows(a) == rows(b)
    assert rows(a, "routing.jsonl") == rows(b, "routing.jsonl")
    for file in ("model.safetensors", "training.safetensors"):
        x, y = load_file(last(a) / file), load_file(last(b) / file)
        assert x.keys() == y.keys()
        assert [key for key in x if not torch.equal(x[key], y[key])] == []
    x, y = (json.loads((run / "result.json").read_text()) for run in (a, b))
    chance = CLOCKS | {"commit"}  # a commit may come while the tests run
    assert {k: v for k, v in x.items() if k not in chance} == {k: v for k, v in y.items() if k not in chance}
