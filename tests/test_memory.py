"""Predicted memory against what the allocator hands out, and the refusals and choices made of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from softmoe_cli import memory
from softmoe_cli.config import Config, UsageError
from softmoe_cli.device import _control_group_free, precision_context, prepare_attention
from softmoe_cli.memory import Live, Memory, largest_batch, last_within, predict_for, require_fit
from softmoe_cli.models import build
from softmoe_cli.moe.routers.soft import SoftRouter
from softmoe_cli.moe.routing import routings
from softmoe_cli.optim import freeze, optimizer_of
from softmoe_cli.train import update
from tests.oracles import compose

CPU = torch.device("cpu")
CASES = [
    ("dense", "fp32", 1, False),
    ("dense", "bf16", 2, True),
    ("soft", "fp32", 1, False),
    ("soft", "bf16", 1, True),
    ("tokens_choice", "fp32", 4, True),
    ("tokens_choice_bpr", "bf16", 1, False),
    ("tokens_choice_dropless", "fp32", 2, False),
    ("experts_choice", "fp32", 1, True),
    ("identity", "fp32", 2, False),
    ("uniform", "fp32", 1, False),
]


def composed(router: str = "soft", *overrides: str) -> Config:
    options = [] if router == "dense" else ["model.router.num_experts=16", "model.expert_init=independent"]
    return compose(
        f"model/router={router}",
        "data=fashion_mnist",
        "model/backbone=vit_nano4",
        "model.backbone.depth=2",
        "model.moe_blocks=last_1",
        *options,
        *overrides,
    )


def allocated_peak(config: Config) -> int:
    """Bytes of a real update at its peak, from every allocation that the allocator reports."""
    t = config.train
    model = build(config.model, 10).train()
    prepare_attention(model, CPU, t.precision)
    model.set_grad_checkpointing(t.recompute)
    freeze(model, config.optim.freeze)
    optimizer, scaler = optimizer_of(model, config.optim), torch.amp.GradScaler("cpu", enabled=False)
    x, targets = torch.randn(t.batch_size, 1, 28, 28), torch.rand(t.batch_size, 10)
    with routings(model) as seen:

        def step() -> None:
            autocast = precision_context("cpu", t.precision)
            update(model, model, x, targets, config, 0.001, optimizer, scaler, autocast, seen)

        step()
        optimizer.zero_grad(set_to_none=True)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as watched:
            step()
    assert watched.profiler is not None
    assert watched.profiler.kineto_results is not None
    now = peak = 0
    events: list[Any] = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    kept = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.ndim)
    return weights + kept + peak + x.nbytes + targets.nbytes  # weights and moments were there before


@pytest.mark.parametrize(("router", "precision", "accumulate", "recompute"), CASES)
def test_predicted_peak_is_the_allocators(router: str, precision: str, accumulate: int, recompute: bool) -> None:
    config = composed(
        router, "train.batch_size=32", f"train.precision={precision}", f"train.accumulate={accumulate}",
        f"train.recompute={str(recompute).lower()}",
    )  # fmt: skip
    assert predict_for(config, 10, CPU).peak_bytes == pytest.approx(allocated_peak(config), rel=0.02)


def test_what_is_frozen_has_neither_gradient_nor_moments() -> None:
    frozen = ("train.batch_size=32", "optim.freeze=[patch_embed.*,pos_embed,blocks.0.*,*.experts.*]")
    sgd = composed("soft", *frozen, "optim.name=sgd", "optim.momentum=0.9")
    adamw = replace(sgd, optim=replace(sgd.optim, name="adamw", momentum=None))
    vit = build(sgd.model, 10)
    freeze(vit, sgd.optim.freeze)
    trained = 4 * sum(p.numel() for p in vit.parameters() if p.requires_grad)
    for config, moments in ((adamw, 2), (sgd, 1)):
        memory = predict_for(config, 10, CPU)
        assert 0 < trained < memory.weight_bytes / 2
        assert (memory.gradient_bytes, memory.optimizer_bytes) == (trained, moments * trained)
    assert memory.peak_bytes == pytest.approx(allocated_peak(sgd), rel=0.03)  # what operations borrow is more of less


def test_the_parts_of_memory() -> None:
    config = composed()
    plain, averaged = predict_for(config, 10, CPU), predict_for(composed("soft", "train.ema=0.99"), 10, CPU)
    weights = 4 * sum(p.numel() for p in build(config.model, 10).parameters())
    assert (plain.weight_bytes, plain.gradient_bytes, plain.optimizer_bytes) == (weights, weights, 2 * weights)
    assert plain.state_bytes == 4 * weights
    assert averaged.state_bytes == 5 * weights
    assert averaged.peak_bytes - plain.peak_bytes == weights
    assert plain.activation_bytes < plain.peak_bytes < plain.state_bytes + 2 * plain.activation_bytes


@pytest.mark.parametrize("router", ["soft", "dense"])
def test_activations_grow_with_the_batch_and_shrink_with_recomputation(router: str) -> None:
    config = composed(router)
    two, four, eight = (predict_for(config, 10, CPU, batch=batch).activation_bytes for batch in (2, 4, 8))
    assert two < four < eight
    assert eight - four == 2 * (four - two)  # what grows grows with the images
    assert predict_for(config, 10, CPU, batch=8, recompute=True).activation_bytes < eight / 2


def test_live_bytes_come_and_go() -> None:
    with Live() as live:
        x = torch.zeros(1000)
        view = x[10:]
        y = x + 1
        assert (live.now, live.peak) == (8000, 8000)
        del y
        assert (live.now, live.peak) == (4000, 8000)
        del x
        assert live.now == 4000
        del view
        assert live.now == 0


@pytest.mark.parametrize("limit", [99, 100, 101, 250, 777, 10_000])
def test_the_largest_number_within_a_limit(limit: int) -> None:
    def size(i: int) -> int:
        return 90 + 10 * i + max(0, i - 20)

    want = max((i for i in range(1, 51) if size(i) <= limit), default=0)
    assert last_within(size, limit, 50) == want


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: free)


def test_a_run_that_cannot_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed("soft", "train.batch_size=64", "model.backbone.depth=4")
    need = predict_for(config, 10, CPU)
    with_free(monkeypatch, need.peak_bytes)
    assert require_fit(config, 10, CPU) == need
    free = (4 * need.peak_bytes + need.state_bytes) // 5
    with_free(monkeypatch, free)
    with pytest.raises(UsageError) as refusal:
        require_fit(config, 10, CPU)
    text = str(refusal.value)
    assert "train.batch_size=64 needs" in text
    assert "\n" not in text
    fits: dict[str, Memory] = {}
    for way in text.partition("; set ")[2].split(" or "):
        key, _, value = way.partition(",")[0].partition("=")
        change = {"batch": int(value)} if "batch" in key else {"accumulate": int(value)} if "acc" in key else {}
        fits[key] = predict_for(config, 10, CPU, **(change or {"recompute": True}))
        assert fits[key].peak_bytes <= free
        if "batch" in key:
            assert predict_for(config, 10, CPU, batch=int(value) + 1).peak_bytes > free
    assert set(fits) == {"train.accumulate", "train.recompute", "train.batch_size"}
    with_free(monkeypatch, need.state_bytes - 1)
    with pytest.raises(UsageError, match="choose a smaller model, fewer experts"):
        require_fit(config, 10, CPU)


def test_auto_is_the_largest_power_of_two_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed("soft", "train.batch_size=auto")
    assert config.train.batch_size == "auto"
    with_free(monkeypatch, predict_for(config, 10, CPU, batch=50).peak_bytes)
    assert largest_batch(config, 10, CPU, 1000) == 32
    assert largest_batch(config, 10, CPU, 20) == 16
    with_free(monkeypatch, 1000)
    with pytest.raises(UsageError, match=r"train\.batch_size=auto: 1 images do not fit"):
        largest_batch(config, 10, CPU, 1000)


def test_a_router_whose_sizes_depend_on_the_images_has_no_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(router: SoftRouter, x: torch.Tensor, keep: torch.Tensor | None = None) -> float:
        return x.sum().item()

    monkeypatch.setattr(SoftRouter, "forward", look)
    with pytest.raises(UsageError, match="soft asks what numbers a tensor holds"):
        predict_for(composed("soft", "train.batch_size=2"), 10, CPU)


def test_memory_of_a_control_group(tmp_path: Path) -> None:
    """Version 2, where the parent is tighter than the child; file cache can be given back."""
    child = tmp_path / "a/b"
    child.mkdir(parents=True)
    for folder, limit in ((child, "max"), (tmp_path / "a", "1000")):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text("700\n")
        (folder / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    own = tmp_path / "cgroup"
    own.write_text("0::/a/b\n")
    assert _control_group_free(tmp_path, own) == [500]
    assert _control_group_free(tmp_path, tmp_path / "missing") == []
