"""What W&B is sent of a run's pictures, read back from its offline files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from softmoe_cli.errors import UsageError
from softmoe_cli.show.paint import Cell, Sheet, sheet_png
from softmoe_cli.show.record import read_record
from softmoe_cli.show.send import mode_of_sending, run_on_wandb
from tests.wandb_file import records

ROOT = Path(__file__).resolve().parents[2]
SEND = """
from pathlib import Path
from softmoe_cli.show.record import read_record
from softmoe_cli.show.send import send_pictures
run = Path("soft-0123456789")
send_pictures(read_record(run), {"routing-block-1.png": "who"}, "index.html", run / "show", "offline", print)
"""


def begun(folder: Path) -> Path:
    run = folder / "soft-0123456789"
    (run / "show").mkdir(parents=True)
    (run / "config.yaml").write_text("study: mine\nwandb: {project: p, group: null, entity: null}\ntrain: {steps: 3}\n")
    picture = np.arange(128 * 128 * 3, dtype=np.uint8).reshape(128, 128, 3)
    sheet = Sheet("routing-block-1", "who", "", [[Cell(picture, "a")]])
    (run / "show/routing-block-1.png").write_bytes(sheet_png(sheet))
    (run / "show/index.html").write_text("<p>ü</p>")
    return run


def test_a_run_shown_again_is_the_same_run_of_its_group(tmp_path: Path) -> None:
    told = run_on_wandb(read_record(begun(tmp_path)))
    assert (told["id"], told["group"], told["project"], told["job_type"]) == ("show-0123456789", "mine", "p", "show")


def test_where_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mode_of_sending() == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(UsageError, match="wandb=true has no effect with WANDB_MODE=disabled"):
        mode_of_sending()


@pytest.mark.thorough
def test_the_pictures_are_the_same(tmp_path: Path) -> None:
    run = begun(tmp_path)
    there = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", SEND], cwd=tmp_path, env=there, check=True, timeout=600)
    (file,) = (run / "show").glob("wandb/offline-run-*/run-*.wandb")
    kept = records(file)
    (history,) = [each.history for each in kept if each.WhichOneof("record_type") == "history"]
    told = {".".join(item.nested_key): json.loads(item.value_json) for item in history.item}
    own = "show/routing-block-1"
    assert (told[f"{own}._type"], told[f"{own}.caption"]) == ("image-file", "who")
    sent = Image.open(file.parent / "files" / told[f"{own}.path"]).convert("RGB")
    ours = Image.open(run / "show/routing-block-1.png").convert("RGB")
    assert np.array_equal(np.asarray(sent), np.asarray(ours))
    assert (file.parent / "files" / told["show/page.path"]).read_text() == "<p>ü</p>"
