"""Training steps of muMoE blocks beside the dense MLP with as many parameters, in one process, in turns.

    cd experiments/layer_speed
    OMP_NUM_THREADS=1 python factorised.py factorised.csv width=192,384,768 batch=8,32

appends a row for each width, batch and layer to the file: milliseconds of a forward and backward pass, and how many
times as long it takes as the MLP's in the same round, as median with its 95% interval. Gates are drawn at random: at
the start all coefficients are equal, and entmax has nothing to sort.
"""

import itertools
import statistics
import sys
from pathlib import Path

import torch
import yaml
from bench import FEWEST, ROUTERS, TOKENS, Mlp, in_turns, machine, middle, run, write
from torch import nn

from softmoe_cli.device import keep_freed_memory
from softmoe_cli.model.router import make_layer

CONTENDERS: dict[str, tuple[str, dict[str, str]]] = {
    "mumoe_cp": ("mumoe_cp", {}),
    "mumoe_tr": ("mumoe_tr", {}),
    "mumoe_cp, softmax": ("mumoe_cp", {"gate": "softmax"}),
    "mumoe_cp, layer norm": ("mumoe_cp", {"norm": "layer"}),
}


def block(name: str, changes: dict[str, str], d: int) -> nn.Module:
    options = yaml.safe_load((ROUTERS / f"{name}.yaml").read_text()) | changes
    layer = make_layer(options, d, 4 * d, TOKENS, gelu="none", identical=False)
    for kernel in layer.router.parameters():
        nn.init.normal_(kernel, std=d**-0.5)
    return layer


def main() -> None:
    grid = {key: values.split(",") for key, values in (argument.split("=") for argument in sys.argv[2:])}
    keep_freed_memory(torch.device("cpu"))
    torch.manual_seed(0)
    for d, batch in itertools.product(map(int, grid["width"]), map(int, grid["batch"])):
        modules: dict[str, nn.Module] = {"dense": Mlp(d)}
        modules |= {name: block(router, changes, d) for name, (router, changes) in CONTENDERS.items()}
        x = torch.randn(batch, TOKENS, d, requires_grad=True)
        for module in modules.values():
            run(module, x, half=False, backward=True)
        times = in_turns(modules, x, half=False, backward=True, fewest=FEWEST)
        rows = []
        for name, found in times.items():
            ratio, low, high = middle(found, times["dense"])
            params = sum(parameter.numel() for parameter in modules[name].parameters())
            row = {"width": d, "batch": batch, "layer": name, "params": params, "ms": 1e3 * statistics.median(found)}
            row |= {"over_dense": ratio, "over_dense_low": low, "over_dense_high": high, "rounds": len(found)}
            rows.append(row | machine())
            print(f"  {d:4} {batch:3} {name:<24}{row['ms']:9.1f} ms {ratio:5.2f} ({low:.2f} to {high:.2f})", flush=True)
        write(Path(sys.argv[1]), rows)


if __name__ == "__main__":
    main()
