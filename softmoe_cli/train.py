"""The loop, told once, top to bottom. Finetuning is this with other numbers and given weights."""

import math
import platform
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from softmoe_cli import data, mirror, parallel, rows
from softmoe_cli.config import WANDB_LETTERS, WAYS, Config, Data, check_tokens
from softmoe_cli.cost import Cost, account, on_meta
from softmoe_cli.device import (
    KEPT,
    Energy,
    arithmetic,
    compiled,
    free_memory,
    hardware,
    keep_freed_memory,
    precision_context,
    slower,
)
from softmoe_cli.errors import RunError, UsageError, first_line
from softmoe_cli.evaluate import classification_loss, evaluate, features, routing_statistics
from softmoe_cli.fewshot import check_shots, fewshot
from softmoe_cli.intervals import at_chance
from softmoe_cli.memory import Memory, largest_batch, predict_for, require_fit, require_place
from softmoe_cli.models import LoadReport, build, load_weights, patterns, portable, prepare
from softmoe_cli.moe.layer import MoE
from softmoe_cli.moe.routing import Routing, full_precision, routings
from softmoe_cli.optim import freeze, optimizer_of, restore, schedule, span, state_of
from softmoe_cli.pace import FirstSteps, Pace, forward_s, images_of_a_look, looks
from softmoe_cli.parallel import ALONE, Average, Crew, own_part, part_of
from softmoe_cli.record import (
    Checkpoint,
    Run,
    Source,
    flat_science,
    origin,
    random_state,
    read_moments,
    room_beside,
    set_random_state,
    signature,
)
from softmoe_cli.signals import ASKING, Asked, heard, leave_now, tell
from softmoe_cli.terminal import Screen
from softmoe_cli.text import count, flop, gibibytes, in_words, several

T = TypeVar("T")

SMALLEST_SCALE = 2.0**-14
"""fp16: gradients that are not finite even at this loss scale are not saved by a smaller one."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop, and the rest of a sweep with it."""


@dataclass
class Progress:
    """Where a run stands: all of it is in every checkpoint, and nothing else is needed but tensors."""

    step: int = 0
    compiled_steps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("device", "eval", "save", "compile"), 0.0))
    device_s: float = 0.0
    """Seconds of training, summed over the devices."""
    energy_j: float | None = 0.0
    loss_sum: float = 0.0
    aux_sum: float = 0.0
    loss_steps: int = 0
    logged: float = 0.0
    evaluated: float = 0.0
    best_step: int = 0
    best_top1_pct: float = -1.0
    validation: dict[str, Any] = field(default_factory=dict)

    def used(self, energy: float | None) -> None:
        """Adds the joules of a stretch; a stretch that no one measured leaves the sum unknown."""
        self.energy_j = None if energy is None or self.energy_j is None else self.energy_j + energy

    @property
    def spent(self) -> dict[str, float]:
        """Seconds by what they went into, and energy where the device tells."""
        energy = {} if self.energy_j is None else {"energy_kj": self.energy_j / 1000}
        return {f"{name}_s": s for name, s in (self.seconds | {"device": self.device_s}).items()} | energy

    @contextmanager
    def booked(self, what: str, devices: int = 1) -> Iterator[None]:
        """Books the time spent inside under `what`, so that training time is training only."""
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.seconds[what] += took
            self.device_s += took * devices * (what == "device")

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Progress":
        """As a checkpoint has it; one from before there were several devices speaks of one."""
        known = {key: value for key, value in state.items() if key in cls.__dataclass_fields__}
        return cls(**{"device_s": state["seconds"]["device"]} | known)


@dataclass(frozen=True)
class Budget:
    """How long: in updates, or in seconds of training."""

    steps: int | None
    seconds: float | None

    @classmethod
    def of(cls, config: Config, train_images: int) -> "Budget":
        t = config.train
        if t.minutes is not None:
            return cls(None, 60 * t.minutes)
        images = t.images if t.images is not None else train_images * (t.epochs or 0)
        return cls(t.steps if t.steps is not None else math.ceil(images / t.batch_size), None)

    @property
    def total(self) -> float:
        return self.steps if self.steps is not None else self.seconds or 0.0

    def position(self, progress: Progress) -> float:
        """In the unit of `total`."""
        return progress.step if self.steps is not None else progress.seconds["device"]

    def passed(self, before: float, now: float, every: float) -> bool:
        """Whether a multiple of the span `every`, or the end, lies in (before, now]."""
        interval = span(every, self.total)
        return now // interval > before // interval or (before < self.total <= now)

    def __str__(self) -> str:
        return several(self.steps, "step") if self.steps is not None else f"{self.total / 60:g} minutes"


def train(config: Config, command: str, source: Source | None, screen: Screen) -> dict[str, Any]:
    """Runs one configuration to its end, or from where it stopped, and returns its result row.

    Raises:
        UsageError: something in the configuration cannot work; nothing was written.
        RunError: the run broke; its folder holds the last good state.
        Interrupted: a signal asked to stop; the state is saved.
    """
    with parallel.joined(config) as crew:
        if not crew.first:
            screen = Screen(quiet=True)
        if config.train.batch_size == "auto":
            config = with_largest_batch(config, screen.say)
        images = images_identity(config.data, crew)
        run = Run(run_folder(config, command, source, images), crew)
        if run.result is not None:
            screen.say(f"{run.folder} is finished; nothing to do")
            _close(screen, run.result, run.folder)
            return run.result
        try:
            return _train(run, config, command, source, images, screen, crew)
        finally:
            data.end_workers()  # they share the folder's lock
            run.close()


def images_identity(settings: Data, crew: Crew) -> str | None:
    """`data.identity`, for which the first process of each machine reads the images, and no other one.

    Raises:
        UsageError: the images cannot be used, or are others on another machine.
    """
    found = crew.gather(data.identity(settings) if crew.local_rank == 0 else None)
    digests = {digest for digest in found if digest is not None}
    if len(digests) > 1:
        raise UsageError(f"data.root={settings.root} holds other images on one machine than on another")
    return next(iter(digests), None)


def _train(
    run: Run,
    config: Config,
    command: str,
    source: Source | None,
    images_digest: str | None,
    screen: Screen,
    crew: Crew,
) -> dict[str, Any]:
    """The loop: data, cost, model, weights, then steps, looks and checkpoints until the budget is used up."""
    device, autocast = arithmetic(config.device, config.train.precision, config.threads)
    require_place(config.optim, device, crew.size)
    share = crew.share(config)
    with crew.in_turn():
        splits = data.load(config.data)
    classes = _num_classes(config, splits)
    notes = check_shots(splits.train.labels, config.train.fewshot, "train.fewshot") if config.train.fewshot else []
    budget = Budget.of(config, len(splits.train))
    learning_rate = schedule(config.optim, budget.total)
    crew.way, crew.why = _way(config, classes, device, crew)
    if crew.way != "ddp":
        autocast = precision_context(device.type, config.train.precision, cached=False)
    cost = account(
        config.model, classes, batch=_part(config), recompute=config.train.recompute, frozen=config.optim.freeze
    )
    check_tokens(config, cost.tokens)
    screen.table(command, _header(config, cost, splits, budget, device, run.folder, crew))
    for note in notes:
        screen.row("few-shot", note)
    memory = require_fit(config, classes, device, crew.size, crew.local_size, crew.way)
    kept = keep_freed_memory(device, memory.peak_bytes, free_memory(device) // crew.local_size)
    screen.row("memory", _memory(memory, device, kept))

    with crew.one_by_one():
        torch.manual_seed(config.seed)
        model = build(config.model, classes)
        freeze(model, config.optim.freeze)
        loaded = _load_source(model, source, config, splits.classes, screen) if source is not None else LoadReport()
        prepare(model, device, config.train.precision)
        model.set_grad_checkpointing(config.train.recompute)
        ema = Average(model, decay=config.train.ema) if config.train.ema is not None else None
        for each in (model, ema.module) if ema is not None else (model,):
            crew.spread(each, config, device)
    optimizer = optimizer_of(model, config.optim)
    if source is not None:
        _carry_moments(model, optimizer, source, loaded, config, screen)
    scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")

    config = replace(config, devices=crew.size)  # under torchrun it may not say
    run.open(config)
    progress = _resume(run, model, ema, optimizer, scaler, screen, crew)
    pace = _pace(model, device, autocast, config, cost, splits) if crew.size == 1 else None
    if pace is not None:
        guess = "from a forward pass and FLOPs" + ", decoding not counted" * (splits.train.images is None)
        screen.row("time", f"{_left(pace, budget, progress, config)}; {guess}")
    energy = Energy(device)
    batches = data.train_batches(
        splits.train,
        config.data,
        config.augment,
        image_size=config.model.image_size,
        in_chans=config.model.in_chans,
        num_classes=classes,
        batch_size=config.train.batch_size,
        label_smoothing=config.train.label_smoothing,
        seed=config.seed,
        first_step=progress.step,
        device=device,
        rows=share.rows(config.train.accumulate),
    )
    card: dict[str, Any] = {
        "model": portable(config.model, model),
        "data": asdict(config.data),
        "classes": splits.classes,
    }
    card |= {"loss": config.train.loss, "precision": config.train.precision}
    made = origin(command, flat_science(config) | {"data.identity": images_digest}, source)
    evaluated = ema.module if ema is not None else model
    moe_blocks = [i for i, block in enumerate(model.blocks) if isinstance(block.mlp, MoE)]
    routers = [model.blocks[i].mlp.router for i in moe_blocks]
    settling = [  # others are frozen
        router for router in routers if not (own := list(router.parameters())) or any(p.requires_grad for p in own)
    ]
    wandb_run = mirror.Mirror(
        mirror.resolve(config.tracking) if crew.first else "off",
        _wandb_settings(config, command, run),
        run.folder,
        run.rows("metrics.jsonl") if crew.first else [],
        screen.say,
    )

    def row(split: str, values: Mapping[str, float | None]) -> dict[str, Any]:
        images = progress.step * config.train.batch_size
        full = {"step": progress.step, "images": images, "epoch": images / len(splits.train), "split": split, **values}
        progress.used(crew.joules(energy.used(), device))
        full |= {"train_pflop": images * cost.train_flop / 1e15, **progress.spent}
        run.append("metrics.jsonl", full)
        wandb_run.row(full)
        return full

    def turns_of(images: data.ImageSet) -> parallel.Turns:
        return crew.turns(len(images), config.train.eval_batch_size)

    def held_out(images: data.ImageSet, turns: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        return data.eval_batches(
            images,
            config.data,
            image_size=config.model.image_size,
            in_chans=config.model.in_chans,
            batch_size=config.train.eval_batch_size,
            device=device,
            turns=turns,
        )

    def look(split: str, images: data.ImageSet, beside: dict[str, float]) -> dict[str, Any]:
        with progress.booked("eval"):
            turns = turns_of(images)
            batches = stop.watch(held_out(images, turns.own))
            values = dict(
                evaluate(evaluated, batches, loss=config.train.loss, autocast=autocast, collect=turns.collect)
            )
        if not math.isfinite(values["loss"]):
            raise exploded(f"{split} loss {values['loss']}")
        return row(split, values | beside)

    def exploded(what: str) -> RunError:
        return RunError(
            f"{what} at step {progress.step:,}: the last update left weights that are too large or not finite; lower "
            "optim.lr or set optim.clip_norm, and type the command again"
        )

    def few_shots() -> dict[str, float]:
        """Of shots drawn with the seed of the data's cut, so that every run of a study has the same."""

        def seen_by_head(images: data.ImageSet) -> Tensor:
            turns = turns_of(images)
            found = features(evaluated, stop.watch(held_out(images, turns.own)), autocast, turns.collect)
            if not found.isfinite().all():
                raise exploded("features that are not finite")
            return found

        numbers = fewshot(
            seen_by_head, config.train.fewshot, splits.train, splits.validation, None, len(splits.classes),
            config.data.split_seed,
        )  # fmt: skip
        return {key: value for key, value in numbers if key.endswith("top1_pct")}

    def look_at_validation() -> dict[str, Any]:
        """Routing statistics of every MoE layer on the first images, the same ones each time, go into routing.jsonl;
        their means over layers, which are few enough for W&B, into the validation row, beside few-shot quality."""
        with progress.booked("eval"):
            layers = routing_statistics(evaluated, next(held_out(splits.validation, [0])), autocast)
            shots = few_shots() if config.train.fewshot else {}
        keys = layers[0] if layers else ()
        means = {f"routing_{key}": sum(layer[key] for layer in layers) / len(layers) for key in keys}
        validation = look("validation", splits.validation, means | shots)
        for block, numbers in zip(moe_blocks, layers, strict=True):  # last, so that a stop leaves all rows or none
            run.append("routing.jsonl", {"step": progress.step, "block": block, **numbers})
        return validation

    def save(kind: str, *, end: bool = False) -> None:
        with progress.booked("save"):
            progress.used(crew.joules(energy.used(), device))
            weights = {key: value.contiguous() for key, value in evaluated.state_dict().items()}
            training = {} if kind == "best" else _training_state(model, ema, optimizer)
            # The best's step is chance, as the last one's is where minutes are the budget.
            at = "best" if kind == "best" else "end" if end or progress.step == budget.steps else progress.step
            run.save(
                kind,
                progress.step,
                weights,
                training,
                asdict(progress) | {"scaler": scaler.state_dict()},
                card | {"origin": f"{made}-{at}", "train_pflop": _pflop_in_all(config, source, cost, progress)},
                end=end,
            )

    forward = crew.prepare(model.train())
    if config.train.compile:
        forward = compiled(forward)
    saved_at, save_took, first_step = time.monotonic(), 0.0, progress.step
    first_steps = FirstSteps(progress.seconds["device"])

    def tell_pace() -> None:
        if (step_s := first_steps.step_s()) is not None:
            now = pace.at(step_s) if pace is not None else Pace(step_s, None, None)
            screen.say(f"{in_words(step_s)} a step: {_left(now, budget, progress, config)}")

    with Stop(crew) as stop, routings(model) as seen, screen:
        try:
            while True:
                here = budget.position(progress)
                if budget.passed(progress.evaluated, here, config.train.eval_every):
                    tell_pace()
                    seen_now = look_at_validation()
                    better = seen_now["top1_pct"] > progress.best_top1_pct
                    screen.evaluation(seen_now, "best" if better else "")
                    progress.evaluated, progress.validation = here, seen_now
                    if better:
                        progress.best_step, progress.best_top1_pct = progress.step, seen_now["top1_pct"]
                        save("best")
                    model.train()
                if here >= budget.total:
                    break
                if screen.console.unread:
                    stop.name = stop.name or "SIGPIPE"
                stop.check()
                rest = max(config.train.save_seconds, 50 * save_took) - (time.monotonic() - saved_at)
                if crew.most(rest if run.idle else math.inf) < 0:
                    start = time.monotonic()
                    save("last")
                    saved_at, save_took = time.monotonic(), time.monotonic() - start

                compiles = config.train.compile and progress.step == first_step
                with progress.booked("compile" if compiles else "device", crew.size):
                    lr, scale = learning_rate(here), scaler.get_scale()
                    x, targets = next(batches)
                    loss, aux, norm = update(
                        model, forward, x, targets, config, lr, optimizer, scaler, autocast, seen, crew
                    )
                    updated = math.isfinite(loss) and math.isfinite(norm)
                    rescaling = math.isfinite(loss) and SMALLEST_SCALE < scaler.get_scale() < scale
                    if not updated and not rescaling:
                        raise RunError(_blame(model, x, targets, config, autocast, progress.step, loss, norm))
                    for router in settling:
                        for numbers in router.counted():
                            if updated:
                                crew.add(numbers)
                            else:
                                numbers.zero_()
                        if updated:
                            router.after_update()
                    if updated and ema is not None:
                        ema.update(model)
                if budget.steps is None:
                    progress.seconds["device"] = crew.most(progress.seconds["device"])
                progress.step += 1
                progress.compiled_steps += compiles
                if first_steps.add(progress.seconds["device"]):
                    tell_pace()
                progress.loss_sum, progress.aux_sum = progress.loss_sum + loss, progress.aux_sum + aux
                progress.loss_steps += 1
                now = budget.position(progress)
                timed = progress.step - progress.compiled_steps
                images_per_s = timed * config.train.batch_size / max(progress.seconds["device"], 1e-9)
                screen.step(now / budget.total, loss, lr, images_per_s)
                if budget.passed(progress.logged, now, config.train.log_every):
                    steps = progress.loss_steps
                    means = {"loss": progress.loss_sum / steps, "aux_loss": progress.aux_sum / steps}
                    beside = {"lr": lr, "grad_norm": norm if updated else None, "images_per_s": images_per_s}
                    row("train", means | beside)
                    progress.logged, progress.loss_sum, progress.aux_sum, progress.loss_steps = now, 0.0, 0.0, 0
            save("last", end=True)  # before the test row: should the run die in between, that alone is done again
            test = look("test", splits.test, {})
            screen.evaluation(test)
            with progress.booked("save"):
                run.settle()
        except (Interrupted, data.WorkersError, UsageError) as error:  # an image that cannot be read
            if isinstance(error, Interrupted) or (crew.size == 1 and progress.step > first_step):
                save("last")
                run.settle()
            wandb_run.close(None)
            raise
        except torch.OutOfMemoryError as error:
            wandb_run.close(None)
            raise RunError(
                f"out of memory at step {progress.step:,} ({first_line(error)}); lower train.batch_size, "
                "raise train.accumulate or set train.recompute=true"
            ) from error
        except BaseException:
            wandb_run.close(None)
            raise
    router = card["model"]["router"]
    result = _result(
        config, command, run, source, cost, memory, splits, test, progress, device, router, moe_blocks, crew
    )
    result["data.identity"] = images_digest
    run.finish(result)
    wandb_run.close(result)
    _close(screen, result, run.folder)
    return result


def update(
    model: VisionTransformer,
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    targets: Tensor,
    config: Config,
    lr: float,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    autocast: torch.autocast,
    seen: list[Routing],
    crew: Crew = ALONE,
) -> tuple[float, float, float]:
    """One update on one batch, computed in `accumulate` equal parts whose gradients add up to the whole batch's; of
    several processes each has its share of every part.

    Returns the mean loss over images without and the auxiliary loss, and the gradients' norm before clipping.
    The weights stay as they were, and the gradients can be looked at, when loss or norm is not finite; where only the
    norm is, a scaler then lowers its scale.
    """
    optimizer.zero_grad(set_to_none=True)  # of an update that was not made
    parts, share = config.train.accumulate, crew.share(config)
    total = torch.zeros(2, device=x.device)
    with autocast:  # around all parts: a weight that it has cast once stays cast until the update
        for part, (part_x, part_targets) in enumerate(zip(x.chunk(parts), targets.chunk(parts), strict=True), start=1):
            seen.clear()
            with crew.passing(forward, share, last=part == parts):
                logits = forward(part_x)
                with full_precision(x):
                    loss = classification_loss(logits, part_targets, config.train.loss) * share.of_images / parts
                    aux = sum((routing.aux_loss for routing in seen), loss.new_zeros(())) * share.of_groups / parts
                    total += torch.stack([loss.detach(), aux.detach()])
                    scaler.scale(loss + aux).backward()
    seen.clear()
    crew.add(total)
    scaler.unscale_(optimizer)
    norm = crew.norm(model)
    if config.optim.clip_norm is not None:
        gradients = [own_part(p.grad) for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, (config.optim.clip_norm / (norm + 1e-6)).clamp(max=1.0))
    main, aux_loss, norm_value = torch.cat([total, norm.reshape(1)]).tolist()
    if math.isfinite(main) and (math.isfinite(norm_value) or scaler.is_enabled()):
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if math.isfinite(norm_value):  # else not even a call: a first one would leave moments that were never written
            scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)  # now, so that looks and checkpoints find their memory free
        scaler.update()
    return main, aux_loss, norm_value


class Stop(Asked):
    """SIGTERM, SIGINT and SIGUSR1 ask the run to save and leave, whichever process they reach; a second SIGINT or
    SIGTERM leaves at once, whatever torch is doing."""

    def __init__(self, crew: Crew = ALONE) -> None:
        super().__init__()
        self._crew = crew
        self._checked, self._step_s = time.monotonic(), 0.0

    def __enter__(self) -> "Stop":
        self._heard = heard(ASKING, self.hear)
        self._heard.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._heard.__exit__(*error)

    def hear(self, number: int) -> None:
        first = self.name is None
        if self.again(number):
            leave_now("\nleft at once; the same command goes on from the last checkpoint\n")
        if first and self._crew.first:
            so_far = time.monotonic() - self._checked
            words = ""
            if max(so_far, self._step_s) >= 1:
                last = f", the one before {self._step_s:.0f} s" if self._step_s >= 1 else ""
                words = f" after this step, which has taken {so_far:.0f} s so far{last}"
            tell(
                f"\n{self.name}: saving and leaving{words}; press Ctrl-C again to leave at once, from the last "
                "checkpoint\n"
            )

    def check(self) -> None:
        now = time.monotonic()
        self._checked, self._step_s = now, now - self._checked
        number = self._crew.most(signal.Signals[self.name] if self.name is not None else 0)
        if number:
            raise Interrupted(signal.Signals(int(number)).name)

    def watch(self, items: Iterable[T]) -> Iterator[T]:
        for item in items:
            self.check()
            yield item


def with_largest_batch(config: Config, say: Callable[[str], None], sharers: int = 1) -> Config:
    """The configuration with `train.batch_size=auto` settled, so that the signature knows the number. `sharers`: runs
    that will be on the device at a time."""
    device, _ = arithmetic(config.device, config.train.precision, config.threads)
    require_place(config.optim, device)
    splits = data.load(config.data)
    batch = largest_batch(config, _num_classes(config, splits), device, len(splits.train), sharers)
    say(f"train.batch_size=auto: {batch}; type train.batch_size={batch} to have the same run elsewhere")
    return replace(config, train=replace(config.train, batch_size=batch)).settled()


def _pace(
    model: VisionTransformer,
    device: torch.device,
    autocast: torch.autocast,
    config: Config,
    cost: Cost,
    splits: data.Splits,
) -> Pace:
    """What a forward pass says of the updates and evaluations to come: an update takes as many times longer as it has
    FLOPs."""
    image_s = forward_s(model, device, autocast, config.model.image_size, cost.forward_flop, _part(config))
    routed = any(isinstance(block.mlp, MoE) for block in model.blocks)
    look = images_of_a_look(config.train, len(splits.validation), len(splits.classes), routed=routed)
    step_s = config.train.batch_size * image_s * cost.train_flop / cost.forward_flop
    return Pace(step_s, look * image_s, len(splits.test) * image_s)


def _left(pace: Pace, budget: Budget, progress: Progress, config: Config) -> str:
    """How long the rest of the budget takes."""
    rest = max(0.0, budget.total - budget.position(progress))
    steps, training_s = (rest, rest * pace.step_s) if budget.steps is not None else (rest / pace.step_s, rest)
    evaluations = looks(budget.total, config.train.eval_every, budget.steps, progress.evaluated)
    return pace.said(steps=steps, training_s=training_s, evaluations=evaluations)


def _way(config: Config, classes: int, device: torch.device, crew: Crew) -> tuple[str, str]:
    """What each process shall have of the model (one of `config.WAYS`), and why: as the configuration says, or the
    first way that fits on every device; where none does, the one that needs least.

    Raises:
        UsageError: it cannot be as the configuration has it.
    """
    if crew.size == 1:
        return "ddp", ""
    if config.parallel != "auto":
        if (fault := _obstacle(config.parallel, config, classes, crew)) is not None:
            raise UsageError(f"parallel={config.parallel} {fault}")
        return config.parallel, f"parallel={config.parallel}"
    free = free_memory(device) // (crew.local_size if device.type == "cpu" else 1)
    tried: dict[str, int] = {}
    for way in WAYS:
        if _obstacle(way, config, classes, crew) is None:
            memory = predict_for(config, classes, device, crew.size, way)
            tried[way] = memory.state_bytes if config.train.compile else memory.peak_bytes
            if crew.most(tried[way] - free) <= 0:
                break
    way = min(tried, key=lambda way: tried[way])
    others = [f"{other} needs {gibibytes(needed)}" for other, needed in tried.items() if other != way]
    return way, f"auto: {', '.join(others) or 'it fits'}"


def _obstacle(way: str, config: Config, classes: int, crew: Crew) -> str | None:
    """Why a run cannot go that way, if it cannot."""
    if way == "ddp":
        return None
    if config.train.precision == "fp16":
        return "has no loss scale for train.precision=fp16; use bf16 or parallel=ddp"
    if config.optim.moments == "8bit":
        return "divides moments in fp32, not with optim.moments=8bit; set that to fp32, or parallel=ddp"
    if way == "fsdp":
        return None
    layers = [module for module in on_meta(config.model, classes).modules() if isinstance(module, MoE)]
    if not layers:
        return "divides the experts, and model/router=dense has none; use parallel=fsdp"
    experts = layers[0].router.num_experts
    if experts < crew.size:
        return f"cannot divide {experts} experts over {crew.size} processes; use parallel=fsdp or fewer devices"
    return None


def _part(config: Config) -> int:
    return config.train.batch_size // config.train.accumulate


def run_folder(config: Config, command: str, source: Source | None, images_digest: str | None) -> Path:
    """Where a run on these images (`data.identity`) goes."""
    name = config.name or f"{config.model.name}-{config.data.name}"
    mark = signature(config, command, source.digest if source else None, images_digest)
    return Path(config.output_root) / config.study / f"{name.replace('/', '_')}-{mark}"


def _num_classes(config: Config, splits: data.Splits) -> int:
    return config.data.num_classes or len(splits.classes)


def _load_source(
    model: VisionTransformer, source: Source, config: Config, classes: list[str], screen: Screen
) -> LoadReport:
    report = load_weights(
        model,
        source.weights,
        keep_head=source.card.get("classes") == classes
        and getattr(source.weights.get("head.weight"), "shape", None) == model.head.weight.shape,
        allow_unexpected=config.allow_unexpected,
        resize_slots=config.slots == "proportional",
    )
    slots = {block.mlp.router.slots_per_expert for block in model.blocks if isinstance(block.mlp, MoE)}
    before = source.card.get("model", {}).get("router", {}).get("slots_per_expert")
    parts = dict.fromkeys(name.partition(".")[0] for name in report.loaded)
    rows = {"from": source.label, "loaded": f"{len(report.loaded)} tensors in {', '.join(parts) or 'nothing'}"}
    rows |= {"resized": ", ".join(report.resized) or "none", "new": ", ".join(report.new) or "none"}
    rows |= {"unexpected": ", ".join(report.unexpected) or "none"}
    if slots:
        where = ", as in the checkpoint"
        if before and slots != {before}:
            why = " in proportion to the tokens" if config.slots == "proportional" else ""
            where = f"{why}; {before} in the checkpoint"
        rows["slots"] = f"{', '.join(str(p or 'any') for p in slots)} per expert{where}"
    screen.table("weights", rows)
    return report


def _carry_moments(
    model: VisionTransformer,
    optimizer: torch.optim.Optimizer,
    source: Source,
    report: LoadReport,
    config: Config,
    screen: Screen,
) -> None:
    """Starts the optimizer where softmoe upcycle says that the source's stood: for every trained weight that was taken
    as it is, its moments and its count of steps."""
    carried = source.card.get("receipt", {}).get("optimizer")
    if carried is None:
        return
    if config.optim.name != "adamw" or config.optim.moments == "8bit":
        other = "8-bit ones" if config.optim.name == "adamw" else f"{config.optim.name}'s"
        screen.row("optimizer", f"starts afresh: the checkpoint's moments are AdamW's in fp32, not {other}")
        return
    found = read_moments(source, carried["digest"])
    fresh = []
    for name, parameter in model.named_parameters():
        state = found.get(name, {}) if name in report.loaded else {}
        if parameter.requires_grad and state:
            restore(optimizer, parameter, state)
        elif parameter.requires_grad:
            fresh.append(name)
    steps = max((int(state["step"]) for state in optimizer.state.values()), default=0)
    begin = f"; {', '.join(patterns(fresh))} start at zero" if fresh else ""
    screen.row("optimizer", f"goes on: moments of {len(optimizer.state)} tensors after {steps:,} steps{begin}")


def _training_state(model: nn.Module, ema: Average | None, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What resuming needs beside the evaluated weights: optimizer moments by parameter name, random states, and
    the weights themselves where an average of them is what is evaluated."""
    tensors = random_state()
    if ema is not None:
        tensors |= {f"weights.{key}": value for key, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in state_of(optimizer, parameter).items():
            tensors[f"optimizer.{name}.{key}"] = value
    return tensors


def _resume(
    run: Run,
    model: nn.Module,
    ema: Average | None,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    screen: Screen,
    crew: Crew,
) -> Progress:
    """Puts everything back as the last good checkpoint has it; a fresh start where there is none."""
    path, notes = crew.ask_first(run.newest)
    for note in notes:
        screen.say(note)
    checkpoint = Checkpoint.read(path) if path is not None else None
    if checkpoint is not None:
        checkpoint.check()
    run.rewind(checkpoint.state["sizes"] if checkpoint else {})
    if checkpoint is None:
        return Progress()
    raw = {k.removeprefix("weights."): v for k, v in checkpoint.training.items() if k.startswith("weights.")}
    _restore_weights(model, raw or checkpoint.weights)
    if ema is not None:
        _restore_weights(ema.module, checkpoint.weights)
    _restore_moments(model, optimizer, checkpoint)
    scaler.load_state_dict(checkpoint.state["scaler"])
    set_random_state(checkpoint.training)
    screen.say(f"going on from step {checkpoint.state['step']:,} ({checkpoint.path})")
    return Progress.of(checkpoint.state)


def _restore_weights(model: nn.Module, whole: dict[str, Tensor]) -> None:
    own = model.state_dict()
    odd = own.keys() ^ whole.keys() or {key for key in own if own[key].shape != whole[key].shape}
    if odd:
        raise UsageError(
            f"the checkpoint to go on from is of another model ({min(odd)}); remove it to go on from the one before"
        )
    model.load_state_dict({key: part_of(value, own[key]) for key, value in whole.items()})


def _restore_moments(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        found = {k.removeprefix(prefix): v for k, v in checkpoint.training.items() if k.startswith(prefix)}
        restore(optimizer, parameter, found)


def _blame(
    model: VisionTransformer,
    x: Tensor,
    targets: Tensor,
    config: Config,
    autocast: torch.autocast,
    step: int,
    loss: float,
    norm: float,
) -> str:
    """Says where a loss or gradient first stopped being finite, by going through the same batch again."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    hooks = [m.register_forward_hook(look(name)) for name, m in model.named_modules() if not list(m.children())]
    hooks += [m.register_forward_hook(look(name)) for name, m in model.named_modules() if isinstance(m, MoE)]
    with torch.no_grad(), autocast:
        model(x)
    for hook in hooks:
        hook.remove()
    gradients = [n for n, p in model.named_parameters() if p.grad is not None and not own_part(p.grad).isfinite().all()]
    where = f"first in the output of {found[0]}" if found else f"in the gradient of {(gradients or ['the loss'])[-1]}"
    images = step * config.train.batch_size
    return (
        f"loss {loss} and gradient norm {norm} at step {step:,} (batch of images {images:,} to "
        f"{images + len(x) - 1:,} of the stream; input {'finite' if x.isfinite().all() else 'not finite'}): not finite "
        f"{where}. The update was not made; lower optim.lr, or set optim.clip_norm or train.precision=fp32"
    )


def _wandb_settings(config: Config, command: str, run: Run) -> dict[str, Any]:
    w = config.wandb
    return {
        "id": run.folder.name.rpartition("-")[2],
        "project": w.project,
        "entity": w.entity,
        "group": w.group or config.study,
        "job_type": command,
        "tags": w.tags,
        "name": w.name or run.folder.name[-WANDB_LETTERS:],
        "config": asdict(config),
    }


def _header(
    config: Config,
    cost: Cost,
    splits: data.Splits,
    budget: Budget,
    device: torch.device,
    folder: Path,
    crew: Crew,
) -> dict[str, str]:
    m, t = config.model, config.train
    router = m.router_name
    if router != "dense":
        options = ", ".join(f"{k}={v}" for k, v in m.router.items() if k != "_target_" and v is not None)
        router += f" ({options}) in blocks {m.moe_blocks}; {cost.slots_per_token:.2f} slots per token"
    sizes = f"{len(splits.train):,} train / {len(splits.validation):,} validation / {len(splits.test):,} test"
    parts = f" in {t.accumulate} parts" if t.accumulate > 1 else ""
    compiled = ", compiled" if t.compile else ""
    frozen = f", {count(cost.frozen_params)} frozen" if cost.frozen_params else ""
    extra = {"optimizer": _optimizer(config), "regularised by": _regularisation(config)}
    return {
        "model": f"{m.backbone.name}, {m.image_size} px, {cost.tokens:,} tokens",
        "router": router,
        "parameters": f"{count(cost.params)} total, {count(cost.active_params)} active per token{frozen}",
        "cost per image": f"{flop(cost.forward_flop)} forward, {flop(cost.train_flop)} training",
        "data": f"{config.data.name}: {sizes} images, {len(splits.classes)} classes",
        **splits.notes,
        "budget": f"{budget}, {t.batch_size} images each{parts}; {config.optim.schedule}, lr {config.optim.lr:g}",
        **{key: value for key, value in extra.items() if value},
        "device": f"{_hardware(device, crew)}, {t.precision}{slower(device, t.precision)}{compiled}",
        **({"processes": crew.describe(config)} if crew.size > 1 else {}),
        "folder": str(folder),
    }


def _hardware(device: torch.device, crew: Crew) -> str:
    return f"{crew.size} x {hardware(device)}" if crew.size > 1 else hardware(device)


def _optimizer(config: Config) -> str:
    """What is not AdamW on everything alike."""
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


def _memory(memory: Memory, device: torch.device, kept: bool) -> str:
    """`kept`: freed memory is, which then takes room too."""
    free, copy = free_memory(device), memory.state_bytes - memory.gradient_bytes
    copied = device.type == "cpu" and room_beside(copy, free - memory.peak_bytes)
    return (
        f"{gibibytes(memory.peak_bytes)} at the peak (weights, gradients, moments {gibibytes(memory.state_bytes)}; "
        f"activations {gibibytes(memory.activation_bytes)}) of {gibibytes(free)} free"
        + f"; up to {gibibytes(round(KEPT * memory.peak_bytes))} with freed memory that is kept for speed"
        * kept
        + f"; {gibibytes(memory.beside_bytes)} of moments in the machine's memory, up to twice that while a checkpoint "
        "is written" * bool(memory.beside_bytes) + f"; {gibibytes(copy)} more while a checkpoint is written" * copied
    )


def _result(
    config: Config,
    command: str,
    run: Run,
    source: Source | None,
    cost: Cost,
    memory: Memory,
    splits: data.Splits,
    test: dict[str, Any],
    progress: Progress,
    device: torch.device,
    router: dict[str, Any],
    moe_blocks: list[int],
    crew: Crew,
) -> dict[str, Any]:
    """One flat row: what it was, what it reached on the test images with its last weights, what it cost, and every
    scientific setting as `section.key`, so that rows alone tell which runs differ in what."""
    m, images = config.model, progress.step * config.train.batch_size
    return {
        "name": run.folder.name,
        "signature": run.folder.name.rpartition("-")[2],
        "study": config.study,
        "command": command,
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
        "train_images": len(splits.train),
        "test_images": test["images_evaluated"],
        "classes": len(splits.classes),
        "chance_pct": _commonest_pct(splits.test),
        "top1_pct": test["top1_pct"],
        "top5_pct": test["top5_pct"],
        "loss": test["loss"],
        "nll": test["nll"],
        "ece_pct": test["ece_pct"],
        "validation_top1_pct": progress.validation["top1_pct"],
        "validation_loss": progress.validation["loss"],
        **{f"validation_{key}": value for key, value in progress.validation.items() if key.startswith("fewshot_")},
        "best_validation_top1_pct": progress.best_top1_pct,
        "best_step": progress.best_step,
        "steps": progress.step,
        "images": images,
        "epochs": images / len(splits.train),
        "batch_size": config.train.batch_size,
        "lr": config.optim.lr,
        "precision": config.train.precision,
        "params_m": cost.params / 1e6,
        "active_params_m": cost.active_params / 1e6,
        "forward_gflop": cost.forward_flop / 1e9,
        "train_gflop": cost.train_flop / 1e9,
        "peak_mib": memory.peak_bytes / 2**20,
        "train_pflop": images * cost.train_flop / 1e15,
        **progress.spent,
        "devices": crew.size,
        "parallel": crew.way if crew.size > 1 else None,
        "hardware": _hardware(device, crew),
        "torch": torch.__version__,
        "softmoe": version("softmoe-cli"),
        "commit": _commit(),
        "python": platform.python_version(),
        "checkpoint.train_pflop": source.train_pflop if source else None,
        "checkpoint.digest": source.digest if source else None,
        "checkpoint.origin": source.card.get("origin", source.digest) if source else None,
        **flat_science(config),
    }


def _pflop_in_all(config: Config, source: Source | None, cost: Cost, progress: Progress) -> float | None:
    """Of training that a checkpoint stands on, what it began with included; None where that does not say."""
    before = source.train_pflop if source else 0.0
    own = progress.step * config.train.batch_size * cost.train_flop / 1e15
    return None if before is None else before + own


def _commonest_pct(images: data.ImageSet) -> float:
    """The share of the class that most images have: what always the same answer reaches."""
    return 100 * int(images.labels.bincount().max()) / len(images)


def _commit() -> str | None:
    """The commit of a checkout, marked when it had changes; None for an installed wheel."""
    here = Path(__file__).resolve().parents[1]
    if not (here / ".git").exists():
        return None
    try:
        told = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
    except OSError:  # a machine without git
        return None
    return told.stdout.strip() or None


def _close(screen: Screen, result: dict[str, Any], folder: Path) -> None:
    """The closing table, and what may be typed next: lines of their own, to be copied whole."""
    screen.table("result", _shown(result, folder))
    screen.table("next", {})
    screen.say(f"  softmoe evaluate checkpoint={shlex.quote(str(folder))}")
    screen.say(f"  softmoe compare {shlex.quote(str(folder.parent))}")


def _shown(result: dict[str, Any], folder: Path) -> dict[str, str]:
    rows = {
        "test top-1": f"{result['top1_pct']:.2f}%  ({result['test_images']:,} images, read once, last weights)",
        "chance": chance(result),
        "test top-5": f"{result['top5_pct']:.2f}%" if result["classes"] > 5 else "",
        "test loss": f"{result['loss']:.4f}",
        "validation top-1": f"{result['validation_top1_pct']:.2f}%  (best {result['best_validation_top1_pct']:.2f}% "
        f"at step {result['best_step']:,})",
        "routing": still_uniform(result, folder / "routing.jsonl"),
        "trained on": f"{result['images']:,} images, {result['epochs']:.1f} epochs, {result['steps']:,} steps",
        "training cost": f"{flop(1e15 * result['train_pflop'])}, {in_words(result['device_s'])}"
        + (f"; {result['energy_kj']:.4g} kJ in all" if result.get("energy_kj") is not None else ""),
        "beside it": f"evaluation {in_words(result['eval_s'])}, saving {in_words(result['save_s'])}"
        + f", compilation {in_words(result['compile_s'])}" * bool(result["compile_s"]),
        "folder": str(folder),
    }
    return {key: value for key, value in rows.items() if value}


def chance(result: dict[str, Any]) -> str:
    """A sentence where top-1 on the test images could be what an answer that never changes has: always the class that
    most of them are of."""
    if not at_chance([result["top1_pct"]], result["chance_pct"], result["test_images"]):
        return ""
    return (
        f"top-1 cannot be told from chance: always the commonest of {result['classes']} classes is right for "
        f"{result['chance_pct']:.1f}% of these {result['test_images']:,} images"
    )


UNIFORM = 1.5
"""A mean largest share below so many times the uniform one counts as almost uniform."""


def still_uniform(result: dict[str, Any], file: Path) -> str:
    """A sentence where the last look found the slots of a learned soft router almost alike in all tokens."""
    try:
        found = rows.lines(file, rows.ROUTING)
    except FileNotFoundError:
        return ""
    except rows.Unreadable as error:
        return f"{file} {error}"
    keys = ("scale", "dispatch_max", "dispatch_min")
    last = [row for row in found if row["step"] == found[-1]["step"] and all(row.get(key) is not None for key in keys)]
    last = [row for row in last if row["dispatch_max"] > 1.001 * row["dispatch_min"]]  # else uniform by design
    if not last:
        return ""
    largest, uniform = sum(row["dispatch_max"] for row in last) / len(last), 1 / result["tokens"]
    if largest >= UNIFORM * uniform:
        return ""
    return (
        f"still almost uniform: a slot's largest share of a token is {largest:.4f} in the mean, and {uniform:.4f} "
        "where all tokens are mixed alike"
    )
