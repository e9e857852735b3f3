"""The clock measures real steps; its figures are only looked at for what they must have in common."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from softmoe_cli.cost.clock import Workload, fingerprint, measure, rank
from softmoe_cli.cost.load import Load, load_of
from softmoe_cli.errors import UsageError
from tests.conftest import TINY
from tests.oracles import compose
from tests.runs import costed


def load(model: str = "vit_nano4_soft", **changes: Any) -> Load:
    return load_of(costed(model, batch_size=4, **changes))


def test_a_measurement() -> None:
    timing, other = measure([load(), load("vit_nano4_dense")], repeats=3)
    for each in (timing, other):
        assert each.latency_ms > 0 < each.train_step_ms
        assert each.latency_spread_ms >= 0 <= each.train_step_spread_ms
        assert each.hardware == fingerprint(torch.device("cpu"), "fp32", False)
    assert f"torch {torch.__version__}" in timing.hardware
    assert "thread" in timing.hardware
    assert timing.peak_bytes is not None


def test_the_step_is_an_update() -> None:
    work = Workload(load("vit_nano4_tokens_choice", accumulate=2))
    before = [parameter.clone() for parameter in work.model.parameters()]
    work.forward()
    assert all(torch.equal(a, b) for a, b in zip(before, work.model.parameters(), strict=True))
    work.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, work.model.parameters(), strict=True) if b.ndim > 1)


def test_what_does_not_fit_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softmoe_cli.cost.clock.free_memory", lambda device: 1000)
    with pytest.raises(UsageError, match="lower batch_size"):
        measure([load()], repeats=3)


def test_a_gate_over_a_batch_is_not_measured_with_one_image() -> None:
    """Its training step ends with an error in the layer."""
    one = replace(load(accumulate=4), model=replace(load().model, head="mumoe_cp", head_experts=2, head_norm="batch"))
    with pytest.raises(UsageError, match="head_norm=batch has no variance over one image; use a larger batch_size"):
        measure([one], repeats=3)
    rows = replace(load(), batch=1, model=compose(*TINY, "model/router=mumoe_cp", "model.backbone.patch_size=8").model)
    with pytest.raises(UsageError, match=r"model\.router\.norm=batch has no variance over one token"):
        measure([rows], repeats=3)


def test_each_is_measured_with_its_own_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(Workload, "forward", lambda work: seen.append((work.threads, torch.get_num_threads())))
    default = torch.get_num_threads()
    try:
        made = measure([load(threads=threads) for threads in (2, 1, None)], repeats=2)
    finally:
        torch.set_num_threads(default)
    assert {own for own, _ in seen} == {2, 1, default} and all(own == there for own, there in seen)
    assert ["2 threads" in made[0].hardware, "1 thread," in made[1].hardware] == [True, True]


def test_only_like_is_ranked_with_like() -> None:
    assert rank([(3.0, "a"), (1.0, "b"), (2.0, "a"), (9.0, "c"), (2.0, "b")]) == [2, 1, 1, None, 2]
    settings = [("fp32", True), ("fp32", False), ("bf16", True), ("bf16", False)]
    assert len({fingerprint(torch.device("cpu"), *setting) for setting in settings}) == 4
