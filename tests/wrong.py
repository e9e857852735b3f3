"""Command lines, files and checkpoints that cannot work: what each is, and the status it must end with.

A case is run in a folder of its own that `prepare` fills. FINE stands for a checkpoint without faults and IMAGES for a
set of images without faults, so that only one thing in a case is wrong.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tests import synthetic

USE, RUN, SAID = 2, 1, 0
"""Exit statuses: cannot work as typed; ran and failed, or found faults; works, and says what is wrong."""


class Case(NamedTuple):
    line: tuple[str, ...]
    status: tuple[int, ...] = (USE,)
    prepare: Callable[[Path], None] = lambda folder: None
    thorough: bool = False
    """Whether the case is one more of its kind, for make long only."""


Cases = dict[str, Case]


def picture(seed: int, size: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(out, kind)
    return out.getvalue()


def files(folder: Path, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def images(folder: Path, per_class: int = 12) -> None:
    """Class folders ant and bee."""
    files(folder, {f"{name}/{i}.png": picture(10 * i + len(name)) for name in ("ant", "bee") for i in range(per_class)})
    for i in range(per_class):
        (folder / "bee" / f"{i}.png").write_bytes(picture(1000 + i))


def tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


# --- options ----------------------------------------------------------------------------------------------------------

START = {
    "train": ("train",), "finetune": ("finetune", "checkpoint=FINE"), "evaluate": ("evaluate", "checkpoint=FINE"),
    "cost": ("cost",), "match": ("match", "to=vit_nano2_dense"), "upcycle": ("upcycle", "checkpoint=FINE"),
    "export": ("export", "checkpoint=FINE"), "data": ("data", "check"),
}  # fmt: skip

WRONG_OPTIONS = (
    "nosuch=1", "+nosuch=1", "++nosuch=1", "~nosuch", "=5", "nosuch", "data.nosuch=1", "data=", "data=nosuch",
    "data.image_size=0", "data.image_size=many", "data.image_size=1e400", "data.image_size=99999999999999999999999",
    "data.image_size=[8]", "data.mean={a:1}", "data.mean=[0.1,[0.2]]", "data.std=[0]", "data.channels=2",
    "data.format=nosuch", "data.root=${nosuch}", "data.root=${oc.env:NO_SUCH_THING}", "data.root='", "data.mean=[0.1",
    "data.test_fraction=nan", "--lr=1", "--cfg=nonsense", "hydra.nosuch=1", "+hydra.nosuch=1", "data.name=\x1b[31mred",
)  # fmt: skip


def options() -> Iterator[tuple[str, Case]]:
    for i, (command, start) in enumerate(START.items()):
        for j, wrong in enumerate(WRONG_OPTIONS):
            yield f"{command} {wrong!r}", Case((*start, wrong), thorough=(i - j) % 8 > 0)


WRONG_VALUES = (
    "train seed=1e999", "train train.steps=-1", "train train.minutes=1e-320 train.log_every=5e-324", "train =",
    "train train.batch_size=1000000000000", "train name=NNN", "train study=NNN", "train output_root=/dev/null/x",
    "train name=\x07bell", "train study=\x1b[2J", "train study=.", "train study=",
    "train output_root=",
    "train -m seed=", "train -m seed=0,1 output_root=/dev/null/x", "train -m seed=1,many",
    "train -m seed=range(0)", "train -m seed=0,1 hydra/launcher=nosuch", "train -m model=vit_nano2_dense,nosuch",
    "train tracking=offline wandb.tags=['']", "train tracking=offline wandb.project=a/b", "train device=cuda:99",
    "train tracking=offline wandb.tags=[TTT]", "train threads=0", "train threads=-1", "train devices=0",
    "train devices=1000000", "train model.image_size=1000000", "train model.router.num_experts=0",
    "train model.router.num_experts=1e30", "train model.backbone.width=0", "train model.backbone.width=1099511627776",
    "train model.moe_blocks=last_99", "train model.moe_blocks=[-1]", "train model.moe_blocks=every_0",
    "train model.router._target_=os.system", "train model.router._target_=",
    "train model=null", "train optim=null", "train train.fewshot=[0]", "train augment.mixup=-1",
    "train optim.betas=[2,2]", "train augment.randaugment=[1,2,3,4,5]", "train optim.freeze=[[]]",
    "train checkpoint=FINE", "train +experiment=nosuch", "train +search=nosuch", "train recipe=",
    "cost batch_size=0", "cost batch_size=-5", "cost format=xml", "cost clock=maybe",
    "cost model=vit_s16_soft data.num_classes=-1", "cost model.expert_width=99999999999999999999",
    "cost model.router.slots_per_expert=99999999999999",
    "cost -m model=", "match to=nosuch", "match to=", "match to=vit_nano2_dense free=nosuch", "match",
    "match to=vit_nano2_dense by=beauty", "match to=vit_nano2_dense tolerance=-1", "evaluate", "evaluate checkpoint=",
    "evaluate checkpoint=[]", "evaluate checkpoint=[FINE,5]", "evaluate checkpoint={a:FINE}",
    "evaluate checkpoint=FINE split=nosuch", "evaluate checkpoint=FINE fewshot=[100000]",
    "evaluate checkpoint=FINE fewshot=[0]", "evaluate checkpoint=FINE audit=[nosuch]",
    "evaluate checkpoint=FINE predictions=no/such/folder.csv", "evaluate checkpoint=FINE predictions=IMAGES",
    "evaluate checkpoint=FINE confusion=/dev/null/x.csv", "evaluate checkpoint=FINE soup=tomato",
    "evaluate checkpoint=FINE batch_size=0", "evaluate checkpoint=FINE real=nosuch",
    "evaluate checkpoint=timm:vit_tiny_patch16_224",
    "evaluate checkpoint=hf-hub:a/b/c", "evaluate checkpoint=/proc/self/mem", "evaluate checkpoint=/",
    "evaluate checkpoint=FINE device=nosuch", "export", "export checkpoint=FINE formats=[nosuch]",
    "export checkpoint=FINE folder=", "export checkpoint=FINE folder=/dev/null/x",
    "export checkpoint=FINE folder=NNN", "export checkpoint=FINE folder=.", "export checkpoint=FINE push=a/b/c",
    "upcycle", "upcycle checkpoint=FINE", "upcycle checkpoint=FINE model/router=nosuch",
    "upcycle checkpoint=FINE model/router=soft model.moe_blocks=last_1 folder=IMAGES", "finetune",
    "finetune checkpoint=", "finetune checkpoint=FINE model.image_size=7", "finetune checkpoint=FINE slots=nosuch",
    "data", "data chek", "data check data=folder data.root=", "data check data=folder data.root=/nowhere",
    "data check data=folder data.root=/dev/null", "data check data=tfds data.root=IMAGES",
    "data check data=folder data.root=NNN", "data check data=webdataset data.root=s3://bucket/x.tar",
    "check", "check nosuch", "check soft num_experts=0", "check soft num_experts=many", "check soft nosuch=1",
    "check soft =", "check soft soft", "check /dev/null", "check nowhere.py", "check IMAGES", "list nosuch",
    "list a b c",
    "status nowhere", "status IMAGES", "status /dev/null", "status --nosuch", "doctor nowhere",
    "doctor", "doctor --nosuch", "compare nowhere", "compare /dev/null",
    "compare --nosuch", "compare IMAGES", "compare RUNS --quality nosuch", "compare RUNS --cost nosuch",
    "compare RUNS --where router", "compare RUNS --where nosuch=1", "compare RUNS --by nosuch",
    "compare RUNS --at nosuch=1", "compare RUNS --at train_pflop=many", "compare RUNS --baseline nosuch=1",
    "compare RUNS --sort nosuch", "compare RUNS --columns nosuch", "compare RUNS --out /dev/null/x",
    "compare RUNS --format xml", "scaling nowhere", "scaling --nosuch", "scaling RUNS --quality nosuch",
    "scaling RUNS --draws many", "scaling RUNS --published all", "scaling RUNS",
    "trian", "", "\x1b[31m", "--nosuch", "completion nosuch",
)  # fmt: skip


def values() -> Iterator[tuple[str, Case]]:
    said = {"NNN": "n" * 300, "TTT": "t" * 70}
    for line in WRONG_VALUES:
        words = [said.get(word, word) for word in line.split(" ")] if line else [""]
        for mark, text in said.items():
            words = [word.replace(f"={mark}", f"={text}").replace(f"[{mark}]", f"[{text}]") for word in words]
        if words[0] == "train" and "train.minutes" not in line and "train.steps" not in line and "=" in line:
            words += ["train.steps=1", "tracking=off"] if "tracking" not in line else ["train.steps=1"]
        yield line[:60], Case(tuple(words))


# --- checkpoints ------------------------------------------------------------------------------------------------------

CARDS: dict[str, Any] = {
    "model null": {"model": None}, "model list": {"model": [1]}, "model text": {"model": "vit"},
    "data null": {"data": None},
    "data list": {"data": []}, "data text": {"data": "digits"}, "classes null": {"classes": None},
    "classes number": {"classes": 10}, "classes text": {"classes": "abcdefghij"},
    "classes of numbers": {"classes": [1] * 10},
    "classes empty": {"classes": []}, "classes too few": {"classes": ["a", "b"]},
    "classes escape": {"classes": ["\x1b[31mred", *"bcdefghij"]},
    "loss": {"loss": "hinge"}, "loss number": {"loss": 5}, "precision": {"precision": "fp8"},
    "precision null": {"precision": None}, "receipt list": {"receipt": [1]}, "origin list": {"origin": [1]},
    "router null": {"model.router": None}, "router list": {"model.router": []}, "router text": {"model.router": "soft"},
    "router without target": {"model.router": {}}, "router target number": {"model.router._target_": 5},
    "router foreign": {"model.router._target_": "os.system"}, "router eval": {"model.router._target_": "builtins.eval"},
    "router evil": {"model.router._target_": "softmoe_cli.moe.routers.evil.Evil"},
    "router up": {"model.router._target_": "softmoe_cli.moe.routers...os.system"},
    "experts huge": {"model.router.num_experts": 2**40}, "experts text": {"model.router.num_experts": "many"},
    "experts negative": {"model.router.num_experts": -1}, "width huge": {"model.backbone.width": 2**40},
    "width zero": {"model.backbone.width": 0}, "depth huge": {"model.backbone.depth": 2**30},
    "depth text": {"model.backbone.depth": "deep"}, "size huge": {"model.image_size": 2**30},
    "size null": {"model.image_size": None}, "patch zero": {"model.backbone.patch_size": 0},
    "backbone null": {"model.backbone": None}, "backbone list": {"model.backbone": [1]},
    "timm": {"model.backbone.timm": "vit_tinny"}, "timm number": {"model.backbone.timm": 7},
    "blocks": {"model.moe_blocks": {"a": 1}}, "blocks far": {"model.moe_blocks": [99]},
    "in_chans": {"model.in_chans": 0},
    "data name": {"data.name": "nosuch"}, "data root": {"data.root": 5}, "data mean": {"data.mean": "grey"},
    "data std": {"data.std": [0]}, "data size": {"data.image_size": -8}, "data format": {"data.format": "zip"},
    "data channels": {"data.channels": 7}, "interpolation": {"data.root": "${oc.env:HOME}"},
    "download": {"data.name": "cifar10", "data.root": "elsewhere"}, "key of nobody": {"model.nosuch": 1},
}  # fmt: skip
FINE_AFTER_ALL = ("classes escape", "origin list", "receipt list")
"""Cases that need not be refused, as long as nothing else goes wrong: text is shown escaped, and some keys are not
read."""


def changed(card: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    card = json.loads(json.dumps(card))
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        node = card
        for section in sections:
            node = node[section]
        node[leaf] = value
    return card


def _with_card(text: str | None) -> Callable[[Path], None]:
    """A safetensors file of three weights with this card; `text` is put where safetensors has its metadata."""

    def prepare(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(os.environ["FINE_CHECKPOINT"])
        save_file(weights, folder / "bad.safetensors", metadata=None if text is None else {"softmoe": text})

    return prepare


def cards(card: dict[str, Any]) -> Iterator[tuple[str, Case]]:
    texts: dict[str, str | None] = {name: json.dumps(changed(card, change)) for name, change in CARDS.items()}
    texts |= {
        "no card": None, "no JSON": "{", "a list": "[]", "a number": "5", "null": "null", "empty": "",
        "brackets": "[" * 200_000, "NaN": json.dumps(card).replace('"softmax"', "NaN"),
    }  # fmt: skip
    for number, (name, text) in enumerate(texts.items()):
        status = (USE, SAID) if name in FINE_AFTER_ALL else (USE,)
        yield f"evaluate: {name}", Case(("evaluate", "checkpoint=bad.safetensors"), status, _with_card(text))
        command = ("finetune train.steps=1 tracking=off", "export", "upcycle model/router=soft")[number % 3].split()
        if name not in FINE_AFTER_ALL and not (name.startswith(("data", "download")) and command[0] == "finetune"):
            if name in ("no card", "loss", "loss number", "precision", "precision null") and command[0] != "export":
                continue  # neither is asked for there
            yield (
                f"{command[0]}: {name}",
                Case((command[0], "checkpoint=bad.safetensors", *command[1:]), (USE,), _with_card(text), True),
            )


def _file(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: files(folder, {name: content})


def _run_folder(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """A run's folder with one checkpoint as softmoe writes it, and then a change to the folder."""

    def prepare(folder: Path) -> None:
        import hashlib

        checkpoint = folder / "run/checkpoints/last-5"
        weights = Path(os.environ["FINE_CHECKPOINT"]).read_bytes()
        files(checkpoint, {"model.safetensors": weights})
        (checkpoint / "SHA256SUMS").write_text(f"{hashlib.sha256(weights).hexdigest()}  model.safetensors\n")
        change(checkpoint)

    return prepare


def _replace(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda checkpoint: files(checkpoint, {name: content})


def _folder_instead(name: str) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        (checkpoint / name).unlink()
        (checkpoint / name).mkdir()

    return change


def _link(name: str, to: str) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        (checkpoint / name).unlink(missing_ok=True)
        (checkpoint / name).symlink_to(to)

    return change


def checkpoints() -> Iterator[tuple[str, Case]]:
    pickled = b"PK\x03\x04" + b"\0" * 100
    for name, content in {
        "pickle": pickled, "nothing": b"", "short": b"\xff" * 7, "header of 2^60": b"\0\0\0\0\0\0\0\x10{}",
        "text": b"weights", "header no JSON": b"\x02\0\0\0\0\0\0\0{{",
    }.items():  # fmt: skip
        yield f"file: {name}", Case(("evaluate", "checkpoint=x.safetensors"), (USE,), _file("x.safetensors", content))
    for name, change in {
        "sums a folder": _folder_instead("SHA256SUMS"), "sums /proc/self/mem": _link("SHA256SUMS", "/proc/self/mem"),
        "sums empty": _replace("SHA256SUMS", b""), "sums binary": _replace("SHA256SUMS", bytes(range(256))),
        "sums outside": _replace("SHA256SUMS", b"0" * 64 + b"  ../../../x\n"), "sums a pipe": _pipe("SHA256SUMS"),
        "weights changed": _replace("model.safetensors", b"\0" * 64),
        "weights a folder": _folder_instead("model.safetensors"),
        "weights dangling": _link("model.safetensors", "nowhere"),
        "weights /dev/zero": _link("model.safetensors", "/dev/zero"),
        "pieces": _pieces({}), "pieces without places": _pieces({"places": None}),
        "pieces huge": _pieces({"places": {"x": [[0, 2**40]]}}), "pieces text": _pieces({"places": "x"}),
    }.items():  # fmt: skip
        for command in (("evaluate",), ("finetune", "train.steps=1", "tracking=off")):
            yield (
                f"{command[0]} a run: {name}",
                Case(
                    (command[0], "checkpoint=run", *command[1:]), (USE,), _run_folder(change), command[0] != "evaluate"
                ),
            )


def _pipe(name: str) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        (checkpoint / name).unlink()
        os.mkfifo(checkpoint / name)

    return change


def _pieces(said: dict[str, Any]) -> Callable[[Path], None]:
    """One of two files that several processes wrote; `said` is what it says about where its tensors belong."""

    def change(checkpoint: Path) -> None:
        import hashlib

        import torch
        from safetensors.torch import save_file

        (checkpoint / "model.safetensors").unlink()
        piece = checkpoint / "model.1-of-1.safetensors"
        save_file({"x": torch.zeros(2)}, piece, metadata={key: json.dumps(value) for key, value in said.items()})
        (checkpoint / "SHA256SUMS").write_text(f"{hashlib.sha256(piece.read_bytes()).hexdigest()}  {piece.name}\n")

    return change


# --- images -----------------------------------------------------------------------------------------------------------


def _images_with(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        images(folder / "set")
        change(folder / "set")

    return prepare


def _shard(members: dict[str, bytes], **beside: bytes) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        good = {f"{i:03}.{end}": part for i in range(24) for end, part in _sample(i).items()}
        tar(folder / "set/train-0000.tar", good | members)
        tar(folder / "set/val-0000.tar", {f"v{name}": content for name, content in good.items()})
        files(folder / "set", {name.replace("__", "."): content for name, content in beside.items()})

    return prepare


def _sample(i: int) -> dict[str, bytes]:
    return {"png": picture(i), "cls": b"%d" % (i % 2)}


def _linked(name: str, to: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).symlink_to(to)

    return change


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / "ant/x.png")


def data() -> Iterator[tuple[str, Case]]:
    train = ("train", "train.steps=1", "tracking=off", "threads=1", "data.image_size=8", "data.workers=0")
    check = ("data", "check", "data.workers=0")
    broken: dict[str, tuple[Callable[[Path], None], tuple[int, ...]]] = {
        "no image": (_images_with(_file("ant/x.png", b"not an image")), (RUN,)),
        "cut short": (_images_with(_file("ant/x.png", picture(5, (64, 64))[:300])), (RUN,)),
        "PostScript": (_images_with(_file("ant/x.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")), (RUN,)),
        "empty class": (_images_with(lambda folder: (folder / "cat").mkdir()), (RUN,)),
        "dangling link": (_images_with(_linked("ant/x.png", "nowhere")), (RUN, USE)),
        "endless link": (_images_with(_linked("ant/x.png", "/dev/zero")), (RUN, USE)),
        "a pipe": (_images_with(_fifo), (RUN, USE)),
        "a thin giant": (_images_with(_file("ant/x.png", picture(1, (1, 50_000)))), (RUN, SAID)),
        "one class": (_file("set/ant/x.png", picture(1)), (RUN, USE)),
        "train only": (_file("set/train/ant/x.png", picture(1)), (RUN, USE)),
        "name of bytes": (_images_with(lambda folder: _bytes_named(folder / "ant")), (RUN,)),
        "name of escapes": (_images_with(_file("ant/\x1b[2J.png", b"x")), (RUN,)),
        "class of escapes": (_images_with(_file("\x1b[31mcat/x.png", b"x")), (RUN,)),
    }
    for name, (prepare, status) in broken.items():
        yield f"check: {name}", Case((*check, "data=folder", "data.root=set"), status, prepare)
        harmless = (SAID,) if SAID in status else ()
        yield f"train: {name}", Case((*train, "data=folder", "data.root=set"), (USE, *harmless), prepare, True)
    shards: dict[str, tuple[dict[str, bytes], dict[str, bytes]]] = {
        "label of 12 digits": ({"900.png": picture(9), "900.cls": b"999999999999"}, {}),
        "label of 30 digits": ({"900.png": picture(9), "900.cls": b"9" * 30}, {}),
        "label of 5,000 digits": ({"900.png": picture(9), "900.cls": b"9" * 5000}, {}),
        "negative label": ({"900.png": picture(9), "900.cls": b"-1"}, {}),
        "half a label": ({"900.png": picture(9), "900.cls": b"1.5"}, {}),
        "names and numbers": ({"900.png": picture(9), "900.cls": b"ant"}, {}),
        "label of bytes": ({"900.png": picture(9), "900.cls": b"\xff\xfe"}, {}),
        "no label": ({"900.png": picture(9)}, {}),
        "two images": ({"900.png": picture(9), "900.jpg": picture(9, kind="JPEG"), "900.cls": b"1"}, {}),
        "dots": ({"c.v0.png": picture(9), "c.v0.cls": b"1", "c.v1.png": picture(8), "c.v1.cls": b"1"}, {}),
        "names in Latin-1": ({}, {"classnames__txt": b"caf\xe9\nb\n"}),
        "names in UTF-16": ({}, {"classnames__txt": "ant\nbee\n".encode("utf-16")}),
        "names too few": ({}, {"classnames__txt": b"ant\n"}),
        "no tar": ({}, {"train-0001__tar": b"x" * 600}),
        "cut tar": ({}, {"train-0001__tar": b"\0" * 100}),
    }
    for name, (members, beside) in shards.items():
        yield (
            f"shards: {name}",
            Case((*check, "data=webdataset", "data.root=set"), (USE, RUN), _shard(members, **beside)),
        )
        if "label" in name or "names" in name:
            yield (
                f"train, shards: {name}",
                Case((*train, "data=webdataset", "data.root=set"), (USE,), _shard(members, **beside), True),
            )
    for kind, name, content in (
        ("tfds", "set-train.tfrecord-00000-of-00001", b"\xff" * 100),
        ("tfds", "set-train.tfrecord-00000-of-00001", b""),
        ("tfds", "set-train.tfrecord-00000-of-00002", b""), ("arrow", "train/data-00000-of-00001.arrow", b"ARROW1\0\0"),
        ("arrow", "train/data-00000-of-00001.arrow", b""), ("arrow", "train/dataset_info.json", b"[" * 100_000),
        ("arrow", "train/dataset_info.json", b"\xff"), ("webdataset", "train.tar", b""), ("webdataset", "a.txt", b""),
    ):  # fmt: skip
        yield (
            f"{kind}: {name} {content[:6]!r}",
            Case((*check, f"data={kind}", "data.root=set"), (USE, RUN), _file(f"set/{name}", content)),
        )
    bomb = b"\x1f\x8b\x08" + b"\0" * 20
    for content in (bomb, b"", b"\x00\x00\x08\x03" + b"\xff" * 12):
        yield (
            f"fashion_mnist: {content[:6]!r}",
            Case((*check, "data=fashion_mnist", "data.root=set"), (USE,), _all_four(content)),
        )


def _all_four(content: bytes) -> Callable[[Path], None]:
    ending = ".gz" if content[:2] == b"\x1f\x8b" else ""
    names = [f"{part}-{kind}-ubyte{ending}" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    return lambda folder: files(folder / "set", dict.fromkeys(names, content))


def _bytes_named(folder: Path) -> None:
    with open(os.fsencode(folder) + b"/ni\xf1o.png", "wb") as file:
        file.write(b"no image")


# --- runs -------------------------------------------------------------------------------------------------------------


def _study_with(name: str, content: bytes | None) -> Callable[[Path], None]:
    """Four good runs of two routers and a fifth folder, in which the file `name` has this content (None: it is a
    folder)."""

    def prepare(folder: Path) -> None:
        synthetic.study(folder / "s", seeds=2)
        odd = synthetic.write(folder / "s", synthetic.row(seed=77))
        (odd / name).unlink(missing_ok=True)
        if name != "result.json":
            (odd / "result.json").unlink(missing_ok=True)
        if content is None:
            (odd / name).mkdir()
        else:
            (odd / name).write_bytes(content)

    return prepare


def runs() -> Iterator[tuple[str, Case]]:
    row = synthetic.row(seed=77)
    odd: dict[str, list[bytes | None]] = {
        "config.yaml": [
            b"", b"[1]", b"a: [", b"\xff\xfe", b"seed: 0", b"train: {steps: 0}", b"train: 5", b"train: {steps: x}",
            None,
            b"!!python/object/apply:os.system [ls]", b"{" * 3000, b"train: {steps: .nan}",
        ],
        "metrics.jsonl": [
            b"", b"{", b"[]\n", b"\xff\n", b'{"split": "validation"}\n', b'{"split": "validation", "top1_pct": "x"}\n',
            b'{"split": "validation", "top1_pct": null, "step": 1}\n', b'{"step": 1e999}\n', b"[" * 100_000 + b"\n",
            None,
            b'{"split": "validation", "top1_pct": "\\u001b[31m", "step": {}, "images": [], "device_s": "x"}\n',
        ],
        "result.json": [
            b"", b"{", b"[]", b"\xff", b"{}", None, b"[" * 100_000, b'{"seed": 1}',
            json.dumps(row | {"router": 5}).encode(), json.dumps(row | {"router": None}).encode(),
            json.dumps(row | {"top1_pct": "x"}).encode(), json.dumps(row | {"top1_pct": None}).encode(),
            json.dumps(row | {"train_pflop": "x"}).encode(), json.dumps(row | {"name": "n" * 20_000}).encode(),
            json.dumps(row | {"backbone": "\x1b[31m", "model.backbone.name": "b" * 20_000}).encode(),
            json.dumps(row | {"seed": [1]}).encode(), json.dumps(row | {"num_experts": {"a": 1}}).encode(),
            json.dumps(row).replace("93", "NaN").encode(), json.dumps(row | {"top1_pct": 10**400}).encode(),
            json.dumps(row | {"hardware": ["x"], "torch": 7, "test_images": 0}).encode(),
            json.dumps(row | {"model.moe_blocks": 5, "model.router._target_": 7}).encode(),
        ],
        ".lock": [b"", b"\xff" * 20, b"host nopid", None],
    }  # fmt: skip
    for name, contents in odd.items():
        for number, content in enumerate(contents):
            prepare = _study_with(name, content)
            yield f"status: {name} {number}", Case(("status", "s"), (SAID, RUN), prepare)
            yield f"doctor: {name} {number}", Case(("doctor", "s"), (SAID, RUN), prepare, True)
            if name != ".lock":
                yield f"compare: {name} {number}", Case(("compare", "s"), (SAID,), prepare, number > 0)
    for number, text in enumerate((
        b"", b"{", b"[]", b'{"jobs": 5}', b'{"jobs": [5]}', b'{"jobs": [{"folder": "../x"}]}', b"\xff", b"[" * 100_000,
        b'{"jobs": [{"folder": 5, "run": 7}]}', b'{"jobs": [{"folder": "../a", "run": "\\u001b[31mred :dog:"}]}',
    )):  # fmt: skip
        yield f"status: jobs.json {number}", Case(("status", "s"), (SAID, RUN, USE), _file("s/sweep-1/jobs.json", text))


# --- what is one's own: routers, conf, neighbours ---------------------------------------------------------------------

ROUTERS = {
    "raises RuntimeError": "raise RuntimeError('no')", "raises OSError": "open('nowhere')", "asserts": "assert 0",
    "exits 0": "raise SystemExit(0)", "exits 3": "import sys; sys.exit(3)", "no Python": "def", "no router": "x = 1",
    "no such import": "import nosuch", "bytes": "\x00", "interrupts": "raise KeyboardInterrupt",
    "two routers": (
        "from softmoe_cli.moe.routers.soft import SoftRouter\nclass A(SoftRouter): pass\nclass B(SoftRouter): pass"
    ),
    "recursion": "def f(): f()\nf()", "raises when built": (
        "from softmoe_cli.moe.routers.soft import SoftRouter\nclass A(SoftRouter):\n"
        "    def __init__(self, *a, **k): raise OSError('disk')\n"
    ),
}  # fmt: skip

CALLBACK = "{callbacks: {x: {_target_: torch.hub.load, repo_or_dir: ., model: x, source: local}}}"
OWN_CONF = {
    "a hydra node in the root": ("conf/train.yaml", f"hydra: {CALLBACK}"),
    "a hydra node of an experiment": (
        "conf/experiment/mine.yaml",
        f"# @package _global_\nhydra: {CALLBACK}",
    ),
    "no YAML": ("conf/model/mine.yaml", "a: ["), "no UTF-8": ("conf/model/mine.yaml", "caf\udce9"),
    "a list": ("conf/model/mine.yaml", "- 1"), "unknown keys": ("conf/data/mine.yaml", "nosuch: 1"),
    "a router of nobody": ("conf/model/router/mine.yaml", "_target_: nosuch.Router"),
}  # fmt: skip


def own() -> Iterator[tuple[str, Case]]:
    for name, code in ROUTERS.items():
        status = (130,) if name == "interrupts" else (USE, RUN)
        yield f"check: {name}", Case(("check", "mine.py"), status, _file("mine.py", code.encode()))
    lines = {
        "experiment": "+experiment=mine",
        "model": "model=mine",
        "data": "data=mine",
        "router": "model/router=mine",
    }
    for name, (file, text) in OWN_CONF.items():
        kind = Path(file).parent.name
        content = text.encode("utf-8", "surrogateescape")
        line = ("cost", *([lines[kind]] if kind in lines else []))
        line = ("train", lines[kind], "train.steps=1", "tracking=off") if kind == "experiment" else line
        # A root configuration in the user's conf folder is passed over, or refused.
        status = (USE, SAID) if kind == "conf" else (USE,)
        yield f"conf: {name}", Case(line, status, _file(file, content))
        yield f"conf, list: {name}", Case(("list",), (SAID, USE), _file(file, content))
    for name, line in {
        "export .git": ("export", "checkpoint=FINE", "folder=git"),
        "export .config": ("export", "checkpoint=FINE", "folder=config"),
        "export a folder that is there": ("export", "checkpoint=FINE", "folder=kept"),
        "upcycle .git": ("upcycle", "checkpoint=DENSE", "model/router=soft", "model.moe_blocks=last_1", "folder=git"),
        "predictions .env": ("evaluate", "checkpoint=FINE", "predictions=env"),
        "confusion .bashrc": ("evaluate", "checkpoint=FINE", "confusion=bashrc"),
        "predictions that are there": ("evaluate", "checkpoint=FINE", "predictions=kept/file"),
        "confusion that is there": ("evaluate", "checkpoint=FINE", "confusion=kept/file"),
        "compare's folder that is there": ("compare", "RUNS", "--out", "kept"),
        "compare .git": ("compare", "RUNS", "--out", "git"),
    }.items():
        there = "there" in name
        yield name, Case(line, (USE,) if there else (SAID,))


def everything(card: dict[str, Any]) -> dict[str, Cases]:
    """Group -> cases. The groups are tests that may run beside each other; the thorough cases have groups of their
    own."""
    found = {
        "options": options(), "values": values(), "cards": cards(card), "checkpoints": checkpoints(), "data": data(),
        "runs": runs(), "own": own(),
    }  # fmt: skip
    groups: dict[str, Cases] = {}
    for kind, each in found.items():
        cases = dict(each)
        if kind != "options":  # the commands of options share cases
            for number, name in enumerate(cases):
                if number % 4 == 3:
                    cases[name] = cases[name]._replace(thorough=True)
        for thorough in (False, True):
            names = [name for name in cases if cases[name].thorough == thorough]
            count = round(len(names) / 30) or bool(names)
            for part in range(count):
                title = f"{kind} {part + 1}" + (" thorough" if thorough else "")
                groups[title] = {name: cases[name] for name in names[part::count]}
    return groups
