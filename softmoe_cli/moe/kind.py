"""What every kind of layer says of itself. A layer stands in the place of a block's MLP; a part of it decides.

In most kinds a router gives rows of tokens to experts that are MLPs (routing.py, layer.py). A kind whose experts are
something else builds its whole layer (factorised.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class Shares(NamedTuple):
    """Which experts have which part in which token, for whoever draws or counts it. A column is a slot; where rows are
    single tokens, or experts have no rows, it is an expert.

    Attributes:
        given: each column's weight in each token's output; 0 where it has no part.
        taken: each token's share in each slot; None where a row is one token, or there are no rows.
        expert: the expert of each column.
        chosen: where rows are single tokens, the experts that see each token, the first choice or largest weight
            first; -1 for a choice that found no room, which may stand before one that did, and behind the last one.
            None where all see all.
        kinds: what kind each expert is of, where there are several.
    """

    given: Float[Tensor, "b n m"]
    taken: Float[Tensor, "b n m"] | None
    expert: Int[Tensor, " m"]
    chosen: Int[Tensor, "b n k"] | None
    kinds: tuple[str, ...] = ()


class Decided(ABC):
    """What one layer has decided about one batch."""

    aux_loss: Float[Tensor, ""]

    @property
    def landed(self) -> Int[Tensor, ""] | None:
        """How many rows of experts hold a token; None where a row is of many tokens, or experts have no rows."""
        return None

    @abstractmethod
    def statistics(self) -> dict[str, float]:
        """Plain numbers for the record; computed only here, when asked."""

    def told(self) -> dict[str, Any]:
        """What the record says beside these numbers, as JSON has it."""
        return {}

    def shares(self) -> Shares | None:
        """The parts that experts have in tokens; computed only here, when asked. None: it does not say."""
        return None


class Weak(NamedTuple):
    """A weak activation, such as rank_2: a way to route a trained layer otherwise (weak.py)."""

    kind: str
    number: int = 0
    """What follows the kind; 0 where nothing does."""


UNKNOWN = "softmoe does not know whether its weights add up to one; leave preserve=false"
"""The answer of `departs_from_mlp` by a router that does not define it."""


class Decider(nn.Module, ABC):
    """What `model/router=` names. Constructed as `Decider(dim, num_tokens, **options)`; the options, all without
    default, stand in its yaml.

    Here commands learn everything that they must know of what decides, whatever the kind of layer. Options of these
    names mean the same for all: `num_experts`, `images_per_group`.
    """

    num_experts: int
    slots_per_expert: int | None = None
    """p, slots of an expert in one group of images; None where nothing bounds an expert's rows, or it has none."""
    exempt: Mapping[str, str] = {}
    """Checks of `softmoe check` that this router's definition rules out, each with the reason."""
    official: ClassVar[str | None] = None
    """Which of the official code's numbers are of this router: a name that check/official.py knows."""
    decays: tuple[str, ...] | None = None
    """Its parameters with weight decay, by name; None: matrices that are called `weight`, as elsewhere in a model."""
    slot_axes: ClassVar[Mapping[str, int]] = {}
    """The axis of an expert's slots in each parameter that has one: trained weights can then be given other
    `slots_per_expert`."""
    images_per_group: int = 1
    """Images that decide about each other: results depend on batch neighbours where it is not 1."""
    evaluates_alone: ClassVar[bool] = False
    """Whether in evaluation no image decides about another one, so that it takes batches of any size whatever the
    option `images_per_group` says of training."""
    whole_batches: str | None = None
    """Why a batch cannot be computed in parts, with the way out; None where it can."""

    unstacked: ClassVar[str | None] = None
    """Why layers of several models cannot be computed at once, as the rest of a sentence about it; None where they
    can."""
    for_checks: ClassVar[Mapping[str, Any]] = {}
    """Options that its yaml leaves to the data, as `softmoe check` gives them."""
    unprunable: str | None = "softmoe does not know how it would decide among fewer experts"
    """Why none of its experts can be taken away; None where they can."""

    def layer(self, hidden: int, gelu: str) -> "Layer | None":
        """The whole layer in the place of an MLP of `hidden` units, of a kind that builds its own; None where rows go
        to stacked experts. `gelu` is `tanh` or `none` (exact).

        Raises:
            ValueError: no such layer can be.
        """
        return None

    @abstractmethod
    def flop(self, num_tokens: int) -> int:
        """FLOPs per image of everything but the experts, on `num_tokens` tokens; a multiply-add counts as 2."""

    def train_flop(self, num_tokens: int) -> int:
        """FLOPs per image of `flop`'s products and of their gradients: a product has two operands, and each that has
        a gradient costs as much again. Routers with fixed weights have fewer."""
        return 3 * self.flop(num_tokens)

    kinds: Sequence[str] = ()
    """Kinds of experts that tokens can do without, where there are several. Its decisions then say what has
    `landed`."""

    def without(self, kind: str) -> AbstractContextManager[None]:
        """While open, tokens choose no expert of one of `kinds`."""
        raise NotImplementedError(f"experts of {type(self).__name__} are of one kind")

    def departs_from_mlp(self, num_tokens: int, parts: int) -> str | None:
        """Why a layer of copies of an MLP is not that MLP in evaluation, and the way out; None where it is: every
        token's weights add up to one over experts that see that token alone and, with an MLP cut into `parts`, are
        equal among the parts of a copy."""
        return UNKNOWN

    def capacity_factor(self, slots: int, num_tokens: int) -> float | None:
        """The capacity factor with `slots` slots per expert: slots of all experts over what `num_tokens` tokens an
        image ask for. None if trained weights cannot be run with other capacities."""
        return None

    weak_note: ClassVar[str] = "has no ranks of experts"
    """Why kinds of weak activations that are not in `weak_limits` are not, as the rest of a sentence about it."""

    def weak_limits(self) -> dict[str, int]:
        """The kinds of weak activations that mean something for it, with the largest number of each."""
        return {"skip": 0}

    @abstractmethod
    def forward(self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None = None) -> Decided:
        """Decides about a batch. Tokens where `keep` is false are padding."""

    def statistics(self) -> dict[str, float]:
        """Plain numbers about its own parameters."""
        return {}

    @classmethod
    def remark(cls, layers: Sequence[Mapping[str, Any]], num_tokens: int) -> str:
        """A sentence for the end of a run, about the statistics of its last look, one row of routing.jsonl for each
        layer; empty where there is nothing to say."""
        return ""

    def share_batches(self) -> None:
        """Called once in each of several processes that share every batch, for what is taken over a whole batch."""
        return

    def counted(self) -> list[Tensor]:
        """Tensors that forward passes have added up for `after_update`; processes that share a batch add theirs
        together."""
        return []

    def after_update(self) -> None:
        """Called once after each update of the weights, for what is adjusted by other means than gradients."""
        return


class Layer(nn.Module, ABC):
    """What stands in the place of a block's MLP: `router` decides, `experts` compute.

    Here commands learn everything that they must know of a layer beside what its router says.
    """

    router: Decider
    experts: nn.Module
    decays: tuple[str, ...] | None = None
    """As a router's, of all its parameters."""
    run_widths: Sequence[int] = ()
    """Widths of the matrices that runs of rows of any length are multiplied by, which torch can take in multiples
    only."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        """Padding, where `keep` is false, gets zero."""

    @abstractmethod
    def flop_by_part(self, num_tokens: int) -> dict[str, tuple[int, int]]:
        """FLOPs per image, forwards and in training (forwards and backwards), of `router` and of each other submodule;
        a multiply-add counts as 2."""

    def flop(self, num_tokens: int) -> int:
        """FLOPs per image; a multiply-add counts as 2."""
        return sum(forward for forward, _ in self.flop_by_part(num_tokens).values())

    def recomputed_flop_by_part(self, num_tokens: int) -> dict[str, int]:
        """FLOPs per image of each part in a forward pass of training, which recomputation repeats."""
        return {part: forward for part, (forward, _) in self.flop_by_part(num_tokens).items()}

    @property
    def landed_row_flop(self) -> int | None:
        """FLOPs of one row of an expert, forwards, where a row is of one token; else None."""
        return None

    def landed_rows(self, num_tokens: int) -> float | None:
        """How many of `rows` hold a token when the load is as even as the router aims at; None where a row is not of
        one token."""
        return None

    def choices(self, num_tokens: int) -> int | None:
        """How many experts the tokens of an image choose; None where tokens do not choose."""
        return None

    @abstractmethod
    def last_product(self, num_tokens: int) -> tuple[str, int]:
        """The part with the layer's last product, and the FLOPs of that product per image; 0 if its result is needed
        for a gradient."""

    @abstractmethod
    def rows(self, num_tokens: int) -> float | None:
        """Rows per image that the experts compute in training, empty ones included; None where every expert has a part
        in every token."""

    @property
    @abstractmethod
    def active_share(self) -> float:
        """The share of `experts`' parameters that one token passes through, on average."""

    @abstractmethod
    def fixed_options(self) -> dict[str, Any]:
        """Options of the router whose values came of the model, with these values: what a checkpoint keeps, so that
        its weights fit into whatever is built from it."""

    def hold(
        self, w1: Float[Tensor, "h d"], b1: Float[Tensor, " h"], w2: Float[Tensor, "d h"], b2: Float[Tensor, " d"]
    ) -> dict[str, tuple[str, str]] | None:
        """Becomes exactly this MLP, where the router does not depart from one. Says for each of its parameters that it
        changed from which weight of the MLP it is, by the name here, and how. None where the experts are MLPs
        themselves: then softmoe upcycle fills them."""
        return None

    @abstractmethod
    def silenced(self, which: Sequence[int]) -> AbstractContextManager[None]:
        """While open, these experts, by their places among those left, add nothing; nothing is decided anew."""
