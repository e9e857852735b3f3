"""`softmoe evaluate` as a user types it."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from softmoe_cli.config.commands import EvaluateConfig
from softmoe_cli.data import found
from softmoe_cli.data.archives import Stored
from softmoe_cli.data.sets import load
from softmoe_cli.data.splits import ImageSet
from softmoe_cli.errors import UsageError
from softmoe_cli.evaluate import command as evaluate_command
from softmoe_cli.evaluate.by_task import each_task
from softmoe_cli.evaluate.classes import outputs_for
from softmoe_cli.evaluate.quality import Outcomes
from softmoe_cli.model.vit import build
from softmoe_cli.options.compose import say_once
from softmoe_cli.options.inherit import keep_cut
from softmoe_cli.run.card import CARD_FORMAT
from softmoe_cli.run.rows import charted
from tests import oracles
from tests.conftest import TINY, Softmoe
from tests.mixes import mix, write_clothes
from tests.runs import saved

SHORT = (*TINY, "train.steps=12", "train.batch_size=16")


def train(softmoe: Softmoe, tmp_path: Path, *overrides: str, study: str = "default") -> Path:
    assert softmoe("train", *SHORT, f"study={study}", *overrides).code == 0
    (run,) = (tmp_path / "outputs" / study).iterdir()
    return run


def chosen(**changes: Any) -> EvaluateConfig:
    settings: dict[str, Any] = {
        "checkpoint": "run", "soup": "uniform", "data": oracles.compose().data, "split": "test", "batch_size": 8,
        "loss": None, "precision": None, "calibration_bins": 15, "predictions": None, "confusion": None, "fewshot": [],
        "fewshot_l2": "validation", "fewshot_seed": 0, "audit": [], "audit_images": None, "format": "table",
        "device": "cpu", "threads": None, "contrast": None, "contrast_beta": 0.5, "contrast_alpha": 0.1,
        "contrast_by": "validation", "contrast_gates": "trained", "contrast_draws": 3, "contrast_seed": 0,
        "contrast_clock": False,
    }  # fmt: skip
    return EvaluateConfig(**settings | changes)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_everything_that_is_told_of_a_checkpoint(softmoe: Softmoe, tmp_path: Path) -> None:
    run = train(softmoe, tmp_path)
    answer = softmoe(
        "evaluate", f"checkpoint={run}", "format=json", "predictions=said.csv", "confusion=confusion.csv",
        "fewshot=[1,5]", "audit=[neighbours,capacity,slots,experts]", "audit_images=40",
    )  # fmt: skip
    assert answer.code == 0, answer
    row, result = json.loads(answer.out), json.loads((run / "result.json").read_text())
    for key in ("top1_pct", "top5_pct", "loss", "nll", "ece_pct"):
        assert row[key] == pytest.approx(result[key], rel=1e-5), key
    with (tmp_path / "said.csv").open() as file:
        said = list(csv.DictReader(file))
    right = [each["label"] == each["prediction"] for each in said]
    assert [int(each["index"]) for each in said] == list(range(row["images"]))
    assert 100 * sum(right) / len(right) == row["top1_pct"]
    error = oracles.calibration_error([float(each["probability"]) for each in said], right, 15)
    assert row["ece_pct"] == pytest.approx(100 * error, abs=1e-11)
    counts = torch.tensor(row["confusion"])
    with (tmp_path / "confusion.csv").open() as file:
        assert [line[1:] for line in csv.reader(file)][1:] == [[str(c) for c in each] for each in row["confusion"]]
    assert counts.sum() == row["images"] == sum(each["images"] for each in row["per_class"])
    assert row["fewshot_l2_chosen_on"] == "validation" and row["fewshot_5_images"] == 50
    assert 10 < row["fewshot_5_top1_pct"] <= 100
    parts = {finding["part"] for finding in row["audit"]}
    assert parts == {"neighbours", "experts"} and set(row["not_applicable"]) == {"capacity", "slots"}
    assert all(f["changed_pct"] == 0 for f in row["audit"] if f["part"] == "neighbours")
    table = softmoe("evaluate", f"checkpoint={run}", "fewshot=[5]", "fewshot_l2=scored", "audit=[slots,neighbours]")
    assert "l2 chosen on the scored test images" in table.out and "worst class" in table.out
    lines = {line[2:19].rstrip(): line[19:] for line in table.out.splitlines() if line.startswith("  ")}
    assert lines["test top-1"].endswith("%") and lines["audit, whole"].endswith("%"), "names have room in their column"
    assert "audit of slots: an expert has one slot" in table.out and "neighbours: batches of 1 " in table.out


def test_the_checkpoints_own_set_is_cut_as_it_was(softmoe: Softmoe, tmp_path: Path) -> None:
    """Named or not; another cut would have images that it was trained on among the test images."""
    run = train(softmoe, tmp_path, "data.split_seed=1")
    reached = json.loads((run / "result.json").read_text())["top1_pct"]
    for words in ((), ("data=digits",), ("data=digits", "data.split_seed=1")):
        said = json.loads(softmoe("evaluate", f"checkpoint={run}", *words, "format=json").out)
        assert said["top1_pct"] == pytest.approx(reached, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "typed", "seed"),
    [
        ({}, [], 1),
        ({}, ["data.split_seed=0"], 0),
        ({"name": "other"}, [], 0),
        ({"root": "elsewhere"}, [], 0),
        ({"root": "./here"}, [], 1),
        ({"test_fraction": 1}, [], 0),
    ],
)
def test_which_data_are_the_checkpoints_own(
    changes: dict[str, Any], typed: list[str], seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    card = {"name": "mine", "format": "folder", "root": "here", "split_seed": 1, "test_fraction": 0.2}
    data = card | {"split_seed": 0} | changes
    say_once.cache_clear()
    keep_cut(data, card, typed)
    assert data["split_seed"] == seed
    said = capsys.readouterr().err
    assert ("cut as for the checkpoint: data.split_seed=1" in said) == (seed == 1)
    assert ("is not the checkpoint's here, so it is cut anew" in said) == (changes == {"root": "elsewhere"})
    keep_cut({}, {}, typed)  # a file that says nothing of data


def test_classes_of_one_name_are_told_by_their_places() -> None:
    known = ["ant", "sunglasses", "sunglasses"]
    assert outputs_for(known, known, by_number=False) == [0, 1, 2]
    with pytest.raises(UsageError, match=r"2 outputs called 'sunglasses'.*set data.class_numbers=true"):
        outputs_for(known, ["ant", "sunglasses"], by_number=False)
    assert outputs_for(known, ["ant", "bee"], by_number=False) is None
    assert outputs_for(["ant", "bee"], ["bee"], by_number=False) == [1]


def test_a_mix_of_other_classes_is_not_scored(tmp_path: Path) -> None:
    """Its sets' labels are numbers, which are other classes when a folder of a set was renamed."""
    config = chosen(data=oracles.compose(*mix(write_clothes(tmp_path))).data)
    known = ["digits/zero", *load(config.data).classes[1:]]
    with pytest.raises(UsageError, match="digits: its files have other classes than the checkpoint's task: 0, zero"):
        each_task(config, known, lambda *_: pytest.fail("it was scored"))


def test_features_serve_other_classes(softmoe: Softmoe, tmp_path: Path) -> None:
    run = saved(tmp_path / "given.safetensors", 0)
    for name, grey in (("dark", 30), ("light", 220)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("L", (8, 8), grey + i).save(tmp_path / "images" / name / f"{i}.png")
    line = ("evaluate", f"checkpoint={run}", "data=folder", "data.root=images", "data.channels=1", "format=json")
    answer = softmoe(*line, "fewshot=[2]")
    assert answer.code == 0, answer
    row: dict[str, Any] = json.loads(answer.out)
    assert row["fewshot_2_top1_pct"] == 100 and row["fewshot_2_images"] == 4
    assert "top1_pct" not in row and "not scored" in row["head"]
    refused = softmoe(*line, "fewshot=[2]", "audit=[experts]")
    assert refused.code == 2 and "which audit cannot do with" in refused.err


def test_few_shots_while_training_change_nothing_else(softmoe: Softmoe, tmp_path: Path) -> None:
    plain = lines(train(softmoe, tmp_path, "model.router.noise_std=0.1"))
    run = train(softmoe, tmp_path, "model.router.noise_std=0.1", "train.fewshot=[1,5]", study="looked")
    shot = lines(run)
    added = {"fewshot_1_top1_pct", "fewshot_5_top1_pct"}
    clocks = {"device_s", "eval_s", "save_s", "compile_s", "load_s", "images_per_s", "energy_kj"}
    for before, after in zip(plain, shot, strict=True):
        assert after.keys() - before.keys() == (added if after["split"] == "validation" else set())
        assert all(after[key] == before[key] for key in before.keys() - clocks)
    result = json.loads((run / "result.json").read_text())
    last = [row for row in shot if row["split"] == "validation"][-1]
    assert all(result[f"validation_{key}"] == last[key] for key in added)
    assert {f"validation/{key}" for key in added} <= charted(last).keys()  # W&B
    row = json.loads(
        softmoe(
            "evaluate", f"checkpoint={run}", "split=validation", "fewshot=[1,5]", "fewshot_l2=scored", "format=json"
        ).out
    )
    assert all(row[key] == last[key] for key in added)


def test_averages_of_checkpoints(softmoe: Softmoe, tmp_path: Path) -> None:
    one, two = (saved(tmp_path / f"{seed}.safetensors", seed) for seed in (0, 1))
    other = saved(tmp_path / "wide.safetensors", 0, "model.router.num_experts=8")

    def told(checkpoint: str, *arguments: str) -> dict[str, float]:
        answer = softmoe("evaluate", "format=json", "split=validation", f"checkpoint={checkpoint}", *arguments)
        assert answer.code == 0, answer
        row: dict[str, float] = json.loads(answer.out)
        return row

    alone = [told(str(run)) for run in (one, two)]
    assert told(f"[{one},{one}]")["loss"] == alone[0]["loss"]
    assert told(f"[{one},{two}]")["loss"] not in [row["loss"] for row in alone]
    best = max(row["top1_pct"] for row in alone)
    greedy = told(f"[{one},{two},{one}]", "soup=greedy")
    assert greedy["top1_pct"] >= best and str(greedy["soup"]).endswith(" of 3")
    refused = softmoe("evaluate", f"checkpoint=[{one},{other}]")
    assert refused.code == 2 and "differ in model; only checkpoints of the same architecture" in refused.err
    refused = softmoe("evaluate", f"checkpoint={one}", "predictions=nowhere/said.csv")
    assert refused.code == 2 and "nowhere is no folder" in refused.err
    (tmp_path / "mine.csv").write_text("mine")
    for key in ("predictions", "confusion"):
        refused = softmoe("evaluate", f"checkpoint={one}", f"{key}=mine.csv")
        assert refused.code == 2 and f"{key}=mine.csv exists" in refused.err
    assert (tmp_path / "mine.csv").read_text() == "mine"
    assert "neither a path nor a list" in softmoe("evaluate", "checkpoint=[]").err


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"soup": "greedy"}, "soup=greedy has no effect without a list of checkpoints"),
        ({"audit_images": 5}, "audit_images=5 has no effect without audit"),
        ({"fewshot_l2": "scored"}, "fewshot_l2=scored has no effect without fewshot"),
        ({"audit": ["neighbors"]}, "Did you mean 'neighbours'?"),
        ({"fewshot": [0]}, "is out of range"),
        ({"calibration_bins": 0}, "calibration_bins=0 is out of range"),
    ],
)
def test_options_that_cannot_work(wrong: dict[str, Any], words: str) -> None:
    chosen().settled()
    with pytest.raises(UsageError) as told:
        chosen(**wrong).settled()
    assert words in str(told.value)


def test_predictions_of_a_folder_name_its_files(softmoe: Softmoe, tmp_path: Path) -> None:
    for name in map(str, range(10)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (8, 8), 25 * int(name) + i).save(tmp_path / "images" / name / f"{i}.png")
    line = ("data=folder", "data.root=images", "data.channels=1", "predictions=said.csv")
    answer = softmoe("evaluate", f"checkpoint={saved(tmp_path / 'given.safetensors', 0)}", *line)
    assert answer.code == 0, answer
    with (tmp_path / "said.csv").open() as file:
        assert all(Path(each["file"]).parent.name == each["label"] for each in csv.DictReader(file))


# --- ImageNet's other test sets ---------------------------------------------------------------------------------------

WNIDS = ("n01", "n02", "n03", "n04")
GREYS = (20, 90, 160, 230)


def greys(root: Path, classes: dict[str, list[int]], name: str = "{}_{}.png") -> Path:
    """Class folder -> images of one grey each."""
    for label, values in classes.items():
        (root / label).mkdir(parents=True)
        for i, grey in enumerate(values):
            Image.new("RGB", (12, 10), (grey,) * 3).save(root / label / name.format(label, i))
    return root


@pytest.fixture
def four(tmp_path: Path) -> Path:
    """A checkpoint for four classes that nobody trained."""
    config = oracles.compose(*TINY, "data=imagenet", "data.root=x", "model.in_chans=3", "data.image_size=16")
    torch.manual_seed(0)
    weights = build(config.model, 4).state_dict()
    torch.nn.init.normal_(weights["head.weight"], std=3.0)
    card = {
        "format": CARD_FORMAT,
        "model": dataclasses.asdict(config.model),
        "data": dataclasses.asdict(config.data),
        "loss": "softmax",
    }
    card |= {"format": CARD_FORMAT, "precision": "fp32", "classes": list(WNIDS)}
    save_file(weights, tmp_path / "four.safetensors", metadata={"softmoe": json.dumps(card)})
    return tmp_path / "four.safetensors"


def logits(checkpoint: Path, images: list[int]) -> torch.Tensor:
    """By the model itself, on squares of one grey each, normalised by hand."""
    from softmoe_cli.model.pretrained import read_checkpoint
    from softmoe_cli.model.weights import load_weights

    source = read_checkpoint(str(checkpoint))
    config = oracles.compose(*TINY, "data=imagenet", "data.root=x", "model.in_chans=3", "data.image_size=16")
    model = build(config.model, 4)
    load_weights(model, source.weights, keep_head=True, allow_unexpected=[])
    size = config.model.image_size
    mean, std = (torch.tensor(source.card["data"][key]).view(3, 1, 1) for key in ("mean", "std"))
    x = torch.stack([(torch.full((3, size, size), grey / 255) - mean) / std for grey in images])
    with torch.no_grad():
        found: torch.Tensor = model.eval()(x)
    return found


def test_subsets_of_classes_by_name_and_by_number(softmoe: Softmoe, four: Path, tmp_path: Path) -> None:
    """As ImageNet-A and R (some of the classes) and V2 (all, called by number): the others are no possible answer."""
    values = [*GREYS, 60, 200]
    greys(tmp_path / "some", {"n04": values, "n02": values})
    greys(tmp_path / "numbered", {str(i): values for i in range(4)})
    scores = logits(four, values)
    for name, data, among in (("some", "imagenet_r", [1, 3]), ("numbered", "imagenet_v2", [0, 1, 2, 3])):
        answer = softmoe(
            "evaluate", f"checkpoint={four}", f"data={data}", f"data.root={name}", "data.workers=0", "format=json",
            f"predictions={name}.csv",
        )  # fmt: skip
        assert answer.code == 0, answer
        row = json.loads(answer.out)
        best = [among[i] for i in scores[:, among].argmax(dim=1).tolist()]
        assert row["images"] == len(values) * len(among) and row["data"] == data
        assert row["top1_pct"] == pytest.approx(100 * sum(best.count(label) for label in among) / row["images"])
        with (tmp_path / f"{name}.csv").open() as file:
            lines = sorted(csv.DictReader(file), key=lambda line: line["file"])
        said = [among[int(each["prediction"])] for each in lines]
        assert said == best * len(among)
        assert ("among" in row) == (len(among) < 4)
        chance = scores[:, among].double().softmax(1)
        assert row["nll"] == pytest.approx(-chance.log().mean().item(), rel=1e-5)
    assert len({*logits(four, values).argmax(1).tolist()}) > 1


def test_real_labels(softmoe: Softmoe, four: Path, tmp_path: Path) -> None:
    """Any of an image's labels is right; images without labels do not count."""
    numbers = {"n01": [0, 1], "n02": [2], "n03": [3], "n04": [4, 5]}
    for label, several in numbers.items():
        (tmp_path / "val" / label).mkdir(parents=True)
        for i in several:
            name = f"ILSVRC2012_val_{i + 1:08d}.png"
            Image.new("RGB", (12, 10), (40 * i,) * 3).save(tmp_path / "val" / label / name)
    guess = logits(four, [40 * i for i in range(6)]).argmax(dim=1).tolist()
    other = [(each + 1) % 4 for each in guess]
    sets = [[guess[0]], [other[1]], [], [guess[3], other[3]], [other[4]], [other[5], guess[5]]]
    (tmp_path / "real.json").write_text(json.dumps(sets))
    line = (
        "evaluate",
        f"checkpoint={four}",
        "data=imagenet",
        "data.root=val",
        "data.test_fraction=1",
        "format=json",
    )
    answer = softmoe(*line, "real=real.json")
    assert answer.code == 0, answer
    row = json.loads(answer.out)
    assert (row["real_images"], row["real_top1_pct"]) == (5, 60.0)
    for content, words in {
        "{": "is not a JSON list",
        "[[9]]": "labels beyond the 4",
        "[[0]]": "has no labels for",
    }.items():
        (tmp_path / "real.json").write_text(content)
        answer = softmoe(*line, "real=real.json")
        assert answer.code == 2 and words in answer.err, answer
    (tmp_path / "real.json").write_text("[[],[],[],[],[],[]]")
    assert "has no label for any" in softmoe(*line, "real=real.json").err
    timm = softmoe(*line, "real=timm")
    assert timm.code == 2 and "labels beyond the 4 classes" in timm.err
    with safe_open(four, "pt") as file:
        card = json.loads(file.metadata()["softmoe"]) | {"classes": ["goldfish", "n02", "n03", "n04"]}
    save_file(load_file(four), four, {"softmoe": json.dumps(card)})
    timm = softmoe(*line, "real=timm")
    assert timm.code == 2 and "the checkpoint has goldfish" in timm.err
    weights = load_file(four)
    weights["head.bias"][3] = 100  # an output that no class of the card has
    save_file(weights, four, {"softmoe": json.dumps(card | {"classes": ["n01", "n02", "n03"]})})
    shutil.rmtree(tmp_path / "val" / "n04")
    (tmp_path / "real.json").write_text("[[0],[0],[1],[2]]")
    answer = softmoe(*line, "real=real.json")
    assert answer.code == 0 and json.loads(answer.out)["real_top1_pct"] == 0, answer


def test_sets_for_evaluation_are_for_nothing_else(softmoe: Softmoe, four: Path, tmp_path: Path) -> None:
    greys(tmp_path / "some", {"n04": [1, 2], "n02": [3, 4], "n05": [5, 6]})
    data = ("data=imagenet_a", "data.root=some", "data.workers=0")
    assert "are for softmoe evaluate only" in softmoe("train", *data).err
    assert "there are no validation images" in softmoe("evaluate", f"checkpoint={four}", *data, "split=validation").err
    assert "there are no train images" in softmoe("evaluate", f"checkpoint={four}", *data, "fewshot=[1]").err
    assert "knows 4 classes" in softmoe("evaluate", f"checkpoint={four}", *data).err


def test_files_of_many_classes_and_of_odd_names(tmp_path: Path) -> None:
    """A spreadsheet computes nothing, a terminal obeys nothing, and a name in any bytes can be written."""
    images = ImageSet(torch.tensor([0, 1]), None, 8, 1, Stored.files(Path("x"), ["=1+1.png", "ni\udcf1o.png"]))
    ones = torch.ones(2, dtype=torch.float64)
    for classes in (3, 3000):
        names = ["=cmd()", "\x1b[31mred", *map(str, range(classes - 2))]
        said = Outcomes(images.labels, torch.tensor([0, 2]), ones, ones, ones.bool(), 0.0, 0.0, classes)
        config = chosen(predictions=str(tmp_path / "said.csv"), confusion=str(tmp_path / "confusion.csv"))
        evaluate_command._write(config, said, images, names, {})
        with (tmp_path / "said.csv").open(newline="") as file:
            assert [line[-1] for line in csv.reader(file)] == ["file", "x/=1+1.png", "x/ni\\xf1o.png"]
        with (tmp_path / "confusion.csv").open(newline="") as file:
            table = list(csv.reader(file))
        if classes == 3:
            assert table[0] == ["label \\ prediction", "'=cmd()", "\\x1b[31mred", "0"]
            assert [line[1:] for line in table[1:]] == [["1", "0", "0"], ["0", "0", "1"], ["0", "0", "0"]]
        else:
            assert table == [["label", "prediction", "images"], ["'=cmd()", "'=cmd()", "1"], ["\\x1b[31mred", "0", "1"]]
        assert set(evaluate_command._confusion(said)) == {"confusion" if classes == 3 else "confusion_pairs"}


@pytest.mark.parametrize("line", ["evaluate", "export", "prune keep=2"])
@pytest.mark.parametrize("name", ["cifar10", "fashion_mnist"])
def test_a_set_that_only_a_checkpoint_names_is_not_fetched(
    softmoe: Softmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, name: str
) -> None:
    monkeypatch.setattr(found, "DEBIAN_FASHION", tmp_path / "nowhere")
    place = tmp_path / "chosen by the checkpoint"
    made = saved(tmp_path / "a.safetensors", 0, f"data={name}", f"data.root={place}", "model.in_chans=3")
    (tmp_path / "outputs/pruned").mkdir(parents=True)  # where something may have been made before
    told = softmoe(*line.split(), f"checkpoint={made}")
    assert told.code == 2 and not place.exists() and "downloading" not in told.out
    assert told.err.endswith(
        f"names data={name}, which is not in data.root={place}; only a set that is typed is fetched: add data={name}\n"
    )
