"""What finetuning with adapters costs: FLOPs by hand, memory by the allocator."""

import json
from collections.abc import Sequence

import pytest
import torch

from softmoe_cli.config.run import Config
from softmoe_cli.cost.flop import account, account_model, count_forward, on_meta
from softmoe_cli.cost.memory import predict
from tests.conftest import Softmoe, thinned
from tests.cost.loads import load
from tests.cost.test_memory import allocated_peak
from tests.oracles import compose

N, D, H, LAYERS, CLASSES, PIXELS = 196, 64, 256, 4, 10, 4
"""Of vit_nano2 on Fashion-MNIST."""
SOFT = ("adapter=soft_moa", "model.adapter.num_adapters=3", "model.adapter.slots_per_adapter=2")
R = ("model.adapter.width=5", "model.adapter.reduction=null")
LORA, DENSE, SINGLE = ("adapter=lora", *R), ("adapter=dense_moa", *R), ("adapter=bottleneck", *R)


def composed(*overrides: str, router: str = "dense") -> Config:
    return compose("model/backbone=vit_nano2", f"model/router={router}", "data=fashion_mnist", *overrides)


def by_hand(adapter: Sequence[str]) -> int:
    """FLOPs of a step. A product costs as much again for each operand that has a gradient: a frozen matrix has none,
    and tokens have none below the first trained parameter."""
    qkv, proj, mlp = 2 * N * D * 3 * D, 2 * N * D * D, 2 * 2 * N * D * H
    scores = mix = 2 * N * N * D
    place = next((each.partition("=")[2] for each in adapter if "location" in each), None)
    kind = adapter[0].partition("=")[2]
    place = place or {"bottleneck": "mlp", "lora": None}.get(kind, "attn")
    of_adapter = {
        "soft_moa": 3 * 2 * N * D * 6 + 6 * 4 * D * 5,
        "dense_moa": 7 * N * 4 * D * 5 + 2 * 2 * N * D * 7,
        "bottleneck": N * 4 * D * 5,
        "lora": 2 * N * 4 * D * 5,
    }[kind]
    total = 2 * N * PIXELS * D + 3 * 2 * D * CLASSES  # patches: forwards only; head: all of it
    for block in range(LAYERS):
        flows = block > 0  # a gradient reaches the block's tokens
        read = flows or place in ("attn", "both")  # and what attention reads, behind a norm that is trained
        total += qkv * (1 + read) + mlp * 2
        if kind == "lora":
            down = up = of_adapter // 2
            # Queries, keys and values are one tensor: where queries have a gradient, one of keys is computed too.
            total += down * (2 + flows) + up * 3 + (scores + mix) * 3 + proj * 2
        else:
            total += (scores + mix) * (1 + 2 * read) + proj * (1 + read)
            total += 3 * of_adapter * (2 if place == "both" else 1)
    return total


ADAPTERS = {
    "soft_moa": (*SOFT, *R), "soft_moa, mlp": (*SOFT, *R, "model.adapter.location=mlp"),
    "soft_moa, both": (*SOFT, *R, "model.adapter.location=both", "model.adapter.normalised=true"),
    "dense_moa": DENSE, "bottleneck": SINGLE, "bottleneck, attn": (*SINGLE, "model.adapter.location=attn"),
    "bottleneck, sequential": (*SINGLE, "model.adapter.insert=sequential"), "lora": LORA,
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_training_flops_are_those_by_hand(name: str) -> None:
    """The counter saves what a frozen backbone saves, and nothing else."""
    config = composed(*ADAPTERS[name])
    cost = account(config.model, CLASSES)
    assert cost.train_flop == by_hand(ADAPTERS[name])
    vit = on_meta(config.model, CLASSES)
    forward = count_forward(vit)
    assert forward.flop_by_part == {part.name: part.forward_flop for part in cost.parts} | {
        part: 0 for part in forward.flop_by_part or {} if part not in {each.name for each in cost.parts}
    }
    assert cost.trained_params == sum(p.numel() for p in vit.parameters() if p.requires_grad)
    head = sum(p.numel() for p in vit.head.parameters())
    assert cost.trained_body_params == cost.trained_params - head


def test_a_frozen_head_is_no_trained_parameter() -> None:
    config = composed(*ADAPTERS["soft_moa"])
    whole, cost = (account(config.model, CLASSES, frozen=frozen) for frozen in ([], ["head.*"]))
    assert whole.trained_params - cost.trained_params == D * CLASSES + CLASSES
    assert whole.trained_body_params == cost.trained_body_params == cost.trained_params


@pytest.mark.parametrize("router", ["soft", "zero_computation"])
def test_a_mixture_of_experts_with_adapters_costs_what_the_counter_says(router: str) -> None:
    config = composed(*ADAPTERS["soft_moa"], router=router)
    plain = account(composed(router=router).model, CLASSES)
    vit = on_meta(config.model, CLASSES)
    own = next(part for part in account_model(vit, batch=None, recompute=False).parts if part.name == "adapter")
    assert own.forward_flop == LAYERS * (3 * 2 * N * D * 6 + 6 * 4 * D * 5)
    assert count_forward(vit).flop == plain.forward_flop + own.forward_flop
    assert plain.forward_flop < account(config.model, CLASSES).train_flop < plain.train_flop


MEASURED: list[tuple[str, str, tuple[str, ...]]] = [
    *((name, "dense", ()) for name in ADAPTERS),
    *((name, "dense", ("train.precision=bf16",)) for name in ("soft_moa, both", "dense_moa", "lora")),
    *((name, "dense", ("train.recompute=true",)) for name in ("soft_moa, both", "lora")),
    *((name, "soft", ("train.accumulate=2",)) for name in ("soft_moa, both", "bottleneck, sequential")),
    ("dense_moa", "zero_computation", ()),
]


@pytest.mark.parametrize(("name", "router", "more"), thinned(MEASURED, 1))
def test_predicted_memory_of_adapters_is_the_allocators(name: str, router: str, more: tuple[str, ...]) -> None:
    config = composed(*ADAPTERS[name], "train.batch_size=32", *more, router=router)
    torch.manual_seed(0)
    predicted = predict(load(config))
    assert predicted.peak_bytes == pytest.approx(allocated_peak(config), rel=0.02)
    assert predicted.held_bytes == predicted.gradient_bytes + predicted.optimizer_bytes, "no frozen weights"
    full = predict(load(composed("train.batch_size=32", *more, router=router)))
    assert predicted.gradient_bytes < full.gradient_bytes / 5
    # What adapters add to the one block that is there at a time may be more; and so with activations in half precision.
    if not {"train.recompute=true", "train.precision=bf16"} & set(more):
        assert predicted.peak_bytes < full.peak_bytes


@pytest.mark.long
@pytest.mark.thorough
def test_memory_of_finetuning_a_b16() -> None:
    """With soft_moa and of all of the model, predicted and by the allocator: 8 images of 224 pixels."""
    found = {}
    for adapter in ("soft_moa", "none"):
        config = compose("model=vit_b16_dense", "data=fashion_mnist", "data.image_size=224", "model.in_chans=3",
                         f"adapter={adapter}", "train.batch_size=8")  # fmt: skip
        predicted = predict(load(config)).peak_bytes
        found[adapter] = predicted, allocated_peak(config)
        assert predicted == pytest.approx(found[adapter][1], rel=0.02)
    print({adapter: [round(each / 2**20) for each in both] for adapter, both in found.items()})
    assert found["soft_moa"][1] < 0.6 * found["none"][1]


def test_the_command_tells_what_a_frozen_backbone_saves(softmoe: Softmoe) -> None:
    """Of training with adapters the total alone: by formula every part would be trained."""
    line = ("cost", "model/backbone=vit_nano2", "model/router=dense", "format=json")
    plain, adapted = (json.loads(softmoe(*line, more).out) for more in ("adapter=none", "adapter=soft_moa"))
    assert adapted["train_gflop"] == adapted["counter_train_gflop"] < plain["train_gflop"]
    assert adapted["gradient_mib"] < 0.1 * plain["gradient_mib"] and adapted["peak_mib"] < plain["peak_mib"]
    assert {part["train_gflop"] for part in adapted["parts"]} == {None}
    forward = {part["part"]: part["forward_gflop"] for part in adapted["parts"]}
    assert forward == {part["part"]: part["counter_forward_gflop"] for part in adapted["parts"]}
    assert sum(forward.values()) == pytest.approx(plain["forward_gflop"] + forward["adapter"], rel=1e-12)
