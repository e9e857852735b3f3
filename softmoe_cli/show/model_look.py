"""From a run's checkpoints and its images to what is painted."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8

from softmoe_cli.config.commands import ShowConfig
from softmoe_cli.config.data import Data, check_channels
from softmoe_cli.config.model import Model
from softmoe_cli.data import sets
from softmoe_cli.data.archives import Stored
from softmoe_cli.data.batches import Batch, eval_batches
from softmoe_cli.data.decode import squares
from softmoe_cli.data.mix import classes_of_task
from softmoe_cli.data.splits import ImageSet
from softmoe_cli.device import arithmetic
from softmoe_cli.errors import UsageError
from softmoe_cli.model.router import check_evaluated
from softmoe_cli.model.vit import build, prepare
from softmoe_cli.model.weights import load_weights
from softmoe_cli.options import inherit
from softmoe_cli.options.compose import door
from softmoe_cli.run.header import Source
from softmoe_cli.run.sealed import damage, numbered, step_of
from softmoe_cli.show.looked import ModelLook, look_at, pixels_of
from softmoe_cli.show.page import Shown
from softmoe_cli.show.paint import Cell, Sheet, enlarged
from softmoe_cli.show.sheets import classes_sheet, likes_sheet, routing_sheet, strip_sheets
from softmoe_cli.text import printable, shortened

WORST = 16
"""Images that are shown because their label has the smallest probability."""


@dataclass(frozen=True)
class LookedAt:
    """The images that are looked at, and the model that looks.

    Attributes:
        images: those of the split, or the one file.
        what: in words.
        classes: the names of the model's answers; those beyond the classes of its data (data.num_classes) have none.
        labelled: whether the images' labels are among these.
        first: the number of the first answer that is of the images' task.
        painted: the numbers of the images that are painted.
    """

    config: ShowConfig
    model: Model
    loss: str
    precision: str
    images: ImageSet
    what: str
    classes: list[str]
    labelled: bool
    task: int | None
    first: int
    painted: list[int]

    def look(self, source: Source, *, only_painted: bool = False) -> ModelLook:
        """One pass of a checkpoint over the images, or only over as many as those that are painted need."""
        device, autocast = arithmetic(self.config.device, self.precision, self.config.threads)
        if "head.weight" not in source.weights:
            raise UsageError(f"checkpoint={source.label} has no head; softmoe finetune gives it one")
        vit = build(self.model, len(source.weights["head.weight"]))
        load_weights(vit, source.weights, keep_head=True, allow_unexpected=[])
        prepare(vit, device, self.precision)
        numbers = self._with_neighbours() if only_painted else np.arange(len(self.images))
        images = self.images.subset(numbers) if only_painted else self.images
        return look_at(
            vit.to(device), self._batches(images, device), painted=np.searchsorted(numbers, self.painted).tolist(),
            loss=self.loss, autocast=autocast, labelled=self.labelled, first_class=self.first,
        )  # fmt: skip

    def _with_neighbours(self) -> Int64[np.ndarray, " m"]:
        """The numbers of the painted images and of all that are in a routing group with one."""
        group = np.arange(len(self.images)) // self.model.images_per_group
        return np.flatnonzero(np.isin(group, group[self.painted]))

    def _batches(self, images: ImageSet, device: torch.device) -> Iterator[tuple[Batch, UInt8[np.ndarray, "b s s 3"]]]:
        data, model = self.config.data, self.model
        each = data.of_sets() if data.sets is not None else [data]
        mean, std = (torch.tensor([_for_channels(getattr(own, key), model.in_chans) for own in each])
                     for key in ("mean", "std"))  # fmt: skip
        found = eval_batches(
            images, data, image_size=model.image_size, in_chans=model.in_chans, batch_size=self.config.batch_size,
            device=device,
        )  # fmt: skip
        for batch in found:
            which = torch.zeros_like(batch.labels) if batch.task is None else batch.task
            seen = pixels_of(batch.images, mean[which.cpu()], std[which.cpu()])
            if self.task is not None:
                batch = batch._replace(task=torch.full_like(batch.labels, self.task))
            yield batch._replace(labels=batch.labels + self.first), seen


def _for_channels(numbers: Sequence[float], channels: int) -> list[float]:
    return list(numbers) if len(numbers) == channels else [numbers[0]] * channels


def subject_of(tree: dict[str, Any], source: Source, typed: Sequence[str]) -> LookedAt:
    """What `softmoe show` looks at with a checkpoint.

    Raises:
        UsageError: images that cannot be read or do not go with the model.
    """
    model = inherit.model_of(source, tree["trust"])
    named = inherit.names_data(tree["data"])
    inherit.take_data(tree, source, typed)
    inherit.take_task(tree, source, typed, named=named)
    config = door(tree, ShowConfig)
    check_channels(config.data, model.in_chans)
    check_evaluated("batch_size", config.batch_size, model)
    known, task, first = source.card["classes"], None, 0
    if config.task is not None:
        task = list(model.tasks or {}).index(config.task)
        first = sum(list((model.tasks or {}).values())[:task])
    if config.image is not None:
        if model.tasks and task is None:
            raise UsageError(f"image={config.image}: the checkpoint knows {', '.join(model.tasks)}; add task=NAME")
        images, what, labelled = _own_image(config.image, config.data, model), f"your image {config.image}", False
    else:
        if not named:
            inherit.check_here(config.data, source)
        splits = sets.load(config.data)
        splits.need(config.split)
        whole: ImageSet = getattr(splits, config.split)
        count = min(config.images, len(whole))
        images = whole.spread(count)
        labelled = splits.classes == (known if config.task is None else classes_of_task(config.task, known))
        some = f"{count:,} of {len(whole):,}" if count < len(whole) else f"all {count:,}"
        what = f"{some} {config.split} images of {config.data.name}"
    painted = np.linspace(0, len(images) - 1, min(config.painted, len(images))).round().astype(int).tolist()
    precision, head = config.precision or source.card["precision"], source.weights.get("head.weight", ())
    classes = [*map(printable, known), *(f"answer {number}" for number in range(len(known), len(head)))]
    return LookedAt(
        config, model, source.card["loss"], precision, images, what, classes, labelled, task, first, painted
    )  # fmt: skip


def _own_image(place: str, data: Data, model: Model) -> ImageSet:
    """The file as evaluation would see an image of a set: the centre square, at the set's size."""
    path = Path(place)
    if not path.is_file():
        raise UsageError(f"image={place} {'is no file' if path.exists() else 'does not exist'}")
    own = data.of_sets()[0] if data.sets is not None else data
    side = model.image_size if own.from_file or own.image_size is None else own.image_size
    stored = Stored.files(path.parent, [path.name])
    try:
        pixels = squares(stored, replace(own, image_size=side))
    except UsageError as error:
        raise UsageError(f"image={place}: {error}") from error
    return ImageSet(torch.zeros(1, dtype=torch.int64), pixels, side, own.channels)


def shown_of(subject: LookedAt, source: Source, folder: Path) -> Shown:
    """Every picture that the newest checkpoint of a run's folder gives, and the strip of all of them."""
    look = subject.look(source)
    sheets: dict[str, list[Sheet]] = {}
    captions = [_caption(subject, look, number) for number in look.painted]
    if look.said is not None:
        sheets["Worst images"] = [worst_sheet(look, subject.classes)]
    sheets["Who takes which patch"] = [routing_sheet(look, layer, captions) for layer in look.layers]
    if len(look.pixels) > 1:
        sheets["What each expert likes"] = [likes_sheet(look, layer) for layer in look.layers]
    if look.said is not None:
        own = subject.classes[subject.first :]
        sheets["By class"] = [classes_sheet(look, layer, own) for layer in look.layers if bool(layer.by_class.any())]
    sheets["Over training"] = over_training(subject, folder, subject.config.base)
    notes = [f"The router of {name} does not say which expert takes which token." for name in look.silent]
    if not look.layers and not look.silent:
        notes.append("The model has no layer with experts whose routing could be painted.")
    if not subject.labelled and subject.config.image is None:
        notes.append("The images have other classes than the checkpoint: predictions are not judged.")
    of = f"Seen: {printable(subject.what)}, by {printable(Path(source.label).parent.name)}."
    layers = [
        {"layer": layer.name, "experts": layer.num_experts, "dropped_share": layer.dropped_share,
         "load": (layer.load / layer.load.sum().clamp(min=1e-30)).tolist()}
        for layer in look.layers
    ]  # fmt: skip
    return Shown(of, look.said, subject.classes, sheets, notes, layers)


def _caption(subject: LookedAt, look: ModelLook, number: int) -> str:
    if look.said is None:
        return "the image"
    label, guess = int(look.said.label[number]), int(look.said.prediction[number])
    names = [shortened(printable(subject.classes[each]), 20) for each in (label, guess)]
    return names[0] if label == guess else f"{names[0]}, said {names[1]}"


def worst_sheet(look: ModelLook, classes: Sequence[str]) -> Sheet:
    """The images whose label has the smallest probability."""
    said = look.said
    assert said is not None
    cells = []
    for number in said.label_probability.argsort(stable=True)[:WORST].tolist():
        label, guess = (shortened(classes[int(each[number])], 20) for each in (said.label, said.prediction))
        own, its = (100 * float(each[number]) for each in (said.label_probability, said.probability))
        cells.append(Cell(enlarged(look.pixels[number]), f"{label} {own:.3g}%, said {guess} {its:.3g}%"))
    note = "The images whose label got the smallest probability: label, its probability, prediction, its probability."
    return Sheet("worst", "Worst images", note, [cells[i : i + 8] for i in range(0, len(cells), 8)])


def checkpoints_by_step(folder: Path) -> list[Path]:
    """The undamaged checkpoints of a run, the earliest first, one of each step."""
    found = {step_of(path): path for kind in ("best", "last") for path in numbered(folder / "checkpoints", kind)}
    return [path for _, path in sorted(found.items()) if damage(path) is None]


def over_training(subject: LookedAt, folder: Path, base: str | None) -> list[Sheet]:
    """The painted images' maps in every checkpoint of the run; nothing where it has one only."""
    looks: dict[int, ModelLook] = {}
    for path in checkpoints_by_step(folder):
        with suppress(UsageError):  # a run that goes on may have removed it by now
            looks[step_of(path)] = subject.look(inherit.named_source(str(path), base), only_painted=True)
    return strip_sheets(looks) if len(looks) > 1 else []
