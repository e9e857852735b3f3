"""The pictures of a run: which maps are made of what was looked at."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from softmoe_cli.moe.kind import Shares
from softmoe_cli.show.looked import LayerLook, ModelLook, expert_weights
from softmoe_cli.show.paint import (
    HEAT,
    Cell,
    Sheet,
    colours,
    enlarged,
    expert_map,
    heat_map,
    over_pixels,
    patch_in_place,
)
from softmoe_cli.text import shortened

LEADING = 3
"""Slots, or experts that see all tokens, whose weights are painted."""
PAINTED_CHOICES = 3
"""Choices of a token that are painted, each as a map."""
LIKERS = 16
"""Experts whose patches are shown, those with the largest load."""
MAPPED = 6
"""Experts whose mean maps are shown."""
STRIPS = 2
"""Images that are followed over training."""
IN_LEGEND = 16
KIND_WORDS = {"ffn": "MLP"}


def leader(shares: Shares) -> torch.Tensor:
    """The expert of each token (b n): the first choice that has room, or the largest weight's; -1: none has room."""
    if shares.chosen is not None:
        first = (shares.chosen >= 0).int().argmax(dim=2, keepdim=True)
        return shares.chosen.gather(2, first)[:, :, 0]
    return expert_weights(shares, "given").argmax(dim=2)


def file_stem(layer: LayerLook) -> str:
    """The layer's name as a part of a file's."""
    return layer.name.replace(", ", "-").replace(" ", "-")


def _grid(values: torch.Tensor, layer: LayerLook) -> np.ndarray:
    return values.reshape(layer.grid).numpy()


def _legend(layer: LayerLook, shown: set[int]) -> list[tuple[str, tuple[int, int, int]]]:
    """The experts that are on a sheet, in the order of their numbers; the grey of a dropped patch if there is one."""
    palette = colours(layer.num_experts)
    experts = sorted(expert for expert in shown if expert >= 0)
    told = [(f"expert {expert}", _rgb(palette[expert])) for expert in experts[:IN_LEGEND]]
    if len(experts) > IN_LEGEND:
        told.append((f"and {len(experts) - IN_LEGEND} more", (255, 255, 255)))
    return told + ([("dropped", (128, 128, 128))] if -1 in shown else [])


def _rgb(colour: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (int(part) for part in colour)
    return red, green, blue


def routing_sheet(look: ModelLook, layer: LayerLook, captions: Sequence[str]) -> Sheet:
    """The painted images and, beside each, who takes its patches. `captions`: a word for each of these images."""
    shares, palette, rows, shown = layer.painted, colours(layer.num_experts), [], set[int]()
    for place, number in enumerate(look.painted):
        image = look.pixels[number]
        cells = [Cell(enlarged(image), captions[place])]
        if shares.chosen is None:
            top = leader(shares)[place]
            shown |= set(top.tolist())
            cells.append(Cell(expert_map(_grid(top, layer), palette, image), "largest weight"))
            cells += _weights(shares, place, layer, len(image))
        else:
            for rank in range(min(PAINTED_CHOICES, shares.chosen.shape[2])):
                choice = shares.chosen[place, :, rank]
                shown |= set(choice.tolist()) if rank == 0 else set(choice.tolist()) - {-1}
                what = "expert" if shares.chosen.shape[2] == 1 else f"choice {rank + 1}"
                cells.append(Cell(_choice(choice, layer, palette, image, rank), what))
            if shares.kinds:
                cells += _kinds(shares, place, layer, image)
        rows.append(cells)
    legend = _legend(layer, shown)
    if shares.kinds:
        legend += list(zip(_kinds_of(shares), map(_rgb, _kind_colours(shares)), strict=True))
    return Sheet(f"routing-{file_stem(layer)}", f"{layer.name}: who takes which patch", _note(layer), rows, legend)


def _note(layer: LayerLook) -> str:
    if layer.painted.taken is not None:
        return (
            "Each patch in the colour of the expert with the largest weight in it; then the slots with the largest "
            "weights in this image: dispatch, what of the image is in the slot, and combine, where its result goes."
        )
    if layer.painted.chosen is None:
        return "Each patch in the colour of its largest expert; then the experts with the largest parts in this image."
    dropped = f"{100 * layer.dropped_share:.3g}% of the patches of all images that were looked at were dropped"
    return f"Each patch in the colour of its expert; {dropped if layer.dropped_share else 'no patch was dropped'}."


def _choice(choice: torch.Tensor, layer: LayerLook, palette: np.ndarray, image: np.ndarray, rank: int) -> np.ndarray:
    """A map of one choice of each token. That a token has no further choice is no cross: the image is seen there."""
    grid = _grid(choice, layer)
    painted = expert_map(grid, palette, image)
    if rank == 0:
        return painted
    return np.where(over_pixels(grid < 0, len(painted))[..., None], enlarged(image), painted)


def _kinds_of(shares: Shares) -> list[str]:
    return [KIND_WORDS.get(kind, kind) for kind in dict.fromkeys(shares.kinds)]


def _kind_colours(shares: Shares) -> np.ndarray:
    """Of kinds: from the end of the wheel of 24, so that they are not the colours of experts."""
    return colours(24)[-len(set(shares.kinds)) :]


def _kinds(shares: Shares, place: int, layer: LayerLook, image: np.ndarray) -> list[Cell]:
    """The kind of each choice: which of them compute something."""
    assert shares.chosen is not None
    named = list(dict.fromkeys(shares.kinds))
    kind = torch.tensor([*(named.index(each) for each in shares.kinds), -1])  # -1, the last, of a dropped token
    return [
        Cell(expert_map(_grid(kind[shares.chosen[place, :, rank]], layer), _kind_colours(shares), image),
             f"kind of choice {rank + 1}")
        for rank in range(min(PAINTED_CHOICES, shares.chosen.shape[2]))
    ]  # fmt: skip


def leading(shares: Shares, place: int) -> list[int]:
    """The columns with the largest weights in one image."""
    return shares.given[place].sum(dim=0).argsort(descending=True, stable=True)[:LEADING].tolist()


def _weights(shares: Shares, place: int, layer: LayerLook, side: int) -> list[Cell]:
    """Dispatch and combine weights of the leading slots, each on a scale from 0 to its own largest."""
    slots = len(shares.expert) // layer.num_experts
    cells = []
    for column in leading(shares, place):
        expert = int(shares.expert[column])
        own = int((shares.expert[:column] == expert).sum())
        name = f"expert {expert}" + (f", slot {own}" if slots > 1 else "")
        both = {f"{name} dispatch": shares.taken, f"{name} combine": shares.given}
        for words, weights in both.items() if shares.taken is not None else [(name, shares.given)]:
            assert weights is not None
            most = float(weights[place, :, column].max())
            picture = heat_map(_grid(weights[place, :, column], layer), most, side)
            cells.append(Cell(picture, f"{words}, 0 to {most:.2g}"))
    return cells


def likes_sheet(look: ModelLook, layer: LayerLook) -> Sheet:
    """For each expert the patches that have the largest weights at it, in their surroundings."""
    rows = []
    for expert in layer.order[:LIKERS]:
        weights, images, patches = (each[expert] for each in layer.liked)
        cells = [
            Cell(patch_in_place(look.pixels[image], patch, layer.grid), f"expert {expert}: {weight:.2g}")
            for weight, image, patch in zip(weights.tolist(), images.tolist(), patches.tolist(), strict=True)
            if weight > -torch.inf
        ]
        if cells:
            rows.append(cells)
    idle = layer.num_experts - int((layer.liked[0][:, 0] > -torch.inf).sum())
    more = f" {len(layer.order) - LIKERS} experts with less load are not shown." if len(layer.order) > LIKERS else ""
    note = (
        f"Patches, framed, of {len(look.pixels):,} images that have the largest weights at an expert, one of an image; "
        f"a row for each expert, the largest load first.{more}" + (f" {idle} experts see no patch." if idle else "")
    )
    return Sheet(f"likes-{file_stem(layer)}", f"{layer.name}: what each expert likes", note, rows)


def classes_sheet(look: ModelLook, layer: LayerLook, classes: Sequence[str]) -> Sheet:
    """Where in an image of a class each expert is at work, in the mean. `classes`: those of the images' task; there is
    an image of one of the first."""
    experts, side = layer.order[:MAPPED], look.pixels.shape[1]
    shown = [label for label in range(len(layer.by_class)) if bool(layer.by_class[label].any())]
    maps = layer.by_class[shown][:, experts]
    sparse = layer.painted.chosen is not None
    most, least = float(maps.max()), 0.0 if sparse else float(maps.min())
    rows = [
        [
            Cell(heat_map(_grid(own, layer), most, side, least), f"{shortened(classes[label], 14)}: expert {expert}")
            for expert, own in zip(experts, of_class, strict=True)
        ]
        for label, of_class in zip(shown, maps, strict=True)
    ]
    what = "share of the images in which it sees the patch" if sparse else "mean weight"
    note = "A row for each class, a column for each of the experts with the largest load; brighter is more."
    scale = [f"{what}: {least:.2g}", f"{(least + most) / 2:.2g}", f"{most:.2g}"]
    legend = list(zip(scale, (HEAT[0], HEAT[len(HEAT) // 2], HEAT[-1]), strict=True))
    title = f"{layer.name}: where an expert is at work, by class"
    return Sheet(f"classes-{file_stem(layer)}", title, note, rows, legend)


def strip_sheets(looks: Mapping[int, ModelLook]) -> list[Sheet]:
    """The same images in several checkpoints, by their step: whose each patch is and, where slots are mixtures, what is
    in the slot that leads in the last one."""
    last, sheets = list(looks.values())[-1], []
    for layer in last.layers:
        palette, rows, shown = colours(layer.num_experts), [], set[int]()
        for place in range(min(STRIPS, len(last.painted))):
            image, then = last.pixels[last.painted[place]], {}
            for step, look in looks.items():
                then[step] = next(each.painted for each in look.layers if each.name == layer.name)
            tops = {step: leader(shares)[place] for step, shares in then.items()}
            shown |= {expert for top in tops.values() for expert in top.tolist()}
            cells = [
                Cell(expert_map(_grid(top, layer), palette, image), f"step {step:,}") for step, top in tops.items()
            ]
            rows.append([Cell(enlarged(image), f"image {place + 1}"), *cells])
            if layer.painted.taken is not None:
                (column, *_), expert = leading(layer.painted, place), layer.painted.expert
                taken = {step: shares.taken[place, :, column] for step, shares in then.items()
                         if shares.taken is not None}  # fmt: skip
                most = max(float(each.max()) for each in taken.values())
                cells = [Cell(heat_map(_grid(each, layer), most, len(image)), f"step {step:,}, 0 to {most:.2g}")
                         for step, each in taken.items()]  # fmt: skip
                rows.append([Cell(enlarged(image), f"expert {int(expert[column])}, dispatch"), *cells])
        note = "The same images in every checkpoint that the run has kept: each patch in the colour of its expert."
        name = f"{layer.name}: over training"
        sheets.append(Sheet(f"training-{file_stem(layer)}", name, note, rows, _legend(layer, shown)))
    return sheets
