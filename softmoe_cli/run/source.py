"""Weights to start from, read from a run, a checkpoint or a file, with what is known of them."""

import hashlib
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.run import pieces
from softmoe_cli.run.card import read_card
from softmoe_cli.run.checkpoint import digest_of
from softmoe_cli.run.header import FIRST_WEIGHT, MOMENTS, Source
from softmoe_cli.run.sealed import (
    TRAINING,
    WEIGHTS,
    damage,
    piece_files,
    require_there,
    sha256,
    unreadable,
    weights_in,
)


def read_source(checkpoint: str) -> Source:
    """Reads `checkpoint=`: a run folder (its newest undamaged checkpoint), a checkpoint folder, or a file.

    Raises:
        UsageError: nothing there, nothing undamaged, or not a safetensors file. Pickles are never opened.
    """
    path, damaged = require_there(checkpoint), ""
    try:
        if path.is_dir():
            path, damaged = weights_in(path)
            if not path.exists():
                return replace(_joined_source(path), damaged=damaged)
        digest = sha256(path)
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        raise unreadable(checkpoint, error) from error
    try:
        with safe_open(path, framework="pt") as file:
            card = (file.metadata() or {}).get("softmoe")
            weights = {key: file.get_tensor(key) for key in list(file.keys())}
    except SafetensorError as error:
        with path.open("rb") as raw:
            pickled = raw.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        reason = (
            "is a pickle, which can run code when opened; save its weights with safetensors first"
            if pickled
            else f"is no safetensors file, or is truncated or damaged ({error})"
        )
        raise UsageError(f"checkpoint={path} {reason}") from error
    return replace(_source(path, digest, weights, card), damaged=damaged)


def _source(path: Path, digest: str, weights: dict[str, Tensor], text: str | None) -> Source:
    """What a file holds, with the names that its weights have in a model.

    Raises:
        UsageError: more classes than outputs, or a card that softmoe did not write.
    """
    card = read_card(text, path) if text is not None else {}
    prefix, weights = _without_prefix(weights)
    head = weights.get("head.weight")
    if card and head is not None and (head.ndim != 2 or len(head) < len(card["classes"])):
        raise UsageError(
            f"checkpoint={path} speaks of {len(card['classes'])} classes, and its head.weight is {tuple(head.shape)}; "
            "softmoe saved no such file"
        )
    return Source(str(path), digest, weights, card, prefix)


def _without_prefix(weights: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The prefix of every name, and a ViT's weights without it. Wrappers put prefixes before every name
    (DistributedDataParallel, torch.compile, averages of weights, trainers). The count that torch's averages keep beside
    the weights is left out."""
    named = {key: value for key, value in weights.items() if key != "n_averaged"}
    ends = (key.removesuffix(FIRST_WEIGHT) for key in named if key.endswith(f".{FIRST_WEIGHT}"))
    prefix = next(ends, "")
    if not prefix or not all(key.startswith(prefix) for key in named):
        return "", weights
    return prefix, {key.removeprefix(prefix): value for key, value in named.items()}


def _joined_source(path: Path) -> Source:
    """The source for weights in pieces: as if `path` had been written, as it will be when the run ends."""
    try:
        weights, text = pieces.whole_tensors(path)
    except RunError as error:
        raise UsageError(f"checkpoint={path.parent}: {error}") from error
    digest = hashlib.sha256(save(weights, metadata={"softmoe": text})).hexdigest()
    return _source(path, digest, weights, text)


def read_moments(source: Source, digest: str | None = None) -> dict[str, dict[str, Tensor]]:
    """AdamW's state (`exp_avg`, `exp_avg_sq`, `step`) of each parameter, from the training tensors beside a
    checkpoint's weights; nothing where there are none. With `digest` they must be the tensors of that digest.

    Raises:
        UsageError: they are damaged, or not the ones that the weights speak of.
    """
    folder, tensors = Path(source.label).parent, {}
    if Path(source.label).name == WEIGHTS and ((folder / TRAINING).is_file() or piece_files(folder / TRAINING)):
        fault = damage(folder)
        if fault is not None:
            raise UsageError(f"checkpoint={folder}: {fault}")
        tensors = pieces.read_tensors(folder / TRAINING)
    tensors = {key: value for key, value in tensors.items() if key.startswith("optimizer.")}
    if digest is not None and digest_of(tensors) != digest:
        raise UsageError(
            f"checkpoint={source.label} was upcycled with optimizer moments, and {folder / TRAINING} does not hold "
            "them; name the whole folder, or upcycle with carry_optimizer=false"
        )
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, kind = key.removeprefix("optimizer.").rpartition(".")
        moments.setdefault(name, {})[kind] = value
    return {name: state for name, state in moments.items() if state.keys() == MOMENTS}
