"""What large Soft MoEs need on many GPUs: memory by the prediction that a run is held to before it starts, and time by
counted FLOPs and bytes at the speeds of `Machine`.

python experiments/scaling/scaling.py devices [KEY=VALUE...]    GPUs that each of the paper's models needs
python experiments/scaling/scaling.py steps [KEY=VALUE...]      what limits a step of one model on 8, 64, 512 GPUs

Keys are the fields of `Machine` and of `Load`. Each prints a table and writes it with all digits to devices.csv or
steps.csv beside this file.
"""

import csv
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from softmoe_cli.config.model import Model
from softmoe_cli.config.run import WAYS
from softmoe_cli.cost import load as loads
from softmoe_cli.cost import memory, sharded
from softmoe_cli.cost.flop import account, on_meta
from softmoe_cli.moe.layer import MoE
from softmoe_cli.moe.processor import CPU_PRODUCTS
from softmoe_cli.options.compose import compose
from softmoe_cli.text import aligned

CLASSES, MOST = 1000, 512
MODELS = {
    "S/16, dense": ["vit_s16_dense"],
    "S/16, 128 experts": ["vit_s16_soft", "model.router.num_experts=128"],
    "B/16, dense": ["vit_b16_dense"],
    "B/16, 128 experts": ["vit_b16_soft", "model.router.num_experts=128"],
    "L/16, dense": ["vit_l16_dense"],
    "L/16, 128 experts": ["vit_l16_soft", "model.router.num_experts=128"],
    "H/14, dense": ["vit_h14_dense"],
    "H/14, 128 experts": ["vit_h14_soft", "model.router.num_experts=128"],
    "H/14, 256 experts": ["vit_h14_soft", "model.router.num_experts=256"],
}


@dataclass(frozen=True)
class Machine:
    """H100 SXM in nodes of eight, by the data sheet; what share of the peak a step reaches is an assumption."""

    peak_tflops: float = 989.0  # dense bfloat16
    utilisation: float = 0.4
    nvlink_gb_s: float = 450.0  # of a GPU, in each direction
    infiniband_gb_s: float = 50.0  # of a GPU, in each direction: 400 Gb/s
    gpus_per_node: int = 8
    gpu_gb: float = 80.0


@dataclass(frozen=True)
class Load:
    model: str = "H/14, 256 experts"
    images: int = 32  # on each GPU at a time
    precision: str = "bf16"
    recompute: int = 1  # 1: recompute activations


@dataclass(frozen=True)
class Sizes:
    """Bytes."""

    experts: float
    rest: float
    slots: float
    """Of the slots of one image in one MoE layer, as they travel."""
    layers: int


@dataclass(frozen=True)
class Traffic:
    """Bytes that reach a GPU in a step: over NVLink, and over its InfiniBand link."""

    nvlink: float = 0.0
    infiniband: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.nvlink + other.nvlink, self.infiniband + other.infiniband)


def predicted(model: Model, load: Load, gpus: int, way: str) -> memory.Memory:
    """What each GPU holds with AdamW. The fake step runs as on a CPU, because torch's backward pass wants a GPU that is
    there, but with what a GPU has: fused attention and products in half precision."""
    CPU_PRODUCTS[torch.bfloat16] = "fast"
    each = loads.Load(
        model, CLASSES, load.images * gpus, torch.device("cpu"), recompute=load.recompute == 1, precision=load.precision
    )
    with patch.object(memory, "prepare"):
        return memory.predict(each, gpus, way)


def possible(model: Model, gpus: int, way: str) -> bool:
    return way != "expert" or sharded.indivisible(on_meta(model, CLASSES), gpus) is None


def fewest(model: Model, load: Load, room: float, way: str) -> int | None:
    """The smallest power of two of GPUs that have room; None where MOST have not. With ddp every GPU has everything,
    so that more of them bring nothing."""
    gpus, most = (1, 1) if way == "ddp" else (2, MOST)
    while gpus <= most:
        if possible(model, gpus, way) and predicted(model, load, gpus, way).peak_bytes <= room:
            return gpus
        gpus *= 2
    return None


def devices(machine: Machine, load: Load) -> list[dict[str, Any]]:
    rows = []
    for name, (file, *experts) in MODELS.items():
        model = compose(f"model={file}", *experts).model
        row = {"model": name, "parameters, M": account(model, CLASSES).params / 1e6}
        alone = predicted(model, load, 1, "ddp")
        row |= {"all on one, GB": alone.peak_bytes / 1e9, "of it moments, GB": alone.optimizer_bytes / 1e9}
        rows.append(row | {way: fewest(model, load, machine.gpu_gb * 1e9, way) for way in WAYS})
    return rows


def sizes(model: Model, precision: str) -> Sizes:
    vit = on_meta(model, CLASSES)
    layers = [block.mlp for block in vit.blocks if isinstance(block.mlp, MoE)]
    every = sum(p.nbytes for p in vit.parameters())
    experts = sum(p.nbytes for each in layers for p in each.experts.parameters())
    rows = layers[0].router.rows(vit.patch_embed.num_patches) if layers else 0.0
    return Sizes(experts, every - experts, rows * vit.embed_dim * (4 if precision == "fp32" else 2), len(layers))


def ring(whole: float, gpus: int, machine: Machine) -> Traffic:
    """An all-gather of `whole` bytes, or a reduce-scatter: over NVLink all but a GPU's own share comes, over InfiniBand
    all but the node's, which the links of its GPUs divide."""
    node = min(machine.gpus_per_node, gpus)
    return Traffic(whole * (gpus - 1) / gpus, whole * (gpus - node) / gpus / node)


def exchange(own: float, gpus: int, machine: Machine) -> Traffic:
    """An all-to-all in which every GPU sends and gets `own` bytes."""
    node = min(machine.gpus_per_node, gpus)
    return Traffic(own * (node - 1) / gpus, own * (gpus - node) / gpus)


def traffic(way: str, size: Sizes, images: int, gpus: int, machine: Machine, recompute: bool) -> Traffic:
    """Of a step. `ddp` adds gradients up in a ring: a reduce-scatter and an all-gather. `fsdp` gathers weights twice
    (forwards, backwards) and scatters gradients. `expert` does so for all but the experts, and exchanges slots four
    times a layer: there and back, forwards and backwards; recomputation goes there and back once more."""
    divided = size.rest if way == "expert" else size.rest + size.experts
    total = Traffic()
    for _ in range(2 if way == "ddp" else 3):
        total += ring(divided, gpus, machine)
    if way == "expert":
        for _ in range((4 + 2 * recompute) * size.layers):
            total += exchange(images * size.slots, gpus, machine)
    return total


def steps(machine: Machine, load: Load) -> list[dict[str, Any]]:
    file, *experts = MODELS[load.model]
    model = compose(f"model={file}", *experts).model
    size, recompute = sizes(model, load.precision), bool(load.recompute)
    flop = account(model, CLASSES, recompute=recompute).train_flop * load.images
    compute = flop / (machine.peak_tflops * 1e12 * machine.utilisation)
    print(f"{load.model}: experts {size.experts / 1e9:,.1f} GB, the rest {size.rest / 1e9:,.2f} GB, ", end="")
    print(f"{flop / load.images / 1e12:.2f} TFLOP of training an image\n")
    rows = []
    for gpus in (8, 64, 512):
        for way in WAYS:
            if not possible(model, gpus, way):
                continue
            comes = traffic(way, size, load.images, gpus, machine, recompute)
            held = predicted(model, load, gpus, way).peak_bytes / 1e9
            seconds = {
                "compute": compute,
                "NVLink": comes.nvlink / (machine.nvlink_gb_s * 1e9),
                "InfiniBand": comes.infiniband / (machine.infiniband_gb_s * 1e9),
            }
            slowest = max(seconds, key=lambda name: seconds[name])
            links = max(seconds["NVLink"], seconds["InfiniBand"])
            rows.append({
                "GPUs": gpus,
                "parallel": way,
                "GPU, GB": held,
                "NVLink, GB": comes.nvlink / 1e9,
                "InfiniBand, GB": comes.infiniband / 1e9,
                **{f"{name}, ms": 1000 * each for name, each in seconds.items()},
                "images/s, hidden": gpus * load.images / max(compute, links),
                "images/s, in turn": gpus * load.images / (compute + links),
                "bottleneck": slowest if held <= machine.gpu_gb else f"memory, then {slowest}",
            })  # fmt: skip
    return rows


def show(rows: Sequence[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:,.0f}" if isinstance(value, float) and value >= 100 else (
            f"{value:.3g}" if isinstance(value, float) else str(value)
        )  # fmt: skip

    return aligned([list(rows[0]), *([cell(value) for value in row.values()] for row in rows)], markdown=True)


def main() -> None:
    machine, load = Machine(), Load()
    known = {**dataclasses.asdict(machine), **dataclasses.asdict(load)}
    tables = {"devices": devices, "steps": steps}
    if len(sys.argv) < 2 or sys.argv[1] not in tables:
        sys.exit(__doc__)
    for word in sys.argv[2:]:
        key, _, value = word.partition("=")
        if key not in known:
            sys.exit(f"there is no key '{key}'; keys: {', '.join(known)}")
        change = {key: type(known[key])(value)}
        machine, load = (
            (dataclasses.replace(machine, **change), load)
            if hasattr(machine, key)
            else (machine, dataclasses.replace(load, **change))
        )
    rows = tables[sys.argv[1]](machine, load)
    with (Path(__file__).parent / f"{sys.argv[1]}.csv").open("w") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(show(rows))


if __name__ == "__main__":
    main()
