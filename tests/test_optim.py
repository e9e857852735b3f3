"""Schedules at their corners, who decays, and AdamW against plain arithmetic."""

import math

import pytest
import torch
from torch import nn

from softmoe_cli.config import Optim, UsageError
from softmoe_cli.models import build
from softmoe_cli.optim import constant, cosine, decay_of, linear, optimizer_of, rsqrt, schedule, span
from tests.oracles import adamw as adamw_oracle
from tests.oracles import compose


def optim(**changes: object) -> Optim:
    config = compose().optim
    for key, value in changes.items():
        assert hasattr(config, key)
        setattr(config, key, value)
    return config


# --- schedules --------------------------------------------------------------------------------------------------------


def test_rsqrt() -> None:
    def rate(t: float) -> float:
        return rsqrt(t, 1000, peak=2.0, warmup=100, cooldown=200, timescale=50)

    assert rate(0) == 0
    assert rate(50) == pytest.approx(1.0)
    assert rate(100) == 2.0
    assert rate(250) == pytest.approx(2 / math.sqrt(1 + 150 / 50)) == pytest.approx(1.0)
    frozen = 2 / math.sqrt(1 + 700 / 50)
    assert rate(800) == pytest.approx(frozen)
    assert rate(799.999) == pytest.approx(frozen, rel=1e-5)
    assert rate(900) == pytest.approx(frozen / 2)
    assert rate(1000) == 0
    assert rate(1100) == pytest.approx(-frozen / 2)
    assert rsqrt(10**6, 1000, peak=2.0, warmup=0, cooldown=0, timescale=50) == pytest.approx(2 / math.sqrt(20001))
    assert rsqrt(0, 1000, peak=2.0, warmup=0, cooldown=0, timescale=50) == 2.0


def test_cosine() -> None:
    def rate(t: float) -> float:
        return cosine(t, 1000, peak=2.0, warmup=200, final=0.5)

    assert [rate(0), rate(100), rate(200)] == pytest.approx([0, 1, 2])
    assert rate(600) == pytest.approx(1.25)
    assert rate(200 + 800 / 3) == pytest.approx(0.5 + 1.5 * 0.75)
    assert rate(1000) == pytest.approx(0.5)
    assert rate(2000) == pytest.approx(0.5)
    assert cosine(0, 10, peak=2.0, warmup=0, final=0.0) == 2.0
    assert cosine(10, 10, peak=2.0, warmup=10, final=0.0) == 2.0  # all warmup: no division by zero


def test_linear() -> None:
    def rate(t: float) -> float:
        return linear(t, 1000, peak=2.0, warmup=200, final=0.5)

    assert [rate(0), rate(100), rate(200)] == pytest.approx([0, 1, 2])
    assert [rate(400), rate(600), rate(1000), rate(2000)] == pytest.approx([1.625, 1.25, 0.5, 0.5])


def test_constant() -> None:
    def rate(t: float) -> float:
        return constant(t, 1000, peak=2.0, warmup=200, cooldown=100)

    assert [rate(0), rate(100), rate(200), rate(900)] == pytest.approx([0, 1, 2, 2])
    assert [rate(950), rate(1000)] == pytest.approx([1, 0])
    assert constant(1000, 1000, peak=2.0, warmup=0, cooldown=0) == 2.0


@pytest.mark.parametrize(
    ("value", "total", "want"), [(0.1, 500, 50), (0.0, 500, 0), (1.0, 500, 1), (30, 500, 30), (0.999, 1000, 999)]
)
def test_span_is_a_share_below_one_and_a_count_from_one_on(value: float, total: float, want: float) -> None:
    assert span(value, total) == pytest.approx(want)


@pytest.mark.parametrize(
    ("name", "changes", "rates"),
    [
        ("rsqrt", {"warmup": 0.1, "cooldown": 0.2, "timescale": 100.0}, [1, 2, 2 / math.sqrt(3), 1 / math.sqrt(8)]),
        ("cosine", {"warmup": 100}, [1, 2, 1 + math.cos(math.pi * 2 / 9), 1 + math.cos(math.pi * 8 / 9)]),
        ("linear", {"warmup": 0.1, "final_lr": 0.2}, [1, 2, 1.6, 0.4]),
        ("constant", {"warmup": 0.1, "cooldown": 200.0}, [1, 2, 2, 1]),
    ],
)  # fmt: skip
def test_schedule_reads_the_config(name: str, changes: dict[str, float], rates: list[float]) -> None:
    rate = schedule(optim(schedule=name, lr=2.0, **changes), 1000)
    assert [rate(50), rate(100), rate(300), rate(900)] == pytest.approx(rates)


@pytest.mark.parametrize("name", ["rsqrt", "cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup", "cooldown"), [(101.0, 0.0), (60.0, 50.0), (0.6, 0.5), (0.6, 41.0)])
def test_spans_that_do_not_fit_are_refused(name: str, warmup: float, cooldown: float) -> None:
    config = optim(schedule=name, warmup=warmup, cooldown=cooldown)
    with pytest.raises(
        UsageError, match=rf"optim\.warmup={warmup:g} and optim\.cooldown={cooldown:g} do not fit .* 100;"
    ):
        schedule(config, 100)


def test_spans_may_fill_the_budget() -> None:
    rate = schedule(optim(schedule="constant", warmup=0.5, cooldown=0.5, lr=1.0), 100)
    assert [rate(0), rate(25), rate(50), rate(75), rate(100)] == pytest.approx([0, 0.5, 1, 0.5, 0])


# --- decay ------------------------------------------------------------------------------------------------------------

DECAYED = (
    "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.proj.weight", "blocks.0.mlp.fc1.weight",
    "blocks.0.mlp.fc2.weight", "blocks.3.mlp.experts.w1", "blocks.3.mlp.experts.w2", "blocks.3.mlp.router.scale",
)  # fmt: skip
PLAIN = (
    "pos_embed", "cls_token", "head.bias", "norm.weight", "norm.bias", "patch_embed.proj.bias",
    "blocks.0.attn.qkv.bias",
    "blocks.0.norm1.weight", "blocks.0.attn.q_norm.weight", "blocks.0.mlp.fc1.bias", "blocks.3.mlp.experts.b1",
    "blocks.3.mlp.experts.b2", "blocks.3.mlp.router.phi",
)  # fmt: skip


def test_who_decays() -> None:
    config = optim(weight_decay=0.25, head_weight_decay=3.0)
    vit = build(compose("model.backbone.class_token=true").model, 10)
    decays = {name: decay_of(name, parameter, config) for name, parameter in vit.named_parameters()}
    assert decays["head.weight"] == 3.0
    assert {name: decays[name] for name in DECAYED} == dict.fromkeys(DECAYED, 0.25)
    assert {name: decays[name] for name in PLAIN} == dict.fromkeys(PLAIN, 0.0)
    for name, decay in decays.items():
        last = name.split(".")[-1]
        kernel = last in ("w1", "w2", "scale") or (last == "weight" and "norm" not in name)
        assert (decay > 0) == kernel, name


@pytest.mark.parametrize("decays", [(0.25, 3.0), (0.1, 0.1), (0.0, 0.0)])
def test_groups_hold_every_parameter_once_with_its_decay(decays: tuple[float, float]) -> None:
    config = optim(weight_decay=decays[0], head_weight_decay=decays[1], lr=0.5, betas=[0.8, 0.7], eps=1e-3)
    vit = build(compose().model, 10)
    optimizer = optimizer_of(vit, config)
    names = {id(parameter): name for name, parameter in vit.named_parameters()}
    found = [(names[id(p)], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(names)
    assert dict(found) == {name: decay_of(name, p, config) for name, p in vit.named_parameters()}
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.7), 1e-3)


def test_adamw_equals_plain_arithmetic() -> None:
    """Every number of a small model, with a rate that changes from step to step."""
    config = optim(lr=0.1, weight_decay=0.3, head_weight_decay=2.0, betas=[0.8, 0.95], eps=1e-2)
    torch.manual_seed(0)
    model = nn.ModuleDict({"head": nn.Linear(2, 3), "body": nn.Linear(3, 2), "norm": nn.LayerNorm(2)}).double()
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = [{name: torch.randn_like(value) for name, value in start.items()} for _ in range(6)]
    rates = [0.1, 0.2, 0.0, 0.05, 0.3, 0.1]
    decays = {"head.weight": 2.0, "body.weight": 0.3, "head.bias": 0.0, "body.bias": 0.0}
    optimizer = optimizer_of(model, config)
    paths: list[dict[str, torch.Tensor]] = []
    for step, lr in zip(gradients, rates, strict=True):
        for name, parameter in model.named_parameters():
            parameter.grad = step[name].clone()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        paths.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    for name, value in start.items():
        for i, number in enumerate(value.flatten().tolist()):
            want = adamw_oracle(
                number, [step[name].flatten()[i].item() for step in gradients], rates,
                decay=decays.get(name, 0.0), betas=config.betas, eps=config.eps,
            )  # fmt: skip
            assert [path[name].flatten()[i].item() for path in paths] == pytest.approx(want, rel=0, abs=1e-12), name
