"""Static Tasks: experts given to tasks by a rule, with nothing learned about it: the control of Beyond Distillation:
Task-level Mixture-of-Experts for Efficient Inference (Kudugunta et al., 2021), https://arxiv.org/abs/2110.03742,
Section 3.1, which tells whether a learned assignment matters. The rule is ours; the paper gives none."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from softmoe_cli.moe.by_task import TaskRouter


class StaticTasksRouter(TaskRouter):
    """Task i takes the experts (i k + j) mod e for j below k, each with the gate 1/k.

    Args:
        dim: d, unused.
        num_tokens: n, unused.
        num_tasks: t.
        num_experts: e.
        k: experts that each task takes.
        assigned: the k experts of each task instead; None: by the rule.

    Raises:
        ValueError: an impossible combination.
    """

    of_one_expert: ClassVar[dict[str, Any]] = {"k": 1}
    chosen: Tensor
    ones: Tensor

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        *,
        num_tasks: int | None,
        num_experts: int,
        k: int,
        assigned: list[list[int]] | None,
    ) -> None:
        if not 1 <= k <= num_experts:
            raise ValueError(f"k={k} experts per task must be from 1 to num_experts={num_experts}")
        super().__init__(num_tasks, num_experts, k, 0)
        self.needs_independent_experts = k > 1  # those of a task would always get the same gradient
        rule = [[(task * k + j) % num_experts for j in range(k)] for task in range(self.num_tasks)]
        given = rule if assigned is None else assigned
        if [len(set(each)) for each in given] != [k] * self.num_tasks:
            raise ValueError(f"assigned={assigned} does not give {k} different experts to each of {num_tasks} tasks")
        if not {expert for each in given for expert in each} <= set(range(num_experts)):
            raise ValueError(f"assigned={assigned} is not of the experts 0 to {num_experts - 1}")
        self._given = given
        self.register_buffer("chosen", torch.tensor(given), persistent=False)
        self.register_buffer("ones", torch.ones(self.chosen.shape), persistent=False)  # as precise as the model is

    def departs_from_mlp(self, num_tokens: int, parts: int) -> str | None:
        if self.k % parts:
            return f"its k={self.k} does not hold whole copies of {parts} parts"
        for own in self._given:
            if len({sum(expert % parts == part for expert in own) for part in range(parts)}) > 1:
                return (
                    f"experts {', '.join(map(str, own))} of a task do not hold whole copies of {parts} parts; leave "
                    "model.router.assigned null"
                )
        return None

    def decided(self) -> tuple[Float[Tensor, "t k"], Int[Tensor, "t k"], Float[Tensor, ""]]:
        return self.ones / self.k, self.chosen, self.ones.new_zeros(())

    def options_of(self, tasks: Sequence[int], experts: Sequence[int]) -> dict[str, Any]:
        place = {expert: i for i, expert in enumerate(experts)}
        assigned = [[place[expert] for expert in self.settled()[1][task]] for task in tasks]
        return {"num_tasks": len(tasks), "num_experts": len(experts), "assigned": assigned}

    def options_alone(self) -> dict[str, Any]:
        return super().options_alone() | {"assigned": None}

    def weights_of(self, tasks: Sequence[int], experts: Sequence[int]) -> tuple[dict[str, Tensor], float]:
        return {}, 1.0
