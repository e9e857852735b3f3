"""Tensors that several processes have divided among them, in files: each writes its pieces, a reader joins them.

A piece is a block of a whole tensor. The header of its file says where it belongs and how large the whole is, so that
a reader needs no other number of processes than its own. torch.distributed.checkpoint does not serve: its own format
is read by unpickling, and what joins its safetensors files leaves tensors without dimensions zero (the optimizer's
counts of steps) and knows floating point only (not random states).
"""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from softmoe_cli.errors import RunError
from softmoe_cli.parallel import is_part
from softmoe_cli.run.sealed import piece_files


class Piece(NamedTuple):
    """The block of a tensor of `shape` that begins at `offset`, an index for each dimension."""

    tensor: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def own(value: Tensor, *, first: bool) -> Piece | None:
    """What this process writes of a tensor: its block of a divided one, unless another process has the same block; all
    of one that every process has, if it is the first."""
    if not is_part(value):
        return Piece(value, (0,) * value.ndim, tuple(value.shape)) if first else None
    (block,) = value.__create_chunk_list__()
    place = value.device_mesh.get_coordinate() or ()
    repeated = any(at and not kind.is_shard() for kind, at in zip(value.placements, place, strict=True))
    return None if repeated or 0 in block.sizes else Piece(value.to_local(), tuple(block.offsets), tuple(value.shape))


def write_pieces(path: Path, pieces: dict[str, Piece], text: str) -> None:
    """Writes a file of pieces; `text` is what the header of the whole file is to say."""
    places = {key: (piece.offset, piece.shape) for key, piece in pieces.items()}
    header = json.dumps({"text": text, "places": places})
    save_file({key: piece.tensor for key, piece in pieces.items()}, path, metadata={"pieces": header})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, joined where it is in pieces."""
    return whole_tensors(path)[0] if not path.exists() else load_file(path)


def whole_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """The whole tensors of which there are pieces, and what the header of the whole is to say. Nothing is allocated
    before the pieces are known to be the whole.

    Raises:
        RunError: the pieces are not the whole.
    """
    places: dict[str, list[Span]] = {}
    text = ""
    for file in piece_files(path):
        text_of_file, places_in_file = _places(file)
        text = text_of_file
        for key, place in places_in_file.items():
            places.setdefault(key, []).append(place)
    if not places:
        raise RunError(f"{path} is in pieces that are not the whole of it")
    for key, several in places.items():
        if not _are_whole(several):
            raise RunError(f"{path} is in pieces that are not the whole of it: {key}")
    tensors: dict[str, Tensor] = {}
    for key, several in places.items():
        for place in several:
            with safe_open(place.file, framework="pt") as opened:
                piece = opened.get_tensor(key)
            if key not in tensors:
                tensors[key] = torch.empty(place.shape, dtype=piece.dtype)
            tensors[key][tuple(slice(*span) for span in place.spans)] = piece
    return tensors, text


class Span(NamedTuple):
    """Where in a whole of `shape` the piece in a file belongs: from where to where in each dimension."""

    file: Path
    kind: str
    spans: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]


def _places(file: Path) -> tuple[str, dict[str, Span]]:
    """What the header of the whole is to say, and the places of a file's pieces.

    Raises:
        RunError: softmoe wrote no such file.
    """
    in_file: dict[str, Span] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            header = json.loads((opened.metadata() or {})["pieces"])
            if not isinstance(header["text"], str):
                raise TypeError("its text is none")
            for key, (offset, shape) in header["places"].items():
                piece = opened.get_slice(key)
                sides = piece.get_shape()
                spans = [(start, start + side) for start, side in zip(offset, sides, strict=True)]
                inside = [start >= 0 and end <= whole for (start, end), whole in zip(spans, shape, strict=True)]
                if not all(inside) or not all(type(number) is int for number in (*offset, *shape)):
                    raise ValueError(f"{key} lies outside")
                in_file[key] = Span(file, piece.get_dtype(), tuple(spans), tuple(shape))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise RunError(f"{file} holds no pieces that softmoe wrote ({error})") from error
    return header["text"], in_file


def _are_whole(places: list[Span]) -> bool:
    """Whether pieces of one shape and type fill it, each number once."""
    if len({(place.kind, place.shape) for place in places}) > 1:
        return False
    if sum(math.prod(end - start for start, end in place.spans) for place in places) != math.prod(places[0].shape):
        return False
    pairs = itertools.combinations(places, 2)
    return not any(_overlap(one.spans, other.spans) for one, other in pairs)


def _overlap(one: Sequence[tuple[int, int]], other: Sequence[tuple[int, int]]) -> bool:
    """Whether two blocks have a number in common."""
    return all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(one, other, strict=True))
