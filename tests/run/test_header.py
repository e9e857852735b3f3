"""What is known of a checkpoint without its weights, against what is known with them."""

import copy
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from softmoe_cli.config.run import Config
from softmoe_cli.errors import UsageError
from softmoe_cli.options.compose import Jobs, plain
from softmoe_cli.options.inherit import resolve, resolved_early
from softmoe_cli.run.header import read_header
from softmoe_cli.run.sealed import sha256
from softmoe_cli.run.source import read_source
from tests.conftest import Softmoe
from tests.runs import saved


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("model.image_size=16", "data=fashion_mnist"),
        ("model.backbone.drop_path=0.1", "seed=3", "recipe=finetune_adamw"),
        ("data.validation_fraction=0.2", "optim.freeze=[patch_embed.*]"),
        ("adapter=soft_moa",),
    ],
)
def test_a_configuration_is_foreseen(words: tuple[str, ...], tmp_path: Path) -> None:
    file = saved(tmp_path / "base.safetensors", 0)
    jobs = Jobs("finetune", [f"checkpoint={file}", "train.steps=1", *words])
    ((config, typed),) = list(jobs)
    tree = plain(config, Config)
    before = copy.deepcopy(tree)
    known = resolved_early("finetune", tree, typed)
    assert known is not None and tree == before, "it changes nothing"
    config, source = resolve("finetune", tree, typed)
    assert source is not None and known[1] is not None
    assert known[0] == config
    assert (known[1].digest, known[1].card, known[1].label) == (source.digest, source.card, source.label)


def test_what_a_header_does_not_tell(tmp_path: Path) -> None:
    file = saved(tmp_path / "base.safetensors", 0)
    known = read_header(str(file))
    assert known is not None and known.card == read_source(str(file)).card and not known.weights
    weights = load_file(file)
    save_file(weights, tmp_path / "bare.safetensors")
    save_file({f"module.{key}": each for key, each in weights.items()}, tmp_path / "wrapped.safetensors", None)
    (tmp_path / "short.safetensors").write_bytes(file.read_bytes()[:30])
    (tmp_path / "long.safetensors").write_bytes(b"\xff" * 30)
    for name in ("bare", "wrapped", "short", "long"):
        assert read_header(str(tmp_path / f"{name}.safetensors")) is None
    with pytest.raises(UsageError, match="does not exist"):
        read_header(str(tmp_path / "nowhere"))


def test_a_file_that_changes_has_another_digest(tmp_path: Path) -> None:
    file = tmp_path / "file"
    digests = []
    for text in ("one", "two", "one"):
        file.write_text(text)
        digests += [sha256(file), sha256(file)]
    assert digests[0] == digests[1] == digests[4] != digests[2] == digests[3]
    then = file.stat()
    with file.open("r+") as other:  # the same inode, size and time of writing
        other.write("six")
    os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert sha256(file) != digests[4]


@pytest.mark.thorough
def test_a_run_that_began_with_other_weights_is_another(softmoe: Softmoe, tmp_path: Path) -> None:
    """The same command, once the file has other weights."""
    words = ("finetune", f"checkpoint={tmp_path / 'base.safetensors'}", "tracking=off", "train.steps=1")
    for seed in (0, 1, 1):
        saved(tmp_path / "base.safetensors", seed)
        answer = softmoe(*words)
        assert answer.code == 0, answer.err
    assert "is finished; nothing to do" in answer.out
    assert len(list((tmp_path / "outputs/default").iterdir())) == 2
