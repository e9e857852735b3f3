"""Task Choice: one decision for all images of a task. The task level of Beyond Distillation: Task-level
Mixture-of-Experts for Efficient Inference (Kudugunta et al., 2021), https://arxiv.org/abs/2110.03742, Section 3.1.

The paper does not say how its gate reads a task, nor whether noise and balance are of tasks or of tokens, and released
no code. Here a task has a row of logits, which an embedding before a linear gate amounts to. A row gets gradients
through the gates of its k experts and through the balance; so that it can move to others in training, noise is added.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from softmoe_cli.moe.by_task import TaskRouter
from softmoe_cli.moe.routing import has_numbers
from softmoe_cli.moe.sparse import check_choice, choose, gates_depart, renormalised, squared_variation

START_STD = 0.02
"""Standard deviation of the first logits: at first noise decides, and every task meets every expert."""


class TaskChoiceRouter(TaskRouter):
    """Each task takes the k experts that its row of a table of logits (t e) likes best.

    Args:
        dim: d, unused.
        num_tokens: n, unused: there is no capacity.
        num_tasks: t.
        num_experts: e.
        k: experts that each task takes.
        renormalise: divide a task's gates by their sum over its k experts (the paper: true).
        noise_std: the logits' noise in training has this over e as its standard deviation; drawn for each task anew in
            each forward pass.
        balance_weight: of the auxiliary loss: the squared variation of the experts' gates, summed over tasks by their
            shares of the training images; 0: none.
        shared_experts: experts beside these that see every token.

    Raises:
        ValueError: an impossible combination.
    """

    shares: Tensor
    """Each task's share of the training images; equal ones until somebody says otherwise."""
    decays = ()
    expert_axes: ClassVar[dict[str, int]] = {"table": 1}
    of_one_expert: ClassVar[dict[str, Any]] = {"k": 1, "shared_experts": 0}

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        *,
        num_tasks: int | None,
        num_experts: int,
        k: int,
        renormalise: bool,
        noise_std: float,
        balance_weight: float,
        shared_experts: int,
    ) -> None:
        check_choice(k, num_experts, 1, shared_experts, renormalise)
        super().__init__(num_tasks, num_experts, k, shared_experts)
        for name, value in {"noise_std": noise_std, "balance_weight": balance_weight}.items():
            if not value >= 0:
                raise ValueError(f"{name}={value} must not be negative")
        self.renormalise, self.std, self.balance_weight = renormalise, noise_std / num_experts, balance_weight
        self.table = nn.Parameter(torch.empty(self.num_tasks, num_experts))
        self.register_buffer("shares", torch.full((self.num_tasks,), 1 / self.num_tasks))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=START_STD)

    def told_shares(self, shares: Sequence[float]) -> None:
        self.shares.copy_(torch.tensor(shares))

    def departs_from_mlp(self, num_tokens: int, parts: int) -> str | None:
        return gates_depart(self.k, self.num_experts, "softmax", self.renormalise, parts)

    def decided(self) -> tuple[Float[Tensor, "t k"], Int[Tensor, "t k"], Float[Tensor, ""]]:
        noise = self.std * torch.randn_like(self.table) if self.training and self.std else 0.0
        gates = (self.table + noise).softmax(dim=1)
        chosen = choose(gates, self.k)
        weights = renormalised(gates[None], chosen[None])[0] if self.renormalise else gates
        return weights.gather(1, chosen), chosen, self._balance()

    def _balance(self) -> Float[Tensor, ""]:
        """Over tasks, and not over the images of a batch: its value and its gradient are the same for every batch, and
        every part of one."""
        if not self.balance_weight:
            return self.table.new_zeros(())
        load = (self.shares[:, None] * self.table.softmax(dim=1)).sum(dim=0, keepdim=True)
        return self.balance_weight * squared_variation(load)[0]

    def statistics(self) -> dict[str, float]:
        """`task_gate_max`: a task's largest gate before any is divided, mean over tasks; 1/e at first."""
        if not has_numbers(self.table):
            return {}
        return {"task_gate_max": self.table.detach().softmax(dim=1).amax(dim=1).mean().item()}

    def options_of(self, tasks: Sequence[int], experts: Sequence[int]) -> dict[str, Any]:
        return {
            "num_tasks": len(tasks), "num_experts": len(experts), "renormalise": len(experts) > 1 or self.renormalise,
            "noise_std": self.std * len(experts),
        }  # fmt: skip

    def weights_of(self, tasks: Sequence[int], experts: Sequence[int]) -> tuple[dict[str, Tensor], float]:
        """Gates that add up to one over a task's experts do not depend on others. Those that do not are shares of all
        experts: of one task they become such gates, and their sum a factor."""
        table = self.table.detach()[list(tasks)][:, list(experts)]
        shares = self.shares[list(tasks)]
        weights = {"table": table, "shares": shares / shares.sum()}
        if self.renormalise:
            return weights, 1.0
        if len(tasks) > 1:
            raise ValueError(
                "its gates do not add up to one over a task's experts (renormalise=false), so that each task's outputs "
                "would have to be multiplied by another number; extract one task at a time"
            )
        return weights, self.settled()[0][tasks[0]].sum().item()
