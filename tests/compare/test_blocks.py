"""Runs that can be compared stand in one table."""

from pathlib import Path

from softmoe_cli.compare.tables import tables
from tests.synthetic import asked, group, row, study, write


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


def test_a_column_of_tasks_is_a_mean_over_seeds(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path, row(seed=seed, mean_over_tasks_top1_pct=90 + seed, task_digits_top1_pct=80.0))
    shown = asked(tmp_path, columns=("mean_over_tasks_top1_pct", "task_digits_top1_pct"))
    assert tables(shown)[0].rows[0][-2:] == ["91.0 ± 2.5", "80"]


def test_order_of_folders_changes_nothing(tmp_path: Path) -> None:
    a, b = study(tmp_path / "a"), tmp_path / "b"
    for seed in range(3):
        write(b, row(router="experts_choice", seed=seed, top1_pct=91 + seed * 0.5))
    assert [vars(each) for each in asked(a, b).groups] == [vars(each) for each in asked(b, a, a).groups]
