"""Operations on pixels against loops."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from softmoe_cli.data.pixels import boxes, resized_crop, shift_crop


def test_shift_crop_against_a_loop() -> None:
    x = torch.randn(5, 2, 6, 6)
    shift = torch.tensor([[0, 2, -3, 1, -1], [0, -1, 3, 2, -2]])
    fill = torch.tensor([7.0, -7.0])
    want = fill.view(1, 2, 1, 1).repeat(5, 1, 6, 6)
    for b in range(5):
        down, right = shift[:, b].tolist()
        for row, column in itertools.product(range(6), range(6)):
            if 0 <= row - down < 6 and 0 <= column - right < 6:
                want[b, :, row, column] = x[b, :, row - down, column - right]
    assert torch.equal(shift_crop(x, shift, fill), want)
    assert torch.equal(shift_crop(x, torch.zeros(2, 5, dtype=torch.int64), fill), x)


def test_the_full_box_is_a_plain_resize() -> None:
    x = torch.randn(3, 2, 8, 8)
    box = torch.tensor([[0.0, 0, 1, 1]]).expand(3, 4)
    torch.testing.assert_close(resized_crop(x, box, 8), x, atol=1e-5, rtol=0)
    larger = F.interpolate(x, size=(16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(resized_crop(x, box, 16), larger, atol=1e-5, rtol=0)


def test_resized_crop_cuts_its_box() -> None:
    x = torch.randn(2, 3, 8, 8)
    box = torch.tensor([[0.25, 0.5, 0.5, 0.5], [0.0, 0.25, 0.5, 0.5]])
    want = torch.stack([x[0, :, 2:6, 4:8], x[1, :, 0:4, 2:6]])
    torch.testing.assert_close(resized_crop(x, box, 4), want, atol=1e-5, rtol=0)


def test_boxes_lie_inside_and_have_the_areas() -> None:
    top, left, height, width = boxes(4000, 0.2, torch.Generator().manual_seed(0)).unbind(1)
    assert min(top.min(), left.min()) >= 0
    assert max((top + height).max(), (left + width).max()) <= 1 + 1e-6
    area, aspect = height * width, width / height
    assert area.min() >= 0.2 * 3 / 4 and area.min() < 0.21
    free = (height < 1) & (width < 1)
    assert 3 / 4 - 1e-5 <= aspect[free].min() < 0.77 and 1.3 < aspect[free].max() <= 4 / 3 + 1e-5
    small = area[free & (area < 0.7)]  # below 3/4 no side is ever cut: uniform
    assert small.mean().item() == pytest.approx(0.45, abs=0.01)
