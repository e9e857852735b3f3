"""What factorised layers decide: every token's share in every expert, most of them exactly zero.

Multilinear Mixture of Experts (muMoE; Oldfield et al., 2024, https://arxiv.org/abs/2402.12550), as in the official code
(james-oldfield/muMoE, MuMoE.py) where a docstring names nothing else. Their N is our e, their coefficients a.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn

from softmoe_cli.moe.kind import Decided, Shares
from softmoe_cli.moe.routing import has_numbers, load_statistics

NORM_EPS = 1e-5
MOMENTUM = 0.1
QUADRATIC = 6
"""Steps of entmax at the end, each of which doubles the right digits: enough for float64."""


class _Entmax15(torch.autograd.Function):
    """The exact gradient needs nothing but the result's square root.

    The threshold is a root of a convex function that falls, which Newton's method reaches from below: steps that halve
    its distance at first, of which there are at most as many as halvings of sqrt(e), then quadratic ones. A sort, as in
    the paper, takes two to six times as long on a CPU (experiments/layer_speed).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        experts = logits.shape[-1]
        half = (logits - logits.amax(dim=-1, keepdim=True)) / 2
        threshold = (half.mean(dim=-1, keepdim=True) - experts**-0.5).clamp(min=-1)  # below the root
        for _ in range(QUADRATIC + math.ceil(math.log2(experts) / 2)):
            root = (half - threshold).clamp(min=0)
            excess = (root * root).sum(dim=-1, keepdim=True) - 1
            threshold = threshold + excess / (2 * root.sum(dim=-1, keepdim=True))
        root = (half - threshold).clamp(min=0)
        ctx.save_for_backward(root)
        return root * root

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        weighed = root * gradients[0]
        shift: Tensor = weighed.sum(dim=-1, keepdim=True) / root.sum(dim=-1, keepdim=True)
        return weighed - root * shift


def entmax15(logits: Float[Tensor, "*rows e"]) -> Float[Tensor, "*rows e"]:
    """p = max(logits / 2 - t, 0)^2 with the t for which p adds up to one: between softmax and argmax, with exact zeros.

    Sparse Sequence-to-Sequence Models (Peters et al., 2019, Proposition 2 for the gradient),
    https://arxiv.org/abs/1905.05702.
    """
    found: Tensor = _Entmax15.apply(logits)
    return found


FUNCTIONS = {"entmax15": entmax15, "softmax": lambda logits: logits.softmax(dim=-1)}
GATE_NORMS = ("batch", "layer")


class _SumOfAll(torch.autograd.Function):
    """The sum over all processes; each gets the sum of the gradients, since the loss is a sum over them too."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        whole = part.clone()
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        whole = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole)
        return whole


class BatchNorm(nn.Module):
    """Normalises each expert's logits over all tokens of all images of a batch; in evaluation by running means.

    There are no learned parameters, and all numbers are as torch.nn.BatchNorm1d(e, affine=False) has them, but for when
    the running means move: a forward pass in training leaves the batch's, and `move`, called once an update, takes them
    in. So what is computed twice (recomputation) is not taken in twice, and an update that is not made leaves no trace.
    """

    mean: Tensor
    variance: Tensor
    batch_mean: Tensor
    batch_variance: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.over_processes = False
        """Whether a batch is divided among processes."""
        self.register_buffer("mean", torch.zeros(num_experts))
        self.register_buffer("variance", torch.ones(num_experts))
        self.register_buffer("batch_mean", torch.zeros(num_experts), persistent=False)
        self.register_buffer("batch_variance", torch.ones(num_experts), persistent=False)

    def forward(
        self, logits: Float[Tensor, "b n e"], keep: Bool[Tensor, "b n"] | None, *, batch: bool
    ) -> Float[Tensor, "b n e"]:
        """`batch`: by this batch's means, not by the running ones."""
        if not batch:
            return (logits - self.mean) * (self.variance + NORM_EPS).rsqrt()
        single = logits.shape[0] * logits.shape[1] == 1 and not self.over_processes
        if single and has_numbers(logits):  # cost and memory are asked for one image too
            raise ValueError("norm=batch has no variance over one token; use a larger batch or norm=layer")
        kept = None if keep is None else keep[..., None].to(logits.dtype)

        def added(values: Tensor) -> Tensor:
            return (values if kept is None else values * kept).sum(dim=(0, 1))

        count = logits.new_full((1,), logits.shape[0] * logits.shape[1]) if kept is None else kept.sum().reshape(1)
        total = self._whole(torch.cat([added(logits), count]))
        count = total[-1].detach()
        centred = logits - total[:-1] / count
        variance = self._whole(added(centred * centred)) / count
        with torch.no_grad():
            self.batch_mean.copy_(total[:-1] / count)
            self.batch_variance.copy_(variance * (count / (count - 1)))
        return centred * (variance + NORM_EPS).rsqrt()

    def _whole(self, part: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
        if not self.over_processes:
            return part
        whole: Tensor = _SumOfAll.apply(part)
        return whole

    @torch.no_grad()
    def move(self) -> None:
        self.mean.lerp_(self.batch_mean, MOMENTUM)
        self.variance.lerp_(self.batch_variance, MOMENTUM)


class Level(nn.Module):
    """The coefficients of one level of experts: a product without bias, a normalisation, entmax or softmax."""

    def __init__(self, dim: int, num_experts: int, *, function: str, norm: str) -> None:
        super().__init__()
        self.function = function
        self.kernel = nn.Parameter(torch.zeros(dim, num_experts))  # all experts have equal shares at first
        self.norm = BatchNorm(num_experts) if norm == "batch" else None

    def forward(self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b n e"]:
        logits = x @ self.kernel
        if self.norm is not None:
            # A frozen gate goes by its running means, which then stand still as well.
            normalised: Tensor = self.norm(logits, keep, batch=self.training and self.kernel.requires_grad)
        else:
            normalised = nn.functional.layer_norm(logits, logits.shape[-1:], eps=NORM_EPS)
        return FUNCTIONS[self.function](normalised)


class Coefficients(Decided):
    """Every token's share in every expert, for each level of experts; they add up to one over the experts of a
    level. An expert of several levels has the product of its shares."""

    def __init__(self, levels: Sequence[Float[Tensor, "b n _"]]) -> None:
        self.levels = tuple(levels)
        self.aux_loss = levels[0].new_zeros(())

    @torch.no_grad()
    def shares(self) -> Shares:
        """Of several levels, the first one's."""
        first = self.levels[0]
        return Shares(first, None, torch.arange(first.shape[2], device=first.device), None)

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """Experts are those of all levels together. `coefficient_entropy`: of a token's shares, in nats, mean over
        tokens. `coefficient_zeros`: shares that are exactly zero. `coefficient_max`: a token's largest share, mean over
        tokens. `specialist_share`: experts that have half of some token or more. An expert's load is the sum of its
        shares."""
        levels = [level.flatten(0, 1).cpu().double() for level in self.levels]  # on a CPU: not every device has float64
        tokens, load, most = len(levels[0]), levels[0].sum(dim=0), levels[0].amax(dim=0)
        if len(levels) > 1:
            load = torch.einsum("ni,nj->ij", *levels).flatten()
            most = torch.cat([(first[:, None] * levels[1]).amax(dim=0) for first in levels[0].T])
        entropy, nonzero, largest = (levels[0].new_zeros(tokens), *levels[0].new_ones(2, tokens))
        for shares in levels:
            entropy -= torch.xlogy(shares, shares).sum(dim=1)
            nonzero *= (shares > 0).double().mean(dim=1)
            largest *= shares.amax(dim=1)
        return load_statistics(load) | {
            "coefficient_entropy": entropy.mean().item(),
            "coefficient_zeros": 1 - nonzero.mean().item(),
            "coefficient_max": largest.mean().item(),
            "specialist_share": (most >= 0.5).double().mean().item(),
        }
