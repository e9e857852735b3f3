"""Tokens Choice without capacity: MegaBlocks (Gale et al., 2022), https://arxiv.org/abs/2211.15841, Section 3.

Every token gets its k experts and none is dropped. What MegaBlocks does with block-sparse products, this does with
grouped ones on rows sorted by expert, which is also ScatterMoE's form (Tan et al., 2024).
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmoe_cli.moe.kind import Weak
from softmoe_cli.moe.routing import DroplessRouter, SparseRouting, full_precision
from softmoe_cli.moe.sparse import (
    Balanced,
    Gate,
    check_choice,
    choice_limits,
    choose,
    gates_depart,
    in_groups,
    in_runs,
    renormalised,
)
from softmoe_cli.moe.weak import WeakChoice


class TokensChoiceDroplessRouter(DroplessRouter):
    """Each token takes its k best experts, which process however many tokens chose them.

    Args:
        dim: d.
        num_tokens: n, unused: there is no capacity.
        num_experts: e.
        k: experts per token.
        images_per_group: images over which the auxiliary losses are taken; the output does not depend on it.
        gate: softmax, or sigmoid, each expert for itself.
        renormalise: divide a token's gates by their sum over its k experts.
        noise_std: the logits' noise in training has this over e as its standard deviation.
        importance_weight, load_weight, gshard_weight: of the auxiliary losses; 0: none.
        bias_rate: step of the balancing bias after each update; 0: none.
        shared_experts: experts beside these that see every token.

    Raises:
        ValueError: an impossible combination.
    """

    evaluates_alone = True
    decays = ("gate.kernel",)
    expert_axes: ClassVar[dict[str, int]] = {"gate.kernel": 1, "balance.bias": 0}
    unprunable = None
    of_one_expert: ClassVar[dict[str, Any]] = {"k": 1, "shared_experts": 0}

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        *,
        num_experts: int,
        k: int,
        images_per_group: int,
        gate: str,
        renormalise: bool,
        noise_std: float,
        importance_weight: float,
        load_weight: float,
        gshard_weight: float,
        bias_rate: float,
        shared_experts: int,
    ) -> None:
        super().__init__()
        check_choice(k, num_experts, images_per_group, shared_experts, renormalise)
        self._whole = num_experts, k
        self.num_experts, self.k, self.shared_experts = num_experts, k, shared_experts
        self.renormalise, self.loss_images = renormalise, images_per_group
        if gate == "sigmoid" and not renormalise:
            self.most_weight = float(k)
        self.gate = Gate(dim, num_experts, function=gate, noise_std=noise_std)
        self.balance = Balanced(
            num_experts,
            noise_std=noise_std,
            importance_weight=importance_weight,
            load_weight=load_weight,
            gshard_weight=gshard_weight,
            bias_rate=bias_rate,
        )

    def flop(self, num_tokens: int) -> int:
        """The gate: one product of n, d and e."""
        return 2 * num_tokens * len(self.gate.kernel) * self.num_experts

    def departs_from_mlp(self, num_tokens: int, parts: int) -> str | None:
        return gates_depart(self.k, self.num_experts, self.gate.function, self.renormalise, parts)

    def weak_limits(self) -> dict[str, int]:
        return choice_limits(self.num_experts, self.k)

    def weaker(self, how: Weak, given: Int[Tensor, "*some"] | None) -> WeakChoice:
        return WeakChoice(
            how, self.gate, self.balance, num_experts=self.num_experts, renormalise=self.renormalise,
            shared_experts=self.shared_experts, drawn=given,
        )  # fmt: skip

    def forward(self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None = None) -> SparseRouting:
        with full_precision(x):
            kept = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if keep is None else keep
            seen, kept_seen = self.seen(x, kept)
            clean, noisy = self.gate(seen)
            gates = self.gate.activate(noisy)
            chosen = choose(self.balance.scores(gates), self.k)
            weights = renormalised(gates, chosen) if self.renormalise else gates
            of_tokens = [each.expand(-1, x.shape[1], -1) for each in (weights.gather(2, chosen), chosen)]
            routing = in_runs(of_tokens[0], of_tokens[1], kept, self.num_experts, gates.new_zeros(()))
            self.balance.add_demand(routing.demand)
            same = noisy is clean
            images = self.loss_images if self.training else 1
            clean, gates, kept = (in_groups(each, images) for each in (clean, gates, kept_seen))
            noisy = clean if same else in_groups(noisy, images)
            routing.aux_loss = self.balance.loss(self.gate, clean, noisy, gates, kept, self.k)
            return routing

    def seen(
        self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b m d"], Bool[Tensor, "b m"]]:
        """What the gate reads, one row for each decision, and which of them are of tokens and not of padding."""
        return x, keep

    def leave(self, left: Int[Tensor, " z"] | None, *, balance: bool) -> None:
        e, k = self._whole
        self.num_experts = e if left is None else len(left)
        self.k = min(k, self.num_experts)
        self.gate.left = self.balance.left = left
        self.balance.on = balance or left is None

    def options_left(self) -> dict[str, Any]:
        return {"num_experts": self.num_experts, "k": self.k, "noise_std": self.gate.std * self.num_experts}

    def counted(self) -> list[Tensor]:
        return self.balance.counted()

    def after_update(self) -> None:
        self.balance.move_bias()
