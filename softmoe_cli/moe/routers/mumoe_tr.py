"""TR muMoE: Multilinear Mixture of Experts (Oldfield et al., 2024), https://arxiv.org/abs/2402.12550, with experts held
in a tensor ring.

Their N, I, O and R1, R2, R3 are e, the widths before and after a map, and `rank`; a first rank of 1 makes a tensor
train. All else is as in mumoe_cp.py.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softmoe_cli.moe.factorised import FactorisedRouter, Levels, Maps, uniform, with_bias

RING = 4
"""All ranks but a matched one: those of all published models."""


class TRMaps(Maps):
    """Expert (e1, e2) is, for each i and o, the trace of C1[e1] C2[e2] U[i] V[o]: a ring of matrices whose sizes are
    the ranks, the last one back to the first. (The official code has the ranks of a core around its other axis.)"""

    def __init__(self, experts: Sequence[int], inputs: int, outputs: int, ranks: Sequence[int], bias: bool) -> None:
        super().__init__(bias)
        cores = [torch.eye(*ring).repeat(e, 1, 1) for ring, e in zip(pairwise(ranks[:-1]), experts, strict=True)]
        cores[0] = cores[0] * (1 + torch.randn_like(cores[0]))
        self.of_experts = nn.ParameterList(cores)
        self.ranks = list(ranks)
        self.of_input = uniform(inputs + bias, ranks[-2], ranks[-1], fan=inputs)
        self.of_output = uniform(outputs, ranks[-1], ranks[0], fan=ranks[-1] * ranks[0])

    def flop(self, num_tokens: int) -> int:
        bias = self.of_input[0].numel() if self.bias else 0
        chain = sum(self.ranks[0] * r * s for r, s in pairwise(self.ranks[1:]))
        return 2 * num_tokens * (sum(parameter.numel() for parameter in self.parameters()) - bias + chain)

    @property
    def spare(self) -> int:
        return (min(self.ranks[:-1]) - 1) * self.ranks[-1]

    @torch.no_grad()
    def hold(self, left: Float[Tensor, "j k"], right: Float[Tensor, "o k"]) -> None:
        last = self.ranks[-1]
        used = -(-left.shape[1] // last)
        left, right = (nn.functional.pad(each, (0, used * last - each.shape[1])) for each in (left, right))
        self.of_input[:, :used] = left.unflatten(1, (used, last))
        self.of_output.zero_()[:, :, :used] = right.unflatten(1, (used, last)).mT
        for core in self.of_experts:
            core[:, :used] = torch.eye(used, core.shape[2])
            core[:, used:, :used] = 0

    def output(self) -> Float[Tensor, "o k"]:
        return self.of_output.flatten(1)

    def mixed(self, x: Float[Tensor, "b n i"], levels: Levels) -> Float[Tensor, "b n k"]:
        b, n, _ = x.shape
        ring: Tensor | None = None
        for coefficients, core in zip(levels, self.of_experts, strict=True):
            matrix = (coefficients @ core.flatten(1)).view(b * n, *core.shape[1:])
            ring = matrix if ring is None else torch.bmm(ring, matrix)
        assert ring is not None
        inputs = with_bias(x, self.of_input.flatten(1), self.bias).view(b * n, *self.of_input.shape[1:])
        return torch.bmm(inputs.mT, ring.mT).view(b, n, -1)


class MuMoETRRouter(FactorisedRouter):
    """Every expert has a part in every token, by entmax or softmax of a normalised product; an expert is a linear map
    in each of two layers, and all maps of a layer share a ring of small matrices.

    Args:
        dim: d.
        num_tokens: n, unused: every token is decided about by itself.
        num_experts: e; with `num_experts_2` those of the first level.
        num_experts_2: experts of the second level, so that there are e times as many; None: one level.
        rank: of both layers, one more than there are levels of experts and one (three, or four with two levels); or
            `matched`: 4, 4 and the smallest last one with which gate and layers have the parameters of the MLP.
        gate: what makes coefficients of normalised logits, `entmax15` (exact zeros) or `softmax`.
        norm: how logits are normalised: `batch`, each expert's over all tokens of a batch, or `layer`, each token's.
        bias: whether each expert has biases.
        input_norm: LayerNorm on what the experts see, but not on what the gate sees.

    Raises:
        ValueError: an impossible choice.
    """

    official = "mumoe_layer, TRMuMoE"

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        *,
        num_experts: int,
        num_experts_2: int | None,
        rank: list[int] | Literal["matched"],
        gate: str,
        norm: str,
        bias: bool,
        input_norm: bool,
    ) -> None:
        count = 3 if num_experts_2 is None else 4
        if rank != "matched" and (len(rank) != count or not all(type(r) is int and r >= 1 for r in rank)):
            raise ValueError(f"rank={rank} must be matched or {count} whole numbers from 1 on, such as [4,4,37]")
        super().__init__(
            dim, num_experts=num_experts, num_experts_2=num_experts_2, rank=rank, gate=gate, norm=norm, bias=bias,
            input_norm=input_norm,
        )  # fmt: skip

    def maps(self, inputs: int, outputs: int, rank: list[int]) -> TRMaps:
        return TRMaps(self.experts_by_level, inputs, outputs, rank, self.bias)

    def sizes(self, inputs: int, outputs: int) -> tuple[int, int]:
        return RING * RING * sum(self.experts_by_level), RING * (inputs + self.bias + outputs)

    def rank_of(self, matched: int) -> list[int]:
        return [RING] * (len(self.experts_by_level) + 1) + [matched]

    def rank_for(self, directions: int) -> list[int]:
        return self.rank_of(-(-directions // (RING - 1)))
