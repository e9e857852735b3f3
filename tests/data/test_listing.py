"""What lies at data.root: which files are read, passed over or refused, and what decides the classes."""

import io
import json
import os
import shutil
import stat
import tempfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from softmoe_cli.data.archives import LONGEST_NAME, Stored
from softmoe_cli.data.folders import Listing
from softmoe_cli.data.sets import load
from softmoe_cli.errors import UsageError
from tests.conftest import TINY, Softmoe
from tests.images import (
    CLASSES,
    IMAGE,
    WHOLE,
    Files,
    as_labelled,
    as_tfds,
    below,
    everything,
    example,
    listed,
    pack,
    picture,
    records,
    refused_set,
    settings,
    shards,
    write,
)

SMALL = {f"{name}/{i}.png": picture(10 * k + i) for k, name in enumerate(CLASSES) for i in range(3)}


def images(found: Listing) -> int:
    return sum(len(labels) for _, labels in found.parts.values())


# --- one visible set --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", [("1.0.0", "2.0.0"), ("a/x", "b/x"), (".", "backup"), ("train_old", "train")])
def test_archives_of_several_sets_are_refused(tmp_path: Path, places: tuple[str, str]) -> None:
    for i, place in enumerate(places):
        pack(tmp_path / place / f"x-train-{i}.tar", {"0.png": picture(i), "0.cls": b"0"})
    refused_set("webdataset", tmp_path, "has archives in .* and in .*: versions or copies of a set")
    assert images(listed("webdataset", tmp_path / places[1])) == 1


def test_versions_that_have_different_parts_are_not_one_set(tmp_path: Path) -> None:
    pack(tmp_path / "1.0.0/train.tar", {"0.png": picture(0), "0.cls": b"0"})
    pack(tmp_path / "2.0.0/val.tar", {"0.png": picture(1), "0.cls": b"0"})
    refused_set("webdataset", tmp_path, r"has archives in .*1\.0\.0 and in .*2\.0\.0")


def test_parts_may_lie_in_folders_of_their_own(tmp_path: Path) -> None:
    for part in ("train", "validation", "test"):
        pack(tmp_path / f"shards/{part}-set/x/0.tar", {"0.png": picture(len(part)), "0.cls": b"0"})
    assert list(listed("webdataset", tmp_path).parts) == ["train", "val", "test"]


def test_hidden_archives_are_passed_over_and_counted(tmp_path: Path) -> None:
    shards(tmp_path / "data")
    plain = images(listed("webdataset", tmp_path))
    pack(tmp_path / ".Trash-0/files/set-train-007.tar", {"0.png": picture(0), "0.cls": b"0"})
    pack(tmp_path / "data/@eaDir/set-train-007.tar", {"0.png": picture(0), "0.cls": b"0"})
    (tmp_path / "data/._set-train-000.tar").write_bytes(b"Mac OS X")
    (tmp_path / "data/set-train-008.tar.gz").write_bytes(b"")
    (tmp_path / "data/README.md").write_text("")
    found = listed("webdataset", tmp_path)
    assert images(found) == plain
    assert found.passed.kinds == {
        "hidden": (3, str(tmp_path / ".Trash-0")), ".gz": (1, str(tmp_path / "data/set-train-008.tar.gz")),
    }  # fmt: skip
    assert found.notes == {"passed over": "1 .gz; softmoe data check names them"}


@pytest.mark.parametrize("how", ["copy", "link", "other part"])
def test_an_archive_that_is_there_twice_is_refused(tmp_path: Path, how: str) -> None:
    shards(tmp_path)
    first = tmp_path / "set-train-000.tar"
    twin = tmp_path / ("set-val-009.tar" if how == "other part" else "set-train-000 (copy).tar")
    twin.symlink_to(first) if how == "link" else shutil.copy(first, twin)
    refused_set("webdataset", tmp_path, r"set-train-000.*\.tar and .*\.tar hold the same images")


def test_archives_of_equal_shape_with_other_pixels_are_no_copies(tmp_path: Path) -> None:
    raw = [b"P5 8 8 255\n" + bytes([i]) * 64 for i in range(2)]
    for i in range(2):
        records(tmp_path / f"x.tfrecord-0000{i}-of-00002", [example({"image": raw[i], "label": 0})])
    assert images(listed("tfds", tmp_path)) == 2


def test_names_of_classes_lie_beside_the_records(tmp_path: Path) -> None:
    as_tfds(tmp_path / "set/1.0.0")
    assert listed("tfds", tmp_path).classes == list(CLASSES)
    (tmp_path / "set/1.0.0/label.labels.txt").rename(tmp_path / "label.labels.txt")
    assert listed("tfds", tmp_path).classes == list(CLASSES), "or above"


def test_one_class_is_refused_in_archives_too(tmp_path: Path) -> None:
    """Its only answer is always right."""
    as_labelled(tmp_path, "cls", ["bee"] * 12)
    with pytest.raises(UsageError, match="has one class only, bee; there is nothing to tell apart"):
        load(settings("webdataset", tmp_path))


def test_train_and_test_alone_are_the_same_for_folders_tars_and_shards(tmp_path: Path) -> None:
    files = {name.replace("val/", "test/"): content for name, content in WHOLE.items()}
    write(tmp_path / "folder", files)
    for part in ("train", "test"):
        pack(tmp_path / f"tars/{part}.tar", below(files, part))
        pack(tmp_path / f"shards/{part}.tar", {
            f"{name.removesuffix('.png').replace('/', '_')}.{end}": content if end == "png" else name[:3].encode()
            for name, content in below(files, part).items() for end in ("png", "cls")
        })  # fmt: skip
    pack(tmp_path / "one.tar", files)
    sets = [("folder", "folder"), ("folder", "tars"), ("folder", "one.tar"), ("webdataset", "shards")]
    found = [load(settings(kind, tmp_path / name)) for kind, name in sets]
    assert [len(each.test) for each in found] == [6] * 4
    assert all(everything(each) == everything(found[0]) for each in found[1:])


# --- what counts as an image ------------------------------------------------------------------------------------------


def test_what_is_passed_over_is_counted_and_named(softmoe: Softmoe, tmp_path: Path) -> None:
    more: Files = {
        "ant/a.jfif": picture(90, kind="JPEG"), "ant/b.JPE": picture(91, kind="JPEG"), "bee/c.heic": b"",
        "bee/photo": b"", "bee/sub/d.HEIC": b"", "cat/e.jpg~": b"", "loose.png": picture(92), "cat/.DS_Store": b"",
        "dog.zip": b"",
    }  # fmt: skip
    root = write(tmp_path / "images", SMALL | more)
    found = listed("folder", root)
    assert images(found) == len(SMALL) + 2
    assert found.notes["passed over"] == (
        "2 .heic, 1 .jpg~, 1 .zip, 1 images beside the class folders, 1 without an ending; "
        "softmoe data check names them"
    )
    line = ("data", "check", "data=folder", "data.root=images", "data.workers=0")
    report, table = json.loads(softmoe(*line, "format=json").out), softmoe(*line)
    assert (
        table.code == 0 and "every image was read" not in table.out and "each of these 11 images was read" in table.out
    )
    assert [(each["kind"], each["files"]) for each in report["passed_over"]] == [
        (".heic", 2), (".jpg~", 1), (".zip", 1), ("hidden", 1), ("images beside the class folders", 1),
        ("without an ending", 1),
    ]  # fmt: skip
    assert "passed over: 2 .heic, such as images/bee/c.heic" in table.out
    assert load(settings("folder", root)).notes == found.notes, "for the header of a run"


def test_what_lies_beside_the_parts_is_passed_over(tmp_path: Path) -> None:
    files = WHOLE | {"extra/ant/0.png": picture(0), "train/loose.png": picture(1)}
    for found in (listed("folder", write(tmp_path / "a", files)), listed("folder", pack(tmp_path / "a.tar", files))):
        assert images(found) == len(WHOLE)
        assert {kind: count for kind, (count, _) in found.passed.kinds.items()} == {
            "files and folders beside the parts": 1, "images beside the class folders": 1,
        }  # fmt: skip


def test_the_header_of_a_run_says_what_it_does_not_see(softmoe: Softmoe, tmp_path: Path) -> None:
    """Labels from 1, and what is passed over."""
    as_labelled(tmp_path / "set", "cls", [1 + i % 3 for i in range(24)])
    (tmp_path / "set/1.tgz").write_bytes(b"")
    answer = softmoe(
        "train", *TINY, "data=webdataset", "data.root=set", "data.workers=0", "data.image_size=8", "model.image_size=8",
        "train.steps=1", "train.batch_size=4", "threads=1",
    )  # fmt: skip
    assert answer.code == 0, answer
    assert "without images   1 of 4 classes: 0 (labels begin with 1)" in answer.out
    assert "passed over      1 .tgz; softmoe data check names them" in answer.out


@pytest.mark.parametrize("kind", ["dangling", "circle", "pipe", "device", "socket"])
def test_what_is_no_file_is_named_and_not_waited_for(softmoe: Softmoe, tmp_path: Path, kind: str) -> None:
    odd = write(tmp_path / "images", SMALL) / "bee/odd.png"
    {
        "dangling": lambda: odd.symlink_to("/nowhere/object.png"), "circle": lambda: odd.symlink_to(odd),
        "pipe": lambda: os.mkfifo(odd), "device": lambda: odd.symlink_to("/dev/zero"),
        "socket": lambda: os.mknod(odd, stat.S_IFSOCK | 0o600),
    }[kind]()  # fmt: skip
    found = listed("folder", tmp_path / "images")
    words = "odd.png is a link that leads nowhere, a pipe or a device; get the image, or take it away"
    assert len(found.faults) == 1 and words in found.faults[0] and images(found) == len(SMALL)
    with pytest.raises(UsageError, match=words):
        load(settings("folder", tmp_path / "images"))
    with pytest.raises(OSError, match=r"no file but a pipe|No such|Too many levels"):
        Stored.files(tmp_path / "images", ["bee/odd.png"]).read(0)
    if kind == "dangling":
        answer = softmoe("data", "check", "data=folder", "data.root=images", "data.workers=0")
        assert answer.code == 1 and words in answer.out


def test_an_archive_that_is_no_file_is_named_and_not_waited_for(tmp_path: Path) -> None:
    pack(tmp_path / "0.tar", {"0.png": IMAGE, "0.cls": b"0"})
    os.mkfifo(tmp_path / "1.tar")
    refused_set("webdataset", tmp_path, r"1\.tar is a link that leads nowhere, a pipe or a device")


def test_files_larger_than_images_are_not_read(tmp_path: Path) -> None:
    write(tmp_path, SMALL)
    os.truncate(tmp_path / "bee/0.png", 2**40)  # takes no place on disk
    with pytest.raises(OSError, match="more than an image has"):
        Stored.files(tmp_path, ["bee/0.png"]).read(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everyone may look into, seen by somebody who may not look everywhere."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    user = os.geteuid()
    yield folder
    os.seteuid(user)
    for inner in [folder, *folder.rglob("*")]:
        inner.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("what", ["root", "class folder", "folder of shards", "shard", "classnames.txt", "records"])
def test_what_may_not_be_read_is_named(open_folder: Path, what: str) -> None:
    root = open_folder / "set"
    if what in ("root", "class folder"):
        write(root, SMALL)
    elif what == "records":
        as_tfds(root)
    else:
        shards(root / "data")
        (root / "more").mkdir()
        (root / "data/classnames.txt").write_text("a\nb\nc\n")
    place = {
        "root": root, "class folder": root / "ant", "folder of shards": root / "more",
        "shard": root / "data/set-train-001.tar", "classnames.txt": root / "data/classnames.txt",
        "records": root / "mine-train.tfrecord-00000-of-00002",
    }[what]  # fmt: skip
    place.chmod(0)
    if os.geteuid() == 0:
        os.seteuid(65534)
    kind = "folder" if what in ("root", "class folder") else "tfds" if what == "records" else "webdataset"
    refused_set(kind, root, rf"{place} cannot be read.*Permission denied")


def test_a_root_with_too_long_a_name(softmoe: Softmoe) -> None:
    answer = softmoe("data", "check", "data=folder", f"data.root={'x' * 300}")
    assert answer.code == 2 and "cannot be read: File name too long" in answer.err


@pytest.mark.parametrize(
    "line",
    [
        ("data", "check", "data=folder", "data.root="), ("train", "output_root="), ("train", "data.root=' '"),
        ("train", "data=webdataset", "data.root=x", "data.label="), ("evaluate", "checkpoint="),
        ("evaluate", "checkpoint=[' ']"), ("export", "checkpoint="), ("upcycle", "checkpoint="),
    ],
)  # fmt: skip
def test_empty_words_are_refused(softmoe: Softmoe, line: tuple[str, ...]) -> None:
    """`data.root=$DATA` where DATA is not set would read the working folder."""
    answer = softmoe(*line)
    assert answer.code == 2 and f"{line[-1].split('=')[0]}=" in answer.err and "is empty" in answer.err
    assert not os.listdir()


# --- labels -----------------------------------------------------------------------------------------------------------


# --- names ------------------------------------------------------------------------------------------------------------

ALIKE = {
    "forms": ("café", unicodedata.normalize("NFD", "café")), "mark": ("ant", "\ufeffant"),
    "joiner": ("ant", "an\u200bt"), "space": ("ant", "ant "), "no-break space": ("an ant", "an\xa0ant"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ALIKE)
def test_names_that_look_alike_are_told_apart(tmp_path: Path, kind: str) -> None:
    one, two = ALIKE[kind]
    parts = {f"{part}/{name}/0.png": picture(i) for i, name in enumerate(("dog", "x")) for part in ("train", "val")}
    write(tmp_path / "a", parts | {f"train/{one}/0.png": picture(5), f"val/{two}/0.png": picture(6)})
    different = listed("folder", tmp_path / "a").faults[0]
    assert "different classes" in different and ascii(one) in different and ascii(two) in different
    assert "(they look alike, but are written with other characters; write them alike)" in different
    write(tmp_path / "b", SMALL | {f"{one}/0.png": picture(5), f"{two}/0.png": picture(6)})
    assert any(
        f"{min(one, two)!a} and {max(one, two)!a} look alike" in f for f in listed("folder", tmp_path / "b").faults
    )


@pytest.mark.parametrize("packed", [False, True])
def test_names_that_a_terminal_would_obey_are_escaped(softmoe: Softmoe, tmp_path: Path, packed: bool) -> None:
    odd = ["gu\x1b[31mrken", "ni\udcf1o", "a\u202eb"]
    files = (
        SMALL | {f"{name}/{name}.png": b"no image" for name in odd} | {f"bee/\x1b]0;x\x07{i}.txt": b"" for i in "12"}
    )
    root = pack(tmp_path / "i.tar", files) if packed else write(tmp_path / "i", files)
    answer = softmoe("data", "check", "data=folder", f"data.root={root.name}", "data.workers=0", "data.test_fraction=1")
    assert answer.code == 1 and "Traceback" not in answer.err
    assert not [c for c in answer.out if not c.isprintable() and c != "\n"]
    for name in (r"gu\x1b[31mrken", r"ni\xf1o", r"a\u202eb"):
        assert f"{root.name}/{name}/{name}.png is not an image" in answer.out
    assert "passed over: 2 .txt, such as" in answer.out
    classes = listed("folder", root).classes
    assert r"ni\xf1o" in classes and all(name.encode() for name in classes)


def test_one_long_name_does_not_widen_all(tmp_path: Path) -> None:
    names = {f"{'y' * 3_000_000 if i == 7 else i}.png": b"x" for i in range(12)}
    path = pack(tmp_path / "0.tar", {f"{k}/{name}": content for k in "ab" for name, content in names.items()})
    refused_set("folder", path, rf"0\.tar has a name of 3,000,00\d letters, .*; {LONGEST_NAME} are enough")


# --- what files say beside their pixels -------------------------------------------------------------------------------


def test_turned_transparent_and_moving_pictures_are_counted(softmoe: Softmoe, tmp_path: Path) -> None:
    root = write(tmp_path / "images", SMALL)
    image = Image.open(io.BytesIO(picture(7, (12, 8))))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(root / "ant/turned.jpg", exif=exif, quality=95)
    image.save(root / "bee/turned.png", exif=exif)
    image.save(root / "bee/turned.webp", exif=exif, lossless=True)
    image.convert("RGBA").rotate(10).save(root / "cat/alpha.png")
    image.rotate(20).convert("P").save(root / "cat/moving.gif", save_all=True, append_images=[image.convert("P")])
    line = ("data", "check", "data=folder", "data.root=images", "data.workers=0", "data.test_fraction=1")
    report = json.loads(softmoe(*line, "format=json").out)
    assert [note.split(" ", 3)[:3] for note in report["notes"]] == [
        ["3", "images", "have"], ["1", "images", "have"], ["1", "images", "have"],
    ]  # fmt: skip
    assert report["parts"][0]["width_max"] == 12, "unturned"
    assert "note: 3 images have an EXIF orientation other than 1; they are seen as they lie in" in softmoe(*line).out


# --- damaged Arrow files ----------------------------------------------------------------------------------------------
