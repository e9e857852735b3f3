"""Layers whose experts are linear maps that are held together, in the factors of one tensor, and never formed.

Multilinear Mixture of Experts (muMoE; Oldfield et al., 2024, https://arxiv.org/abs/2402.12550), as in the official code
(james-oldfield/muMoE, MuMoE.py). An expert is one map; the layer of a token is the mean of all experts, each by the
token's coefficient. Two such layers with one set of coefficients, and GELU between them, stand in an MLP's place.

Letters: i and o for the widths before and after a map, r for ranks; their N is our e.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from softmoe_cli.moe.coefficients import FUNCTIONS, GATE_NORMS, BatchNorm, Coefficients, Level
from softmoe_cli.moe.kind import Decider, Layer
from softmoe_cli.moe.layer import in_fast_precision
from softmoe_cli.moe.routing import full_precision

Levels = Sequence[Float[Tensor, "b n _"]]


class Maps(nn.Module, ABC):
    """Linear maps from i to o, one for each expert, in factors: of the experts of each level, the input and the output.
    With `bias` the input has one more row, its last, which a constant 1 meets: each expert has a bias of its own."""

    of_input: nn.Parameter
    of_output: nn.Parameter

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.bias = bias

    @abstractmethod
    def flop(self, num_tokens: int) -> int:
        """FLOPs of all products; a multiply-add counts as 2, biases and products of single numbers as 0."""

    def last_flop(self, num_tokens: int) -> int:
        """The part of `flop` that is the last product."""
        return 2 * num_tokens * self.of_output.numel()

    @abstractmethod
    def output(self) -> Float[Tensor, "o k"]:
        """The matrix of the last product, from the factor of the output."""

    @property
    @abstractmethod
    def spare(self) -> int:
        """How many directions there are beside one in which experts can differ."""

    @abstractmethod
    def hold(self, left: Float[Tensor, "j k"], right: Float[Tensor, "o k"]) -> None:
        """Lets every expert be `left` times `right` transposed, exactly. j: the rows of the input, the bias last; k is
        `spare` at most. Directions that are left stay as they are, but add nothing yet."""

    @abstractmethod
    def mixed(self, x: Float[Tensor, "b n i"], levels: Levels) -> Float[Tensor, "b n k"]:
        """All but the last product. `levels`: coefficients for the experts of each level."""

    def forward(self, x: Float[Tensor, "b n i"], levels: Levels) -> Float[Tensor, "b n o"]:
        return self.mixed(x, levels) @ self.output().mT.contiguous()


def uniform(*shape: int, fan: int) -> nn.Parameter:
    bound = 1 / math.sqrt(fan)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def with_bias(x: Float[Tensor, "b n i"], factor: Float[Tensor, "j r"], bias: bool) -> Float[Tensor, "b n r"]:
    """x, with a last entry of 1 if `bias`, times the factor.

    Here and in `Maps.forward` the matrix's rows are laid out as long as the layer is wide. A product with rows as long
    as the rank, which is seldom a multiple of what a processor loads at once, takes up to a third longer.
    """
    rows = (factor[:-1] if bias else factor).mT.contiguous()
    return F.linear(x, rows, factor[-1] if bias else None)


class Pair(nn.Module):
    """The two layers of a block: maps, GELU, maps. `norm`: LayerNorm on what the maps see."""

    def __init__(self, first: Maps, second: Maps, norm: nn.LayerNorm | None, gelu: str) -> None:
        super().__init__()
        self.first, self.second, self.norm, self.gelu = first, second, norm, gelu

    def flop(self, num_tokens: int) -> int:
        return self.first.flop(num_tokens) + self.second.flop(num_tokens)

    def forward(self, x: Float[Tensor, "b n d"], levels: Levels) -> Float[Tensor, "b n d"]:
        if self.norm is not None:
            x = self.norm(x).to(x.dtype)
        y: Tensor = self.second(F.gelu(self.first(x, levels), approximate=self.gelu), levels)
        return y


class FactorisedRouter(Decider):
    """What decides in a factorised layer, and builds it: one gate for all its linear maps.

    Args:
        dim: d.
        num_experts: e; with `num_experts_2` those of the first level.
        num_experts_2: experts of the second level; None: there is one level.
        rank: of both layers, or `matched`: the smallest with which gate and layers have the parameters of the MLP.
        gate: what makes coefficients of normalised logits, `entmax15` or `softmax`.
        norm: how logits are normalised, `batch` (over all tokens of a batch) or `layer` (over the experts of a token).
        bias: whether each expert has biases.
        input_norm: LayerNorm on what the experts see, but not on what the gate sees.

    Raises:
        ValueError: an impossible choice.
    """

    unstacked: ClassVar[str | None] = "was not tried for several models"
    unprunable = "its experts share the factors of one tensor, and each has a part in every token"

    def __init__(
        self,
        dim: int,
        *,
        num_experts: int,
        num_experts_2: int | None,
        rank: Any,
        gate: str,
        norm: str,
        bias: bool,
        input_norm: bool,
    ) -> None:
        super().__init__()
        for name, value in {"num_experts": num_experts, "num_experts_2": num_experts_2}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if gate not in FUNCTIONS:
            raise ValueError(f"gate={gate} is not one of {', '.join(FUNCTIONS)}")
        if norm not in GATE_NORMS:
            raise ValueError(f"norm={norm} is not one of {', '.join(GATE_NORMS)}")
        self.num_experts, self.dim, self.rank, self.bias, self.input_norm = num_experts, dim, rank, bias, input_norm
        self.experts_by_level = (num_experts,) if num_experts_2 is None else (num_experts, num_experts_2)
        self.levels = nn.ModuleList(Level(dim, e, function=gate, norm=norm) for e in self.experts_by_level)
        self.decays = tuple(name for name, _ in self.named_parameters())  # all, as in the official code
        self.departure: str | None = None
        """Why the layer that it has built cannot be an MLP."""
        if norm == "batch":
            self.exempt = {"images do not see each other": "in training norm=batch normalises over all images"}
            self.whole_batches = (
                "norm=batch normalises over a whole batch; set train.accumulate=1 or model.router.norm=layer"
            )

    @abstractmethod
    def maps(self, inputs: int, outputs: int, rank: Any) -> Maps:
        """The maps of one layer."""

    @abstractmethod
    def sizes(self, inputs: int, outputs: int) -> tuple[int, int]:
        """Parameters of one layer's maps that do not depend on a matched rank, and those for each unit of it."""

    @abstractmethod
    def rank_of(self, matched: int) -> Any:
        """The whole of `rank` with its matched number."""

    @abstractmethod
    def rank_for(self, directions: int) -> Any:
        """A `rank` with so many directions beside one in which experts can differ."""

    def layer(self, hidden: int, gelu: str) -> "Factorised":
        widths = ((self.dim, hidden), (hidden, self.dim))
        target = 2 * self.dim * hidden + self.dim + hidden
        rank = self._matched(widths, target) if self.rank == "matched" else self.rank
        first, second = (self.maps(inputs, outputs, rank) for inputs, outputs in widths)
        norm = nn.LayerNorm(self.dim) if self.input_norm else None
        return Factorised(self, Pair(first, second, norm, gelu), hidden, rank)

    def head(self, classes: int) -> "FactorisedHead":
        """One layer of maps in the place of a linear head.

        Raises:
            ValueError: no such head can be.
        """
        widths = ((self.dim, classes),)
        rank = self._matched(widths, self.dim * classes + classes) if self.rank == "matched" else self.rank
        if self.whole_batches is not None:
            self.whole_batches = self.whole_batches.replace("model.router.norm", "model.head_norm")
        return FactorisedHead(self, self.maps(self.dim, classes, rank))

    def _matched(self, widths: Sequence[tuple[int, int]], target: int) -> Any:
        """The smallest rank with which the layer has `target` parameters or more: the gate is charged to it, and the
        rank rounded up, as in the official code (finetune.py)."""
        sizes = [self.sizes(inputs, outputs) for inputs, outputs in widths]
        beside = sum(parameter.numel() for parameter in self.parameters()) + 2 * self.dim * self.input_norm
        beside += sum(fixed for fixed, _ in sizes)
        if beside >= target:
            raise ValueError(
                f"num_experts={self.num_experts}: whatever the rank, gate and experts have {beside:,} parameters, and "
                f"rank=matched is to equal {target:,}; use fewer experts, or a number for rank"
            )
        return self.rank_of(-(-(target - beside) // sum(each for _, each in sizes)))

    @property
    def _norms(self) -> list[BatchNorm]:
        return [module for module in self.modules() if isinstance(module, BatchNorm)]

    def flop(self, num_tokens: int) -> int:
        """The products of n, d and the experts of each level."""
        return 2 * num_tokens * sum(parameter.numel() for parameter in self.parameters())

    def forward(self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None = None) -> Coefficients:
        with full_precision(x):
            tokens = x.to(next(self.parameters()).dtype)
            return Coefficients([level(tokens, keep) for level in self.levels])

    weak_note = "gives every expert a part in every token"

    def departs_from_mlp(self, num_tokens: int, parts: int) -> str | None:
        return self.departure

    def share_batches(self) -> None:
        for norm in self._norms:
            norm.over_processes = True

    def after_update(self) -> None:
        for level in self.levels:
            if isinstance(level.norm, BatchNorm) and level.kernel.requires_grad:
                level.norm.move()


def _directions(inputs: int, outputs: int) -> int:
    """The largest rank of a matrix from so many inputs and a bias to so many outputs."""
    return min(inputs + 1, outputs)


class Factorised(Layer):
    """Two layers of factorised experts in the place of an MLP, with one set of coefficients for both."""

    router: FactorisedRouter
    experts: Pair

    def __init__(self, router: FactorisedRouter, experts: Pair, hidden: int, rank: Any) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.rank = rank
        # All, as in the official code; the biases are rows of factors.
        self.decays = tuple(name for name, _ in self.named_parameters())
        router.departure = self._departure(hidden)

    def _departure(self, hidden: int) -> str | None:
        """Why it cannot become an MLP and still learn: its experts are then all alike but for directions that the MLP
        leaves free."""
        if not self.router.bias:
            return "its experts have no biases; set model.router.bias=true"
        if self.router.input_norm:
            return "it normalises what an MLP takes as it is; set model.router.input_norm=false"
        needed = max(_directions(self.router.dim, hidden), _directions(hidden, self.router.dim))
        if needed <= self.experts.first.spare:
            return None
        enough = str(self.router.rank_for(needed)).replace(" ", "")
        return (
            f"experts of rank={self.rank} cannot be this MLP's maps and have a direction left to differ in; "
            f"set model.router.rank={enough}"
        )

    @torch.no_grad()
    def hold(
        self, w1: Float[Tensor, "h d"], b1: Float[Tensor, " h"], w2: Float[Tensor, "d h"], b2: Float[Tensor, " d"]
    ) -> dict[str, tuple[str, str]]:
        for maps, weight, bias in ((self.experts.first, w1, b1), (self.experts.second, w2, b2)):
            matrix = torch.cat([weight, bias[:, None]], dim=1).mT  # one of its two factors is the unit matrix
            unit = torch.eye(min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
            left, right = (unit, matrix.mT) if len(unit) == len(matrix) else (matrix, unit)
            maps.hold(left, right)
        return {
            f"experts.{part}.{factor}": (leaf, f"held with its bias in factors of rank {self.rank}".replace(", ", ","))
            for part, leaf in (("first", "w1"), ("second", "w2"))
            for factor in ("of_input", "of_output")
        }

    def flop_by_part(self, num_tokens: int) -> dict[str, tuple[int, int]]:
        experts = self.experts.flop(num_tokens)
        return {
            "router": (self.router.flop(num_tokens), self.router.train_flop(num_tokens)),
            "experts": (experts, 3 * experts),
        }

    def last_product(self, num_tokens: int) -> tuple[str, int]:
        return "experts", self.experts.second.last_flop(num_tokens)

    def rows(self, num_tokens: int) -> None:
        return None

    @property
    def active_share(self) -> float:
        return 1.0

    def fixed_options(self) -> dict[str, Any]:
        return {"rank": self.rank}

    @contextmanager
    def silenced(self, which: Sequence[int]) -> Iterator[None]:
        """Of two levels, the first one's experts with all that they have in the second."""

        def hook(_module: nn.Module, inputs: tuple[Tensor, Levels]) -> tuple[Tensor, Levels]:
            x, (first, *further) = inputs
            return x, (first.index_fill(-1, torch.tensor(which, device=first.device), 0), *further)

        handle = self.experts.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def forward(self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        coefficients: Coefficients = self.router(x, keep)

        def through(tokens: Tensor) -> Tensor:
            # Of its own, so that its gradient is that of the experts alone, which counters of FLOPs go by.
            own = tokens.view_as(tokens)
            y: Tensor = self.experts(own, tuple(level.to(tokens.dtype) for level in coefficients.levels))
            return y if keep is None else y.masked_fill(~keep[:, :, None], 0)

        return in_fast_precision(x, self.experts.first.of_input.dtype, through)


class FactorisedHead(nn.Module):
    """One layer of factorised experts in the place of a linear head. `weight` is the matrix of its last product, which
    has a row for each class, as a linear head's has."""

    def __init__(self, router: FactorisedRouter, maps: Maps) -> None:
        super().__init__()
        self.router = router
        self.weight = nn.Parameter(maps.output().detach().clone())
        self.maps = maps
        del maps.of_output

    def flop(self) -> int:
        """FLOPs per image; a multiply-add counts as 2."""
        return self.router.flop(1) + self.maps.flop(1) + 2 * self.weight.numel()

    @contextmanager
    def silenced(self, which: Sequence[int]) -> Iterator[None]:
        """As `Layer.silenced`."""

        def hook(_router: nn.Module, _inputs: object, decided: Coefficients) -> Coefficients:
            first, *further = decided.levels
            return Coefficients([first.index_fill(-1, torch.tensor(which, device=first.device), 0), *further])

        handle = self.router.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b c"]:
        x = features[:, None]
        coefficients: Coefficients = self.router(x)

        def through(tokens: Tensor) -> Tensor:
            return self.maps.mixed(tokens, [level.to(tokens.dtype) for level in coefficients.levels]) @ self.weight.mT

        logits = in_fast_precision(x, self.weight.dtype, through)
        return logits.squeeze(1).clone()  # no view: fully_shard warns of one as a model's result
