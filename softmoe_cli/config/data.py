"""The options of a data set."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

from softmoe_cli.config.option import MISSING, Section, option, typed
from softmoe_cli.errors import UsageError, nearest

WIDEST = 65_535
"""Pixels on a side that a JPEG may have."""
MOST_CLASSES = 10**7
"""The most classes: a longer list of names takes minutes and gigabytes before the first message."""
KNOWN_SETS = {"digits": 8, "fashion_mnist": 28, "cifar10": 32, "cifar100": 32}
"""The sets that softmoe knows, and the pixels on the side of their images."""
DATA_FORMATS = ("folder", "webdataset", "tfds", "arrow")
EXEMPLARS = "exemplars"
"""The name of data whose classes are single images of another set."""
OF_EXEMPLARS = ("source", "exemplars", "strength", "views")
"""What such data alone have."""
SOURCES = (*KNOWN_SETS, *DATA_FORMATS)
"""What they may be taken from."""
MIX_NAME = "mix"
"""The name of data that are several sets."""
OF_A_SET = (
    "name", "format", "root", "label", "num_classes", "image_size", "crop_pct", "channels", "mean", "std", "hflip",
    "shift", "validation_fraction", "test_fraction",
)  # fmt: skip
"""What each set of a mix has for itself, its root only where it is another one than the mix's."""
OF_THE_MIX = ("root", "crop", "area", "split_seed", "workers", "prefetch", "memory_gib", "max_megapixels")
"""What all sets of a mix have in common."""
IDLE_IN_A_MIX: dict[str, Any] = {
    "format": None, "label": None, "class_numbers": False, "crop_pct": None, "from_file": False, "mean": [0.0],
    "std": [1.0], "validation_fraction": 0.1, "test_fraction": 0.2, "cache": None,
}  # fmt: skip
"""What a mix leaves to its sets, with what stands there instead."""


@dataclass
class Data(Section):
    """A set of images with labels, cut into training, validation and test images once and for all."""

    path: ClassVar[str] = "data"
    name: str = option("which set; of your own files, what tables call it")
    format: str | None = option("how your own files are stored; null: a set that softmoe knows", choices=DATA_FORMATS)
    root: str = option("where its files are, or are downloaded to; unused by digits")
    label: str | None = option("archives: the field, feature or column with the labels; null: cls or label")
    class_numbers: bool = option(
        "evaluation: classes are called by their numbers among the checkpoint's, as in ImageNet-V2"
    )
    num_classes: int | None = option(
        "classes, and width of the model's head; null: as many as the files have", low=1, high=MOST_CLASSES
    )
    image_size: Any = option(
        "pixels on the side of a decoded image; files are resized and cut to it; auto: the model's or, where that "
        "follows the images, what suits them",
        low=1,
        high=WIDEST,
    )
    crop_pct: float | None = option(
        "share of a file's shorter side that the centre square keeps, as in timm; null: all", above=0, high=1
    )
    from_file: bool = option(
        "resize every file once, to model.image_size and with timm's transforms, instead of going through image_size"
    )
    channels: int = option("1 for grey, 3 for colour", low=1, high=3)
    mean: list[float] = option("subtracted from pixels in [0, 1]: one number, or one per channel")
    std: list[float] = option("divides the pixels after that", above=0)
    hflip: float = option("how often a mirrored image would still be natural; recipes read it", low=0, high=1)
    shift: float = option("how far, as a share of its side, an image may be moved; recipes read it", low=0, high=1)
    crop: str = option("which augment.crop suits it; recipes read it", choices=("none", "shift", "resized"))
    area: float = option("which augment.area suits it; recipes read it", above=0, high=1)
    split_seed: int = option(
        "seed of the split where the set brings none, not the run's; for a checkpoint's own set it is the checkpoint's;"
        " where a sweep varies it, compare counts cuts",
        low=0,
    )
    validation_fraction: float = option("share held out of the training images for choices", above=0, high=0.5)
    test_fraction: float = option(
        "share held out as test where the set brings no test images; 1: all are, for evaluation only", above=0, high=1
    )
    workers: int | None = option(
        "processes that decode files that are not in memory; null: one per CPU core; 0: the run's own", low=0
    )
    prefetch: int = option("batches that each of these processes decodes ahead", low=1)
    memory_gib: float = option("files that decode to more than this are read from disk as it goes", low=0)
    cache: str | None = option(
        "folder for decoded squares of image_size pixels, in one file that is written once and mapped into memory; "
        "null: each run decodes",
        absent=True,
    )
    max_megapixels: float = option("larger images are refused before they are decoded", above=0)
    source: str | None = option(
        "exemplars: the set whose training images are taken, as classes of one image each; root, label and so on are "
        "its own",
        choices=SOURCES,
        absent=True,
    )
    exemplars: int | None = option("exemplars: how many images, and so classes", low=2, high=MOST_CLASSES, absent=True)
    strength: float | None = option(
        "exemplars: how far views differ from their image; 0: not at all, 1: as softmoe_cli/data/views.py says, 2: "
        "twice as far",
        low=0,
        high=2,
        absent=True,
    )
    views: int | None = option(
        "exemplars: fixed views of each class for validation, and as many others for test", low=1, absent=True
    )
    sets: Any = option(
        "mix: the sets in any order, each of which is a task: [digits,fashion_mnist], or with options: [digits, {data: "
        "folder, name: site_a, root: PATH, num_classes: 3, image_size: 28}]",
        absent=True,
    )
    temperature: Any = option(
        "mix: a set of n training images is drawn from in proportion to n^(1/temperature); 1: as often as it has "
        "images, inf: as often as every other",
        above=0,
        absent=True,
    )

    def on_card(self) -> dict[str, Any]:
        """What a checkpoint says of its images. Where decoded ones are kept is not among it: whoever reads a checkpoint
        writes only where he says himself."""
        return asdict(replace(self, cache=None))

    @property
    def made_of(self) -> "Data":
        """Of exemplars the set that they are taken from; of other data themselves."""
        if self.source is None:
            return self
        nothing: dict[str, Any] = dict.fromkeys(OF_EXEMPLARS)
        format = self.source if self.source in DATA_FORMATS else None
        return replace(self, name=self.source, format=format, num_classes=None, **nothing)

    def of_sets(self) -> "list[Data]":
        """The sets of a mix, in the order of their tasks; of other data themselves."""
        if self.sets is None:
            return [self]
        common = {key: getattr(self, key) for key in OF_THE_MIX}
        common |= {"class_numbers": False, "from_file": False, "cache": None, **dict.fromkeys(OF_EXEMPLARS)}
        common |= {"sets": None, "temperature": None}
        return [Data(**common | own) for own in self.sets.values()]

    @property
    def tasks(self) -> dict[str, int] | None:
        """The classes of each task; None where the data are one set, and so no task can be told from another."""
        return None if self.sets is None else {name: own["num_classes"] for name, own in self.sets.items()}

    def check(self) -> None:
        single = self.name == EXEMPLARS and self.format is None
        idle = [] if single else [key for key in OF_EXEMPLARS if getattr(self, key) is not None]
        if idle:
            value = typed(getattr(self, idle[0]))
            raise UsageError(f"data.{idle[0]}={value} has no effect on data={self.name}; say data=exemplars")
        if self.name == MIX_NAME and self.format is None:
            check_mix(self)
        elif self.sets is not None or self.temperature is not None:
            said = {"temperature": self.temperature, "sets": None if self.sets is None else list(self.sets)}
            key, value = next((key, value) for key, value in said.items() if value is not None)
            raise UsageError(f"data.{key}={typed(value)} has no effect on data={self.name}; say data=mix")
        elif single:
            self._check_exemplars()
        else:
            self._check_set()

    def filled(self) -> Self:
        """A temperature is a number with a point, or inf, which YAML writes with a point before it."""
        if self.temperature in (".inf", math.inf):
            return replace(self, temperature="inf")
        return replace(self, temperature=float(self.temperature)) if type(self.temperature) is int else self

    def _check_set(self) -> None:
        if "://" in self.root:
            raise UsageError(
                f"data.root={self.root} is an address; a run must find each image again at any time, so download the "
                "set and name its folder"
            )
        check_side(self.name, self.format, self.image_size)
        if self.format is None:
            if self.name not in KNOWN_SETS:
                raise UsageError(
                    f"data.name={self.name} is not one of {', '.join(KNOWN_SETS)}.{nearest(self.name, KNOWN_SETS)} "
                    f"For files of your own set data.format: {', '.join(DATA_FORMATS)}"
                )
            given = {key: getattr(self, key) or None for key in ("label", "crop_pct", "from_file", "cache")}
            for key, value in given.items():
                if value is not None:
                    raise UsageError(f"data.{key}={value} has no effect on data={self.name}, which has no files")
        if self.cache is not None and self.from_file:
            raise UsageError(
                f"data.cache={self.cache} keeps squares of data.image_size pixels, and data.from_file=true cuts every "
                "image from its file; say data.from_file=false data.image_size=256, or data.cache=null"
            )
        if self.format == "folder" and self.label is not None:
            raise UsageError(f"data.label={self.label} has no effect with data.format=folder: folders are the labels")
        if self.class_numbers and self.test_fraction != 1:
            raise UsageError("data.class_numbers=true is for evaluation only, with data.test_fraction=1")
        if 0.5 < self.test_fraction < 1:
            raise UsageError(f"data.test_fraction={self.test_fraction:g} is neither at most 0.5 nor 1")
        if self.channels == 2:
            raise UsageError("data.channels=2 is neither 1 (grey) nor 3 (colour)")
        for key in ("mean", "std"):
            if len(getattr(self, key)) not in (1, 3):
                raise UsageError(f"data.{key}={getattr(self, key)} needs 1 number, or 3 for three colours")

    def _check_exemplars(self) -> None:
        check_source(self.name, self.source)
        for key in OF_EXEMPLARS:
            if getattr(self, key) is None:
                raise UsageError(f"data.{key}=null: data=exemplars needs a value")
        if self.from_file:
            raise UsageError("data.from_file=true: views are made of images in memory; give data.image_size instead")
        if self.test_fraction == 1:
            raise UsageError("data.test_fraction=1 leaves no training images of data.source to take exemplars from")
        if self.class_numbers:
            raise UsageError("data.class_numbers=true: exemplars are known by what their images show")
        self.made_of.check()


def check_source(name: str, source: Any) -> None:
    if name == EXEMPLARS and source not in SOURCES:
        raise UsageError(
            f"data.source={typed(source)} is not one of {', '.join(SOURCES)}.{nearest(str(source), SOURCES)} "
            "data=exemplars takes images of another set"
        )


def check_side(name: str, format: str | None, side: Any) -> None:
    """A number of pixels or, where there are files to look at, auto."""
    if side == "auto" and format is None:
        raise UsageError(f"data.image_size=auto is for files of your own; give data={name} a number of pixels")
    if side not in ("auto", MISSING) and type(side) is not int:
        raise UsageError(f"data.image_size={typed(side)} is neither a whole number of pixels nor auto")


def check_channels(data: Data, in_chans: int) -> None:
    """Grey images can be repeated into colour channels; nothing else converts by itself."""
    for each in data.of_sets():
        _check_channels(each, in_chans)


def _check_channels(data: Data, in_chans: int) -> None:
    if data.channels not in (1, in_chans):
        raise UsageError(
            f"model.in_chans={in_chans} cannot take data.channels={data.channels} of data={data.name}; "
            f"set data.channels={in_chans} to convert the images"
        )
    for key in ("mean", "std"):
        if len(getattr(data, key)) not in (1, in_chans):
            raise UsageError(f"data.{key}={getattr(data, key)} needs 1 or model.in_chans={in_chans} numbers")


def check_mix(data: Data) -> None:
    """Checks what a mix leaves to its sets, and that each of them is a task of its own.

    Raises:
        UsageError: it is no mix that can be trained on.
    """
    if "://" in data.root:
        raise UsageError(f"data.root={data.root} is an address; download the sets and name their folder")
    if not isinstance(data.sets, dict) or len(data.sets) < 2:
        raise UsageError(
            f"data.sets={typed(list(data.sets or []))} is no mix; name at least two sets: data.sets=[digits,cifar10]"
        )
    for key, value in IDLE_IN_A_MIX.items():
        if getattr(data, key) != value:
            raise UsageError(
                f"data.{key}={typed(getattr(data, key))} has no effect on data=mix, where each set has its own: "
                f"data.sets=[{{data: {next(iter(data.sets))}, {key}: …}}]"
            )
    if data.temperature not in ("inf", ".inf") and type(data.temperature) not in (int, float):
        raise UsageError(f"data.temperature={typed(data.temperature)} is neither a number above 0 nor inf")
    for each in data.of_sets():
        _check_part(each)
    if data.num_classes != sum(own["num_classes"] for own in data.sets.values()):
        raise UsageError(f"data.num_classes={data.num_classes} is not the number of classes of all sets; leave it out")
    if data.channels != max(own["channels"] for own in data.sets.values()):
        raise UsageError(f"data.channels={data.channels} is not the most that a set of the mix has; leave it out")


def _check_part(part: Data) -> None:
    """Checks one set of a mix."""
    where = f"data.sets, {part.name}"
    if part.name == MIX_NAME and part.format is None:
        raise UsageError(f"{where}: a mix is of sets alone; name the sets of both mixes in one list")
    if type(part.num_classes) is not int or type(part.image_size) is not int:
        raise UsageError(f"{where}: say num_classes and image_size, which a mix must know before it reads a file")
    if part.num_classes < 2:
        raise UsageError(f"{where}: a set of one class is no task, since its answer is always the same")
    if part.test_fraction == 1:
        raise UsageError(f"{where}: test_fraction=1 leaves no training and validation images, which each task needs")
    if "/" in part.name:
        raise UsageError(f"{where}: a task's name is a part of class names, and cannot have / in it")
    part.settled()
