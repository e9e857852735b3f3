"""Pruning: experts are scored on training images, whose labels are not read; both models are compared on validation
images."""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from softmoe_cli.config.commands import PruneConfig
from softmoe_cli.config.model import Model
from softmoe_cli.config.pruning import MEASURED
from softmoe_cli.cost.flop import account, on_meta
from softmoe_cli.data import batches, sets
from softmoe_cli.data.splits import ImageSet, Splits
from softmoe_cli.device import arithmetic, hardware
from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.export.make import hub_config
from softmoe_cli.model.vit import build, portable, prepare
from softmoe_cli.model.weights import load_weights
from softmoe_cli.moe.layer import MoE
from softmoe_cli.prune.fold import folded_model, folded_weights, timm_entry
from softmoe_cli.prune.rule import largest, shares
from softmoe_cli.prune.scores import measured, prunable, random_scores, router_norms
from softmoe_cli.prune.settings import settings_of_pruning
from softmoe_cli.prune.smaller import compared, distance_in_float64, key_map, latencies, smaller_model, smaller_weights
from softmoe_cli.run.checkpoint import digest_of, write_checkpoint
from softmoe_cli.run.header import Source
from softmoe_cli.run.identity import origin, origin_of
from softmoe_cli.run.receipt import RECEIPT, already_made, folder_of, make_whole
from softmoe_cli.terminal import Screen

NO_MORE = 1e-9
"""The largest allowed difference of the written model's outputs in float64, as a share of the largest output."""
ROUNDED = 1e-6
"""The same of a plain ViT, whose biases may be sums that are rounded to float32."""


def prune(config: PruneConfig, model: Model, source: Source, before: Source | None) -> dict[str, Any]:
    """Writes the checkpoint of the pruned model and returns its receipt, with the folder it lies in. `before`: the
    checkpoint since which routers have changed.

    Raises:
        UsageError: a checkpoint, router or combination that cannot work; nothing was written.
        RunError: the new model does not compute what the pruned one does; nothing was written.
    """
    if "head.weight" not in source.weights:
        raise UsageError(f"checkpoint={source.label} has no head; softmoe finetune gives it one")
    device, _ = arithmetic(config.device, "fp32", config.threads)
    vit = build(model, len(source.weights["head.weight"]))
    load_weights(vit, source.weights, keep_head=True, allow_unexpected=[])
    layers = prunable(vit, model, config.by)
    _check_keep(config, layers)
    if config.to == "dense":
        _check_foldable(config, model, layers, vit.num_classes)
    settings = settings_of_pruning(config, before)
    folder = folder_of("pruned", config, model.name, source, settings)
    if (found := already_made(folder, source, settings, clock=config.clock)) is not None:
        Screen().say(f"{folder} holds this already; nothing to do")
        return found | {"folder": str(folder)}

    splits = sets.load(config.data)
    splits.need("train", "validation")
    job = Pruned(config, model, source, splits, device)
    prepare(vit, device, "fp32")
    whole, there = copy.deepcopy(vit).to(device), {place: layer.left for place, layer in layers.items()}
    blocks = job.drop(vit.to(device), layers, before)
    new_model = folded_model(model, vit) if config.to == "dense" else smaller_model(model, vit)
    weights = folded_weights(model, vit) if config.to == "dense" else smaller_weights(vit)
    entry = timm_entry(new_model) if config.to == "dense" else None
    new = build(new_model, vit.num_classes)
    new.load_state_dict(weights)
    prepare(new, device, "fp32")
    weights = {key: value.cpu() for key, value in weights.items()}
    receipt: dict[str, Any] = {"source": {"checkpoint": source.label, "digest": source.digest}, "settings": settings}
    receipt |= {"result": {"digest": digest_of(weights)}, "blocks": blocks}
    receipt["experts_left"] = [len(layer.left) for layer in layers.values()]
    receipt["scored_images"] = min(config.images, len(splits.train)) if config.by in MEASURED else 0
    receipt |= {"keys": key_map(weights, {place: layer.left for place, layer in layers.items()}, config.to)}
    receipt |= job.changes(whole, vit, new.to(device))
    costs = {"before": account(model, vit.num_classes, left=there), "after": account(new_model, vit.num_classes)}
    receipt["cost"] = {when: cost.row for when, cost in costs.items()}
    card = {"model": portable(new_model, new)} | {
        key: source.card[key] for key in ("data", "classes", "loss", "precision", "unnamed") if key in source.card
    }
    if "name" not in card["data"]:  # official weights, which know no images
        card["data"] = config.data.on_card()
    chosen = settings if before is None else settings | {"before": origin_of(before)}
    card |= {"receipt": receipt, "origin": origin("prune", chosen, source), "train_pflop": source.train_pflop}
    files = {RECEIPT: receipt}
    if entry is not None:
        files["config.json"] = hub_config(new_model, new, card) | entry
    make_whole(folder, lambda temporary: job.write(temporary, weights, card, files, new))
    return receipt | {"folder": str(folder)}


def _check_keep(config: PruneConfig, layers: dict[int, MoE]) -> None:
    """Refuses more experts than there are, and a pruning that would change nothing. Weights that say that all are left
    become a model that says nothing of it."""
    fewest = min(layers, key=lambda place: len(layers[place].left))
    most = len(layers[fewest].left)
    if config.keep is not None and config.keep > most:
        raise UsageError(f"keep={config.keep}: block {fewest} has {most} experts left")
    whole = not any("alive" in dict(layer.named_buffers()) for layer in layers.values())
    if whole and config.to == "experts" and all(len(layer.left) <= (config.keep or most) for layer in layers.values()):
        said = "" if config.keep is None else f"keep={config.keep} are all; "
        raise UsageError(f"{said}nothing would be pruned: say keep= below {most}, or to=dense for a plain ViT")


def _check_foldable(config: PruneConfig, model: Model, layers: dict[int, MoE], classes: int) -> None:
    """Refuses what will make no plain ViT before anything is scored: whichever experts stay, the reason is the same."""
    vit = on_meta(model, classes)
    for place, layer in layers.items():
        shape = vit.blocks[place].mlp
        shape.prunable()
        shape.leave(layer.left[: config.keep])
    folded_model(model, vit)


@dataclass(frozen=True)
class Pruned:
    """One pruning: what it is of, and on which images."""

    config: PruneConfig
    model: Model
    source: Source
    splits: Splits
    device: torch.device

    def batches(self, images: ImageSet) -> Iterator[batches.Batch]:
        size, channels = self.model.image_size, self.model.in_chans
        return batches.eval_batches(
            images, self.config.data, image_size=size, in_chans=channels, batch_size=self.config.batch_size,
            device=self.device,
        )  # fmt: skip

    def drop(self, vit: VisionTransformer, layers: dict[int, MoE], before: Source | None) -> dict[str, dict[str, Any]]:
        """Leaves the `keep` best experts of each layer, or what is left; says of each block what decided it.

        Raises:
            UsageError: an expert's score is no finite number.
        """
        keep = self.config.keep
        most = max(len(each.left) for each in layers.values())
        scores = self._scores(vit, layers, before) if keep is not None and keep < most else {}
        blocks: dict[str, dict[str, Any]] = {}
        for place, layer in layers.items():
            if scores and not all(map(math.isfinite, scores[place])):
                raise UsageError(
                    f"checkpoint={self.source.label}: by={self.config.by} is no finite number for an expert of block "
                    f"{place}; train again with a lower optim.lr, or name another checkpoint"
                )
            there = list(layer.left)
            if keep is not None and len(there) > keep:
                if "alive" not in dict(layer.named_buffers()):
                    layer.prunable()
                layer.leave(largest(scores[place], there, keep))
            blocks[str(place)] = {
                "kept": list(layer.left),
                "dropped": [each for each in there if each not in layer.left],
            }
            if scores:
                blocks[str(place)] |= {
                    "of": there, "scores": [scores[place][each] for each in there],
                    "shares": shares(scores[place], there),
                }  # fmt: skip
        return blocks

    def _scores(self, vit: VisionTransformer, layers: dict[int, MoE], before: Source | None) -> dict[int, list[float]]:
        if self.config.by == "random":
            return {
                place: random_scores(self.config.seed, place, len(layer.experts.w1)) for place, layer in layers.items()
            }
        if before is not None:
            states = vit.state_dict(), before.weights
            norms = [{p: router_norms(state, p, layer) for p, layer in layers.items()} for state in states]
            if all(torch.equal(norms[0][place], norms[1][place]) for place in layers):
                raise UsageError(
                    f"by=router_change: the routers of before={before.label} are those of checkpoint="
                    f"{self.source.label}, so that no expert comes before another; name the one that was finetuned"
                )
            return {place: (norms[0][place] - norms[1][place]).tolist() for place in layers}
        images = self.splits.train.spread(self.config.images)
        return measured(vit, layers, self.config.by, self.batches(images))

    def changes(self, whole: VisionTransformer, pruned: VisionTransformer, new: VisionTransformer) -> dict[str, Any]:
        """What pruning changed, and that the new model is the pruned one.

        Raises:
            RunError: it is not.
        """
        found = compared(
            whole, new, self.batches(self.splits.validation), checkpoint=self.source.label,
            loss=self.source.card["loss"], labelled=self.splits.classes == self.source.classes,
        )  # fmt: skip
        found |= {"validation_images": found.pop("images"), "validation": found.pop("quality")}
        x = next(self.batches(self.splits.validation)).images
        if self.config.clock:
            found["clock"] = latencies({"before": whole, "after": new}, x, self.config.repeats)
            found["clock"] |= {"images": len(x), "repeats": self.config.repeats, "hardware": hardware(self.device)}
        one, other = (copy.deepcopy(each).cpu().double().eval() for each in (pruned, new))
        share, others = distance_in_float64(one, other, x.cpu().double())
        if not share <= (ROUNDED if self.config.to == "dense" else NO_MORE):
            raise RunError(f"the new model's outputs are off by {share:.2g} in float64: an error of softmoe's")
        return found | {"float64_distance": share, "float64_other_predictions": others}

    def write(
        self, folder: Path, weights: dict[str, Tensor], card: dict[str, Any], files: dict[str, Any],
        new: VisionTransformer,
    ) -> None:  # fmt: skip
        """Makes the folder and, of a plain ViT, lets timm read it.

        Raises:
            RunError: timm reads something else.
        """
        write_checkpoint(
            folder, weights, card, {}, {name: json.dumps(each, indent=1) + "\n" for name, each in files.items()}
        )
        if self.config.to != "dense":
            return
        x = next(self.batches(self.splits.validation)).images
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().double()
        share, others = distance_in_float64(copy.deepcopy(new).cpu().double().eval(), theirs, x.cpu().double())
        if not share <= NO_MORE or others:
            raise RunError(f"what timm loads is off by {share:.2g} in float64: an error of softmoe's")
