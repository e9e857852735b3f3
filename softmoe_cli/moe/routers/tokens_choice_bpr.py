"""Tokens Choice with Batch Priority Routing: Scaling Vision with Sparse Mixture of Experts (Riquelme et al., 2021),
Section 4.1 and Algorithm 2, https://arxiv.org/abs/2106.05974

As in the official code (google-research/vmoe, moe.py): tokens are served in descending order of their best gate, and
that one order serves every rank of choices; of equal gates the lower token goes first.
"""

from collections.abc import Mapping

from jaxtyping import Float, Int
from torch import Tensor

from softmoe_cli.moe.routers.tokens_choice import TokensChoiceRouter
from softmoe_cli.moe.sparse import surest_first


class TokensChoiceBPRRouter(TokensChoiceRouter):
    """`TokensChoiceRouter`, but the tokens that are surest of their expert are served first."""

    exempt: Mapping[str, str] = {}
    official = "tc_layer, surest first"

    def priority(self, gates: Float[Tensor, "g s e"]) -> Int[Tensor, "g s"]:
        return surest_first(gates)
