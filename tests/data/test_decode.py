"""Files become pixels, or are refused."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from softmoe_cli.data import decode as decoding
from softmoe_cli.data.batches import eval_batches
from softmoe_cli.data.decode import centre
from softmoe_cli.data.sets import load
from softmoe_cli.errors import UsageError
from tests.data.trees import CLASSES, CPU, SIDE, augment, batches, decode, files, folder, refused, write_tree


@pytest.mark.parametrize("content", [b"", b"not an image", b"cut"])
def test_broken_image(tmp_path: Path, content: bytes) -> None:
    write_tree(tmp_path)
    broken = tmp_path / "bee" / "broken.png"
    whole = (tmp_path / "bee" / "0.png").read_bytes()
    broken.write_bytes(whole[: len(whole) // 2] if content == b"cut" else content)
    refused(folder(tmp_path), r"broken\.png is not an image that can be read")


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_image_in_a_lazy_folder(tmp_path: Path, workers: int) -> None:
    write_tree(tmp_path)
    data = folder(tmp_path, memory_gib=0, workers=workers)
    train = load(data).train
    files(train)[0].write_bytes(b"not an image")
    with pytest.raises(UsageError, match=r"\.png is not an image that can be read"):
        list(eval_batches(train, data, image_size=SIDE, in_chans=3, batch_size=4, device=CPU))
    with pytest.raises(UsageError, match=r"\.png is not an image that can be read"):
        list(itertools.islice(batches(train, data, augment()), 20))


def test_images_of_more_than_eight_bits_are_refused(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    Image.fromarray(np.full((9, 9), 30000, np.uint16)).save(root / CLASSES[0] / "deep.png")
    refused(folder(root), "more than 8 bits")


def test_a_program_by_an_images_name_is_not_run(tmp_path: Path) -> None:
    """Pillow would hand PostScript to Ghostscript."""
    write_tree(tmp_path)
    figure = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "bee" / "figure.jpg").write_bytes(figure)
    refused(folder(tmp_path), r"figure\.jpg is not an image that can be read: damaged, or none of BMP, GIF")


def test_pillow_says_nothing_of_transparent_palettes(tmp_path: Path) -> None:
    """In a process of its own: pytest has its own rules for warnings."""
    Image.new("P", (SIDE, SIDE)).save(tmp_path / "a.png", transparency=bytes([9, 90]))
    code = (
        "import sys; from pathlib import Path\n"
        "from softmoe_cli.data.archives import Stored\n"
        "from softmoe_cli.data.picture import opened\n"
        "print(opened(Stored.files(Path(sys.argv[1]), ['a.png']), 0, 3, 1).mode)"
    )
    told = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert (told.stdout, told.stderr) == ("RGB\n", "")


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_decoding_cuts_the_centre(tmp_path: Path, mode: str, channels: int) -> None:
    raw = np.zeros((SIDE, SIDE + 6, 3), np.uint8)
    raw[:, 3:-3] = 60  # the centre square; the sides are cut away
    Image.fromarray(raw).convert(mode).save(tmp_path / "a.png")
    decoded = decode(tmp_path / "a.png", SIDE, channels)
    assert decoded.shape == (channels, SIDE, SIDE)
    assert decoded.unique().tolist() == [60]


def test_decoding_keeps_channels_and_directions(tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(raw).save(tmp_path / "a.png")
    assert torch.equal(decode(tmp_path / "a.png", SIDE, 3), torch.from_numpy(raw).permute(2, 0, 1))


def test_images_that_a_few_bytes_say_are_vast_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    write_tree(tmp_path)
    place = tmp_path / "ant" / "vast.png"
    Image.new("1", (40_000, 3_000)).save(place)
    assert place.stat().st_size < 40_000
    refused(folder(tmp_path), r"vast\.png is 40,000 x 3,000 pixels, .* raise data\.max_megapixels=100")
    assert len(load(folder(tmp_path, max_megapixels=121.0)).train)


@pytest.mark.parametrize("size", [(1, 50_000), (50_000, 1), (2, 90_000)])
def test_a_line_of_pixels_is_not_made_as_wide_as_a_picture(size: tuple[int, int]) -> None:
    """timm's transform would have 256 x 12,800,000 pixels in between."""
    line = Image.new("L", size, 10)
    line.putpixel((size[0] // 2, size[1] // 2), 200)
    square = centre(line, 224, 0.875)
    assert square.shape == (1, 224, 224) and int(square.max()) > 150 and int(square.min()) < 50


def test_a_small_share_of_an_image_is_cut_without_making_all_of_it_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's transform would have 11,200 x 14,933 pixels in between. Where both ways can go they see the same."""
    across = np.linspace(0, 255, 400)[None] * np.linspace(0.5, 1, 300)[:, None]
    image = Image.fromarray(across.round().astype(np.uint8))
    small = centre(image, 224, 0.02)
    assert small.shape == (1, 224, 224) and int(small.max()) - int(small.min()) < 8
    for side, share in ((224, 0.1), (9, 0.01), (30, 0.875), (30, 1.0)):
        whole = centre(image, side, share).int()
        with monkeypatch.context() as patched:
            patched.setattr(decoding, "MOST_RESIZED", 0)
            assert (centre(image, side, share).int() - whole).abs().max() <= 1
