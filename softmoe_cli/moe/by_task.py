"""Routers that decide for a task, whatever an image shows. Beyond Distillation: Task-level Mixture-of-Experts for
Efficient Inference (Kudugunta et al., 2021), https://arxiv.org/abs/2110.03742, Section 3.1.

t tasks. The task of an image travels with the forward pass (`Carried.task`).
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmoe_cli.moe.routing import Carried, DroplessRouter, SparseRouting, full_precision
from softmoe_cli.moe.sparse import in_runs


class TaskRouting(SparseRouting):
    """A decision that is the same for all images of a task.

    Args:
        of_tokens: gates and experts of every token, (b n k) both.
        chosen: the experts of each task.
    """

    def __init__(
        self,
        of_tokens: Sequence[Tensor],
        keep: Bool[Tensor, "b n"],
        num_experts: int,
        aux_loss: Float[Tensor, ""],
        chosen: Int[Tensor, "t k"],
    ) -> None:
        runs = in_runs(of_tokens[0], of_tokens[1], keep, num_experts, aux_loss)
        super().__init__(runs.token, runs.gate, aux_loss, runs.demand, runs.shape, runs.offsets)
        self.chosen = chosen

    def statistics(self) -> dict[str, float]:
        """`task_overlap`: how alike the tasks' experts are (`overlap`)."""
        return super().statistics() | {"task_overlap": overlap(self.chosen.tolist())}

    def told(self) -> dict[str, Any]:
        """`task_experts`: the experts of each task."""
        return {"task_experts": self.chosen.tolist()}


class TaskRouter(DroplessRouter):
    """All tokens of all images of a task take the same k experts with the same gates; nothing is dropped.

    Args:
        num_tasks: t; None is refused, as only several sets of data can tell tasks apart. They take t k experts at most.
        num_experts: e.
        k: experts that each task takes.
        shared_experts: experts beside these that see every token.

    Raises:
        ValueError: an impossible combination.
    """

    num_tasks: int
    unprunable = "each is there for the tasks that take it; softmoe extract keeps the experts of some tasks"
    for_checks: ClassVar[Mapping[str, Any]] = {"num_tasks": 3}

    def __init__(self, num_tasks: int | None, num_experts: int, k: int, shared_experts: int) -> None:
        super().__init__()
        if num_tasks is None:
            raise ValueError(
                "num_tasks=null: tasks are the sets of a mix, data=mix data.sets=[…]; classes of one set are none, as "
                "which class an image has is what the model is asked for"
            )
        if num_tasks < 1:
            raise ValueError(f"num_tasks={num_tasks} must be at least 1")
        self.num_tasks, self.num_experts, self.k, self.shared_experts = num_tasks, num_experts, k, shared_experts
        self.carries = self.by_task = num_tasks > 1

    def fixed_options(self) -> dict[str, Any]:
        return {"num_tasks": self.num_tasks}

    def flop(self, num_tokens: int) -> int:
        """None: a decision is looked up."""
        return 0

    weak_note = "decides for tasks and not for tokens or images"

    @abstractmethod
    def decided(self) -> tuple[Float[Tensor, "t k"], Int[Tensor, "t k"], Float[Tensor, ""]]:
        """Each task's gates and experts, those with larger gates first, and the auxiliary loss."""

    @torch.no_grad()
    def settled(self) -> tuple[Float[Tensor, "t k"], list[list[int]]]:
        """Each task's gates and experts in evaluation."""
        training = self.training
        gates, chosen, _ = self.eval().decided()
        self.train(training)
        return gates, chosen.tolist()

    def told_shares(self, shares: Sequence[float]) -> None:
        """Called once before training, with the share of all training images that each task has."""
        return

    @classmethod
    def remark(cls, layers: Sequence[Mapping[str, Any]], num_tokens: int) -> str:
        """The experts of each task in each block."""
        of_blocks = [
            f"block {layer['block']}: "
            + ", ".join(f"{name} {' '.join(map(str, own))}" for name, own in layer["task_experts"].items())
            for layer in layers
            if isinstance(layer.get("task_experts"), dict)
        ]
        return "experts by task: " + "; ".join(of_blocks) if of_blocks else ""

    @abstractmethod
    def options_of(self, tasks: Sequence[int], experts: Sequence[int]) -> dict[str, Any]:
        """Options of a router of these tasks alone, in this order, before these of the experts."""

    def options_alone(self) -> dict[str, Any]:
        """Options that differ in a router of one of the tasks, whichever it is, before the experts that it takes."""
        return {"num_tasks": 1, "num_experts": self.k}

    @abstractmethod
    def weights_of(self, tasks: Sequence[int], experts: Sequence[int]) -> tuple[dict[str, Tensor], float]:
        """The weights of that router, and what its gates then have to be multiplied by.

        Raises:
            ValueError: there is no such number.
        """

    def forward(
        self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None = None, carried: Carried | None = None
    ) -> SparseRouting:
        with full_precision(x):
            gates, chosen, aux_loss = self.decided()
            task = self._tasks(x, carried)
            kept = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if keep is None else keep
            of_tokens = [each[task][:, None].expand(-1, x.shape[1], -1) for each in (gates, chosen)]
            routing = TaskRouting(of_tokens, kept, self.num_experts, aux_loss, chosen)
            routing.carried = carried
            return routing

    def _tasks(self, x: Float[Tensor, "b n d"], carried: Carried | None) -> Int[Tensor, " b"]:
        """The task of each image.

        Raises:
            ValueError: nobody has said it, or there is no such task.
        """
        if not self.by_task:
            return torch.zeros(len(x), dtype=torch.int64, device=x.device)
        task = None if carried is None else carried.task
        if task is None:
            raise ValueError(
                f"{type(self).__name__} decides by the task of each image, of {self.num_tasks}, and none is given; "
                "call the model with (images, tasks)"
            )
        return task


def overlap(choices: Sequence[Sequence[int]]) -> float:
    """How alike the tasks' choices are: the mean over pairs of tasks of the experts that both take over those that one
    takes (Jaccard, 1901); 1 for a single task."""
    sets = [set(each) for each in choices]
    pairs = [(one, other) for i, one in enumerate(sets) for other in sets[:i]]
    return sum(len(one & other) / len(one | other) for one, other in pairs) / len(pairs) if pairs else 1.0
