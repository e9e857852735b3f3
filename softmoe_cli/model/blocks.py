"""Blocks that hand on more than tokens: what one layer needs of an earlier one travels with the forward pass."""

from timm.models.vision_transformer import Block
from torch import Tensor

from softmoe_cli.moe.layer import MoE
from softmoe_cli.moe.routing import Carried


class CarryingBlock(Block):
    """timm's block, with `Carried` beside the tokens on its way in and out.

    The first of a run of such blocks takes tokens alone and the last returns tokens alone, so that the model around
    them is timm's. What is carried is an argument and a result: recomputation, compilation, divided weights and
    exported programs treat it as they treat the tokens, and no module remembers it.

    Args:
        block: whose parts it takes over, under their names.
        first, last: of the run.
    """

    def __init__(self, block: Block, *, first: bool, last: bool) -> None:
        super(Block, self).__init__()
        for name, part in block.named_children():
            self.add_module(name, part)
        self.first, self.last, self.carries = first, last, True

    def forward(
        self, x: Tensor | tuple[Tensor, Carried], attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor | tuple[Tensor, Carried]:
        tokens, carried = (x, Carried()) if isinstance(x, Tensor) else x
        inner = self.norm1(tokens)
        made = self.drop_path1(self.ls1(self.attn(inner, attn_mask=attn_mask, is_causal=is_causal)))
        tokens = tokens + self.added("attn", inner, made)
        inner = self.norm2(tokens)
        if self.carries and isinstance(self.mlp, MoE):
            made, carried = self.mlp(inner, None, carried)
        else:
            made = self.mlp(inner)
        tokens = tokens + self.added("mlp", inner, self.drop_path2(self.ls2(made)))
        return tokens if self.last else (tokens, carried)

    def added(self, sublayer: str, read: Tensor, made: Tensor) -> Tensor:
        """What is added to the tokens, of what a sublayer (`attn`, `mlp`) has `made` of what it has `read`."""
        return made


def tokens_of(passed: Tensor | tuple[Tensor, Carried]) -> Tensor:
    """The tokens of what blocks take and return."""
    return passed if isinstance(passed, Tensor) else passed[0]
