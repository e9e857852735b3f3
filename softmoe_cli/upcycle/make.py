"""A dense ViT becomes a mixture of experts: experts from its MLPs, a new router, and a receipt of what that changed.

Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints (Komatsuzaki et al., 2023, Section 3),
https://arxiv.org/abs/2212.05055: every expert starts as a copy of the MLP, the router afresh, all else is kept, for
vision models the optimizer's state too.
"""

import json
import math
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from softmoe_cli.config.commands import UpcycleConfig
from softmoe_cli.cost.flop import account_model, on_meta
from softmoe_cli.data import batches, sets
from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.evaluate.quality import classification_loss
from softmoe_cli.model.router import check_evaluated, router_class
from softmoe_cli.model.tasks import valid_answers
from softmoe_cli.model.vit import build, count_tokens, portable
from softmoe_cli.model.weights import LoadReport, load_weights
from softmoe_cli.moe.kind import Layer
from softmoe_cli.moe.layer import MoE, Stacked
from softmoe_cli.moe.routing import Router
from softmoe_cli.run.checkpoint import digest_of, write_checkpoint
from softmoe_cli.run.header import Source
from softmoe_cli.run.identity import origin
from softmoe_cli.run.receipt import RECEIPT, already_made, folder_of, make_whole
from softmoe_cli.run.source import read_moments
from softmoe_cli.terminal import Screen
from softmoe_cli.upcycle.settings import settings_of_upcycling, started

EXACT_MODEL = 1e-6
"""The largest allowed difference of a whole model in float64, as a share of its largest output, if the maths says that
nothing changes: weights that are multiplied by 3 or 1/7 are rounded to float32 again."""


def upcycle(config: UpcycleConfig, source: Source) -> dict[str, Any]:
    """Writes the checkpoint of the upcycled model and returns its receipt, with the folder it lies in.

    Raises:
        UsageError: a source, target or combination that cannot work; nothing was written.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    check_evaluated("images", config.images, config.model)
    splits = sets.load(config.data)
    splits.need("validation")
    classes = config.data.num_classes or len(splits.classes)
    targets = [str(each["_target_"]) for each in config.model.routers if each["_target_"] is not None]
    stacked = any(issubclass(router_class(target), Router) for target in targets)  # not all by themselves
    model = replace(config.model, expert_init="independent" if stacked else "identical")
    dense = replace(
        model, router={"_target_": None}, moe_blocks=[], blocks={}, expert_width=None, expert_init="identical"
    )
    without, planned = on_meta(dense, classes), on_meta(model, classes)
    costs = {"before": account_model(without, batch=None, recompute=False)}
    costs["after"] = account_model(planned, batch=None, recompute=False)
    _check(config, without, planned)
    model = started(config)
    moments = read_moments(source) if config.carry_optimizer else {}
    settings = settings_of_upcycling(config, carried=bool(moments))
    folder = folder_of("upcycled", config, model.name, source, settings)
    if (found := already_made(folder, source, settings)) is not None:
        Screen().say(f"{folder} holds this already; nothing to do")
        return found | {"folder": str(folder)}

    torch.manual_seed(config.seed)
    old = build(dense, classes)
    keep_head = source.classes == splits.classes and _head(source.weights) == old.head.weight.shape
    report = load_weights(old, source.weights, keep_head=keep_head, allow_unexpected=config.allow_unexpected)
    torch.manual_seed(config.seed)
    new = build(model, classes)
    keys = transplant(old, new, report, noise=config.expert_noise, redraw=config.expert_redraw)

    batch = batches.first_images(splits.validation, config.data, model, config.images)
    training = carried_moments(moments, new, keys)
    loss = source.card.get("loss", "softmax")
    changes = measure_both(old, new, batch, keep_head=keep_head, loss=loss, exact=config.preserve)
    weights = {key: value.contiguous() for key, value in new.state_dict().items()}
    receipt: dict[str, Any] = {"source": {"checkpoint": source.label, "digest": source.digest}, "settings": settings}
    receipt |= {"result": {"digest": digest_of(weights)}, "images": len(batch.labels), **changes}
    receipt |= {"cost": {when: cost.row for when, cost in costs.items()}, "keys": keys}
    receipt["unused"] = report.unexpected
    receipt["optimizer"] = _carried(training, new) if training else None
    card = {"model": portable(model, new), "data": config.data.on_card(), "classes": splits.classes, "loss": loss}
    card |= {
        "precision": source.card.get("precision", "fp32"),
        "receipt": receipt,
        "origin": origin("upcycle", settings, source),
        "train_pflop": source.train_pflop,
    }
    texts = {RECEIPT: json.dumps(receipt, indent=1) + "\n"}
    make_whole(folder, lambda temporary: write_checkpoint(temporary, weights, card, training, texts))
    return receipt | {"folder": str(folder)}


@torch.no_grad()
def transplant(
    old: VisionTransformer, new: VisionTransformer, report: LoadReport, *, noise: float, redraw: float
) -> dict[str, dict[str, str | None]]:
    """Fills `new` from `old` and returns its key map: for each weight where it is `from`, and `how`."""
    source, target = old.state_dict(), new.state_dict()
    fresh = set(report.new)
    resized = {line.split()[0] for line in report.resized}
    keys: dict[str, dict[str, str | None]] = {}
    for key, value in target.items():
        if key in source:
            value.copy_(source[key])
            how = "new" if key in fresh else "positions resampled" if key in resized else "copied"
            keys[key] = {"from": None if key in fresh else key, "how": how}
    for index, block in enumerate(new.blocks):
        place, mlp = f"blocks.{index}.mlp", old.blocks[index].mlp
        if isinstance(block.mlp, Layer):
            held = block.mlp.hold(*weights_of(mlp).values())
            if held is not None:
                for name in block.mlp.state_dict():
                    leaf, how = held.get(name, (None, "new"))
                    keys[f"{place}.{name}"] = {"from": None if leaf is None else f"{place}.{LAYERS[leaf]}", "how": how}
        if isinstance(block.mlp, MoE):
            moe = block.mlp
            parts = fill_experts(moe, mlp)
            tie_parts(moe.router, parts)
            if noise:
                for parameter in moe.experts.parameters():
                    parameter.add_(noise * parameter.std() * torch.randn_like(parameter))
            if redraw:
                redraw_units(moe.experts, redraw)
            for name in moe.state_dict():
                keys[f"{place}.{name}"] = _fate(place, name, moe, parts, noise, redraw)
    return keys


def fill_experts(moe: MoE, mlp: Mlp) -> int:
    """Experts, and shared ones, from a dense MLP; returns g, the parts that its hidden units are cut into.

    Expert i holds part i mod g of the hidden units: Upcycling Large Language Models into Mixture of Experts (He et al.,
    2024, Section 3.2), https://arxiv.org/abs/2410.07524. A sum of the g parts, each weighed 1/g (as gates that add up
    to one do), is the MLP again when the parts' output kernels are multiplied by g and their output bias is not. With
    s copies of the MLP as shared experts every copy counts 1/(1 + s).
    """
    hidden, (e, _, width) = mlp.fc1.out_features, moe.experts.w1.shape
    g = hidden // width
    copies = 1 + moe.router.shared_experts // g
    for leaf, whole in weights_of(mlp).items():
        value = whole if leaf in ("w1", "b1") else whole / copies
        moe.experts.get_parameter(leaf).copy_(stacked(leaf, value, e, g) * (g if leaf == "w2" else 1))
        if moe.shared is not None:
            times = copies - 1 if leaf == "b2" else 1
            moe.shared.get_parameter(leaf).copy_(side_by_side(leaf, value, copies - 1) * times)
    return g


LAYERS = {"w1": "fc1.weight", "b1": "fc1.bias", "w2": "fc2.weight", "b2": "fc2.bias"}
"""An expert's tensor -> the tensor of an MLP that it comes from."""


def weights_of(mlp: Mlp) -> dict[str, Tensor]:
    """An MLP's weights by the names of an expert's tensors, laid out as in the MLP; biases that it lacks are zero."""
    w1, w2 = mlp.fc1.weight, mlp.fc2.weight
    b1 = mlp.fc1.bias if mlp.fc1.bias is not None else w1.new_zeros(len(w1))
    b2 = mlp.fc2.bias if mlp.fc2.bias is not None else w2.new_zeros(len(w2))
    return {"w1": w1, "b1": b1, "w2": w2, "b2": b2}


def stacked(leaf: str, value: Tensor, experts: int, parts: int) -> Float[Tensor, "e ..."]:
    """A tensor of an MLP as its experts' tensor `leaf`: expert i has part i mod `parts` of the hidden units."""
    match leaf:
        case "w1":
            cut = value.T.unflatten(1, (parts, -1)).transpose(0, 1)
        case "b1":
            cut = value.unflatten(0, (parts, -1))
        case "w2":
            cut = value.T.unflatten(0, (parts, -1))
        case _:
            cut = value.expand(parts, -1)
    return cut[torch.arange(experts) % parts]


def side_by_side(leaf: str, value: Tensor, copies: int) -> Float[Tensor, "1 ..."]:
    """A tensor of an MLP as the tensor `leaf` of one expert with the hidden units of `copies` of it."""
    match leaf:
        case "w1":
            return value.T.repeat(1, copies)[None]
        case "b1":
            return value.repeat(copies)[None]
        case "w2":
            return value.T.repeat(copies, 1)[None]
        case _:
            return value[None]


def carried_moments(
    moments: dict[str, dict[str, Tensor]], new: VisionTransformer, keys: dict[str, dict[str, str | None]]
) -> dict[str, Tensor]:
    """AdamW's state for the parameters of `new` that come from parameters with a state, as `optimizer.NAME.KEY`. Each
    expert gets the state of the units that it was made from, unscaled: AdamW's step does not depend on a gradient's
    scale. Parameters that are new, resampled or drawn again have no state and start at zero, with a count of steps of
    their own."""
    carried: dict[str, Tensor] = {}
    for name, parameter in new.named_parameters():
        old_name, how = keys[name]["from"], keys[name]["how"] or ""
        if old_name is None or "resampled" in how or "redrawn" in how or "held" in how:
            continue
        place, _, leaf = name.rpartition(".")
        for key, value in moments.get(old_name, {}).items():
            if key != "step" and place.endswith(".experts"):
                value = stacked(leaf, value, len(parameter), value.numel() // parameter[0].numel())
            elif key != "step" and place.endswith(".shared"):
                value = side_by_side(leaf, value, parameter.numel() // value.numel())
            carried[f"optimizer.{name}.{key}"] = value.clone(memory_format=torch.contiguous_format)
    return carried


def tie_parts(router: Router, parts: int) -> None:
    """The g parts of one copy start with equal gates, so that a token that chooses one of them chooses all (He et al.,
    2024, Section 3.2: virtual groups)."""
    first = torch.arange(router.num_experts) // parts * parts
    parameters = dict(router.named_parameters())
    for name, axis in router.expert_axes.items():
        if name not in parameters:  # a layer that follows none may lack it
            continue
        experts = parameters[name].narrow(axis, 0, len(first))  # a router may have others behind those with an MLP
        experts.copy_(experts.index_select(axis, first))


def redraw_units(experts: Stacked, share: float) -> None:
    """Draws `share` of each expert's hidden units again, normal with mean and standard deviation of what they replace:
    Drop-Upcycling (Nakamura et al., 2025, Section 3), https://arxiv.org/abs/2502.19261."""
    width = experts.w1.shape[2]
    for w1, b1, w2 in zip(experts.w1, experts.b1, experts.w2, strict=True):
        units = torch.randperm(width)[: math.ceil(share * width)]
        for rows in (w1.T, b1, w2):
            dropped = rows[units]
            rows[units] = dropped.mean() + dropped.std(correction=0) * torch.randn_like(dropped)


@torch.no_grad()
def measure_both(
    old: VisionTransformer,
    new: VisionTransformer,
    batch: batches.Batch,
    *,
    keep_head: bool,
    loss: str,
    exact: bool,
) -> dict[str, Any]:
    """Both models' outputs on one batch: logits, or the features before a head that is new; and their losses.

    Raises:
        RunError: `exact`, and the outputs differ.
    """
    dtype = torch.float64 if exact else torch.float32

    def outputs(vit: VisionTransformer) -> Tensor:
        vit.eval().to(dtype)
        inputs = (batch.images.to(dtype), *batch.inputs[1:])
        out: Tensor = vit(*inputs) if keep_head else vit.forward_head(vit.forward_features(*inputs), pre_logits=True)
        vit.float()
        return out

    before, after = outputs(old), outputs(new)
    valid = valid_answers(new, batch.inputs) if keep_head else None
    told = [each if valid is None else each[valid] for each in (before, after)]
    change = (told[1] - told[0]).abs()
    if exact and not change.max().item() <= EXACT_MODEL * told[0].abs().max().item():
        raise RunError(f"preserve=true, but an output changes by {change.max().item():.2g}: an error of softmoe's")
    row = {"outputs": "logits" if keep_head else "features", "precision": str(dtype).removeprefix("torch.")}
    numbers: dict[str, float | None] = {"mean_size": told[0].abs().mean().item(), "mean_change": change.mean().item()}
    numbers |= {"max_change": change.max().item(), "loss_before": None, "loss_after": None}
    if keep_head:
        targets = F.one_hot(batch.labels, before.shape[1]).float()
        numbers["loss_before"] = classification_loss(before, targets, loss, valid).item()
        numbers["loss_after"] = classification_loss(after, targets, loss, valid).item()
    return row | numbers


def _head(weights: dict[str, Tensor]) -> torch.Size | None:
    return weights["head.weight"].shape if "head.weight" in weights else None


def _check(config: UpcycleConfig, old: VisionTransformer, new: VisionTransformer) -> None:
    """Refuses what cannot work before anything is allocated: `old` and `new` are on the meta device."""
    for before, after in zip(old.blocks, new.blocks, strict=True):
        if not isinstance(after.mlp, Layer):
            continue
        if not isinstance(after.mlp, MoE):
            _check_held(config, after.mlp)
            continue
        router, width, hidden = after.mlp.router, after.mlp.experts.w1.shape[2], before.mlp.fc1.out_features
        e, shared, parts, name = router.num_experts, router.shared_experts, hidden // width, config.model.router_name
        if hidden % width:
            raise UsageError(f"model.expert_width={width} does not divide the MLPs' {hidden} hidden units")
        if e % parts or shared % parts:
            raise UsageError(
                f"model.expert_width={width} cuts an MLP into {parts} parts: model.router.num_experts={e} and "
                f"shared_experts={shared} must be multiples of that"
            )
        if (
            router.needs_independent_experts
            and (e > parts or e == 1)
            and not (config.expert_noise or config.expert_redraw)
        ):
            raise UsageError(
                f"with model/router={name} experts that start equal stay equal; set expert_noise or expert_redraw"
            )
        reason = router.departs_from_mlp(count_tokens(new), parts) if config.preserve else None
        if reason is not None:
            raise UsageError(f"preserve=true cannot hold with model/router={name}: {reason}")


def _check_held(config: UpcycleConfig, layer: Layer) -> None:
    """Refuses what a layer whose experts are no MLPs cannot take over."""
    name = config.model.router_name
    for key in ("expert_noise", "expert_redraw"):
        if getattr(config, key):
            raise UsageError(f"{key}={getattr(config, key)}: experts of model/router={name} are no copies; leave it 0")
    if config.model.expert_width is not None:
        raise UsageError(f"model.expert_width={config.model.expert_width}: model/router={name} cuts no MLP; say null")
    reason = layer.router.departs_from_mlp(1, parts=1)
    if reason is not None:
        raise UsageError(f"model/router={name} cannot start from an MLP: {reason}")


def _fate(place: str, name: str, moe: MoE, parts: int, noise: float, redraw: float) -> dict[str, str | None]:
    part, _, leaf = name.partition(".")
    if part == "router":
        return {"from": None, "how": f"new, equal for the {parts} parts of a copy" if parts > 1 else "new"}
    copies = 1 + moe.router.shared_experts // parts
    if part == "shared":
        steps, factor = [f"{copies - 1} side by side"], {"w2": 1 / copies, "b2": 1 - 1 / copies}.get(leaf, 1)
    else:
        steps, factor = (
            [f"{moe.router.num_experts // parts} copies"],
            {"w2": parts / copies, "b2": 1 / copies}.get(leaf, 1),
        )
        if parts > 1 and leaf != "b2":
            steps.append(f"in {parts} parts")
        if noise > 0:
            steps.append(f"noise {noise:g}")
        if redraw > 0 and leaf != "b2":
            steps.append(f"{redraw:g} of the units redrawn")
    if leaf in ("w1", "w2"):
        steps.append("transposed")
    if factor != 1:
        steps.append(f"times {factor:g}")
    return {"from": f"{place}.{LAYERS[leaf]}", "how": ", ".join(steps)}


def _carried(training: dict[str, Tensor], new: VisionTransformer) -> dict[str, Any]:
    """What a receipt says of moments, and the digest by which finetuning recognises them."""
    fresh = [name for name, _ in new.named_parameters() if f"optimizer.{name}.step" not in training]
    steps = max(int(value) for key, value in training.items() if key.endswith(".step"))
    tensors = sum(key.endswith(".step") for key in training)
    return {"tensors": tensors, "steps": steps, "fresh": fresh, "digest": digest_of(training)}
