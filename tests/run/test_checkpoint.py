"""A checkpoint to go on from may be any file: what softmoe did not write is one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from softmoe_cli.errors import UsageError
from softmoe_cli.run.card import CARD_FORMAT
from softmoe_cli.run.checkpoint import Checkpoint, write_checkpoint
from softmoe_cli.train.resume import _progress

STATE: dict[str, Any] = {
    "format": CARD_FORMAT,
    "step": 4,
    "best_step": 2,
    "sizes": {"metrics.jsonl": 0},
    "seconds": {"device": 0.5},
    "scaler": {},
}


STATES: dict[str, Any] = {
    "null": "null", "no JSON": "{", "brackets": "[" * 200_000, "a list": "[]",
    **{f"without {key}": json.dumps({k: v for k, v in STATE.items() if k != key}) for key in STATE},
    **{f"{key} as text": json.dumps(STATE | {key: "x"}) for key in STATE},
    "before the beginning": json.dumps(STATE | {"step": -1}),
    "a size below 0": json.dumps(STATE | {"sizes": {"x": -1}}),
    "of another format": json.dumps(STATE | {"format": CARD_FORMAT + 1}),
}  # fmt: skip


RANDOM = {"random.cpu": torch.get_rng_state()}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_softmoe_did_not_write_is_one_sentence(kind: str, tmp_path: Path) -> None:
    """Its checksums may be right."""
    write_checkpoint(tmp_path / "last-00000004", {"x": torch.ones(1)}, {}, RANDOM, {"state.json": STATES[kind]})
    with pytest.raises(UsageError, match=r"last-00000004.*; remove it to go on from the checkpoint before"):
        Checkpoint.read(tmp_path / "last-00000004").check()


def test_a_state_that_lacks_progress_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"its state lacks .*; remove it to go on from the one before"):
        _progress(Checkpoint(tmp_path, {}, {}, STATE))


def test_tensors_that_softmoe_did_not_write_are_one_sentence(tmp_path: Path) -> None:
    texts = {"state.json": json.dumps(STATE)}
    write_checkpoint(tmp_path / "good", {"x": torch.ones(1)}, {}, RANDOM, texts)
    Checkpoint.read(tmp_path / "good").check()
    for name, tensors in {"none": {"y": torch.ones(1)}, "short": {"random.cpu": torch.zeros(3).byte()}}.items():
        write_checkpoint(tmp_path / name, {"x": torch.ones(1)}, {}, tensors, texts)
        with pytest.raises(UsageError, match="no random state"):
            Checkpoint.read(tmp_path / name).check()
    (tmp_path / "good" / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(UsageError, match="remove it to go on"):
        Checkpoint.read(tmp_path / "good")
