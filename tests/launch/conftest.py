"""What several tests of sweeps share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.sweeps import LINE, finish
from tests.processes import Started


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of `softmoe train` with one seed and 30 steps, made once."""
    made: dict[str, Path] = {}

    def run(seed: str) -> Path:
        if seed not in made:
            folder = tmp_path_factory.mktemp("alone")
            finish(Started(folder, ["train", *LINE, "train.steps=30", seed], {}))
            (made[seed],) = (path.parent for path in folder.glob("outputs/default/*/result.json"))
        return made[seed]

    return run
