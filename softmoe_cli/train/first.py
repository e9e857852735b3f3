"""What a training command does before torch is imported: it says what runs, finds faults of the images' files, and
knows a run that has ended before."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from softmoe_cli.config.recipe import BUDGETS
from softmoe_cli.config.run import Config
from softmoe_cli.run.finished import finished
from softmoe_cli.run.identity import run_folder
from softmoe_cli.terminal import Screen
from softmoe_cli.text import several

if TYPE_CHECKING:
    from softmoe_cli.run.header import Source


@dataclass(frozen=True)
class Images:
    """Images whose files have no fault that can be seen without decoding them; `digest` is what `contents.identity`
    says of them."""

    digest: str | None


def what_runs(config: Config) -> str:
    """The first line of a training command, from its settings alone."""
    t = config.train
    key = next(key for key in BUDGETS if getattr(t, key) is not None)
    amount, unit = getattr(t, key), key.removesuffix("s")
    budget = several(amount, unit) if float(amount).is_integer() else f"{amount:g} {unit}s"
    start = "" if config.checkpoint is None else f" from {config.checkpoint}"
    images = "as many images as fit" if t.batch_size == "auto" else several(t.batch_size, "image")
    return f"{config.model.name}{start} on {config.data.name}: {budget}, {images} an update, seed {config.seed}"


@dataclass(frozen=True)
class First:
    """What a run's settings have told. `images`: None where nobody has looked at their files. `ended`: the folder
    of one that has ended before, which was said."""

    screen: Screen
    images: Images | None
    ended: Path | None


def first_words(command: str, config: Config, source: "Source | None") -> First:
    """Says what runs, and finds out whether it has run before.

    Raises:
        UsageError: the images cannot be used, or the run's folder holds a damaged result, or can be no run's.
    """
    screen = Screen(quiet=os.environ.get("RANK", "0") != "0")
    screen.sentence(what_runs(config))
    if "RANK" in os.environ:  # one of several processes that train one model: they look together
        return First(screen, None, ended=None)
    from softmoe_cli.data.contents import identity

    images = Images(identity(config.data, to_train=True))
    return First(screen, images, ended=_ended(config, command, source, images, screen))


def _ended(config: Config, command: str, source: "Source | None", images: Images, screen: Screen) -> Path | None:
    """The folder of a run that has ended before, None of another; says what it has reached.

    Raises:
        UsageError: its folder holds a damaged result, or can be no run's.
    """
    if "auto" in (
        config.train.batch_size,
        config.train.precision,
    ):  # a part of what the run is, that the device decides
        return None
    folder = run_folder(config, command, source, images.digest)
    result = finished(folder)
    if result is None:
        return None
    from softmoe_cli.train.ending import close_again  # which needs numpy

    close_again(screen, config, result, folder)
    return folder
