"""Finished runs as the laws see them: sizes from the rows' own columns, configurations of runs that differ by seed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from softmoe_cli.compare.groups import said
from softmoe_cli.compare.runs import FinishedRun
from softmoe_cli.errors import UsageError, nearest
from softmoe_cli.run.rows import QUALITIES, Row
from softmoe_cli.scaling.fit import Points

LOSSES = tuple(key for key, each in QUALITIES.items() if each.better == "lower" and not each.unit)
ERRORS = tuple(key for key, each in QUALITIES.items() if each.guesses)
"""Qualities that laws are fitted to: losses as they are, and shares of right answers as errors."""
SIZED = ("model.backbone.", "model.router.num_experts", "model.expert_width", "train.steps", "train.epochs",
         "train.images", "train.minutes")  # fmt: skip
"""Settings that sizes are made of; runs that a law is fitted to should differ in nothing else."""
DERIVED = ("model.moe_blocks", "model.router.slots_per_expert", "model.router._target_", "model.expert_init")


@dataclass(frozen=True)
class Family:
    """The runs of one router with the dense ones, which are its runs of one expert."""

    name: str
    runs: list[FinishedRun]
    points: Points
    notes: list[str]

    def values(self, key: str) -> np.ndarray:
        return np.array([float(run.row[key]) for run in self.runs])


def dense_parameters(row: Row) -> float | None:
    """N: parameters of the dense model of the same depth and width, attention and MLPs alone. None for a backbone of
    timm's, whose row does not say its sizes."""
    width, depth, heads, hidden = (row.get(f"model.backbone.{key}") for key in ("width", "depth", "heads", "mlp_width"))
    if width is None or depth is None or heads is None or hidden is None:
        return None
    norm = row.get("model.backbone.qk_norm")
    attention = 4 * width * width + 4 * width + {"scale": 2, "affine": 4}.get(str(norm), 0) * (width // heads)
    return float(depth * (attention + 2 * width * hidden + hidden + width))


def sizes_of(row: Row) -> dict[str, float | None]:
    """Every size of laws.py's legend, from a result; None where the row does not tell it."""
    experts = row["num_experts"] or 1
    hidden, narrow = row.get("model.backbone.mlp_width"), row.get("model.expert_width")
    used = 1.0 if row["num_experts"] is None else (row["slots_per_token"] or 0.0) / experts
    return {
        "N": dense_parameters(row),
        "N_act": 1e6 * row["active_params_m"],
        "N_total": 1e6 * row["params_m"],
        "D": float(row["images"]),
        "U": float(row["train_images"]),
        "E": float(experts),
        "G": None if hidden is None else hidden / (narrow or hidden),
        "S": 1 - used if used > 0 else None,
        "C": row["train_pflop"],
    }


def check_quality(key: str) -> None:
    """Raises UsageError for a quality that no law is fitted to."""
    if key not in (*LOSSES, *ERRORS):
        known = (*LOSSES, *ERRORS)
        hint = nearest(key, known)
        raise UsageError(f"--quality {key}: no law is fitted to that.{hint} Choices: {', '.join(known)}")


def loss_of(row: Row, quality: str) -> float:
    """What a law is fitted to: a loss as it is; of a share of right answers the share of wrong ones."""
    value = float(row[quality])
    return 1 - value / 100 if quality in ERRORS else value


def families(runs: Sequence[FinishedRun], quality: str) -> list[Family]:
    """A family for each router; dense runs alone where there is no other."""
    dense = [run for run in runs if run.row["router"] == "dense"]
    names = sorted({str(run.row["router"]) for run in runs} - {"dense"})
    if not names:
        return [_family("dense", dense, quality)]
    return [_family(name, [*dense, *(run for run in runs if run.row["router"] == name)], quality) for name in names]


def _family(name: str, runs: list[FinishedRun], quality: str) -> Family:
    told = [sizes_of(run.row) for run in runs]
    sizes = {
        key: np.array([float(each[key] or 0.0) for each in told])
        for key in told[0]
        if all(each[key] is not None for each in told)
    }
    marks = [json.dumps(run.settings(), sort_keys=True) for run in runs]
    models = [json.dumps([each["N"], run.row["backbone"]]) for each, run in zip(told, runs, strict=True)]
    values = np.array([loss_of(run.row, quality) for run in runs])
    share, images, chance = quality in ERRORS, 0, 0.0
    if share:
        row, guesses = runs[0].row, QUALITIES[quality].guesses
        chance = 1 - (row["chance_pct"] / 100 if guesses == 1 else min(0.99, guesses / row["classes"]))
        looked = runs[0].looks[-1]["images_evaluated"] if runs[0].looks else 0
        images = int(looked) if "validation" in quality else int(row["test_images"])
    points = Points(
        sizes, values, _numbered(marks), np.array([run.row["seed"] for run in runs]), _numbered(models),
        np.array([float(run.row["train_pflop"]) for run in runs]), share, images, chance,
    )  # fmt: skip
    return Family(name, runs, points, _mixed(runs))


def _numbered(words: Sequence[str]) -> np.ndarray:
    order = {word: number for number, word in enumerate(sorted(set(words)))}
    return np.array([order[word] for word in words])


def _mixed(runs: Sequence[FinishedRun]) -> list[str]:
    """Notes on what varies beside the sizes, which a law takes as chance."""
    settings = [run.settings() for run in runs]
    varying = []
    for key in sorted({key for each in settings for key in each}):
        if key.startswith(SIZED) or key in DERIVED:
            continue
        values = {said(each[key]) for each in settings if key in each}
        if len(values) > 1:
            varying.append(f"{key} ({', '.join(sorted(values)[:4])})")
    notes = []
    if varying:
        notes.append(f"runs differ in {'; '.join(varying)} too, which the laws take as chance; --where keeps one")
    epochs = max(run.row["epochs"] for run in runs)
    if epochs > 1:
        notes.append(
            f"images come again, up to {epochs:.3g} times: D counts each time, and only data_constrained knows of it"
        )
    return notes
