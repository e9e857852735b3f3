"""The three forms of an extracted model, which compute the same, and a model seen as one of a single task."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from softmoe_cli.config.model import Model
from softmoe_cli.errors import UsageError
from softmoe_cli.extract.cut import Cut, cut_out, outputs_of
from softmoe_cli.model.vit import build
from softmoe_cli.model.weights import load_weights
from softmoe_cli.moe.by_task import TaskRouter
from softmoe_cli.moe.kind import Layer
from softmoe_cli.moe.layer import MoE
from softmoe_cli.prune.fold import folded_model, folded_weights


@torch.no_grad()
def fold(model: Model, vit: VisionTransformer) -> tuple[Model, dict[str, Tensor]]:
    """A model of one task with one expert in each block, as wide as its k experts and the shared ones together: their
    hidden units side by side, their outputs added up by the gates, which are constants (1 of shared experts). Exact, as
    GELU takes each unit by itself.

    Raises:
        UsageError: its layers would need different widths, for which a model has one option.
    """
    weights, options, widths = dict(vit.state_dict()), {}, {}
    for place, block in enumerate(vit.blocks):
        if not isinstance(block.mlp, Layer):
            continue
        layer, options[place] = block.mlp, dict(model.router_of(place))
        if not isinstance(layer, MoE) or not isinstance(layer.router, TaskRouter):
            raise UsageError(
                f"form=folded: block {place} decides by token or image, so that its experts cannot be folded into one, "
                "and experts of a model have one width; leave form=experts"
            )
        gates, chosen = layer.router.settled()
        w1, b1, w2, b2 = (part[chosen[0]] for part in layer.experts.weights_left())
        start, c = f"blocks.{place}.mlp.experts.", gates[0]
        parts = [(*w1,), (*b1,), (*(c[:, None, None] * w2),), (*(c[:, None] * b2),)]
        if layer.shared is not None:
            parts = [(*own, *shared) for own, shared in zip(parts, layer.shared.weights_left(), strict=True)]
            gone = f"blocks.{place}.mlp.shared."
            weights = {key: value for key, value in weights.items() if not key.startswith(gone)}
        weights[f"{start}w1"] = torch.cat(parts[0], dim=1)[None]
        weights[f"{start}b1"] = torch.cat(parts[1])[None]
        weights[f"{start}w2"] = torch.cat(parts[2])[None]
        weights[f"{start}b2"] = torch.stack(parts[3]).sum(dim=0, keepdim=True)
        alone = {"num_experts": 1, "k": 1, "assigned": None, "shared_experts": 0}
        options[place] |= {key: value for key, value in alone.items() if key in options[place]}
        if "table" in dict(layer.router.named_parameters()):
            weights[f"blocks.{place}.mlp.router.table"] = weights[f"blocks.{place}.mlp.router.table"][:, :1]
        widths[place] = weights[f"{start}w1"].shape[2]
    if len(set(widths.values())) > 1:
        raise UsageError(f"form=folded: blocks {sorted(widths)} would have experts of different widths; leave it out")
    if not widths:
        raise UsageError("form=folded: no block has experts that a task takes; leave form=experts")
    return replace(model.with_routers(options), expert_width=next(iter(widths.values()))), weights


class OneTask(nn.Module):
    """A model's logits for the classes of one task, for images of that task. `task`: its number; None: it is the only
    one that the model knows."""

    def __init__(self, model: nn.Module, task: int | None, outputs: Sequence[int]) -> None:
        super().__init__()
        self.model, self.task, self.outputs = model, task, list(outputs)

    def forward(self, x: Tensor) -> Tensor:
        inputs = (x,) if self.task is None else (x, torch.full((len(x),), self.task, device=x.device))
        logits: Tensor = self.model(*inputs)
        return logits[:, self.outputs]


def one_task(model: Model, vit: VisionTransformer, name: str) -> OneTask:
    """`OneTask` of a model that knows the task of this name among others, or no other."""
    if model.tasks is None:
        return OneTask(vit, None, range(vit.num_classes))
    return OneTask(vit, list(model.tasks).index(name), outputs_of(model.tasks, [name]))


@dataclass(frozen=True)
class Made:
    """A model that was made out of another one, with its weights in float64."""

    model: Model
    weights: dict[str, Tensor]
    cut: Cut

    @classmethod
    def of(cls, form: str, model: Model, vit: VisionTransformer, which: list[str]) -> "Made":
        """In one of the three forms, of a model in float64."""
        cut = cut_out(model, vit, which)
        made = cls(cut.model, cut.weights, cut)
        if form == "experts":
            return made
        if made.cut.kept or form == "folded":
            made = cls(*fold(made.model, made.built(torch.float64)), cut)
        if form == "dense":
            wide = made.built(torch.float64)
            try:
                made = cls(folded_model(made.model, wide), folded_weights(made.model, wide), cut)
            except UsageError as error:  # which speaks of softmoe prune's option
                raise UsageError(str(error).replace("to=dense", "form=dense")) from error
        return made

    def built(self, dtype: torch.dtype) -> VisionTransformer:
        vit = build(self.model, len(self.weights["head.weight"])).to(dtype).eval()
        load_weights(vit, self.weights_as(dtype), keep_head=True, allow_unexpected=[])
        return vit

    def weights_as(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The weights, all but those that are no numbers: which experts are left where some were pruned."""
        return {
            key: value.to(dtype).contiguous() if value.is_floating_point() else value
            for key, value in self.weights.items()
        }

    def blocks(self, whole: VisionTransformer) -> dict[str, dict[str, Any]]:
        """For each block of experts which of them stay, and of how many."""
        found: dict[str, dict[str, Any]] = {
            str(place): {"kept": own, "of": whole.blocks[place].mlp.router.num_experts}
            for place, own in self.cut.kept.items()
        }
        found |= {
            str(place): {"kept": None, "why": f"{router} does not decide by task, so that all its experts stay"}
            for place, router in self.cut.whole.items()
        }
        return dict(sorted(found.items(), key=lambda each: int(each[0])))
