"""Small images on the disk in every form that softmoe reads: folders, tars, shards, records, Arrow files."""

import io
import itertools
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from PIL import Image

from softmoe_cli.config.data import Data
from softmoe_cli.data.batches import eval_batches
from softmoe_cli.data.folders import Listing
from softmoe_cli.data.listing import listing
from softmoe_cli.data.splits import ImageSet, Splits
from softmoe_cli.errors import UsageError
from tests.oracles import compose

CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "cat")
SIDE = 8
Files = dict[str, bytes]
"""Path below the root -> contents."""


def picture(number: int, size: tuple[int, int] = (SIDE, SIDE), kind: str = "PNG") -> bytes:
    rng = np.random.default_rng(number)
    smooth = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    smooth.save(out, kind)
    return out.getvalue()


def tree(part: str, per_class: int, first: int = 0) -> Files:
    numbers = itertools.count(first)
    return {f"{part}/{name}/{i}.png": picture(next(numbers)) for name in CLASSES for i in range(per_class)}


WHOLE = tree("train", 10) | tree("val", 2, 100)


def write(root: Path, files: Files) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def pack(path: Path, files: Files, **changes: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, changes.get("mode", "w")) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def below(files: Files, folder: str) -> Files:
    return {
        name.removeprefix(f"{folder}/"): content for name, content in files.items() if name.startswith(f"{folder}/")
    }


def settings(kind: str, root: Path, **changes: object) -> Data:
    data = compose(f"data={kind}", "data.root=x", f"data.image_size={SIDE}").data
    for key, value in ({"root": str(root), "workers": 0} | changes).items():
        assert hasattr(data, key)
        setattr(data, key, value)
    return data.settled()


def contents(images: ImageSet) -> list[tuple[int, bytes]]:
    """Label and pixels of each image, in any order."""
    batches = eval_batches(
        images, settings("folder", Path(), mean=[0.0], std=[1.0]), image_size=SIDE, in_chans=3, batch_size=7, device=CPU
    )
    pairs = [pair for xs, ys, _ in batches for pair in zip(xs, ys.tolist(), strict=True)]
    return sorted((label, x.mul(255).round().byte().numpy().tobytes()) for x, label in pairs)


def everything(splits: Splits) -> list[list[tuple[int, bytes]]]:
    return [contents(splits.test), sorted(contents(splits.train) + contents(splits.validation))]


# --- tars as folders --------------------------------------------------------------------------------------------------


def as_part_tars(root: Path) -> Path:
    for part in ("train", "val"):
        pack(root / f"{part}.tar", below(WHOLE, part))
    return root


# --- WebDataset -------------------------------------------------------------------------------------------------------


def samples(part: str, label: str) -> Files:
    """Files named as WebDataset's writer names them: KEY.png, KEY.cls, KEY.json."""
    found: Files = {}
    for name, content in below(WHOLE, part).items():
        kind, _, number = name.partition("/")
        key = f"some/{kind}_{number.removesuffix('.png')}"
        found[f"{key}.png"] = content
        found[f"{key}.cls"] = (kind if label == "name" else str(CLASSES.index(kind))).encode()
        found[f"{key}.json"] = json.dumps({"kind": kind, "number": CLASSES.index(kind)}).encode()
    return found


def shards(root: Path, label: str = "number", names: str = "set-{}-{:03d}.tar") -> Path:
    for part in ("train", "val"):
        files = list(samples(part, label).items())
        for i in range(3):  # a sample must lie in one shard
            pack(root / names.format(part, i), dict(files[len(files) // 3 * i : len(files) // 3 * (i + 1)]))
    return root


IMAGE = picture(0)


# --- TFDS -------------------------------------------------------------------------------------------------------------


def example(features: dict[str, bytes | int | list[int] | float]) -> bytes:
    """A tf.train.Example, serialised by protobuf from TensorFlow's definition of the message."""
    return EXAMPLE(
        features={"feature": {name: _feature(value) for name, value in features.items()}}
    ).SerializeToString()


def _feature(value: bytes | int | list[int] | float) -> dict[str, object]:
    if isinstance(value, bytes):
        return {"bytes_list": {"value": [value]}}
    if isinstance(value, float):
        return {"float_list": {"value": [value]}}
    return {"int64_list": {"value": value if isinstance(value, list) else [value]}}


def _example_class() -> type:
    """tensorflow/core/example/{feature,example}.proto."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, str, bool]) -> descriptor_pb2.DescriptorProto:
        made = descriptor_pb2.DescriptorProto(name=name)
        for title, number, kind, target, repeated in fields:
            made.field.add(name=title, number=number, type=kind, label=3 if repeated else 1)
            if target:
                made.field[-1].type_name = target
        return made

    lists = {"Bytes": 12, "Float": 2, "Int64": 3}
    file.message_type.extend(message(f"{name}List", ("value", 1, kind, "", True)) for name, kind in lists.items())
    kinds = [(f"{name.lower()}_list", i + 1, 11, f".t.{name}List", False) for i, name in enumerate(lists)]
    file.message_type.append(message("Feature", *kinds))
    features = message("Features", ("feature", 1, 11, ".t.Features.FeatureEntry", True))
    entry = message("FeatureEntry", ("key", 1, 9, "", False), ("value", 2, 11, ".t.Feature", False))
    entry.options.map_entry = True
    features.nested_type.append(entry)
    file.message_type.extend([features, message("Example", ("features", 1, 11, ".t.Features", False))])
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


EXAMPLE = _example_class()


def records(path: Path, examples: Iterable[bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(len(e).to_bytes(8, "little") + b"crc4" + e + b"crc4" for e in examples))
    return path


def as_tfds(root: Path, label: str = "label") -> Path:
    for part, word in (("train", "train"), ("val", "validation")):
        rows = [
            example({"file_name": name.encode(), "image": content, label: CLASSES.index(name.split("/")[0]), "x": 0.5})
            for name, content in below(WHOLE, part).items()
        ]
        for i in range(2):
            records(root / f"mine-{word}.tfrecord-0000{i}-of-00002", rows[i::2])
    (root / f"{label}.labels.txt").write_text("\n".join(CLASSES) + "\n")
    return root


# --- Arrow ------------------------------------------------------------------------------------------------------------


def as_arrow(root: Path, label: str = "label") -> Path:
    """Files as `datasets` 5 saves a DatasetDict: a stream file per part, and a description of the columns."""
    pa = pytest.importorskip("pyarrow")
    for part, word in (("train", "train"), ("val", "test")):
        files = below(WHOLE, part)
        pictures = pa.array([{"bytes": content, "path": name} for name, content in files.items()])
        table = pa.table({"img": pictures, label: [CLASSES.index(name.split("/")[0]) for name in files]})
        (root / word).mkdir(parents=True)
        path = str(root / word / "data-00000-of-00001.arrow")
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
            out.write_table(table, max_chunksize=7)
        features = {"img": {"_type": "Image"}, label: {"names": list(CLASSES), "_type": "ClassLabel"}}
        (root / word / "dataset_info.json").write_text(json.dumps({"features": features}))
    return root


def listed(kind: str, root: Path, **changes: object) -> Listing:
    return listing(settings(kind, root, **changes))


def refused_set(kind: str, root: Path, words: str, **changes: object) -> None:
    with pytest.raises(UsageError, match=words):
        listed(kind, root, **changes)


def as_labelled(root: Path, kind: str, labels: list[Any]) -> dict[str, object]:
    """A set with an image for each label; what else it is called with."""
    if kind in ("cls", "json"):
        files: Files = {}
        for i, label in enumerate(labels):
            text = json.dumps({"n": label}) if kind == "json" else str(label)
            files |= {f"{i}.png": picture(i), f"{i}.{kind}": text.encode()}
        pack(root / "0.tar", files)
    elif kind == "tfds":
        records(
            root / "a.tfrecord-00000-of-00001",
            [example({"image": picture(i), "label": label}) for i, label in enumerate(labels)],
        )
    else:
        save_arrow(root, labels, None)
    return {"label": "n"} if kind == "json" else {}


def save_arrow(root: Path, labels: list[Any], names: tuple[str, ...] | None) -> Path:
    pa = pytest.importorskip("pyarrow")
    root.mkdir(parents=True, exist_ok=True)
    pictures = pa.array([{"bytes": picture(i), "path": f"{i}.png"} for i in range(len(labels))])
    table = pa.table({"image": pictures, "label": labels})
    with pa.OSFile(str(root / "0.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    feature = {"_type": "ClassLabel"} | ({"names": list(names)} if names else {})
    text = json.dumps({"features": {"image": {"_type": "Image"}, "label": feature}})
    (root / "dataset_info.json").write_text(text)
    return root
