"""softmoe show of folders that other commands have made from a checkpoint: pruned, extracted, upcycled, exported."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from softmoe_cli.errors import UsageError
from softmoe_cli.show.made import is_made, read_made, receipt_tables
from softmoe_cli.show.page import Shown, run_page, state_told
from softmoe_cli.show.send import run_on_wandb
from tests.conftest import TINY, Softmoe
from tests.mixes import mix, write_clothes
from tests.runs import the_run
from tests.show.test_command import read_page, trained, words_of

RECEIPT: dict[str, Any] = {
    "source": {"checkpoint": "outputs/a/run", "digest": "0123"},
    "settings": {"keep": 2, "before": None, "data": {"name": "digits"}},
    "blocks": {"2": {"kept": [1, 2]}},
    "keys": {"blocks.2": {"how": "chosen"}},
    "cost": {"before": {"params": 401226}, "after": {"params": 268610}},
    "loss_before": 0.5,
    "loss_after": 0.25,
}


def written(folder: Path, text: str) -> Path:
    (folder / "made").mkdir()
    (folder / "made/receipt.json").write_text(text)
    (folder / "made/model.safetensors").touch()
    return folder / "made"


def test_a_receipt_is_told_and_nothing_of_it_twice(tmp_path: Path) -> None:
    record = read_made(written(tmp_path, json.dumps(RECEIPT)))
    changed, rest = receipt_tables(RECEIPT)
    assert changed.rows == [["cost.params", "401,226", "268,610"], ["loss", "0.5", "0.25"]]
    assert rest.rows == [
        ["source.checkpoint", "outputs/a/run"], ["settings.keep", "2"], ["blocks.2.kept", "[1, 2]"],
    ]  # fmt: skip
    assert state_told(record) == "made: made from outputs/a/run."
    (tmp_path / "page").write_text(run_page(record, Shown("Seen: nothing.")))
    _, reader = read_page(tmp_path / "page")
    assert {"Before and after", "Receipt"} <= set(reader.words["h2"]) and "Curves" not in reader.words["h2"]


def test_any_name_of_a_folder_makes_an_id_that_wandb_takes(tmp_path: Path) -> None:
    """As long and as odd as names of folders are; another name, or another checkpoint, is another run."""
    ids = set()
    for name in ("a:b #1?", "x" * 200, "x" * 201, "\udcff"):
        for digest in ("0123", "4567"):
            folder = tmp_path / digest / name
            folder.mkdir(parents=True)
            (folder / "receipt.json").write_text(json.dumps({"source": {"digest": digest}}))
            ids.add(run_on_wandb(read_made(folder))["id"])
    assert len(ids) == 8 and all(re.fullmatch(r"show-[0-9a-f]{10}", each) for each in ids)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "is truncated or damaged"), ("[1]", "does not say what"), ('{"source": 3}', "does not say what")],
)
def test_a_receipt_of_another_hand(text: str, said: str, tmp_path: Path) -> None:
    folder = written(tmp_path, text)
    assert is_made(folder) and not is_made(tmp_path)
    with pytest.raises(UsageError, match=f"receipt.json {said}"):
        read_made(folder)
    (folder / "config.yaml").touch()
    assert not is_made(folder), "a run"


def shown(softmoe: Softmoe, folder: str, *words: str) -> tuple[dict[str, Any], str]:
    """What a page of the folder says, as JSON and in words."""
    answer = softmoe("show", folder, "--json", "threads=1", "images=40", "painted=2", *words)
    assert answer.code == 0, answer.err
    told = json.loads(answer.out)
    _, reader = read_page(Path(told["page"]))
    return told, words_of(reader)


def done(softmoe: Softmoe, *words: str) -> None:
    answer = softmoe(*words)
    assert answer.code == 0, answer.err


@pytest.mark.thorough
def test_what_is_left_of_a_run_is_painted_by_its_own_experts(softmoe: Softmoe, tmp_path: Path) -> None:
    run = trained(softmoe, tmp_path, "model/router=tokens_choice")
    done(softmoe, "prune", f"checkpoint={run}", "keep=2", "folder=pruned", "threads=1")
    told, words = shown(softmoe, "pruned")
    assert told["state"] == "made" and told["run"] == "pruned" and told["images"] == 40
    assert [layer["experts"] for layer in told["layers"]] == [2] and str(run) in words
    refused = softmoe("show", "pruned", "--follow")
    assert refused.code == 2 and "does not train" in refused.err
    done(softmoe, "evaluate", "checkpoint=pruned", "threads=1")  # its page beside it is no damage
    done(softmoe, "prune", f"checkpoint={run}", "keep=1", "to=dense", "folder=plain", "threads=1")
    told, words = shown(softmoe, "plain")
    assert told["layers"] == [] and "no layer with experts" in words and "Calibration" in words
    done(softmoe, "export", f"checkpoint={run}", "folder=exported", "threads=1")
    told, _ = shown(softmoe, "exported")
    assert [layer["experts"] for layer in told["layers"]] == [4]
    done(softmoe, "finetune", "checkpoint=pruned", "train.steps=2", "study=tuned", "threads=1", "tracking=off")
    told, words = shown(softmoe, str(next(tmp_path.glob("outputs/tuned/*"))))
    assert told["state"] == "done" and [layer["experts"] for layer in told["layers"]] == [2] and "Curves" in words


@pytest.mark.thorough
@pytest.mark.parametrize("form", ["experts", "folded", "dense"])
def test_one_task_of_a_run(form: str, softmoe: Softmoe, tmp_path: Path) -> None:
    clothes = write_clothes(tmp_path / "clothes")
    width = () if form != "dense" else ("model.expert_width=16",)  # 2 experts of it are an MLP
    done(softmoe, "train", *mix(clothes, *width), "train.steps=2", "train.batch_size=16", "threads=1")
    run = the_run(tmp_path)
    assert [layer["experts"] for layer in shown(softmoe, str(run), "task=digits")[0]["layers"]] == [4]
    done(softmoe, "extract", f"checkpoint={run}", "task=digits", f"form={form}", "folder=one", "threads=1")
    told, words = shown(softmoe, "one")
    assert [layer["experts"] for layer in told["layers"]] == {"experts": [2], "folded": [1], "dense": []}[form]
    assert told["images"] == 40 and "digits" in words and "clothes" not in words.replace(str(clothes), "")


@pytest.mark.thorough
def test_an_upcycled_model(softmoe: Softmoe, tmp_path: Path) -> None:
    words = [word for word in TINY if "router" not in word and "moe_blocks" not in word]
    done(softmoe, "train", *words, "model/router=dense", "train.steps=2", "threads=1")
    run = the_run(tmp_path)
    done(
        softmoe, "upcycle", f"checkpoint={run}", "model/router=soft", "model.router.num_experts=4",
        "model.moe_blocks=last_1", "folder=up", "threads=1",
    )  # fmt: skip
    told, words_said = shown(softmoe, "up")
    assert [layer["experts"] for layer in told["layers"]] == [4] and "Before and after" in words_said
