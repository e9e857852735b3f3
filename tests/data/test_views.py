"""Views against slow loops, pixel by pixel in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from softmoe_cli.data import views
from softmoe_cli.data.views import Views, covered, drawn_views, noise, placed, viewed

B, C, S = 5, 2, 7


def pictures(side: int = S) -> Tensor:
    return torch.randint(0, 256, (B, C, side, side), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def some(strength: float = 1.0, count: int = B, seed: int = 0) -> Views:
    return drawn_views(count, strength, torch.Generator().manual_seed(seed))


def seen(image: list[list[float]], matrix: list[list[float]], row: int, column: int) -> float:
    """What a view's pixel sees: the place that its middle comes from, and there the four pixels around by how near they
    are; beyond the edge is 0."""
    s = len(image)
    x, y = (2 * column + 1) / s - 1, (2 * row + 1) / s - 1
    across, down = (m[0] * x + m[1] * y + m[2] for m in matrix)
    j, i = ((at + 1) / 2 * s - 0.5 for at in (across, down))  # in pixels from the middle of the first
    total = 0.0
    for r in (math.floor(i), math.floor(i) + 1):
        for k in (math.floor(j), math.floor(j) + 1):
            if 0 <= r < s and 0 <= k < s:
                total += image[r][k] * (1 - abs(i - r)) * (1 - abs(j - k))
    return total


def split_mix(seed: int, place: int) -> int:
    """The 64 bits number `place` of SplitMix64 (public domain reference by Vigna, from Steele, Lea and Flood, 2014)."""
    mask = 2**64 - 1
    z = (seed + (place + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def hiss(seed: int, place: int) -> float:
    bits = split_mix(seed, place // 4) >> 16 * (place % 4) & 0xFFFF
    return ((bits if bits < 2**15 else bits - 2**16) + 0.5) / 2**15


def slow(raw: Tensor, drawn: Views) -> list[float]:
    """All pixels of all views, before they are rounded."""
    found = []
    for b, image in enumerate(raw.double().tolist()):
        top, left, height, width = drawn.box[b].double().tolist()
        for c, plane in enumerate(image):
            for i in range(S):
                for j in range(S):
                    value = seen(plane, drawn.matrix[b].double().tolist(), i, j)
                    if top <= (i + 0.5) / S < top + height and left <= (j + 0.5) / S < left + width:
                        value = 255 * float(drawn.grey[b])
                    value *= float(drawn.brightness[b])
                    value += 255 * float(drawn.noise[b]) * hiss(int(drawn.seeds[b]), (c * S + i) * S + j)
                    found.append(min(255.0, max(0.0, value)))
    return found


def test_views_are_what_slow_loops_give() -> None:
    raw, drawn = pictures(), some()
    got = viewed(raw, drawn).flatten().double()
    want = torch.tensor(slow(raw, drawn), dtype=torch.float64)
    assert (got - want).abs().max() < 0.5 + 1e-3  # the nearest whole number, or float32 at a half
    assert (got != raw.flatten()).double().mean() > 0.8


def test_places_are_bilinear() -> None:
    raw, drawn = pictures(), some(2.0)
    got = placed(raw.float(), drawn.matrix)
    matrices, planes = drawn.matrix.double().tolist(), raw.double().tolist()
    want = [
        [[[seen(plane, m, i, j) for j in range(S)] for i in range(S)] for plane in image]
        for m, image in zip(matrices, planes, strict=True)
    ]
    torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64), atol=2e-3, rtol=0)


def test_a_matrix_is_crop_scale_shear_turn_and_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step by itself, on points, with the numbers that the same chance draws."""
    strength, count = 1.5, 6
    share = torch.rand(16, count, generator=torch.Generator().manual_seed(4)).double()
    got = some(strength, count, seed=4).matrix.double()
    for b in range(count):
        r = share[:, b].tolist()
        turn = math.radians(views.TURN) * strength * (2 * r[0] - 1)
        shear = views.SHEAR * strength * (2 * r[1] - 1)
        scale = views.SCALE ** (strength * (2 * r[2] - 1))
        area, aspect = 1 - views.AREA * strength * r[3], views.ASPECT ** (strength * (2 * r[4] - 1))
        width, height = min(1.0, math.sqrt(area * aspect)), min(1.0, math.sqrt(area / aspect))
        for x, y in ((-1.0, -1.0), (1.0, -1.0), (0.3, 0.8)):
            x1, y1 = x * width + (2 * r[5] - 1) * (1 - width), y * height + (2 * r[6] - 1) * (1 - height)
            assert abs(x1) <= 1 + 1e-9 and abs(y1) <= 1 + 1e-9  # a crop lies in the image
            x2, y2 = scale * (x1 + shear * y1), scale * y1
            x3, y3 = x2 * math.cos(turn) - y2 * math.sin(turn), x2 * math.sin(turn) + y2 * math.cos(turn)
            x4, y4 = (at + 2 * views.MOVE * strength * (2 * r[k] - 1) for at, k in ((x3, 7), (y3, 8)))
            point = got[b] @ torch.tensor([x, y, 1.0], dtype=torch.float64)
            torch.testing.assert_close(point, torch.tensor([x4, y4], dtype=torch.float64), atol=1e-5, rtol=0)


def test_ranges_grow_with_strength_and_are_kept() -> None:
    for strength in (0.5, 1.0, 2.0):
        drawn = some(strength, count=2000)
        sides, corner = drawn.box[:, 2:], drawn.box[:, :2]
        assert sides.min() >= 0 and 0.98 * views.COVERED * strength < sides.max() <= views.COVERED * strength
        assert corner.min() >= 0 and (corner + sides).max() <= 1 + 1e-6
        light = drawn.brightness.log() / math.log(views.BRIGHTNESS) / strength
        assert -1.001 <= light.min() < -0.98 and 0.98 < light.max() <= 1.001
        assert drawn.noise.min() >= 0 and 0.98 * views.NOISE * strength < drawn.noise.max() <= views.NOISE * strength


def test_strength_0_is_the_image() -> None:
    for side in (S, 8, 28):
        assert torch.equal(viewed(pictures(side), some(0.0)), pictures(side))
    assert "itself" in views.described(0.0) and "0.2 of each side" in views.described(0.5)


@pytest.mark.parametrize("rows", [torch.tensor([1, 3]), torch.tensor([4]), slice(0, 2)])
def test_a_view_does_not_depend_on_what_is_beside(rows: Tensor | slice) -> None:
    raw, drawn = pictures(28), some()
    part = viewed(raw[rows], drawn.of(rows, raw.device))
    assert torch.equal(part, viewed(raw, drawn)[rows])


def test_a_gpu_makes_its_views() -> None:
    """Nothing of the work is left on the CPU, and nothing of the two is mixed: tensors without numbers would tell."""
    with FakeTensorMode():
        raw = torch.empty(B, C, S, S, dtype=torch.uint8, device="cuda")
        made = viewed(raw, some(count=2 * B).of(torch.arange(B), raw.device))
        assert made.device.type == "cuda" and made.shape == raw.shape


def test_noise_is_uniform_and_independent() -> None:
    found = noise(torch.tensor([0, 1, 2**61, 12345]), 4001)
    places = [*range(12), 4000]
    want = [[hiss(seed, place) for place in places] for seed in (0, 1, 2**61, 12345)]
    torch.testing.assert_close(found[:, places].double(), torch.tensor(want, dtype=torch.float64), atol=1e-7, rtol=0)
    assert found.abs().max() < 1 and found.mean().abs() < 0.02
    assert abs(float(found.var()) - 1 / 3) < 0.01
    assert (torch.corrcoef(found).fill_diagonal_(0).abs() < 0.06).all()
    assert torch.corrcoef(torch.stack([found[:, :-1].flatten(), found[:, 1:].flatten()]))[0, 1].abs() < 0.03


def test_a_box_covers_pixels_by_their_middles() -> None:
    box = torch.tensor([[0.25, 0.0, 0.5, 0.26], [0.1, 0.1, 0.0, 0.5], [0.0, 0.0, 1.0, 1.0]])
    got = covered(box, 4)[:, 0]
    assert got[0].nonzero().tolist() == [[1, 0], [2, 0]]
    assert not got[1].any() and got[2].all()
