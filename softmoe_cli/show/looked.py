"""What a checkpoint does with images: predictions, and for each layer which expert takes which patch. Only what is
painted is kept, so that any number of images can be looked at."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from softmoe_cli.data.batches import Batch
from softmoe_cli.evaluate.quality import Outcomes, outcomes, watched_routers
from softmoe_cli.moe.kind import Decided, Decider, Shares
from softmoe_cli.moe.layer import MoE

LIKED = 8
"""Patches that are kept of each expert."""
CLASSES = 10
"""The most classes whose mean maps are kept: those of the images' task with the lowest numbers."""


@dataclass(frozen=True)
class LayerLook:
    """What one layer did with the patches of many images; the class token and registers are left out.

    Attributes:
        name: the block and, of adapters, the sublayer.
        grid: patches from top to bottom and from left to right.
        painted: the shares of the images that are painted.
        load: each expert's part in all tokens of all images: how many it sees, or the sum of the weights that they
            give it; 0 of one that was pruned.
        liked: of each expert, its patches with the largest weights, one of an image: the weight (minus infinity: there
            is none), the image and the patch.
        by_class: mean map of each expert over the images of a class: share of images in which it sees the patch, or
            mean weight of the patch. Of a class without images it is 0. The first one is the task's first.
        dropped_share: share of the patches that no expert saw.
    """

    name: str
    grid: tuple[int, int]
    painted: Shares
    load: Float[Tensor, " e"]
    liked: tuple[Float[Tensor, "e t"], Int[Tensor, "e t"], Int[Tensor, "e t"]]
    by_class: Float[Tensor, "c e n"]
    dropped_share: float

    @property
    def num_experts(self) -> int:
        return len(self.load)

    @property
    def order(self) -> list[int]:
        """Experts, the largest load first."""
        return self.load.argsort(descending=True, stable=True).tolist()


@dataclass(frozen=True)
class ModelLook:
    """What a checkpoint did with images.

    Attributes:
        pixels: of all images, as the model saw them, in colour.
        painted: the numbers of those whose shares are kept.
        said: predictions; None where nobody knows the right ones.
        layers: in the order of the forward pass; none of a model without experts.
        silent: names of layers whose router does not say its shares.
    """

    pixels: UInt8[np.ndarray, "n s s 3"]
    painted: list[int]
    said: Outcomes | None
    layers: list[LayerLook]
    silent: list[str]


@dataclass
class _Watch:
    """Gathers what one layer says, batch by batch."""

    name: str
    grid: tuple[int, int]
    prefix: int
    classes: int
    first: int
    kept: list[Shares] = field(default_factory=list)
    best: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    load: Tensor | float = 0.0
    sums: Tensor | None = None
    dropped: float = 0.0
    tokens: int = 0

    def see(self, shares: Shares, batch: Batch, painted: Sequence[int], gone: Sequence[int] = ()) -> None:
        shares = numbered_as_whole(patches_of(shares, self.prefix), gone)
        weights = expert_weights(shares, "taken")
        part, given = weights, expert_weights(shares, "given")
        if shares.chosen is not None:
            sees = sees_token(shares.chosen, given.shape[2])
            part, given, weights = sees, sees, weights.masked_fill(sees == 0, -torch.inf)
            self.dropped += float((sees.sum(dim=2) == 0).sum())
        weights = weights.index_fill(2, torch.tensor(gone, dtype=torch.int64), -torch.inf)
        self.tokens += given.shape[0] * given.shape[1]
        self.load = self.load + given.sum(dim=(0, 1))
        strongest, patch = weights.max(dim=1)
        self.best.append((strongest, patch))
        if self.sums is None:
            self.sums = part.new_zeros(self.classes, part.shape[1], part.shape[2])
        own, here = self._of_task(batch.labels)
        self.sums.index_add_(0, own[here], part[here])
        chosen = None if shares.chosen is None else shares.chosen[painted]
        taken = None if shares.taken is None else shares.taken[painted]
        self.kept.append(shares._replace(given=shares.given[painted], taken=taken, chosen=chosen))

    def _of_task(self, labels: Int[Tensor, " b"]) -> tuple[Int[Tensor, " b"], Bool[Tensor, " b"]]:
        """The labels' numbers in their task, and which of these have a map."""
        own = labels - self.first
        return own, (own >= 0) & (own < self.classes)

    def told(self, labels: Tensor) -> LayerLook:
        weight, patch = (torch.cat(each) for each in zip(*self.best, strict=True))
        best, image = weight.T.topk(min(LIKED, len(weight)), dim=1)
        own, here = self._of_task(labels)
        images = torch.bincount(own[here], minlength=self.classes)
        assert self.sums is not None and isinstance(self.load, Tensor)
        return LayerLook(
            self.name, self.grid, joined_shares(self.kept), self.load, (best, image, patch.T.gather(1, image)),
            (self.sums / images.clamp(min=1)[:, None, None]).mT, self.dropped / self.tokens,
        )  # fmt: skip


def patches_of(shares: Shares, prefix: int) -> Shares:
    """The shares without those of the first `prefix` tokens, in float32 on the CPU."""
    given, taken, chosen = (None if each is None else each[:, prefix:].cpu()
                            for each in (shares.given, shares.taken, shares.chosen))  # fmt: skip
    assert given is not None
    taken = None if taken is None else taken.float()
    return shares._replace(given=given.float(), taken=taken, expert=shares.expert.cpu(), chosen=chosen)


def numbered_as_whole(shares: Shares, gone: Sequence[int]) -> Shares:
    """The shares with each expert's number among all that a layer once had; those that are `gone` have no part."""
    if not gone:
        return shares
    b, n, columns = shares.given.shape
    some = int(shares.expert.max()) + 1
    left = torch.tensor([number for number in range(some + len(gone)) if number not in gone])
    own, none = columns // some, shares.given.new_zeros(b, n, columns // some * len(gone))
    expert = torch.cat([left[shares.expert], torch.tensor(gone).repeat_interleave(own)])
    order = expert.argsort(stable=True)  # a column is the same slot as in a checkpoint with all experts
    given, taken = (None if each is None else torch.cat([each, none], dim=2)[:, :, order]
                    for each in (shares.given, shares.taken))  # fmt: skip
    chosen = None if shares.chosen is None else torch.where(shares.chosen < 0, -1, left[shares.chosen.clamp(min=0)])
    assert given is not None
    return shares._replace(given=given, taken=taken, expert=expert[order], chosen=chosen)


def expert_weights(shares: Shares, kind: str) -> Float[Tensor, "b n e"]:
    """How much of each token an expert takes (the mean over its slots; where there are none, as much as it gives), or
    gives (the sum)."""
    taken = shares.taken if kind == "taken" and shares.taken is not None else None
    columns = shares.given if taken is None else taken
    experts = int(shares.expert.max()) + 1
    sums = columns.new_zeros(*columns.shape[:2], experts).index_add(2, shares.expert, columns)
    return sums if taken is None else sums / torch.bincount(shares.expert, minlength=experts)


def sees_token(chosen: Int[Tensor, "b n k"], experts: int) -> Float[Tensor, "b n e"]:
    """1 where an expert sees a token, else 0."""
    places = chosen.masked_fill(chosen < 0, experts)
    return torch.zeros(*chosen.shape[:2], experts + 1).scatter(2, places, 1.0)[..., :-1]


def joined_shares(parts: Sequence[Shares]) -> Shares:
    """Shares of several batches one after the other. Tokens of one batch may have been seen by more experts at most
    than those of another."""
    first, chosen = parts[0], None
    if first.chosen is not None:
        most = max(part.chosen.shape[2] for part in parts if part.chosen is not None)
        chosen = torch.cat(
            [torch.nn.functional.pad(part.chosen, (0, most - part.chosen.shape[2]), value=-1)
             for part in parts if part.chosen is not None]
        )  # fmt: skip
    taken = None if first.taken is None else torch.cat([part.taken for part in parts if part.taken is not None])
    return first._replace(given=torch.cat([part.given for part in parts]), taken=taken, chosen=chosen)


def look_at(
    model: VisionTransformer,
    batches: Iterator[tuple[Batch, UInt8[np.ndarray, "b s s 3"]]],
    *,
    painted: Sequence[int],
    loss: str,
    autocast: torch.autocast,
    labelled: bool,
    first_class: int = 0,
) -> ModelLook:
    """One pass over the images, each batch with its pixels.

    Args:
        first_class: the number of the model's first answer that is of the images' task.
        painted: numbers of the images whose shares are kept, ascending.
        labelled: whether the batches' labels are classes of the model; otherwise nothing is made of them.
    """
    grid, prefix = model.patch_embed.grid_size, model.num_prefix_tokens
    classes = min(CLASSES, model.num_classes - first_class)
    watches: dict[str, _Watch] = {}
    silent: dict[str, None] = {}
    pixels: list[np.ndarray] = []
    labels: list[Tensor] = []
    now: list[Any] = []

    def fed() -> Iterator[Batch]:
        first = 0
        for batch, seen in batches:
            if not labelled:
                batch = batch._replace(labels=torch.zeros_like(batch.labels))
            here = [number - first for number in painted if first <= number < first + len(seen)]
            now[:] = [batch._replace(labels=batch.labels.cpu()), here]
            pixels.append(seen)
            labels.append(now[0].labels)
            first += len(seen)
            yield batch

    def remember(name: str, gone: Sequence[int]) -> Any:
        def hook(_router: Decider, _inputs: object, decision: Decided) -> None:
            shares = decision.shares()
            if shares is None:
                silent[name] = None
                return
            watch = watches.setdefault(name, _Watch(name, grid, prefix, classes, first_class))
            watch.see(shares, now[0], now[1], gone)

        return hook

    with ExitStack() as stack:
        for place, router in watched_routers(model):
            if place.get("beside") != "head":  # which sees an image as one token
                name = f"block {place['block']}" + (f", {place['beside']}" if "beside" in place else "")
                gone = pruned(model.blocks[int(place["block"])].mlp) if "beside" not in place else []
                stack.enter_context(router.register_forward_hook(remember(name, gone)))
        said = outcomes(model, fed(), loss=loss, autocast=autocast)
    layers = [watch.told(torch.cat(labels)) for watch in watches.values()]
    return ModelLook(np.concatenate(pixels), list(painted), said if labelled else None, layers, list(silent))


def pruned(layer: object) -> list[int]:
    """The experts of a layer that are no longer there."""
    if not isinstance(layer, MoE):
        return []
    return [number for number in range(len(layer.experts.w1)) if number not in layer.left]


def pixels_of(
    images: Float[Tensor, "b c s s"], mean: Float[Tensor, "#b c"], std: Float[Tensor, "#b c"]
) -> UInt8[np.ndarray, "b s s 3"]:
    """Normalised images as they look, in three colours."""
    plain = images.cpu() * std[:, :, None, None] + mean[:, :, None, None]
    whole = (plain * 255).round().clamp(0, 255).byte().expand(-1, 3, -1, -1)
    return np.ascontiguousarray(whole.permute(0, 2, 3, 1).numpy())
