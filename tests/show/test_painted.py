"""Planted routers give the planted maps, to the pixel: through a model, the look at it and the sheet."""

import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from softmoe_cli.data.batches import Batch
from softmoe_cli.model.vit import build
from softmoe_cli.moe.kind import Shares
from softmoe_cli.moe.routers.zero_computation import ZeroComputationRouter
from softmoe_cli.moe.routing import DenseRouting, SparseRouting
from softmoe_cli.show.looked import ModelLook, look_at, pixels_of
from softmoe_cli.show.paint import (
    CLEAR,
    CROSS,
    DROPPED_GREY,
    FRAME,
    HEAT,
    LETTERS,
    SIDE,
    Cell,
    Sheet,
    colours,
    patch_in_place,
    sheet_png,
)
from softmoe_cli.show.sheets import classes_sheet, leader, likes_sheet, routing_sheet, strip_sheets
from tests.conftest import TINY
from tests.oracles import compose

GRID, EXPERTS, IMAGES = 4, 4, 6
PLANTED = np.array([[[(3 * i + 2 * row + column) % (EXPERTS + 1) - 1 for column in range(GRID)]
                     for row in range(GRID)] for i in range(IMAGES)])  # fmt: skip
"""The expert of each patch of each image, -1: dropped. No row is a column."""


def model(*overrides: str, classes: int = 10) -> VisionTransformer:
    torch.manual_seed(0)
    return build(compose(*TINY, *overrides).model, classes)


def seen(
    vit: VisionTransformer, painted: tuple[int, ...] = (1, 4), batch_size: int = 4, *, label: int = 0, first: int = 0
) -> ModelLook:
    """Six images in two batches; image i is of class label + i % 2, and its patches have different greys."""
    images = torch.linspace(0, 1, IMAGES * 8 * 8).view(IMAGES, 1, 8, 8)

    def batches() -> Iterator[tuple[Batch, np.ndarray]]:
        for part in torch.arange(IMAGES).split(batch_size):
            some = images[part]
            yield Batch(some, label + part % 2), pixels_of(some, torch.zeros(1, 1), torch.ones(1, 1))

    return look_at(vit, batches(), painted=painted, loss="softmax", autocast=torch.autocast("cpu", enabled=False),
                   labelled=True, first_class=first)  # fmt: skip


def plant(vit: VisionTransformer, decide: object) -> None:
    """The router of the last block decides as it is told: `decide(first image of the batch, b, n)`."""
    router, first = vit.blocks[-1].mlp.router, [0]

    def forward(x: Tensor, keep: object = None, carried: object = None) -> object:
        b, n, _ = x.shape
        first[0] += b
        return decide(first[0] - b, b, n)  # type: ignore[operator]

    router.forward = forward


def sparse(first: int, b: int, n: int, *, runs: bool) -> SparseRouting:
    """Tokens by the planted map; what comes before the patches goes to expert 0."""
    experts = np.concatenate([np.zeros((b, n - GRID**2), int), PLANTED[first : first + b].reshape(b, -1)], axis=1)
    of_each = [np.flatnonzero(experts.ravel() == e) for e in range(EXPERTS)]
    demand = torch.tensor([len(each) for each in of_each])
    if runs:
        token = torch.tensor(np.concatenate(of_each))
        return SparseRouting(token, torch.ones(len(token)), torch.zeros(()), demand, (b, n), demand.cumsum(0).int())
    slots = max(map(len, of_each)) + 1
    token = torch.tensor([[*each, *[b * n] * (slots - len(each))] for each in of_each])
    return SparseRouting(token, (token < b * n).float(), torch.zeros(()), demand, (b, n))


def painted_by_hand(experts: np.ndarray, image: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Pixel of the image by pixel, in loops; where patches are dropped the cross is left out."""
    side = len(image)
    small = np.zeros((side, side, 3), np.uint8)
    for y in range(side):
        for x in range(side):
            expert = experts[y * GRID // side, x * GRID // side]
            colour = DROPPED_GREY if expert < 0 else palette[expert]
            grey = sum(map(float, image[y, x])) / 3
            small[y, x] = [round(CLEAR * float(part) + (1 - CLEAR) * grey) for part in colour]
    return small.repeat(SIDE // side, 0).repeat(SIDE // side, 1)


def same_but_crosses(got: np.ndarray, wanted: np.ndarray, experts: np.ndarray) -> None:
    """Equal; in dropped patches, and only there, some pixels are a cross, the middle among them."""
    cross = (got == CROSS).all(axis=2) & (wanted != CROSS).any(axis=2)
    side = SIDE // GRID
    for row in range(GRID):
        for column in range(GRID):
            there = cross[row * side : (row + 1) * side, column * side : (column + 1) * side]
            assert there.any() == (experts[row, column] < 0) and there[side // 2, side // 2] == there.any()
    assert np.array_equal(got[~cross], wanted[~cross])


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("runs", [False, True])
def test_a_planted_sparse_router_is_painted_to_the_pixel(runs: bool, class_token: bool) -> None:
    pool = ["model.backbone.class_token=true", "model.backbone.pool=token"] if class_token else []
    vit = model("model/router=tokens_choice", *pool)
    assert vit.num_prefix_tokens == class_token
    plant(vit, lambda *where: sparse(*where, runs=runs))
    look = seen(vit)
    (layer,) = look.layers
    sheet = routing_sheet(look, layer, ["a", "b"])
    for row, number in zip(sheet.rows, (1, 4), strict=True):
        image, painted = row
        assert np.array_equal(image.pixels, look.pixels[number].repeat(SIDE // 8, 0).repeat(SIDE // 8, 1))
        wanted = painted_by_hand(PLANTED[number], look.pixels[number], colours(EXPERTS))
        same_but_crosses(painted.pixels, wanted, PLANTED[number])
    assert layer.dropped_share == pytest.approx((PLANTED < 0).mean())
    assert layer.load.tolist() == [int(np.equal(PLANTED, e).sum()) for e in range(EXPERTS)]
    for label in (0, 1):
        for expert in range(EXPERTS):
            mean = (PLANTED[label::2] == expert).mean(axis=0)
            assert np.allclose(layer.by_class[label, expert].view(GRID, GRID).numpy(), mean)
    assert ("dropped", DROPPED_GREY) in sheet.legend and {f"expert {e}" for e in range(EXPERTS)} <= {
        w for w, _ in sheet.legend
    }


def test_identity_is_the_grid() -> None:
    vit = model("model/router=identity", "model.router.num_experts=4")
    look = seen(vit)
    sheet = routing_sheet(look, look.layers[0], ["a", "b"])
    place = np.arange(GRID**2).reshape(GRID, GRID) % 4
    for row, number in zip(sheet.rows, (1, 4), strict=True):
        assert np.array_equal(row[1].pixels, painted_by_hand(place, look.pixels[number], colours(4)))
    assert look.layers[0].dropped_share == 0 and "no patch was dropped" in sheet.note


def heat_by_hand(weights: np.ndarray, most: float) -> np.ndarray:
    picture, side, steps = np.zeros((SIDE, SIDE, 3), np.uint8), SIDE // GRID, len(HEAT) - 1
    for row in range(GRID):
        for column in range(GRID):
            place = float(weights[row, column]) / most * steps
            low = min(int(place), steps - 1)
            colour = [round(a + (place - low) * (b - a)) for a, b in zip(HEAT[low], HEAT[low + 1], strict=True)]
            picture[row * side : (row + 1) * side, column * side : (column + 1) * side] = colour
    return picture


def test_a_planted_soft_router_is_painted_to_the_pixel() -> None:
    """Two slots for each of two experts; dispatch and combine differ, and slot 1 of expert 1 leads."""
    generator = torch.Generator().manual_seed(0)
    dispatch, combine = torch.rand(2, IMAGES, GRID**2, 2, 2, generator=generator)
    combine[:, :, 1, 1] += 1
    vit = model("model/router=soft", "model.router.num_experts=2", "model.router.slots_per_expert=2")
    plant(vit, lambda first, b, _n: DenseRouting(dispatch[first : first + b], combine[first : first + b],
                                                 torch.zeros(())))  # fmt: skip
    look = seen(vit)
    sheet = routing_sheet(look, look.layers[0], ["a", "b"])
    for row, number in zip(sheet.rows, (1, 4), strict=True):
        assert row[2].caption.startswith("expert 1, slot 1 dispatch") and row[3].caption.startswith(
            "expert 1, slot 1 c"
        )
        for cell, weights in ((row[2], dispatch), (row[3], combine)):
            planted = weights[number, :, 1, 1]
            wanted = heat_by_hand(planted.view(GRID, GRID).numpy(), float(planted.max()))
            assert np.abs(cell.pixels.astype(int) - wanted).max() <= 1  # a half may be rounded either way
        largest = combine[number].sum(dim=2).argmax(dim=1).view(GRID, GRID).numpy()
        assert np.array_equal(row[1].pixels, painted_by_hand(largest, look.pixels[number], colours(2)))


def test_kinds_of_zero_computation_are_painted() -> None:
    """Logits are planted: each patch's first choice is that of the map, its second the next expert."""
    options = ["model/router=zero_computation", "model.router.num_experts=2", "model.router.num_constant=1",
               "model.router.num_copy=1", "model.router.num_zero=1"]  # fmt: skip
    vit = model(*options)
    router = vit.blocks[-1].mlp.router
    assert isinstance(router, ZeroComputationRouter) and router.counts == (2, 1, 1, 1)
    first = (PLANTED[:, :, ::-1] + 1).reshape(IMAGES, -1)  # from 0 to 4: every expert
    logits = torch.zeros(IMAGES, GRID**2, 5)
    for i, j in np.ndindex(IMAGES, GRID**2):
        logits[i, j, first[i, j]], logits[i, j, (first[i, j] + 1) % 5] = 9, 5
    start = [0]

    def scores(tokens: Tensor, _carried: object) -> Tensor:
        start[0] += len(tokens)
        return logits[start[0] - len(tokens) : start[0]]

    router.scores = scores  # type: ignore[method-assign, assignment]
    look = seen(vit)
    (layer,) = look.layers
    assert layer.painted.kinds == ("ffn", "ffn", "constant", "copy", "zero")
    sheet, kind = routing_sheet(look, layer, ["a", "b"]), np.array([0, 0, 1, 2, 3])
    legend = dict(sheet.legend)
    of_kinds = np.array([legend[word] for word in ("MLP", "constant", "copy", "zero")])
    for row, number in zip(sheet.rows, (1, 4), strict=True):
        assert [cell.caption for cell in row[1:]] == ["choice 1", "choice 2", "kind of choice 1", "kind of choice 2"]
        one, two = first[number].reshape(GRID, GRID), (first[number].reshape(GRID, GRID) + 1) % 5
        for cell, planted, palette in ((row[1], one, colours(5)), (row[2], two, colours(5)),
                                       (row[3], kind[one], of_kinds), (row[4], kind[two], of_kinds)):  # fmt: skip
            assert np.array_equal(cell.pixels, painted_by_hand(planted, look.pixels[number], palette))
    assert len({tuple(colour) for colour in of_kinds} | {tuple(colour) for colour in colours(5).tolist()}) == 9


@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_an_expert_likes_is_what_was_planted(batch_size: int) -> None:
    """Expert e takes patch (i + e) % 16 of image i with weight i + 1, and expert 3 nothing."""

    def decide(first: int, b: int, n: int) -> SparseRouting:
        token = torch.tensor([[i * n + (first + i + e) % n for i in range(b)] for e in range(3)] + [[b * n] * b])
        gate = torch.tensor([[float(first + i + 1) for i in range(b)]] * 3 + [[0.0] * b])
        return SparseRouting(token, gate, torch.zeros(()), torch.tensor([b, b, b, 0]), (b, n))

    vit = model("model/router=tokens_choice")
    plant(vit, decide)
    look = seen(vit, batch_size=batch_size)
    sheet = likes_sheet(look, look.layers[0])
    assert len(sheet.rows) == 3 and "1 experts see no patch" in sheet.note
    for expert, row in enumerate(sheet.rows):
        assert [cell.caption for cell in row] == [f"expert {expert}: {weight}" for weight in range(IMAGES, 0, -1)]
        for cell, image in zip(row, reversed(range(IMAGES)), strict=True):
            assert np.array_equal(cell.pixels, patch_in_place(look.pixels[image], (image + expert) % 16, (4, 4)))


def test_a_patch_is_framed_where_it_is() -> None:
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    picture = patch_in_place(image, 7, (4, 4))  # row 1, column 3
    framed = (picture == FRAME).all(axis=2)
    ys, xs = np.nonzero(framed)
    assert (ys.min(), ys.max() + 1, xs.min(), xs.max() + 1) == (SIDE // 4, SIDE // 2, 3 * SIDE // 4, SIDE)
    assert np.array_equal(picture[~framed], image.repeat(16, 0).repeat(16, 1)[~framed])
    near = patch_in_place(np.arange(32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8), 0, (16, 16))
    assert len(near) >= SIDE and (near[0, 0] == FRAME).all(), "a window of five patches, moved into the image"


def test_maps_by_class_stand_in_their_rows() -> None:
    vit = model("model/router=tokens_choice")
    plant(vit, lambda *where: sparse(*where, runs=False))
    look = seen(vit)
    sheet = classes_sheet(look, look.layers[0], [f"class {i}" for i in range(10)])
    order = look.layers[0].order
    assert [[cell.caption for cell in row] for row in sheet.rows] == [
        [f"class {label}: expert {expert}" for expert in order] for label in (0, 1)
    ]
    most = max((PLANTED[label::2] == e).mean(axis=0).max() for label in (0, 1) for e in range(EXPERTS))
    for label, row in enumerate(sheet.rows):
        for expert, cell in zip(order, row, strict=True):
            wanted = heat_by_hand((PLANTED[label::2] == expert).mean(axis=0), most)
            assert np.abs(cell.pixels.astype(int) - wanted).max() <= 1
    what = "share of the images in which it sees the patch"
    assert sheet.legend == [(f"{what}: 0", HEAT[0]), (f"{most / 2:.2g}", HEAT[4]), (f"{most:.2g}", HEAT[-1])]
    file = np.asarray(Image.open(io.BytesIO(sheet_png(sheet))))
    for _, colour in sheet.legend:
        assert (file[: 5 * LETTERS] == colour).all(axis=2).sum() >= LETTERS**2, "the scale is in the file too"


@pytest.mark.parametrize("first", [0, 10, 20])
def test_maps_by_class_are_of_the_task(first: int) -> None:
    """Labels of a mix's later task begin at its first class; classes above the first ten have no maps."""
    vit = model("model/router=tokens_choice", classes=30)
    plant(vit, lambda *where: sparse(*where, runs=False))
    look = seen(vit, label=10, first=first)
    (layer,) = look.layers
    assert bool(layer.by_class.any()) == (first == 10)
    if first == 10:
        sheet = classes_sheet(look, layer, [f"class {i}" for i in range(10, 30)])
        assert [row[0].caption.partition(":")[0] for row in sheet.rows] == ["class 10", "class 11"]
        for label in (0, 1):
            for expert in range(EXPERTS):
                mean = (PLANTED[label::2] == expert).mean(axis=0)
                assert np.allclose(layer.by_class[label, expert].view(GRID, GRID).numpy(), mean)


@pytest.mark.parametrize("router", ["soft", "tokens_choice", "experts_choice"])
def test_experts_that_are_left_keep_their_numbers_and_colours(router: str) -> None:
    vit = model(f"model/router={router}", "model.expert_init=independent")
    whole, layer = seen(vit), vit.blocks[-1].mlp
    layer.prunable()
    layer.leave([1, 3])
    left = seen(vit)
    (look,) = left.layers
    assert look.num_experts == EXPERTS and look.load[[0, 2]].tolist() == [0, 0] and bool((look.load[[1, 3]] > 0).all())
    assert set(leader(look.painted).unique().tolist()) <= {-1, 1, 3}
    likes = likes_sheet(left, look)
    assert likes.note.endswith("2 experts see no patch.")
    assert {cell.caption.partition(":")[0] for row in likes.rows for cell in row} == {"expert 1", "expert 3"}
    assert look.painted.expert.equal(whole.layers[0].painted.expert), "a column is the same slot in both"
    (strip,) = strip_sheets({2: whole, 4: left})
    palette = {f"expert {e}": tuple(colour) for e, colour in enumerate(colours(EXPERTS).tolist())}
    assert dict(strip.legend).items() <= (palette | {"dropped": DROPPED_GREY}).items()


def test_a_second_choice_that_has_room_leads() -> None:
    chosen = torch.tensor([[[2, 0], [-1, 1], [-1, -1], [0, -1]]])
    assert leader(Shares(torch.zeros(1, 4, 3), None, torch.arange(3), chosen)).tolist() == [[2, 1, -1, 0]]


def test_letters_of_other_languages_are_drawn() -> None:
    """A letter that a font does not have is a box, the same for all of them."""
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    drawn = {letter: sheet_png(Sheet("s", "", "", [[Cell(pixels, letter)]])) for letter in "AÄÜéčłΨЖ"}
    assert len(set(drawn.values())) == len(drawn)
