"""What processes write in pieces is what one would have written; anything less is no checkpoint."""

import errno
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.parallel import Crew
from softmoe_cli.run import pieces as run_pieces
from softmoe_cli.run.card import card_text
from softmoe_cli.run.checkpoint import Checkpoint
from softmoe_cli.run.folder import Run
from softmoe_cli.run.pieces import Piece, whole_tensors, write_pieces
from softmoe_cli.run.sealed import damage, file_of, piece_files, seal, whole_of
from softmoe_cli.run.source import read_source
from tests.conftest import TINY, Softmoe
from tests.runs import last, the_run

WHOLE = {
    "experts": torch.randn(5, 3, 4),
    "width": torch.randn(6, 7).bfloat16(),
    "narrow": torch.randn(2, 3),
    "step": torch.tensor(405.0),
    "random": torch.arange(9, dtype=torch.uint8),
    "counted": torch.arange(4),
}
CUTS = {"experts": [(0, 2, 4, 5), (0, 3), (0, 4)], "width": [(0, 6), (0, 3, 4, 7)], "narrow": [(0, 1, 2), (0, 3)]}
"""Where each axis is cut; what is not here is not."""


def pieces(size: int) -> list[dict[str, Piece]]:
    """Each process's of WHOLE, dealt out in turn."""
    dealt: list[dict[str, Piece]] = [{} for _ in range(size)]
    for key, tensor in WHOLE.items():
        cuts = CUTS.get(key, [(0, length) for length in tensor.shape])
        for number, ends in enumerate(product(*[pairwise(axis) for axis in cuts])):
            block = tensor[tuple(slice(*span) for span in ends)].contiguous()
            dealt[number % size][key] = Piece(block, tuple(start for start, _ in ends), tuple(tensor.shape))
    return dealt


def equal(found: dict[str, Tensor]) -> bool:
    return found.keys() == WHOLE.keys() and all(
        found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in WHOLE.items()
    )


def test_joined_pieces_are_the_whole(tmp_path: Path) -> None:
    """Whatever the cut, the type and the number of dimensions; also where a process has nothing."""
    path = tmp_path / "model.safetensors"
    for rank, mine in enumerate([*pieces(3), {}]):
        write_pieces(tmp_path / file_of(path.name, rank, 4), mine, "card")
    save_file({"other": torch.ones(1)}, tmp_path / "training.safetensors")
    assert len(piece_files(path)) == 4 and {whole_of(file.name) for file in piece_files(path)} == {path.name}
    tensors, text = whole_tensors(path)
    assert equal(tensors) and text == "card"


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_piece_too_few_is_no_checkpoint(lost: int, tmp_path: Path) -> None:
    for rank, mine in enumerate(pieces(3)):
        if rank != lost:
            write_pieces(tmp_path / file_of("model.safetensors", rank, 3), mine, "")
    with pytest.raises(RunError, match="in pieces that are not the whole of it: "):
        whole_tensors(tmp_path / "model.safetensors")


def crafted(path: Path, said: Any, **tensors: Tensor) -> None:
    save_file(
        tensors, path, metadata={} if said is None else {"pieces": said if type(said) is str else json.dumps(said)}
    )


PLACES: dict[str, Any] = {
    "nothing is said": None,
    "no JSON": "{",
    "brackets": "[" * 200_000,
    "a list": [],
    "no places": {"text": ""},
    "no text": {"places": {"x": [[0], [4]]}},
    "text is a number": {"text": 5, "places": {"x": [[0], [4]]}},
    "places is a list": {"text": "", "places": [1]},
    "a place is a number": {"text": "", "places": {"x": 5}},
    "another tensor": {"text": "", "places": {"y": [[0], [4]]}},
    "outside": {"text": "", "places": {"x": [[1], [4]]}},
    "before the beginning": {"text": "", "places": {"x": [[-1], [4]]}},
    "other dimensions": {"text": "", "places": {"x": [[0, 0], [4, 1]]}},
    "no whole number": {"text": "", "places": {"x": [[0.0], [4]]}},
    "far too large": {"text": "", "places": {"x": [[0], [2**40]]}},
    "beyond 64 bits": {"text": "", "places": {"x": [[0], [2**80]]}},
}


@pytest.mark.parametrize("kind", PLACES)
def test_pieces_of_a_file_that_softmoe_did_not_write(kind: str, tmp_path: Path) -> None:
    """One sentence, before anything of the size that they speak of is taken."""
    crafted(tmp_path / "model.1-of-1.safetensors", PLACES[kind], x=torch.ones(4))
    with pytest.raises(RunError, match=r"no pieces that softmoe wrote|not the whole of it"):
        whole_tensors(tmp_path / "model.safetensors")
    seal(tmp_path)
    with pytest.raises(UsageError, match=r"^checkpoint="):
        read_source(str(tmp_path))


def test_pieces_that_lie_on_one_another_are_not_the_whole(tmp_path: Path) -> None:
    """As many numbers as the whole has, and a hole: memory that nobody wrote would be read."""
    for rank in range(2):
        said = {"text": "", "places": {"x": [[0], [4]]}}
        crafted(tmp_path / f"model.{rank + 1}-of-2.safetensors", said, x=torch.ones(2))
    with pytest.raises(RunError, match="not the whole of it: x"):
        whole_tensors(tmp_path / "model.safetensors")


class Threads:
    """Several crews in one process, which meet when all have asked."""

    def __init__(self, size: int) -> None:
        self._meeting, self._told = threading.Barrier(size), [None] * size
        self.crews = [self._crew(rank, size) for rank in range(size)]

    def _crew(self, rank: int, size: int) -> Crew:
        meeting, told = self._meeting, self._told

        class Thread(Crew):
            def gather_aside(self, items: Any) -> list[Any]:
                told[rank] = items
                meeting.wait(60)
                everyones = list(told)
                meeting.wait(60)
                return everyones

        return Thread(rank, size)


def save_together(folder: Path, step: int, *, end: bool) -> list[str]:
    """A checkpoint of three processes; what each has to complain of."""
    runs = [Run(folder, crew) for crew in Threads(3).crews]
    runs[0].checkpoints.folder.mkdir(parents=True, exist_ok=True)

    def write_own(rank: int) -> str:
        texts = {"state.json": json.dumps({"best_step": 0})}
        mine = pieces(3)[rank]
        try:
            runs[rank].checkpoints._write_pieces(f"last-{step:08d}", mine, mine, texts, {"a": [1, 0.1]}, end=end)
        except RunError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(write_own, range(3)))


def test_pieces_become_one_checkpoint_when_all_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process without room is a failure of all; the checkpoint before stays, damage is noticed in any piece, and
    what the end leaves is what one process would have written."""
    assert save_together(tmp_path, 5, end=False) == ["", "", ""]
    run = Run(tmp_path)
    newest = run.checkpoints.folder / "last-00000005"
    shutil.copytree(newest, tmp_path / "copy" / "checkpoints" / newest.name)
    assert not (newest / "model.safetensors").exists()

    def full(path: Path, mine: dict[str, Piece], text: str) -> None:
        if ".2-of-3" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_pieces(path, mine, text)

    monkeypatch.setattr(run_pieces, "write_pieces", full)
    for complaint in save_together(tmp_path, 6, end=False):
        assert "process 1: [Errno 28] No space left on device; earlier checkpoints are untouched" in complaint
    monkeypatch.undo()
    assert [path.name for path in run.checkpoints.folder.iterdir()] == ["last-00000005"]
    assert save_together(tmp_path, 7, end=True) == ["", "", ""]
    save_file(WHOLE, tmp_path / "alone.safetensors", metadata={"softmoe": card_text({"a": [1, 0.1]})})
    going_on, _ = Run(tmp_path / "copy").checkpoints.newest()
    assert going_on is not None
    for path in (newest, run.checkpoints.folder / "last-00000007", going_on):
        assert sorted(file.name for file in path.glob("*.safetensors")) == ["model.safetensors", "training.safetensors"]
        assert (path / "model.safetensors").read_bytes() == (tmp_path / "alone.safetensors").read_bytes()
        assert damage(path, files=None) is None
    found = Checkpoint.read(going_on)
    assert equal(found.weights) and equal(found.training)


def test_joining_that_stops_half_way_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever file was the last one to get its name."""
    assert save_together(tmp_path, 5, end=False) == ["", "", ""]
    path, real = tmp_path / "checkpoints" / "last-00000005", Path.replace
    for done in range(4):
        left = done

        def replace(path: Path, target: Path) -> Path:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.EIO, "Input/output error")
            return real(path, target)

        monkeypatch.setattr(Path, "replace", replace)
        if done < 3:
            with pytest.raises(RunError, match="Input/output error"):
                Run(tmp_path).checkpoints.newest()
        else:
            assert Run(tmp_path).checkpoints.newest() == (path, [])
        assert damage(path, files=None) is None
    found = Checkpoint.read(path)
    assert equal(found.weights) and equal(found.training) and not piece_files(path / "model.safetensors")


@pytest.mark.thorough
def test_who_reads_a_checkpoint_in_pieces_joins_it(softmoe: Softmoe, tmp_path: Path) -> None:
    """Evaluating and going on find the same, with the same digest, so that finetuning is the same run; a changed byte
    in any piece is noticed."""
    line = ("train", *TINY, "train.steps=4")
    assert softmoe(*line).code == 0
    run = the_run(tmp_path)
    path = last(run)
    before = read_source(str(run))
    score = score_of(softmoe, run)
    raw = (path / "model.safetensors").read_bytes()
    divide(path)
    after = read_source(str(run))
    assert (after.digest, after.label, after.card) == (before.digest, before.label, before.card)
    assert all(torch.equal(after.weights[key], value) for key, value in before.weights.items())
    assert score_of(softmoe, run) == score
    (run / "result.json").unlink()
    answer = softmoe(*line)
    assert answer.code == 0 and "going on from step 4" in answer.out
    assert (path / "model.safetensors").read_bytes() == raw
    divide(path)
    file = path / "model.2-of-2.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert f"{file.name} does not match its checksum" in softmoe("evaluate", f"checkpoint={path}").err


def score_of(softmoe: Softmoe, run: Path) -> dict[str, Any]:
    told = json.loads(softmoe("evaluate", f"checkpoint={run}", "format=json").out)
    return {key: value for key, value in told.items() if not key.endswith("_s")}


def divide(path: Path) -> None:
    """A checkpoint of one process as two would have written it, each every second tensor."""
    (path / "SHA256SUMS").unlink()
    for name in ("model.safetensors", "training.safetensors"):
        tensors = run_pieces.read_tensors(path / name)
        with safe_open(path / name, framework="pt") as file:
            text = (file.metadata() or {}).get("softmoe", "")
        for rank in range(2):
            mine = {
                key: Piece(value, (0,) * value.ndim, tuple(value.shape))
                for key, value in list(tensors.items())[rank::2]
            }
            write_pieces(path / file_of(name, rank, 2), mine, text)
        (path / name).unlink()
    seal(path)
