"""What is looked at on the way: quality on the validation images, routing, few-shot quality; and at the end the test
images, once."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softmoe_cli.data import batches, splits
from softmoe_cli.data.mix import MixedSet
from softmoe_cli.evaluate.fewshot import fewshot
from softmoe_cli.evaluate.quality import Outcomes, by_task, features, outcomes, qualities, routing_statistics, together
from softmoe_cli.moe.kind import Layer
from softmoe_cli.train.blame import exploded
from softmoe_cli.train.recording import Recording
from softmoe_cli.train.stop import Stop
from softmoe_cli.train.tasks import changes, taken_by, told_by_name


@dataclass(frozen=True)
class Looks:
    """Evaluations of the model whose quality counts; each writes its rows and can be stopped between two batches.

    Raises, from every method:
        RunError: the last update has spoilt the weights.
        Interrupted: a signal asked to stop; no row was written.
    """

    recording: Recording
    stop: Stop

    def validation(self) -> dict[str, Any]:
        """The row of a look at the validation images.

        Routing statistics of every router on the first images, the same ones each time, go into routing.jsonl; their
        means over MoE layers (over adapters, where there are no such layers), which are few enough for W&B, into the
        validation row, beside few-shot quality."""
        setup, model = self.recording.setup, self.recording.trained.evaluated
        with self.recording.progress.booked("eval"):
            found = routing_statistics(model, next(self._batches(setup.splits.validation, [0])), setup.autocast)
            shots = self._few_shots() if setup.config.train.fewshot else {}
        found = [(place, each, told_by_name(told, setup.config.data.tasks)) for place, each, told in found]
        earlier = self.recording.run.rows("routing.jsonl") if any(told for *_, told in found) else []
        of_tasks: dict[str, float] = {}
        for place, numbers, told in found:
            numbers |= changes(earlier, int(place["block"]), told)
            if "task_experts" in told:
                of_tasks |= taken_by(int(place["block"]), told, self._experts(int(place["block"])))
        layers = [each for place, each, _ in found if "beside" not in place] or [each for _, each, _ in found]
        keys = dict.fromkeys(key for layer in layers for key in layer)
        having = {key: [layer[key] for layer in layers if key in layer] for key in keys}
        means = {f"routing_{key}": sum(numbers) / len(numbers) for key, numbers in having.items()}
        row = self._quality("validation", setup.splits.validation, means | of_tasks | shots)
        for place, numbers, told in found:  # last, so that a stop leaves all rows or none
            self.recording.run.append("routing.jsonl", {"step": row["step"], **place, **numbers, **told})
        return row

    def test(self) -> dict[str, Any]:
        """The row of the one reading of the test images."""
        return self._quality("test", self.recording.setup.splits.test, {})

    @property
    def moe_blocks(self) -> list[int]:
        blocks = self.recording.trained.model.blocks
        return [place for place, block in enumerate(blocks) if isinstance(block.mlp, Layer)]

    def _quality(self, split: str, images: splits.ImageSet, beside: dict[str, float]) -> dict[str, Any]:
        progress, tasks = self.recording.progress, self.recording.setup.config.data.tasks
        with progress.booked("eval"):
            if isinstance(images, MixedSet) and tasks is not None:
                of_each = {name: self._outcomes(images.of_task(task)) for task, name in enumerate(tasks)}
                values = dict(qualities(together(list(of_each.values())))) | by_task(of_each)
            else:
                values = dict(qualities(self._outcomes(images)))
        if not math.isfinite(values["loss"]):
            raise exploded(f"{split} loss {values['loss']}", progress.step)
        return self.recording.row(split, values | beside)

    def _experts(self, block: int) -> int:
        layer = self.recording.trained.model.blocks[block].mlp
        assert isinstance(layer, Layer)
        return layer.router.num_experts

    def _outcomes(self, images: splits.ImageSet) -> Outcomes:
        setup = self.recording.setup
        turns = setup.crew.turns(len(images), setup.config.train.eval_batch_size)
        return outcomes(
            self.recording.trained.evaluated, self.stop.watch(self._batches(images, turns.own)),
            loss=setup.config.train.loss, autocast=setup.autocast, collect=turns.collect,
        )  # fmt: skip

    def _few_shots(self) -> dict[str, float]:
        """Few-shot quality. Shots are drawn with the seed of the data's cut, so that every run of a study has the same
        shots."""
        setup = self.recording.setup
        numbers = fewshot(
            self._features, setup.config.train.fewshot, setup.splits.train, setup.splits.validation, None,
            len(setup.splits.classes), setup.config.data.split_seed,
        )  # fmt: skip
        return {key: value for key, value in numbers if key.endswith("top1_pct")}

    def _features(self, images: splits.ImageSet) -> Tensor:
        setup = self.recording.setup
        turns = setup.crew.turns(len(images), setup.config.train.eval_batch_size)
        parts = self.stop.watch(self._batches(images, turns.own))
        found = features(self.recording.trained.evaluated, parts, setup.autocast, turns.collect)
        if not torch.isfinite(found).all():
            raise exploded("features that are not finite", self.recording.progress.step)
        return found

    def _batches(self, images: splits.ImageSet, turns: list[int]) -> Iterator[batches.Batch]:
        config = self.recording.setup.config
        return batches.eval_batches(
            images,
            config.data,
            image_size=config.model.image_size,
            in_chans=config.model.in_chans,
            batch_size=config.train.eval_batch_size,
            device=self.recording.setup.device,
            turns=turns,
        )
