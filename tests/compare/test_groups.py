"""What is read, left out, kept apart, grouped and judged."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from softmoe_cli.compare.blocks import compare
from softmoe_cli.compare.groups import Comparison, Group, Question, natural
from softmoe_cli.errors import UsageError
from softmoe_cli.run.identity import origin
from softmoe_cli.run.source import Source
from tests.synthetic import looks, rewrite, row, study, write


def asked(*folders: Path, **question: Any) -> Comparison:
    return compare(folders, Question(**question))


def group(comparison: Comparison, label: str) -> Group:
    (found,) = [each for each in comparison.groups if each.label == label]
    return found


def test_groups_means_differences_and_verdicts(tmp_path: Path) -> None:
    comparison = asked(study(tmp_path))
    assert [each.label for each in comparison.groups] == ["soft", "tokens_choice", "dense"], "best first"
    soft, near, dense = comparison.groups
    assert (soft.verdict, near.verdict, dense.verdict) == ("better", "not distinguishable", None)
    assert soft.baseline == near.baseline == "dense"
    x, y = [93, 94.1, 94.925], [90, 91, 92]
    assert soft.difference is not None
    told = stats.ttest_rel(x, y)
    assert soft.difference.p == pytest.approx(told.pvalue)
    assert soft.difference.interval.low == pytest.approx(told.confidence_interval(0.95).low)
    assert soft.p_holm == pytest.approx(2 * told.pvalue)
    quality = soft.intervals["top1_pct"]
    assert quality is not None
    assert quality.n == 3
    assert quality.mean == pytest.approx(sum(x) / 3)
    assert quality.low == pytest.approx(stats.t.interval(0.95, 2, sum(x) / 3, stats.sem(x))[0])
    assert [each.front for each in comparison.groups] == [True, False, True]


def test_lower_is_better_for_a_loss(tmp_path: Path) -> None:
    comparison = asked(study(tmp_path), quality="loss")
    assert comparison.groups[0].label == "soft"
    assert group(comparison, "soft").verdict == "better"
    assert group(comparison, "soft").front
    worse = asked(tmp_path, quality="loss", baseline="soft")
    assert group(worse, "dense").verdict == "worse"


def test_labels_tell_what_differs(tmp_path: Path) -> None:
    for seed in range(2):
        write(tmp_path, row(router="dense", seed=seed))
        for experts in (1, 16):
            write(tmp_path, row(seed=seed, model__router__num_experts=experts))
        write(tmp_path, row(seed=seed, model__router__num_experts=16, optim__lr=0.001))
        write(tmp_path, row(seed=seed, model__router__num_experts=16, model__backbone__width=32))
    labels = {each.label for each in asked(tmp_path).groups}
    assert labels == {
        "dense, lr 0.003, width 64", "soft, 1 expert, lr 0.003, width 64", "soft, 16 experts, lr 0.003, width 64",
        "soft, 16 experts, lr 0.001, width 64", "soft, 16 experts, lr 0.003, width 32",
    }  # fmt: skip
    assert all(len(each.runs) == 2 for each in asked(tmp_path).groups)


def test_every_setting_separates_groups(tmp_path: Path) -> None:
    """Whatever key differs, the runs are not one group: also one that nobody thought of."""
    write(tmp_path, row())
    write(tmp_path, row(seed=1, optim__betas=[0.9, 0.95]))
    write(tmp_path, row(seed=2, augment__invented=1))
    assert sorted(len(each.runs) for each in asked(tmp_path).groups) == [1, 1, 1]


def test_finetunes_of_checkpoints_that_differ_by_chance_are_one_group(tmp_path: Path) -> None:
    """Other origins are other groups."""
    for seed in range(3):
        for made in ("1f", "2e"):
            digest = f"{made}{seed}"
            write(tmp_path, row(seed=seed, command="finetune", checkpoint__digest=digest, checkpoint__origin=made))
    assert sorted(len(group.runs) for group in compare([tmp_path], Question()).groups) == [3, 3]


@pytest.mark.parametrize(
    ("weights", "name"),
    [("out/RUN/checkpoints/last-00000020/model.safetensors", "RUN"), ("up/soft/model.safetensors", "soft"),
     ("a/b.safetensors", "b.safetensors"), ("model.safetensors", "model.safetensors"), ("timm:vit", "timm:vit")],
)  # fmt: skip
def test_where_weights_come_from_is_told_by_what_says_most(tmp_path: Path, weights: str, name: str) -> None:
    for origin_, checkpoint in (("1f", weights), ("2e", "other")):
        write(tmp_path, row(command="finetune", checkpoint__origin=origin_, checkpoint=checkpoint))
    assert f"from {name}" in {group.label for group in compare([tmp_path], Question()).groups}


def test_an_origin_is_what_chance_leaves_alike() -> None:
    def made(settings: dict[str, Any], *, before: str | None = None, digest: str = "a", command: str = "train") -> str:
        source = Source("file", digest, {}, {"origin": before} if before else {})
        return origin(command, settings, source)

    first = made({"seed": 0, "optim.lr": 1}, before="x")
    assert first == made({"optim.lr": 1, "seed": 7}, before="x", digest="b")
    assert len({first, made({"optim.lr": 2}, before="x"), made({"optim.lr": 1}, before="y"),
                made({"optim.lr": 1}, before="x", command="finetune")}) == 4  # fmt: skip
    assert made({"seed": 0}) != made({"seed": 0}, digest="b"), "weights of elsewhere are told by their contents"
    assert origin("train", {"seed": 0}, None) == origin("train", {"seed": 1}, None)


def test_a_dense_control_is_found_for_each_size(tmp_path: Path) -> None:
    for seed in range(3):
        for width in (32, 64):
            write(tmp_path, row(router="dense", seed=seed, top1_pct=width + seed, model__backbone__width=width))
            write(tmp_path, row(seed=seed, top1_pct=width + 1 + 1.1 * seed, model__backbone__width=width))
    comparison = asked(tmp_path)
    assert {each.label: each.baseline for each in comparison.groups} == {
        "dense, width 32": None, "dense, width 64": None, "soft, width 32": "dense, width 32",
        "soft, width 64": "dense, width 64",
    }  # fmt: skip
    for seed in range(3):
        write(tmp_path, row(seed=seed, model__backbone__width=48, top1_pct=50))
    comparison = asked(tmp_path)
    assert group(comparison, "soft, width 48").baseline is None
    assert "equally near" in " ".join(comparison.blocks[0].notes)


def test_other_images_stand_in_tables_of_their_own(tmp_path: Path) -> None:
    study(tmp_path)
    write(tmp_path, row(seed=0, data="cifar10", data__name="cifar10", test_images=10000))
    write(tmp_path, row(seed=0, data__split_seed=5))
    write(tmp_path, row(seed=0, data__identity="abc"))
    comparison = asked(tmp_path)
    assert [sum(len(each.runs) for each in block.groups) for block in comparison.blocks] == [1, 1, 9, 1]
    assert any("kept apart" in note and "data.split_seed" in note for note in comparison.notes)
    assert len({block.title for block in comparison.blocks}) == 4


def test_seconds_of_other_machines_are_never_mixed(tmp_path: Path) -> None:
    study(tmp_path)
    for seed in (3, 4):
        write(tmp_path, row(router="dense", seed=seed, hardware="NVIDIA H100"))
    comparison = asked(tmp_path)
    assert group(comparison, "dense").intervals["device_s"] is None
    assert any("device_s is blank" in note for note in comparison.blocks[0].notes)
    apart = asked(tmp_path, cost="device_s")
    assert [len(block.groups) for block in apart.blocks] == [3, 1]
    assert all(each.intervals["device_s"] for each in apart.groups)
    assert [len(block.groups) for block in asked(tmp_path, at=("device_s",)).blocks] == [3, 1]


def test_budgets_in_minutes_are_compared_on_one_machine_only(tmp_path: Path) -> None:
    for hardware in ("A", "B"):
        write(tmp_path / hardware, row(train__minutes=5, train__steps=None, seed=len(hardware), hardware=hardware))
    assert len(asked(tmp_path / "A", tmp_path / "B").blocks) == 1, "the second is a duplicate"
    write(tmp_path / "B", row(train__minutes=5, train__steps=None, seed=9, hardware="B"))
    assert len(asked(tmp_path).blocks) == 2


def test_code_versions_are_named_or_kept_apart(tmp_path: Path) -> None:
    study(tmp_path)
    write(tmp_path, row(router="dense", seed=7, commit="abc1234-dirty"))
    comparison = asked(tmp_path)
    assert len(comparison.blocks) == 1
    assert any("9 of commit 7d27ecc" in note and "--strict" in note for note in comparison.notes)
    assert any("uncommitted" in note for note in comparison.notes)
    assert len(asked(tmp_path, strict=True).blocks) == 2


def test_rows_of_another_format_are_named(tmp_path: Path) -> None:
    study(tmp_path)
    for name, format in (("none", None), ("next", 2)):
        run = write(tmp_path / name, row(seed=7))
        whole = json.loads((run / "result.json").read_text()) | {"format": format}
        if format is None:
            del whole["format"]
        (run / "result.json").write_text(json.dumps(whole))
    run = write(tmp_path / "rows", row(seed=8))
    rewrite(run, (run / "metrics.jsonl").read_text().replace('"format": 1', '"format": "new"'))
    comparison = asked(tmp_path)
    told = {Path(folder).relative_to(tmp_path).parts[0]: reason for folder, reason in comparison.left_out}
    assert told == {
        "none": "result.json has format none, and this softmoe reads format 1",
        "next": "result.json has format 2, and this softmoe reads format 1",
    }
    (note,) = [note for note in comparison.notes if "it has no curve" in note]
    assert str(run) in note and "metrics.jsonl has format 'new', and this softmoe reads format 1, in line 2" in note


def test_rows_that_were_changed_after_the_run_are_no_curve(tmp_path: Path) -> None:
    """One digit is enough, and a row more or less."""
    for seed in range(3):
        run = write(tmp_path, row(seed=seed))
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        lines = [lines[:-1], [*lines, lines[-1]], [line.replace("99.0", "98.0") for line in lines]][seed]
        (run / "metrics.jsonl").write_text("".join(lines))
    comparison = asked(tmp_path)
    notes = [note for note in comparison.notes if "it has no curve" in note]
    told = (
        "it had 17 rows then and has 16 now",
        "17 rows then and has 18 now",
        "17 rows then and has 17 now, or other",
    )
    assert len(notes) == 3 and all(any(word in note for note in notes) for word in told)
    assert len(comparison.groups[0].runs) == 3 and not any(run.looks for run in comparison.groups[0].runs)


def test_what_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    study(tmp_path / "runs")
    runs = sorted((tmp_path / "runs").iterdir())
    whole = (runs[0] / "result.json").read_text()
    shutil.copytree(runs[1], tmp_path / "zcopy" / runs[1].name)
    other = shutil.copytree(runs[2], tmp_path / "zcopy" / runs[2].name)
    (other / "result.json").write_text(json.dumps(json.loads((other / "result.json").read_text()) | {"top1_pct": 1.0}))
    spoilt = {
        "truncated": whole[:200], "foreign": '{"accuracy": 0.9}', "list": "[1]", "deep": "[" * 100_000, "blank": "",
        "nan": json.dumps(json.loads(whole) | {"top1_pct": float("nan"), "signature": "x"}),
        "lacking": json.dumps({k: v for k, v in json.loads(whole).items() if k != "top1_pct"} | {"signature": "y"}),
    }  # fmt: skip
    for name, text in spoilt.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(text)
    (tmp_path / "bytes").mkdir()
    (tmp_path / "bytes" / "result.json").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").mkdir()
    unfinished = shutil.copytree(runs[3], tmp_path / "unfinished")
    (unfinished / "result.json").unlink()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no run, and none begun")
    (runs[4] / "metrics.jsonl").write_text((runs[4] / "metrics.jsonl").read_text()[:-20])
    (runs[5] / "metrics.jsonl").unlink()

    comparison = asked(tmp_path)
    reasons = {Path(folder).relative_to(tmp_path).parts[0]: reason for folder, reason in comparison.left_out}
    assert sum(len(each.runs) for each in comparison.groups) == 9
    assert {name: reason[:18] for name, reason in reasons.items() if name != "zcopy"} == {
        "truncated": "result.json is tru", "foreign": "result.json has fo", "list": "result.json is no ",
        "deep": "result.json is tru", "blank": "result.json is emp", "nan": "result.json is tru",
        "lacking": "result.json has no", "bytes": "result.json is tru", "empty": "empty",
        "unfinished": "unfinished: no res",
    }  # fmt: skip
    assert "last look at step 200" in reasons["unfinished"]
    doubles = [reason for folder, reason in comparison.left_out if "zcopy" in folder]
    assert sorted(reason.rpartition(", ")[2] for reason in doubles) == ["equal in quality", "with OTHER quality"]
    assert sum("it has no curve" in note for note in comparison.notes) == 2


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda rows: rows[:4] + rows[2:], "goes back in line 6"),
        (lambda rows: [{k: v for k, v in each.items() if k != "images"} for each in rows], "has no images, in line 2"),
        (lambda rows: rows[:1], "has no validation row"),
        (lambda rows: [*rows, 3], "is damaged in line 18"),
    ],
)
def test_a_damaged_curve_is_no_curve(tmp_path: Path, spoil: Callable[[list[Any]], list[Any]], reason: str) -> None:
    run = write(tmp_path, row())
    rewrite(run, "".join(json.dumps(each) + "\n" for each in spoil(looks(row()))))
    comparison = asked(tmp_path)
    assert any(reason in note for note in comparison.notes)
    assert comparison.groups[0].runs[0].looks == []


def test_quality_at_equal_cost(tmp_path: Path) -> None:
    """Against a ruler laid on the rows; blank with the reason where a run does not reach."""
    study(tmp_path)
    comparison = asked(tmp_path, at=("images=3000,6400", "train_pflop"))
    dense, soft = group(comparison, "dense"), group(comparison, "soft")
    for each in (dense, soft):
        for at in each.budgets:
            assert at.interval is not None, at.reason
            for (seed, value), run in zip(at.values, each.runs, strict=True):
                rows = [look for look in looks(run.row) if look["split"] == "validation"]
                i = next(i for i, look in enumerate(rows) if look[at.axis] >= at.budget)
                low, high = rows[i - 1], rows[i]
                share = (at.budget - low[at.axis]) / (high[at.axis] - low[at.axis])
                assert value == pytest.approx(low["top1_pct"] + share * (high["top1_pct"] - low["top1_pct"]))
                assert seed == run.row["seed"]
    assert [at.axis for at in soft.budgets] == ["images"] * 2 + ["train_pflop"] * 3
    assert soft.budgets[0].verdict == "better"
    far = asked(tmp_path, at=("train_pflop=0.000001,0.00013",))
    assert [at.reason for at in group(far, "dense").budgets] == [
        "first look at 16 GFLOP",
        "3 of 3 end before, the first at 128 GFLOP",
    ]
    assert [at.reason for at in group(far, "soft").budgets][1] == ""
    assert all(at.interval is None for at in group(far, "dense").budgets)


def test_one_run_that_ends_early_blanks_its_group(tmp_path: Path) -> None:
    study(tmp_path)
    run = next(run for run in sorted(tmp_path.iterdir()) if "soft" in run.name)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rewrite(run, "\n".join(lines[:-3]) + "\n")
    comparison = asked(tmp_path, at=("images=6400",))
    assert group(comparison, "soft").budgets[0].reason == "1 of 3 end before, the first at 5,600 training images"
    assert group(comparison, "dense").budgets[0].interval is not None


def test_labels_are_in_order_whatever_they_begin_with() -> None:
    labels = ["from up2", "2,3", "from up", "gate 16", "gate", "", "gate 2", "2"]
    assert sorted(labels, key=natural) == ["", "2", "2,3", "from up", "from up2", "gate", "gate 2", "gate 16"]


def test_two_checkpoints_of_one_run_have_two_labels(tmp_path: Path) -> None:
    for made in ("0a1b-best", "0a1b-end"):
        for seed in range(2):
            weights = f"run/checkpoints/{made}/model.safetensors"
            write(tmp_path, row(seed=seed, command="finetune", checkpoint__origin=made, checkpoint=weights))
    assert sorted(each.label for each in asked(tmp_path).groups) == ["from run (0a1b-best)", "from run (0a1b-end)"]


def test_where_a_value_has_commas(tmp_path: Path) -> None:
    for blocks in ([2], [3], [2, 3]):
        write(tmp_path, row(model__moe_blocks=blocks, moe_blocks=",".join(map(str, blocks))))
    chosen = asked(tmp_path, where=("moe_blocks=2,3",))
    assert [run.row["moe_blocks"] for group in chosen.groups for run in group.runs] == ["2,3"]
    assert len(asked(tmp_path, where=("moe_blocks=2,3,7",)).groups) == 2, "a list, where no value is called that"
    assert asked(tmp_path, sort="moe_blocks").groups


def test_a_baseline_by_a_key_that_one_table_lacks(tmp_path: Path) -> None:
    for router, data in (("soft", "digits"), ("dense", "digits"), ("dense", "fashion"), ("tokens_choice", "fashion")):
        changes = {"model__router__num_experts": 4} if router == "soft" else {}
        write(tmp_path, row(router=router, data__name=data, data=data, **changes))
    comparison = asked(tmp_path, baseline="model.router.num_experts=4")
    assert {each.baseline for each in comparison.groups} == {None, "soft"}


def test_by_where_sort_and_columns(tmp_path: Path) -> None:
    for seed in range(3):
        for lr in (0.001, 0.003):
            write(tmp_path, row(router="dense", seed=seed, top1_pct=90 + seed, optim__lr=lr, lr=lr))
            write(tmp_path, row(seed=seed, top1_pct=95 - seed + 100 * lr, optim__lr=lr, lr=lr))
    by = asked(tmp_path, by=("router",))
    assert {each.label: len(each.runs) for each in by.groups} == {"soft": 6, "dense": 6}
    assert any("differ in optim.lr" in note for note in by.blocks[0].notes)
    both = asked(tmp_path, by=("model.router._target_", "optim.lr"))
    assert {each.label for each in both.groups} >= {"dense, lr 0.001", "soft, lr 0.003"}
    told = group(by, "soft").difference
    assert told is not None and told.method == "Welch"
    assert [each.label for each in asked(tmp_path, where=("lr=0.001", "router=soft,dense")).groups] == ["soft", "dense"]
    assert [each.label for each in asked(tmp_path, where=("optim.lr=1e-3",), sort="train_pflop").groups] == [
        "dense",
        "soft",
    ]
    assert asked(tmp_path, sort="label").groups[0].label == "dense, lr 0.001"
    shown = asked(tmp_path, columns=("peak_mib", "num_experts"))
    assert shown.columns == ["peak_mib", "num_experts"]
    assert shown.groups[0].intervals["peak_mib"] is not None


@pytest.mark.parametrize(
    ("question", "told"),
    [
        ({"quality": "lss"}, "Did you mean 'loss'"),
        ({"cost": "devices"}, "Did you mean 'device_s'"),
        ({"by": ("rooter",)}, "Did you mean 'router'"),
        ({"by": ("num_exprts",)}, "Did you mean 'num_experts'"),
        ({"by": ("split_sed",)}, "Did you mean 'data.split_seed'"),
        ({"where": ("router",)}, "write KEY=VALUE"),
        ({"where": ("router=sof",)}, "router is dense or soft or tokens_choice"),
        ({"at": ("epochs",)}, "Choices: train_pflop, device_s, images"),
        ({"at": ("images=few",)}, "numbers above 0"),
        ({"at": ("images=-1",)}, "numbers above 0"),
        ({"baseline": "sofd"}, "Did you mean 'soft'"),
        ({"sort": "lable"}, "no run's result has such a key"),
        ({"cost": "epochs", "where": ("seed=0",), "columns": ("nothing",)}, "--columns nothing"),
    ],
)
def test_errors_name_key_value_and_the_way_out(tmp_path: Path, question: dict[str, object], told: str) -> None:
    with pytest.raises(UsageError) as error:
        asked(study(tmp_path), **question)
    assert told in str(error.value)


def test_errors_of_folders(tmp_path: Path) -> None:
    study(tmp_path / "outputs")
    with pytest.raises(UsageError, match=r"outputz is no folder. Did you mean 'outputs'"):
        asked(tmp_path / "outputz")
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match=r"no finished run below .*none; left out are 1, first .*none: empty"):
        asked(tmp_path / "none")


def test_baseline_by_label_and_by_key(tmp_path: Path) -> None:
    study(tmp_path)
    for baseline in ("soft", "router=soft", "num_experts=16"):
        if baseline == "num_experts=16":
            with_two = asked(tmp_path, baseline=baseline)
            assert "equally near" in " ".join(with_two.blocks[0].notes)
            continue
        comparison = asked(tmp_path, baseline=baseline)
        assert {each.baseline for each in comparison.groups if each.label != "soft"} == {"soft"}
    nothing = asked(tmp_path, where=("router=soft,tokens_choice",))
    assert "no dense control" in " ".join(nothing.blocks[0].notes)


def test_one_seed_says_so(tmp_path: Path) -> None:
    comparison = asked(study(tmp_path, seeds=1))
    soft = group(comparison, "soft")
    assert (soft.verdict, soft.front_probability) == ("too few seeds", None)
    assert any("one seed only" in note for note in comparison.blocks[0].notes)


def test_order_of_folders_changes_nothing(tmp_path: Path) -> None:
    a, b = study(tmp_path / "a"), tmp_path / "b"
    for seed in range(3):
        write(b, row(router="experts_choice", seed=seed, top1_pct=91 + seed * 0.5))
    assert [vars(each) for each in asked(a, b).groups] == [vars(each) for each in asked(b, a, a).groups]


def test_a_verdict_says_what_else_was_unequal(tmp_path: Path) -> None:
    """Cost, length of training and pretraining, each in a word; none where they are equal."""
    for seed in range(3):
        write(tmp_path, row(router="dense", seed=seed, top1_pct=90 + seed))
        write(tmp_path, row(seed=seed, top1_pct=93 + 1.1 * seed))
    (soft,) = [each for each in asked(tmp_path).groups if each.label == "soft"]
    assert soft.cost_ratio == pytest.approx(1.16)
    assert soft.conditions == ["at 16% more training FLOPs"]
    assert group(asked(tmp_path, cost="images"), "soft").conditions == []
    assert group(asked(tmp_path, cost="params_m"), "soft").conditions == ["at 6 times the parameters"]
    longer = {"train__steps": 270, "steps": 270, "images": 8640, "train_pflop": 0.000128 * 1.35}
    for seed in range(3):
        write(tmp_path / "long", row(router="dense", seed=seed, **longer))
    told = group(asked(tmp_path, baseline="steps=270"), "soft, 200 updates").conditions
    assert told == ["at 14% fewer training FLOPs", "200 updates against 270"]
    halves = {"train__batch_size": 16, "batch_size": 16, "steps": 400, "train__steps": 400}
    for seed in range(3):
        write(tmp_path / "halves", row(router="dense", seed=seed, **halves))
    told = group(asked(tmp_path / "halves", tmp_path, where=("train_pflop=0.000128,0.00014848",), baseline="steps=400"),
                 "soft, 200 updates, 32 images/update").conditions  # fmt: skip
    assert told == ["at 16% more training FLOPs"], "updates of other sizes on as many images are no other length"


def test_what_a_checkpoint_had_cost(tmp_path: Path) -> None:
    """Counted beside a verdict where it is known; said where it is not."""
    known: dict[str, Any] = {"command": "finetune", "checkpoint__origin": "1f", "checkpoint": "a/b.safetensors"}
    for seed in range(3):
        write(tmp_path, row(router="dense", seed=seed, top1_pct=90 + seed))
        write(
            tmp_path, row(seed=seed, top1_pct=93 + 1.1 * seed, **known, checkpoint__train_pflop=0.000128 * (1 + seed))
        )
    soft = next(each for each in asked(tmp_path).groups if each.pretrained)
    assert soft.checkpoint_pflop == pytest.approx(0.000128 * 2), "costs of checkpoints make no groups"
    assert soft.cost_ratio == pytest.approx(1.16 + 2)
    assert soft.conditions == ["at 3.16 times the training FLOPs", "pretraining counted"]
    (note,) = [note for note in asked(tmp_path).blocks[0].notes if "began with a checkpoint" in note]
    assert "had cost 256 GFLOP" in note
    seconds = next(each for each in asked(tmp_path, cost="device_s").groups if each.pretrained)
    assert seconds.conditions == ["at 16% more training time", "pretraining not counted"]
    assert next(e for e in asked(tmp_path, cost="params_m").groups if e.pretrained).conditions == [
        "at 6 times the parameters"
    ]
    write(tmp_path, row(seed=7, top1_pct=93, **known))
    soft = next(each for each in asked(tmp_path).groups if each.pretrained)
    assert (soft.checkpoint_pflop, soft.conditions[-1]) == (None, "pretraining not counted"), "one does not say"
    assert any("cost is not known" in note for note in asked(tmp_path).blocks[0].notes)


def test_of_two_checkpoints_both_costs_are_counted_or_none(tmp_path: Path) -> None:
    begun: dict[str, Any] = {"command": "finetune", "checkpoint__origin": "1f", "checkpoint": "a/b.safetensors"}
    for seed in range(3):
        write(tmp_path, row(router="dense", seed=seed, **begun))
        write(tmp_path, row(seed=seed, **begun, checkpoint__train_pflop=1.0))
    soft = group(asked(tmp_path), "soft")
    assert soft.cost_ratio == pytest.approx(1.16)
    assert soft.conditions == ["at 16% more training FLOPs", "pretraining not counted"]


def test_at_chance_is_said(tmp_path: Path) -> None:
    """By the number of classes, or by the commonest class where the rows know it; of accuracies only."""
    for seed in range(3):
        write(tmp_path, row(router="dense", seed=seed, top1_pct=42 + 5 * seed, data__num_classes=3))
        write(tmp_path, row(seed=seed, top1_pct=100 / 3, data__num_classes=3))
    dense, soft = group(asked(tmp_path), "dense"), group(asked(tmp_path), "soft")
    assert soft.chance_pct == pytest.approx(100 / 3)
    assert soft.at_chance and not dense.at_chance
    assert group(asked(tmp_path, quality="validation_top1_pct"), "soft").at_chance is False, "a point above"
    assert group(asked(tmp_path, quality="top5_pct"), "soft").chance_pct == 100
    assert group(asked(tmp_path, quality="loss"), "soft").chance_pct is None
    for seed in range(3):
        write(tmp_path / "skewed", row(router="dense", seed=seed, top1_pct=79.7 + seed / 2, chance_pct=80.0, classes=3))
    (skewed,) = asked(tmp_path / "skewed").groups
    assert (skewed.chance_pct, skewed.at_chance) == (80.0, True)


def test_labels_joined_can_be_told_apart(tmp_path: Path) -> None:
    for width in (32, 64):
        for router in ("dense", "soft"):
            write(tmp_path, row(router=router, model__backbone__width=width))
    notes = asked(tmp_path).blocks[0].notes
    labels = ("dense, width 32", "soft, width 32", "dense, width 64", "soft, width 64")
    (few,) = [note for note in notes if note.startswith("one seed only")]
    assert sorted(few.partition(": ")[2].split("; ")) == sorted(labels)
    assert "against dense, width 32: soft, width 32" in notes and "against dense, width 64: soft, width 64" in notes
    assert not any("Holm" in note for note in notes), "no verdict, no word of many verdicts"


BAD: dict[str, Any] = {
    "router": 5, "name": None, "seed": 1.5, "seed ": True, "signature": ["x"], "study": {"a": 1}, "hardware": 7,
    "top1_pct": "high", "train_pflop": 10**400, "device_s": 1e200, "params_m": True, "moe_blocks": [1], "torch": 2,
    "test_images": "359", "train_gflop": 1e-300,
}  # fmt: skip


def test_a_bad_result_is_one_line(tmp_path: Path) -> None:
    """Of every key that is counted on; the others are compared."""
    study(tmp_path / "runs")
    for place, (key, value) in enumerate(BAD.items()):
        run = write(tmp_path / "bad" / str(place), row(seed=50 + place))
        whole = json.loads((run / "result.json").read_text()) | {key.strip(): value}
        (run / "result.json").write_text(json.dumps(whole))
    for place, kind in enumerate(("folder", "pipe")):
        run = write(tmp_path / "bad" / kind, row(seed=90 + place))
        (run / "result.json").unlink()
        (run / "result.json").mkdir() if kind == "folder" else os.mkfifo(run / "result.json")
    comparison = asked(tmp_path)
    assert sum(len(each.runs) for each in comparison.groups) == 9
    told = {Path(folder).relative_to(tmp_path / "bad").parts[0]: reason for folder, reason in comparison.left_out}
    assert told.keys() == {*map(str, range(len(BAD))), "folder", "pipe"}
    for place, key in enumerate(BAD):
        assert key.strip() in told[str(place)] and len(told[str(place)]) < 200
    assert told["folder"] == told["pipe"] == "result.json is no file"


@pytest.mark.parametrize("value", ['"5"', "NaN", "true", "1" + "0" * 400, "1e999", "[1]", "null"])
def test_a_bad_look_is_named(tmp_path: Path, value: str) -> None:
    run = write(tmp_path, row())
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3] = re.sub(r'"images": [\d.]+', f'"images": {value}', lines[3])
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    comparison = asked(tmp_path)
    assert comparison.groups[0].runs[0].looks == []
    (note,) = [note for note in comparison.notes if "it has no curve" in note]
    assert "in line 4" in note


def test_names_of_twenty_thousand_letters(tmp_path: Path) -> None:
    """Labels stay labels, and stay apart."""
    for seed, name in enumerate(("x" * 20_000, "x" * 10_000 + "y" + "x" * 9_999)):
        write(tmp_path, row(seed=seed, model__backbone__name=name, data=name, data__name="digits", name=f"run{seed}"))
        write(
            tmp_path, row(seed=seed, model__backbone__name=name[1:], data=name, data__name="digits", name=f"sun{seed}")
        )
    comparison = asked(tmp_path)
    assert max(len(each.label) for each in comparison.groups) < 100
    for block in comparison.blocks:
        assert len({each.label for each in block.groups}) == len(block.groups) == 2 and len(block.title) < 200
