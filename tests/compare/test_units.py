"""Figures as people read them."""

import pytest

from softmoe_cli.compare.intervals import Interval, at_chance
from softmoe_cli.compare.units import apart, cell, quantity, unit
from softmoe_cli.text import folded, shortened


@pytest.mark.parametrize(
    ("key", "values", "head", "shown"),
    [
        ("train_pflop", [0.0003924, 0.0003195], "training GFLOP", 392.4),
        ("train_pflop", [4.2e-07], "training MFLOP", 420),
        ("train_pflop", [2500.0], "training EFLOP", 2.5),
        ("train_pflop", [0.0], "training PFLOP", 0),
        ("train_pflop", [1e-20, 5.0], "training kFLOP", 1e-08),
        ("forward_gflop", [0.006563], "forward MFLOP/image", 6.563),
        ("peak_mib", [0.5], "peak memory, KiB", 512),
        ("peak_mib", [20480.0], "peak memory, GiB", 20),
        ("device_s", [304.5], "training s", 304.5),
        ("device_s", [7200.0], "training h", 2),
        ("images", [6400.0], "training images", 6400),
        ("optim.lr", [0.1], "optim.lr", 0.1),
    ],
)
def test_a_unit_that_suits(key: str, values: list[float], head: str, shown: float) -> None:
    chosen = unit(key, values)
    assert chosen.head == head
    assert values[0] * chosen.factor == pytest.approx(shown)


def test_digits_go_as_far_as_the_uncertainty() -> None:
    def of(key: str, mean: float, half: float) -> str:
        return cell(key, Interval(mean, mean - half, mean + half, 3))

    assert of("device_s", 304.5, 144) == "304 ± 140"
    assert of("device_s", 34.13, 7.97) == "34.1 ± 8.0"
    assert of("device_s", 34.13, 0.0999) == "34.13 ± 0.10"
    assert of("train_pflop", 392.4, 1e-9) == "392.4", "less than its sixth digit is no spread"
    assert of("images", 12345.0, 678.0) == "12,345 ± 680"
    assert of("device_s", 0.0, 0.0) == "0"
    assert of("top1_pct", 42.591, 21.08) == "42.59 ± 21.08"
    assert cell("top1_pct", Interval(-9.26, -10, -8.52, 3), signed=True) == "-9.26 ± 0.74"
    assert cell("top1_pct", Interval(9.26, None, None, 1), signed=True) == "+9.26"
    assert cell("top1_pct", None) == ""
    assert quantity("train_pflop", 0.0003924) == "392.4 GFLOP"
    assert quantity("images", 5600) == "5,600 training images"


def test_more_or_less() -> None:
    assert apart(0.81, "training FLOPs") == "19% fewer training FLOPs"
    assert apart(0.81, "training time") == "19% less training time"
    assert apart(1.35, "parameters") == "35% more parameters"
    assert apart(3.21, "energy") == "3.21 times the energy"
    assert apart(0.00312, "training FLOPs") == "0.00312 times the training FLOPs", "100% fewer would be none"
    assert apart(1.004, "energy") == apart(0.996, "energy") == ""


def test_no_better_than_guessing() -> None:
    assert at_chance([33.3, 35, 40], 100 / 3, 18), "the interval reaches down to it"
    assert not at_chance([90, 91, 92], 10, 359)
    assert at_chance([20, 21, 22], 25, 359), "worse than guessing"
    assert not at_chance([60, 75], 10, 359), "the interval of two says nothing"
    assert not at_chance([30, 60, 80], 10, 359), "each is above it, however far apart they are"
    assert at_chance([10, 10, 60], 10, 359) and not at_chance([10, 60], 9, None)
    assert at_chance([100 / 3] * 3, 100 / 3, None)
    # Of 18 images with three classes a guesser has 9 right or more with 10.8%, 11 or more with 1.4% (binomial).
    assert at_chance([50], 100 / 3, 18) and not at_chance([1100 / 18], 100 / 3, 18)
    assert not at_chance([50], 100 / 3, 1800)
    assert at_chance([0], 50, 10) and at_chance([100], 100, 10)


def test_a_table_for_a_narrow_terminal() -> None:
    rows = [["group", "test top-1, %", "verdict"]]
    rows += [["soft, 16 experts, lr 0.003", "93.96 ± 2.13", "not distinguishable,\nat 16% more training FLOPs"]]
    for width in (60, 44, 20):
        lines = folded(rows, width).splitlines()
        assert max(map(len, lines)) <= max(width, 8 + 2 + 12 + 2 + 16)
        assert any("93.96 ± 2.13" in line for line in lines), "a number stays with its uncertainty"
    assert len(folded(rows, 200).splitlines()) == 2
    told = " ".join(folded(rows, 44).split())
    assert all(word in told for word in ("distinguishable,", "FLOPs", "lr", "0.003"))


def test_names_of_any_length() -> None:
    assert shortened("abc", 3) == "abc"
    for most in (5, 6, 48):
        short = shortened("a" * 10_000 + "z" * 10_000, most)
        assert len(short) == most and short[0] == "a" and short[-1] == "z" and "…" in short
    assert shortened("a" * 300, 120, "...").isascii() and len(shortened("a" * 300, 120, "...")) == 120
