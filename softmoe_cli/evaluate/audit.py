"""What a prediction depends on beside its image: neighbours in the batch, capacity, slots, single experts.

Everything is measured against the checkpoint as it is, image by image, with the same weights.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from softmoe_cli.config.model import Model
from softmoe_cli.data.splits import ImageSet
from softmoe_cli.evaluate.quality import Outcomes
from softmoe_cli.model.vit import build, count_tokens
from softmoe_cli.model.weights import load_weights, slot_axes
from softmoe_cli.moe.factorised import FactorisedHead
from softmoe_cli.moe.kind import Decider, Layer
from softmoe_cli.moe.layer import MoE

SHUFFLES = 3
AUDIT_DRAWS = 3
CAPACITY_STEPS = (0.25, 0.5, 0.75, 1.25, 1.5, 2, 4)
"""Capacities that are tried, as multiples of the checkpoint's own."""
DROPPED_SHARES = (0.25, 0.5)


@dataclass(frozen=True)
class Effect:
    """One change and what became of the predictions."""

    part: str
    setting: str
    block: int | str | None
    """Its number, or `head`."""
    top1_pct: float
    top1_change_pct: float
    """Change of top-1 accuracy, in percentage points."""
    changed_pct: float
    """Share of images with another prediction."""
    probability_change_max: float
    """Largest change of a label's probability."""
    polysemanticity: float | None = None
    """How far an expert is from mattering to one class only, from 0; None where several are left out, or nothing is
    lost."""


class Audit:
    """Measures a checkpoint on some images.

    Args:
        config: the checkpoint's model, with `weights`.
        said: gives the outcomes of a model on images in batches of a given size.
        images: the images to predict, `batch_size` at a time.
    """

    def __init__(
        self,
        config: Model,
        weights: dict[str, Tensor],
        said: Callable[[VisionTransformer, ImageSet, int], Outcomes],
        images: ImageSet,
        batch_size: int,
    ) -> None:
        self.config, self.weights, self.said, self.images = config, weights, said, images
        self.batch_size = batch_size
        self.model = self._variant({}, weights)
        self.layers = {i: block.mlp for i, block in enumerate(self.model.blocks) if isinstance(block.mlp, Layer)}
        head = self.model.head
        self.heads = {"head": head} if isinstance(head, FactorisedHead) else {}
        self.reference = said(self.model, images, batch_size)

    def findings(self, part: str) -> Iterator[Effect]:
        """The findings of one of `config.AUDITS`; none where `not_applicable` has a reason."""
        parts = {
            "neighbours": self._neighbours, "capacity": self._capacity, "slots": self._slots, "experts": self._experts,
            "kinds": self._kinds,
        }  # fmt: skip
        return parts[part]()

    def not_applicable(self, part: str) -> str | None:
        """Why a part says nothing about this model."""
        name = self.config.router_name
        if part == "neighbours":
            return None
        if not self.layers and not (part == "experts" and self.heads):
            return f"{name} has no experts"
        if part in ("capacity", "slots", "kinds") and self.config.blocks:
            return f"{name} is no single router: its blocks have options of their own (model.blocks)"
        gone = any(isinstance(layer, MoE) and len(layer.left) < len(layer.experts.w1) for layer in self.layers.values())
        if part == "capacity" and gone:
            return f"experts of {name} are gone, and those that are left have their slots; softmoe prune it first"
        slots = self._router.slots_per_expert
        if part == "capacity" and (slots is None or self._router.capacity_factor(slots, self._tokens) is None):
            return f"{name} has no capacity that could overflow"
        if part == "slots" and not self._router.slot_axes:
            return f"{name} has no slots of their own weights"
        if part == "kinds" and not self._router.kinds:
            return f"{name} has no kind of experts that it could do without"
        if part == "slots" and slots == 1:
            return "an expert has one slot, which goes with it: see experts"
        return None

    @property
    def _router(self) -> Decider:
        """The router of one layer: what is asked of it has the same answer in all layers."""
        return next(iter(self.layers.values())).router

    @property
    def _tokens(self) -> int:
        return count_tokens(self.model)

    def _variant(self, router: dict[str, Any], weights: dict[str, Tensor]) -> VisionTransformer:
        config = replace(self.config, router=self.config.router | router)
        model = build(config, weights["head.weight"].shape[0])
        load_weights(model, weights, keep_head=True, allow_unexpected=[])
        return model

    def _finding(
        self, part: str, setting: str, now: Outcomes, order: np.ndarray | None = None, block: int | str | None = None
    ) -> Effect:
        """`order`: for each image of `now`, its number in the reference."""
        then = self.reference
        index = torch.arange(len(then.label)) if order is None else torch.as_tensor(order)
        changed = (now.prediction != then.prediction[index]).double().mean().item()
        moved = (now.label_probability - then.label_probability[index]).abs().max().item()
        return Effect(part, setting, block, now.top1_pct, now.top1_pct - then.top1_pct, 100 * changed, moved)

    def _neighbours(self) -> Iterator[Effect]:
        """Other sizes of a batch, and other images beside each one."""
        group = max((layer.router.images_per_group for layer in self.layers.values()), default=1)
        for size in sorted({1, group, 4 * group} - {self.batch_size}):
            yield self._finding("neighbours", f"batches of {size}", self.said(self.model, self.images, size))
        for draw in range(SHUFFLES):
            order = np.random.default_rng(draw).permutation(len(self.images))
            now = self.said(self.model, self.images.subset(order), self.batch_size)
            yield self._finding("neighbours", f"shuffle {draw}, batches of {self.batch_size}", now, order)

    def _capacity(self) -> Iterator[Effect]:
        """Fewer and more slots per expert than it was trained with, up to one for every token of a group."""
        slots, tokens = self._router.slots_per_expert, self._router.images_per_group * self._tokens
        assert slots is not None
        steps = {min(tokens, max(1, round(slots * step))) for step in CAPACITY_STEPS}
        for p in sorted(steps - {slots}):
            factor = self._router.capacity_factor(p, self._tokens)
            now = self.said(self._variant({"slots_per_expert": p}, self.weights), self.images, self.batch_size)
            yield self._finding("capacity", f"{p} slots per expert (factor {factor:.3g}) for {slots}", now)

    def _slots(self) -> Iterator[Effect]:
        """Keeps only the first slots of every expert, as if the model had no others: both softmaxes are over fewer
        slots."""
        p, axes = self._router.slots_per_expert, slot_axes(self.model)
        assert p is not None
        for q in sorted({p // 2**halving for halving in range(1, p.bit_length())}):
            fewer = {key: w.narrow(axes[key], 0, q) if key in axes else w for key, w in self.weights.items()}
            now = self.said(self._variant({"slots_per_expert": q}, fewer), self.images, self.batch_size)
            yield self._finding("slots", f"{q} slots per expert for {p}", now)

    def _kinds(self) -> Iterator[Effect]:
        """Forbids each kind of experts in turn in all blocks: tokens choose among the others. Says what that makes of
        the cost."""
        _, usual = self._counting_rows()
        for kind in self._router.kinds:
            with ExitStack() as stack:
                for layer in self.layers.values():
                    stack.enter_context(layer.router.without(kind))
                now, rows = self._counting_rows()
            yield self._finding("kinds", f"without {kind} experts: {rows:.2f} MLPs per token for {usual:.2f}", now)

    def _counting_rows(self) -> tuple[Outcomes, float]:
        """The outcomes, and how many rows of experts each token has in the mean over layers."""
        landed: list[Tensor] = []

        def count(_router: Decider, _inputs: object, routing: Any) -> None:
            landed.append(routing.landed)

        with ExitStack() as stack:
            for layer in self.layers.values():
                stack.enter_context(layer.router.register_forward_hook(count))
            now = self.said(self.model, self.images, self.batch_size)
        return now, int(torch.stack(landed).sum()) / (len(self.images) * self._tokens * len(self.layers))

    def _experts(self) -> Iterator[Effect]:
        """Lets experts return zero, without routing anew: each expert in turn in every block and the head, then some in
        all blocks."""
        parts: list[tuple[int | str, Layer | FactorisedHead]] = [*self.layers.items(), *self.heads.items()]
        for block, part in parts:
            there = part.left if isinstance(part, MoE) else range(part.router.num_experts)
            for place, expert in enumerate(there):
                with part.silenced([place]):
                    now = self.said(self.model, self.images, self.batch_size)
                found = self._finding("experts", f"without expert {expert}", now, block=block)
                yield replace(found, polysemanticity=polysemanticity(self.reference, now))
        if not self.layers:
            return
        count = min(layer.router.num_experts for layer in self.layers.values())
        more = " or more" if any(layer.router.num_experts > count for layer in self.layers.values()) else ""
        for dropped in sorted({round(share * count) for share in DROPPED_SHARES} - {0, count}):
            for draw in range(AUDIT_DRAWS):
                rng = np.random.default_rng(draw)
                with ExitStack() as stack:
                    for layer in self.layers.values():
                        some = rng.choice(layer.router.num_experts, dropped, replace=False).tolist()
                        stack.enter_context(layer.silenced(some))
                    now = self.said(self.model, self.images, self.batch_size)
                setting = f"without {dropped} of {count}{more} in every block, draw {draw}"
                yield self._finding("experts", setting, now)


def polysemanticity(then: Outcomes, now: Outcomes) -> float | None:
    """How many classes an expert matters to: the classes' losses of accuracy without it, as a vector of length one, and
    its distance from the unit vector of the class that loses most. 0: one class only. None if no class loses.

    Class-level polysemanticity of muMoE (Oldfield et al., 2024), https://arxiv.org/abs/2402.12550; whether they
    normalise in this way could not be checked."""
    images, before = then.by_class(then.classes)
    lost = (before - now.by_class(then.classes)[1]).double() / images.clamp(min=1)
    if not lost.max() > 0:
        return None
    lost /= lost.norm()
    lost[lost.argmax()] -= 1
    return lost.norm().item()


def summary(findings: Sequence[Effect]) -> list[Effect]:
    """Shortens the findings of single experts to two rows per block, their mean and the worst; others stay as they
    are."""
    rows = []
    for block in dict.fromkeys(finding.block for finding in findings):
        some = [finding for finding in findings if finding.block == block]
        if block is None:
            rows += some
            continue
        worst = min(some, key=lambda finding: finding.top1_pct)
        means = [
            sum(getattr(finding, key) for finding in some) / len(some)
            for key in ("top1_pct", "top1_change_pct", "changed_pct", "probability_change_max")
        ]
        known = [finding.polysemanticity for finding in some if finding.polysemanticity is not None]
        mean = sum(known) / len(known) if known else None
        where = f"block {block}" if isinstance(block, int) else f"the {block}"
        average = Effect("experts", f"{where}, one of {len(some)}: mean", block, *means)
        rows.append(replace(average, polysemanticity=mean))
        rows.append(replace(worst, setting=f"{where}, {worst.setting}: the worst"))
    return rows
