"""The command line: what a user types, and one clear sentence with status 2 for what cannot work."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import TINY, Softmoe, thinned
from tests.processes import Started

DENSE = "model=vit_nano2_dense"

WRONG_LINES = {
    "command": ("trian", "Did you mean 'train'?"),
    "list argument": ("list modles", "Did you mean 'models'?"),
    "top key": ("train sede=1", "Did you mean 'seed'?"),
    "key of a section": ("train train.step=5", "Did you mean 'train.steps'?"),
    "key in the wrong section": ("train model.num_experts=5", "Did you mean 'model.router.num_experts'?"),
    "router key": ("train model.router.nmu_experts=5", "Did you mean 'model.router.num_experts'?"),
    "appended key": ("train +sede=1", "Did you mean 'seed'?"),
    "appended key in a section": ("train +train.speed=1", "there is no key 'train.speed'"),
    "appended router key": ("train +model.router.num_expert=4", "Did you mean 'num_experts'?"),
    "appended known key": ("train +seed=1", "leave out the +"),
    "no equals sign": ("train seed", "KEY=VALUE"),
    "choice of a group": ("train model=vit_s16_sotf", "Did you mean 'vit_s16_soft'?"),
    "router choice": ("train model/router=sfot", "Did you mean 'soft'?"),
    "data choice": ("train data=digit", "Did you mean 'digits'?"),
    "recipe choice": ("train recipe=scrach", "Did you mean 'scratch'?"),
    "experiment choice": ("train +experiment=nothing", "no such choice"),
    "not an integer": ("train seed=many", "seed=many"),
    "not a number": ("train optim.lr=fast", "optim.lr=fast"),
    "not a boolean": ("train train.compile=perhaps", "train.compile=perhaps"),
    "negative seed": ("train seed=-1", "it must be >= 0"),
    "neither a batch nor auto": ("train train.batch_size=fast", "neither a whole number nor auto"),
    "half a batch": ("train train.batch_size=1.5", "neither a whole number nor auto"),
    "more than there is": (
        "train model=vit_h14_soft model.router.num_experts=100000",
        "choose a smaller model, fewer experts or fewer MoE blocks",
    ),
    "zero batch": ("train train.batch_size=0", "it must be >= 1"),
    "zero learning rate": ("train optim.lr=0", "it must be > 0"),
    "nan": ("train optim.lr=nan", "is not a finite number"),
    "smoothing": ("train train.label_smoothing=1.5", "it must be >= 0 and <= 0.99"),
    "precision": ("train train.precision=bf61", "Did you mean 'bf16'?"),
    "tracking": ("train tracking=onlin", "Did you mean 'online'?"),
    "two budgets": ("train train.steps=5 train.epochs=2", "two budgets"),
    "accumulation": ("train train.batch_size=32 train.accumulate=5", "does not divide"),
    "sgd without momentum": ("train optim.name=sgd", "optim.name=sgd needs a momentum; give it, such as 0.9"),
    "frozen nothing": ("train optim.freeze=[blcks.0.*]", "'blcks.0.*' matches no parameter; there are blocks.0.*"),
    "slots of no checkpoint": ("train slots=proportional", "belongs to softmoe finetune"),
    "groups of a sweep": ("train -m seed=0,1 --groups", "--groups lists the parameters of one run"),
    "odd mixup": ("train train.batch_size=31 augment.mixup=0.2", "must be even"),
    "betas": ("train optim.betas=[0.9]", "needs two numbers"),
    "idle cooldown": ("train optim.cooldown=0.1", "has no effect with optim.schedule=cosine"),
    "rsqrt by time": ("train train.minutes=1 optim.schedule=rsqrt", "counts steps"),
    "warmup by time": ("train train.minutes=1 optim.warmup=10", "counts steps"),
    "warmup too long": ("train train.steps=5 optim.warmup=10", "do not fit a budget of 5"),
    "randaugment": ("train augment.randaugment=[2]", "[operations, magnitude"),
    "patch": ("train model.backbone.patch_size=3", "the nearest sizes that are: 6, 9"),
    "heads": ("train model.backbone.heads=5", "does not divide model.backbone.width=64"),
    "pool": ("train model.backbone.pool=token", "needs model.backbone.class_token=true"),
    "block word": ("train model.moe_blocks=first_2", "last_N, last_half, every_N"),
    "block number": ("train model.moe_blocks=[9]", "from 0 to 3"),
    "router without blocks": ("train model.moe_blocks=[]", "use model/router=dense"),
    "more experts than slots": (
        "train model.router.num_experts=64 model.router.slots_per_expert=null model.router.capacity_factor=0.5",
        "gives 0 slots per expert",
    ),
    "slots twice": ("train model.router.capacity_factor=1.0", "give one of them"),
    "router value": ("train model.router.num_experts=many", "it must be int"),
    "router class": ("train model.router._target_=os.system", "is not a subclass"),
    "router module": ("train model.router._target_=no.such.Router", "cannot be imported"),
    "timm beside sizes": ("train model.backbone.timm=vit_tiny_patch16_224", "brings its own"),
    "timm name": ("train model/backbone=timm model.backbone.timm=vit_tinny_patch16_224 " + DENSE, "timm has no model"),
    "channels": ("train model=vit_nano4_dense data.channels=3 model.in_chans=1", "set data.channels=1"),
    "classes": ("train data.num_classes=5", "less than the 10 classes"),
    "device": ("train device=cuda", "is not available"),
    "study": ("train study=../elsewhere", "plain folder name"),
    "missing value": ("train data=folder", "data.root has no default; type data.root=FOLDER"),
    "a reference of settle's": ("settle model/router=dense,soft margin=${nope}", "margin: Interpolation key 'nope'"),
    "a value of settle's": ("settle model/router=dense,soft margin=abc", "margin=abc: expected number > 0"),
    "missing folder": ("train data=folder data.root=nowhere", "is not a folder"),
    "address": ("train data=webdataset data.root=https://a.example/x.tar", "download the set and name its folder"),
    "train with a checkpoint": ("train checkpoint=x", "belongs to softmoe finetune"),
    "finetune without": ("finetune", "needs checkpoint="),
    "finetune from nothing": ("finetune checkpoint=nowhere", "does not exist"),
    "finetune from timm": ("finetune checkpoint=timm:vit_tinny", "timm has no such model"),
    "evaluate without": ("evaluate", "needs checkpoint="),
    "evaluate nothing": ("evaluate checkpoint=nowhere", "does not exist"),
    "sweep without -m": ("train seed=1,2", "--multirun"),
    "infinite rate": ("train optim.lr=inf", "is not a finite number"),
    "infinite epochs": ("train train.epochs=inf", "is not a finite number"),
    "an average that never moves": ("train train.ema=1", "it must be"),
    "router word": ("train model.router._target_=Soft", "is not of the form module.Class"),
    "experiment without +": ("train experiment=fashion_first_look", "write +experiment=fashion_first_look"),
    "a taken option": ("train ~optim.lr", "cannot be taken away"),
    "brackets": ("train data.root=a(1)", "in quotes of their own"),
    "groups in evaluation": (
        "train model=vit_nano2_tokens_choice model.router.images_per_group=8 train.eval_batch_size=7", "use 8"
    ),
    "groups in parts": (
        "train model=vit_nano2_tokens_choice model.router.images_per_group=8 train.batch_size=32 train.accumulate=8",
        "each of which is not a multiple of model.router.images_per_group=8, so that which images make a group would "
        "depend on it; use 64",
    ),
    "dropless width": (
        "train model/router=tokens_choice_dropless model.expert_width=30", "only of multiples of 4 numbers"
    ),
    "timm patch": (
        "train model/backbone=timm model.backbone.timm=vit_tiny_patch16_224 model.image_size=30 " + DENSE,
        "the nearest sizes that are: 16, 32",
    ),
    "timm without blocks": (
        "train model/backbone=timm model.backbone.timm=vit_tiny_patch16_224 model.image_size=32 model.moe_blocks=[]",
        "leaves router soft without a block",
    ),
    "timm with parallel blocks": (
        "train model/backbone=timm model.backbone.timm=vit_small_patch16_18x2_224 model.image_size=32 " + DENSE,
        "plain patches and blocks only",
    ),
    "finetune from a convnet": ("finetune checkpoint=timm:resnet18", "is not a ViT"),
    "evaluate timm": ("evaluate checkpoint=timm:test_vit", "use softmoe finetune"),
    "set": ("train data.name=digit", "Did you mean 'digits'? For files of your own set data.format: folder"),
    "format": ("train data=folder data.root=x data.format=tar", "is not one of folder, webdataset, tfds, arrow"),
    "crop without files": ("train data.crop_pct=0.9", "has no effect on data=digits, which has no files"),
    "label of folders": ("train data=folder data.root=x data.label=y", "folders are the labels"),
    "most as test": ("train data.test_fraction=0.7", "neither at most 0.5 nor 1"),
    "class numbers": ("train data.class_numbers=true", "is for evaluation only"),
    "means": ("train data.mean=[0.1,0.2]", "needs 1 number, or 3"),
    "device file": ("evaluate checkpoint=/dev/null", "neither a file nor a folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", thinned(WRONG_LINES, 31))
def test_wrong_line(name: str, softmoe: Softmoe, tmp_path: Path) -> None:
    if name == "device" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    line, words = WRONG_LINES[name]
    answer = softmoe(*line.split())
    assert answer.code == 2, answer
    assert words in answer.err
    assert "Traceback" not in answer.err
    assert answer.err.startswith("softmoe: ")
    assert list(tmp_path.iterdir()) == [], "nothing may be written"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short finished run, made by the real command in its own process."""
    folder = tmp_path_factory.mktemp("finished")
    left, out = Started(folder, ["train", *TINY, "train.steps=20", "threads=1"], {}).wait()
    assert left == 0, out
    (run,) = (folder / "outputs" / "default").iterdir()
    return run


def weights_of(run: Path) -> Path:
    return next((run / "checkpoints").glob("last-*")) / "model.safetensors"


def wrong_checkpoint(kind: str, run: Path, folder: Path) -> tuple[Path, str]:
    """A checkpoint that is wrong in one way, and the words that must say so."""
    good, path = weights_of(run), folder / "wrong.safetensors"
    weights, card = load_file(good), good.read_bytes()
    if kind == "truncated":
        path.write_bytes(card[: len(card) // 2])
        return path, "truncated or damaged"
    if kind == "empty":
        path.write_bytes(b"")
        return path, "truncated or damaged"
    if kind == "text":
        path.write_text("not weights at all, just a sentence that somebody wrote")
        return path, "no safetensors file"
    if kind == "pickle":
        torch.save(weights, path)
        return path, "is a pickle"
    if kind == "no card":
        save_file(weights, path)
        return path, "does not say what model it is"
    if kind == "empty folder":
        (folder / "empty").mkdir()
        return folder / "empty", "holds no checkpoint"
    changed = {
        "nan": ("norm.weight", weights["norm.weight"] * float("nan")),
        "wrong shape": ("norm.weight", torch.ones(7)),
        "unexpected": ("extra.weight", torch.ones(7)),
        "missing": ("norm.weight", None),
    }[kind]
    weights.pop(changed[0], None)
    if changed[1] is not None:
        weights[changed[0]] = changed[1]
    from safetensors import safe_open

    with safe_open(good, framework="pt") as file:
        save_file(weights, path, metadata=file.metadata())
    words = {"nan": "not finite", "wrong shape": "another architecture", "missing": "it lacks norm.weight"}
    return path, words.get(kind, "unexpected weights: extra.weight")


CHANGED = ("nan", "wrong shape", "unexpected", "missing")
KINDS = ("truncated", "empty", "text", "pickle", "no card", "empty folder", *CHANGED)


@pytest.mark.parametrize(
    ("kind", "command"), [(kind, "evaluate") for kind in KINDS] + [(kind, "finetune") for kind in CHANGED]
)
def test_wrong_checkpoint(kind: str, command: str, finished: Path, softmoe: Softmoe, tmp_path: Path) -> None:
    path, words = wrong_checkpoint(kind, finished, tmp_path)
    answer = softmoe(command, f"checkpoint={path}", *(["tracking=off"] if command == "finetune" else []))
    assert answer.code == 2, answer
    assert words in answer.err
    assert not (tmp_path / "outputs").exists()


def test_an_unexpected_weight_may_be_allowed_by_name(finished: Path, softmoe: Softmoe, tmp_path: Path) -> None:
    path, _ = wrong_checkpoint("unexpected", finished, tmp_path)
    answer = softmoe("finetune", f"checkpoint={path}", "tracking=off", "train.steps=2", "allow_unexpected=['extra.*']")
    assert answer.code == 0, answer
    assert "extra.weight" in answer.out


def test_checkpoint_of_another_architecture(finished: Path, softmoe: Softmoe, tmp_path: Path) -> None:
    answer = softmoe("finetune", f"checkpoint={finished}", "model=vit_nano2_dense", "tracking=off")
    assert answer.code == 2
    assert "another architecture" in answer.err
    assert not (tmp_path / "outputs").exists()


def picture(path: Path, value: int, size: int = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size + 3), (value, 2 * value % 256, 90)).save(path)


def tree(root: Path, parts: tuple[str, ...] = ("",), classes: str = "ab", count: int = 12) -> None:
    for part in parts:
        for c in classes:
            for i in range(count):
                picture(root / part / c / f"{i}.png", 10 * i + (100 if c == "b" else 0))


def empty_class(root: Path) -> None:
    tree(root)
    (root / "c").mkdir()


def not_an_image(root: Path) -> None:
    tree(root)
    (root / "a" / "x.png").write_text("hello")


def cut_short(root: Path) -> None:
    tree(root)
    whole = (root / "a" / "0.png").read_bytes()
    (root / "a" / "0.png").write_bytes(whole[: len(whole) // 2])


def other_classes(root: Path) -> None:
    tree(root, parts=("train",))
    tree(root, parts=("val",), classes="ac")


WRONG_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "not_an_image": (not_an_image, "a/x.png is not an image"),
    "flat": (Path.mkdir, "has no class folders"),
    "empty_class": (empty_class, "empty_class/c holds no image"),
    "cut": (cut_short, "a/0.png is not an image"),
    "single": (lambda root: tree(root, classes="a"), "one class folder only"),
    "few": (lambda root: tree(root, count=1), "leaves no image of class"),
    "train_only": (lambda root: tree(root, parts=("train",)), "needs train and val"),
    "other": (other_classes, "different classes: b, c"),
    "file": (Path.touch, "is not a folder"),
}
"""What makes the folder, and what is said of it."""


@pytest.mark.parametrize("name", thinned(WRONG_FOLDERS, 3))
def test_wrong_folders(name: str, softmoe: Softmoe, tmp_path: Path) -> None:
    """Each wrong folder gets its own sentence; the run's folder is never made."""
    make, sentence = WRONG_FOLDERS[name]
    make(tmp_path / name)
    got = softmoe("train", *TINY, "data=folder", f"data.root={name}", "data.image_size=8", "model.in_chans=3")
    assert got.code == 2 and sentence in got.err, got
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("kind", ["no JSON", "lacks classes", "interpolation", "somebody's router"])
@pytest.mark.parametrize("command", ["finetune", "evaluate"])
def test_wrong_card(kind: str, command: str, finished: Path, softmoe: Softmoe, tmp_path: Path) -> None:
    """What a weights file says of its model is read, never run."""
    from safetensors import safe_open

    with safe_open(weights_of(finished), framework="pt") as file:
        card = json.loads(file.metadata()["softmoe"])
    (tmp_path / "payload.py").write_text("open('it_ran', 'w')\n")
    if kind == "lacks classes":
        del card["classes"]
    elif kind == "interpolation":
        card["data"]["root"] = "${oc.env:HOME}"
    elif kind == "somebody's router":
        card["model"]["router"]["_target_"] = "payload.Router"
    text = "{" if kind == "no JSON" else json.dumps(card)
    save_file(load_file(weights_of(finished)), tmp_path / "wrong.safetensors", metadata={"softmoe": text})
    answer = softmoe(command, "checkpoint=wrong.safetensors")
    assert answer.code == 2, answer
    words = {"no JSON": "is no JSON", "lacks classes": "lacks classes", "interpolation": "holds ${"}
    assert words.get(kind, "names the router payload.Router, which is not softmoe's") in answer.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["payload.py", "wrong.safetensors"]


def test_card_from_before_an_option(finished: Path, softmoe: Softmoe, tmp_path: Path) -> None:
    """A card without data.cache, which came later, is read, and its images are found."""
    from safetensors import safe_open

    with safe_open(weights_of(finished), framework="pt") as file:
        card = json.loads(file.metadata()["softmoe"])
    del card["data"]["cache"]
    text = json.dumps(card)
    save_file(load_file(weights_of(finished)), tmp_path / "older.safetensors", metadata={"softmoe": text})
    answer = softmoe("evaluate", "checkpoint=older.safetensors")
    assert answer.code == 0, answer


@pytest.mark.thorough
def test_colour_weights_take_grey_images(softmoe: Softmoe, tmp_path: Path) -> None:
    """The means of three colours are used for grey images, which are repeated; a timm checkpoint's means too."""
    tree(tmp_path / "images")
    line = ("train", *TINY, "data=folder", "data.root=images", "data.image_size=8", "train.batch_size=4")
    assert softmoe(*line, "train.steps=2", "data.mean=[0.4,0.5,0.6]", "data.std=[0.2,0.2,0.3]").code == 0
    (run,) = (tmp_path / "outputs" / "default").iterdir()
    answer = softmoe("finetune", f"checkpoint={run}", "train.steps=2", "tracking=off", "study=grey")
    assert answer.code == 0, answer
    assert "mean:\n  - 0.4\n  - 0.5\n  - 0.6" in next(tmp_path.glob("outputs/grey/*/config.yaml")).read_text()


def test_a_wider_head_is_a_new_head(finished: Path, softmoe: Softmoe) -> None:
    answer = softmoe("finetune", f"checkpoint={finished}", "train.steps=2", "tracking=off", "data.num_classes=20")
    assert answer.code == 0, answer
    assert "head.weight, head.bias" in answer.out


def test_evaluation_has_the_loss_that_was_trained(softmoe: Softmoe, tmp_path: Path) -> None:
    assert softmoe("train", *TINY, "train.steps=2", "train.loss=sigmoid").code == 0
    (run,) = (tmp_path / "outputs" / "default").iterdir()
    told = json.loads(softmoe("evaluate", f"checkpoint={run}", "format=json").out)
    assert told["loss"] == pytest.approx(json.loads((run / "result.json").read_text())["loss"], rel=1e-5)


def test_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    told = subprocess.run(
        f"{sys.executable} -m softmoe_cli list | head -1", shell=True, capture_output=True, text=True, check=True
    )
    assert told.stderr == ""
    reader, writer = os.pipe()
    os.close(reader)  # a command that prints little writes only at its end
    told = subprocess.run(
        [sys.executable, "-m", "softmoe_cli", "--version"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | {"PYTHONUNBUFFERED": ""},
    )
    os.close(writer)
    assert (told.returncode, told.stderr) == (1, "")


def test_read_only_output(softmoe: Softmoe, tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file where a folder should be")
    answer = softmoe("train", *TINY, "train.steps=2", "output_root=blocked")
    assert answer.code == 2
    assert "choose another output_root" in answer.err


def test_train_finetune_evaluate(finished: Path, softmoe: Softmoe, tmp_path: Path) -> None:
    """The main job: a run finetuned at another size and set of images, then evaluated from folder and from file."""
    tree(tmp_path / "images", classes="abc")
    tuned = softmoe(
        "finetune", f"checkpoint={finished}", "data=folder", "data.root=images", "data.image_size=16",
        "data.channels=1", "model.image_size=16", "train.steps=3", "tracking=off", "train.batch_size=4",
    )  # fmt: skip
    assert tuned.code == 0, tuned
    assert "pos_embed 16 -> 64 positions" in tuned.out
    assert "1 per expert, as in the checkpoint" in tuned.out
    assert "head.weight, head.bias" in tuned.out
    (run,) = (tmp_path / "outputs" / "default").iterdir()
    row = json.loads((run / "result.json").read_text())
    rows = []
    for source in (run, weights_of(run)):
        told = softmoe("evaluate", f"checkpoint={source}", "format=json", "batch_size=2")
        assert told.code == 0, told
        rows.append(json.loads(told.out))
    assert rows[0]["top1_pct"] == rows[1]["top1_pct"] == row["top1_pct"]
    assert rows[0]["loss"] == pytest.approx(row["loss"], rel=1e-5)
    assert rows[0]["images"] == row["test_images"]
    table = softmoe("evaluate", f"checkpoint={run}")
    assert "\n  test top-1  " in table.out and table.code == 0


def test_evaluate_on_other_classes_is_refused(finished: Path, softmoe: Softmoe, tmp_path: Path) -> None:
    tree(tmp_path / "images")
    answer = softmoe("evaluate", f"checkpoint={finished}", "data=folder", "data.root=images", "data.channels=1")
    assert answer.code == 2
    assert "use softmoe finetune for other classes" in answer.err


def test_head_is_kept_for_the_same_classes(finished: Path, softmoe: Softmoe) -> None:
    answer = softmoe("finetune", f"checkpoint={finished}", "train.steps=2", "tracking=off")
    assert answer.code == 0, answer
    assert "resized none new none unexpected none" in " ".join(answer.out.split())


def test_finetune_from_timm_without_its_weights(softmoe: Softmoe) -> None:
    answer = softmoe("finetune", "checkpoint=timm:test_vit", "tracking=off")
    assert answer.code == 2
    assert "could not fetch its weights" in answer.err


@pytest.mark.thorough
def test_finished_runs_are_not_repeated_and_sweeps_make_a_run_each(softmoe: Softmoe, tmp_path: Path) -> None:
    line = ("train", "-m", *TINY, "train.steps=2", "seed=0,1")
    assert softmoe(*line).code == 0
    runs = sorted((tmp_path / "outputs" / "seed").glob("*/result.json"))
    assert len(runs) == 2
    before = [run.stat().st_mtime_ns for run in runs]
    again = softmoe(*line)
    assert again.code == 0 and again.out.endswith("2 done before\n")
    assert [run.stat().st_mtime_ns for run in runs] == before


@pytest.mark.parametrize(
    "line", ["--help", "train --help", "finetune --help", "evaluate --help", "list", "train --version"]
)
def test_help_returns_at_once(line: str) -> None:
    """Help imports neither torch nor timm nor wandb nor Hydra's composition."""
    code = (
        f"import sys; sys.argv = ['softmoe', *{line.split()!r}]\n"
        "from softmoe_cli.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print('HEAVY', [m for m in ('torch', 'timm', 'wandb') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in told.stdout
    assert told.stdout.startswith(f"{version('softmoe-cli')}\n") == (line == "train --version")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    left, out = Started(tmp_path, ["finetune", "--debug"], {}).wait()
    assert left == 2 and "Traceback" in out
    assert out.splitlines()[-1].startswith("softmoe: finetune needs checkpoint=")


def test_finetune_at_a_higher_resolution(finished: Path, softmoe: Softmoe) -> None:
    """Slots are kept, or grow with the tokens; the header says which, and a recipe can be frozen in parts."""
    line = (
        "finetune", f"checkpoint={finished}", "tracking=off", "train.steps=1", "train.batch_size=8",
        "model.image_size=16", "train.eval_every=1.0",
    )  # fmt: skip
    kept = softmoe(*line, "recipe=finetune_sgd")
    assert kept.code == 0, kept
    assert "slots            1 per expert, as in the checkpoint" in kept.out
    assert "optimizer        SGD with momentum 0.9" in kept.out
    grown = softmoe(*line, "recipe=finetune_adamw", "slots=proportional", "optim.freeze=[patch_embed.*]")
    assert grown.code == 0, grown
    assert "slots            4 per expert in proportion to the tokens; 1 in the checkpoint" in grown.out
    assert "blocks.1.mlp.router.phi 1 -> 4 slots per expert, pos_embed 16 -> 64 positions" in grown.out
    assert "regularised by   drop path 0.1, RandAugment [2, 9], erasing 0.25, mixup 0.8, cutmix 1.0" in grown.out
    assert "learning rate times 0.65 from layer to layer" in grown.out and "80 frozen" in grown.out
    both = softmoe(*line, "slots=proportional", "+model.router.slots_per_expert=2")
    assert both.code == 2 and "both say how many slots there are" in both.err
