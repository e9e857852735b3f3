"""Archives: the same images from folders, tars, WebDataset, TFDS and Arrow files; damaged ones; exact resumption."""

import io
import itertools
import json
import os
import shutil
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from softmoe_cli.data.archives import Stored
from softmoe_cli.data.batches import eval_batches, train_batches
from softmoe_cli.data.contents import identity
from softmoe_cli.data.order import CUT, stream
from softmoe_cli.data.sets import load
from softmoe_cli.errors import UsageError
from tests.conftest import TINY
from tests.images import (
    CLASSES,
    CPU,
    IMAGE,
    SIDE,
    WHOLE,
    Files,
    as_arrow,
    as_part_tars,
    as_tfds,
    below,
    contents,
    everything,
    example,
    pack,
    picture,
    records,
    settings,
    shards,
    write,
)
from tests.oracles import compose
from tests.processes import Started, until


def as_class_tars(root: Path) -> Path:
    for part, name in itertools.product(("train", "val"), CLASSES):
        pack(root / part / f"{name}.tar", below(WHOLE, f"{part}/{name}"))
    return root


def as_one_tar(root: Path) -> Path:
    return pack(root / "all.tar", {f"./{name}": content for name, content in WHOLE.items()})


def as_packed_folder(root: Path) -> Path:
    return pack(root / "all.tar", {f"my images/{name}": content for name, content in WHOLE.items()})


@pytest.mark.parametrize("pack_as", [as_part_tars, as_class_tars, as_one_tar, as_packed_folder])
@pytest.mark.parametrize("memory", [0.0, 1.0])
def test_tars_are_the_folder_that_was_packed(tmp_path: Path, pack_as: object, memory: float) -> None:
    assert callable(pack_as)
    folder = load(settings("folder", write(tmp_path / "folder", WHOLE)))
    packed = load(settings("folder", pack_as(tmp_path / "packed"), memory_gib=memory))
    assert packed.classes == folder.classes == list(CLASSES)
    assert (packed.test.images is None) == (memory == 0)
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(packed, part).labels, getattr(folder, part).labels)
        assert contents(getattr(packed, part)) == contents(getattr(folder, part))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.png": picture(0)}, "has no class folders"), ({}, "has no class folders"),
        ({"train/ant/0.png": picture(0)}, "has train only"),
        ({"x/ant/0.png": picture(0)}, "one class folder only, ant"),
    ],
)  # fmt: skip
def test_tars_without_classes_are_refused(tmp_path: Path, files: Files, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load(settings("folder", pack(tmp_path / "a.tar", files)))


@pytest.mark.parametrize("damage", ["compressed", "cut", "text"])
def test_damaged_tars_are_refused(tmp_path: Path, damage: str) -> None:
    path = pack(tmp_path / "a.tar", WHOLE, mode="w:gz" if damage == "compressed" else "w")
    if damage != "compressed":
        path.write_bytes(path.read_bytes()[:5000] if damage == "cut" else b"no tar")
    with pytest.raises(UsageError, match=r"a\.tar cannot be read as a tar: .*; it must be uncompressed and whole"):
        load(settings("folder", path))


@pytest.mark.parametrize("damage", ["cut", "cut in a header", "flipped", "appended", "no end"])
def test_a_tar_that_does_not_end_where_tars_end_is_refused(tmp_path: Path, damage: str) -> None:
    """tarfile itself stops without a word at a header that it cannot read."""
    path = pack(tmp_path / "a.tar", WHOLE)
    raw = path.read_bytes()
    with tarfile.open(path) as tar:
        middle = tar.getmembers()[20].offset
    broken = {
        "cut": raw[:middle],
        "cut in a header": raw[: middle + 100],
        "flipped": raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :],
        "appended": raw + raw,
        "no end": raw[: len(raw.rstrip(b"\0")) // 512 * 512 + 512],
    }
    path.write_bytes(broken[damage])
    with pytest.raises(UsageError, match=r"a\.tar cannot be read as a tar: its end, at byte \d+, is no end of a tar"):
        load(settings("folder", path))


def test_images_that_are_links_or_twice_in_a_tar_are_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", WHOLE)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("train/ant/linked.png")
        link.type, link.linkname = tarfile.LNKTYPE, "train/ant/0.png"
        tar.addfile(link)
    with pytest.raises(UsageError, match=r"linked\.png is a link, sparse, or no file"):
        load(settings("folder", path))
    twice = pack(tmp_path / "b.tar", WHOLE)
    pack(twice, {"train/ant/0.png": picture(900)}, mode="a")
    with pytest.raises(UsageError, match=r"b\.tar holds train/ant/0\.png twice"):
        load(settings("folder", twice))


def test_parts_in_a_tar_are_in_small_letters_and_hidden_images_are_none(tmp_path: Path) -> None:
    renamed = {name.replace("train/", "Training/"): content for name, content in WHOLE.items()}
    with pytest.raises(UsageError, match="Training must be called train"):
        load(settings("folder", pack(tmp_path / "a.tar", renamed)))
    more = WHOLE | dict.fromkeys(("train/ant/.thumbs/1.png", "train/ant/@eaDir/1.png", "._x/0.png"), picture(1))
    plain, hidden = (load(settings("folder", pack(tmp_path / f"{i}.tar", f))) for i, f in enumerate((WHOLE, more)))
    assert everything(plain) == everything(hidden)


def test_an_archive_that_changes_under_a_run_is_named(tmp_path: Path) -> None:
    path = as_one_tar(tmp_path)
    data = settings("folder", path, memory_gib=0)
    test = load(data).test
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UsageError, match=r"all\.tar/.*png is not an image that can be read: .*has become shorter"):
        list(eval_batches(test, data, image_size=SIDE, in_chans=3, batch_size=7, device=CPU))


def test_identity_of_archives_is_what_they_hold(tmp_path: Path) -> None:
    a, b = as_part_tars(tmp_path / "a"), as_part_tars(tmp_path / "b")
    assert identity(settings("folder", a)) == identity(settings("folder", b)) is not None
    pack(b / "val.tar", below(WHOLE, "val") | {"ant/more.png": picture(7)})
    assert identity(settings("folder", a)) != identity(settings("folder", b))


def test_places_are_cut_and_joined() -> None:
    a, b = Stored.files(Path("a"), ["x.png", "ä.png"]), Stored.ranges(Path("b.tar"), [("y.png", 5, 7)])
    joined = Stored.joined([a, b, a])
    assert list(map(str, joined.places)) == ["a/x.png", "a/ä.png", "b.tar/y.png", "a/x.png", "a/ä.png"]
    assert joined.holders == (Path("a"), Path("b.tar"))
    cut = joined.subset(np.array([2, 0]))
    assert list(map(str, cut.places)) == ["b.tar/y.png", "a/x.png"]
    assert cut.offset.tolist() == [5, -1] and cut.size.tolist() == [7, -1]
    assert len(Stored.joined([])) == len(joined.subset(np.arange(0))) == 0


@pytest.mark.parametrize(
    ("label", "key", "names"),
    [
        ("number", None, "set-{}-{:03d}.tar"), ("name", None, "{}/{:03d}.tar"), ("number", "kind", "a_{}{:03d}.tar"),
        ("number", "number", "validation/{}idation-{:d}.tar"),
    ],
)  # fmt: skip
def test_webdatasets_are_the_folder_they_were_made_from(
    tmp_path: Path, label: str, key: str | None, names: str
) -> None:
    names = names.replace("validation/{}idation", "x/{}")
    folder = load(settings("folder", write(tmp_path / "folder", WHOLE)))
    root = shards(tmp_path / "shards", label, names)
    if label == "number" and key != "kind":
        (root / "classnames.txt").write_text("\n".join(CLASSES))
    read = load(settings("webdataset", root, label=key))
    assert read.classes == list(CLASSES)
    assert everything(read) == everything(folder)


def test_parts_of_shards_and_classes_without_names(tmp_path: Path) -> None:
    shards(tmp_path, names="{}-{:03d}.tar")
    assert load(settings("webdataset", tmp_path)).classes == ["0", "1", "2"]
    for shard in tmp_path.glob("val-*.tar"):
        shard.rename(shard.with_name(shard.name.replace("val-", "test.")))
    assert len(load(settings("webdataset", tmp_path)).test) == 6
    assert len(load(settings("webdataset", tmp_path, test_fraction=1.0)).test) == 6
    for shard in tmp_path.glob("test*.tar"):
        shard.unlink()
    single = load(settings("webdataset", tmp_path, test_fraction=0.3))
    assert [len(single.train), len(single.validation), len(single.test)] == [18, 3, 9]
    only = load(settings("webdataset", tmp_path, test_fraction=1))
    assert len(only.test) == 30 and not len(only.train)
    with pytest.raises(UsageError, match=r"there are no train images: with data\.test_fraction=1"):
        only.need("train")
    pack(tmp_path / "more.tar", {"a.png": picture(0), "a.cls": b"0"})
    with pytest.raises(UsageError, match=r"more\.tar does not say whether it is train, val or test"):
        load(settings("webdataset", tmp_path))


FAULTY: dict[str, tuple[Files, str]] = {
    "no image": ({"a.cls": b"0"}, "sample a has 0 images"),
    "two images": ({"a.png": IMAGE, "a.jpg": IMAGE, "a.cls": b"0"}, "sample a has 2 images"),
    "no label": ({"a.png": IMAGE, "a.txt": b"0"}, r"sample a has no \.cls, only \.png, \.txt"),
    "unlabelled": ({"a.png": IMAGE, "a.cls": b"-1"}, "its label '-1' is neither"),
    "empty label": ({"a.png": IMAGE, "a.cls": b" "}, "its label '' is neither"),
    "mixed": (
        {"a.png": IMAGE, "a.cls": b"0", "b.png": IMAGE, "b.cls": b"bee"},
        "numbers for labels, such as 0 in .*, and names, such as 'bee'",
    ),
    "twice": ({"a.png": IMAGE, "a.PNG": IMAGE, "a.cls": b"0"}, r"holds a\.PNG twice"),
    "nothing": ({}, "holds no image"),
    "too few names": ({"a.png": IMAGE, "a.cls": b"7"}, r"classnames\.txt names 1 classes, but .*a\.tar has a label 7"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_faulty_shards_are_refused(tmp_path: Path, name: str) -> None:
    files, words = FAULTY[name]
    pack(tmp_path / "a.tar", files)
    if name == "too few names":
        (tmp_path / "classnames.txt").write_text("ant\n")
    with pytest.raises(UsageError, match=words):
        load(settings("webdataset", tmp_path))


def test_a_part_without_images_is_refused(tmp_path: Path) -> None:
    pack(tmp_path / "train-0.tar", {})
    pack(tmp_path / "train-1.tar", {})
    pack(
        tmp_path / "val-0.tar",
        {f"{i}{end}": b"%d" % (i % 2) if end == ".cls" else IMAGE for i in range(4) for end in (".png", ".cls")},
    )
    with pytest.raises(UsageError, match=r"train-0\.tar holds no image, nor do the 1 others of train"):
        load(settings("webdataset", tmp_path))


def test_json_labels_that_are_not_there(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", {"a.png": IMAGE, "a.json": b'{"kind": 1.5}'})
    for key, words in {"sort": r"holds no data\.label=sort", "kind": "its label 1.5 is neither"}.items():
        with pytest.raises(UsageError, match=words):
            load(settings("webdataset", tmp_path, label=key))
    with pytest.raises(UsageError, match=r"holds no file of data\.format=webdataset"):
        load(settings("webdataset", write(tmp_path / "empty", {"x": b""})))


@pytest.mark.parametrize("label", ["label", "kind"])
def test_tfds_files_are_the_folder_they_were_made_from(tmp_path: Path, label: str) -> None:
    folder = load(settings("folder", write(tmp_path / "folder", WHOLE)))
    read = load(settings("tfds", as_tfds(tmp_path / "tfds", label), label=None if label == "label" else label))
    assert read.classes == list(CLASSES)
    assert everything(read) == everything(folder)


@pytest.mark.parametrize(
    "features",
    [
        {"image": IMAGE}, {"label": 1}, {"image": IMAGE, "label": 0.5}, {"image": IMAGE, "label": [1, 2]},
        {"image": IMAGE, "label": -1}, {"image": 3, "label": 3}, {"image": IMAGE, "label": []},
    ],
)  # fmt: skip
def test_other_records_are_refused(tmp_path: Path, features: dict[str, bytes | int | list[int] | float]) -> None:
    good = example({"image": IMAGE, "label": 300})
    records(tmp_path / "a.tfrecord-00000-of-00001", [good, example(features)])
    with pytest.raises(UsageError, match="record 1 is no Example with one encoded `image`"):
        load(settings("tfds", tmp_path))
    path = records(tmp_path / "a.tfrecord-00000-of-00001", [good, good])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UsageError, match="is cut short, or no TFRecord file: record 1 ends beyond it"):
        load(settings("tfds", tmp_path))


def test_arrow_files_are_the_folder_they_were_made_from(tmp_path: Path) -> None:
    folder = load(settings("folder", write(tmp_path / "folder", WHOLE)))
    root = as_arrow(tmp_path / "arrow", "kind")
    for data in (settings("arrow", root), settings("arrow", root, label="kind")):
        read = load(data)
        assert read.classes == list(CLASSES)
        assert everything(read) == everything(folder)
    with pytest.raises(UsageError, match=r"has columns img \(Image\), kind \(ClassLabel\); one must be an Image"):
        load(settings("arrow", root, label="sort"))
    (root / "train" / "cache-1f2e.arrow").write_bytes(b"what a program of Hugging Face's left there")
    assert everything(load(settings("arrow", root))) == everything(folder)
    shutil.copytree(root, tmp_path / "copies")
    for file in (tmp_path / "copies").glob("*/data-*.arrow"):
        file.rename(file.with_name("cache-1f2e.arrow"))
    with pytest.raises(UsageError, match=r"holds cached copies only \(cache-"):
        load(settings("arrow", tmp_path / "copies"))
    (root / "train" / "data-00000-of-00001.arrow").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="is no Arrow file with images in img"):
        load(settings("arrow", root))


@pytest.mark.parametrize("label", [-1, 0.5])
def test_arrow_labels_that_are_none_are_refused(tmp_path: Path, label: float) -> None:
    """-1 is how Hugging Face has images without a label."""
    pa = pytest.importorskip("pyarrow")
    root = as_arrow(tmp_path)
    table = pa.table({"img": pa.array([{"bytes": picture(0), "path": "0.png"}]), "label": [label]})
    with pa.OSFile(str(root / "test/data-00000-of-00001.arrow"), "wb") as f, pa.ipc.new_stream(f, table.schema) as out:
        out.write_table(table)
    with pytest.raises(UsageError, match=f"its label {label} is neither a number from 0 nor a name"):
        load(settings("arrow", root))


def test_sets_of_which_files_are_missing_are_refused(tmp_path: Path) -> None:
    root = as_tfds(tmp_path / "part-1-of-4")
    load(settings("tfds", root))
    (root / "mine-train.tfrecord-00001-of-00002").unlink()
    with pytest.raises(UsageError, match="1 files are there of 2"):
        load(settings("tfds", root))


# --- timm's transforms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (61, 333), (90, 80)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0, 0.9])
def test_evaluation_sees_what_timm_shows(tmp_path: Path, size: tuple[int, int], crop_pct: float) -> None:
    """Of floor(side / crop_pct) pixels the centre."""
    write(tmp_path, {f"{name}/0.jpg": picture(i, size, "JPEG") for i, name in enumerate(CLASSES)})
    data = settings("folder", tmp_path, crop_pct=crop_pct, from_file=True, test_fraction=1, mean=[0.0], std=[1.0])
    images = load(data).test
    (x, *_), *_ = eval_batches(images, data, image_size=64, in_chans=3, batch_size=3, device=CPU)
    timm = create_transform(64, interpolation="bicubic", crop_pct=crop_pct, mean=(0, 0, 0), std=(1, 1, 1))
    assert images.files is not None
    for i, place in enumerate(images.files.places):
        want = timm(Image.open(place))
        assert isinstance(want, Tensor)
        assert torch.equal(x[i], want)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_sees_what_timm_shows(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crop, resizing and mirroring to the bit, with torchvision's draws of the same law instead of timm's."""
    from softmoe_cli.data.batches import _Changes

    write(tmp_path, {f"{name}/0.jpg": picture(i, (90, 70), "JPEG") for i, name in enumerate(CLASSES)})
    data = settings("folder", tmp_path, from_file=True, test_fraction=1, mean=[0.4], std=[0.2], workers=workers)
    change = compose("data=imagenet", "data.root=x").augment
    assert (change.crop, change.area, change.hflip) == ("resized", 0.08, 0.5)
    timm = create_transform(
        64, is_training=True, interpolation="bicubic", color_jitter=None, mean=(0.4,) * 3, std=(0.2,) * 3
    )
    crop = timm.transforms[0]
    monkeypatch.setattr(type(crop), "get_params", staticmethod(RandomResizedCrop.get_params))
    assert (tuple(crop.scale), crop.ratio) == ((0.08, 1.0), (3 / 4, 4 / 3))
    images, size = load(data).test, 5
    assert images.files is not None

    def ours(first_step: int, rows: Tensor | slice = slice(None)) -> list[Tensor]:
        found = train_batches(
            images, data, change, image_size=64, in_chans=3, num_classes=3, batch_size=size, label_smoothing=0.0,
            seed=3, first_step=first_step, device=CPU, rows=rows,
        )  # fmt: skip
        return [x for x, *_ in itertools.islice(found, 4 - first_step)]

    whole, drawn = ours(0), _Changes(change, True, 3, size, slice(None))
    for step, index in zip(range(4), stream(3, size, 3, 0), strict=False):
        want = []
        seeds = drawn.seeds(drawn.chance(step, CUT)).tolist()
        for i, seed in zip(index.tolist(), seeds, strict=True):
            torch.manual_seed(seed)
            want.append(timm(Image.open(images.files.places[i])))
        torch.testing.assert_close(whole[step], torch.stack(want), atol=1e-6, rtol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(ours(2), whole[2:], strict=True))
    own = torch.tensor([1, 4])
    assert all(torch.equal(a, b[own]) for a, b in zip(ours(0, own), whole, strict=True)), (
        "as each process reads its own"
    )


# --- exact resumption -------------------------------------------------------------------------------------------------

SHARDS, PER_SHARD = 8, 2500


@pytest.fixture(scope="module")
def twenty_thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return numbered(tmp_path_factory.mktemp("shards"), PER_SHARD)


def numbered(root: Path, per_shard: int) -> Path:
    """Eight shards of images; each one's first two pixels are its number, and its label the number mod 10."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (SHARDS * per_shard, 64), dtype=np.uint8)
    for shard in range(SHARDS):
        with tarfile.open(root / f"tiny-{shard:03d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(shard * per_shard, (shard + 1) * per_shard):
                pixels = bytes(divmod(number, 256)) + noise[number, 2:].tobytes()
                files = {"pgm": b"P5 8 8 255\n" + pixels, "cls": b"%d" % (number % 10)}
                for ending, content in files.items():
                    info = tarfile.TarInfo(f"{number:06d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return root


LINE = (
    "train", *TINY, "threads=1", "data=webdataset", "data.image_size=8", "data.channels=1", "data.memory_gib=0",
    "data.hflip=0", "data.shift=0", "train.batch_size=25", "train.steps=240", "train.log_every=1",
    "train.eval_every=240", "data.validation_fraction=0.01", "data.test_fraction=0.01", "train.eval_batch_size=200",
    "train.save_seconds=0", "optim.lr=1e-3",
)  # fmt: skip


def rows(folder: Path) -> list[dict[str, object]]:
    texts = [path.read_text() for path in folder.glob("outputs/*/*/metrics.jsonl")]
    return [json.loads(line) for text in texts for line in text.splitlines() if line.endswith("}")]


def untimed(row: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in row.items() if not key.endswith(("_s", "_kj"))}


@pytest.mark.long
@pytest.mark.thorough
def test_a_kill_in_the_middle_of_a_shard_resumes_at_the_exact_sample(twenty_thousand: Path, tmp_path: Path) -> None:
    line = [*LINE, f"data.root={twenty_thousand}"]
    alone = Started(tmp_path / "whole", [*line, "data.workers=0"], {})
    killed = Started(tmp_path / "killed", [*line, "data.workers=0"], {})
    saved = tmp_path / "killed" / "outputs"
    until(lambda: list(saved.glob("*/*/checkpoints/last-*")) and len(rows(tmp_path / "killed")) >= 40, killed)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait()[0] == -signal.SIGKILL
    stopped = len(rows(tmp_path / "killed"))
    assert stopped < 240
    code, out = Started(tmp_path / "killed", [*line, "data.workers=1"], {}).wait()
    assert code == 0 and "going on from step" in out, out
    assert alone.wait()[0] == 0
    whole, resumed = ([untimed(row) for row in rows(tmp_path / name)] for name in ("whole", "killed"))
    assert resumed == whole and len(whole) == 240 + 2


@pytest.mark.parametrize("per_shard", [250, pytest.param(PER_SHARD, marks=pytest.mark.thorough)])
def test_which_samples_a_step_consumes_is_a_function_of_seed_and_step(per_shard: int, tmp_path: Path) -> None:
    """By the numbers that the decoded pixels hold: an epoch has each training image once, and goes on from anywhere."""
    root, total = numbered(tmp_path, per_shard), SHARDS * per_shard
    data = compose(*LINE[1:], f"data.root={root}", "data.mean=[0]", "data.std=[1]", "data.workers=0").data
    change = compose(*LINE[1:], "data.root=x").augment
    splits = load(data)
    parts = (splits.train, splits.validation, splits.test)
    trained = total * 98 // 100
    assert [len(part) for part in parts] == [trained, total // 100, total // 100]
    size, last = total // 20, 19

    def numbers(first_step: int, steps: int) -> list[list[int]]:
        found = train_batches(
            splits.train, data, change, image_size=8, in_chans=1, num_classes=10, batch_size=size, label_smoothing=0.0,
            seed=0, first_step=first_step, device=CPU,
        )  # fmt: skip
        return [_numbers(x, y.argmax(1)) for x, y, _ in itertools.islice(found, steps)]

    whole = numbers(0, last + 1)
    epoch = [number for step in whole for number in step][:trained]
    held = [
        number
        for part in parts[1:]
        for x, y, _ in eval_batches(part, data, image_size=8, in_chans=1, batch_size=64, device=CPU)
        for number in _numbers(x, y)
    ]
    assert sorted(epoch + held) == list(range(total))
    assert numbers(7, 2) == whole[7:9]
    begun = [sum(number // per_shard == shard for number in epoch[: 7 * size]) for shard in range(SHARDS)]
    assert all(0 < count < per_shard * 49 // 50 for count in begun)  # step 7 is in the middle of every shard


def _numbers(x: Tensor, labels: Tensor) -> list[int]:
    first = x[:, 0, 0, :2].mul(255).round().long()
    found: list[int] = (256 * first[:, 0] + first[:, 1]).tolist()
    assert [number % 10 for number in found] == labels.tolist()
    return found
