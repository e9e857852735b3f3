"""Official names and layouts to ours, and what the shapes of the weights say of the model.

Flax keeps kernels as (in, out) and heads as axes of their own, (width, heads, head width); timm keeps (out, in), with
queries, keys and values in one. Two families are known: vmoe's VisionTransformerMoe (`Encoder`), and the ViTs of
big_vision and vision_transformer (`Transformer`), whose older names differ in their numbers.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from softmoe_cli.vmoe.arrays import Fault

K = TypeVar("K")


@dataclass(frozen=True)
class Mixture:
    """What the weights of an MoE block say: `slots` per expert of the soft router; None of one that is sparse."""

    experts: int
    slots: int | None


@dataclass(frozen=True)
class Shapes:
    """What the weights say of their model. `side`: patches on a side of an image; None where positions are computed,
    not learned. `mixtures`: the MoE blocks. `classes`: outputs of the head; None without one."""

    patch: int
    channels: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    expert_width: int | None
    class_token: bool
    pre_logits: bool
    qk_norm: bool
    side: int | None
    mixtures: dict[int, Mixture]
    classes: int | None


class _Taker:
    """Hands out official weights once each, so that one that nobody asked for is noticed."""

    def __init__(self, named: dict[str, Tensor]) -> None:
        self.left = dict(named)

    def take(self, name: str, *shape: int | None) -> Tensor:
        """The weight of a name, which must have these sides; None: any."""
        if name not in self.left:
            raise Fault(f"it lacks {name}")
        value = self.left.pop(name)
        if len(shape) != value.ndim or any(
            want not in (None, side) for want, side in zip(shape, value.shape, strict=True)
        ):
            wanted = ", ".join("any" if side is None else str(side) for side in shape)
            raise Fault(f"{name} is {tuple(value.shape)}, where ({wanted}) belongs")
        return value

    def has(self, place: str) -> bool:
        return place in self.left or any(name.startswith(f"{place}/") for name in self.left)

    def numbered(self, place: str, kind: str) -> list[str]:
        """The places `kind` and `kind_N` inside a place, in the order of N."""
        found = {
            match[0]: int(match[1] or 0) for name in self.left if (match := re.match(_NUMBERED % (place, kind), name))
        }
        return sorted(found, key=lambda each: found[each])


_NUMBERED = r"%s/%s(?:_(\d+))?(?=/)"


def translated(named: dict[str, Tensor]) -> tuple[dict[str, Tensor], Shapes]:
    """Weights under the names and in the layouts of our models, and what their shapes say.

    Raises:
        Fault: something is missing, of another shape, or known to no model here.
    """
    given = _Taker(_one_block_each(named))
    encoder = "Encoder" if given.has("Encoder") else "Transformer"
    patches = given.take("embedding/kernel", None, None, None, None)
    patch, other, channels, width = patches.shape
    if patch != other:
        raise Fault(f"its patches are {patch} by {other} pixels, and only square ones are known")
    weights = {
        "patch_embed.proj.weight": patches.permute(3, 2, 0, 1),
        "patch_embed.proj.bias": given.take("embedding/bias", width),
    }
    side = _positions(given, encoder, width, weights)
    depth = len({match[1] for name in given.left if (match := re.match(rf"{encoder}/encoderblock_(\d+)/", name))})
    if not depth:
        raise Fault(f"it lacks {encoder}/encoderblock_0")
    blocks = [_block(given, f"{encoder}/encoderblock_{i}", f"blocks.{i}", width, weights) for i in range(depth)]
    weights["norm.weight"] = given.take(f"{encoder}/encoder_norm/scale", width)
    weights["norm.bias"] = given.take(f"{encoder}/encoder_norm/bias", width)
    pre_logits = given.has("pre_logits")
    if pre_logits:
        weights |= _dense(given, "pre_logits", "fc_norm.pre_logits", width, width)
    classes = None
    if given.has("head"):
        weights |= _dense(given, "head", "head", width, None)
        classes = len(weights["head.weight"])
    _refuse_left(given)
    dense = {block.hidden for block in blocks if block.mixture is None}
    experts = {block.hidden for block in blocks if block.mixture is not None}
    wide = _same(dense or experts, "MLPs of several widths")
    expert_width = _same(experts, "experts of several widths") if experts else wide
    return {name: value.contiguous() for name, value in weights.items()}, Shapes(
        patch=patch,
        channels=channels,
        width=width,
        depth=depth,
        heads=_same({block.heads for block in blocks}, "blocks with several numbers of heads"),
        mlp_width=wide,
        expert_width=None if expert_width == wide else expert_width,
        class_token="cls_token" in weights,
        pre_logits=pre_logits,
        qk_norm=_same({block.qk_norm for block in blocks}, "blocks with and without norms on queries"),
        side=side,
        mixtures={i: block.mixture for i, block in enumerate(blocks) if block.mixture is not None},
        classes=classes,
    )


def _same(values: set[K], what: str) -> K:
    if len(values) != 1:
        raise Fault(f"it has {what}, and models here have one for all")
    return next(iter(values))


def _one_block_each(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Blocks that big_vision's `scan` has put on top of each other, taken apart."""
    apart: dict[str, Tensor] = {}
    for name, value in named.items():
        place, stacked, rest = name.partition("/encoderblock/")
        if stacked and not value.ndim:
            raise Fault(f"{name} is a single number, where blocks on top of each other belong")
        if stacked:
            apart |= {f"{place}/encoderblock_{i}/{rest}": each for i, each in enumerate(value)}
        else:
            apart[name] = value
    return apart


def _positions(given: _Taker, encoder: str, width: int, weights: dict[str, Tensor]) -> int | None:
    """Class token and position table. Where the token was put before the patches after these had got their positions
    (big_vision), its own position is zero. Returns the patches on a side, or None without a table."""
    if given.has("cls"):
        weights["cls_token"] = given.take("cls", 1, 1, width)
    places = ["pos_embedding", f"{encoder}/pos_embedding", f"{encoder}/posembed_input/pos_embedding"]
    place = next((each for each in places if each in given.left), None)
    if place is None:
        if encoder == "Encoder":
            raise Fault(
                "it has no table of positions, and does not say whether they are computed (sincos2d) or there are none"
            )
        return None
    table = given.take(place, 1, None, width)
    tokens, token = table.shape[1], "cls_token" in weights
    if token and math.isqrt(tokens) ** 2 == tokens:
        table = torch.cat([torch.zeros(1, 1, width), table], dim=1)
        tokens += 1
    side = math.isqrt(tokens - token)
    if side**2 != tokens - token:
        raise Fault(f"its table has {table.shape[1]} positions, which is no square grid{' and a class token' * token}")
    weights["pos_embed"] = table
    return side


@dataclass(frozen=True)
class _Block:
    heads: int
    qk_norm: bool
    hidden: int
    mixture: Mixture | None


def _block(given: _Taker, there: str, here: str, width: int, weights: dict[str, Tensor]) -> _Block:
    norms = given.numbered(there, "LayerNorm")
    if len(norms) != 2:
        raise Fault(f"{there} has {len(norms)} norms, where a block before whose layers norms stand has 2")
    for number, place in enumerate(norms, 1):
        weights[f"{here}.norm{number}.weight"] = given.take(f"{place}/scale", width)
        weights[f"{here}.norm{number}.bias"] = given.take(f"{place}/bias", width)
    heads, normed = _attention(given, there, here, width, weights)
    if given.has(f"{there}/Moe"):
        return _Block(heads, normed, *_mixture(given, f"{there}/Moe", f"{here}.mlp", width, weights))
    place = next(iter(given.numbered(there, "Mlp") + given.numbered(there, "MlpBlock")), f"{there}/Mlp")
    weights |= _dense(given, f"{place}/Dense_0", f"{here}.mlp.fc1", width, None)
    hidden = len(weights[f"{here}.mlp.fc1.bias"])
    weights |= _dense(given, f"{place}/Dense_1", f"{here}.mlp.fc2", hidden, width)
    return _Block(heads, normed, hidden, None)


def _attention(given: _Taker, there: str, here: str, width: int, weights: dict[str, Tensor]) -> tuple[int, bool]:
    """Queries, keys and values one below the other. Returns heads, and whether queries and keys have norms."""
    named = given.numbered(there, "SelfAttention") + given.numbered(there, "MultiHeadDotProductAttention")
    place = named[0] if named else f"{there}/SelfAttention"
    kernels, biases, heads, inner = [], [], 0, 0
    for part in ("query", "key", "value"):
        kernel = given.take(f"{place}/{part}/kernel", width, heads or None, inner or None)
        heads, inner = kernel.shape[1:]
        kernels.append(kernel.reshape(width, -1).mT)
        biases.append(given.take(f"{place}/{part}/bias", heads, inner).flatten())
    if heads * inner != width:
        raise Fault(f"{place} has {heads} heads of width {inner}, which are not {width} in all")
    weights[f"{here}.attn.qkv.weight"], weights[f"{here}.attn.qkv.bias"] = torch.cat(kernels), torch.cat(biases)
    out = given.take(f"{place}/out/kernel", heads, inner, width)
    weights[f"{here}.attn.proj.weight"] = out.reshape(width, width).mT
    weights[f"{here}.attn.proj.bias"] = given.take(f"{place}/out/bias", width)
    normed = given.has(f"{place}/query_ln")
    if normed:
        weights[f"{here}.attn.q_norm.weight"] = given.take(f"{place}/query_ln/scale", inner)
        weights[f"{here}.attn.k_norm.weight"] = given.take(f"{place}/key_ln/scale", inner)
    return heads, normed


def _mixture(given: _Taker, there: str, here: str, width: int, weights: dict[str, Tensor]) -> tuple[int, Mixture]:
    """A router and its experts, whose stacked weights have the same layout as ours."""
    w1 = given.take(f"{there}/Mlp/Dense_0/kernel", None, width, None)
    experts, _, hidden = w1.shape
    weights |= {
        f"{here}.experts.w1": w1,
        f"{here}.experts.b1": given.take(f"{there}/Mlp/Dense_0/bias", experts, hidden),
        f"{here}.experts.w2": given.take(f"{there}/Mlp/Dense_1/kernel", experts, hidden, width),
        f"{here}.experts.b2": given.take(f"{there}/Mlp/Dense_1/bias", experts, width),
    }
    if given.has(f"{there}/Router/mu"):
        slots = given.take(f"{there}/Router/mu", width, experts, None)
        weights |= {f"{here}.router.phi": slots, f"{here}.router.scale": given.take(f"{there}/Router/scale")}
        return hidden, Mixture(experts, slots.shape[2])
    kernel = given.left.get(f"{there}/Router/dense/kernel")
    if kernel is not None and kernel.ndim == 3:
        raise Fault(f"{there}/Router is of an ensemble (E3), each of whose members has its own experts")
    weights[f"{here}.router.gate.kernel"] = given.take(f"{there}/Router/dense/kernel", width, experts)
    return hidden, Mixture(experts, None)


def _dense(given: _Taker, there: str, here: str, inputs: int, outputs: int | None) -> dict[str, Tensor]:
    kernel = given.take(f"{there}/kernel", inputs, outputs)
    return {f"{here}.weight": kernel.mT, f"{here}.bias": given.take(f"{there}/bias", kernel.shape[1])}


def _refuse_left(given: _Taker) -> None:
    """Raises Fault about weights that no model here has."""
    if not given.left:
        return
    first = [name for name in given.left if re.match(r"MapHead|MAPHead|probe", name)]
    if first:
        raise Fault(f"it pools its tokens with attention ({first[0]}), which no model here does")
    if any(name.startswith("conv_root") or "/block1/" in name for name in given.left):
        raise Fault("its patches come out of a ResNet, which no model here has")
    kinds = Counter(re.sub(r"encoderblock_\d+", "encoderblock_*", name) for name in given.left)
    shown = ", ".join(list(kinds)[:3]) + (", …" if len(kinds) > 3 else "")
    raise Fault(f"it has {len(given.left)} weights that no model here has: {shown}")
