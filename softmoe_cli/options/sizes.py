"""How large the named models are, as conf/model/_sizes.csv says, so that `softmoe list` need not build them.

`python -m softmoe_cli.options.sizes` writes the file anew, from cost/flop.py, when a model came or changed; a test
holds it.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from softmoe_cli.config.model import Model

SIDES_TO_TRY = (28, 32, 48, 64, 96, 128, 224)
"""Image sides for a model that takes images in the data set's own size: the first of these that its patches divide,
with at least four patches to a side, is used."""


@dataclasses.dataclass(frozen=True)
class Size:
    """One model on one image: pixels on its side, tokens, parameters, FLOPs of the forward pass."""

    image_size: int
    tokens: int
    params: int
    forward_flop: int


def read_sizes(conf: Path) -> dict[str, Size]:
    """The size of each named model; of none where the file is not there."""
    file = conf / "model/_sizes.csv"
    if not file.is_file():
        return {}
    rows = (line.split(",") for line in file.read_text().splitlines()[1:])
    return {name: Size(*map(int, figures)) for name, *figures in rows}


def size(model: Model) -> Size:
    """The size by cost/flop.py's formula: a paper's model gets a head of 1,000 classes, a smaller model one of 10."""
    from softmoe_cli.cost.flop import account

    cost = account(model, 1000 if model.image_size >= 224 else 10)
    return Size(model.image_size, cost.tokens, cost.params, cost.forward_flop)


def write_sizes(conf: Path, sizes: Iterable[tuple[str, Size]]) -> None:
    head = ["model", *(f.name for f in dataclasses.fields(Size))]
    rows = [head, *([name, *map(str, dataclasses.astuple(each))] for name, each in sizes)]
    (conf / "model/_sizes.csv").write_text("".join(f"{','.join(row)}\n" for row in rows))


def sized(name: str) -> Size | None:
    """The size of a named model of conf/, read without Hydra; None of one that follows the images."""
    from softmoe_cli.options.compose import door
    from softmoe_cli.options.conf_files import defaults, keys, value_of

    tree = defaults("cost", {"model": name})
    patch = tree["model"]["backbone"]["patch_size"]
    if not isinstance(patch, int):
        return None
    side = next(side for side in SIDES_TO_TRY if side % patch == 0 and side >= 4 * patch)
    tree["data"] |= {"image_size": side, "channels": 3}
    for key in keys(tree["model"], "model."):
        *path, leaf = key.split(".")
        node = tree
        for part in path:
            node = node[part]
        node[leaf] = value_of(tree, key)
    return size(door(tree["model"], Model))


if __name__ == "__main__":
    from softmoe_cli.options.conf_files import conf_folder, files

    found = {name: sized(name) for name in files("model")}
    write_sizes(conf_folder(), ((name, each) for name, each in found.items() if each is not None))
