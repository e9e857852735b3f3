"""A checkpoint is a folder with SHA256SUMS: what its files hold, written, checked and read. How its files are found and
sealed is in run/sealed.py, when a run writes one in run/saving.py."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from softmoe_cli.errors import UsageError
from softmoe_cli.run.card import card_text, other_format
from softmoe_cli.run.sealed import STATE, TRAINING, WEIGHTS, seal


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint as read back: weights by state-dict key, training tensors, and plain numbers."""

    path: Path
    weights: dict[str, Tensor]
    training: dict[str, Tensor]
    state: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Reads the checkpoint that `Checkpoints.newest` has found.

        Raises:
            UsageError: its checksums are right, but softmoe did not write it.
        """
        try:
            state = json.loads((path / STATE).read_text())
            return cls(path, load_file(path / WEIGHTS), load_file(path / TRAINING), state)
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise UsageError(
                f"{path} cannot be read ({error}); remove it to go on from the checkpoint before"
            ) from error

    def check(self) -> None:
        """Checks that its numbers and random state are such as training writes, before anything is taken from it.

        Raises:
            UsageError: its checksums are right, but softmoe did not write it.
        """
        fault = _state_fault(self.state) or _random_fault(self.training)
        if fault is not None:
            raise UsageError(f"{self.path}: {fault}; remove it to go on from the checkpoint before")


def _state_fault(state: Any) -> str | None:
    """Why the plain numbers of a checkpoint are not ours; None if they are."""
    if not isinstance(state, dict):
        return f"{STATE} holds no numbers by name"
    if (fault := other_format(state)) is not None:
        return f"{STATE} {fault}"
    for key in ("step", "best_step"):
        if type(state.get(key)) is not int or not 0 <= state[key] < 2**63:
            return f"{STATE} has no number {key}"
    for key, kinds in {"sizes": (int,), "seconds": (int, float)}.items():
        numbers = state.get(key)
        if not isinstance(numbers, dict) or not all(type(n) in kinds and n >= 0 for n in numbers.values()):
            return f"{STATE} has no numbers {key}"
    if "device" not in state["seconds"]:
        return f"{STATE} has no numbers seconds"
    return None if isinstance(state.get("scaler"), dict) else f"{STATE} has no scaler"


def _random_fault(training: dict[str, Tensor]) -> str | None:
    own, there = torch.get_rng_state(), training.get("random.cpu")
    if there is None or there.shape != own.shape or there.dtype != own.dtype:
        return f"{TRAINING} has no random state of this torch"
    return None


def write_checkpoint(
    folder: Path, weights: dict[str, Tensor], card: dict[str, Any], training: dict[str, Tensor], texts: dict[str, str]
) -> None:
    """Makes the folder of a checkpoint: weights with their card, training tensors if any, other files by name, and the
    checksums of them all; on disk when this returns. The same contents give the same bytes: safetensors writes a
    header's entries in any order, so the header has only one."""
    folder.mkdir(parents=True)
    save_file(weights, folder / WEIGHTS, metadata={"softmoe": card_text(card)})
    if training:
        save_file(training, folder / TRAINING)
    for name, text in texts.items():
        (folder / name).write_text(text)
    seal(folder)


def digest_of(weights: dict[str, Tensor]) -> str:
    """SHA-256 of names and values, whatever file they stand in."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        value = weights[key].detach().cpu().contiguous()
        digest.update(key.encode() + value.reshape(-1).view(torch.uint8).numpy().tobytes())  # NumPy has no bfloat16
    return digest.hexdigest()


def random_state() -> dict[str, Tensor]:
    """torch's random states, on the CPU and on the CUDA or MPS device: dropout, stochastic depth and router noise draw
    from them. Order and augmentation are functions of seed and step and need no state."""
    states = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda.0"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        states["random.mps"] = torch.mps.get_rng_state()
    return states


def set_random_state(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["random.cpu"])
    if torch.cuda.is_available() and "random.cuda.0" in states:
        torch.cuda.set_rng_state(states["random.cuda.0"])
    if torch.backends.mps.is_available() and "random.mps" in states:
        torch.mps.set_rng_state(states["random.mps"])
