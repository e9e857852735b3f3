"""Runs of planted laws."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from softmoe_cli.scaling.fit import Points
from softmoe_cli.scaling.laws import LAWS

PLANTED: dict[str, dict[str, float]] = {
    "inference_optimal": {"A": 8.0, "alpha": 0.3, "B": 0.3, "beta": 0.6, "C": 150.0, "gamma": 0.5, "F": 0.2,
                          "d": -0.002, "E_start": 1.5, "E_max": 60.0},
    "joint_moe": {"a": 9.0, "alpha": -0.3, "delta": -0.2, "gamma": 0.01, "b": 150.0, "beta": -0.5, "omega": 0.3,
                  "zeta": -0.02, "E_start": 1.6, "E_max": 60.0, "c": 0.3},
    "routed_bilinear": {"a": -0.082, "b": -0.108, "c": 0.009, "d": 1.104, "E_start": 1.847, "E_max": 60.0},
    "granular_moe": {"a": 18.1, "alpha": 0.35, "b": 150.0, "beta": 0.5, "g": 9.0, "gamma": 0.58, "c": 0.3},
    "sparsity": {"a": 9.0, "alpha": 0.4, "b": 150.0, "beta": 0.5, "c": 0.4, "lambda_": -0.5, "d": 5.0, "delta": 0.2,
                 "gamma": 0.15, "e": 0.3},
    "chinchilla": {"A": 8.0, "alpha": 0.3, "B": 150.0, "beta": 0.5, "F": 0.3},
    "data_constrained": {"A": 8.0, "alpha": 0.3, "B": 150.0, "beta": 0.5, "F": 0.3, "R_star": 12.0},
    "saturating_compute": {"a": 0.3, "b": 0.35, "c": 0.2, "d": 0.01},
    "shape": {"alpha": 0.5, "a": 0.9, "beta": 0.02, "b": 1.1, "xi": 0.4, "c": 0.42, "eps": 0.2},
}  # fmt: skip
"""Coefficients with which every term counts on the grids below."""
VALUES: dict[str, Sequence[float]] = {
    "N": (1e4, 5e4, 2e5, 1e6), "D": (5e4, 1e5, 2e5, 4e5, 8e5), "E": (1, 2, 4, 16, 64), "N_act": (1e4, 5e4, 2e5, 1e6),
    "N_total": (1e4, 5e4, 2e5, 1e6), "S": (0.0, 0.5, 0.75, 0.9375), "G": (1, 2, 4, 16), "U": (5e4,),
    "C": (1e-3, 4e-3, 1.6e-2, 6.4e-2, 0.256, 1.024, 4.096),
}  # fmt: skip


def points(
    law: str, *, noise: float = 0.0, seeds: int = 1, random: int = 0, values: Mapping[str, Sequence[float]] = VALUES,
    **changes: float,
) -> Points:  # fmt: skip
    """Runs on the grid of the law's sizes, whose log loss has normal noise of this standard deviation."""
    names = LAWS[law].sizes
    tables = np.meshgrid(*(np.array(values[name], dtype=float) for name in names), indexing="ij")
    one = {name: table.ravel() for name, table in zip(names, tables, strict=True)}
    count = len(next(iter(one.values())))
    sizes = {name: np.tile(table, seeds) for name, table in one.items()}
    draw = np.random.default_rng(random).standard_normal(count * seeds)
    loss = LAWS[law].of(*sizes.values(), **(PLANTED[law] | changes)) * np.exp(noise * draw)
    config, seed = np.tile(np.arange(count), seeds), np.repeat(np.arange(seeds), count)
    first = sizes[names[0]]
    return Points(sizes, loss, config, seed, np.unique(first, return_inverse=True)[1], first * sizes.get("D", 1.0))


def beyond(law: str, factor: float = 4.0) -> dict[str, Any]:
    """Sizes larger than any on the grid."""
    return {name: np.array([max(VALUES[name]) * (1 if name in ("S", "U") else factor)]) for name in LAWS[law].sizes}
