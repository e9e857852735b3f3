"""softmoe show as it is typed, on runs that end, go on, were killed, or have nothing to paint."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softmoe_cli.show.command import spelt_out, write_pictures
from softmoe_cli.show.page import SHOWN_MARK, Shown
from softmoe_cli.show.record import Record
from tests.compare.test_page import Reader
from tests.conftest import TINY, Softmoe
from tests.runs import the_run

SHORT = ("train.steps=4", "train.eval_every=2", "train.batch_size=16", "threads=1")


def trained(softmoe: Softmoe, folder: Path, *words: str) -> Path:
    answer = softmoe("train", *TINY, *SHORT, *words)
    assert answer.code == 0, answer.err
    return the_run(folder)


def read_page(path: Path) -> tuple[str, Reader]:
    """The page, once it is found to stand alone: what opens closes, and nothing is asked of others."""
    text, reader = path.read_text(), Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    for word in ("http:", "https:", "@import", "url("):
        assert word not in text
    assert all((value or "").startswith("data:") for name, value in reader.attributes if name == "src")
    return text, reader


def words_of(reader: Reader) -> str:
    return "\n".join(
        word for tag in ("p", "h1", "h2", "h3", "figcaption", "td", "th") for word in reader.words.get(tag, [])
    )


@pytest.mark.thorough
def test_a_run_is_shown(softmoe: Softmoe, tmp_path: Path) -> None:
    run = trained(softmoe, tmp_path, "model/router=tokens_choice", "optim.lr=0.002", "train.save_seconds=0")
    answer = softmoe("show", str(run), "--json", "painted=3", "threads=1")
    assert answer.code == 0, answer.err
    told = json.loads(answer.out)
    text, reader = read_page(Path(told["page"]))
    shown = words_of(reader)
    looks = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in looks if row["split"] == "validation"][-1]
    assert told["images"] == 143 and told["top1_pct"] == pytest.approx(last["top1_pct"])
    assert f"Expected calibration error {last['ece_pct']:.2f}%" in shown and "dashed: no error" in shown
    (layer,) = told["layers"]
    assert layer["layer"] == "block 1" and layer["experts"] == len(layer["load"]) == 4
    assert sum(layer["load"]) == pytest.approx(1)
    assert "optim.lr" in shown and "0.002" in shown and "optim.weight_decay" not in shown, "what differs, and no more"
    for heading in ("Curves", "Cost", "Calibration", "Confusion", "Who takes which patch", "What each expert likes"):
        assert heading in reader.words["h2"]
    names = {Path(each).stem for each in told["pictures"]}
    assert {"curves", "routing", "calibration", "confusion", "worst", "routing-block-1", "likes-block-1"} <= names
    for each in told["pictures"]:
        with Image.open(each) as picture:
            picture.verify()
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    training, validation = data["blocks"][0]
    assert training["label"] == "training" and validation["runs"][0]["images"] == [32, 64]
    (block,) = data["blocks"][1]
    assert block["label"] == "block 1" and "dropped_share" in block["names"]

    own = tmp_path / "own.png"
    Image.new("L", (40, 30), 77).save(own)
    answer = softmoe("show", str(run), f"image={own}", "folder=mine", "threads=1")
    assert answer.code == 0 and "your image" in answer.out, answer.err
    _, mine = read_page(tmp_path / "mine/index.html")
    assert softmoe("show", str(run), "folder=mine", "threads=1").code == 0
    assert (tmp_path / "mine/confusion.png").is_file() and (tmp_path / "mine/likes-block-1.png").is_file()
    assert softmoe("show", str(run), f"image={own}", "folder=mine", "threads=1").code == 0
    kept = {each.name for each in (tmp_path / "mine").iterdir()}
    assert not kept & {"confusion.png", "calibration.png", "worst.png", "likes-block-1.png", "classes-block-1.png"}
    assert "routing-block-1.png" in kept
    assert "Worst images" not in mine.words["h2"] and "Who takes which patch" in mine.words["h2"]

    few = softmoe("show", str(run), "images=5", "split=test", "threads=1", "batch_size=2")
    assert "5 of 359 test images" in few.out, few.err
    again = softmoe("show", str(run), "images=5", "folder=outputs", "threads=1")
    assert again.code == 0, "there is no such file in there"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/index.html").write_text("mine")
    refused = softmoe("show", str(run), "images=5", "folder=other", "threads=1")
    assert refused.code == 2 and "is not overwritten" in refused.err


@pytest.mark.thorough
def test_maps_over_training_end_with_the_map_of_now(
    softmoe: Softmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that compete with others for room are looked at among these, however few of them are painted."""
    room = ("model.router.images_per_group=8", "model.router.capacity_factor=0.5")
    run = trained(softmoe, tmp_path, "model/router=tokens_choice", *room, "train.save_seconds=0")
    kept: list[Shown] = []

    def remembered(record: Record, shown: Shown) -> dict[str, bytes]:
        kept.append(shown)
        return {}

    monkeypatch.setattr("softmoe_cli.show.command.pictures", remembered)
    assert softmoe("show", str(run), "images=43", "batch_size=16", "threads=1").code == 0
    now, over = (kept[0].sheets[heading][0].rows for heading in ("Who takes which patch", "Over training"))
    assert len(over) == 2
    for painted, strip in zip(now, over, strict=False):
        image, of_now = painted
        assert np.array_equal(strip[0].pixels, image.pixels) and np.array_equal(strip[-1].pixels, of_now.pixels)


@pytest.mark.thorough
def test_answers_that_no_class_has(softmoe: Softmoe, tmp_path: Path) -> None:
    """data.num_classes leaves room for classes to come, and a model that has learned nothing says these too."""
    words = ("model/router=soft", "model.backbone.init=timm", "data.num_classes=40", "optim.lr=1e-9")
    run = trained(softmoe, tmp_path, *words)
    answer = softmoe("show", str(run), "images=40", "threads=1")
    assert answer.code == 0, answer.err
    _, reader = read_page(run / "show/index.html")
    assert re.search("said answer [1-3][0-9] ", words_of(reader))


@pytest.mark.thorough
def test_a_killed_run_and_one_without_a_checkpoint(softmoe: Softmoe, tmp_path: Path) -> None:
    run = trained(softmoe, tmp_path, "model/router=soft")
    (run / "result.json").unlink()
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"format": 1, "step": 5, "ima')
    answer = softmoe("show", str(run), "images=8", "threads=1")
    assert answer.code == 0 and "stopped at 100%" in answer.out, answer.err
    _, reader = read_page(run / "show/index.html")
    assert "Who takes which patch" in reader.words["h2"] and "damaged" not in words_of(reader)
    shutil.rmtree(run / "checkpoints")
    answer = softmoe("show", str(run), "threads=1")
    assert answer.code == 0 and "no checkpoint" in answer.out, answer.err
    _, reader = read_page(run / "show/index.html")
    assert "Curves" in reader.words["h2"] and "Who takes which patch" not in reader.words["h2"]
    refused = softmoe("show", str(run), "image=x.png")
    assert refused.code == 2 and "no checkpoint that could look at it" in refused.err


@pytest.mark.thorough
def test_a_run_without_experts(softmoe: Softmoe, tmp_path: Path) -> None:
    words = [word for word in TINY if "router" not in word and "moe_blocks" not in word]
    answer = softmoe("train", *words, *SHORT, "model/router=dense")
    assert answer.code == 0, answer.err
    answer = softmoe("show", str(the_run(tmp_path)), "threads=1", "--json")
    told = json.loads(answer.out)
    assert told["layers"] == [] and any("no layer with experts" in note for note in told["notes"])
    _, reader = read_page(Path(told["page"]))
    assert "Calibration" in reader.words["h2"] and "no layer with experts" in words_of(reader)


def begun(folder: Path) -> Path:
    """A run that has written its configuration and nothing else."""
    run = folder / "outputs/default/begun-0123456789"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 3\ntrain: {steps: 5}\n")
    return run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "show needs the folder of a run"),
        (["outputs/default/begin-0123456789"], "Did you mean 'begun-0123456789'?"),
        (["outputs/default"], "holds runs and is none; name one of them, such as outputs/default/begun-0123456789"),
        (["outputs"], "neither config.yaml nor metrics.jsonl"),
        (["outputs/default/begun-0123456789", "outputs"], "takes one run, got"),
        (["outputs/default/begun-0123456789", "imagse=3"], "Did you mean 'image'?"),
        (["outputs/default/begun-0123456789", "painted=0"], "painted"),
        (["outputs/default/begun-0123456789", "images=many"], "images"),
        *(
            pytest.param(["outputs/default/begun-0123456789", *words], said, marks=marks)
            for words, said, marks in (
                (["--follow", "folder=x"], "follow=true and folder=x: a page that is served", ()),
                (["--follow", "--json"], "follow=true and format=json: of a page", pytest.mark.thorough),
                (["port=0"], "port=0 has no effect without --follow; add it, or leave port out", pytest.mark.thorough),
                (["every_s=3"], "every_s=3 has no effect without --follow; add it, or leave every_s out", ()),
            )
        ),
    ],
)
def test_what_cannot_be_shown_is_said(words: list[str], said: str, softmoe: Softmoe, tmp_path: Path) -> None:
    begun(tmp_path)
    answer = softmoe("show", *words)
    assert answer.code == 2 and said in answer.err and answer.err.count("\n") == 1, answer.err
    assert not list(tmp_path.rglob("index.html"))


def test_pictures_of_an_earlier_look_go(tmp_path: Path) -> None:
    """Those that show could have made, in a folder that is its own, and no others."""
    page = SHOWN_MARK.decode()
    of_show = {"confusion.png", "worst.png", "likes-block-1.png", "routing-block-12-attn.png", "training-block-0.png"}
    others = {"mine.png", "training-notes.png", "confusion.png.txt", "confusion-old.png", "routing.csv"}
    for name in of_show | others:
        (tmp_path / name).write_text("earlier")
    (tmp_path / "calibration.png").symlink_to(tmp_path / "mine.png")
    assert write_pictures(page, {"curves.png": b"new"}, tmp_path) == ["index.html", "curves.png"]
    assert {each.name for each in tmp_path.iterdir()} >= of_show | others, "the folder was not ours"
    write_pictures(page, {"worst.png": b"new"}, tmp_path)
    left = {each.name for each in tmp_path.iterdir()}
    assert left == others | {"index.html", "worst.png", "calibration.png"}
    assert (tmp_path / "worst.png").read_text() == "new"


def test_words_are_spelt_out() -> None:
    assert spelt_out(["a b/it's", "--follow", "split=test", "-m"]) == [
        "run='a b/it\\'s'",
        "follow=true",
        "split=test",
        "-m",
    ]


@pytest.mark.parametrize("name", ["it's (one)", "a=b", "ü,x"])
def test_any_folder_can_be_shown(name: str, softmoe: Softmoe, tmp_path: Path) -> None:
    """Whatever Hydra would make of its name."""
    run = begun(tmp_path).rename(tmp_path / name)
    (run / "config.yaml").unlink()
    (run / "metrics.jsonl").write_text("")
    answer = softmoe("show", name)
    assert answer.code == 0 and "no checkpoint" in answer.out, answer.err
    assert (tmp_path / name / "show/index.html").is_file()
