"""softmoe list."""

from pathlib import Path

from softmoe_cli.options import conf_files, sizes
from softmoe_cli.options.conf_files import conf_folder
from softmoe_cli.options.list import LIST_WIDTH
from tests.conftest import Softmoe


def test_sizes_are_those_of_cost() -> None:
    """`python -m softmoe_cli.options.sizes` writes the file anew."""
    found = {name: sizes.sized(name) for name in conf_files.files("model")}
    assert sizes.read_sizes(conf_folder()) == {name: size for name, size in found.items() if size is not None}


def test_list(softmoe: Softmoe, tmp_path: Path) -> None:
    everything = softmoe("list").out
    assert max(map(len, everything.splitlines())) <= LIST_WIDTH
    assert "placement/every_2" in everything and "placement/_shared" not in everything
    rows = softmoe("list", "model", "--filter=SOFT").out.splitlines()
    (row,) = (row for row in rows if row.startswith("  vit_s16_soft "))
    assert row.split()[1:5] == ["224", "196", "923", "8.53"]
    assert not any("dense" in row for row in rows)
    assert softmoe("list", "routers").out.startswith("routers, model/router=\n  dense ")
    tasks = softmoe("list", "data").out.splitlines()[-1]
    assert tasks.endswith(": cifar10, cifar100, digits, fashion_mnist"), "neither files without classes nor mixes"
    for word, said in {
        "modles": "Did you mean 'models'?",
        "--flter": "it has --filter",
        "--filter": "needs a word",
    }.items():
        answer = softmoe("list", word)
        assert answer.code == 2 and said in answer.err
    assert "nothing has the word 'zzz'" in softmoe("list", "models", "--filter", "zzz").err
