"""Tokens Choice, the router of V-MoE: Scaling Vision with Sparse Mixture of Experts (Riquelme et al., 2021),
https://arxiv.org/abs/2106.05974, as in its official code (google-research/vmoe, nn/routing.py and moe.py).

The paper's letters: N tokens of a group are our s, E experts our e, C buffer positions our p. Overflow is dropped.
Gates are not renormalised over the chosen experts (equation 3 of the paper and the code) unless an option says so.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmoe_cli.moe.kind import Weak
from softmoe_cli.moe.routing import Router, SparseRouting, full_precision, slots_of
from softmoe_cli.moe.sparse import (
    Balanced,
    Gate,
    check_choice,
    choice_limits,
    choose,
    gates_depart,
    grouped_tokens,
    place,
    renormalised,
    room_for,
    slots_left,
)
from softmoe_cli.moe.weak import WeakChoice


class TokensChoiceRouter(Router):
    """Each token takes its k best experts; each expert has room for so many, in the order of the tokens.

    All first choices are served before any second one. With groups of several images an image's result
    depends on its neighbours in the batch; a last group that is not full keeps the full group's slots.

    Args:
        dim: d.
        num_tokens: n, of which `capacity_factor` is a multiple.
        num_experts: e.
        k: experts per token.
        slots_per_expert: p, slots of an expert in a group; null to have it follow from `capacity_factor`.
        capacity_factor: p = images_per_group * n * k * capacity_factor / e, rounded.
        capacity_rounding: ceil (V-MoE) or round, half to even (fair: as the soft router rounds).
        capacity_multiple: which p is padded up to a multiple of (V-MoE 4; fair: 1). Both are for `capacity_factor`:
            a given p stays as it is.
        images_per_group: images whose tokens compete for the same slots (V-MoE: 8).
        gate: softmax (the paper) or sigmoid, each expert for itself.
        renormalise: divide a token's gates by their sum over its k experts (the paper: false).
        noise_std: the logits' noise in training has this over e as its standard deviation.
        importance_weight, load_weight, gshard_weight: of the auxiliary losses; 0: none.
        bias_rate: step of the balancing bias after each update; 0: none.
        shared_experts: experts beside these that see every token.

    Raises:
        ValueError: an impossible combination.
    """

    exempt: Mapping[str, str] = {"token permutation": "slots are given out in the order of the tokens"}
    counts_landed = True
    decays = ("gate.kernel",)
    expert_axes: ClassVar[dict[str, int]] = {"gate.kernel": 1, "balance.bias": 0}
    unprunable = None
    of_one_expert: ClassVar[dict[str, Any]] = {"k": 1, "shared_experts": 0}
    official = "tc_layer"
    k: int

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        *,
        num_experts: int,
        k: int,
        slots_per_expert: int | None,
        capacity_factor: float | None,
        capacity_rounding: str,
        capacity_multiple: int,
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
        slots = slots_of(
            slots_per_expert, capacity_factor, images_per_group * num_tokens * k, num_experts, capacity_rounding,
            capacity_multiple,
        )  # fmt: skip
        self._whole = num_experts, k, slots
        self.num_experts, self.k, self.renormalise = num_experts, k, renormalise
        self.group = images_per_group * num_tokens
        self.slots_per_expert: int = slots
        self.images_per_group, self.shared_experts = images_per_group, shared_experts
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

    @property
    def experts_per_token(self) -> float:
        return float(self.k + self.shared_experts)

    def rows(self, num_tokens: int) -> float:
        return self.num_experts * self.slots_per_expert / self.images_per_group

    def flop(self, num_tokens: int) -> int:
        """The gate: one product of n, d and e."""
        return 2 * num_tokens * len(self.gate.kernel) * self.num_experts

    def departs_from_mlp(self, num_tokens: int, parts: int) -> str | None:
        reason = gates_depart(self.k, self.num_experts, self.gate.function, self.renormalise, parts)
        tokens = self.images_per_group * num_tokens
        if reason is None and self.slots_per_expert < tokens:
            return (
                f"its experts have {self.slots_per_expert} slots, and what overflows is dropped; set {room_for(tokens)}"
            )
        return reason

    def capacity_factor(self, slots: int, num_tokens: int) -> float:
        return slots * self.num_experts / (self.images_per_group * num_tokens * self.k)

    def weak_limits(self) -> dict[str, int]:
        return choice_limits(self.num_experts, self.k)

    def weaker(self, how: Weak, given: Int[Tensor, "*some"] | None) -> WeakChoice:
        return WeakChoice(
            how, self.gate, self.balance, num_experts=self.num_experts, renormalise=self.renormalise,
            shared_experts=self.shared_experts, drawn=given,
        )  # fmt: skip

    def priority(self, gates: Float[Tensor, "g s e"]) -> Int[Tensor, "g s"] | None:
        """The order in which tokens are served; None: as they come."""
        return None

    def forward(self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None = None) -> SparseRouting:
        with full_precision(x):
            tokens, kept = grouped_tokens(x, keep, self.images_per_group)
            clean, noisy = self.gate(tokens, self.images_per_group)
            gates = self.gate.activate(noisy)
            aux_loss = self.balance.loss(self.gate, clean, noisy, gates, kept, self.k)
            chosen = choose(self.balance.scores(gates), self.k)
            order = self.priority(gates)
            weights = renormalised(gates, chosen) if self.renormalise else gates
            routing = place(weights, chosen, kept, order, self.slots_per_expert, aux_loss, (x.shape[0], x.shape[1]))
            self.balance.add_demand(routing.demand)
            return routing

    def leave(self, left: Int[Tensor, " z"] | None, *, balance: bool) -> None:
        e, k, slots = self._whole
        self.num_experts = e if left is None else len(left)
        self.k = min(k, self.num_experts)
        self.slots_per_expert = slots_left(slots, e, self.num_experts, self.group)
        self.gate.left = self.balance.left = left
        self.balance.on = balance or left is None

    def options_left(self) -> dict[str, Any]:
        return {
            "num_experts": self.num_experts,
            "k": self.k,
            "slots_per_expert": self.slots_per_expert,
            "capacity_factor": None,
            "noise_std": self.gate.std * self.num_experts,
        }

    def counted(self) -> list[Tensor]:
        return self.balance.counted()

    def after_update(self) -> None:
        self.balance.move_bias()
