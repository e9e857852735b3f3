"""Image Choice: one decision for all tokens of an image. The sentence level of Beyond Distillation: Task-level
Mixture-of-Experts for Efficient Inference (Kudugunta et al., 2021), https://arxiv.org/abs/2110.03742, Section 3.1.

As in Google's code (google/praxis, layers/transformers.py, moe_gating_embedding_level="sentence"): the mean is of the
layer's input, which is after the block's norm, and leaves padding out. The gate is linear, so that the mean's logits
are the mean of the tokens' logits. The paper takes k=2 and divides the two gates by their sum: renormalise=true.
"""

from typing import ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor

from softmoe_cli.moe.kind import Weak
from softmoe_cli.moe.routers.tokens_choice_dropless import TokensChoiceDroplessRouter
from softmoe_cli.moe.sparse import image_means
from softmoe_cli.moe.weak import WeakChoice


class ImageChoiceRouter(TokensChoiceDroplessRouter):
    """All tokens of an image take the k experts that its mean token likes best, with the same gates; class token and
    registers belong to the mean. Images have no part in each other's decisions. The auxiliary losses are over the
    decisions of `images_per_group` images, one for each.

    The options are those of `TokensChoiceDroplessRouter`.
    """

    official: ClassVar[str | None] = "sentence_gate"

    def flop(self, num_tokens: int) -> int:
        """The gate, once for an image: one product of d and e."""
        return 2 * len(self.gate.kernel) * self.num_experts

    weak_note = "decides for images and not for tokens, which could draw one each"

    def weak_limits(self) -> dict[str, int]:
        return {kind: most for kind, most in super().weak_limits().items() if kind != "random"}

    def weaker(self, how: Weak, given: Int[Tensor, "*some"] | None) -> WeakChoice:
        return WeakChoice(
            how, self.gate, self.balance, num_experts=self.num_experts, renormalise=self.renormalise,
            shared_experts=self.shared_experts, drawn=given, by_image=True,
        )  # fmt: skip

    def seen(
        self, x: Float[Tensor, "b n d"], keep: Bool[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b 1 d"], Bool[Tensor, "b 1"]]:
        return image_means(x, keep), keep.any(dim=1, keepdim=True)
