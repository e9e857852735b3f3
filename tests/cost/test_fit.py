"""What fits, what is refused, and what would fit instead."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from softmoe_cli.cost import fit
from softmoe_cli.cost.fit import largest_batch, last_within, settle
from softmoe_cli.cost.load import Load
from softmoe_cli.cost.memory import Memory, predict
from softmoe_cli.errors import UsageError
from softmoe_cli.moe.routers.soft import SoftRouter
from tests.cost import loads
from tests.cost.loads import CPU, FOUR, composed, held, load, with_free


@pytest.mark.thorough
def test_a_refusal_names_ways_to_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    config, cuda = composed("soft", "train.batch_size=4"), torch.device("cuda")
    fsdp, expert = (held(config, 4, way).peak_bytes for way in ("fsdp", "expert"))
    monkeypatch.setattr(fit, "predict", lambda asked, *rest: predict(replace(asked, device=CPU), *rest))

    def have(free: int) -> None:
        monkeypatch.setattr(fit, "free_memory", lambda device: free if device.type == "cuda" else 2**60)

    have(fsdp)
    with pytest.raises(UsageError, match=r"set parallel=fsdp or (set )?parallel=expert"):
        settle(load(config, cuda), "ddp", FOUR)
    have(expert)
    with pytest.raises(UsageError, match=r"with parallel=fsdp.* set parallel=expert"):
        settle(load(config, cuda), "fsdp", FOUR)
    assert settle(load(config, cuda), "expert", FOUR).memory.peak_bytes == expert
    with pytest.raises(UsageError, match="set parallel=expert on 4 devices or choose a smaller"):
        settle(load(config, cuda))


@pytest.mark.parametrize("limit", [99, 100, 101, 250, 777, 10_000])
def test_the_largest_number_within_a_limit(limit: int) -> None:
    def size(i: int) -> int:
        return 90 + 10 * i + max(0, i - 20)

    want = max((i for i in range(1, 51) if size(i) <= limit), default=0)
    assert last_within(size, limit, 50) == want


def by_formula(asked: Load, processes: int = 1, way: str = "ddp") -> Memory:
    """In the place of a prediction, which takes a second: what parts, recomputation and moments do to it."""
    state, image = 1000, 40 if asked.recompute else 100
    moments = 2 * state if asked.optim is None or asked.optim.moments == "fp32" else state // 2
    seen = image * asked.part
    return Memory(state, state, moments, 0, seen, 2 * state + moments + seen, 0, 0)


@pytest.mark.parametrize("predicted", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_a_run_that_cannot_fit_is_refused_with_what_would(predicted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not predicted:
        for module in (fit, loads):
            monkeypatch.setattr(module, "predict", by_formula)
    config = composed("soft", "train.batch_size=16", "model.backbone.depth=3")
    need = held(config)
    with_free(monkeypatch, need.peak_bytes)
    assert settle(load(config)).memory == need
    free = (4 * need.peak_bytes + need.state_bytes) // 5
    with_free(monkeypatch, free)
    with pytest.raises(UsageError) as refusal:
        settle(load(config))
    text = str(refusal.value)
    assert "train.batch_size=16 needs" in text
    assert "\n" not in text
    fits: dict[str, Memory] = {}
    for way in text.partition("; set ")[2].split(" or "):
        key, _, value = way.partition(",")[0].partition("=")
        change: dict[str, Any] = {"batch": int(value)} if "batch" in key else {}
        change |= {"accumulate": int(value)} if "acc" in key else {}
        change |= {"optim": replace(config.optim, moments=value)} if "moments" in key else {}
        fits[key] = held(config, **(change or {"recompute": True}))
        assert fits[key].peak_bytes <= free
        if "batch" in key:
            assert held(config, batch=int(value) + 1).peak_bytes > free
    assert set(fits) == {"optim.moments", "train.accumulate", "train.recompute", "train.batch_size"}
    with_free(monkeypatch, need.state_bytes - 1)
    with pytest.raises(UsageError, match="choose a smaller model, fewer experts"):
        settle(load(config))


@pytest.mark.thorough
def test_auto_is_the_largest_power_of_two_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed("soft", "train.batch_size=auto")
    assert config.train.batch_size == "auto"
    with_free(monkeypatch, held(config, batch=50).peak_bytes)
    assert largest_batch(load(config), 1000, paired=False) == 32
    assert largest_batch(load(config), 20, paired=False) == 16
    assert largest_batch(load(config), 1000, paired=False, sharers=3) < 32
    groups = ("model.router.images_per_group=3", "train.accumulate=2", "train.batch_size=6", "train.eval_batch_size=63")
    grouped = composed("tokens_choice", *groups)
    assert largest_batch(load(grouped), 100, paired=False) % 6 == 0
    with_free(monkeypatch, 1000)
    with pytest.raises(UsageError, match=r"train\.batch_size=auto: 1 images do not fit"):
        largest_batch(load(config), 1000, paired=False)


def test_a_router_whose_sizes_depend_on_the_images_has_no_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(router: SoftRouter, x: torch.Tensor, keep: torch.Tensor | None = None) -> float:
        return x.sum().item()

    monkeypatch.setattr(SoftRouter, "forward", look)
    with pytest.raises(UsageError, match="soft asks what numbers a tensor holds"):
        held(composed("soft", "train.batch_size=2"))
