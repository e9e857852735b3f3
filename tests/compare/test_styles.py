"""Every group looks like no other."""

from pathlib import Path

from softmoe_cli.compare.blocks import compare
from softmoe_cli.compare.question import Question
from softmoe_cli.compare.styles import styles
from tests.synthetic import row, write


def test_every_group_has_a_look_of_its_own(tmp_path: Path) -> None:
    for experts in range(1, 30):
        write(tmp_path, row(model__router__num_experts=experts, top1_pct=80 + experts / 10))
    write(tmp_path, row(router="dense"))
    look = styles(compare([tmp_path], Question()).groups)
    assert len(set(look.values())) == 30
    assert look["dense"] == (0, "o")


def test_a_comma_inside_a_number_of_blocks_ends_no_beginning(tmp_path: Path) -> None:
    for blocks in ([0], [0, 1], [1]):
        write(tmp_path, row(model__moe_blocks=blocks, moe_blocks=",".join(map(str, blocks))))
    look = styles(compare([tmp_path], Question()).groups)
    assert len({colour for colour, _ in look.values()}) == 3, look


def test_equal_ends_share_a_marker_and_stand_in_order(tmp_path: Path) -> None:
    for router in ("soft", "tokens_choice"):
        for experts in (1, 4, 16):
            write(tmp_path, row(router=router, model__router__num_experts=experts))
    question = Question(baseline="soft, 16 experts")
    look = styles(compare([tmp_path], question).groups)
    assert [*look] == [
        f"{router}, {n}" for router in ("soft", "tokens_choice") for n in ("1 expert", "4 experts", "16 experts")
    ]
    assert [*look.values()] == [(colour, marker) for colour in (0, 1) for marker in "osD"]
