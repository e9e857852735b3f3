"""What a run's files say, whole or cut short."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from softmoe_cli.errors import UsageError
from softmoe_cli.run.rows import FORMAT
from softmoe_cli.show import charts
from softmoe_cli.show.page import Shown, run_page
from softmoe_cli.show.paint import Cell, Sheet, colours
from softmoe_cli.show.record import MOST_POINTS, read_record, routing_curves, statistics_of, thinned_rows, unchanged
from tests.compare.test_page import Reader


def row(step: int, split: str, **more: Any) -> str:
    spent = {"train_pflop": step / 1e3, "device_s": step / 10, "eval_s": 0.0, "save_s": 0.0, "compile_s": 0.0}
    if split == "train":
        spent |= {"aux_loss": 0.0, "lr": 0.25, "grad_norm": 1.0, "images_per_s": 80.0}
    return json.dumps(
        {"format": FORMAT, "step": step, "images": 8 * step, "epoch": step / 4, "split": split} | spent | more
    )


def run_of(folder: Path, steps: int = 6) -> Path:
    """A run that was killed while it wrote a row; its second layer is an adapter's."""
    run = folder / "soft-digits-0123456789"
    run.mkdir()
    config = "seed: 7\nstudy: mine\ntrain: {steps: 10, batch_size: 48}\noptim: {lr: 0.25}\ndata: {name: <b>}\n"
    (run / "config.yaml").write_text(config)
    rows = [row(step, "train", loss=1 / step) for step in range(1, steps + 1)]
    rows += [
        row(steps, "validation", loss=0.5, top1_pct=71.5, top5_pct=90.0, nll=0.5, ece_pct=4.5, images_evaluated=200)
    ]
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n" + rows[0][:40])
    routing = [
        {"format": FORMAT, "step": steps, "block": 1, "load_max": 2.5, "dropped_share": 0.0},
        {"format": FORMAT, "step": steps, "block": 1, "beside": "attn", "scale": 1.5},
    ]
    (run / "routing.jsonl").write_text("".join(json.dumps(each) + "\n" for each in routing))
    return run


def test_a_row_that_was_being_written_is_left_out(tmp_path: Path) -> None:
    record = read_record(run_of(tmp_path))
    assert [each["step"] for each in record.of("train")] == [1, 2, 3, 4, 5, 6] and record.notes == []
    assert record.state.state == "stopped" and record.result is None and record.settings["optim.lr"] == 0.25
    with (tmp_path / "soft-digits-0123456789/metrics.jsonl").open("a") as metrics:
        metrics.write("\nnonsense\n" + row(7, "train", loss=0.1) + "\n")
    record = read_record(tmp_path / "soft-digits-0123456789")
    assert record.of("train")[-1]["step"] == 7 and record.notes == ["metrics.jsonl: 2 lines are damaged and left out."]


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("routing.jsonl", '"step": 6', '"step": [1]'),
        ("routing.jsonl", '"load_max": 2.5', '"load_max": "x"'),
        ("metrics.jsonl", '"loss": 0.25', '"loss": "x"'),
        ("metrics.jsonl", '"top1_pct": 71.5', '"top1_pct": "x"'),
    ],
)
def test_a_damaged_row_is_left_out_and_said(file: str, old: str, new: str, tmp_path: Path) -> None:
    run = run_of(tmp_path)
    text = (run / file).read_text()
    assert old in text
    (run / file).write_text(text.replace(old, new, 1))
    record = read_record(run)
    assert record.notes == [f"{file}: 1 line is damaged and left out."]
    assert len(record.rows) + len(record.routing) == 8
    assert "damaged" in run_page(record, Shown("Seen: nothing."))


def test_layers_have_their_own_curves(tmp_path: Path) -> None:
    curves = routing_curves(read_record(run_of(tmp_path)))
    assert list(curves) == ["block 1", "block 1, attn"]
    assert curves["block 1"]["load_max"] == [2.5] and curves["block 1"]["images"] == [48]
    moving: dict[str, dict[str, list[float | None]]] = {
        "a": {"images": [1.0, 2.0], "still": [3.0, 3.0], "moves": [1.0, 2.0]}
    }
    assert statistics_of(moving) == ["moves", "still"] and unchanged(moving, "still")


def test_long_curves_are_thinned_to_what_a_screen_shows() -> None:
    rows = [{"step": step} for step in range(5000)]
    thin = thinned_rows(rows)
    assert len(thin) == MOST_POINTS and thin[0] == rows[0] and thin[-1] == rows[-1]
    assert thinned_rows(rows[:9]) == rows[:9]


def test_the_page_of_files_alone(tmp_path: Path) -> None:
    picture = Sheet("x", "a <i>", "note", [[Cell(colours(16).reshape(4, 4, 3), "cap & <b>")]], [("one", (1, 2, 3))])
    shown = Shown("Seen: nothing.", sheets={"Who": [picture], "None": []})
    record = read_record(run_of(tmp_path))
    text, reader = run_page(record, shown), Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [] and 'http-equiv="refresh"' not in text
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    sources = [value or "" for name, value in reader.attributes if name == "src"]
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    words = {tag: "|".join(found) for tag, found in reader.words.items()}
    assert "b" not in words and "cap & <b>" in words["figcaption"] and "a <i>" in words["h3"]
    assert "Who" in words["h2"] and "None" not in words["h2"]
    assert "soft-digits, seed 7: stopped at 60%, validation top-1 71.50%, last row" in words["p"]
    assert "71.50" in words["td"] and "0.25" in words["td"] and "<b>" in words["td"]
    settings = words["th"].split("|")
    assert "optim.lr" in settings and "train.batch_size" in settings and "optim.weight_decay" not in settings
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert [group["label"] for group in data["blocks"][0]] == ["training", "validation"]
    assert data["blocks"][0][0]["runs"][0]["loss"] == [1, 0.5, 0.333333, 0.25, 0.2, 0.166667]
    assert run_page(record, shown, refresh_s=5).count('http-equiv="refresh" content="5"') == 1


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    run_of(tmp_path)
    with pytest.raises(UsageError, match=r"holds runs and is none; name one of them, such as .*soft-digits-0123456789"):
        read_record(tmp_path)
    with pytest.raises(UsageError, match=r"Did you mean 'soft-digits-0123456789'"):
        read_record(tmp_path / "soft-digits-012345678")


def test_layers_differ_in_the_picture_of_their_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven have colours of their own."""
    run, looks = run_of(tmp_path), range(6, 46)
    told = {"loss": 0.5, "top1_pct": 71.5, "top5_pct": 90.0, "nll": 0.5, "ece_pct": 4.5, "images_evaluated": 200}
    (run / "metrics.jsonl").write_text("".join(row(step, "validation", **told) + "\n" for step in looks))
    routing = [{"format": FORMAT, "step": step, "block": block, "load_max": step + block} for step in looks
               for block in range(24)]  # fmt: skip
    (run / "routing.jsonl").write_text("".join(json.dumps(each) + "\n" for each in routing))
    figures: list[Figure] = []
    monkeypatch.setattr(charts, "_file", figures.append)
    charts.chart_files(read_record(run), None, [])
    (panel,) = figures[-1].axes
    drawn = {(line.get_color(), line.get_marker()) for line in panel.lines}
    assert len(panel.lines) == len(drawn) == 24
