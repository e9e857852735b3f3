"""Self-contrast: two passes of one model, whose logits are extrapolated from the weak one through the strong one.

Unchosen Experts Can Contribute Too (Shi et al., 2024), https://arxiv.org/abs/2405.14507, equations 5 and 6, and its
code (DavidFanzz/SCMoE). There a token of text is chosen among a vocabulary; here an image's class among the classes.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from softmoe_cli.cost.flop import account_model, block_flop, head_flop
from softmoe_cli.errors import UsageError
from softmoe_cli.model.vit import count_tokens
from softmoe_cli.moe.kind import Layer, Weak
from softmoe_cli.moe.layer import MoE
from softmoe_cli.moe.weak import WeakChoice, weak_layer


def contrasted(
    strong: Float[Tensor, "b c"], weak: Float[Tensor, "b c"], *, alpha: float, beta: float
) -> tuple[Float[Tensor, "b c"], Bool[Tensor, "b c"]]:
    """(1 + beta) strong - beta weak, float32 or better, and which classes are valid: those that the strong pass gives
    at least alpha times its largest probability. The others get -inf. alpha=0: all are valid, which the paper does not
    have."""
    strong, weak = (each.to(torch.promote_types(each.dtype, torch.float32)) for each in (strong, weak))
    cutoff = strong.amax(dim=1, keepdim=True) + (float(np.log(alpha)) if alpha else -torch.inf)
    valid = strong >= cutoff
    # Filled after the arithmetic, in which -inf times 0 would be no number.
    return ((1 + beta) * strong - beta * weak).masked_fill(~valid, -torch.inf), valid


def ranking(
    logits: Float[Tensor, "b c"], valid: Bool[Tensor, "b c"], strong: Float[Tensor, "b c"]
) -> Float[Tensor, "b c"]:
    """Numbers that rank valid classes by their contrasted logits and, behind them, the others by the strong ones."""
    last = logits.masked_fill(~valid, torch.inf).amin(dim=1, keepdim=True)
    return torch.where(valid, logits, strong.to(logits.dtype) - strong.amax(dim=1, keepdim=True) + last - 1)


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact test (1947) of two classifiers on the same images: the chance of so uneven a split of the images
    that only one of them gets right, were both as good; two-sided."""
    from scipy.special import bdtr  # here, so that an evaluation without contrasts need not import scipy

    return min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5)))


WORD = re.compile(r"(rank|random|top|drop|slot_rank)_(\d{1,6})|(flat|skip)")
WEAK_FORMS = {
    "rank": "rank_R", "random": "random_1", "top": "top_J", "drop": "drop_Q", "slot_rank": "slot_rank_R",
    "flat": "flat", "skip": "skip",
}  # fmt: skip
OUR_OWN = ("drop", "slot_rank", "flat", "skip")
"""Kinds that the paper has not."""


def weak_named(word: str) -> Weak:
    """The weak activation that a word names.

    Raises:
        UsageError: it names none.
    """
    found = WORD.fullmatch(word)
    if found is None:
        raise UsageError(
            f"contrast={word} is none of {', '.join(WEAK_FORMS.values())}, with a number for the capital letter"
        )
    return Weak(found[3]) if found[3] else Weak(found[1], int(found[2]))


def check_weak(model: VisionTransformer, words: Sequence[str], name: str) -> None:
    """Checks that every layer of a model has these weak activations. `name`: the router's.

    Raises:
        UsageError: one of them means nothing for a layer.
    """
    layers = _layers(model)
    for word in words:
        how = weak_named(word)
        if not layers:
            raise UsageError(f"contrast={word}: {name} has no experts, so that nothing could be routed otherwise")
        for layer in layers.values():
            limits, name = layer.router.weak_limits(), type(layer.router).__module__.rpartition(".")[2]
            forms = ", ".join(WEAK_FORMS[kind] for kind in limits)
            if how.kind not in limits:
                also = f"; it has {forms}" if limits else ""
                raise UsageError(f"contrast={word}: {name} {layer.router.weak_note}{also}")
            most = limits[how.kind]
            if most and not 1 <= how.number <= most:
                count = layer.router.num_experts
                raise UsageError(
                    f"contrast={word}: {name} of this checkpoint, with {count} experts, has {how.kind}_N for N from 1 "
                    f"to {most}"
                )


def _layers(model: VisionTransformer) -> dict[int, Layer]:
    return {i: block.mlp for i, block in enumerate(model.blocks) if isinstance(block.mlp, Layer)}


@torch.no_grad()
def strong_pass(model: VisionTransformer, x: Float[Tensor, "b c s s"]) -> tuple[Float[Tensor, "b o"], Tensor]:
    """A model's logits, and the tokens that enter its first MoE block: what lies before is the same for every weak
    pass."""
    entering: list[Tensor] = []
    first = model.blocks[min(_layers(model))]
    with first.register_forward_pre_hook(lambda _block, inputs: entering.append(inputs[0])):
        logits: Tensor = model(x)
    return logits, entering[0]


@dataclass(frozen=True)
class WeakPass:
    """The blocks of a model from its first MoE block on, with weak layers; weights are the model's own.

    Args:
        draw: number of the draw, and `seed` what it is drawn from, of random_1.
        kept: for drop_Q, each block's experts by importance, the most important first.
    """

    model: VisionTransformer
    how: Weak
    renormalise: bool = False
    seed: int = 0
    draw: int = 0
    kept: Mapping[int, Int64[Tensor, " e"]] | None = None

    @torch.no_grad()
    def __call__(self, entering: Float[Tensor, "b n d"], first_image: int) -> Float[Tensor, "b o"]:
        """Logits of images from the number `first_image` on, of the tokens that enter the first MoE block."""
        x, start = entering, min(_layers(self.model))
        for index, block in enumerate(self.model.blocks[start:], start=start):
            x = block(x) if index not in _layers(self.model) else self.block(index, x, first_image)(x)
        logits: Tensor = self.model.forward_head(self.model.norm(x))
        return logits

    def block(self, index: int, x: Tensor, first_image: int) -> nn.Module:
        """A block with its layer made weak; all its other parts are the model's."""
        whole = self.model.blocks[index]
        weak = copy.copy(whole)
        weak._modules = dict(whole._modules)
        weak._modules["mlp"] = self.layer(index, x, first_image)
        return weak

    def layer(self, index: int, x: Tensor, first_image: int) -> nn.Module:
        layer = self.model.blocks[index].mlp
        if self.how.kind == "random":
            given: Tensor | None = self._drawn(index, x, first_image)
        elif self.how.kind == "drop":
            assert self.kept is not None
            given = self.kept[index][: self.how.number].sort().values.to(x.device)
        else:
            given = None
        made = weak_layer(layer, self.how, given)
        if self.renormalise and isinstance(made, MoE) and isinstance(made.router, WeakChoice):
            made.router.renormalise = True
        return made

    def _drawn(self, index: int, x: Tensor, first_image: int) -> Int64[Tensor, "b n"]:
        """An expert for each token. An image has the same whatever images it is beside."""
        experts, tokens = self.model.blocks[index].mlp.router.num_experts, x.shape[1]
        rows = [
            np.random.default_rng((self.seed, self.draw, image, index)).integers(experts, size=tokens)
            for image in range(first_image, first_image + len(x))
        ]
        return torch.tensor(np.stack(rows), device=x.device)

    def flop(self) -> int:
        """FLOPs per image of this pass, which begins at the first MoE block."""
        n = count_tokens(self.model)
        tokens = torch.empty(1, n, self.model.embed_dim, device=self.model.pos_embed.device)

        def of_layer(index: int) -> int:
            made = self.layer(index, tokens, 0)
            return made.flop(n) if isinstance(made, MoE) else 0

        return suffix_flop(self.model, of_layer)


def suffix_flop(model: VisionTransformer, of_layer: Callable[[int], int]) -> int:
    """FLOPs per image of a model from its first MoE block on, with those of its layers by block as given."""
    n, layers = count_tokens(model), _layers(model)
    total = head_flop(model)
    for index, block in enumerate(model.blocks):
        if index >= min(layers):
            total += sum(block_flop(block, n).values())
            if index in layers:
                total += of_layer(index) - layers[index].flop(n)
    return total


def flop_ratios(
    model: VisionTransformer, both: Mapping[str, WeakPass], alone: Mapping[str, WeakPass]
) -> dict[str, float]:
    """FLOPs over those of the strong pass: of `both`, a strong and a weak pass that share what lies before the first
    MoE block, and of weak passes `alone`."""
    strong = account_model(model, batch=None, recompute=False).forward_flop
    before = strong - suffix_flop(model, lambda index: model.blocks[index].mlp.flop(count_tokens(model)))
    ratios = {word: (before + passed.flop()) / strong for word, passed in alone.items()}
    return ratios | {word: (strong + passed.flop()) / strong for word, passed in both.items()}
