"""What makes images another set, and what does not; and that few bytes are read for it."""

import gzip
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from softmoe_cli.config.data import Data
from softmoe_cli.data import contents
from softmoe_cli.data.archives import Stored
from softmoe_cli.data.contents import identity
from softmoe_cli.errors import UsageError
from softmoe_cli.run.identity import run_folder
from tests.conftest import thinned
from tests.images import CLASSES, as_arrow, as_part_tars, as_tfds, picture, settings, shards, write
from tests.oracles import compose


def grey(number: int, kind: str = "BMP", side: int = 8) -> bytes:
    """Of one size whatever is on it."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)).save(out, kind)
    return out.getvalue()


def folder(root: Path, first: int = 0, kind: str = "BMP", side: int = 8) -> Data:
    files = {f"{name}/{i}.{kind}": grey(first + i, kind, side) for name in CLASSES for i in range(3)}
    return settings("folder", write(root, {name.lower(): content for name, content in files.items()}))


def test_a_long_reading_is_said_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder(tmp_path, first=200)
    identity(data)
    assert capsys.readouterr().err == "", "of so few images"
    monkeypatch.setattr(contents, "MANY", 6)
    monkeypatch.setattr(contents, "_known", {})
    identity(data)
    assert capsys.readouterr().err.startswith("softmoe: reading 9 images once")
    identity(data)
    assert capsys.readouterr().err == "", "they are known"


@pytest.mark.parametrize("kind", ["BMP", "PPM", "TIFF"])
def test_other_pictures_of_the_same_names_and_sizes_are_another_set(tmp_path: Path, kind: str) -> None:
    a, b = folder(tmp_path / "a", kind=kind), folder(tmp_path / "b", first=100, kind=kind)
    sizes = [sorted((path.name, path.stat().st_size) for path in Path(data.root).rglob("*.*")) for data in (a, b)]
    assert sizes[0] == sizes[1]
    assert identity(a) != identity(b)


def test_the_same_set_elsewhere_is_the_same_whatever_the_clock_says(tmp_path: Path) -> None:
    a = folder(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b")
    for time in (1e9, -1e9):  # an old camera's card, or a tar without times, may say 1938
        for path in (tmp_path / "elsewhere").rglob("*"):
            os.utime(path, (time, time))
        assert identity(a) == identity(settings("folder", tmp_path / "elsewhere" / "b"))


def test_a_file_that_is_overwritten_in_place_is_another_one_whatever_the_clock_says(tmp_path: Path) -> None:
    data = folder(tmp_path)
    before, path = identity(data), tmp_path / CLASSES[1] / "2.bmp"
    times = path.stat()
    path.write_bytes(grey(77))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert identity(data) != before
    path.write_bytes(grey(2))
    assert identity(data) == before


def test_two_file_systems_may_have_the_same_inodes_and_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that keep seconds only and count their inodes themselves, such as one that is mounted over ssh."""
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b", first=100)

    def alike(path: bytes) -> SimpleNamespace:
        return SimpleNamespace(st_size=os.stat(path).st_size, st_ino=2, st_mtime_ns=10**9, st_ctime_ns=10**9)

    monkeypatch.setattr(contents, "os", SimpleNamespace(**vars(os) | {"stat": alike}))
    assert identity(a) != identity(b)


def test_labels_and_parts_count(tmp_path: Path) -> None:
    found = {identity(folder(tmp_path / "a"))}
    os.rename(tmp_path / "a" / CLASSES[0] / "0.bmp", tmp_path / "a" / CLASSES[1] / "7.bmp")
    found.add(identity(settings("folder", tmp_path / "a")))
    for part in ("train", "val"):
        shutil.copytree(tmp_path / "a", tmp_path / "b" / part)
    found.add(identity(settings("folder", tmp_path / "b")))
    assert len(found) == 3


@pytest.mark.parametrize(
    ("kind", "make", "file", "change"),
    [
        ("webdataset", shards, "classnames.txt", lambda _: "apple\nbear\ncrab"),
        ("webdataset", shards, "classnames.txt", lambda _: "apple\nbear\ncrab\ndeer"),
        ("tfds", as_tfds, "label.labels.txt", lambda text: text.replace(CLASSES[0], "zebra")),
        ("arrow", as_arrow, "dataset_info.json", lambda text: text.replace(CLASSES[0], "zebra")),
    ],
)
def test_names_of_classes_count_wherever_they_stand(
    tmp_path: Path, kind: str, make: Callable[[Path], Path], file: str, change: Callable[[str], str]
) -> None:
    data = settings(kind, make(tmp_path))
    before = identity(data)
    for path in [*tmp_path.rglob(file)] or [tmp_path / file]:
        path.write_text(change(path.read_text() if path.exists() else ""))
    assert identity(data) != before


@pytest.mark.parametrize(("kind", "make"), [("folder", as_part_tars), ("webdataset", shards), ("tfds", as_tfds)])
def test_one_image_of_an_archive_counts(tmp_path: Path, kind: str, make: Callable[[Path], Path]) -> None:
    """A byte in the middle of one image of a hundred thousand, as it were: no name, size or place changes."""
    data = settings(kind, make(tmp_path))
    before = identity(data)
    archive = max(tmp_path.rglob("*tar*") if kind != "tfds" else tmp_path.rglob("*tfrecord*"))
    raw, image = archive.read_bytes(), picture(101)
    at = next(raw.find(picture(n)) for n in range(110) if picture(n) in raw) + len(image) // 2
    archive.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    assert identity(data) != before


@pytest.mark.parametrize("kind", thinned(["BMP", "PPM", "GIF"], 1))
def test_every_byte_of_what_is_not_compressed_counts(tmp_path: Path, kind: str) -> None:
    data = folder(tmp_path, kind=kind, side=600)  # 1,080,000 bytes, GIF fewer
    before, path = identity(data), tmp_path / CLASSES[0] / f"0.{kind.lower()}"
    raw = bytearray(path.read_bytes())
    assert len(raw) > contents.READ_WHOLE
    raw[len(raw) // 2 + 1234] ^= 1
    path.write_bytes(raw)
    assert identity(data) != before


def test_of_what_is_compressed_pieces_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PNG ends with a checksum of all that it shows, so that the last piece says that any other is another."""
    data = folder(tmp_path, kind="PNG", side=340)
    size = (tmp_path / CLASSES[0] / "0.png").stat().st_size
    asked: list[int] = []
    pread = os.pread

    def read(file: int, count: int, at: int) -> bytes:
        asked.append(count)
        return pread(file, count, at)

    monkeypatch.setattr(os, "pread", read)
    before = identity(data)
    assert size > contents.READ_WHOLE and sum(asked) <= 9 * 17 * 1024
    folder(tmp_path, first=50, kind="PNG", side=340)
    assert identity(data) != before


def test_what_is_known_is_not_read_again_here_or_in_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder(tmp_path)
    before = identity(data)

    def read(*_: object) -> bytes:
        raise AssertionError("it is read again")

    monkeypatch.setattr(contents, "_pictures", read)
    assert identity(data) == before
    monkeypatch.setenv(contents.KNOWN, contents.known())
    monkeypatch.setattr(contents, "_known", {})
    assert identity(data) == before
    (tmp_path / CLASSES[0] / "0.bmp").write_bytes(grey(5))
    with pytest.raises(AssertionError, match="read again"):
        identity(data)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    data = folder(tmp_path)
    path = tmp_path / CLASSES[2] / "1.bmp"
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"1\.bmp"):
        identity(data)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UsageError, match=r"1\.bmp"):
        identity(data)


def fashion(root: Path, seed: int = 0, packed: bool = False) -> Data:
    """A set by Fashion-MNIST's names, as MNIST and KMNIST are, too."""
    rng = np.random.default_rng(seed)
    root.mkdir()
    for part, count in (("train", 40), ("t10k", 20)):
        pictures, labels = rng.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", pictures), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            raw = head + array.tobytes()
            place = root / f"{part}-{kind}-ubyte"
            if packed:
                place.with_name(place.name + ".gz").write_bytes(gzip.compress(raw))
            else:
                place.write_bytes(raw)
    data = compose("data=fashion_mnist").data
    data.root = str(root)
    return data


def test_other_sets_by_the_names_of_fashion_mnist_are_other_sets(tmp_path: Path) -> None:
    a, b = fashion(tmp_path / "a"), fashion(tmp_path / "b", seed=1)
    assert identity(a) != identity(b)
    assert identity(a) == identity(fashion(tmp_path / "packed", packed=True))


def test_two_sets_are_two_runs(tmp_path: Path) -> None:
    """As in a sweep over data.root."""
    config = compose("data=folder", "data.root=x", "data.image_size=8")
    runs = {
        run_folder(config, "train", None, identity(folder(tmp_path / name, first)))
        for name, first in (("a", 0), ("b", 9))
    }
    assert len(runs) == 2


def test_names_of_classes_cannot_be_written_as_two() -> None:
    nothing: dict[str, tuple[Stored, np.ndarray]] = {}
    assert contents.digest(nothing, ["a", "b"]) != contents.digest(nothing, ['a", "b'])
