"""The loop, told once, top to bottom. Finetuning is this with other numbers and given weights."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from softmoe_cli.config.run import Config, check_tokens
from softmoe_cli.cost.fit import require_place, settle, training_cost
from softmoe_cli.cost.load import Load
from softmoe_cli.data import batches, sets, workers
from softmoe_cli.data.batches import Batch
from softmoe_cli.device import (
    arithmetic,
    compiled,
    compiling_alone,
    free_memory,
    keep_freed_memory,
    precision_context,
)
from softmoe_cli.errors import UsageError
from softmoe_cli.evaluate.fewshot import check_shots
from softmoe_cli.evaluate.quality import classification_loss
from softmoe_cli.model.tasks import valid_answers
from softmoe_cli.model.vit import build, prepare
from softmoe_cli.model.weights import LoadReport, experts_left
from softmoe_cli.moe.kind import Decided, Decider
from softmoe_cli.moe.routing import full_precision, routings
from softmoe_cli.optim import freeze, optimizer_of, schedule
from softmoe_cli.parallel import ALONE, Average, Crew, own_part
from softmoe_cli.process import settled
from softmoe_cli.run.finished import finished
from softmoe_cli.stack.passing import Handed
from softmoe_cli.stack.turns import at_once, member, prepared_s
from softmoe_cli.train import summary
from softmoe_cli.train.blame import not_finite, out_of_memory
from softmoe_cli.train.ending import close, close_again
from softmoe_cli.train.looks import Looks
from softmoe_cli.train.pace import FirstSteps, forecast
from softmoe_cli.train.progress import Budget
from softmoe_cli.train.pruning import Pruning, served
from softmoe_cli.train.recording import Recording
from softmoe_cli.train.resume import Trained, carry_moments, delta_of, load_source, resume
from softmoe_cli.train.setup import Begun, Setup, require_batches
from softmoe_cli.train.stop import Interrupted, Stop
from softmoe_cli.train.tasks import task_rows, tell_shares

SMALLEST_SCALE = 2.0**-14
"""fp16: gradients that are not finite even at this loss scale are not saved by a smaller one."""


def train(begun: Begun) -> dict[str, Any]:
    """Trains a run to its end, or from where it stopped, from its images to its result row, which it returns.

    Raises:
        UsageError: something in the configuration cannot work; nothing was written.
        RunError: the run broke; its folder holds the last good state.
        Interrupted: a signal asked to stop; the state is saved.
    """
    run, config, source, screen, crew = begun.run, begun.config, begun.source, begun.screen, begun.crew
    if (before := _ended(begun)) is not None:  # several processes, or a batch that only now has a size
        return before

    # --- data: the images, and how often they are seen
    device, _ = arithmetic(config.device, config.train.precision, config.threads)
    require_place(config.optim, device, crew.size)
    with crew.in_turn():
        splits = sets.load(config.data)
    classes = sets.num_classes(config.data, splits)
    notes = check_shots(splits.train.labels, config.train.fewshot, "train.fewshot") if config.train.fewshot else []
    budget = Budget.of(config, len(splits.train))
    learning_rate = schedule(config.optim, budget.total)

    # --- cost: what an image costs, and what fits
    load = Load.of(config, classes, device, experts_left(source.weights) if source is not None else {})
    cost = training_cost(load)
    check_tokens(config, cost.tokens)
    require_batches(config, cost)
    fit = settle(load, config.parallel, crew, at_once())
    crew.way, crew.why = fit.way, fit.why
    autocast = precision_context(device.type, config.train.precision, cached=fit.way == "ddp")  # others change in use
    setup = Setup(config, begun.command, source, begun.images_digest, splits, budget, device, autocast, crew, cost, fit)
    screen.table(begun.command, summary.header(setup, run.folder))
    for note in notes:
        screen.row("few-shot", note)
    kept = keep_freed_memory(device, at_once() * fit.memory.peak_bytes, free_memory(device) // crew.local_size)
    screen.row("memory", summary.memory_row(fit, device, kept=kept))
    settled()

    # --- model: new weights, or those of the source
    with crew.one_by_one():
        torch.manual_seed(config.seed)
        model = build(config.model, classes)
        freeze(model, config.optim.freeze)
        loaded = load_source(model, source, config, splits.classes, screen) if source is not None else LoadReport()
        tell_shares(model, config, splits.train)
        pruning = Pruning.of(config, load, budget, model, screen) if config.prune.keep is not None else None
        prepare(model, device, config.train.precision)
        model.set_grad_checkpointing(config.train.recompute)
        average = Average(model, decay=config.train.ema) if config.train.ema is not None else None
        for each in (model, average.module) if average is not None else (model,):
            crew.spread(each, config, device)
    adjusting = _adjusting(model)

    # --- optimizer
    optimizer = optimizer_of(model, config.optim)
    if source is not None:
        carry_moments(model, optimizer, source, loaded, config, screen)
    scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
    trained = Trained(model, average, optimizer, scaler, pruning, delta_of(model, source, config, loaded))

    # --- record: the run's folder, where it stands, and what it writes down
    run.open(config)
    if (before := _ended(begun)) is not None:  # another process held the folder until now, and came to the end
        return before
    progress = resume(run, trained, screen, crew)
    for title, text in task_rows(model, config.model.tasks) if crew.way == "ddp" else []:  # else nobody has them whole
        screen.row(title, text)
    pace = forecast(setup, model) if crew.size == 1 else None
    if pace is not None:
        screen.row("time", summary.time_row(setup, pace, progress))
    recording = Recording(setup, run, progress, trained, torch.zeros((), dtype=torch.int64, device=device), screen.say)

    # --- evaluation, and what ends the run
    stop = Stop(crew)
    looks = Looks(recording, stop)
    first_steps = FirstSteps(progress, budget, config.train.eval_every, pace, screen.sentence)

    # --- loop
    training = _batches(setup, crew.share(config).rows(config.train.accumulate), progress.step)
    forward = crew.prepare(model.train())
    compiles_alone = config.train.compile and at_once() == 1  # else the pass of all is compiled
    if compiles_alone:
        forward = compiled(forward)
    saved_at, save_took, first_step = time.monotonic(), 0.0, progress.step
    with stop, routings(model) as seen, screen, recording:
        step = Step(model, forward, optimizer, scaler, autocast, seen, config, crew, recording.landed)
        try:
            while True:
                here = budget.position(progress)
                if budget.passed(progress.evaluated, here, config.train.eval_every):
                    first_steps.tell()
                    row = looks.validation()
                    better = row["top1_pct"] > progress.best_top1_pct and not (pruning and pruning.open(progress))
                    screen.evaluation(row, "best" if better else "")
                    progress.evaluated, progress.validation = here, row
                    if better:
                        progress.best_step, progress.best_top1_pct = progress.step, row["top1_pct"]
                        recording.save("best")
                    model.train()
                if here >= budget.total:
                    break
                if screen.console.unread:
                    stop.name = stop.name or "SIGPIPE"
                stop.check()
                rest = max(config.train.save_seconds, 50 * save_took) - (time.monotonic() - saved_at)
                if crew.largest_of_all(rest if run.checkpoints.idle else math.inf) < 0:
                    start = time.monotonic()
                    recording.save("last")
                    saved_at, save_took = time.monotonic(), time.monotonic() - start

                compiles = compiles_alone and progress.step in (first_step, progress.changed_at)
                turns = compiles and crew.size == 1
                alone = compiling_alone(_graph_of(config, classes), stop.check) if turns else nullcontext()
                with progress.booked("compile" if compiles else "device", crew.size), alone:
                    lr, scale = learning_rate(here), scaler.get_scale()
                    with progress.booked("load"):
                        batch = next(training)
                    open_pruning = pruning if pruning is not None and pruning.open(progress) else None
                    loss, aux_loss, norm = update(step, batch, lr, open_pruning)
                    updated = math.isfinite(loss) and math.isfinite(norm)
                    rescaling = math.isfinite(loss) and SMALLEST_SCALE < scaler.get_scale() < scale
                    if not updated and not rescaling:
                        image = progress.step * config.train.batch_size
                        raise not_finite(model, batch.inputs, autocast, image, progress.step, loss, norm)
                    _adjust(adjusting, crew, updated=updated)
                    if updated and average is not None:
                        average.update(model)
                progress.book("compile", prepared_s())
                if budget.steps is None:
                    progress.seconds["device"] = crew.largest_of_all(progress.seconds["device"])
                progress.step += 1
                progress.compiled_steps += compiles
                progress.add_loss(loss, aux_loss)
                first_steps.add()
                if open_pruning is not None:
                    _let_go(step, recording, open_pruning, batch)
                now = budget.position(progress)
                images_per_s = progress.images_per_s(config.train.batch_size)
                screen.step(now / budget.total, loss, lr, images_per_s)
                if budget.passed(progress.logged, now, config.train.log_every):
                    beside = {"lr": lr, "grad_norm": norm if updated else None, "images_per_s": images_per_s}
                    recording.row("train", progress.mean_losses() | beside)
                    progress.logged = now
            recording.save("last", end=True)  # before the test row: should the run die between them, that is done again
            test = looks.test()
            screen.evaluation(test)
            with progress.booked("save"):
                run.checkpoints.wait()
        except (Interrupted, workers.WorkersError, UsageError) as error:  # an image that cannot be read
            if isinstance(error, Interrupted) or (crew.size == 1 and progress.step > first_step):
                recording.save("last")
                run.checkpoints.wait()
            raise
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, progress.step, config.train, cost.whole_batches) from error
    result = summary.result_row(setup, run.folder, progress, test, recording.card["model"]["router"], looks.moe_blocks)
    result |= served(config.model, model, cost) | {"remark": summary.remark(result, run.folder, config.model)}
    recording.finish(result)
    close(screen, result, run.folder)
    return result


def _ended(begun: Begun) -> dict[str, Any] | None:
    """The result of a run that has ended already, which is told; None of another."""
    folder = begun.run.folder
    before = begun.crew.ask_first(lambda: finished(folder))
    if before is not None:
        close_again(begun.screen, begun.config, before, folder)
    return before


def _batches(setup: Setup, rows: Tensor | slice, first_step: int) -> Iterator[Batch]:
    """Endless batches of training images: of each batch the `rows` of this process."""
    config = setup.config
    return batches.train_batches(
        setup.splits.train,
        config.data,
        config.augment,
        image_size=config.model.image_size,
        in_chans=config.model.in_chans,
        num_classes=setup.num_classes,
        batch_size=config.train.batch_size,
        label_smoothing=config.train.label_smoothing,
        seed=config.seed,
        first_step=first_step,
        device=setup.device,
        rows=rows,
    )


@dataclass(frozen=True)
class Step:
    """What every update works with. `seen`: the routings of the last forward pass; `landed`: what those of all updates
    say has landed, int64."""

    model: VisionTransformer
    forward: Callable[..., Tensor]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast: torch.autocast
    seen: list[Decided]
    config: Config
    crew: Crew = ALONE
    landed: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The model's. To find them among its modules takes 0.1 ms, up to 1% of an update."""
        return list(self.model.parameters())

    def forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def update(step: Step, batch: Batch, lr: float, pruning: Pruning | None = None) -> tuple[float, float, float]:
    """One update on one batch, computed in `accumulate` equal parts whose gradients add up to the whole batch's; of
    several processes each has its share of every part.

    Returns the mean loss over images without the auxiliary loss, the auxiliary loss, and the gradients' norm before
    clipping. The weights stay as they were, and the gradients can be looked at, when loss or norm is not finite; where
    only the norm is not, a scaler then lowers its scale. `pruning` measures experts that may still go.
    """
    crew, optimizer, scaler = step.crew, step.optimizer, step.scaler
    step.forget_gradients()  # of an update that was not made
    own = member()
    made = None if own is None else own.passed(handed(step, batch, lr))
    step.seen.clear()
    if made is not None and made.update is not None:
        return made.update
    total = made.losses if made is not None else _passed(step, batch, pruning)
    crew.add(total)
    scaler.unscale_(optimizer)
    gradients = [parameter.grad for parameter in step.parameters if parameter.grad is not None]
    norm = crew.norm(gradients)
    main, aux_loss, norm_value = torch.cat([total, norm.reshape(1)]).tolist()
    if math.isfinite(main) and (math.isfinite(norm_value) or scaler.is_enabled()):
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if math.isfinite(norm_value):  # else do not call it: a first call would make moments and leave them unset
            _clip(gradients, step.config.optim.clip_norm, norm, norm_value)
            scaler.step(optimizer)
            step.forget_gradients()  # now, so that looks and checkpoints can use their memory
        scaler.update()
    return main, aux_loss, norm_value


def handed(step: Step, batch: Batch, lr: float) -> Handed:
    """What a run of several in one process hands in for an update of all."""
    parts, clip_norm = list(_in_parts(batch, step.config.train.accumulate)), step.config.optim.clip_norm
    return Handed(step.model, partial(_losses, step), step.config, parts, step.landed, step.optimizer, lr, clip_norm)


def _passed(step: Step, batch: Batch, pruning: Pruning | None) -> Tensor:
    """Forwards and backwards: the losses of the whole batch, (2); leaves gradients."""
    parts = step.config.train.accumulate
    total = torch.zeros(2, device=batch.images.device)
    with step.autocast:  # around all parts: a weight that it has cast once stays cast until the update
        for part, tensors in enumerate(_in_parts(batch, parts), start=1):
            with step.crew.passing(step.forward, step.crew.share(step.config), last=part == parts):
                loss, aux, landed = _losses(step, step.forward, *tensors)
                if pruning is not None:
                    pruning.see(step.seen)
                step.landed.add_(landed)
                total += torch.stack([loss.detach(), aux.detach()])
                with full_precision(loss):  # else gradients of what was float32 would be computed in half precision
                    step.scaler.scale(loss + aux).backward()
    step.seen.clear()
    return total


def _losses(
    step: Step, forward: Callable[..., Tensor], targets: Tensor, *inputs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a part of a batch what it adds to the loss and to the auxiliary loss, and how many rows of experts hold a
    token."""
    config, share = step.config, step.crew.share(step.config)
    step.seen.clear()
    logits = forward(*inputs)
    with full_precision(logits):
        valid = valid_answers(step.model, inputs)
        loss = classification_loss(logits, targets, config.train.loss, valid)
        loss = loss * share.of_images / config.train.accumulate
        aux = sum((routing.aux_loss for routing in step.seen), loss.new_zeros(()))
        aux = aux * share.of_groups / config.train.accumulate
        landed = [routing.landed for routing in step.seen if routing.landed is not None]
    return loss, aux, sum(landed, torch.zeros((), dtype=torch.int64, device=logits.device))


def _clip(gradients: Sequence[Tensor], limit: float | None, norm: Tensor, norm_value: float) -> None:
    """Scales the gradients down to `optim.clip_norm` where their norm is larger."""
    if limit is not None and norm_value + 1e-6 > limit:
        torch._foreach_mul_([own_part(each) for each in gradients], (limit / (norm + 1e-6)).clamp(max=1.0))


def _in_parts(batch: Batch, parts: int) -> Iterator[tuple[Tensor, ...]]:
    """Targets, and what the model is called with, of each of several parts of a batch."""
    return zip(*(each.chunk(parts) for each in (batch.labels, *batch.inputs)), strict=True)


def _graph_of(config: Config, classes: int) -> tuple[Any, ...]:
    """What decides what is compiled: runs that differ elsewhere, as in their seeds, compile the same."""
    t = config.train
    return config.model, classes, t.batch_size, t.accumulate, t.recompute, t.precision


def _let_go(step: Step, recording: Recording, pruning: Pruning, batch: Batch) -> None:
    """Adds up what an update has measured of the experts and, where a window ends, lets some go. Writes down which,
    how far that changes outputs on the update's images, and what an image costs from now on."""
    progress, trained, crew = recording.progress, recording.trained, step.crew
    pruning.add(crew)
    decisions = pruning.decide(progress)
    changed = 0.0
    if any(decision.goes for decision in decisions.values()):
        with progress.booked("eval"):
            before = _logits(step, batch)
            trained.leave(decisions)
            changed = crew.largest_of_all((_logits(step, batch) - before).abs().max().item())
        progress.phases.append([progress.step, *pruning.cost().phase])
    recording.decide(changed, decisions)


@torch.no_grad()
def _logits(step: Step, batch: Batch) -> Tensor:
    """The logits of possible answers; 0 in the place of others."""
    step.model.eval()
    with step.autocast:  # in parts, as updates are: more might not fit
        parts = _in_parts(batch, step.config.train.accumulate)
        logits = torch.cat([step.model(*inputs).float() for _, *inputs in parts])
    step.model.train()
    return logits.masked_fill(logits.isneginf(), 0)


def _adjusting(model: VisionTransformer) -> list[Decider]:
    """The routers that adjust themselves after updates: one whose parameters are all frozen does not."""
    routers = [module for module in model.modules() if isinstance(module, Decider)]
    trains = [[parameter.requires_grad for parameter in router.parameters()] for router in routers]
    return [router for router, each in zip(routers, trains, strict=True) if not each or any(each)]


def _adjust(routers: Sequence[Decider], crew: Crew, *, updated: bool) -> None:
    """Lets routers adjust what is no parameter, from the counts of all processes; the counts of an update that was not
    made are dropped."""
    for router in routers:
        for counted in router.counted():
            if updated:
                crew.add(counted)
            else:
                counted.zero_()
        if updated:
            router.after_update()
