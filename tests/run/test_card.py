"""A checkpoint may say anything of itself: nothing is imported or allocated for it before that is known to be so."""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from softmoe_cli.data import sets
from softmoe_cli.errors import UsageError
from softmoe_cli.model.vit import build, portable
from softmoe_cli.model.weights import load_weights
from softmoe_cli.options.inherit import model_of
from softmoe_cli.run.card import CARD_FORMAT, read_card
from softmoe_cli.run.header import Source
from softmoe_cli.run.source import read_source
from tests.conftest import TINY, Softmoe
from tests.oracles import compose


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as a run would save it."""
    config = compose(*TINY[1:])
    vit = build(config.model, 10)
    card: dict[str, Any] = {"format": CARD_FORMAT, "model": portable(config.model, vit), "data": asdict(config.data)}
    card |= {"classes": sets.load(config.data).classes, "loss": "softmax", "precision": "fp32"}
    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    save_file(vit.state_dict(), path, metadata={"softmoe": json.dumps(card)})
    return path


def changed(card: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    card = copy.deepcopy(card)
    *sections, leaf = key.split(".")
    node = card
    for section in sections:
        node = node[section]
    if value is ...:
        del node[leaf]
    else:
        node[leaf] = value
    return card


OTHERS: tuple[Any, ...] = (None, "x", 5, {}, True, ...)
SHAPES: list[tuple[str, Any]] = [
    (key, value)
    for key in (
        "format",
        "model",
        "data",
        "model.backbone",
        "model.router",
        "classes",
        "loss",
        "precision",
        "data.mean",
    )
    for value in OTHERS
]
SHAPES += [(key, []) for key in ("model", "data", "classes", "loss")]
SHAPES += [("receipt", None), ("receipt", [1]), ("receipt", "x"), ("receipt", {"optimizer": []}), ("origin", 5)]
SHAPES += [("model.router._target_", 5), ("model.moe_blocks", 5), ("model.image_size", 8.5), ("model.nosuch", 1)]
SHAPES += [("loss", "hinge"), ("precision", "fp8"), ("classes", ["a", 5]), ("data.mean", [float("nan")])]
SHAPES += [("data.root", "${oc.env:HOME}"), ("data.num_classes", 10**30), ("model.backbone.name", "\x1b[31m")]
SHAPES += [("model.tasks", tasks) for tasks in (3, ["a"], {"a": "b"}, {"a": True})]


@pytest.mark.parametrize(("key", "value"), SHAPES, ids=str)
def test_a_card_of_another_shape_is_one_sentence(key: str, value: Any, saved: Path) -> None:
    card = changed(read_source(str(saved)).card | {"receipt": {}, "origin": "x"}, key, value)
    with pytest.raises(UsageError, match=r"^checkpoint=FILE: what it says of its model"):
        read_card(json.dumps(card), Path("FILE"))


def test_a_card_of_another_format_says_which_is_read(saved: Path) -> None:
    card = read_source(str(saved)).card | {"format": CARD_FORMAT + 1}
    with pytest.raises(
        UsageError, match=rf"is of format {CARD_FORMAT + 1}, and this version of softmoe reads format {CARD_FORMAT};"
    ):
        read_card(json.dumps(card), Path("FILE"))


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "", "hello", "null", "[]", "9" * 5000])
def test_a_card_that_is_no_card_is_one_sentence(text: str) -> None:
    with pytest.raises(UsageError, match=r"^checkpoint=FILE: what it says of its model"):
        read_card(text, Path("FILE"))


def test_a_card_as_saved_is_read(saved: Path) -> None:
    card = read_source(str(saved)).card
    assert read_card(json.dumps(card), Path("FILE")) == card


SIZES = {
    f"{key}={value:g}": (key, value)
    for key in ("router.num_experts", "image_size", "backbone.width", "backbone.depth", "backbone.mlp_width")
    for value in (2**20, 2**40, 2**62)
} | {"router.slots_per_expert=2^40": ("router.slots_per_expert", 2**40), "depth": ("backbone.depth", 1)}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_held_against_the_weights_before_they_are_taken(size: str, saved: Path) -> None:
    source = read_source(str(saved))
    card = changed(source.card, f"model.{SIZES[size][0]}", SIZES[size][1])
    with pytest.raises(UsageError, match=r"^checkpoint=x "):
        model_of(Source("x", "", source.weights, card), None)


def test_sizes_are_held_against_the_weights_by_every_command(softmoe: Softmoe, saved: Path, tmp_path: Path) -> None:
    card = changed(read_source(str(saved)).card, "model.backbone.mlp_width", 2**31 - 1)
    save_file(load_file(saved), tmp_path / "x.safetensors", metadata={"softmoe": json.dumps(card)})
    for command in ("evaluate", "export", "finetune", "upcycle"):
        answer = softmoe(command, "checkpoint=x.safetensors", *([] if command == "export" else ["data=digits"]))
        assert answer.code == 2 and answer.err.startswith("softmoe: checkpoint=x.safetensors "), answer


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_weights_that_are_no_fractions_are_refused(kind: torch.dtype, saved: Path) -> None:
    vit = build(compose(*TINY[1:]).model, 10)
    weights = load_file(saved)
    with pytest.raises(UsageError, match=r"norm\.weight in the checkpoint is of torch"):
        load_weights(
            vit, weights | {"norm.weight": weights["norm.weight"].to(kind)}, keep_head=True, allow_unexpected=[]
        )


def test_fewer_outputs_than_classes_are_refused(saved: Path, tmp_path: Path) -> None:
    weights = load_file(saved) | {"head.weight": torch.zeros(3, 16)}
    save_file(weights, tmp_path / "x.safetensors", metadata={"softmoe": json.dumps(read_source(str(saved)).card)})
    with pytest.raises(UsageError, match="10 classes"):
        read_source(str(tmp_path / "x.safetensors"))


PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "state_dict.", "ema.module.")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_wrappers_put_before_every_name_is_taken_off(prefix: str, saved: Path, tmp_path: Path) -> None:
    weights = load_file(saved)
    wrapped = {f"{prefix}{key}": value for key, value in weights.items()}
    if "ema" in prefix:
        wrapped["n_averaged"] = torch.tensor(3)  # torch.optim.swa_utils
    save_file(wrapped, tmp_path / "x.safetensors")
    source = read_source(str(tmp_path / "x.safetensors"))
    assert source.prefix == prefix and source.weights.keys() == weights.keys()
    save_file(wrapped | {"other": torch.ones(1)}, tmp_path / "x.safetensors")  # not before every name
    assert read_source(str(tmp_path / "x.safetensors")).weights.keys() == {*wrapped, "other"}


def test_names_of_a_wrapper_are_told(softmoe: Softmoe, saved: Path, tmp_path: Path) -> None:
    wrapped = {f"module.{key}": value for key, value in load_file(saved).items()}
    save_file(wrapped, tmp_path / "x.safetensors", metadata={"softmoe": json.dumps(read_source(str(saved)).card)})
    answer = softmoe("evaluate", "checkpoint=x.safetensors", "threads=1")
    assert answer.code == 0 and "every name in it begins with 'module.'" in answer.err, answer


def test_places_that_cannot_be_read_are_one_sentence(saved: Path, tmp_path: Path) -> None:
    for name in ("n" * 300, "a\0b", f"{saved}/x", "/proc/self/mem"):
        with pytest.raises(UsageError, match=r"^checkpoint="):
            read_source(name)
    (tmp_path / "SHA256SUMS").mkdir()
    (tmp_path / "model.safetensors").write_bytes(saved.read_bytes())
    with pytest.raises(UsageError, match="SHA256SUMS is no file"):
        read_source(str(tmp_path))
