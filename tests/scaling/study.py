"""Finished runs of a planted law, in folders as the loop leaves them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softmoe_cli.scaling.laws import inference_optimal
from softmoe_cli.scaling.points import dense_parameters
from tests.synthetic import row, write

TRUE: dict[str, float] = {"A": 10.0, "alpha": 0.3, "B": 0.4, "beta": 0.6, "C": 200.0, "gamma": 0.5, "F": 0.2,
                          "d": -0.004, "E_start": 1.5, "E_max": math.inf}  # fmt: skip
WIDTHS, EXPERTS, IMAGES = (16, 32, 64, 128), (1, 4, 16), (48_000, 96_000, 192_000, 384_000)


def planted(
    width: int, experts: int, images: int, seed: int, *, noise: float = 0.004, **changes: Any
) -> dict[str, Any]:
    """A result whose validation loss is the planted law's, and whose costs are proportional to its sizes."""
    random = np.random.default_rng([width, experts, images, seed])
    router = "dense" if experts == 1 else "soft"
    made = row(
        router=router, seed=seed, model__backbone__width=width, backbone=f"w{width}", images=images, steps=images // 32,
        train_images=4_000_000, epochs=images / 4e6, slots_per_token=None if experts == 1 else 1.0,
        **({} if experts == 1 else {"model__router__num_experts": experts}), **changes,
    )  # fmt: skip
    made |= {"model.backbone.heads": 4, "model.backbone.mlp_width": 4 * width, "model.backbone.depth": 4,
             "model.backbone.qk_norm": "scale", "model.backbone.timm": None, "train.images": images,
             "train.steps": None, "study": "planted"}  # fmt: skip
    size = dense_parameters(made)
    assert size is not None
    loss = float(inference_optimal(size, images, experts, **TRUE)) * math.exp(noise * random.standard_normal())
    gflop = 32e-9 * size * (1 + 0.02 * math.log(experts))
    made |= {
        "validation_loss": loss, "params_m": size * (1 + (experts - 1) / 3) / 1e6, "active_params_m": size / 1e6,
        "forward_gflop": gflop, "train_gflop": 3 * gflop, "train_pflop": 3e-6 * gflop * images,
        "device_s": 2e-4 * images * gflop / 1e-3,
    }  # fmt: skip
    mark = f"{width:04d}{experts:02d}{images // 1000:03d}{seed}"
    return made | {"signature": mark, "name": f"run-{mark}"}


def planted_study(
    folder: Path, *, widths: Sequence[int] = WIDTHS, experts: Sequence[int] = EXPERTS, images: Sequence[int] = IMAGES,
    seeds: int = 2, noise: float = 0.004, **changes: Any,
) -> Path:  # fmt: skip
    for width in widths:
        for e in experts:
            for count in images:
                for seed in range(seeds):
                    write(folder, planted(width, e, count, seed, noise=noise, **changes))
    return folder
