"""CP muMoE: Multilinear Mixture of Experts (Oldfield et al., 2024), https://arxiv.org/abs/2402.12550, with experts held
in a CP decomposition.

Their N, I, O and R are e, the widths before and after a map, and `rank`. As in the official code: the gate sees what
the layer is given; both layers have one set of coefficients, one rank, and biases. Unlike it: blocks take what a ViT's
norm made, so `input_norm` (its `apply_ln`) is off by default; and GELU is the backbone's, as in the MLP beside it.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from softmoe_cli.moe.factorised import FactorisedRouter, Levels, Maps, uniform, with_bias


class CPMaps(Maps):
    """Expert (e1, e2) is the sum over r of s1[e1, r] s2[e2, r] u[i, r] v[o, r]. All experts have the same r directions
    and differ in r scales."""

    def __init__(self, experts: Sequence[int], inputs: int, outputs: int, rank: int, bias: bool) -> None:
        super().__init__(bias)
        first, *further = (torch.ones(e, rank) for e in experts)
        self.of_experts = nn.ParameterList([first + torch.randn_like(first), *further])
        self.of_input = uniform(inputs + bias, rank, fan=inputs)
        self.of_output = uniform(outputs, rank, fan=rank)

    def flop(self, num_tokens: int) -> int:
        bias = self.of_input.shape[1] if self.bias else 0
        return 2 * num_tokens * (sum(parameter.numel() for parameter in self.parameters()) - bias)

    @property
    def spare(self) -> int:
        return self.of_input.shape[1] - 1

    @torch.no_grad()
    def hold(self, left: Float[Tensor, "j k"], right: Float[Tensor, "o k"]) -> None:
        used = left.shape[1]
        self.of_input[:, :used] = left
        self.of_output.zero_()[:, :used] = right
        for factor in self.of_experts:
            factor[:, :used] = 1

    def output(self) -> Float[Tensor, "o r"]:
        return self.of_output

    def mixed(self, x: Float[Tensor, "b n i"], levels: Levels) -> Float[Tensor, "b n r"]:
        y = with_bias(x, self.of_input, self.bias)
        for coefficients, factor in zip(levels, self.of_experts, strict=True):
            y = y * (coefficients @ factor)
        return y


class MuMoECPRouter(FactorisedRouter):
    """Every expert has a part in every token, by entmax or softmax of a normalised product; an expert is a linear map
    in each of two layers, and all maps of a layer share `rank` directions.

    Args:
        dim: d.
        num_tokens: n, unused: every token is decided about by itself.
        num_experts: e; with `num_experts_2` those of the first level.
        num_experts_2: experts of the second level, so that there are e times as many; None: one level.
        rank: of both layers, or `matched`: the smallest with which gate and layers have the parameters of the MLP.
        gate: what makes coefficients of normalised logits, `entmax15` (exact zeros) or `softmax`.
        norm: how logits are normalised: `batch`, each expert's over all tokens of a batch, or `layer`, each token's.
        bias: whether each expert has biases.
        input_norm: LayerNorm on what the experts see, but not on what the gate sees.

    Raises:
        ValueError: an impossible choice.
    """

    official = "mumoe_layer, CPMuMoE"

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        *,
        num_experts: int,
        num_experts_2: int | None,
        rank: int | Literal["matched"],
        gate: str,
        norm: str,
        bias: bool,
        input_norm: bool,
    ) -> None:
        if rank != "matched" and rank < 1:
            raise ValueError(f"rank={rank} must be at least 1, or matched")
        super().__init__(
            dim, num_experts=num_experts, num_experts_2=num_experts_2, rank=rank, gate=gate, norm=norm, bias=bias,
            input_norm=input_norm,
        )  # fmt: skip

    def maps(self, inputs: int, outputs: int, rank: int) -> CPMaps:
        return CPMaps(self.experts_by_level, inputs, outputs, rank, self.bias)

    def sizes(self, inputs: int, outputs: int) -> tuple[int, int]:
        return 0, sum(self.experts_by_level) + inputs + self.bias + outputs

    def rank_of(self, matched: int) -> int:
        return matched

    def rank_for(self, directions: int) -> int:
        return directions + 1
