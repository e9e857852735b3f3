"""What several tests of image sets share."""

from pathlib import Path

import pytest

from tests.data.trees import write_tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("images"))
