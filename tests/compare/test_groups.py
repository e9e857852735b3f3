"""Which runs are one group, what groups are called, and how they are ordered."""

from pathlib import Path
from typing import Any

import pytest

from softmoe_cli.compare.blocks import compare
from softmoe_cli.compare.groups import natural
from softmoe_cli.compare.question import Question
from softmoe_cli.errors import UsageError
from softmoe_cli.run.header import Source
from softmoe_cli.run.identity import origin
from tests.synthetic import asked, group, looks, rewrite, row, study, write


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


@pytest.mark.parametrize(("sizes", "chance"), [((10, 10), 50.0), ((10, 100), None), ((3, 3), 100.0)])
def test_five_guesses_of_a_mix_are_among_the_classes_of_one_set(
    tmp_path: Path, sizes: tuple[int, int], chance: float | None
) -> None:
    """A run of no steps has half of the images of ten classes right in five guesses, and not a quarter."""
    names = dict(zip(("digits", "clothes"), sizes, strict=True))
    keys = {f"task_{name}_top1_pct": 10.0 for name in names}
    keys |= {f"data.sets.{name}.num_classes": size for name, size in names.items()}
    for seed in range(3):
        write(tmp_path, row(seed=seed, top5_pct=49.0 + seed, classes=sum(sizes)) | keys)
    (only,) = asked(tmp_path, quality="top5_pct").groups
    assert (only.chance_pct, only.at_chance) == (chance, chance is not None)


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
    cut = [{"data": {"name": name, "split_seed": seed}} for name, seed in (("a", 0), ("a", 4), ("b", 0))]
    assert made(cut[0]) == made(cut[1]) != made(cut[2]), "as receipts of upcycling and pruning say it"


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


def test_quality_at_equal_cost(tmp_path: Path) -> None:
    """Against a ruler laid on the rows; blank with the reason where a run does not reach."""
    study(tmp_path)
    comparison = asked(tmp_path, at=("images=3000,6400", "train_pflop"))
    dense, soft = group(comparison, "dense"), group(comparison, "soft")
    for each in (dense, soft):
        for at in each.budgets:
            assert at.interval is not None, at.reason
            for (draw, value), run in zip(at.values, each.runs, strict=True):
                rows = [look for look in looks(run.row) if look["split"] == "validation"]
                i = next(i for i, look in enumerate(rows) if look[at.axis] >= at.budget)
                low, high = rows[i - 1], rows[i]
                share = (at.budget - low[at.axis]) / (high[at.axis] - low[at.axis])
                assert value == pytest.approx(low["top1_pct"] + share * (high["top1_pct"] - low["top1_pct"]))
                assert draw == (0, run.row["seed"])
    assert [at.axis for at in soft.budgets] == ["images"] * 2 + ["train_pflop"] * 3
    assert soft.budgets[0].verdict == "better"
    twice = asked(tmp_path, at=("images=3000,3000,6400", "images=6400", "train_pflop", "train_pflop"))
    assert group(twice, "soft").budgets == soft.budgets, "one comparison each, for Holm too"
    assert twice.blocks[0].corrected == comparison.blocks[0].corrected
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
