"""Shards, records and Arrow files: their labels, the names of their classes, and what is damaged in them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.images import (
    CLASSES,
    IMAGE,
    Files,
    as_arrow,
    as_labelled,
    example,
    listed,
    pack,
    picture,
    records,
    refused_set,
    save_arrow,
    write,
)


@pytest.mark.parametrize("kind", ["cls", "json", "tfds", "arrow"])
@pytest.mark.parametrize("stray", [30_000_000, 3_735_928_559, 999_999_999_999, 10**17])
def test_numbers_that_are_ids_are_refused(tmp_path: Path, kind: str, stray: int) -> None:
    changes = as_labelled(tmp_path, kind, [0, 1, stray, 1])
    refused_set(
        "webdataset" if kind in ("cls", "json") else kind, tmp_path,
        rf"{tmp_path}/.* has the label {stray}, but .* has 3 different labels in all: numbers .* from 0$",
        **changes,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["cls", "json"])
@pytest.mark.parametrize("digits", [30, 5000])
def test_numbers_of_many_digits_are_refused(tmp_path: Path, kind: str, digits: int) -> None:
    label = b"9" * digits
    pack(tmp_path / "0.tar", {"0.png": IMAGE, f"0.{kind}": b'{"n": %s}' % label if kind == "json" else label})
    words = r"sample 0: its label .* (is no class|is neither a number from 0 nor a name)"
    refused_set("webdataset", tmp_path, words, label="n" if kind == "json" else None)


def test_as_many_classes_as_imagenet_21k_are_taken(tmp_path: Path) -> None:
    as_labelled(tmp_path, "cls", [0, 21_840])
    assert len(listed("webdataset", tmp_path).classes) == 21_841
    as_labelled(tmp_path, "cls", [0, 70_000])
    refused_set("webdataset", tmp_path, r"or, if there are so many, set data\.num_classes=70001")
    assert len(listed("webdataset", tmp_path, num_classes=70_001).classes) == 70_001
    (tmp_path / "classnames.txt").write_text("\n".join(map(str, range(70_001))))
    assert len(listed("webdataset", tmp_path).classes) == 70_001


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.cls": b"caf\xe9"}, r"a: its \.cls is no text in UTF-8"),
        ({"a.cls": b"x" * 2000}, "of 2,000 letters is no class"), ({"a.json": b'{"n": [1]}'}, "is neither a number"),
        ({"a.cls": b"0" * 2**25}, r"has a \.cls of 33,554,432 bytes"),
        ({"a.json": b"[" * 100_000}, r"its \.json holds no data\.label=n"),
    ],
)  # fmt: skip
def test_labels_that_are_none_are_refused(tmp_path: Path, files: Files, words: str) -> None:
    pack(tmp_path / "0.tar", {"a.png": IMAGE} | files)
    refused_set("webdataset", tmp_path, words, label="n" if "a.json" in files else None)


def test_each_split_may_number_its_classes_in_its_own_order(tmp_path: Path) -> None:
    save_arrow(tmp_path / "train", [0, 1, 2], CLASSES)
    save_arrow(tmp_path / "test", [0, 1, 2, 2], CLASSES[::-1])
    found = listed("arrow", tmp_path)
    assert found.classes == list(CLASSES)
    assert [labels.tolist() for _, labels in found.parts.values()] == [[0, 1, 2], [2, 1, 0, 0]]
    assert "test/dataset_info.json has the classes in another order than" in found.notes["labels"]
    save_arrow(tmp_path / "test", [0, 1, 2, 2], ("ant", "bee", "cow"))
    refused_set(
        "arrow", tmp_path, r"train/dataset_info\.json and .*test/dataset_info\.json name different classes: cat, cow"
    )


@pytest.mark.parametrize("kind", ["webdataset", "tfds"])
def test_each_part_may_have_its_own_file_of_names(tmp_path: Path, kind: str) -> None:
    file = {"webdataset": "classnames.txt", "tfds": "label.labels.txt"}[kind]
    for part, names in (("train", CLASSES), ("val", CLASSES[::-1])):
        as_labelled(tmp_path / part, {"webdataset": "cls", "tfds": "tfds"}[kind], [0, 0, 2])
        (tmp_path / part / file).write_text("\n".join(names))
    write(tmp_path / "val", {})
    if kind == "webdataset":  # other images than in train, or they would be a copy
        pack(tmp_path / "val/0.tar", {"9.png": picture(9), "9.cls": b"0", "8.png": picture(8), "8.cls": b"2"})
    else:
        rows = [example({"image": picture(9 - i), "label": 2 * i}) for i in range(2)]
        records(tmp_path / "val/a.tfrecord-00000-of-00001", rows)
    assert [labels.tolist() for _, labels in listed(kind, tmp_path).parts.values()] == [[0, 0, 2], [2, 0]]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("café\nb\nc".encode("latin-1"), r"classnames\.txt is not in UTF-8: byte 3 is 0xe9"),
        ("a\nb\nc".encode("utf-16"), r"classnames\.txt is not in UTF-8"),
        ("a\nb\nc".encode("utf-16-le"), r"classnames\.txt is not in UTF-8 but looks like UTF-16"),
        (b"a\n\nc", "has an empty line between its names"), (b"", ""), ("\ufeffa\r\nb\r\nc\r\n\r\n".encode(), ""),
    ],
)  # fmt: skip
def test_files_of_names(tmp_path: Path, raw: bytes, words: str) -> None:
    as_labelled(tmp_path, "cls", [0, 1, 2])
    (tmp_path / "classnames.txt").write_bytes(raw)
    if words:
        refused_set("webdataset", tmp_path, words)
    else:
        assert listed("webdataset", tmp_path).classes == (["a", "b", "c"] if raw else ["0", "1", "2"])


@pytest.mark.parametrize("raw", [b"[" * 100_000, b'{"features": [1]}', b"{}", b'{"features": {"a": "\xe9"}}', b"null"])
def test_damaged_descriptions_of_arrow_files(tmp_path: Path, raw: bytes) -> None:
    save_arrow(tmp_path, [0, 1], None)
    (tmp_path / "dataset_info.json").write_bytes(raw)
    refused_set("arrow", tmp_path, r"dataset_info\.json (does not describe a data set|is not in UTF-8)")


@pytest.mark.parametrize("keys", [("cat.v000.jpg", "cat.v000.cls"), ("1.crop.png", "1.cls"), ("22.05.png", "22.cls")])
def test_dots_in_names_of_samples_are_explained(tmp_path: Path, keys: tuple[str, str]) -> None:
    pack(tmp_path / "0.tar", dict(zip(keys, (IMAGE, b"0"), strict=True)))
    refused_set("webdataset", tmp_path, rf"A sample's name ends at its first dot, so that {keys[0]} is its field \.")


def test_offsets_beyond_an_arrow_file_are_refused(tmp_path: Path) -> None:
    """Read in a process of its own, which they would end."""
    root = save_arrow(tmp_path, ["ant", "bee", "cat", "ant"], None)
    raw = (root / "0.arrow").read_bytes()
    ends = np.array([0, 3, 6, 9, 12], np.int32).tobytes()
    assert raw.count(ends) == 1
    for wrong in ([0, 3, 6, 9, 2**31 - 1], [2**30, 2**30 + 3, 2**30 + 6, 2**30 + 9, 2**30 + 12], [0, 3, 1, 9, 12]):
        (root / "0.arrow").write_bytes(raw.replace(ends, np.array(wrong, np.int32).tobytes()))
        assert in_a_process(lambda: refused_set("arrow", root, "is no Arrow file with images in image")) == 0


def in_a_process(check: Callable[[], None]) -> int:
    child = os.fork()
    if not child:
        try:
            check()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_images_that_are_missing_or_no_bytes_in_arrow_files(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    root = save_arrow(tmp_path, [0, 1], None)
    one, kind = {"bytes": IMAGE, "path": None}, pa.struct([("bytes", pa.binary_view()), ("path", pa.string())])
    viewed = pa.array([one, one], kind)
    for column, words in (
        (pa.array([None, one]), "is missing in some rows"),
        (viewed, "holds binary_view; images must"),
    ):
        table = pa.table({"image": column, "label": [0, 1]})
        with pa.OSFile(str(root / "0.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
            out.write_table(table)
        refused_set("arrow", root, words)


def test_the_arrow_files_of_a_set_with_parts(tmp_path: Path) -> None:
    assert as_arrow(tmp_path / "a").is_dir() and len(listed("arrow", tmp_path / "a").parts) == 2
    shutil.copytree(tmp_path / "a", tmp_path / "b/copy")
    shutil.copytree(tmp_path / "a", tmp_path / "b/other")
    refused_set("arrow", tmp_path / "b", "has archives in .*copy/.* and in .*other/")
