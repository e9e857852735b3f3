"""Arms of equal cost: one setting of each is solved for, so that it costs what the baseline does, before it starts."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from softmoe_cli.config.commands import FREE_KEYS, MatchConfig
from softmoe_cli.config.recipe import BUDGETS
from softmoe_cli.config.run import Config
from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.options.compose import changed_tree
from softmoe_cli.options.conf_files import conf_folder, load_yaml
from softmoe_cli.text import word_of

NO_MATTER = 0.005
"""An arm whose cost differs from the baseline's by less than this share stays as it was typed: compare calls that no
difference."""
IN_LAYERS = ("forward_gflop", "latency_ms")


@dataclass(frozen=True)
class Levelled:
    """What makes an arm cost what the baseline does: `changes`, as words; none where it does already. `free` is the
    setting that was solved for."""

    free: str | None
    changes: list[str]
    cost: float
    baseline_cost: float


def free_setting(by: str, router: dict[str, Any]) -> str | None:
    """Which setting is solved for where nobody chose one: for training FLOPs the budget; in the layers slots, which
    cost arithmetic, or experts, which cost parameters. None for a dense model, which has neither."""
    if by == "train_pflop":
        return "train.steps"
    wanted = ("slots_per_expert", "num_experts") if by in IN_LAYERS else ("num_experts",)
    return next((f"model.router.{name}" for name in wanted if name in router), None)


@dataclass
class Leveller:
    """What arms are levelled by: the cost `by`, the setting `free` (None: each router's own), and how near. `said`:
    what counts as typed for every arm (compose.said_of_data)."""

    command: str
    by: str
    free: str | None
    tolerance: float
    said: tuple[str, ...]

    def level(self, arms: Sequence[tuple[str, list[str], dict[str, Any]]], base: int) -> list[Levelled]:
        """Levels arms, given by label, words and composed configuration, with the one at the place `base`.

        Raises:
            UsageError: some arm cannot be made so; the message names the nearest on both sides.
        """
        self._sets: dict[str, tuple[int, int]] = {}
        target = self._matched(self._checked(arms[base][1], arms[base][2]), FREE_KEYS[-1], arms[base][0])
        found, errors = [], []
        for place, (label, words, tree) in enumerate(arms):
            try:
                found.append(self._one(words, tree, target, itself=place == base))
            except (UsageError, RunError) as error:
                errors.append(f"{label}: {error}")
        if errors:
            head = (
                f"equal={self.by}: {len(errors)} of {len(arms)} arms cannot be made to cost what {arms[base][0]} does:"
            )
            raise UsageError("\n  ".join([head, *errors]))
        return found

    def _one(self, words: list[str], tree: dict[str, Any], target: MatchConfig, *, itself: bool) -> Levelled:
        from softmoe_cli.cost.match import cost_of, match, timed_trial

        config = self._checked(words, tree)
        free = self.free or free_setting(self.by, config.model.router)
        asked = self._matched(config, free or FREE_KEYS[-1], target.to)
        timed = self.by == "latency_ms"
        if timed:
            trial = timed_trial({}, asked, target)
            cost, wanted = trial.cost, trial.other_cost
        else:
            cost, wanted = cost_of(asked), cost_of(target)
        if itself or abs(cost / wanted - 1) < (self.tolerance if timed else min(NO_MATTER, self.tolerance)):
            return Levelled(None, [], cost, wanted)
        if free is None:
            raise UsageError(
                f"its {self.by} is {cost:.4g}, the other's {wanted:.4g}, and a dense model has neither slots nor "
                f"experts to solve for; choose another size, or one of free={', '.join(FREE_KEYS)}"
            )

        def candidate(changes: dict[str, Any]) -> MatchConfig:
            return self._matched(self._checked(words, changed_tree(tree, changes)), free, target.to)

        best = match(asked, target, candidate)
        changes = dict(best.overrides)
        if free == "train.steps":
            others = [key for key in BUDGETS if key != "steps" and getattr(config.train, key) is not None]
            changes |= {f"train.{key}": None for key in others}
        told = [word_of(*each) for each in changes.items()]
        return Levelled(free, told, best.cost, best.other_cost)

    def _checked(self, words: list[str], tree: dict[str, Any]) -> Config:
        from softmoe_cli.model.weights import experts_left
        from softmoe_cli.options.inherit import resolve

        config, source = resolve(self.command, copy.deepcopy(tree), [*words, *self.said])
        weights = {} if source is None else source.weights
        left = experts_left(weights)
        if source is not None and any(len(left[at]) < len(weights[f"blocks.{at}.mlp.alive"]) for at in left):
            raise UsageError(
                f"equal={self.by} counts all experts, and of {source.label} some went in its training; cut them away "
                f"first: softmoe prune checkpoint={source.label}"
            )
        return config

    def _matched(self, config: Config, free: str, to: str) -> MatchConfig:
        """What softmoe match would be asked about a run's model and budget."""
        t = config.train
        if t.batch_size == "auto":
            raise UsageError("train.batch_size=auto is not known before a run starts; give a number")
        if t.precision == "auto":
            raise UsageError("train.precision=auto is not known before a run starts; give fp32, bf16 or fp16")
        partly = {
            "optim.freeze": bool(config.optim.freeze), "model.adapter": config.model.adapter.name != "none",
            "prune.keep": config.prune.keep is not None,
        }  # fmt: skip
        if self.by == "train_pflop" and any(partly.values()):
            key = next(key for key, there in partly.items() if there)
            raise UsageError(f"equal=train_pflop counts the training of all weights, {key} trains less; leave one out")
        images, classes = self._facts(config)
        return MatchConfig(
            model=config.model, data=replace(config.data, num_classes=classes), batch_size=t.batch_size,
            accumulate=t.accumulate, recompute=t.recompute, precision=t.precision, compile=t.compile,
            repeats=load_yaml(conf_folder() / "_measured.yaml")["repeats"], device=config.device,
            threads=config.threads, free=free if self.by == "train_pflop" or free != "train.steps" else FREE_KEYS[0],
            to=to, by=self.by, tolerance=self.tolerance, steps=self._steps(config, images), format="table",
        )  # fmt: skip

    def _facts(self, config: Config) -> tuple[int, int]:
        """How many training images and classes a configuration's data have."""
        from softmoe_cli.data import sets

        key = repr(config.data)
        if key not in self._sets:
            splits = sets.load(config.data)
            self._sets[key] = len(splits.train), sets.num_classes(config.data, splits)
        return self._sets[key]

    def _steps(self, config: Config, images: int) -> int | None:
        from softmoe_cli.train.progress import Budget

        if self.by != "train_pflop":
            return None
        steps = Budget.of(config, images).steps
        if steps is None:
            raise UsageError(
                "equal=train_pflop needs a budget that is known before: train.steps, train.epochs or train.images, "
                f"not train.minutes={config.train.minutes:g}"
            )
        return steps
