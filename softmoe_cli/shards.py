"""Tensors that several processes have divided among them, in files: each writes its pieces, a reader joins them.

A piece is a block of a whole tensor. The header of its file says where it belongs and how large the whole is, so that
a reader needs no other number of processes than its own. torch.distributed.checkpoint does not serve: its own format
is read by unpickling, and what joins its safetensors files leaves tensors without dimensions zero (the optimizer's
counts of steps) and knows floating point only (not random states).
"""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from softmoe_cli.files import RunError

PIECES = re.compile(r"(?P<name>.+)\.\d+-of-\d+\.safetensors")


class Piece(NamedTuple):
    """The block of a tensor of `shape` that begins at `offset`, an index for each dimension."""

    tensor: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def own(value: Tensor, *, first: bool) -> Piece | None:
    """What this process writes of a tensor: its block of a divided one, unless another process has the same block; all
    of one that every process has, if it is the first."""
    if not isinstance(value, DTensor):
        return Piece(value, (0,) * value.ndim, tuple(value.shape)) if first else None
    (block,) = value.__create_chunk_list__()
    place = value.device_mesh.get_coordinate() or ()
    repeated = any(at and not kind.is_shard() for kind, at in zip(value.placements, place, strict=True))
    return None if repeated or 0 in block.sizes else Piece(value.to_local(), tuple(block.offsets), tuple(value.shape))


def file_of(name: str, rank: int, size: int) -> str:
    """`model.safetensors` of the third of four processes is `model.3-of-4.safetensors`."""
    return f"{name.removesuffix('.safetensors')}.{rank + 1}-of-{size}.safetensors"


def whole_of(file: str) -> str:
    """The name of the whole that a file has pieces of, or its own."""
    found = PIECES.fullmatch(file)
    return f"{found['name']}.safetensors" if found else file


def write(path: Path, pieces: dict[str, Piece], text: str) -> None:
    """A file of pieces; `text` is what the header of the whole is to say."""
    places = {key: (piece.offset, piece.shape) for key, piece in pieces.items()}
    said = json.dumps({"text": text, "places": places})
    save_file({key: piece.tensor for key, piece in pieces.items()}, path, metadata={"pieces": said})


def files(path: Path) -> list[Path]:
    """Those in which the pieces of `path` are, in any order; none where it is whole, or missing."""
    return [file for file in path.parent.glob("*.safetensors") if file != path and whole_of(file.name) == path.name]


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, joined where it is in pieces."""
    return joined(path)[0] if not path.exists() else load_file(path)


def joined(path: Path) -> tuple[dict[str, Tensor], str]:
    """The whole tensors of which there are pieces, and what the header of the whole is to say.

    Raises:
        RunError: the pieces are not the whole.
    """
    tensors: dict[str, Tensor] = {}
    missing: dict[str, int] = {}
    text = ""
    for file in files(path):
        with safe_open(file, framework="pt") as opened:
            said = json.loads(opened.metadata()["pieces"])
            text = said["text"]
            for key, (offset, shape) in said["places"].items():
                piece = opened.get_tensor(key)
                if key not in tensors:
                    tensors[key], missing[key] = torch.empty(shape, dtype=piece.dtype), math.prod(shape)
                ends = zip(offset, piece.shape, strict=True)
                tensors[key][tuple(slice(start, start + length) for start, length in ends)] = piece
                missing[key] -= piece.numel()
    holes = [key for key, count in missing.items() if count]
    if holes or not tensors:
        raise RunError(f"{path} is in pieces that are not the whole of it{f': {holes[0]}' if holes else ''}")
    return tensors, text
