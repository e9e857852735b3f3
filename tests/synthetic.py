"""Finished runs without any training: folders with the rows that the loop would write."""

import hashlib
import json
from pathlib import Path
from typing import Any

from softmoe_cli.compare.blocks import compare
from softmoe_cli.compare.groups import Comparison, Group
from softmoe_cli.compare.question import Question
from softmoe_cli.run.rows import FORMAT, metrics_digest

LOOKS = 8


def row(*, router: str = "soft", seed: int = 0, top1_pct: float = 90.0, **changes: Any) -> dict[str, Any]:
    """A result row as train/summary.py makes it, with `changes` to any of its keys (a double underscore is a dot)."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    dense = router == "dense"
    options = {} if dense else {"model.router.num_experts": 16, "model.router.slots_per_expert": 1}
    settings: dict[str, Any] = {
        "model.backbone.name": "vit_nano2", "model.backbone.width": 64, "model.backbone.depth": 4,
        "model.router._target_": None if dense else f"softmoe_cli.moe.routers.{router}.Router", **options,
        "model.moe_blocks": [] if dense else [2, 3], "model.expert_init": "identical", "model.image_size": 8,
        "data.name": "digits", "data.num_classes": 10, "data.split_seed": 0, "data.validation_fraction": 0.1,
        "data.test_fraction": 0.2, "data.identity": None, "optim.lr": 0.003, "optim.betas": [0.9, 0.999],
        "train.steps": 200, "train.minutes": None, "train.batch_size": 32, "train.loss": "softmax",
        "checkpoint.digest": None, "checkpoint.origin": None, "checkpoint.train_pflop": None,
    }  # fmt: skip
    settings |= {key: value for key, value in changes.items() if key in settings or key.startswith("model.router.")}
    mark = hashlib.sha256(json.dumps([settings, seed, changes.get("command")]).encode()).hexdigest()[:10]
    flop = 1.0 if dense else 1.0 + 0.01 * settings.get("model.router.num_experts", 16)
    classes = changes.get("classes", settings["data.num_classes"])
    full = {
        "format": FORMAT, "name": f"vit_nano2_{router}-digits-{mark}", "signature": mark, "study": "made_up",
        "command": "train", "checkpoint": None, "seed": seed, "backbone": "vit_nano2", "router": router,
        "num_experts": settings.get("model.router.num_experts"), "slots_per_expert": None if dense else 1,
        "slots_per_token": None if dense else 1.0, "images_per_group": None, "moe_blocks": "" if dense else "2,3",
        "image_size": 8, "tokens": 16, "data": "digits", "train_images": 1295, "test_images": 359, "classes": classes,
        "chance_pct": 100 / classes, "top1_pct": top1_pct, "top5_pct": 99.0 + top1_pct / 1000,
        "loss": (100 - top1_pct) / 30, "nll": (100 - top1_pct) / 30, "ece_pct": 3.0,
        "validation_top1_pct": top1_pct + 1, "validation_loss": (99 - top1_pct) / 30,
        "best_validation_top1_pct": top1_pct + 1.5, "best_step": 180, "steps": 200, "images": 6400, "epochs": 4.94,
        "batch_size": 32, "lr": 0.003, "precision": "fp32", "params_m": 0.2 if dense else 1.2,
        "active_params_m": 0.2 if dense else 1.2, "forward_gflop": 0.0066 * flop, "train_gflop": 0.02 * flop,
        "peak_mib": 12.7 * flop, "train_pflop": 0.000128 * flop, "device_s": 13.0 * flop + 0.1 * seed, "eval_s": 1.7,
        "save_s": 0.5, "compile_s": 0.0, "devices": 1, "parallel": None,
        "hardware": "AMD EPYC, 1 threads", "torch": "2.15.0+cu132", "softmoe": "0.1.0", "commit": "7d27ecc",
        "python": "3.11.7",
    }  # fmt: skip
    return full | settings | changes


def looks(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl whose last values are the result's: training rows, validation rows, a test row."""
    rows = []
    for i in range(1, LOOKS + 1):
        share = i / LOOKS
        reached = {"step": round(result["steps"] * share), "epoch": result["epochs"] * share}
        reached |= {axis: result[axis] * share for axis in ("images", "train_pflop", "device_s")}
        reached |= {"format": FORMAT, "eval_s": 0.2 * i, "save_s": 0.0, "compile_s": 0.0}
        rows.append(reached | {"split": "train", "loss": 2.3 - share, "aux_loss": 0.0, "lr": 0.003, "grad_norm": 1.0})
        quality = result["validation_top1_pct"] * share**0.25
        look = reached | {"split": "validation", "top1_pct": quality, "top5_pct": 99.0, "loss": 2.3 - 2 * share}
        look |= {"nll": look["loss"], "ece_pct": 3.0, "images_evaluated": 143}
        if result["router"] != "dense":
            look |= {"routing_utilisation": 0.8 + 0.1 * share, "routing_load_max": 1.5 - 0.1 * share}
        rows.append(look)
    return [*rows, rows[-1] | {"split": "test", "top1_pct": result["top1_pct"], "loss": result["loss"]}]


def write(folder: Path, result: dict[str, Any]) -> Path:
    """The run's folder below `folder`, as the loop leaves it."""
    run = folder / result["name"]
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 0\n")
    rewrite(run, "".join(json.dumps(each) + "\n" for each in looks(result)), result)
    return run


def rewrite(run: Path, metrics: str, result: dict[str, Any] | None = None) -> None:
    """Replaces the rows of a run, and its result by one that belongs to these rows."""
    result = json.loads((run / "result.json").read_text()) if result is None else result
    (run / "metrics.jsonl").write_text(metrics)
    (run / "result.json").write_text(json.dumps(result | metrics_digest(metrics.encode()), indent=1))


def study(folder: Path, seeds: int = 3) -> Path:
    """Runs of dense, soft and tokens_choice; soft is 3 points better than dense, tokens_choice hardly better."""
    wobble = (0.0, 0.4, -0.3, 0.2, -0.1)
    for seed in range(seeds):
        write(folder, row(router="dense", seed=seed, top1_pct=90 + seed))
        write(folder, row(router="soft", seed=seed, top1_pct=93 + seed + wobble[seed] / 4))
        write(folder, row(router="tokens_choice", seed=seed, top1_pct=90.1 + seed + wobble[seed]))
    return folder


def asked(*folders: Path, **question: Any) -> Comparison:
    return compare(folders, Question(**question))


def group(comparison: Comparison, label: str) -> Group:
    (found,) = [each for each in comparison.groups if each.label == label]
    return found
