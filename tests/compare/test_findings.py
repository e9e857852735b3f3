"""What a comparison says in sentences: power, the best, the last word, and the paragraph for a checklist."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from softmoe_cli.compare.findings import best, closing, power_line, sentences
from softmoe_cli.compare.flat import comma_separated, json_text
from softmoe_cli.compare.groups import Comparison
from softmoe_cli.compare.power import seeds_to_equal, seeds_to_see, visible_effect
from softmoe_cli.compare.tables import latex, markdown, tables, terminal
from softmoe_cli.errors import UsageError
from tests.synthetic import asked, group, row, study, write

WOBBLE = (0.3, -0.2, 0.1, -0.3, 0.2, -0.1, 0.0)


def arms(folder: Path, seeds: int = 5, flop: float = 0.000128, **gains: float) -> Path:
    """dense, and arms of other routers that are better by so many points, each with a spread of its own."""
    for seed in range(seeds):
        write(folder, row(router="dense", seed=seed, top1_pct=90 + seed / 7))
        for place, (router, gain) in enumerate(gains.items()):
            noise = WOBBLE[(seed + 2 * place) % 7] * (1 + place)
            write(folder, row(router=router, seed=seed, top1_pct=90 + seed / 7 + gain + noise, train_pflop=flop))
    return folder


def test_the_power_line_says_what_the_table_could_have_seen(tmp_path: Path) -> None:
    comparison = asked(arms(tmp_path, soft=2.0, tokens_choice=0.2), margin=0.3)
    (block,) = comparison.blocks
    soft, near = (group(comparison, label).difference for label in ("soft", "tokens_choice"))
    assert soft is not None and near is not None and soft.deviation and near.deviation and block.outlook
    pooled = ((soft.deviation**2 + near.deviation**2) / 2) ** 0.5
    assert block.outlook.deviation.mean == pytest.approx(pooled)
    assert block.outlook.sees == pytest.approx(pooled * (visible_effect(5, 2) or 0))
    told = power_line(comparison, block)
    assert (
        f"With n = 5 this table sees differences of {block.outlook.sees:.2f} points or more (80%, first step of Holm "
        in told
    )
    assert f"10 seeds would see {pooled * (visible_effect(10, 2) or 0):.2f} points" in told
    needs = seeds_to_see(near.interval.mean / near.deviation, 2)
    assert re.search(rf"at the difference found, tokens_choice needs about {needs} seeds \(\d+ or more\)", told), told
    assert f"need about {seeds_to_equal(0.3 / pooled, 2)} seeds to be equal within 0.30 points" in told
    assert list(block.outlook.needed) == ["tokens_choice"], "soft has its verdict"


def test_the_power_line_counts_the_comparisons_that_holm_counts(tmp_path: Path) -> None:
    """Also those that are not paired, which tell it no deviation."""
    arms(tmp_path, soft=2.0)
    for router in ("tokens_choice", "experts_choice"):
        for place, noise in enumerate(WOBBLE[:4]):
            write(tmp_path, row(router=router, seed=100 + place, top1_pct=90 + noise))
    (block,) = (comparison := asked(tmp_path)).blocks
    paired = group(comparison, "soft").difference
    assert block.outlook and paired is not None and paired.deviation
    assert block.outlook.comparisons == block.corrected["main"] == 3
    assert block.outlook.sees == pytest.approx(paired.deviation * (visible_effect(5, 3) or 0))


def test_without_a_deviation_there_is_no_power_line(tmp_path: Path) -> None:
    comparison = asked(arms(tmp_path, seeds=1, soft=2.0))
    assert power_line(comparison, comparison.blocks[0]) == "" == best(comparison.blocks[0])


def test_three_seeds_show_nothing_by_the_any_time_rule(tmp_path: Path) -> None:
    comparison = asked(arms(tmp_path, seeds=3, soft=2.0), any_time=True)
    told = power_line(comparison, comparison.blocks[0])
    assert "With n = 3 this table sees no difference at all (by the any-time rule, 80%;" in told, told


def test_the_groups_that_may_be_the_best(tmp_path: Path) -> None:
    for gains, told in (
        ({"soft": 3.0, "tokens_choice": 0.1}, "soft is the best of 3 groups (95%)"),
        (
            {"soft": 3.0, "tokens_choice": 2.9},
            "Which is the best cannot be told among 2 of 3 (95%): soft; tokens_choice",
        ),
        ({"soft": 0.02, "tokens_choice": 0.0}, "Which group is the best cannot be told: none can be ruled out (95%)"),
    ):
        comparison = asked(arms(tmp_path / str(len(told)), seeds=7, **gains))
        assert best(comparison.blocks[0]) == told


def test_the_last_word_is_at_equal_cost(tmp_path: Path) -> None:
    """At the end where arms had cost the same, else on validation images at the largest common budget."""
    equal = asked(arms(tmp_path / "equal", soft=2.0, tokens_choice=0.0), margin=1.0)
    soft = group(equal, "soft").difference
    assert soft is not None and soft.interval.low and soft.interval.high
    ends = f"{soft.interval.low:.2f} to {soft.interval.high:.2f}"
    said = f"At equal training FLOPs soft is {soft.interval.mean:.2f} points better than dense in test top-1"
    assert closing(equal, equal.blocks[0]) == f"{said} ({ends}, 5 seeds, 95%, 359 test images)."
    assert group(equal, "soft").conditions == []
    same = asked(arms(tmp_path / "same", seeds=7, soft=0.0), margin=1.0)
    assert "soft is equal to dense within 1.00 points in test top-1 (" in closing(same, same.blocks[0])
    assert group(same, "soft").verdict == "equal within the margin"
    dear = asked(arms(tmp_path / "dear", flop=0.0002, soft=2.0))
    assert re.fullmatch(
        r"At equal training FLOPs \(128 GFLOP\) soft is [\d.]+ points worse than dense in validation top-1 "
        r"\(-[\d.]+ to -[\d.]+, 5 seeds, 95%, 143 validation images\)\.",
        closing(dear, dear.blocks[0]),
    )
    assert "at 56% more training FLOPs" in group(dear, "soft").conditions
    best_look = asked(tmp_path / "dear", quality="best_validation_top1_pct")
    assert " than dense in validation top-1 (" in closing(best_look, best_look.blocks[0])
    apart = asked(tmp_path / "dear", at=("images=1",))
    assert closing(apart, apart.blocks[0]).startswith("Nothing was compared at equal training FLOPs: --at")


def test_the_second_measure_has_verdicts_of_its_own(tmp_path: Path) -> None:
    """NLL beside accuracy: here the accuracies are on a grid and the same, and the losses are not."""
    for seed in range(5):
        write(tmp_path, row(router="dense", seed=seed, top1_pct=90, nll=0.3 + seed / 100))
        write(tmp_path, row(seed=seed, top1_pct=90, nll=0.2 + seed / 90))
    comparison = asked(tmp_path)
    soft = group(comparison, "soft")
    assert soft.verdict == "not distinguishable" and soft.second is not None and soft.second.verdict == "better"
    assert soft.second.p_better is not None and soft.second.p_better.mean > 0.99, "the lower loss is better"
    (table,) = [each for each in tables(comparison) if "beside the main measure" in each.title]
    (line,) = [each for each in table.rows if each[0] == "soft"]
    assert line[4] == "better,\nat 16% more training FLOPs"
    assert group(asked(tmp_path, quality="nll"), "soft").second.interval.mean == 90  # type: ignore[union-attr]
    for seed in range(3):
        write(tmp_path, row(router="tokens_choice", seed=seed, train__loss="sigmoid"))
    mixed = asked(tmp_path, quality="validation_top1_pct")
    assert group(mixed, "soft").second is None
    assert any("validation_loss is another loss in some runs" in note for note in mixed.blocks[0].notes)


def test_each_task_of_a_mix_has_verdicts(tmp_path: Path) -> None:
    """Better at one task and the same at the other; the family counts tasks times comparisons."""
    for seed, noise in enumerate((0.3, -0.2, 0.1, -0.3, 0.2)):
        for router, gains in {"dense": (0.0, 0.0), "soft": (2 + noise, noise), "image_choice": (noise, -noise)}.items():
            keys = {"task_digits_top1_pct": 80 + seed + gains[0], "task_clothes_top1_pct": 70 - seed + gains[1]}
            write(tmp_path, row(router=router, seed=seed, data="mix", data__name="mix", **keys))
    comparison = asked(tmp_path)
    soft, (block,) = group(comparison, "soft"), comparison.blocks
    one, other = soft.tasks["digits"], soft.tasks["clothes"]
    assert one.difference is not None and other.difference is not None and one.difference.p is not None
    assert one.interval.mean == pytest.approx(84.02) and one.difference.interval.mean == pytest.approx(2.02)
    assert (one.verdict, other.verdict, block.corrected["tasks"]) == ("better", "not distinguishable", 4)
    assert one.p_holm == pytest.approx(4 * one.difference.p), "the smallest of four"
    assert soft.second is not None and soft.p_holm != one.p_holm
    (table,) = [each for each in tables(comparison) if each.title.endswith("test top-1 of each task")]
    assert table.head[:5] == ["group", "n", "task", "test top-1, %", "minus dense"]
    lines = {(line[0], line[2]): line for line in table.rows}
    assert lines["soft", "digits"][5].startswith("better,") and lines["dense", "clothes"][5] == "baseline"
    assert "digits  " in terminal(comparison) and "| digits |" in " ".join(markdown(comparison).split())
    (flat,) = [each for each in csv.DictReader(comma_separated(comparison).splitlines()) if each["group"] == "soft"]
    assert flat["task_digits_top1_pct_verdict"] == "better"
    assert float(flat["task_clothes_top1_pct_difference_mean"]) == other.difference.interval.mean
    told = json.loads(json_text(comparison))["blocks"][0]["groups"]
    assert {each["label"]: each["tasks"]["digits"]["p_holm"] for each in told}["soft"] == one.p_holm
    assert "over 4 comparisons in test top-1 of each task" in sentences(comparison, block)[-1]


def test_mixes_of_other_sets_stand_apart(tmp_path: Path) -> None:
    """Even where they have as many images and classes."""
    for router, name in {"dense": "mnist", "soft": "cifar10"}.items():
        keys: dict[str, Any] = {"task_digits_top1_pct": 90.0, f"task_{name}_top1_pct": 80.0}
        write(tmp_path, row(router=router, data="mix", data__name="mix", **keys))
    comparison = asked(tmp_path)
    assert len(comparison.blocks) == 2 and "data.sets cifar10, digits" in comparison.blocks[0].title


def test_the_checklist_counts_runs_that_failed(tmp_path: Path) -> None:
    arms(tmp_path, soft=1.0)
    failed = write(tmp_path, row(seed=17))
    (failed / "result.json").unlink()
    with (failed / "metrics.jsonl").open("a") as file:
        file.write('{"cut')
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("seed: 0\n")
    comparison = asked(tmp_path)
    told = sentences(comparison, comparison.blocks[0])[-1]
    assert told.startswith("Checklist. Varied: the seed,")
    for part in (
        "n: 5 seeds for each group", "paired by seed, Student's t, two-sided, 5%", "main measure: test top-1",
        "Holm over 3 comparisons in quality at budgets, each apart, none is needed in test top-1 and test NLL, one",
        "10 finished runs took 1.28 TFLOP", "2 runs that failed or did not finish took 148.5 GFLOP and",
    ):  # fmt: skip
        assert part in told, (part, told)


def test_every_output_says_it(tmp_path: Path) -> None:
    from softmoe_cli.compare.page import page

    comparison: Comparison = asked(arms(tmp_path / "runs", soft=2.0, tokens_choice=0.2), margin=0.3)
    (block,) = comparison.blocks
    said = [power_line(comparison, block), best(block), closing(comparison, block), "Checklist. Varied"]
    plain = {"text": terminal(comparison), "json": json.dumps(json.loads(json_text(comparison)), ensure_ascii=False)}
    for name, text in plain.items():
        assert all(each in text for each in said), name
    assert all(each.replace("<", "\\<").replace(">", "\\>") in markdown(comparison) for each in said)
    drawn = page(comparison, {"pareto.svg": b"", "curves.svg": b""}, tmp_path)
    assert all(each.replace("'", "&#x27;").replace(">", "&gt;") in drawn for each in said)
    assert all(
        each.replace("%", r"\%").replace("_", r"\_").replace(">", r"\textgreater{}") in latex(comparison)
        for each in said
    )
    (soft,) = [each for each in csv.DictReader(comma_separated(comparison).splitlines()) if each["group"] == "soft"]
    second = group(comparison, "soft").second
    assert second is not None and block.outlook is not None and block.outlook.sees is not None
    assert (float(soft["sees"]), soft["may_be_best"], soft["nll_verdict"]) == (block.outlook.sees, "True", "better")
    assert 0.5 < float(soft["p_better_ci95_low"]) < float(soft["p_better"]) <= 1
    assert soft["p_equal_holm"] != "" and float(soft["nll_mean"]) == second.interval.mean
    told = json.loads(json_text(comparison))
    assert (told["second"], told["margin"]) == ("nll", 0.3)
    assert told["blocks"][0]["outlook"]["needed"]["tokens_choice"]["most"] is None


def test_a_margin_is_a_number_above_zero(tmp_path: Path) -> None:
    study(tmp_path)
    with pytest.raises(UsageError, match="--margin -1: must be a number above 0"):
        asked(tmp_path, margin=-1.0)
