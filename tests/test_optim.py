"""Schedules at their corners, which parameters decay or are frozen, and optimizers against plain arithmetic."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from softmoe_cli.config.recipe import Optim
from softmoe_cli.data.batches import Batch
from softmoe_cli.errors import UsageError
from softmoe_cli.evaluate.quality import classification_loss
from softmoe_cli.model.vit import build
from softmoe_cli.moe.routing import routings
from softmoe_cli.optim import (
    FusedAdamW,
    constant,
    cosine,
    decays,
    freeze,
    linear,
    optimizer_of,
    restore,
    rsqrt,
    schedule,
    settings,
    span_length,
    state_of,
    table,
)
from softmoe_cli.train.loop import Step, update
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
    assert span_length(value, total) == pytest.approx(want)


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


@pytest.mark.parametrize("name", ["rsqrt", "constant"])
def test_shares_of_one_fill_the_budget_whatever_they_are_rounded_to(name: str) -> None:
    """0.07 * 7 + 0.93 * 7 is above 7."""
    for hundredths in range(1, 100):
        spans = {"warmup": hundredths / 100, "cooldown": (100 - hundredths) / 100}
        for total in (7, 9, 14, 30, 100):
            rate = schedule(optim(schedule=name, lr=2.0, **spans), total)
            assert rate(total) == 0 and rate(spans["warmup"] * total) == pytest.approx(2.0)


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
    decay = decays(vit, config)
    assert decay["head.weight"] == 3.0
    assert {name: decay[name] for name in DECAYED} == dict.fromkeys(DECAYED, 0.25)
    assert {name: decay[name] for name in PLAIN} == dict.fromkeys(PLAIN, 0.0)
    for name, share in decay.items():
        last = name.split(".")[-1]
        kernel = last in ("w1", "w2", "scale") or (last == "weight" and "norm" not in name)
        assert (share > 0) == kernel, name


@pytest.mark.parametrize("asked", [(0.25, 3.0), (0.1, 0.1), (0.0, 0.0)])
def test_groups_hold_every_parameter_once_with_its_decay(asked: tuple[float, float]) -> None:
    config = optim(weight_decay=asked[0], head_weight_decay=asked[1], lr=0.5, betas=[0.8, 0.7], eps=1e-3)
    vit = build(compose().model, 10)
    optimizer = optimizer_of(vit, config)
    names = {id(parameter): name for name, parameter in vit.named_parameters()}
    found = [(names[id(p)], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(names)
    assert dict(found) == decays(vit, config)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.7), 1e-3)


@pytest.mark.parametrize("moments", ["fp32", "offload"])
def test_adamw_equals_plain_arithmetic(moments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of a small model, with a rate that changes from step to step."""
    if moments == "offload":  # as if the weights were on a device, from which a copy comes
        monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor.detach().clone())
    config = optim(moments=moments, lr=0.1, weight_decay=0.3, head_weight_decay=2.0, betas=[0.8, 0.95], eps=1e-2)
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


@pytest.mark.parametrize("scaled", [False, True])
def test_our_step_leaves_the_bits_of_torchs(scaled: bool) -> None:
    """Also where a parameter has no gradient in some updates, and where a scaler refuses one."""
    torch.manual_seed(0)
    ours, config = build(compose("model=vit_nano2_soft").model, 10), optim(lr=0.01, weight_decay=0.3)
    theirs = copy.deepcopy(ours)
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    first, second = optimizer_of(ours, config), optimizer_of(theirs, config)
    assert type(first) is FusedAdamW
    second.__class__ = torch.optim.AdamW
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0, enabled=scaled) for _ in range(2)]
    for update_ in range(8):
        for place, (one, other) in enumerate(pairs):
            gradient = torch.randn_like(one) * scalers[0].get_scale()
            if update_ == 5 and place == 3 and scaled:
                gradient.fill_(math.inf)
            one.grad = None if (update_ + place) % 7 == 0 else gradient
            other.grad = None if one.grad is None else gradient.clone()
        for scaler, optimizer in zip(scalers, (first, second), strict=True):
            if scaled:
                scaler.scale(torch.zeros(()))  # makes its scale
            scaler.step(optimizer)
            scaler.update()
        assert all(torch.equal(one, other) for one, other in pairs), update_
    for one, other in pairs:
        states = first.state[one], second.state[other]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_moments_of_8_bits() -> None:
    """Only large weights have 8-bit moments. Small weights are updated as by AdamW; large ones nearly so, at first
    exactly."""
    torch.manual_seed(0)
    body = nn.Linear(64, 65)
    model = nn.ModuleDict({"head": nn.Linear(64, 4), "body": body})
    twin = copy.deepcopy(model)
    config = optim(lr=0.01, weight_decay=0.3, head_weight_decay=2.0)
    pairs = list(zip(model.parameters(), twin.parameters(), strict=True))
    eight, plain = optimizer_of(model, replace(config, moments="8bit")), optimizer_of(twin, config)
    for step in range(10):
        for ours, theirs in pairs:
            ours.grad = torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
        before = [parameter.detach().clone() for parameter in (body.weight, pairs[2][1])]
        eight.step()
        plain.step()
        exact = {name: state_of(eight, p)["state1"].dtype == torch.float32 for name, p in model.named_parameters()}
        assert exact == {"head.weight": True, "head.bias": True, "body.weight": False, "body.bias": True}
        for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            if exact[name] or step == 0:
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        went, should = body.weight - before[0], pairs[2][1] - before[1]
        assert (went - should).norm() < 0.1 * should.norm()


@pytest.mark.parametrize("moments", ["fp32", "8bit", "offload"])
def test_an_optimizer_goes_on_where_another_one_was(moments: str) -> None:
    """The two optimizers reach the same bits; an update that the loss scaler refuses moves nothing."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"head": nn.Linear(64, 4), "body": nn.Linear(64, 65)})
    config = optim(moments=moments, lr=0.01, weight_decay=0.3, head_weight_decay=2.0)
    first = optimizer_of(model, config)
    gradients = [[torch.randn_like(parameter) for parameter in model.parameters()] for _ in range(5)]

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor]) -> None:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()

    for each in gradients[:3]:
        step(model, first, each)
    twin = copy.deepcopy(model)
    second = optimizer_of(twin, config)
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        restore(second, other, {key: value.clone() for key, value in state_of(first, parameter).items()})
    for each in gradients[3:]:
        step(model, first, each)
        step(twin, second, each)
    pairs = list(zip(model.parameters(), twin.parameters(), strict=True))
    assert all(torch.equal(one, other) for one, other in pairs)

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for one, _ in pairs:
        one.grad = torch.full_like(one, torch.inf)
    scaler.scale(torch.ones(()))  # makes its scale
    scaler.unscale_(first)
    scaler.step(first)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("over", [2.0, 1 - 1e-4, 0.5])
def test_gradients_are_touched_where_their_norm_is_too_large_and_then_as_torch_does_it(over: float) -> None:
    """`over`: the norm over `optim.clip_norm`. Plain SGD moves weights by the gradients, to the bit."""
    plain = (*TWO_BLOCKS, "optim.name=sgd", "optim.momentum=0", "optim.weight_decay=0", "optim.head_weight_decay=0")
    torch.manual_seed(0)
    one = build(compose(*plain).model, 10)
    other, x, targets = copy.deepcopy(one), torch.randn(4, 1, 8, 8), torch.eye(10)[:4]
    classification_loss(other(x), targets, "softmax").backward()
    limit = torch.nn.utils.get_total_norm([p.grad for p in other.parameters() if p.grad is not None]).item() / over
    torch.nn.utils.clip_grad_norm_(other.parameters(), limit)
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    config = compose(*plain, f"optim.clip_norm={limit}")
    scaler, quiet = torch.amp.GradScaler("cpu", enabled=False), torch.autocast("cpu", enabled=False)
    for parameter in one.parameters():  # of an update that was not made
        parameter.grad = torch.ones_like(parameter)
    with routings(one) as seen, TorchCalls() as calls:
        update(Step(one, one, optimizer_of(one, config.optim), scaler, quiet, seen, config), Batch(x, targets), 0.1)
    assert all(parameter.grad is None for parameter in one.parameters())
    assert calls.names.count("_foreach_mul_") == (over > 1)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-7)


def test_the_backward_pass_is_outside_of_autocast() -> None:
    """What was float32 on the way forwards, such as the router, is so on the way back."""
    config = compose(*TWO_BLOCKS, "train.accumulate=2")
    torch.manual_seed(0)
    vit = build(config.model, 10)
    inside: list[bool] = []
    for parameter in vit.parameters():
        parameter.register_hook(lambda gradient: inside.append(torch.is_autocast_enabled("cpu")))
    scaler, half = torch.amp.GradScaler("cpu", enabled=False), torch.autocast("cpu", torch.bfloat16)
    with routings(vit) as seen:
        step = Step(vit, vit, optimizer_of(vit, config.optim), scaler, half, seen, config)
        update(step, Batch(torch.randn(4, 1, 8, 8), torch.eye(10)[:4]), 0.1)
    assert len(inside) >= 2 * len(list(vit.parameters())) and not any(inside)


class TorchCalls(TorchDispatchMode):
    """Notes the names of the operations inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_an_update_that_overflows_leaves_weights_and_moments(name: str) -> None:
    """Tested at the first update, where moments are made, and at a later one; the scale is halved until an update is
    made."""
    config = compose("model/router=dense", "model.backbone.depth=1", "model.backbone.width=16",
                     "model.backbone.heads=2", "model.backbone.mlp_width=32", f"optim.name={name}",
                     "optim.momentum=0.9" if name == "sgd" else "optim.clip_norm=1.0")  # fmt: skip
    torch.manual_seed(0)
    vit = build(config.model, 10)
    nn.init.normal_(vit.head.weight, std=20)
    x, targets = torch.randn(4, 1, 8, 8), torch.eye(10)[:4]
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    optimizer, scaler = optimizer_of(vit, config.optim), torch.amp.GradScaler("cpu", init_scale=2.0**127)
    quiet = torch.autocast("cpu", enabled=False)
    norms = []
    for _ in range(20):
        norms.append(update(Step(vit, vit, optimizer, scaler, quiet, [], config), Batch(x, targets), 0.01)[2])
        if math.isfinite(norms[-1]):
            break
        assert not optimizer.state and all(torch.equal(before[key], value) for key, value in vit.state_dict().items())
    assert len(norms) > 1 and math.isfinite(norms[-1]) and scaler.get_scale() == 2.0 ** (128 - len(norms))
    assert all(tensor.isfinite().all() for state in optimizer.state.values() for tensor in state.values())
    assert not torch.equal(before["head.bias"], vit.head.bias)


def test_sgd_equals_plain_arithmetic() -> None:
    """buffer = 0.9 buffer + (gradient + decay weight); weight = weight - lr buffer."""
    config = optim(name="sgd", momentum=0.9, weight_decay=0.3, head_weight_decay=2.0)
    torch.manual_seed(0)
    model = nn.ModuleDict({"head": nn.Linear(2, 3), "body": nn.Linear(3, 2)}).double()
    decays = {"head.weight": 2.0, "body.weight": 0.3, "head.bias": 0.0, "body.bias": 0.0}
    want = {name: parameter.flatten().tolist() for name, parameter in model.named_parameters()}
    buffers = {name: [0.0] * len(values) for name, values in want.items()}
    optimizer = optimizer_of(model, config)
    for lr in (0.1, 0.2, 0.05):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            for i, gradient in enumerate(parameter.grad.flatten().tolist()):
                buffers[name][i] = 0.9 * buffers[name][i] + gradient + decays[name] * want[name][i]
                want[name][i] -= lr * buffers[name][i]
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.flatten().tolist() == pytest.approx(want[name], rel=0, abs=1e-12), name


# --- layers -----------------------------------------------------------------------------------------------------------

TWO_BLOCKS = ("model.backbone.depth=2", "model.moe_blocks=[1]", "model.backbone.class_token=true")
BY_HAND = {
    "cls_token": (0, 0.125, 0.0), "pos_embed": (0, 0.125, 0.0),
    "patch_embed.proj.weight": (0, 0.125, 0.05), "patch_embed.proj.bias": (0, 0.125, 0.0),
    **{
        f"blocks.{i}.{name}": (i + 1, 0.25 * 2**i, decay)
        for i in (0, 1)
        for name, decay in {
            "norm1.weight": 0.0, "norm1.bias": 0.0, "attn.qkv.weight": 0.05, "attn.qkv.bias": 0.0,
            "attn.q_norm.weight": 0.0, "attn.k_norm.weight": 0.0, "attn.proj.weight": 0.05, "attn.proj.bias": 0.0,
            "norm2.weight": 0.0, "norm2.bias": 0.0,
        }.items()
    },
    "blocks.0.mlp.fc1.weight": (1, 0.25, 0.05), "blocks.0.mlp.fc1.bias": (1, 0.25, 0.0),
    "blocks.0.mlp.fc2.weight": (1, 0.25, 0.05), "blocks.0.mlp.fc2.bias": (1, 0.25, 0.0),
    "blocks.1.mlp.router.phi": (2, 0.5, 0.0), "blocks.1.mlp.router.scale": (2, 0.5, 0.05),
    "blocks.1.mlp.experts.w1": (2, 0.5, 0.05), "blocks.1.mlp.experts.b1": (2, 0.5, 0.0),
    "blocks.1.mlp.experts.w2": (2, 0.5, 0.05), "blocks.1.mlp.experts.b2": (2, 0.5, 0.0),
    "norm.weight": (3, 1.0, 0.0), "norm.bias": (3, 1.0, 0.0), "head.weight": (3, 1.0, 3.0), "head.bias": (3, 1.0, 0.0),
}  # fmt: skip


def test_layers_of_a_model_of_two_blocks_by_hand() -> None:
    config = optim(layer_decay=0.5, weight_decay=0.05, head_weight_decay=3.0)
    vit = build(compose(*TWO_BLOCKS).model, 10)
    rows = settings(vit, config)
    assert {row.name: (row.layer, row.lr_scale, row.weight_decay) for row in rows} == BY_HAND
    groups = optimizer_of(vit, config).param_groups
    names = {id(parameter): name for name, parameter in vit.named_parameters()}
    found = [(names[id(p)], (group["lr_scale"], group["weight_decay"])) for group in groups for p in group["params"]]
    assert sorted(found) == sorted((name, numbers[1:]) for name, numbers in BY_HAND.items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "sgd"}, "needs a momentum; give it"),
        ({"momentum": 0.9}, "optim.name=adamw has no use for optim.momentum=0.9; set it to null, or optim.name=sgd"),
        ({"layer_decay": 1.5}, "it must be > 0 and <= 1"),
        ({"name": "sgd", "momentum": 0.9, "moments": "8bit"}, "is a way to keep adamw's moments; set it to fp32"),
    ],
)
def test_what_an_optimizer_has_no_use_for(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        optim(**changes).settled()


def test_an_update_moves_each_layer_by_its_share_and_what_is_frozen_not_at_all() -> None:
    """Without momentum and decay: weight - lr * share * gradient."""
    config = compose(
        *TWO_BLOCKS, "optim.name=sgd", "optim.momentum=0", "optim.weight_decay=0", "optim.head_weight_decay=0",
        "optim.layer_decay=0.5", "optim.clip_norm=null", "optim.freeze=[blocks.0.*,*.phi]",
    )  # fmt: skip
    torch.manual_seed(0)
    vit = build(config.model, 10)
    nn.init.normal_(vit.head.weight)
    freeze(vit, config.optim.freeze)
    x, targets = torch.randn(4, 1, 8, 8), torch.eye(10)[:4]
    before = {name: parameter.detach().clone() for name, parameter in vit.named_parameters()}
    classification_loss(vit(x), targets, "softmax").backward()
    gradients = {name: parameter.grad for name, parameter in vit.named_parameters()}
    vit.zero_grad(set_to_none=True)
    optimizer, scaler = optimizer_of(vit, config.optim), torch.amp.GradScaler("cpu", enabled=False)
    with routings(vit) as seen:
        quiet = torch.autocast("cpu", enabled=False)
        update(Step(vit, vit, optimizer, scaler, quiet, seen, config), Batch(x, targets), 0.1)
    for name, parameter in vit.named_parameters():
        gradient = gradients[name]
        if name.startswith("blocks.0.") or name.endswith(".phi"):
            assert gradient is None and torch.equal(parameter, before[name])
        else:
            assert gradient is not None and gradient.abs().max() > 0
            want = before[name] - 0.1 * BY_HAND[name][1] * gradient
            torch.testing.assert_close(parameter.detach(), want, rtol=0, atol=1e-6)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in vit.parameters() if p.requires_grad
    }
    told = table(vit, config.optim).splitlines()
    frozen = {line.split()[0] for line in told if "frozen" in line}
    assert frozen == {name for name, gradient in gradients.items() if gradient is None}
    assert f"of {sum(p.numel() for p in vit.parameters()):,} parameters in 3 groups" in told[-1]


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["block.0.*"], r"'block\.0\.\*' matches no parameter; there are blocks\.0\.\*"),
        (["blocks.0"], r"there are blocks\.0\.\*"),
        (["head.*", "blocks.*.mlp.expert.w1"], r"'blocks\.\*\.mlp\.expert\.w1' .* blocks\.1\.mlp\.experts\.w1"),
        (["xyz"], r"there are blocks\.\*, head\.\*, norm\.\*, patch_embed\.\*"),
        (["*"], r"leaves nothing to train"),
    ],
)
def test_freezing_what_is_not_there_or_all_there_is(patterns: list[str], words: str) -> None:
    with torch.device("meta"):
        vit = build(compose(*TWO_BLOCKS).model, 10)
    with pytest.raises(UsageError, match=words):
        freeze(vit, patterns)
