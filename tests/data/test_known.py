"""The sets that softmoe knows: digits, and files of Fashion-MNIST's kind."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from softmoe_cli.data import found
from softmoe_cli.data.found import idx_paths, read_idx
from softmoe_cli.data.sets import is_here, load
from softmoe_cli.errors import UsageError
from tests.data.trees import pixels, same
from tests.mixes import write_clothes
from tests.oracles import compose


def test_digits_are_split_once_and_for_all() -> None:
    splits = load(compose("data=digits").data)
    sets = [splits.train, splits.validation, splits.test]
    assert [len(one) for one in sets] == [1295, 143, 359]
    assert same(splits, load(compose("data=digits", "seed=5").data))
    assert not same(splits, load(compose("data=digits", "data.split_seed=1").data))
    from sklearn.datasets import load_digits

    source = load_digits()
    want = sorted(
        (int(label), tuple(np.rint(image * 255 / 16).astype(int).ravel().tolist()))
        for label, image in zip(source.target, source.images, strict=True)
    )
    got = sorted(
        (label, tuple(image.flatten().tolist()))
        for one in sets
        for label, image in zip(one.labels.tolist(), pixels(one), strict=True)
    )
    assert got == want  # together they are the whole set, each image once
    for one in sets:
        share = one.labels.bincount(minlength=10) / len(one)
        assert (share - torch.as_tensor(np.bincount(source.target)) / 1797).abs().max() < 0.01


CUBE = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)

IDX = b"\x00\x00\x08\x03" + np.array(CUBE.shape, ">u4").tobytes() + CUBE.tobytes()

PACKED = gzip.compress(IDX)


def test_read_idx(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(IDX)
    (tmp_path / "packed.gz").write_bytes(gzip.compress(IDX))
    for name in ("plain", "packed.gz"):
        assert (read_idx(tmp_path / name) == CUBE).all()
        assert read_idx(tmp_path / name).dtype == np.uint8


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("short", IDX[:-1], "short is cut short: 39 bytes where its header promises 40"),
        ("long", IDX + b"x", "long is too long: more bytes where its header promises 40"),
        pytest.param("header", IDX[:9], "header is cut short"),
        ("empty", b"", "empty is no idx file"),
        ("floats", b"\x00\x00\x0d" + IDX[3:], "floats is no idx file of bytes: it must begin with 00 00 08"),
        ("short.gz", gzip.compress(IDX[:-1]), "cut short"),
        ("broken.gz", gzip.compress(IDX)[:-12], r"broken\.gz cannot be read"),
        pytest.param(
            "damaged.gz",
            PACKED[:12] + b"\xff" * 8 + PACKED[20:],
            r"damaged\.gz cannot be read",
        ),
        ("plain.gz", IDX, r"plain\.gz cannot be read"),
        ("bomb.gz", gzip.compress(IDX + bytes(10**7)), "too long: more bytes where its header promises 40"),
        (
            "vast.gz",
            gzip.compress(IDX[:4] + b"\x00\xff\xff\xff" * 3),
            r"vast\.gz promises 4398\d*\.\d* GiB, more than the",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_damaged_idx_files_are_refused(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=words):
        read_idx(tmp_path / name)


def test_files_of_two_folders_are_not_taken_for_one_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other sets go by Fashion-MNIST's names: the first folder that has all four files is the set."""
    root, debian = (write_clothes(tmp_path / name) for name in ("root", "debian"))
    monkeypatch.setattr(found, "DEBIAN_FASHION", debian)
    data = compose("data=fashion_mnist", f"data.root={root}").data
    assert {path.parent for path in idx_paths(data)} == {root}
    (root / "t10k-labels-idx1-ubyte").unlink()
    assert {path.parent for path in idx_paths(data)} == {debian}
    monkeypatch.setattr(found, "DEBIAN_FASHION", tmp_path / "nowhere")
    assert not idx_paths(data) and not is_here(data)
