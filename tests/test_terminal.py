"""Rows and evaluations on terminals of some width."""

import io

from softmoe_cli.terminal import Listened, Screen


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
