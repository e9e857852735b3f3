"""Identity: the fixed routing of Soft MoE (Puigcerver et al., 2023), Section 3.6 and Appendix A: token i goes to
expert i, round robin, and comes back as it is. Tells what experts bring without any mixing or choice."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from softmoe_cli.moe.routing import Router, SparseRouting


class IdentityRouter(Router):
    """Token i of every image is processed by expert i mod e.

    Args:
        dim: d, unused.
        num_tokens: n.
        num_experts: e, at most n.

    Raises:
        ValueError: more experts than tokens: some would never see one.
    """

    unprunable = "a token's expert is chosen by its place, so that each expert sees as many as the next"
    exempt: Mapping[str, str] = {"token permutation": "a token's place is what its expert is chosen by"}
    counts_landed = True

    def __init__(self, dim: int, num_tokens: int, *, num_experts: int) -> None:
        super().__init__()
        if not 1 <= num_experts <= num_tokens:
            raise ValueError(
                f"num_experts={num_experts} must be from 1 to the {num_tokens} tokens: each token has one expert"
            )
        self.num_experts = num_experts
        self.slots_per_expert = -(-num_tokens // num_experts)

    @property
    def experts_per_token(self) -> float:
        return 1.0

    def rows(self, num_tokens: int) -> float:
        return float(self.num_experts * -(-num_tokens // self.num_experts))

    def flop(self, num_tokens: int) -> int:
        return 0

    def departs_from_mlp(self, num_tokens: int, parts: int) -> str | None:
        return None if parts == 1 else "a token meets one part of the MLP only; set model.expert_width=null"

    weak_note = "has nothing that could be routed otherwise: a token's place decides"

    def weak_limits(self) -> dict[str, int]:
        return {}

    def forward(self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None = None) -> SparseRouting:
        b, n, _ = x.shape
        slots = -(-n // self.num_experts)
        place = torch.arange(slots * self.num_experts, device=x.device).view(slots, self.num_experts).T
        token = place[:, None] + n * torch.arange(b, device=x.device)[:, None]
        real = (place < n)[:, None].expand_as(token)
        if keep is not None:
            real = real & keep.flatten()[token.clamp(max=b * n - 1)]
        token = torch.where(real, token, b * n).flatten(1)
        gate = real.flatten(1).to(torch.promote_types(x.dtype, torch.float32))
        return SparseRouting(token, gate, gate.new_zeros(()), real.sum(dim=(1, 2)), (b, n))
