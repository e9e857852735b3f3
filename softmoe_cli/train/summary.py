"""What a run says of itself: before its first step, what it is and needs; at its end, its result row."""

import hashlib
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import softmoe_cli
from softmoe_cli.config.model import Model
from softmoe_cli.config.run import WANDB_LETTERS, Config
from softmoe_cli.cost.fit import Fit
from softmoe_cli.data import splits
from softmoe_cli.data.mix import MixedSet
from softmoe_cli.data.order import TaskDraws
from softmoe_cli.device import KEPT, hardware, slower
from softmoe_cli.model.router import router_class
from softmoe_cli.run import rows
from softmoe_cli.run.identity import flat_science, origin_of
from softmoe_cli.run.saving import room_beside
from softmoe_cli.stack.turns import at_once
from softmoe_cli.text import flop, gibibytes, si
from softmoe_cli.train.pace import Pace
from softmoe_cli.train.progress import Progress
from softmoe_cli.train.setup import Setup


def header(setup: Setup, folder: Path) -> dict[str, str]:
    """Title -> what the run is, for its first table."""
    config, cost, images, crew = setup.config, setup.cost, setup.splits, setup.crew
    m, t = config.model, config.train
    router = m.router_name
    if router != "dense":
        slots = "all experts" if cost.slots_per_token is None else f"{cost.slots_per_token:.2f} slots"
        alone = [f"{_routed(each)} in block {block}" for block, each in m.blocks.items()]
        rest = [block for block in m.moe_blocks if str(block) not in m.blocks]
        router = ", ".join([f"{_routed(m.router)} in blocks {rest}", *alone]) + f"; {slots} per token"
    sizes = f"{len(images.train):,} train / {len(images.validation):,} validation / {len(images.test):,} test"
    parts = f" in {t.accumulate} parts" if t.accumulate > 1 else ""
    compiled = ", compiled" if t.compile else ""
    frozen = ""
    if cost.frozen_params:
        trained = f"{si(cost.trained_params)} trained, {si(cost.trained_body_params)} without the head"
        frozen = f", {si(cost.frozen_params)} frozen; {trained}"
    extra = {"optimizer": _optimizer(config), "regularised by": _regularisation(config)}
    return {
        "model": f"{m.backbone.name}, {m.image_size} px, {cost.tokens:,} tokens",
        "router": router,
        **({} if m.adapter.name == "none" else {"adapter": _adapter(m)}),
        "parameters": f"{si(cost.params)} total, {si(cost.active_params)} active per token{frozen}",
        "cost per image": f"{flop(cost.forward_flop)} forward, {flop(cost.train_flop)} training",
        "data": f"{config.data.name}: {sizes} images, {len(images.classes)} classes",
        **images.notes,
        "budget": f"{setup.budget}, {t.batch_size} images each{parts}; {config.optim.schedule}, lr {config.optim.lr:g}",
        **{key: value for key, value in extra.items() if value},
        "device": f"{_hardware(setup)}, {t.precision}{_slower(setup)}{compiled}",
        **({"processes": crew.describe(config)} if crew.size > 1 else {}),
        "folder": str(folder),
    }


def _routed(router: dict[str, Any]) -> str:
    """`soft (num_experts=8, slots_per_expert=1)`"""
    options = ", ".join(f"{k}={v}" for k, v in router.items() if k != "_target_" and v is not None)
    return f"{router['_target_'].split('.')[-2]} ({options})"


def _adapter(model: Model) -> str:
    """The adapter with its options, and what is trained beside it."""
    a = model.adapter
    options = ", ".join(f"{k}={v}" for k, v in asdict(a).items() if k not in ("name", "location") and v is not None)
    where = {None: "queries and values", "attn": "attention", "mlp": "the MLP", "both": "attention and the MLP"}
    norms = "" if a.location is None else "the norms before it, " if a.location != "both" else "the norms before them, "
    return f"{a.name} ({options}) beside {where[a.location]} of every block; with it {norms}the last norm and the head"


def _hardware(setup: Setup) -> str:
    name = hardware(setup.device)
    together = f", {at_once()} seeds at once" if at_once() > 1 else ""
    return f"{setup.crew.size} x {name}" if setup.crew.size > 1 else f"{name}{together}"


def _slower(setup: Setup) -> str:
    model = setup.config.model
    return slower(setup.device, setup.config.train.precision, model.backbone.width, mixture=model.mixture)


def _optimizer(config: Config) -> str:
    """The optimizer in words, as far as it is not AdamW with the same settings for all parameters."""
    o = config.optim
    words = []
    if o.name == "sgd":
        words.append(f"SGD with momentum {o.momentum:g}")
    if o.moments != "fp32":
        words.append({"8bit": "AdamW with 8-bit moments", "offload": "AdamW in the machine's memory"}[o.moments])
    if o.layer_decay is not None:
        words.append(f"learning rate times {o.layer_decay:g} from layer to layer, towards the patches")
    if o.freeze:
        words.append(f"frozen: {', '.join(o.freeze)} (no gradient, no decay, no moments)")
    return "; ".join(words)


def _regularisation(config: Config) -> str:
    a, t = config.augment, config.train
    given = {
        "drop path": config.model.backbone.drop_path, "RandAugment": a.randaugment, "erasing": a.erase,
        "mixup": a.mixup, "cutmix": a.cutmix, "label smoothing": t.label_smoothing, "averaged weights": t.ema,
    }  # fmt: skip
    return ", ".join(f"{key} {value}" for key, value in given.items() if value)


def memory_row(fit: Fit, device: torch.device, *, kept: bool) -> str:
    """The header's line about memory. `kept`: freed memory is kept for what comes next, and then takes room too."""
    memory = fit.memory
    words = [
        f"{gibibytes(memory.peak_bytes)} at the peak (weights, gradients, moments {gibibytes(memory.state_bytes)}; "
        f"activations {gibibytes(memory.activation_bytes)}) of {gibibytes(fit.free)} free"
    ]
    if kept:
        words.append(f"up to {gibibytes(round(KEPT * memory.peak_bytes))} with freed memory that is kept for speed")
    if memory.beside_bytes:
        words.append(
            f"{gibibytes(memory.beside_bytes)} of moments in the machine's memory, up to twice that while a checkpoint "
            "is written"
        )
    if device.type == "cpu" and room_beside(memory.held_bytes, fit.free - memory.peak_bytes):
        words.append(f"{gibibytes(memory.held_bytes)} more while a checkpoint is written")
    return "; ".join(words)


def time_row(setup: Setup, pace: Pace, progress: Progress) -> str:
    """How long the run will take, and how that is known."""
    known = "from a forward pass and FLOPs"
    if setup.splits.train.images is None and not isinstance(setup.splits.train, MixedSet):
        known += ", decoding not counted"
    return f"{pace.left(setup.budget, progress, setup.config.train.eval_every)}; {known}"


def wandb_settings(setup: Setup, folder: Path) -> dict[str, Any]:
    """Keyword arguments of wandb.init."""
    config, w = setup.config, setup.config.wandb
    place = hashlib.sha256(f"{config.study}/{folder.name}".encode()).hexdigest()[:6]  # another study may have this run
    return {
        "id": f"{folder.name.rpartition('-')[2]}-{place}",
        "project": w.project,
        "entity": w.entity,
        "group": w.group or config.study,
        "job_type": setup.command,
        "tags": w.tags,
        "name": w.name or folder.name[-WANDB_LETTERS:],
        "config": asdict(config) | _at_the_top(setup),
        "reinit": "create_new" if at_once() > 1 else "finish_previous",
    }


PINNED = ("router_name", "backbone_name", "data_name", "seed", "checkpoint")
"""Keys of W&B's config that stand at the top of a run's page: what runs usually differ in."""


def _at_the_top(setup: Setup) -> dict[str, Any]:
    """Those of them that are no settings by themselves: W&B pins keys of the first level only."""
    config = setup.config
    m = config.model
    return {"router_name": m.router_name, "backbone_name": m.backbone.name, "data_name": config.data.name}


SOMETIMES = ("fewshot_", *rows.OF_TASKS)
"""How those qualities begin that only some runs have."""


def result_row(
    setup: Setup, folder: Path, progress: Progress, test: dict[str, Any], router: dict[str, Any], moe_blocks: list[int]
) -> dict[str, Any]:
    """One flat row: what the run was, what it reached on the test images with its last weights, what it cost, and every
    scientific setting as `section.key`, so that rows alone tell which runs differ in what. `router`: its options as the
    model has them."""
    config, source, cost, images = setup.config, setup.source, setup.cost, setup.splits
    m, seen = config.model, progress.step * config.train.batch_size
    return {
        "name": folder.name,
        "signature": folder.name.rpartition("-")[2],
        "study": config.study,
        "command": setup.command,
        "checkpoint": source.label if source else None,
        "seed": config.seed,
        "backbone": m.backbone.name,
        "router": m.router_name,
        "num_experts": router.get("num_experts"),
        "slots_per_expert": router.get("slots_per_expert"),
        "slots_per_token": cost.slots_per_token,
        "images_per_group": router.get("images_per_group"),
        "moe_blocks": ",".join(map(str, moe_blocks)),
        "image_size": m.image_size,
        "tokens": cost.tokens,
        "data": config.data.name,
        "train_images": len(images.train),
        "test_images": test["images_evaluated"],
        "test_is_cut": images.test_is_cut,
        "classes": len(images.classes),
        "chance_pct": _commonest_pct(images.test),
        "top1_pct": test["top1_pct"],
        "top5_pct": test["top5_pct"],
        "loss": test["loss"],
        "nll": test["nll"],
        "ece_pct": test["ece_pct"],
        "validation_top1_pct": progress.validation["top1_pct"],
        "validation_loss": progress.validation["loss"],
        **{f"validation_{key}": value for key, value in progress.validation.items() if key.startswith(SOMETIMES)},
        **{key: value for key, value in test.items() if key.startswith(SOMETIMES)},
        "best_validation_top1_pct": progress.best_top1_pct,
        "best_step": progress.best_step,
        "steps": progress.step,
        "images": seen,
        "epochs": seen / len(images.train),
        **_epochs_of_tasks(setup, progress.step),
        "batch_size": config.train.batch_size,
        "lr": config.optim.lr,
        "precision": config.train.precision,
        "fp32_is_faster": bool(_slower(setup)),
        "adapter": None if m.adapter.name == "none" else m.adapter.name,
        "params_m": cost.params / 1e6,
        "trained_params_m": cost.trained_params / 1e6,
        "trained_body_params_m": cost.trained_body_params / 1e6,
        "active_params_m": cost.active_params / 1e6,
        "forward_gflop": cost.forward_flop / 1e9,
        "train_gflop": cost.train_flop / 1e9,
        "peak_mib": setup.fit.memory.peak_bytes / 2**20,
        **setup.pflop(progress),
        **setup.landed(progress),
        **progress.spent,
        "devices": setup.crew.size,
        "parallel": setup.crew.way if setup.crew.size > 1 else None,
        "hardware": _hardware(setup),
        "torch": torch.__version__,
        "softmoe": version("softmoe-cli"),
        "commit": _commit(),
        "python": platform.python_version(),
        "checkpoint.train_pflop": source.train_pflop if source else None,
        "checkpoint.digest": source.digest if source else None,
        "checkpoint.origin": origin_of(source) if source else None,
        **flat_science(config),
        "data.identity": setup.images_digest,
    }


def _epochs_of_tasks(setup: Setup, steps: int) -> dict[str, float]:
    """How often training has seen each task's images; nothing where there is one set."""
    images, config = setup.splits.train, setup.config
    if not isinstance(images, MixedSet):
        return {}
    draws = TaskDraws(images, config.data.temperature, config.train.batch_size, config.seed)
    seen: list[int] = draws.before(steps).tolist()
    return {
        rows.TASK_EPOCHS.format(name): count / len(own)
        for name, count, own in zip(config.data.sets, seen, draws.of_task, strict=True)
    }


def _commonest_pct(images: splits.ImageSet) -> float:
    """The share of the commonest class: what a model reaches that always gives the same answer; in a mix the same
    answer for all images of a task."""
    of_each = [images.labels]
    if isinstance(images, MixedSet):
        of_each = [images.labels[images.tasks == task] for task in range(len(images.parts))]
    return 100 * sum(int(labels.bincount().max()) for labels in of_each) / len(images)


def _commit() -> str | None:
    """The commit of a checkout, marked when it had changes; None for an installed wheel."""
    here = Path(softmoe_cli.__file__).resolve().parents[1]
    if not (here / ".git").exists():
        return None
    try:
        git = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
    except OSError:  # a machine without git
        return None
    return git.stdout.strip() or None


def remark(result: dict[str, Any], folder: Path, model: Model) -> str:
    """What the router says of the last look in routing.jsonl; nothing where there is no router."""
    if not model.mixture:
        return ""
    file = folder / "routing.jsonl"
    try:
        looks = rows.lines(file, rows.ROUTING)
    except FileNotFoundError:
        return ""
    except rows.Unreadable as error:
        return f"{file} {error}"
    last = [row for row in looks if row["step"] == looks[-1]["step"] and "beside" not in row]
    by_target: dict[str, list[dict[str, Any]]] = {}
    for row in last:
        by_target.setdefault(model.router_of(row["block"])["_target_"], []).append(row)
    said = [router_class(target).remark(some, result["tokens"]) for target, some in by_target.items()]
    return "; ".join(each for each in said if each)
