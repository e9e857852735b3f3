"""Decoded squares in a file: the same bits as without, made once, whole or not at all."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from softmoe_cli.config.data import Data
from softmoe_cli.data import cache
from softmoe_cli.data.batches import Batch, eval_batches
from softmoe_cli.data.cache import Mapped
from softmoe_cli.data.sets import load
from softmoe_cli.data.splits import ImageSet
from softmoe_cli.errors import RunError, UsageError
from tests.conftest import TINY, Softmoe
from tests.data.trees import CLASSES, CPU, SIDE, augment, batches, folder, write_tree

CHANGES = {"crop": "resized", "hflip": 0.5, "randaugment": [2, 10], "mixup": 0.2, "erase": 0.5}


def files(where: Path) -> list[str]:
    return sorted(path.name for path in where.iterdir() if path.suffix != ".lock")


def decoded(images: ImageSet) -> Mapped:
    assert isinstance(images.images, Mapped)
    return images.images


def evaluated(images: ImageSet, data: Data, size: int) -> list[Batch]:
    return list(eval_batches(images, data, image_size=SIDE, in_chans=3, batch_size=size, device=CPU))


@pytest.mark.parametrize("memory", [4, 0], ids=["as in memory", "as from files"])
@pytest.mark.parametrize("crop_pct", [None, 0.875])
def test_a_run_sees_the_same_bits(tree: Path, tmp_path: Path, memory: int, crop_pct: float | None) -> None:
    plain = folder(tree, memory_gib=memory, crop_pct=crop_pct)
    mapped = replace(plain, cache=str(tmp_path / "new" / "cache"))
    alone, kept = load(plain), load(mapped)
    assert (alone.train.images is None) == (memory == 0) and isinstance(kept.train.images, Mapped)
    for part in ("train", "validation", "test"):
        a, b = getattr(alone, part), getattr(kept, part)
        assert torch.equal(a.labels, b.labels) and len(a) == len(b) == len(decoded(b))
        for size in (1, 5):
            as_seen = (evaluated(images, data, size) for images, data in ((a, plain), (b, mapped)))
            for one, other in zip(*as_seen, strict=True):
                assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    change = augment(**CHANGES)
    pairs = zip(batches(alone.train, plain, change), batches(kept.train, mapped, change), strict=False)
    for (a, b), _ in zip(pairs, range(4), strict=False):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_it_is_decoded_once(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder(tree, cache=str(tmp_path))
    first = load(data)
    (name,) = files(tmp_path)
    array = np.load(tmp_path / name, allow_pickle=False)
    assert array.shape == (6 * len(CLASSES), 3, SIDE, SIDE) and array.dtype == np.uint8
    monkeypatch.setattr(cache, "squares", None)
    again = load(data)
    for part in ("train", "validation", "test"):
        assert torch.equal(*(torch.stack(list(decoded(getattr(splits, part)))) for splits in (first, again)))
    other = replace(data, split_seed=1)
    assert not torch.equal(load(other).train.labels, first.train.labels) or files(tmp_path) == [name]
    assert files(tmp_path) == [name]


def test_other_images_or_another_side_are_another_file(tmp_path: Path) -> None:
    tree, kept = write_tree(tmp_path / "images"), tmp_path / "cache"
    data = folder(tree, cache=str(kept))
    load(data)
    load(replace(data, image_size=SIDE + 1))
    load(replace(data, crop_pct=0.5))
    load(replace(data, channels=1))
    assert len(files(kept)) == 4
    Image.new("RGB", (9, 9), (1, 2, 3)).save(tree / "ant" / "0.png")
    splits = load(data)
    assert len(files(kept)) == 5
    every = [image for part in (splits.train, splits.validation, splits.test) for image in decoded(part)]
    assert any((image == torch.tensor([1, 2, 3]).view(3, 1, 1)).all() for image in every)


@pytest.mark.parametrize("fault", ["short", "empty", "text", "other shape", "floats", "pickle"])
def test_a_damaged_file_is_named(tree: Path, tmp_path: Path, fault: str) -> None:
    data = folder(tree, cache=str(tmp_path))
    load(data)
    path = tmp_path / files(tmp_path)[0]
    whole = np.load(path)
    if fault in ("short", "empty", "text"):
        path.write_bytes({"short": path.read_bytes()[:-1], "empty": b"", "text": b"no pixels"}[fault])
    else:
        array = {"other shape": whole[1:], "floats": whole.astype(np.float32), "pickle": np.array([data, {}], object)}
        np.save(path, array[fault], allow_pickle=True)
    with pytest.raises(UsageError, match=f"{path} is damaged, or no file of decoded images; remove it"):
        load(data)
    path.unlink()
    assert np.array_equal(decoded(load(data).train).pixels, whole)


def test_an_image_that_cannot_be_read_leaves_no_file(tmp_path: Path) -> None:
    tree, kept = write_tree(tmp_path / "images"), tmp_path / "cache"
    (tree / "bee" / "3.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(UsageError, match=r"bee/3\.png is not an image that can be read"):
        load(folder(tree, cache=str(kept)))
    assert files(kept) == []


@pytest.mark.thorough
def test_what_a_killed_process_left_goes(tree: Path, tmp_path: Path) -> None:
    data = folder(tree, cache=str(tmp_path))
    load(data)
    (name,) = files(tmp_path)
    (tmp_path / name).unlink()
    killed = f"""
import os, signal
from pathlib import Path
from softmoe_cli.data.sets import load
from tests.data.trees import folder
os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
load(folder(Path({str(tree)!r}), cache={str(tmp_path)!r}))
"""
    assert subprocess.run([sys.executable, "-c", killed], capture_output=True).returncode == -9
    (left,) = files(tmp_path)
    assert left.startswith(".") and (tmp_path / left).stat().st_size > 1000
    load(data)
    assert files(tmp_path) == [name]


def test_a_disk_that_is_too_small_is_known_before(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3455))  # a byte less than the pixels
    with pytest.raises(RunError, match=r"for 18 images of 8 pixels, and 0\.0 MiB are free there; make room"):
        load(folder(tree, cache=str(tmp_path)))


def test_a_run_with_it_is_the_run_without(softmoe: Softmoe, tree: Path, tmp_path: Path) -> None:
    line = ("train", *TINY, "data=folder", f"data.root={tree}", "train.steps=3")
    assert softmoe(*line, "output_root=plain").code == 0
    assert softmoe(*line, "output_root=mapped", "data.cache=kept", "data.memory_gib=0").code == 0
    plain, mapped = (next((tmp_path / root).glob("*/*/result.json")) for root in ("plain", "mapped"))
    assert plain.parts[-3:] == mapped.parts[-3:]
    weights = [next(path.parent.glob("checkpoints/last-*/model.safetensors")) for path in (plain, mapped)]
    assert all(torch.equal(a, b) for a, b in zip(*(load_file(path).values() for path in weights), strict=True))
    told = [json.loads(path.read_text()) for path in (plain, mapped)]
    assert told[0]["loss"] == told[1]["loss"]
    again = softmoe(*line, "output_root=mapped", "data.cache=elsewhere")
    assert again.code == 0 and "finished" in again.out and not (tmp_path / "elsewhere").exists()


def test_it_is_for_squares_of_files(softmoe: Softmoe, tree: Path, tmp_path: Path) -> None:
    answer = softmoe("train", "data.cache=here")
    assert answer.code == 2 and "data.cache=here has no effect on data=digits, which has no files" in answer.err
    answer = softmoe("train", "data=imagenet", f"data.root={tree}", "data.cache=here")
    assert answer.code == 2 and "say data.from_file=false data.image_size=256" in answer.err
    (tmp_path / "file").write_text("")
    answer = softmoe("train", "data=folder", f"data.root={tree}", "data.cache=file", "train.steps=1")
    assert answer.code == 2 and "data.cache=file is no folder to write to" in answer.err


def test_a_checkpoint_says_no_place(softmoe: Softmoe, tree: Path, tmp_path: Path) -> None:
    """Who evaluates somebody's weights writes nothing where that person kept pixels."""
    line = ("train", *TINY, "data=folder", f"data.root={tree}", "train.steps=1", "data.cache=kept")
    assert softmoe(*line).code == 0
    (weights,) = tmp_path.glob("outputs/*/*/checkpoints/last-*/model.safetensors")
    shutil.rmtree(tmp_path / "kept")
    assert softmoe("evaluate", f"checkpoint={weights}").code == 0 and not (tmp_path / "kept").exists()
    with safe_open(weights, "pt") as file:
        card = json.loads(file.metadata()["softmoe"])
    assert card["data"].pop("cache") is None
    card["data"]["cache"] = "xx"
    save_file(load_file(weights), tmp_path / "forged.safetensors", {"softmoe": json.dumps(card)})
    answer = softmoe("evaluate", "checkpoint=forged.safetensors")
    assert answer.code == 0 and not (tmp_path / "xx").exists()
    assert softmoe("evaluate", "checkpoint=forged.safetensors", "data.cache=yy").code == 0
    assert len(files(tmp_path / "yy")) == 1
