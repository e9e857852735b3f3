"""Experts Choice: Mixture-of-Experts with Expert Choice Routing (Zhou et al., 2022), https://arxiv.org/abs/2202.09368

As the Soft MoE paper's baseline is coded (google-research/vmoe, nn/routing.py): gates are a softmax over the experts
for each token, each expert takes the tokens with the largest gates for it, and gates are not renormalised unless an
option says so.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmoe_cli.moe.kind import Weak
from softmoe_cli.moe.routing import Router, SparseRouting, full_precision, slots_of
from softmoe_cli.moe.sparse import Gate, grouped_tokens, room_for
from softmoe_cli.moe.weak import WeakChoice


def choose_tokens(gates: Float[Tensor, "g s e"], keep: Bool[Tensor, "g s"], slots: int) -> Int[Tensor, "g e p"]:
    """Each expert's tokens with the largest gates, best first; of equal ones the lower token first; padding last."""
    if torch.compiler.is_exporting():  # the same order in operators that other formats have
        order = gates.float().masked_fill(~keep[:, :, None], -1).mT.argsort(dim=2, descending=True, stable=True)
        return order[:, :, :slots]
    s = gates.shape[1]
    # Gates are not negative, so their bits are ordered as they are; the token's number below them settles ties.
    bits = gates.detach().float().view(torch.int32).long().masked_fill(~keep[:, :, None], -1)
    key = (bits << 32) | (s - 1 - torch.arange(s, device=gates.device))[:, None]
    return s - 1 - (key.mT.topk(slots, dim=2).values & 0xFFFFFFFF)


def renormalised_by_token(
    gate: Float[Tensor, "g e p"], taken: Int[Tensor, "g e p"], num_tokens: int
) -> Float[Tensor, "g e p"]:
    """Gates as shares of their token's sum over the experts that took it: the vision models of Sparse Upcycling
    (Komatsuzaki et al., 2023), https://arxiv.org/abs/2212.05055. Padding, whose gates are zero, keeps them."""
    flat = taken.flatten(1)
    total = gate.new_zeros(gate.shape[0], num_tokens).scatter_add(1, flat, gate.flatten(1))
    return gate / total.gather(1, flat).view_as(gate).clamp(min=torch.finfo(gate.dtype).tiny)


class ExpertsChoiceRouter(Router):
    """Each expert takes the p tokens of a group that like it best; a token may be taken by none or by many.

    With groups of several images an image's result depends on its neighbours in the batch; a last group that
    is not full keeps the full group's slots.

    Args:
        dim: d.
        num_tokens: n, of which `capacity_factor` is a multiple.
        num_experts: e.
        slots_per_expert: p, tokens that an expert takes of a group; null to have it follow from `capacity_factor`.
        capacity_factor: p = images_per_group * n * capacity_factor / e, rounded.
        capacity_rounding: round, half to even (the official baseline), or ceil.
        capacity_multiple: which p is padded up to a multiple of (the official baseline: 1). Both are for
            `capacity_factor`: a given p stays as it is.
        images_per_group: images whose tokens compete (the official baseline: 1).
        renormalise: divide a token's gates by their sum over the experts that took it (the official baseline: false);
            choices are the same.
        noise_std: the logits' noise in training has this over e as its standard deviation.

    Raises:
        ValueError: an impossible combination, such as more slots per expert than a group has tokens.
    """

    counts_landed = True
    decays = ("gate.kernel",)
    expert_axes: ClassVar[dict[str, int]] = {"gate.kernel": 1}
    unprunable = None
    official = "ec_layer"

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        *,
        num_experts: int,
        slots_per_expert: int | None,
        capacity_factor: float | None,
        capacity_rounding: str,
        capacity_multiple: int,
        images_per_group: int,
        renormalise: bool,
        noise_std: float,
    ) -> None:
        super().__init__()
        if images_per_group < 1:
            raise ValueError(f"images_per_group={images_per_group} must be at least 1")
        group = images_per_group * num_tokens
        slots = slots_of(slots_per_expert, capacity_factor, group, num_experts, capacity_rounding, capacity_multiple)
        if slots > group:
            raise ValueError(
                f"num_experts={num_experts}, capacity_factor={capacity_factor}, slots_per_expert={slots_per_expert}: "
                f"an expert has {slots} slots, but a group has {group} tokens to choose from; lower capacity_factor, "
                "slots_per_expert or capacity_multiple, or raise num_experts"
            )
        self._whole = num_experts, slots
        self.num_experts, self.images_per_group = num_experts, images_per_group
        self.slots_per_expert: int = slots
        self.group, self.renormalise = group, renormalise
        self.gate = Gate(dim, num_experts, function="softmax", noise_std=noise_std)

    @property
    def experts_per_token(self) -> float:
        return self.num_experts * self.slots_per_expert / self.group

    def rows(self, num_tokens: int) -> float:
        return self.num_experts * self.slots_per_expert / self.images_per_group

    def flop(self, num_tokens: int) -> int:
        """The gate: one product of n, d and e."""
        return 2 * num_tokens * len(self.gate.kernel) * self.num_experts

    def departs_from_mlp(self, num_tokens: int, parts: int) -> str | None:
        if self.slots_per_expert == self.group:
            return None
        room = room_for(self.images_per_group * num_tokens)
        if self.renormalise:
            return f"a token that no expert takes gets nothing, whatever the gates of the others add up to; set {room}"
        return f"a token gets only the gates of experts that took it; set {room}"

    def capacity_factor(self, slots: int, num_tokens: int) -> float:
        return slots * self.num_experts / (self.images_per_group * num_tokens)

    def leave(self, left: Int[Tensor, " z"] | None, *, balance: bool) -> None:
        """Those that are left take as many tokens as all took before, rounded up; one that is left takes all."""
        e, slots = self._whole
        z = self.num_experts = e if left is None else len(left)
        self.slots_per_expert = self.group if z == 1 < e else min(self.group, -(-slots * e // z))
        self.gate.left = left

    def options_left(self) -> dict[str, Any]:
        return {
            "num_experts": self.num_experts,
            "slots_per_expert": self.slots_per_expert,
            "capacity_factor": None,
            "noise_std": self.gate.std * self.num_experts,
        }

    def weak_limits(self) -> dict[str, int]:
        return {"rank": self.num_experts, "random": 1, "skip": 0}

    def weaker(self, how: Weak, given: Int[Tensor, "*some"] | None) -> WeakChoice:
        """By the token's own gates: here tokens choose, and not experts."""
        return WeakChoice(
            how, self.gate, None, num_experts=self.num_experts, renormalise=self.renormalise, shared_experts=0,
            drawn=given,
        )  # fmt: skip

    def forward(self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None = None) -> SparseRouting:
        b, n, _ = x.shape
        with full_precision(x):
            tokens, kept = grouped_tokens(x, keep, self.images_per_group)
            g, s, _ = tokens.shape
            _, logits = self.gate(tokens, self.images_per_group)
            gates = self.gate.activate(logits)
            taken = choose_tokens(gates, kept, self.slots_per_expert)
            real = kept.gather(1, taken.flatten(1)).view_as(taken)
            gate = gates.mT.gather(2, taken) * real
            if self.renormalise:
                gate = renormalised_by_token(gate, taken, s)
            token = torch.where(real, s * torch.arange(g, device=x.device)[:, None, None] + taken, b * n)
            token, gate = (each.transpose(0, 1).flatten(1) for each in (token, gate))
            return SparseRouting(token, gate, logits.new_zeros(()), real.sum(dim=(0, 2)), (b, n))
