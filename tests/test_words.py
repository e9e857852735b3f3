"""Units, and what a run says of itself: header, evaluations, result."""

import io
import json
from pathlib import Path

import pytest

from softmoe_cli.terminal import Listened, Screen
from softmoe_cli.text import flop, gibibytes, in_words
from softmoe_cli.train.summary import chance, shown, still_uniform
from tests.conftest import TINY, Softmoe


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 ms"), (0.0234, "23.4 ms"), (0.9996, "1.0 s"), (1.58, "1.6 s"), (9.96, "10 s"), (59.6, "1 min"),
        (63, "1 min 3 s"), (3599.7, "1 h"), (3900, "1 h 5 min"), (54_000, "15 h"), (47.999 * 3600, "48 h"),
        (300_000, "3.5 days"),
    ],
)  # fmt: skip
def test_durations(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_units_are_chosen() -> None:
    assert [flop(n) for n in (24.25e6, 1.5e9, 3.924e11, 2.2e15, 9e20, 12, 0)] == [
        "24.25 MFLOP", "1.5 GFLOP", "392.4 GFLOP", "2.2 PFLOP", "900 EFLOP", "12 FLOP", "0 FLOP"
    ]  # fmt: skip
    assert [gibibytes(n * 2**20) for n in (0.5, 12.34, 200, 3000)] == ["0.5 MiB", "12.3 MiB", "0.20 GiB", "2.93 GiB"]


def on_terminal(width: int) -> tuple[Screen, io.StringIO]:
    screen, out = Screen(), io.StringIO()
    screen.console = Listened(
        file=out, force_terminal=True, width=width, highlight=False, soft_wrap=True, no_color=True
    )
    return screen, out


def test_rows_wrap_between_words_on_a_terminal() -> None:
    screen, out = on_terminal(60)
    words = "soft (num_experts=16, slots_per_expert=1) in blocks [3, 4, 5]; 0.25 slots per token"
    screen.row("router", words)
    lines = out.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()
    assert len(lines) == 2 and max(map(len, lines)) <= 60
    assert all(line.startswith(" " * 19) for line in lines[1:])
    assert " ".join(line[19:] for line in lines) == words
    long = "outputs/" + "x" * 80
    screen.row("folder", long)
    assert long in out.getvalue()


def test_an_evaluation_fits_80_columns() -> None:
    row = {"split": "validation", "step": 123_456, "epoch": 1234.5, "loss": 12.3456, "top1_pct": 100.0}
    row |= {"train_pflop": 0.1234567, "device_s": 47.9}
    screen, out = on_terminal(80)
    screen.evaluation(row, "best")
    assert out.getvalue() == "validation  step 123,456  loss 12.3456  top-1 100.00%  123.5 TFLOP  48 s  best\n"
    screen, out = on_terminal(120)
    screen.evaluation(row)
    assert "epoch 1234.50" in out.getvalue()


RESULT = {"test_images": 18, "top1_pct": 100 * 6 / 18, "chance_pct": 100 * 6 / 18, "classes": 3, "tokens": 64}


def test_chance() -> None:
    assert chance(RESULT) == (
        "top-1 cannot be told from chance: always the commonest of 3 classes is right for 33.3% of these 18 images"
    )
    assert chance(RESULT | {"top1_pct": 100 * 11 / 18}) == ""
    assert chance(RESULT | {"top1_pct": 0.0}) != ""
    skewed = {"test_images": 1000, "classes": 2, "chance_pct": 90.0}  # a model that says one class always
    assert chance(skewed | {"top1_pct": 90.0}) != "" and chance(skewed | {"top1_pct": 92.5}) == ""


def test_still_uniform(tmp_path: Path) -> None:
    """Reads the last look, over its layers; a routing that is uniform by design is not reported."""
    file = tmp_path / "routing.jsonl"
    soft = {"dispatch_min": 0.014, "scale": 1.0}

    def told(*last: dict[str, float]) -> str:
        rows = [{"step": 5, "block": 3, "dispatch_max": 0.9} | soft]
        rows += [{"step": 9, "block": i} | row for i, row in enumerate(last)]
        file.write_text("".join(json.dumps({"format": 1} | row) + "\n" for row in rows))
        return still_uniform(RESULT, file)

    assert told(soft | {"dispatch_max": 0.020}, soft | {"dispatch_max": 0.022}) == (
        "still almost uniform: a slot's largest share of a token is 0.0210 in the mean, and 0.0156 where all tokens "
        "are mixed alike"
    )
    assert told(soft | {"dispatch_max": 0.020}, soft | {"dispatch_max": 0.040}) == ""
    assert told({"scale": 1.0, "dispatch_min": 1 / 64, "dispatch_max": 1 / 64}) == ""  # uniform_soft
    assert told({"dropped_share": 0.1}) == ""  # sparse
    assert still_uniform(RESULT, tmp_path / "none") == ""
    for content in ('{"step":', "[1]\n", '{"step": "x"}'):
        file.write_text(content)
        assert "routing.jsonl is damaged in line 1" in still_uniform(RESULT, file)
    file.write_text("")
    assert still_uniform(RESULT, file) == ""


def test_no_top5_of_five_classes() -> None:
    row = {
        **RESULT, "top5_pct": 100.0, "loss": 1.0, "validation_top1_pct": 1.0, "best_validation_top1_pct": 1.0,
        "best_step": 1, "images": 1, "epochs": 1.0, "steps": 1, "train_pflop": 3.924e-4, "device_s": 63.0,
        "eval_s": 1.0, "save_s": 0.0, "compile_s": 0.0,
    }  # fmt: skip
    titled = shown(row, Path("x"))
    assert "test top-5" not in titled and "test top-5" in shown(row | {"classes": 6}, Path("x"))
    assert titled["training cost"] == "392.4 GFLOP, 1 min 3 s"


def test_a_run_tells_its_time_first_and_what_to_type_last(softmoe: Softmoe) -> None:
    """The same lines come again where the run is finished already."""
    answer = softmoe("train", *TINY, "train.steps=3", "output_root=my runs")
    assert answer.code == 0, answer
    lines = answer.out.splitlines()
    (time,) = [i for i, line in enumerate(lines) if line.startswith("  time ")]
    looks = [i for i, line in enumerate(lines) if line.startswith(("validation", "test  "))]
    assert time < looks[0]
    assert "3 times on validation images and once on test images" in lines[time]
    assert " a step: about " in lines[looks[0] - 1]  # measured, before the first evaluation
    run = next(line for line in lines if line.startswith("  folder"))[19:]
    next_lines = ["next", f"  softmoe evaluate checkpoint='{run}'", "  softmoe compare 'my runs/default'"]
    assert lines[-3:] == next_lines
    assert softmoe("train", *TINY, "train.steps=3", "output_root=my runs").out.splitlines()[-3:] == next_lines
    assert "MiB at the peak" in answer.out and ", 1 thread, " in answer.out
