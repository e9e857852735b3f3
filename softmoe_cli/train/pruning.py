"""Experts that go while a model is finetuned: scores, windows, and the deadline.

After Task-Specific Expert Pruning (Chen et al., 2022), https://arxiv.org/abs/2206.00277, Section "eager"; the rule
itself is prune/rule.py. The stacked weights keep their shape to the end of the run, so that moments, averages,
checkpoints and divided weights keep theirs; what goes is neither computed nor read any more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from softmoe_cli.config.model import Model
from softmoe_cli.config.pruning import MEASURED
from softmoe_cli.config.run import Config
from softmoe_cli.cost.fit import training_cost
from softmoe_cli.cost.flop import Cost, account
from softmoe_cli.cost.load import Load
from softmoe_cli.cost.served import served_tasks
from softmoe_cli.errors import UsageError
from softmoe_cli.moe.kind import Decided
from softmoe_cli.moe.layer import MoE
from softmoe_cli.moe.routing import Routing, most_precise
from softmoe_cli.parallel import Crew, is_part
from softmoe_cli.prune.fold import folded_model
from softmoe_cli.prune.rule import largest, shares, survivors
from softmoe_cli.prune.scores import prunable, random_scores, router_norms
from softmoe_cli.prune.smaller import smaller_model
from softmoe_cli.terminal import Screen
from softmoe_cli.train.progress import Budget, Progress


def deadline(budget: Budget, until: float) -> float:
    """Where the last window ends, in the unit of the budget: at a whole step, the first one at the earliest."""
    return budget.total * until if budget.steps is None else max(1, round(budget.steps * until))


@dataclass
class Pruning:
    """One run's pruning.

    Attributes:
        layers: the model's, by block.
        window: by block, what was measured of each expert in this window, of all processes; by=router_change: the
            norms of the router's parts when it began.
        total: the same since the run began.
        now: what this process has measured in this step.
    """

    config: Config
    load: Load
    budget: Budget
    layers: dict[int, MoE]
    window: dict[int, Tensor] = field(default_factory=dict)
    total: dict[int, Tensor] = field(default_factory=dict)
    now: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config, load: Load, budget: Budget, model: VisionTransformer, screen: Screen) -> "Pruning":
        """The pruning of a model that has its first weights, and a line about it; from now on the weights say which
        experts are left.

        Raises:
            UsageError: experts that cannot be pruned, or fewer than are to stay.
        """
        p = config.prune
        layers = prunable(model, config.model, p.by, "prune.by")
        for place, layer in layers.items():
            if p.keep is not None and p.keep > len(layer.left):
                raise UsageError(f"prune.keep={p.keep}: block {place} has {len(layer.left)} experts")
            layer.prunable(balance=p.balance == "kept")
        pruning = cls(config, load, budget, layers)
        for place, layer in layers.items():
            like = layer.experts.w1
            start = torch.zeros(len(like), dtype=most_precise(like))
            if p.by == "router_change":
                start = pruning._norms(place)
            pruning.window[place], pruning.total[place] = start.clone(), start
        screen.row("pruning", pruning.described())
        return pruning

    def described(self) -> str:
        """What goes by what, and when, for the header."""
        p, last = self.config.prune, deadline(self.budget, self.config.prune.until)
        left = ", ".join(f"{len(layer.left)} in block {place}" for place, layer in self.layers.items())
        at = f"step {last:,.0f}" if self.budget.steps is not None else f"second {last:,.0f} of training"
        words = [f"{p.keep} of the experts of each block ({left}), chosen by {p.by}, from {at} on"]
        if p.windows > 1 and p.threshold:
            words.append(
                f"before that those go that have less than {p.threshold:g} of the mean share, at the end of "
                f"{p.windows - 1} windows" + (", of all so far" if p.compare == "all" else "")
            )
        if p.by in MEASURED:
            words.append("measured as training routes, noise included")
        words.append(f"balancing {p.balance} in a block that has lost one")
        return "; ".join(words)

    # --- what checkpoints hold ----------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"prune.{place}.{name}": each[place]
            for name, each in (("window", self.window), ("total", self.total))
            for place in self.layers
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for place in self.layers:
            for name, each in (("window", self.window), ("total", self.total)):
                each[place] = tensors[f"prune.{place}.{name}"].to(each[place].dtype)

    # --- on the way ---------------------------------------------------------------------------------------------------

    def open(self, progress: Progress) -> bool:
        """Whether experts may still go."""
        return progress.window < self.config.prune.windows

    def see(self, decided: Sequence[Decided]) -> None:
        """Measures what the routers have decided about a part of a batch, noise included."""
        if self.config.prune.by not in MEASURED:
            return
        routings = [each for each in decided if isinstance(each, Routing)]
        for (place, layer), routing in zip(self.layers.items(), routings, strict=True):
            measured = routing.measured(self.config.prune.by)
            if place not in self.now:
                self.now[place] = measured.new_zeros(len(layer.experts.w1))
            self.now[place][layer.left] += measured

    def add(self, crew: Crew) -> None:
        """Adds up what all processes have measured in an update."""
        if not self.now:
            return
        everyones = crew.add(torch.cat(list(self.now.values()))).cpu()  # blocks may have different numbers of experts
        for place, measured in zip(self.now, everyones.split([len(each) for each in self.now.values()]), strict=True):
            self.window[place] += measured
            self.total[place] += measured
        self.now = {}

    def decide(self, progress: Progress) -> dict[int, "Decision"]:
        """What goes after this step, by block, if a window ends with it; else nothing."""
        p = self.config.prune
        here = self.budget.position(progress)
        window = min(p.windows, int(here * p.windows // deadline(self.budget, p.until)))
        if window <= progress.window:
            return {}
        progress.window = window
        decisions = {}
        for place, layer in self.layers.items():
            last, left = window == p.windows, layer.left
            scores = self._scores(place, of_all=last or p.compare == "all")
            assert p.keep is not None
            stay = largest(scores, left, p.keep) if last else survivors(scores, left, p.threshold, p.keep)
            why = "the deadline" if last else f"below {p.threshold:g} of the mean share"
            decisions[place] = Decision(window, list(left), shares(scores, left), stay, why)
            self.window[place] = self._norms(place) if p.by == "router_change" else torch.zeros_like(self.window[place])
        return decisions

    def cost(self) -> Cost:
        """What an image costs with the experts that are left."""
        return training_cost(replace(self.load, left={place: layer.left for place, layer in self.layers.items()}))

    def _scores(self, place: int, *, of_all: bool) -> list[float]:
        since = (self.total if of_all else self.window)[place]
        match self.config.prune.by:
            case "random":
                return random_scores(self.config.seed, place, len(since))
            case "router_change":
                return (self._norms(place) - since).tolist()
        return since.tolist()

    def _norms(self, place: int) -> Tensor:
        router = self.layers[place].router
        whole = {
            f"blocks.{place}.mlp.router.{name}": each.full_tensor() if is_part(each) else each
            for name, each in router.named_parameters()
        }
        return router_norms(whole, place, self.layers[place])


def served(config: Model, vit: VisionTransformer, cost: Cost) -> dict[str, Any]:
    """What the model costs when it is served: one task alone, the mean over tasks, where it knows several and softmoe
    extract takes it; and after softmoe prune where experts have gone, as a plain ViT if it is one. `cost`: with all
    experts."""
    layers = [
        block.mlp for block in vit.blocks if isinstance(block.mlp, MoE) and "alive" in dict(block.mlp.named_buffers())
    ]
    form, costs = None, [cost]
    if config.tasks:
        alone = list(served_tasks(config, vit).values())
        form, costs = ("task", alone) if alone else (None, [cost])
    elif any(len(layer.left) < len(layer.experts.w1) for layer in layers):
        try:
            form, model = "dense", folded_model(config, vit)
        except UsageError:
            form, model = "experts", smaller_model(config, vit)
        costs = [account(model, vit.num_classes)]
    return {
        "experts_left": ",".join(str(len(layer.left)) for layer in layers) or None,
        "served_as": form,
        "served_params_m": fmean(each.params for each in costs) / 1e6,
        "served_forward_gflop": fmean(each.forward_flop for each in costs) / 1e9,
    }


@dataclass(frozen=True)
class Decision:
    """What one window decides about one block."""

    window: int
    left: list[int]
    shares: list[float]
    stay: list[int]
    why: str

    @property
    def goes(self) -> list[int]:
        return [expert for expert in self.left if expert not in self.stay]

    def row(self) -> dict[str, Any]:
        """As routing.jsonl has it."""
        return {
            "window": self.window, "of": self.left, "shares": self.shares, "experts_left": len(self.stay),
            "dropped": self.goes, "why": self.why if self.goes else "",
        }  # fmt: skip
