"""Runs of other programs, read back to the numbers that their writers were given."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softmoe_cli.compare.flat import flat_rows, json_text
from softmoe_cli.compare.groups import Comparison
from softmoe_cli.compare.others.told import typed_value
from softmoe_cli.compare.page import page
from softmoe_cli.compare.tables import markdown, terminal
from softmoe_cli.errors import UsageError
from tests.compare.others.runs import ARMS, events, offline, reached, table, timm_runs, written_offline
from tests.conftest import Softmoe
from tests.synthetic import asked, group, row, study, write


def values(comparison: Comparison, key: str = "top1_pct") -> dict[tuple[str, int], float]:
    """(arm, seed) -> what its run reached."""
    return {
        (run.settings()["config.arm"], run.row["seed"]): run.row[key] for each in comparison.groups for run in each.runs
    }


PERCENT = {(arm, seed): 100 * reached(arm, seed) for arm in ARMS for seed in range(3)}


def same_verdict(comparison: Comparison) -> None:
    """The verdict that runs of this project with these numbers would have."""
    soft = group(comparison, "arm soft")
    assert (soft.verdict, soft.baseline, len(soft.runs)) == ("better", "arm dense", 3)
    assert soft.difference is not None and soft.difference.method == "paired"
    assert soft.difference.interval.mean == pytest.approx(2.006, rel=1e-6)


def test_a_table(tmp_path: Path) -> None:
    file = table(tmp_path)
    maps = ("quality=acc*100,seed=run_seed", "device_s=hours*3600")
    comparison = asked(file, map=maps, baseline="arm=dense", cost="device_s")
    assert values(comparison) == PERCENT
    assert set(values(comparison, "device_s").values()) == {5400.0}
    same_verdict(comparison)


def test_json_and_json_lines_are_the_same(tmp_path: Path) -> None:
    rows = [{"arm": arm, "opt": {"seed": seed}, "acc": 100 * reached(arm, seed)} for arm in ARMS for seed in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    for name in ("a.json", "b.jsonl"):
        comparison = asked(tmp_path / name, map=("quality=acc,seed=opt.seed",), baseline="arm=dense")
        assert values(comparison) == PERCENT
        same_verdict(comparison)


@pytest.mark.parametrize("maps", ["quality=acc", "quality=acc,images=seen,epochs=epochs"])
@pytest.mark.parametrize("column", ["epochs", "seen", "classes", "forward_gflop"])
def test_settings_with_a_costs_name_keep_groups_apart(tmp_path: Path, column: str, maps: str) -> None:
    """Other epochs, images or classes are other settings, also where --map makes them a cost."""
    fixed = {"model": "net", "epochs": 5, "seen": 500}
    rows = [fixed | {column: n, "seed": seed, "acc": 90 + n / 100 + seed} for n in (10, 30) for seed in range(3)]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    comparison = asked(tmp_path / "t.json", map=(maps,))
    assert [set(each.label.split()[-2:]) for each in comparison.groups] == [{column, "30"}, {column, "10"}]
    assert [[run.row["seed"] for run in each.runs] for each in comparison.groups] == [[0, 1, 2]] * 2
    key = {"seen": "images"}.get(column, column)
    if key == column or "seen" in maps:
        assert comparison.groups[0].runs[0].row[key] == 30


def test_runs_that_only_a_mapped_cost_tells_apart_are_told(tmp_path: Path) -> None:
    rows = [{"flop": n, "seed": seed, "acc": 90 + n + seed} for n in (1, 2) for seed in range(3)]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    maps = ("quality=acc,forward_gflop=flop",)
    told = "6 runs: they agree with another run in seed and settings"
    assert any(note.startswith(told) for note in asked(tmp_path / "t.json", map=maps).notes)
    for question in ({"map": maps, "by": ("forward_gflop",)}, {"map": ("quality=acc",)}):
        assert not any("agree with another" in note for note in asked(tmp_path / "t.json", **question).notes)


def test_what_a_clock_says_is_no_setting(tmp_path: Path) -> None:
    lines = [f"net,{seed},{90 + seed},{7 + seed}" for seed in range(3)]
    (tmp_path / "t.csv").write_text("\n".join(["model,seed,acc,device_s", *lines]) + "\n")
    assert [len(each.runs) for each in asked(tmp_path / "t.csv", map=("quality=acc",), cost="device_s").groups] == [3]


@pytest.mark.parametrize(("seed", "kept"), [("", [3, 3]), ("seed", [1, 1])])
def test_equal_rows_are_runs_of_their_own_unless_they_state_one_seed(
    tmp_path: Path, seed: str, kept: list[int]
) -> None:
    rows = [{"arm": arm, seed or "lr": 1, "acc": 90} for arm in ("a", "b") for _ in range(3)]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    comparison = asked(tmp_path / "t.json", map=("quality=acc",))
    assert [len({run.draw for run in each.runs}) for each in comparison.groups] == kept
    assert len(comparison.left_out) == 6 - sum(kept)


def test_timms_own_summary(tmp_path: Path) -> None:
    comparison = asked(timm_runs(tmp_path), baseline="model=vit_tiny_patch16_224", cost="forward_gflop")
    small = group(comparison, "vit_small_patch16_224")
    assert [run.row["top1_pct"] for run in small.runs] == [57.0, 58.3, 59.6]
    assert [(run.row["seed"], run.row["epochs"], run.row["loss"]) for run in small.runs] == [
        (seed, 3, pytest.approx(1.7)) for seed in range(3)
    ]
    assert small.verdict == "better" and small.cost_ratio == pytest.approx(3.668, rel=1e-3)
    assert small.chance_pct == 10.0 and not small.at_chance
    told = terminal(comparison)
    assert "computed" in told and "may have chosen by" in told and "torch/cifar10" in told


def test_tensorboards_events(tmp_path: Path) -> None:
    maps = ("quality=test/acc*100", "validation_top1_pct=val/acc*100", "images=seen")
    comparison = asked(events(tmp_path), map=maps, baseline="arm=dense", cost="images")
    read = values(comparison)
    assert read.keys() == PERCENT.keys()
    for key, value in PERCENT.items():
        assert read[key] == 100 * float(np.float32(value / 100)), "what a file of single precision can hold"
    same_verdict(comparison)
    assert set(values(comparison, "images").values()) == {5000.0}, "a scalar that is stored as a tensor"
    (run, *_) = group(comparison, "arm soft").runs
    assert run.settings() == {"config.arm": "soft", "config.lr": 0.1}, "of add_hparams, from a folder of its own"


def test_paths_say_what_files_do_not(tmp_path: Path) -> None:
    folder = events(tmp_path)
    for chosen in folder.rglob("chosen"):
        (next(chosen.iterdir())).unlink()
    comparison = asked(folder, map=("quality=test/acc*100",), path="{arm}/seed{seed}", baseline="arm=dense")
    same_verdict(comparison)
    unnamed = asked(folder, map=("quality=test/acc*100",))
    assert [len(each.runs) for each in unnamed.groups] == [6]
    assert any("no seed is stated" in note for note in unnamed.notes)
    assert [cells["seeds"] for cells in flat_rows(unnamed)] == ["? ? ? ? ? ?"]


MAPS = ("quality=test/acc*100,images=samples", "validation_top1_pct=val.acc*100")


def check_wandb(folder: Path) -> None:
    comparison = asked(folder, map=MAPS, baseline="arm=dense", cost="images")
    assert values(comparison) == PERCENT
    same_verdict(comparison)
    soft = group(comparison, "arm soft")
    assert soft.runs[1].settings() == {"config.arm": "soft", "config.optim.lr": 0.1}
    images, reached_pct = zip(*soft.runs[1].curve("images", "top1_pct"), strict=True)
    assert images == (1000, 2000, 3000, 4000, 5000)
    assert reached_pct == pytest.approx([100 * (0.5 + 0.1 * i + 0.003) for i in range(5)])
    assert soft.budgets[0].verdict == "not distinguishable", "at equal images their validation is the same"
    assert all(run.row["device_s"] > 0 for run in soft.runs)


def test_wandbs_offline_files(tmp_path: Path) -> None:
    check_wandb(offline(tmp_path))


@pytest.mark.thorough
def test_wandbs_offline_files_of_now(tmp_path: Path) -> None:
    check_wandb(written_offline(tmp_path / "here"))


@pytest.mark.parametrize("form", ["csv", "json"])
def test_wandbs_history_exports(tmp_path: Path, form: str) -> None:
    """One file for each run, as run.history() gives it; the path says what is not in it."""
    for arm in ARMS:
        for seed in range(3):
            rows = [
                {
                    "_step": 10 * i,
                    "_runtime": 1.5 * i,
                    "val.acc": 0.5 + 0.1 * i,
                    "test": None if i < 4 else reached(arm, seed),
                }
                for i in range(5)
            ]
            file = tmp_path / f"{arm}_{seed}.{form}"
            if form == "json":
                file.write_text(json.dumps(rows))
            else:
                lines = [",".join("" if v is None else repr(v) for v in each.values()) for each in rows]
                file.write_text("\n".join([",".join(rows[0]), *lines]) + "\n")
    maps = ("quality=test*100", "device_s=_runtime", "validation_top1_pct=val.acc*100")
    comparison = asked(
        *sorted(tmp_path.glob(f"*.{form}")), map=maps, path="{arm}_{seed}", baseline="arm=dense", cost="device_s"
    )
    assert values(comparison) == PERCENT
    same_verdict(comparison)
    assert group(comparison, "arm soft").runs[0].curve("device_s", "top1_pct")[1] == pytest.approx((1.5, 60.0))


def test_a_history_of_several_runs_and_objects_of_the_public_api(tmp_path: Path) -> None:
    lines = ["run,arm,seed,iteration,acc"]
    lines += [f"{arm}{s},{arm},{s},{i},{90 + i + s}" for arm in ARMS for s in range(3) for i in range(3)]
    (tmp_path / "all.csv").write_text("\n".join(lines) + "\n")
    comparison = asked(
        tmp_path / "all.csv", map=("quality=acc,seed=seed", "run=run,step=iteration"), by=("arm",), baseline="arm=dense"
    )
    assert values(comparison) == {(arm, seed): 92.0 + seed for arm in ARMS for seed in range(3)}
    runs = [
        {"name": f"{arm}-{seed}", "config": {"arm": arm, "seed": seed, "_wandb": {"x": 1}},
         "summary": {"acc": 100 * reached(arm, seed), "_runtime": 5.0}}
        for arm in ARMS for seed in range(3)
    ]  # fmt: skip
    (tmp_path / "api.json").write_text(json.dumps(runs))
    comparison = asked(tmp_path / "api.json", map=("quality=acc",), baseline="arm=dense")
    assert values(comparison) == PERCENT
    same_verdict(comparison)


def test_all_of_them_and_runs_of_this_project_in_every_form(tmp_path: Path) -> None:
    """Ours are on images that they name, others on images that nobody names: two tables, and every file of both."""
    study(tmp_path / "ours")
    maps = ("quality=test/acc*100",)
    comparison = asked(tmp_path / "ours", events(tmp_path), offline(tmp_path), map=maps)
    assert [len(block.groups) for block in comparison.blocks] == [4, 3]
    others = comparison.blocks[0]
    assert [len(each.runs) for each in others.groups] == [3] * 4, "TensorBoard's and W&B's, one setting apart"
    shown = page(comparison, {"pareto.svg": b"", "curves.svg": b""}, tmp_path)
    for text in (terminal(comparison), shown):
        assert "There is no front: no group states its training FLOPs" in text
    for text in (terminal(comparison), markdown(comparison), shown):
        assert "of which 12 tell" in text and "None" not in text and "null" not in text.partition("<script")[0]
    json.loads(json_text(comparison))


def test_nothing_is_executed_and_nothing_but_plain_values_is_made(tmp_path: Path) -> None:
    folder = timm_runs(tmp_path)
    first = sorted(folder.iterdir())[0]
    with (first / "args.yaml").open("a") as file:
        file.write(f"bad: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")
    comparison = asked(folder, cost="epochs")
    assert [(place, reason[:24]) for place, reason in comparison.left_out] == [(str(first), "args.yaml is no YAML of ")]
    assert not (tmp_path / "made").exists()
    assert sum(len(each.runs) for each in comparison.groups) == 5


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"map": ("quality=acc",)}, r"all 6 values are at most 1, as shares are.*--map top1_pct=acc\*100"),
        ({"map": ("qualty=acc",)}, "--map qualty=acc: no such key. Did you mean 'quality'"),
        ({"map": ("quality",)}, "--map quality: write KEY=COLUMN"),
        ({"map": ("quality=acc,top1_pct=b",)}, "--map says twice what top1_pct is"),
        ({"map": ("quality=acc*100",), "path": "seed"}, "--path seed: write a pattern"),
        ({"map": ("quality=acc*100",), "path": "{a}{b}"}, "--path {a}{b}: write a pattern"),
        ({}, "nothing says which of its figures is top1_pct: --map quality=NAME, of acc, arm, hours, run_seed"),
        ({"map": ("quality=accuracy",)}, "has no accuracy, which --map says top1_pct is; it has acc, arm"),
    ],
)
def test_what_cannot_be_understood_is_said(tmp_path: Path, question: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        asked(table(tmp_path), **question)


@pytest.mark.parametrize("name", ["a.json", "b.json"])
def test_a_file_of_shares_beside_one_of_percents(tmp_path: Path, name: str) -> None:
    for file in ("a.json", "b.json"):
        rows = [{"arm": file, "seed": seed, "acc": (0.93 if file == name else 92) + seed / 100} for seed in range(3)]
        (tmp_path / file).write_text(json.dumps(rows))
    files = (tmp_path / "a.json", tmp_path / "b.json")
    with pytest.raises(UsageError, match=rf"top1_pct of \S+/{name}: all 3 values are at most 1.* \S+/[ab].json, they"):
        asked(*files, map=("quality=acc",))
    assert len(asked(*files, map=("quality=acc*1",)).groups) == 2, "as it is then said"


def test_a_program_that_says_percents_may_say_few(tmp_path: Path) -> None:
    folder = timm_runs(tmp_path)
    for run in folder.iterdir():
        head, *lines = (run / "summary.csv").read_text().splitlines()
        at = head.split(",").index("eval_top1")
        cells = [line.split(",") for line in lines]
        text = "\n".join([head, *(",".join([*row[:at], "0.5", *row[at + 1 :]]) for row in cells)]) + "\n"
        (run / "summary.csv").write_text(text)
    assert {run.row["top1_pct"] for each in asked(folder, cost="epochs").groups for run in each.runs} == {0.5}


@pytest.mark.parametrize("write_runs", [events, timm_runs])
def test_a_config_of_their_own_makes_them_not_ours(tmp_path: Path, write_runs: Callable[[Path], Path]) -> None:
    """A result does, whatever lies beside it."""
    folder = write_runs(tmp_path)
    for file in [*folder.rglob("*tfevents*"), *folder.rglob("summary.csv")]:
        (file.parent / "config.yaml").write_text("lr: 0.1\n")
    comparison = asked(folder, map=("quality=test/acc*100",) if write_runs is events else (), cost="epochs")
    assert sum(len(each.runs) for each in comparison.groups) == 6 and not comparison.left_out
    ours = write(tmp_path / "ours", row())
    for name in ("run-x.wandb", "events.out.tfevents.1.host", "summary.csv"):
        (ours / name).write_bytes(b"")
    comparison = asked(ours)
    assert [run.chosen for each in comparison.groups for run in each.runs] == [None] and not comparison.left_out


def test_what_is_a_number() -> None:
    """As CSV and paths are written, and not as Python's source is."""
    for text, value in {"12": 12, "-3": -3, "+1.": 1.0, ".5e-3": 0.0005, "1E3": 1000.0, "inf": math.inf}.items():
        assert (typed_value(text), type(typed_value(text))) == (value, type(value))
    assert math.isnan(typed_value("NaN"))
    for word in ("1_2", "1_2.5", "\u0661\u0662", "0x10", "1e", "e5", ".", "-", "1 2", "infinit"):
        assert typed_value(word) == word
    assert typed_value("9" * 5000) == math.inf


def test_a_mapping_without_runs_of_others_has_no_effect(tmp_path: Path) -> None:
    write(tmp_path, row())
    with pytest.raises(UsageError, match="--map has no effect"):
        asked(tmp_path, map=("quality=acc",))
    with pytest.raises(UsageError, match="--path has no effect"):
        asked(tmp_path, path="{model}/seed{seed}")


def test_as_it_is_typed(softmoe: Softmoe, tmp_path: Path) -> None:
    table(tmp_path)
    words = ("--map", "quality=acc*100,seed=run_seed", "--baseline", "arm=dense")
    answer = softmoe("compare", "results.csv", *words)
    assert answer.code == 0, answer.err
    assert "arm soft is better than arm dense in test top-1: +2.01" in answer.out
    assert "training FLOPs not known of both" in answer.out
    assert (tmp_path / "compare" / "index.html").exists() and (tmp_path / "looks.jsonl").exists()
    told = json.loads((tmp_path / "compare" / "table.json").read_text())
    assert told["blocks"][0]["groups"][0]["runs"][0]["folder"].endswith("results.csv")
    answer = softmoe("compare", "missing.csv")
    assert (answer.code, answer.err) == (2, "softmoe: missing.csv: no such file\n")
