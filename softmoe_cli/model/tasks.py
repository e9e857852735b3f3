"""A ViT that knows several tasks: each image is given with its task, and answered with one of that task's classes."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from timm.models._manipulate import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from softmoe_cli.errors import UsageError
from softmoe_cli.moe.routing import Carried, Router, has_numbers


class TaskVit(VisionTransformer):
    """timm's ViT, called with images and the task of each. Classes of other tasks have the logit -inf.

    Args:
        vit: whose parts and settings it takes over.
        tasks: the number of each task's classes, by its name; the head has them one task after the other.
    """

    answers: Tensor
    """Which classes each task has, (t, classes)."""

    def __init__(self, vit: VisionTransformer, tasks: Mapping[str, int]) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(vit.__dict__)
        self.tasks = dict(tasks)
        self.by_task = any(isinstance(module, Router) and module.by_task for module in vit.blocks.modules())
        own = torch.block_diag(*(torch.ones(1, number) for number in tasks.values())).bool()
        self.register_buffer("answers", own, persistent=False)

    def forward(self, x: Float[Tensor, "b c s s"], task: Int[Tensor, " b"] | None = None) -> Float[Tensor, "b classes"]:
        """
        Raises:
            ValueError: nobody has said the tasks, or there is no such task.
        """
        if task is None:
            raise ValueError(
                f"this model knows the tasks {', '.join(self.tasks)}, and an image of an unknown task has no answer: "
                "call it with (images, tasks)"
            )
        if has_numbers(task) and not bool(((task >= 0) & (task < len(self.tasks))).all()):
            raise ValueError(f"an image is of a task that is none of 0 to {len(self.tasks) - 1}: it has no answer")
        logits: Tensor = self.forward_head(self.forward_features(x, task))
        return logits.masked_fill(~self.of(task), -torch.inf)

    def of(self, task: Int[Tensor, " b"]) -> Bool[Tensor, "b classes"]:
        """Which classes can be an answer."""
        return self.answers[task]

    def forward_features(self, x: Float[Tensor, "b c s s"], task: Any = None) -> Float[Tensor, "b n d"]:
        """timm's, with the tasks beside the tokens where a router decides by them."""
        tokens = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        passed: Any = (tokens, Carried(task=task)) if self.by_task else tokens
        passed = checkpoint_seq(self.blocks, passed) if self.grad_checkpointing else self.blocks(passed)
        normalised: Tensor = self.norm(passed)
        return normalised


def any_task(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """What a model is called with where it is only measured what that takes: every task takes the same."""
    return (x, torch.zeros(len(x), dtype=torch.int64, device=x.device)) if isinstance(model, TaskVit) else (x,)


def valid_answers(model: nn.Module, inputs: tuple[Tensor, ...]) -> Bool[Tensor, "b classes"] | None:
    """Which classes can be an answer to what a model is called with; None: all."""
    return model.of(inputs[1]) if isinstance(model, TaskVit) else None


def task_vit(vit: VisionTransformer, tasks: Mapping[str, int] | None, num_classes: int) -> VisionTransformer:
    """The model as one of these tasks; None: as it is.

    Raises:
        UsageError: they have not as many classes as the model has outputs, as only a file may say.
    """
    if tasks is None:
        return vit
    in_all = sum(tasks.values())
    if num_classes != in_all:
        raise UsageError(f"model.tasks={dict(tasks)} have {in_all} classes, and the head has {num_classes}")
    return TaskVit(vit, tasks)
