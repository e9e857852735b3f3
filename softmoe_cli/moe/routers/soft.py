"""Soft MoE: From Sparse to Soft Mixtures of Experts (Puigcerver et al., 2023), https://arxiv.org/abs/2308.00951

The paper's letters: m tokens are our n, n experts our e, p slots our p, Phi our `phi`. Where the paper and the
official code (google-research/vmoe, projects/soft_moe/router.py) differ, this follows the code: the
epsilon 1e-6 is added to the sum of squares inside the root (Algorithm 2 adds it to the norm), and `phi`
starts truncated-normal with std 1/sqrt(d e) (Appendix E says Glorot).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from softmoe_cli.moe.kind import Weak
from softmoe_cli.moe.routing import DenseRouting, Router, full_precision, mixtures_depart, noise_like, slots_of
from softmoe_cli.moe.weak import WeakMixture, narrowed

EPS = 1e-6
UNIFORM = 1.5
"""A mean largest share below so many times the uniform one counts as almost uniform."""


def l2_normalize(x: Float[Tensor, "..."], dim: int) -> Float[Tensor, "..."]:
    """x / sqrt(sum(x^2) + 1e-6) along `dim` (Algorithm 2, with the code's epsilon); a zero vector stays zero."""
    return x * inverse_length(x, dim)


def inverse_length(x: Float[Tensor, "..."], dim: int) -> Float[Tensor, "..."]:
    """1 / sqrt(sum(x^2) + 1e-6). `vector_norm` and products with an inverse pass over their operands fewer times,
    forwards and backwards, than squares, sums and quotients."""
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True).square().add(EPS).rsqrt()


def soft_logits(
    x: Float[Tensor, "b n d"], phi: Float[Tensor, "d e p"], scale: Float[Tensor, ""]
) -> Float[Tensor, "b n e p"]:
    """scale times the cosine of each token with each slot's parameters (Section 2.3).

    Tokens are brought to unit length after the product, so that no normalised copy of them is made and kept. In memory
    the experts are innermost, which lets `DenseRouting.dispatch` hand out each expert's rows without a copy.
    """
    _, e, p = phi.shape
    slots = (scale * l2_normalize(phi, dim=0)).mT.flatten(1)
    return _Cosines.apply(x, slots).unflatten(2, (p, e)).mT


class _Cosines(torch.autograd.Function):
    """x @ slots / length of x. autograd's own backward pass reads and writes the tokens three times more, for the
    gradient of the length. Of s models at once, x is s bn d and slots are s d m."""

    @staticmethod
    def forward(x: Float[Tensor, "b n d"], slots: Float[Tensor, "*s d m"]) -> Float[Tensor, "b n m"]:
        return (x @ slots).mul_(inverse_length(x, dim=2))

    @staticmethod
    def vmap(info: Any, dims: tuple[int, int], x: Tensor, slots: Tensor) -> tuple[Tensor, int]:
        x, slots = x.movedim(dims[0], 0), slots.movedim(dims[1], 0)
        return _Cosines.apply(x.flatten(1, 2), slots).unflatten(1, x.shape[1:3]), 0

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "b n m"]) -> tuple[Tensor | None, Tensor | None]:
        x, slots, cosines = ctx.saved_tensors
        inverse = inverse_length(x, dim=2)
        of_x = of_slots = None
        if ctx.needs_input_grad[0]:  # the gradient of the inverse length is -inverse ** 3 x
            of_length = (grad * cosines).sum(dim=2, keepdim=True) * inverse.square()
        grad = grad * inverse
        if ctx.needs_input_grad[0]:
            of_x = torch.addcmul(grad @ slots.mT, x, of_length, value=-1)
        if ctx.needs_input_grad[1]:
            of_slots = x.flatten(0, 1).T @ grad.flatten(0, 1) if slots.ndim == 2 else x.mT @ grad
        return of_x, of_slots


def soft_weights(
    logits: Float[Tensor, "b n e p"], keep: Bool[Tensor, "b n"] | None = None
) -> tuple[Float[Tensor, "b n e p"], Float[Tensor, "b n e p"]]:
    """Dispatch weights, a softmax over tokens, and combine weights, a softmax over all slots (Section 2.1).

    Padding has no part in any slot and no slot in it.
    """
    e, p = logits.shape[2:]
    flat = logits.mT.flatten(2)  # as `soft_logits` lays them out: a view
    combine = flat.softmax(dim=2)
    if keep is None:
        dispatch = flat.softmax(dim=1)
    else:
        kept = keep[:, :, None]
        dispatch = flat.masked_fill(~kept, torch.finfo(flat.dtype).min).softmax(dim=1) * kept
        combine = combine * kept
    return dispatch.unflatten(2, (p, e)).mT, combine.unflatten(2, (p, e)).mT


class SoftRouter(Router):
    """Slots are mixtures of all tokens of an image, tokens mixtures of all slots.

    Args:
        dim: d.
        num_tokens: n, used only with `capacity_factor`.
        num_experts: e.
        slots_per_expert: p (the paper's models: 1); null to have it follow from `capacity_factor`.
        capacity_factor: p = round(n * capacity_factor / e), half to even; null when p is given.
        noise_std: standard deviation of the noise on the logits in training (official: 0). Unlike the sparse
            routers' noise it is not divided by e.

    Raises:
        ValueError: when not exactly one of `slots_per_expert` and `capacity_factor` is given, or p would be 0.
    """

    decays = ("scale",)
    expert_axes: ClassVar[dict[str, int]] = {"phi": 1}
    slot_axes: ClassVar[dict[str, int]] = {"phi": 2}
    official: ClassVar[str | None] = "soft_layer"
    unprunable: str | None = None
    measures = ("alpha_score",)
    left: Tensor | None
    """The experts that are left, where some were pruned."""

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        *,
        num_experts: int,
        slots_per_expert: int | None,
        capacity_factor: float | None,
        noise_std: float,
    ) -> None:
        super().__init__()
        if not noise_std >= 0:
            raise ValueError(f"noise_std={noise_std} must not be negative")
        slots = slots_of(slots_per_expert, capacity_factor, num_tokens, num_experts, "round", 1)
        self.num_experts = num_experts
        self.slots_per_expert: int = slots
        self.noise_std = noise_std
        self.phi = nn.Parameter(torch.empty(dim, num_experts, slots))
        self.register_buffer("left", None, persistent=False)
        self.scale = nn.Parameter(torch.ones(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        dim, num_experts, _ = self.phi.shape
        # JAX's lecun_normal counts the expert axis into the fan; 0.8796 is the std of a normal cut at 2 sigma.
        std = 1 / math.sqrt(dim * num_experts) / 0.87962566103423978
        nn.init.trunc_normal_(self.phi, std=std, a=-2 * std, b=2 * std)
        nn.init.ones_(self.scale)

    @property
    def experts_per_token(self) -> float:
        return float(self.num_experts)

    def rows(self, num_tokens: int) -> float:
        return float(self.num_experts * self.slots_per_expert)

    def flop(self, num_tokens: int) -> int:
        """Logits, dispatch and combine: three products of n, e p and d."""
        return 3 * self.combine_flop(num_tokens)

    def combine_flop(self, num_tokens: int) -> int:
        return 2 * num_tokens * len(self.phi) * self.num_experts * self.slots_per_expert

    def _phi(self) -> Float[Tensor, "d z p"]:
        return self.phi if self.left is None else self.phi.index_select(1, self.left)

    def leave(self, left: Int[Tensor, " z"] | None, *, balance: bool) -> None:
        """The slots of experts that go leave both softmaxes."""
        self.num_experts, self.left = self.phi.shape[1] if left is None else len(left), left

    def options_left(self) -> dict[str, Any]:
        return {
            "num_experts": self.num_experts, "slots_per_expert": self.slots_per_expert, "capacity_factor": None
        }  # fmt: skip

    def departs_from_mlp(self, num_tokens: int, parts: int) -> str | None:
        return mixtures_depart(num_tokens)

    def logits(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e p"]:
        """Of each token and slot, in the parameters' precision."""
        return soft_logits(x, self._phi(), self.scale)

    weak_note = "has no unchosen experts"

    def weak_limits(self) -> dict[str, int]:
        slots = {"slot_rank": self.num_experts * self.slots_per_expert}
        return ({"drop": self.num_experts - 1} if self.num_experts > 1 else {}) | slots | {"flat": 0, "skip": 0}

    def weaker(self, how: Weak, given: Int[Tensor, "*some"] | None) -> Router:
        if how.kind != "drop":
            return WeakMixture(how, self)
        assert given is not None
        fewer = narrowed(self, given)
        fewer.num_experts = len(given)
        return fewer

    def forward(self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"] | None = None) -> DenseRouting:
        with full_precision(x):
            logits = self.logits(x.to(self.phi.dtype))
            if self.training and self.noise_std > 0:
                logits = logits + self.noise_std * noise_like(logits)
            return DenseRouting(*soft_weights(logits, keep), logits.new_zeros(()))

    @torch.no_grad()
    def statistics(self) -> dict[str, float]:
        """The scale, and how alike the slots' parameters are: cosines of all pairs."""
        return {"scale": self.scale.item()} | self.slot_statistics()

    def slot_statistics(self) -> dict[str, float]:
        return cosines(l2_normalize(self._phi(), dim=0).flatten(1).T)

    @classmethod
    def remark(cls, layers: Sequence[Mapping[str, Any]], num_tokens: int) -> str:
        """Says it where the slots mix all tokens almost alike, as they do at the start."""
        shares = [row["dispatch_max"] for row in layers if "dispatch_max" in row]
        if not shares or sum(shares) / len(shares) >= UNIFORM / num_tokens:
            return ""
        return (
            f"still almost uniform: a slot's largest share of a token is {sum(shares) / len(shares):.4f} in the mean, "
            f"and {1 / num_tokens:.4f} where all tokens are mixed alike"
        )


def cosines(vectors: Float[Tensor, "m d"]) -> dict[str, float]:
    """Smallest, largest and mean cosine between two of m vectors, as the official metrics have them (1e-9 inside the
    root; the mean takes a vector's cosine with itself as 1, also where it is zero); nothing where there is but one."""
    m = len(vectors)
    if m < 2:
        return {}
    unit = vectors / (vectors.square().sum(dim=1, keepdim=True) + 1e-9).sqrt()
    matrix = unit @ unit.T
    pairs = matrix[~torch.eye(m, dtype=torch.bool, device=vectors.device)]
    return {
        "slot_cosine_min": pairs.min().item(),
        "slot_cosine_max": pairs.max().item(),
        "slot_cosine_mean": (matrix.sum().item() - m) / (m * (m - 1)),
    }
