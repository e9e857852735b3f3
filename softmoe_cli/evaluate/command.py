"""`softmoe evaluate`: measures a checkpoint, or an average of several."""

import csv
import dataclasses
import io
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from softmoe_cli import programs
from softmoe_cli.config.commands import EvaluateConfig
from softmoe_cli.config.model import Model
from softmoe_cli.data import sets
from softmoe_cli.data.batches import Batch, eval_batches
from softmoe_cli.data.mix import classes_of_task
from softmoe_cli.data.splits import ImageSet, Splits
from softmoe_cli.device import arithmetic, hardware, keep_freed_memory
from softmoe_cli.errors import UsageError
from softmoe_cli.evaluate import soup
from softmoe_cli.evaluate.audit import Audit, Effect, summary
from softmoe_cli.evaluate.by_task import each_task, require_one_task, show_tasks
from softmoe_cli.evaluate.classes import named_by_order, outputs_for
from softmoe_cli.evaluate.fewshot import check_shots, fewshot
from softmoe_cli.evaluate.quality import (
    Outcomes,
    calibration_error,
    features,
    outcomes,
    qualities,
    require_finite,
)
from softmoe_cli.evaluate.real import check_order, real_labels, real_qualities
from softmoe_cli.evaluate.trial import STRONG, ContrastTrial, contrast_row
from softmoe_cli.files import require_vacant, write_atomically
from softmoe_cli.model.router import check_evaluated
from softmoe_cli.model.vit import build, prepare
from softmoe_cli.model.weights import load_weights
from softmoe_cli.run.header import Source
from softmoe_cli.terminal import Screen
from softmoe_cli.text import aligned, printable, spreadsheet_cell


def evaluate_checkpoint(config: EvaluateConfig, model_config: Model, sources: list[Source]) -> None:
    """Prints quality, calibration and, where asked for, few-shot quality and the audit, as a table or as JSON.

    Args:
        model_config: the model of all `sources`, which are averaged.

    Raises:
        UsageError: the data have other classes than the checkpoint, or a file cannot be written.
    """
    known, tasks = sources[0].card["classes"], model_config.tasks or {}
    if tasks and config.contrast:
        raise UsageError(
            f"contrast= is about a model of one task, and checkpoint={sources[0].label} knows {', '.join(tasks)}; "
            "first softmoe extract task=NAME"
        )
    check_evaluated("batch_size", config.batch_size, model_config)
    _check_files(config)
    precision = config.precision or sources[0].card["precision"]
    device, autocast = arithmetic(config.device, precision, config.threads)
    keep_freed_memory(device)
    for source in sources:
        if "head.weight" not in source.weights:
            raise UsageError(f"checkpoint={source.label} has no head; softmoe finetune gives it one")
    loss = config.loss or sources[0].card["loss"]
    judge = Judge(config, model_config, loss, precision, device, autocast)
    if tasks and config.task is None:
        require_one_task(config, tasks)
        _, weights = _average(judge, sources, None)
        model = judge.built(weights)
        row, _ = each_task(
            config, known, lambda task, some: judge.of_task(task).outcomes(model, some, config.batch_size)
        )
        show_tasks(_begun(config, sources) | row | {"hardware": hardware(device)}, config.format)
        return
    if config.task is not None:
        judge = judge.of_task(list(tasks).index(config.task))
        known = classes_of_task(config.task, known)
    splits = sets.load(config.data)
    splits.need(*_parts(config))
    images = {"train": splits.train, "validation": splits.validation, "test": splits.test}[config.split]
    notes = check_shots(splits.train.labels, config.fewshot, "fewshot") if config.fewshot else []
    known, note = named_by_order(sources[0], known, splits.classes, config.data.class_numbers)
    if config.real is not None:
        check_order(config.real, known)
    outputs = outputs_for(known, splits.classes, config.data.class_numbers)
    if outputs is None:
        _check_foreign(config, sources[0].label, known, splits.classes)
    judge = replace(judge, outputs=None if outputs == list(range(len(known))) else outputs)
    kept, weights = _average(judge, sources, splits.validation)
    model = judge.built(weights)
    right = real_labels(config.real, images, len(known)) if config.real is not None else []
    row = _begun(config, kept, len(sources))
    start = time.perf_counter()
    row |= note
    if outputs is None:
        row["head"] = f"not scored: it knows {_shortly(known)}, the data have {_shortly(splits.classes)}"
    else:
        if len(outputs) < len(known):
            row["among"] = f"{len(outputs)} of the {len(known)} classes that the checkpoint knows"
        contrast, columns = _contrasted(judge, model, images, splits.validation) if config.contrast else ({}, {})
        row |= _scored(judge, model, images, splits.classes, right, columns) | contrast
    row |= {"images": len(images), "eval_s": time.perf_counter() - start, "hardware": hardware(device)}
    if config.fewshot:
        row |= _few_shots(judge, model, splits, images, notes)
    findings: list[Effect] = []
    if config.audit:
        audited, findings = _audited(judge, weights, images)
        row |= audited
    programs.reply(row) if config.format == "json" else _show(row, findings)


def _begun(config: EvaluateConfig, kept: list[Source], of: int | None = None) -> dict[str, Any]:
    """What a row begins with: the checkpoints that are averaged, `of` so many (all), and what they are measured on."""
    labels, number = [source.label for source in kept], of or len(kept)
    row: dict[str, Any] = {"checkpoint": labels[0] if len(labels) == 1 else labels}
    if number > 1:
        row["soup"] = f"{config.soup}, {len(kept)} of {number}"
    task = {} if config.task is None else {"task": config.task}
    return row | {"data": config.data.name, **task, "split": config.split}


@dataclass(frozen=True)
class Judge:
    """Builds models from weights and says what they predict.

    Attributes:
        outputs: the head's outputs for the classes of the data, where these are not all of them or not in their order.
        task: the number of the task that all images are of, for a model that knows several; `outputs` then count among
            its classes.
    """

    config: EvaluateConfig
    model: Model
    loss: str
    precision: str
    device: torch.device
    autocast: torch.autocast
    outputs: list[int] | None = None
    task: int | None = None

    def of_task(self, task: int) -> "Judge":
        """A judge of images of one task; of a mix, of those of its set."""
        config = self.config
        if config.data.sets is not None:
            config = replace(config, data=config.data.of_sets()[task])
        return replace(self, config=config, task=task)

    def built(self, weights: dict[str, Tensor]) -> VisionTransformer:
        model = build(self.model, weights["head.weight"].shape[0])
        load_weights(model, weights, keep_head=True, allow_unexpected=[])
        return model

    def batches(self, images: ImageSet, batch_size: int) -> Iterator[Batch]:
        found = eval_batches(
            images,
            self.config.data,
            image_size=self.model.image_size,
            in_chans=self.model.in_chans,
            batch_size=batch_size,
            device=self.device,
        )
        for batch in found:
            task = None if self.task is None else torch.full_like(batch.labels, self.task)
            yield batch._replace(task=task)

    def outcomes(self, model: VisionTransformer, images: ImageSet, batch_size: int) -> Outcomes:
        prepare(model, self.device, self.precision)
        seen: nn.Module = model.to(self.device)
        outputs = self.outputs
        if self.task is not None:
            numbers = list(self.model.tasks.values())
            first = sum(numbers[: self.task])
            outputs = [first + i for i in (range(numbers[self.task]) if outputs is None else outputs)]
        if outputs is not None:
            seen = Among(model, outputs)
        said = outcomes(seen, self.batches(images, batch_size), loss=self.loss, autocast=self.autocast)
        return require_finite(said, str(self.config.checkpoint), self.precision)


def _average(
    judge: Judge, sources: list[Source], validation: ImageSet | None
) -> tuple[list[Source], dict[str, Tensor]]:
    """The checkpoints that are averaged, and their average."""
    kept = sources
    if judge.config.soup == "greedy" and validation is not None:

        def score(weights: dict[str, Tensor]) -> float:
            return judge.outcomes(judge.built(weights), validation, judge.config.batch_size).top1_pct

        kept = [sources[i] for i in soup.greedy([source.weights for source in sources], score)]
    weights = [source.weights for source in kept]
    return kept, soup.average(weights) if len(kept) > 1 else weights[0]


def _scored(
    judge: Judge,
    model: VisionTransformer,
    images: ImageSet,
    classes: list[str],
    right: list[set[int]],
    columns: dict[str, Sequence[Any]],
) -> dict[str, Any]:
    """Quality, calibration, quality by class; writes the files that are asked for. `right`: ReaL's labels; `columns`:
    what the file of predictions has instead of, or beside, the model's own."""
    config = judge.config
    result = judge.outcomes(model, images, config.batch_size)
    row = {key: value for key, value in qualities(result) if key != "images_evaluated"}
    row["ece_pct"] = 100 * calibration_error(result.probability, result.right, config.calibration_bins)
    if config.real is not None:
        named = result.prediction if judge.outputs is None else torch.tensor(judge.outputs)[result.prediction]
        row |= real_qualities(named, right)
    _write(config, result, images, classes, columns)
    return row | _by_class(result, classes) | (_confusion(result) if config.format == "json" else {})


def _contrasted(
    judge: Judge, model: VisionTransformer, images: ImageSet, validation: ImageSet
) -> tuple[dict[str, Any], dict[str, Sequence[Any]]]:
    """What self-contrast makes of the images: for the row, and for the file of predictions."""
    config = judge.config
    prepare(model, judge.device, judge.precision)
    trial = ContrastTrial(
        config,
        model.to(judge.device),
        judge.model.router_name,
        lambda some: judge.batches(some, config.batch_size),
        judge.autocast,
        judge.outputs,
    )
    return contrast_row(trial, images, validation)


def _few_shots(
    judge: Judge, model: VisionTransformer, splits: Splits, images: ImageSet, notes: list[str]
) -> dict[str, Any]:
    """Quality of the features. The strength of its ridge is chosen on other images than the scored ones, if there are
    such."""
    config = judge.config
    prepare(model.to(judge.device), judge.device, judge.precision)
    apart = config.fewshot_l2 == "validation" and config.split != "validation"
    found = fewshot(
        lambda some: features(model, judge.batches(some, config.batch_size), judge.autocast),
        config.fewshot,
        splits.train,
        images,
        splits.validation if apart else None,
        len(splits.classes),
        config.fewshot_seed,
    )
    chosen_on = "validation" if apart else f"the scored {config.split}"
    return {"fewshot_l2_chosen_on": chosen_on, "fewshot_notes": notes, **dict(found)}


def _audited(judge: Judge, weights: dict[str, Tensor], images: ImageSet) -> tuple[dict[str, Any], list[Effect]]:
    """What the audit finds on the images, or on some that are spread evenly over them."""
    config = judge.config
    if config.audit_images is not None:
        images = images.spread(config.audit_images)
    audit = Audit(judge.model, weights, judge.outcomes, images, config.batch_size)
    row: dict[str, Any] = {"audit_images": len(images), "audit_reference_top1_pct": audit.reference.top1_pct}
    reasons = {part: audit.not_applicable(part) for part in config.audit}
    findings = [each for part in config.audit if reasons[part] is None for each in audit.findings(part)]
    row["not_applicable"] = {part: reason for part, reason in reasons.items() if reason is not None}
    row["audit"] = [dataclasses.asdict(finding) for finding in findings]
    return row, findings


def _check_files(config: EvaluateConfig) -> None:
    """Checks that the files can be made, before any work is done for them."""
    for key in ("predictions", "confusion"):
        if (place := getattr(config, key)) is not None:
            require_vacant(key, Path(place))
            if not Path(place).parent.is_dir():
                raise UsageError(f"{key}={place}: {Path(place).parent} is no folder")
    if config.predictions is not None and config.predictions == config.confusion:
        raise UsageError(f"predictions={config.predictions} and confusion= are the same file; give each its own")


def _parts(config: EvaluateConfig) -> list[str]:
    """The parts of the data set that are needed."""
    needed = [config.split]
    if config.fewshot:
        needed.append("train")
    several = len(config.contrast) * len(config.contrast_beta) * len(config.contrast_alpha) > 1
    chooses = several and config.contrast_by == "validation"
    drops = any(word.startswith("drop_") for word in config.contrast)
    if (config.fewshot and config.fewshot_l2 == "validation") or config.soup == "greedy" or chooses or drops:
        needed.append("validation")
    return needed


class Among(nn.Module):
    """A model's logits for some of its classes only: the other classes are no possible answer."""

    def __init__(self, model: nn.Module, outputs: list[int]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(*inputs)
        return logits[:, self.outputs]


def _check_foreign(config: EvaluateConfig, label: str, known: list[str], classes: list[str]) -> None:
    """Without common classes there is few-shot quality and nothing else."""
    asks = {
        "audit": config.audit,
        "real": config.real,
        "predictions": config.predictions,
        "confusion": config.confusion,
        "contrast": config.contrast,
    }
    asked = [key for key, value in asks.items() if value]
    if config.soup == "greedy":
        asked.append("soup=greedy")
    if config.fewshot and not asked:
        return
    raise UsageError(
        f"checkpoint={label} knows {_shortly(known)}, but data={config.data.name} has "
        f"{_shortly(classes)}"
        + (f", which {asked[0]} cannot do with" if config.fewshot else "")
        + "; use softmoe finetune for other classes, or fewshot=[1,5,10,25] alone for the features"
    )


def _shortly(classes: list[str]) -> str:
    """`10 classes (0, 1, 2, …)`"""
    return f"{len(classes)} classes ({', '.join(map(printable, classes[:3]))}{', …' if len(classes) > 3 else ''})"


SQUARE = 2000
"""Classes up to which the confusion is a square of numbers: 4 million of them."""


def _by_class(said: Outcomes, classes: list[str]) -> dict[str, Any]:
    """Accuracy of each class that the images have."""
    totals, rights = said.by_class(len(classes))
    rows = [
        {"class": name, "images": total, "top1_pct": 100 * right / total}
        for name, total, right in zip(classes, totals.tolist(), rights.tolist(), strict=True)
        if total
    ]
    return {"per_class": rows}


def _confusion(said: Outcomes) -> dict[str, Any]:
    """The confusion of labels (rows) with predictions (columns); of many classes, the pairs that there are."""
    if said.classes <= SQUARE:
        return {"confusion": said.confusion.tolist()}
    return {"confusion_pairs": said.pairs.tolist()}


def _write(
    config: EvaluateConfig, said: Outcomes, images: ImageSet, classes: list[str], other: dict[str, Sequence[Any]]
) -> None:
    """The files of `predictions=` and `confusion=`. Floats are written in full: what is computed from them is exact."""
    if config.predictions is not None:
        head = ["label", "prediction", "probability", "label_probability"]
        columns: dict[str, Sequence[Any]] = {"index": range(len(images))}
        columns |= {name: getattr(said, name).tolist() for name in head} | other
        columns |= {"file": [printable(str(place)) for place in images.files.places]} if images.files else {}
        write_atomically(Path(config.predictions), _csv([list(columns), *zip(*columns.values(), strict=True)]))
    if config.confusion is not None:
        names = [printable(name) for name in classes]
        names += [f"output {i}" for i in range(len(classes), said.classes)]
        if said.classes <= SQUARE:
            counts = said.confusion.tolist()[: len(classes)]
            lines = ([name, *row] for name, row in zip(names, counts, strict=False))
            write_atomically(Path(config.confusion), _csv([["label \\ prediction", *names], *lines]))
        else:
            rows = ([names[label], names[prediction], images] for label, prediction, images in said.pairs.tolist())
            write_atomically(Path(config.confusion), _csv([["label", "prediction", "images"], *rows]))


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(spreadsheet_cell, row) for row in rows)
    return text.getvalue()


SAID = {
    "top1_pct": "{} top-1", "top5_pct": "{} top-5", "loss": "{} loss", "nll": "{} NLL", "ece_pct": "calibration",
    "real_top1_pct": "ReaL top-1", "real_images": "ReaL images", "eval_s": "seconds", "audit_images": "audit images",
    "audit_reference_top1_pct": "audit, whole", "worst_class": "worst class",
}  # fmt: skip
"""Names of figures in the table, with the part of the images that they are of; other figures keep their keys. A name is
no longer than its column."""


def _show(row: dict[str, Any], findings: list[Effect]) -> None:
    """Prints the row as a table: of classes and confusion the worst class, of experts in turn the mean and the
    worst."""
    shown = {}
    for key, value in row.items():
        if key in ("audit", "not_applicable", "fewshot_l2_chosen_on", "fewshot_notes") or re.fullmatch(
            r"fewshot_\d+_.*|contrast.*", key
        ):
            continue
        if key == "per_class":
            worst = min(value, key=lambda each: each["top1_pct"])
            shown["worst_class"] = f"{printable(worst['class'])}, {worst['top1_pct']:.2f}% of {worst['images']}"
        elif isinstance(value, list):
            shown[key] = f"the average of {len(value)}: {', '.join(value)}"
        else:
            unit = "%" if key.endswith("_pct") else ""
            shown[key] = f"{value:.{2 if unit else 4}f}{unit}" if isinstance(value, float) else str(value)
    screen = Screen()
    screen.table("evaluate", {SAID.get(key, key).format(row["split"]): text for key, text in shown.items()})
    shots = [key.split("_")[1] for key in row if re.fullmatch(r"fewshot_\d+_l2", key)]
    if shots:
        head = ["shots per class", "images", "l2", "top-1, %"]
        cells = [
            [k, str(row[f"fewshot_{k}_images"]), f"{row[f'fewshot_{k}_l2']:g}", f"{row[f'fewshot_{k}_top1_pct']:.2f}"]
            for k in shots
        ]
        screen.say(aligned([head, *cells], markdown=False))
        screen.say(f"ridge regression on the frozen features; l2 chosen on {row['fewshot_l2_chosen_on']} images")
        for note in row["fewshot_notes"]:
            screen.say(note)
    if "contrast" in row:
        _show_contrast(screen, row)
    for part, reason in row.get("not_applicable", {}).items():
        screen.say(f"audit of {part}: {reason}")
    if findings:
        head = ["audit", "top-1, %", "change, points", "predictions changed, %", "largest change of a probability"]
        effects = summary(findings)
        cells = [
            [f"{each.part}: {each.setting}", f"{each.top1_pct:.2f}", f"{each.top1_change_pct:+.2f}",
             f"{each.changed_pct:.2f}", f"{each.probability_change_max:.1e}"]
            for each in effects
        ]  # fmt: skip
        if any(each.polysemanticity is not None for each in effects):
            head.append("polysemanticity")
            for cell, each in zip(cells, effects, strict=True):
                cell.append("" if each.polysemanticity is None else f"{each.polysemanticity:.2f}")
        screen.say(aligned([head, *cells], markdown=False))


def _show_contrast(screen: Screen, row: dict[str, Any]) -> None:
    """One line for each way to predict, and what was chosen on which images."""
    head = [
        "self-contrast", "beta", "alpha", "top-1, %", "change, points", "changed, %", "right only here, there",
        "p (Holm)", "label masked, %", "FLOPs over one pass",
    ]  # fmt: skip
    lines, timed = row["contrast"], any(line["latency_ratio"] for line in row["contrast"])
    cells = []
    for line in lines:
        contrast = line["beta"] is not None
        draws = f", mean of {line['draws']}" if line["draws"] > 1 else ""
        top1 = f"{line['top1_pct']:.2f}"
        if draws:
            top1 += f" ({line['top1_pct_low']:.2f} to {line['top1_pct_high']:.2f})"
        known = [f"{line['beta']:g}", f"{line['alpha']:g}"] if contrast else ["", ""]
        cells.append([line["way"] + (" (ours)" if line.get("ours") else "") + draws, *known, top1])
        if line["way"] == STRONG:
            cells[-1] += ["", "", "", "", ""]
        else:
            cells[-1] += [f"{round(line['top1_change_pct'], 2) + 0.0:+.2f}", f"{line['changed_pct']:.2f}"]
            cells[-1] += [f"{line['gained']:.3g}, {line['lost']:.3g}", f"{line['p_holm']:.2g}"]
            cells[-1].append(f"{line['label_masked_pct']:.2f}" if contrast else "")
        cells[-1].append(f"{line['flop_ratio']:.2f}")
        if timed:
            cells[-1].append(f"{line['latency_ratio']:.2f}" if line["latency_ratio"] else "")
    screen.say(aligned([[*head, "time over one pass"] if timed else head, *cells], markdown=False))
    tried, chosen, where = row["contrast_settings_tried"], row["contrast_chosen"], row["contrast_chosen_on"]
    if where == "nothing":
        screen.say(f"one setting, not chosen by any images; {row['split']} images were read once")
    elif where == "validation":
        best = next(line for line in lines if line["way"] == chosen)["top1_pct_where_chosen"]
        strong = row["contrast_strong_top1_pct_where_chosen"]
        screen.say(
            f"chosen on validation images among {tried} settings: {chosen} ({best:.2f}% there, strong alone "
            f"{strong:.2f}%); {row['split']} images were read once; p by McNemar's exact test against strong alone, "
            "Holm over the contrasts and over the controls, each by itself"
        )
    else:
        screen.say(
            f"chosen on {where} images themselves among {tried} settings: {chosen}; its top-1 is the best of {tried} "
            f"and so too good; p by McNemar's exact test against strong alone, Holm over all {tried}"
        )
