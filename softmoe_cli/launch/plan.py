"""What is asked of a sweep's jobs before the first one starts: are they possible, and what will they cost."""

import copy
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from softmoe_cli.config.data import Data
from softmoe_cli.config.launch import Launcher, RayLauncher, SlurmLauncher
from softmoe_cli.config.run import Config
from softmoe_cli.errors import RunError, UsageError

CLUSTER_JOBS = 10_000
"""Jobs at a time where a cluster does the queueing."""


@dataclass(frozen=True)
class Job:
    """One job, checked. `overrides` include what the launcher settled; `cost` is empty unless somebody asked."""

    run: str
    overrides: list[str]
    folder: Path
    threads: int | None
    cost: dict[str, float] = field(default_factory=dict)
    images: str = ""
    """What the check has learnt of the images (contents.known), so that the job need not read them again."""
    folders: dict[int, Path] = field(default_factory=dict)
    """Of its runs with other seeds, where the inquiry named some."""
    added: int = 0
    """What the model has beside a plain one: 1 for experts, 2 for adapters, 3 for both."""
    data: Data | None = None
    """As the job will have them: a checkpoint may decide of them."""
    lacking: str = ""
    """What is asked of its run, which has ended and did not look at it (finished.not_looked_at)."""


@dataclass(frozen=True)
class Inquiry:
    """What the launcher wants to know of its jobs before it starts any."""

    command: str
    jobs: list[tuple[str, list[str], dict[str, Any]]]  # name, overrides, composed configuration
    options: Launcher
    seeds: tuple[int, ...] = ()
    said: tuple[str, ...] = ()
    """What counts as typed for every job (compose.said_of_data)."""


def answer(inquiry: Inquiry) -> tuple[list[Job | UsageError | RunError], list[str]]:
    """Checks every job as its own process would, all in one process; returns a job or the reason against it for each,
    and a word for each job that may run at a time: its GPU, or nothing."""
    from softmoe_cli.cost.fit import with_largest_batch
    from softmoe_cli.data.contents import identity, known
    from softmoe_cli.device import arithmetic, fast_precision
    from softmoe_cli.failures import defect, ours
    from softmoe_cli.model.weights import experts_left
    from softmoe_cli.options.inherit import resolve
    from softmoe_cli.run import mirror
    from softmoe_cli.run.finished import finished, not_looked_at
    from softmoe_cli.run.identity import run_folder
    from softmoe_cli.stack.refused import check_stack

    identities: dict[str, str | None] = {}
    options = inquiry.options
    slots, threads = _share(options, {tree["device"] for _, _, tree in inquiry.jobs})
    sharers = max(Counter(slots[: len(inquiry.jobs)]).values(), default=1)  # jobs on one device at a time
    answers: list[Job | UsageError | RunError] = []
    for name, overrides, tree in inquiry.jobs:
        typed = [*overrides, *inquiry.said]
        try:
            seeded = "${seed}" in repr(tree)  # else a seed changes nothing but itself
            trees = {seed: copy.deepcopy(tree) | {"seed": seed} for seed in inquiry.seeds} if seeded else {}
            config, source = resolve(inquiry.command, tree, typed)
            mirror.check(config)
            settled, left = [], experts_left(source.weights) if source is not None else {}
            if config.train.precision == "auto":
                _require_device_known("train.precision", options, "fp32, bf16 or fp16")
                device, _ = arithmetic(config.device, "fp32", config.threads)
                precision, _ = fast_precision(device, config.model.backbone.width, mixture=config.model.mixture)
                config.train.precision = precision
                settled.append(f"train.precision={precision}")
            check_stack(config, options.seeds_at_once)  # now that the precision is known
            if config.train.batch_size == "auto":
                _require_device_known("train.batch_size", options, "a number")
                config = with_largest_batch(config, left, sharers * options.seeds_at_once)
                settled.append(f"train.batch_size={config.train.batch_size}")
            if config.devices > 1 and options.where != "slurm":
                raise UsageError(
                    f"devices={config.devices}: the jobs of a sweep have one device each; give them more with "
                    f"hydra/launcher=slurm hydra.launcher.gpus={config.devices}, or leave out -m"
                )
            if config.threads is None:
                own = max(1, threads // config.devices)
                config = replace(config, threads=own)
                settled.append(f"threads={own}")

            def place(config: Config, source: Any = source) -> Path:
                key = repr(config.data)
                if key not in identities:
                    identities[key] = identity(config.data)
                return run_folder(config, inquiry.command, source, identities[key])

            folders = {seed: place(replace(config, seed=seed)) for seed in inquiry.seeds if not seeded}
            for seed, other in trees.items():
                with_seed, _ = resolve(inquiry.command, other, typed)
                with_seed.train.batch_size, with_seed.train.precision = config.train.batch_size, config.train.precision
                folders[seed] = place(with_seed)
            priced = options.plan or options.limit.given or inquiry.seeds
            cost = _costs(config, left, times=options.plan) if priced else {}
            unknown = [key for key in options.limit.given if math.isnan(cost[key])]
            if unknown:
                raise UsageError(f"hydra.launcher.limit: train.minutes leaves {unknown[0]} open; give train.steps")
            words = [*overrides, *settled]
            added = (config.model.router_name != "dense") + 2 * (config.model.adapter.name != "none")
            folder = place(config)
            ended = finished(folder) if config.train.fewshot else None
            lacking = "" if ended is None else not_looked_at(config, ended, folder)
            answers.append(
                Job(name, words, folder, config.threads, cost, known(), folders, added, config.data, lacking)
            )
        except Exception as error:
            answers.append(ours(error) or RunError(defect(error)))
    return answers, slots


def _require_device_known(key: str, options: Launcher, instead: str) -> None:
    """Raises UsageError where `key`=auto is decided by a device that only a job on a cluster will see."""
    if options.where != "local":
        raise UsageError(
            f"{key}=auto depends on the device, which hydra/launcher={options.where} does not know yet; give {instead}"
        )


def _share(options: Launcher, devices: set[str]) -> tuple[list[str], int]:
    """The GPU of each job that may run at a time (an empty word: none of its own), and the threads of every job."""
    import torch

    from softmoe_cli.device import cores

    if isinstance(options, SlurmLauncher | RayLauncher):
        here = isinstance(options, SlurmLauncher) and options.cluster == "local"
        return [""] * (options.jobs or (max(1, cores() // options.cpus) if here else CLUSTER_JOBS)), options.cpus
    slots = [""] * (options.jobs or cores())
    if devices & {"auto", "cuda"} and torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        slots = [gpus[i % len(gpus)] for i in range(options.jobs or len(gpus))]
    elif devices & {"auto", "mps"} and torch.backends.mps.is_available():
        slots = [""] * (options.jobs or 1)
    return slots, max(1, cores() // len(slots))


_loaded: dict[str, Any] = {}

_priced: dict[str, tuple[Any, int]] = {}
"""Cost and peak of what has been asked already: jobs of a sweep that differ in seed or length share them."""

_timed: dict[str, tuple[float, float]] = {}


def _costs(config: Config, left: Mapping[int, Sequence[int]], *, times: bool) -> dict[str, float]:
    """What a job will cost, by formula; and how long, by a few steps of it on this machine. nan: cannot be known.
    `left`: the experts of its first weights, by block, where some were pruned."""
    from softmoe_cli.cost.clock import measure
    from softmoe_cli.cost.fit import require_place, training_cost
    from softmoe_cli.cost.load import Load
    from softmoe_cli.cost.memory import predict
    from softmoe_cli.data import sets
    from softmoe_cli.device import arithmetic, free_memory
    from softmoe_cli.train.pace import images_of_a_look, looks
    from softmoe_cli.train.progress import Budget
    from softmoe_cli.train.setup import require_batches

    t = config.train
    key = repr(config.data)
    if key not in _loaded:
        splits = sets.load(config.data)
        sizes = [len(images) for images in (splits.train, splits.validation, splits.test)]
        _loaded[key] = sets.num_classes(config.data, splits), *sizes
    classes, images, validation, test = _loaded[key]
    device, _ = arithmetic(config.device, t.precision, config.threads)
    require_place(config.optim, device, config.devices)
    load = Load.of(config, classes, device, left)
    key = repr((load, config.devices, config.parallel))
    if key not in _priced:
        parallel = "ddp" if config.parallel == "auto" else config.parallel
        _priced[key] = (
            training_cost(load),
            predict(load, config.devices, parallel).peak_bytes,
        )
    cost, peak = _priced[key]
    require_batches(config, cost)
    budget = Budget.of(config, images)
    step_s = image_s = math.nan
    # The clock can measure only this: one device, all weights there and trained, AdamW's moments in float32.
    whole = not config.optim.freeze and not left
    can_be_timed = config.devices == 1 and whole and config.optim.moments == "fp32"
    if times and can_be_timed and peak <= free_memory(device):
        timed = replace(load, optim=None, ema=False)
        key = repr(timed)
        if key not in _timed:
            try:
                timing = measure([timed], repeats=3)[0]
                _timed[key] = timing.train_step_ms / 1000, timing.latency_ms / 1000 / t.batch_size
            except UsageError:  # a job that fits with SGD may not fit with AdamW
                _timed[key] = math.nan, math.nan
        step_s, image_s = _timed[key]
    steps = budget.steps if budget.steps is not None else (budget.seconds or 0.0) / step_s
    look = images_of_a_look(t, validation, classes, routed=config.model.router_name != "dense")
    evaluated = looks(budget.total, t.eval_every, budget.steps) * look + test
    return {
        "params_m": cost.params / 1e6,
        "active_params_m": cost.active_params / 1e6,
        "forward_gflop": cost.forward_flop / 1e9,
        "train_gflop": cost.train_flop / 1e9,
        "train_pflop": steps * t.batch_size * cost.train_flop / 1e15,
        "peak_mib": peak / 2**20,
        "free_mib": free_memory(device) / 2**20,
        "seconds": (budget.seconds or steps * step_s) + evaluated * image_s,
    }
