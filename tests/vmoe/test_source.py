"""Official weights: files that the official code wrote with random weights (make.py), read without JAX; logits, images
of other sizes, older names, and files that are damaged or of another model."""

import io
import json
import re
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from torch import Tensor

from softmoe_cli.errors import UsageError
from softmoe_cli.model.pretrained import read_checkpoint
from softmoe_cli.model.vit import build
from softmoe_cli.model.weights import load_weights
from softmoe_cli.options.inherit import model_of
from softmoe_cli.run.header import Source
from softmoe_cli.vmoe import arrays
from softmoe_cli.vmoe.source import sincos2d
from tests.conftest import Softmoe
from tests.data.trees import write_tree
from tests.vmoe.make import images

MADE = Path(__file__).parent / "made"
LOGITS: dict[str, list[list[float]]] = json.loads((MADE / "logits.json").read_text())
CASES = {
    "v_moe": "v_moe",
    "soft_moe": "soft_moe.msgpack",
    "experts_choice": "experts_choice.msgpack@router:experts_choice",
    "big_vision": "big_vision.npz",
    "sincos2d": "sincos2d.npz@image_size:12",
}


def read(name: str, folder: Path = MADE) -> Source:
    return read_checkpoint(f"vmoe:{folder / name}")


def logits_of(source: Source) -> Tensor:
    vit = build(model_of(source, None), 5).eval()
    report = load_weights(vit, source.weights, keep_head=True, allow_unexpected=[])
    assert (report.new, report.resized, report.unexpected) == ([], [], [])
    with torch.no_grad():
        found: Tensor = vit(torch.from_numpy(images(12)).permute(0, 3, 1, 2))
    return found


def is_official(found: Tensor, name: str) -> None:
    torch.testing.assert_close(found, torch.tensor(LOGITS[name]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_official_codes(name: str) -> None:
    is_official(logits_of(read(CASES[name])), name)


def test_shapes_say_what_the_model_is() -> None:
    model = read("v_moe").card["model"]
    own = {key: model["backbone"][key] for key in ("patch_size", "width", "depth", "heads", "mlp_width", "qk_norm")}
    assert own == {"patch_size": 4, "width": 8, "depth": 4, "heads": 2, "mlp_width": 12, "qk_norm": "none"}
    assert (model["backbone"]["class_token"], model["backbone"]["pre_logits"], model["image_size"]) == (True, True, 12)
    assert (model["moe_blocks"], model["blocks"], model["expert_width"]) == ([1, 3], {}, None)
    router = model["router"]
    assert (router["num_experts"], router["k"], router["capacity_factor"], model["in_chans"]) == (4, 2, 2.0, 3)
    soft = read("soft_moe.msgpack").card["model"]
    assert (soft["router"]["num_experts"], soft["router"]["slots_per_expert"], soft["moe_blocks"]) == (3, 2, [3])
    assert (soft["backbone"]["qk_norm"], soft["backbone"]["pool"], soft["backbone"]["pre_logits"]) == (
        "scale",
        "avg",
        False,
    )
    assert read("sincos2d.npz").card["model"]["image_size"] == 224


def test_what_is_said_behind_the_path_decides(tmp_path: Path) -> None:
    one = read("v_moe@k:1@capacity_factor:1.5")
    assert (one.card["model"]["router"]["k"], one.card["model"]["router"]["capacity_factor"], one.assumed) == (
        1,
        1.5,
        "",
    )
    assert (logits_of(one) - torch.tensor(LOGITS["v_moe"])).abs().max() > 0.01
    assert "@k:1, @router:experts_choice" in read("v_moe").assumed
    at = tmp_path / "a@b"
    at.mkdir()
    shutil.copy(MADE / "soft_moe.msgpack", at)
    assert read("soft_moe.msgpack", at).assumed == ""
    for words, message in {
        "v_moe@kk:1": "@kk is none of @router, @image_size, @k.*Did you mean 'k'",
        "v_moe@k:5": "@k:5 is no number from 1 to 4",
        "v_moe@router:soft": "@router:soft is none of tokens_choice, tokens_choice_bpr, experts_choice",
        "v_moe@image_size:12": "@image_size has no effect",
        "v_moe@router:experts_choice@k:1": "@k has no effect",
        "soft_moe.msgpack@k:1": "@k has no effect",
        "sincos2d.npz@image_size:13": "images of 13 pixels are no whole patches of 4",
        "v_moe@k:1@k:2": "@k is said twice",
        "v_moe@k:²": "@k:² is no whole number from 1 on",
        "v_moe@images_per_group:0": "@images_per_group:0 is no whole number from 1 on",
        "v_moe@capacity_factor:0.001": "@capacity_factor:0.001 gives no slot to any of 4 experts, of ",
        "v_moe@capacity_factor:abc": "@capacity_factor:abc is no number above 0",
        "v_moe@capacity_rounding:up": "@capacity_rounding:up is none of ceil, round",
    }.items():
        with pytest.raises(UsageError, match=message):
            read(words)


def test_computed_positions_are_the_formulas() -> None:
    """The formula once more, number by number: sine and cosine of column and row times 10000^(-i / (width / 4 - 1))."""
    got = sincos2d(3, 16)
    for token in range(9):
        row, column = divmod(token, 3)
        omega = [10_000 ** -(i / 3) for i in range(4)]
        want = [f(place * w) for place in (column, row) for f in (np.sin, np.cos) for w in omega]
        torch.testing.assert_close(got[token], torch.tensor(want, dtype=torch.float32), atol=1e-6, rtol=0)


# --- other forms of the same weights ----------------------------------------------------------------------------------


def archived(path: Path, named: dict[str, np.ndarray]) -> Path:
    kept: dict[str, Any] = dict(named)
    np.savez(path, **kept)
    return path


def big_vision() -> dict[str, np.ndarray]:
    with np.load(MADE / "big_vision.npz") as file:
        return {name.removeprefix("params/"): file[name] for name in file.files}


OLD = {
    "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1", "LayerNorm_1": "LayerNorm_2",
    "MlpBlock_0": "MlpBlock_3",
}  # fmt: skip


def older(named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names of vision_transformer's archives: other numbers, the table in a module of its own, in column order."""
    renamed = {}
    for name, value in named.items():
        new = name.replace("pos_embedding", "Transformer/posembed_input/pos_embedding")
        for now, then in OLD.items():
            new = new.replace(now, then)
        renamed[f"opt/target/{new}"] = np.asfortranarray(value) if value.ndim > 1 else value
    return renamed | {"opt/state/step": np.array(7)}


def with_own_position(named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A class token that was put before the patches first: it has a position, which is taken off the token here."""
    table, own = named["pos_embedding"], np.full((1, 1, 8), 0.25, dtype=np.float32)
    return named | {"cls": named["cls"] - own, "pos_embedding": np.concatenate([own, table], axis=1)}


@pytest.mark.parametrize("change", [older, with_own_position])
def test_older_names_and_tables_are_the_same_model(
    change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    archived(tmp_path / "old.npz", change(big_vision()))
    is_official(logits_of(read("old.npz", tmp_path)), "big_vision")


def test_arrays_that_flax_cuts_are_joined(tmp_path: Path) -> None:
    """flax cuts an array of more than 2^30 bytes, under the key that arrays.CHUNKED is."""
    tree = msgpack.unpackb((MADE / "soft_moe.msgpack").read_bytes(), raw=False)
    kernel = tree["params"]["head"]["kernel"]
    shape, dtype, data = msgpack.unpackb(kernel.data, raw=False)
    parts = [((len(half) // 4,), dtype, half) for half in (data[:64], data[64:])]
    chunks = {str(i): msgpack.ExtType(1, msgpack.packb(part, use_bin_type=True)) for i, part in enumerate(parts)}
    sides = {str(i): side for i, side in enumerate(shape)}
    tree["params"]["head"]["kernel"] = {arrays.CHUNKED: True, "shape": sides, "chunks": chunks}
    (tmp_path / "cut.msgpack").write_bytes(msgpack.packb(tree))
    is_official(logits_of(read("cut.msgpack", tmp_path)), "soft_moe")
    del chunks["1"]
    (tmp_path / "cut.msgpack").write_bytes(msgpack.packb(tree))
    with pytest.raises(UsageError, match=r"head/kernel is said to be \(8, 5\) and holds 64 bytes"):
        read("cut.msgpack", tmp_path)


# --- as a user types it -----------------------------------------------------------------------------------------------


def test_evaluation_takes_classes_in_their_order(softmoe: Softmoe, tmp_path: Path) -> None:
    """Of the data with as many classes as the head has outputs, the names stand in the order of the outputs."""
    write_tree(tmp_path / "images", per_class=6, classes=("ant", "bee", "cat", "dog", "eel"))
    words = ["data=folder", "data.root=images", "data.test_fraction=1", "data.workers=0", "format=json", "threads=1"]
    answer = softmoe("evaluate", f"checkpoint=vmoe:{MADE}/v_moe", *words)
    assert answer.code == 0, answer.err
    row = json.loads(answer.out)
    assert row["classes"] == "in the order of the data's names: the checkpoint has none" and row["images"] == 30
    assert "taken to choose 2 experts" in answer.err and "loss" in row
    few = softmoe("evaluate", f"checkpoint=vmoe:{MADE}/v_moe", "data=digits", "format=json")
    assert few.code == 2 and "knows 5 classes (0, 1, 2, …), but data=digits has 10 classes" in few.err
    none = softmoe("evaluate", f"checkpoint=vmoe:{MADE}/v_moe")
    assert none.code == 2 and "names no images; choose some with data=" in none.err


def test_finetuning_and_export_begin_with_them(softmoe: Softmoe) -> None:
    made = f"checkpoint=vmoe:{MADE}/soft_moe.msgpack"
    short = ["train.steps=2", "train.batch_size=4", "threads=1", "tracking=off", "model.image_size=8"]
    answer = softmoe("finetune", made, "data=digits", *short)
    assert answer.code == 0, answer.err
    assert "pos_embed 9 -> 4 positions" in answer.out and "head.weight" in answer.out
    made = f"checkpoint=vmoe:{MADE}/v_moe"  # with a layer before its head, which timm has not
    answer = softmoe("export", made, "data=digits", "threads=1", "images=8", "folder=out", "format=json")
    assert answer.code == 0, answer.err
    again = read_checkpoint("out")
    assert again.weights.keys() == read("v_moe").weights.keys() and again.card["unnamed"]
    is_official(logits_of(again), "v_moe")


def with_ten(path: Path) -> list[str]:
    """A ViT of ten outputs, and the digits, which are called 0 to 9 as outputs without names are."""
    ten = {"head/kernel": np.zeros((8, 10), "f"), "head/bias": np.zeros(10, "f")}
    archived(path, big_vision() | ten)
    return [f"checkpoint=vmoe:{path}", "data=digits", "threads=1"]


def test_numbers_are_no_names_of_classes(softmoe: Softmoe, tmp_path: Path) -> None:
    """In finetuning the head is new."""
    short = ["train.steps=1", "train.batch_size=4", "tracking=off", "model.image_size=8"]
    answer = softmoe("finetune", *with_ten(tmp_path / "ten.npz"), *short)
    assert answer.code == 0 and re.search(r"new +head\.weight, head\.bias", answer.out), answer.err + answer.out


@pytest.mark.thorough
def test_numbers_are_no_names_of_classes_to_upcycle(softmoe: Softmoe, tmp_path: Path) -> None:
    router = ["model/router=soft", "model.router.num_experts=2", "model.moe_blocks=last_1"]
    made = with_ten(tmp_path / "ten.npz")
    answer = softmoe("upcycle", *made, *router, "images=8", "folder=out", "format=json")
    assert answer.code == 0, answer.err
    keys = read_checkpoint("out").card["receipt"]["keys"]
    assert keys["head.weight"]["from"] is None and keys["norm.weight"]["from"] is not None


def test_pruning_writes_what_can_be_read(softmoe: Softmoe, tmp_path: Path) -> None:
    """The official card knows no images, and so the new one has those that pruning was given; classes stay unnamed, and
    nothing is scored by numbers that only look like the data's names."""
    write_tree(tmp_path / "images", per_class=8, classes=tuple("01234"))
    words = ["data=folder", "data.root=images", "data.test_fraction=0.25", "data.workers=0", "threads=1"]
    answer = softmoe("prune", f"checkpoint=vmoe:{MADE}/v_moe", "keep=2", "images=8", "folder=out", *words)
    assert answer.code == 0, answer.err
    card = read_checkpoint("out").card
    assert card["receipt"]["validation"] == {"before": None, "after": None}
    assert (card["data"]["name"], card["data"]["root"], card["unnamed"]) == ("folder", "images", True)
    answer = softmoe("evaluate", "checkpoint=out", "threads=1", "format=json")
    assert answer.code == 0, answer.err
    row = json.loads(answer.out)
    assert row["classes"].startswith("in the order of the data's names") and "loss" in row
    answer = softmoe("prune")
    assert answer.code == 2 and "hf-hub:OWNER/NAME or vmoe:PATH" in answer.err


# --- files that cannot be used ----------------------------------------------------------------------------------------


def refused(path: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_checkpoint(f"vmoe:{path}")


def copied(folder: Path) -> Path:
    for file in MADE.glob("v_moe.*"):
        shutil.copy(file, folder)
    return folder / "v_moe"


def test_shards_that_lack_something_are_named(tmp_path: Path) -> None:
    path = copied(tmp_path)
    read_checkpoint(f"vmoe:{path}.index")
    refused(f"{path}.data-00001-of-00003", "one of several files; name what comes before .data-: v_moe")
    second = tmp_path / "v_moe.data-00001-of-00003"
    whole = second.read_bytes()
    second.write_bytes(whole[:-40])
    refused(str(path), r"v_moe\.data-00001-of-00003 is no msgpack of flax's, or is truncated or damaged")
    pieces = msgpack.unpackb(whole, raw=False)
    key = max((key for key, each in pieces.items() if isinstance(each, list)), key=lambda key: len(pieces[key]))
    numbers, box = pieces[key][0]
    pieces[key] = pieces[key][1:]
    second.write_bytes(msgpack.packb(pieces))
    refused(str(path), r"a part of params/\S+ is in none of its files")
    pieces[key] = [[numbers[:-1] + [numbers[-1]] * 2, box]]
    second.write_bytes(msgpack.packb(pieces))
    refused(str(path), r"v_moe\.data-00001-of-00003: params/\S+ has a piece of \d+ numbers where \(.*\) belong")
    second.unlink()
    refused(str(path), r"v_moe\.data-00001-of-00003 is missing")
    index = msgpack.unpackb((tmp_path / "v_moe.index").read_bytes(), raw=False)
    (tmp_path / "v_moe.index").write_bytes(msgpack.packb(index | {"version": "20210101"}))
    refused(str(path), "says version 20210101, and only 20220622 is known")


@pytest.mark.parametrize(
    ("sides", "message"), [([2**40], "says more than its files hold"), ([2**47] * 3 + [0], "head/bias is empty")]
)
def test_an_index_cannot_ask_for_more_than_its_files_hold(sides: list[int], message: str, tmp_path: Path) -> None:
    path = copied(tmp_path)
    index = msgpack.unpackb((tmp_path / "v_moe.index").read_bytes(), raw=False)
    described, spans, shards = msgpack.unpackb(index["index"]["params"]["head"]["bias"].data, raw=True)
    shape = msgpack.packb([sides, *msgpack.unpackb(described, raw=True)[1:]])
    index["index"]["params"]["head"]["bias"] = msgpack.ExtType(8, msgpack.packb([shape, spans, shards]))
    (tmp_path / "v_moe.index").write_bytes(msgpack.packb(index))
    refused(str(path), message)


def test_other_files_are_refused_by_a_sentence(tmp_path: Path) -> None:
    refused(str(tmp_path / "none"), r"there is neither a file none nor none\.index")
    refused(str(tmp_path), "a folder, as orbax and tensorstore write them")
    whole = (MADE / "big_vision.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:-300])
    refused(str(tmp_path / "cut.npz"), "an archive that ends too early")
    (tmp_path / "cut.msgpack").write_bytes((MADE / "soft_moe.msgpack").read_bytes()[:-9])
    refused(str(tmp_path / "cut.msgpack"), r"cut\.msgpack is no msgpack of flax's, or is truncated or damaged")
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    refused(str(tmp_path / "noise"), "noise is no msgpack of flax's")
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    (tmp_path / "flipped.npz").write_bytes(flipped)
    refused(str(tmp_path / "flipped.npz"), "truncated or damaged")
    objects = io.BytesIO()
    np.save(objects, np.array([{}], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "pickle.npz", "w") as archive:
        archive.writestr("embedding/kernel.npy", objects.getvalue())
    refused(str(tmp_path / "pickle.npz"), "embedding/kernel is a pickle, which can run code")
    archived(tmp_path / "other.npz", {"conv/kernel": np.zeros(3)})
    refused(
        str(tmp_path / "other.npz"), r"it holds no ViT: there is no embedding/kernel among its 1 arrays \(conv/kern"
    )


def headed(text: str) -> bytes:
    """The beginning of a .npy file, with a header of any text."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


KERNEL = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s)}"
HEADERS = {
    "ends early": "{'descr': '<f4', 'shape': (1,",
    "dict as key": "{{}: 1}",
    "list as key": "{[]: 1}",
    "no type": "{'descr': ',,,', 'fortran_order': False, 'shape': (1,)}",
    "truth as side": KERNEL % "True,",
    "side below 0": KERNEL % "-1,",
    "nested": "-" * 9000 + "1",
}


@pytest.mark.parametrize("fault", HEADERS)
def test_headers_that_are_no_numpys_are_refused(fault: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        archive.writestr("embedding/kernel.npy", headed(HEADERS[fault]) + bytes(4))
    refused(str(tmp_path / "bad.npz"), "it is no archive of arrays, or is truncated or damaged")


def test_an_archive_with_a_password_is_refused(tmp_path: Path) -> None:
    whole = bytearray((MADE / "big_vision.npz").read_bytes())
    place = -1
    while (place := whole.find(b"PK\x01\x02", place + 1)) >= 0:
        whole[place + 8] |= 1  # the flag in the archive's list; zipfile compares it with the entry's own
    while (place := whole.find(b"PK\x03\x04", place + 1)) >= 0:
        whole[place + 6] |= 1
    (tmp_path / "closed.npz").write_bytes(whole)
    refused(str(tmp_path / "closed.npz"), "no archive of arrays.*encrypted")


def test_an_archive_is_read_no_further_than_its_shapes_say(tmp_path: Path) -> None:
    """A little file can hold gigabytes of zeros: here 64 MB, of which less than a tenth may be in memory."""
    with zipfile.ZipFile(tmp_path / "zeros.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("embedding/kernel.npy", headed(KERNEL % "2,") + bytes(2**26))
    message = r"embedding/kernel is said to be \(2,\) of float32 and holds more than 8 bytes"
    refused(str(tmp_path / "zeros.npz"), message)  # and imports what reading needs
    tracemalloc.start()
    refused(str(tmp_path / "zeros.npz"), message)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**26 / 10
    with zipfile.ZipFile(tmp_path / "lzma.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("embedding/kernel.npy", headed(KERNEL % "2,") + bytes(8))
    refused(str(tmp_path / "lzma.npz"), "embedding/kernel is compressed as no array of numpy's is")


def test_messages_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    """An array of which only the number of bytes is there, and dicts in dicts."""
    path = tmp_path / "bad.msgpack"
    array = msgpack.ExtType(1, msgpack.packb(((2**10,), "float32", 2**12), use_bin_type=True))
    path.write_bytes(msgpack.packb({"embedding": {"kernel": array}}))
    refused(str(path), "truncated or damaged .an array without numbers")
    path.write_bytes(b"\x81\xa1a" * 1000 + b"\x80")
    refused(str(path), "dicts in dicts, more than 100 deep")


def without(named: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in named.items() if key != name}


BLOCK = "Transformer/encoderblock_0"
WRONG: dict[str, tuple[Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], str]] = {
    "missing": (lambda n: without(n, f"{BLOCK}/LayerNorm_0/bias"), f"it lacks {BLOCK}/LayerNorm_0/bias"),
    "shape": (lambda n: n | {"head/bias": np.zeros(4, "f")}, r"head/bias is \(4,\), where \(5\) belongs"),
    "heads": (
        lambda n: n | {f"{BLOCK}/MultiHeadDotProductAttention_0/key/bias": np.zeros((4, 2), "f")},
        r"key/bias is \(4, 2\), where \(2, 4\) belongs",
    ),
    "type": (lambda n: n | {"head/bias": np.zeros(5, "i4")}, "head/bias is of int32, which no weight is"),
    "stacked": (
        lambda n: n | {"Transformer/encoderblock/gate": np.array(1, "f")},
        "encoderblock/gate is a single number, where blocks on top of each other belong",
    ),
    "grid": (lambda n: n | {"pos_embedding": np.zeros((1, 7, 8), "f")}, "has 7 positions, which is no square grid"),
    "map": (lambda n: n | {"MAPHead_0/probe": np.zeros((1, 1, 8), "f")}, "pools its tokens with attention"),
    "extra": (lambda n: n | {f"{BLOCK}/gate": np.zeros(2, "f")}, r"has 1 weights that no model here has: .*gate"),
    "norms": (lambda n: n | {f"{BLOCK}/LayerNorm_2/scale": np.zeros(8, "f")}, "has 3 norms"),
    "patches": (lambda n: n | {"embedding/kernel": np.zeros((4, 2, 3, 8), "f")}, "patches are 4 by 2 pixels"),
    "not finite": (lambda n: n | {"head/bias": np.full(5, np.nan, "f")}, "values that are not finite"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_weights_of_no_model_here_are_named(fault: str, tmp_path: Path) -> None:
    change, message = WRONG[fault]
    archived(tmp_path / "wrong.npz", change(big_vision()))
    with pytest.raises(UsageError, match=message):
        logits_of(read("wrong.npz", tmp_path))
