"""What W&B is sent of a comparison, look after look, read back from its offline files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from softmoe_cli.compare.findings import closing
from softmoe_cli.compare.question import Question
from softmoe_cli.compare.send import numbers, verdict_rows, wandb_run
from tests.synthetic import asked, row, study, write
from tests.wandb_file import records

ROOT = Path(__file__).resolve().parents[2]
LOOKS = """
from pathlib import Path
from softmoe_cli.compare.question import Question
from softmoe_cli.compare.send import send_look
from tests.synthetic import row, write
folder = Path("runs")
for look in (1, 2):
    if look == 2:
        for seed in range(3, 6):
            write(folder, row(router="dense", seed=seed, top1_pct=90 + seed))
            write(folder, row(router="soft", seed=seed, top1_pct=93 + seed + 0.1 * seed))
    question = Question(any_time=True, margin=5.0)
    send_look([folder], question, folder / "compare", "offline", print, project="mine", look=look)
"""


def test_the_verdict_table_has_the_words_of_the_row(tmp_path: Path) -> None:
    comparison = asked(study(tmp_path))
    told = {each["group"]: each for each in verdict_rows(comparison)}
    assert told["soft"]["verdict"] == "better" and told["dense"]["verdict"] == "baseline"
    soft = next(each for each in comparison.groups if each.label == "soft")
    assert soft.difference is not None
    assert (told["soft"]["low"], told["soft"]["high"]) == (soft.difference.interval.low, soft.difference.interval.high)
    assert told["soft"]["p"] == soft.p_holm and told["soft"]["seeds"] == 3
    assert "more training FLOPs" in told["soft"]["beside it"]
    found = numbers(comparison)
    assert (found["open"], found["comparisons"], found["n/soft"]) == (1, 2, 3)
    assert found["difference/soft"] == soft.difference.interval.mean


def test_groups_of_one_name_in_two_tables_keep_their_own_numbers(tmp_path: Path) -> None:
    for seed in range(3):
        for cut, gain in ((0, 3.0), (1, -3.0)):
            write(tmp_path, row(router="dense", seed=seed, data__split_seed=cut, top1_pct=90 + seed))
            write(tmp_path, row(seed=seed, data__split_seed=cut, top1_pct=90 + gain + 1.1 * seed))
    found = numbers(asked(tmp_path, by=("router", "data.split_seed"), baseline="router=dense"))
    told = sorted(value for name, value in found.items() if name.startswith("difference/"))
    assert told == pytest.approx([-2.9, 3.1]) and found["comparisons"] == 2


def test_the_p_of_a_verdict_is_that_of_its_own_claim(tmp_path: Path) -> None:
    for seed in range(6):
        write(tmp_path, row(router="dense", seed=seed, top1_pct=90 + seed))
        write(tmp_path, row(seed=seed, top1_pct=90 + seed + (-1) ** seed / 10))
    comparison = asked(tmp_path, margin=1.0)
    soft = next(each for each in comparison.groups if each.label == "soft")
    (told,) = [each for each in verdict_rows(comparison) if each["group"] == "soft"]
    assert soft.p_equal_holm is not None and soft.p_equal_holm < 0.05
    assert (told["verdict"], told["p"]) == ("equal within the margin", soft.p_equal_holm)


def test_a_baseline_at_chance_is_said_in_the_row_and_in_the_last_sentence(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path, row(router="dense", seed=seed, top1_pct=10.0 + seed / 10))
        write(tmp_path, row(seed=seed, top1_pct=90.0 + seed))
    comparison = asked(tmp_path)
    told = {each["group"]: each for each in verdict_rows(comparison)}
    assert told["soft"]["verdict"] == "better" and "its baseline is at chance" in told["soft"]["beside it"]
    assert closing(comparison, comparison.blocks[0]).endswith("its baseline at chance).")
    turned = asked(tmp_path, baseline="soft")
    assert closing(turned, turned.blocks[0]).endswith("itself at chance).")


def test_at_chance_is_said_beside_the_verdict(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path, row(router="dense", seed=seed, top1_pct=90 + seed))
        write(tmp_path, row(seed=seed, top1_pct=10.0 + seed / 10))
    told = {each["group"]: each for each in verdict_rows(asked(tmp_path))}
    assert told["soft"]["verdict"] == "worse" and "at chance" in told["soft"]["beside it"]


@pytest.mark.thorough
def test_looks_are_one_run_whose_numbers_have_their_step(tmp_path: Path) -> None:
    """Each look with what it had seen; the last page is the page of the folder."""
    study(tmp_path / "runs")
    there = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", LOOKS], cwd=tmp_path, env=there, check=True, timeout=600)
    files = sorted((tmp_path / "runs" / "compare").glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    ids, numbers_of = set(), []
    for file in files:
        kept = records(file)
        ids.add(next(each.run.run_id for each in kept if each.WhichOneof("record_type") == "run"))
        (history,) = [each.history for each in kept if each.WhichOneof("record_type") == "history"]
        told = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in history.item}
        numbers_of.append((history.step.num, told["compare/n/soft"], told["compare/open"]))
        verdicts = json.loads(next((file.parent / "files" / "media").rglob("verdicts_*.table.json")).read_text())
        assert len(verdicts["data"]) == 3
    question = Question(any_time=True, margin=5.0)
    assert ids == {wandb_run(asked(tmp_path / "runs"), question, "mine")["id"]}, "one run"
    assert [(step, n) for step, n, _ in numbers_of] == [(1, 3), (2, 6)]
    page = next((files[1].parent / "files" / "media").rglob("page_*.html")).read_text()
    assert page == (tmp_path / "runs/compare/index.html").read_text()
