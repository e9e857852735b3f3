"""TensorBoard's event file of a run: its bytes, what it holds, and that a resumed run has no step twice."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from softmoe_cli.compare.others.tensorboard import event_records, fields
from softmoe_cli.errors import UsageError
from softmoe_cli.run.events import Events, beginning, event, framed
from tests.oracles import compose
from tests.runs import finish, start, the_run

EVENT = (
    "2c00000000000000f4aecc4509000000000000f83f10ac022a1e0a110a0a747261696e2f"
    "6c6f7373150000803e0a090a026c7215000000003981ae88"
)
BEGINNING = (
    "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c"
    "0d000000000000003c37b83409000000000000f83f3a020801b718825c"
)
"""What TensorBoard 2.21.0's own messages and RecordWriter make of the same."""


def test_bytes_are_those_of_tensorboards_library() -> None:
    assert framed(event(300, {"train/loss": 0.25, "lr": 0.0}, 1.5)).hex() == EVENT
    assert beginning(1.5).hex() == BEGINNING


def scalars(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """The steps and values of the one event file in a folder, by compare's reader, which is written by itself."""
    (file,) = folder.glob("tensorboard/events.out.tfevents.*")
    found = []
    for record in event_records(file):
        said = fields(record)
        if 5 not in said:
            continue
        values = {}
        for value in fields(said[5][0]).get(1, []):
            each = fields(value)
            values[each[1][0].decode()] = struct.unpack("<f", each[2][0])[0]
        found.append((said.get(2, [0])[0], values))
    return found


def rows(*steps: int) -> list[dict[str, Any]]:
    where = [{"step": step, "images": 8 * step, "epoch": step / 9, "loss": 0.5 + step, "format": 1} for step in steps]
    return [row | {"split": split} for row in where for split in ("train", "validation")]


def test_rows_stand_under_their_names_once_a_step(tmp_path: Path) -> None:
    file = Events(tmp_path, [], print)
    for row in rows(1, 2):
        file.row(row)
    file.close({"top1_pct": 90.0, "name": "run", "none": None})
    found = scalars(tmp_path)
    assert [step for step, _ in found] == [1, 1, 2, 2, 2]
    assert found[0][1] == {"images": 8, "epoch": pytest.approx(1 / 9), "train/loss": 1.5}
    assert found[1][1] == {"validation/loss": 1.5} and found[4][1] == {"result/top1_pct": 90}


def test_what_goes_on_is_written_anew(tmp_path: Path) -> None:
    """A run that goes back to step 1 has step 2 once, in one file that TensorBoard reads after the old one."""
    first = Events(tmp_path, [], print)
    for row in rows(1, 2):
        first.row(row)
    first.close(None)
    (old,) = (tmp_path / "tensorboard").iterdir()
    second = Events(tmp_path, rows(1), print)
    (new,) = (tmp_path / "tensorboard").iterdir()
    for row in rows(2):
        second.row(row)
    second.close(None)
    assert new.name > old.name
    assert [step for step, values in scalars(tmp_path) if "train/loss" in values] == [1, 2]


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("")
    told: list[str] = []
    file = Events(tmp_path, rows(1), told.append)
    file.row(rows(2)[0])
    file.close({"top1_pct": 1.0})
    assert len(told) == 1 and "TensorBoard's file cannot be written" in told[0]


@pytest.mark.parametrize("words", ["[off,tensorboard]", "[online,offline]", "[tensorboard,tensorboard]", "[]"])
def test_words_that_do_not_go_together_are_refused(words: str) -> None:
    with pytest.raises(UsageError, match="tracking="):
        compose(f"tracking={words}")
    assert compose("tracking=[offline,tensorboard]").tracking == ["offline", "tensorboard"]


@pytest.mark.thorough
def test_a_run_mirrors_its_rows(tmp_path: Path) -> None:
    finish(start(tmp_path, "train.steps=4", "tracking=tensorboard"))
    run = the_run(tmp_path)
    kept = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = scalars(run)
    assert not (run / "wandb").exists()
    for split in ("train", "validation", "test"):
        want = [(row["step"], row["loss"]) for row in kept if row["split"] == split]
        got = [(step, values[f"{split}/loss"]) for step, values in found if f"{split}/loss" in values]
        assert want and [step for step, _ in got] == [step for step, _ in want]
        assert [loss for _, loss in got] == pytest.approx([loss for _, loss in want], rel=1e-6)
    result = json.loads((run / "result.json").read_text())
    assert found[-1][1]["result/top1_pct"] == pytest.approx(result["top1_pct"])
