"""A checkpoint as a folder that timm, torch.export, ONNX and the Hugging Face hub understand.

Every file is read back as its users read it and compared with the model on images.
"""

import io
import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from softmoe_cli.config.adapter import no_adapter
from softmoe_cli.config.commands import ExportConfig
from softmoe_cli.config.model import Model
from softmoe_cli.data import batches, sets
from softmoe_cli.errors import RunError, UsageError, first_line
from softmoe_cli.export.settings import settings_of_export, timm_pixels
from softmoe_cli.model.adapted import merged
from softmoe_cli.model.hub import softmoe_vit
from softmoe_cli.model.router import check_evaluated, evaluation_group
from softmoe_cli.model.vit import build
from softmoe_cli.model.weights import experts_left, load_weights
from softmoe_cli.run.card import CARD_FORMAT
from softmoe_cli.run.header import Source
from softmoe_cli.run.receipt import RECEIPT, already_made, folder_of, make_whole
from softmoe_cli.run.sealed import WEIGHTS, seal
from softmoe_cli.terminal import Screen

TOLERANCE = 1e-4
"""Largest difference of an output, as a share of the largest output where that is above 1."""
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
Program = Callable[[Tensor], Tensor]
"""Images (b c s s) to logits (b classes)."""


def export(config: ExportConfig, model: Model, source: Source) -> dict[str, Any]:
    """Writes the folder, pushes it where that was asked for, and returns its receipt with the folder it lies in.

    Raises:
        UsageError: a checkpoint, router or format that cannot work; nothing was written.
        RunError: outputs that differ, and nothing was written; or a push that failed.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    check_evaluated("images", config.images, model)
    if model.tasks:
        raise UsageError(
            f"checkpoint={source.label} must be told each image's task, of {', '.join(model.tasks)}; export one of "
            f"them: softmoe extract checkpoint={source.label} task=NAME"
        )
    if "head.weight" not in source.weights:
        raise UsageError(f"checkpoint={source.label} has no head; softmoe finetune gives it one")
    if experts_left(source.weights):
        raise UsageError(
            f"checkpoint={source.label} still holds the experts that were pruned; make the smaller model first: "
            f"softmoe prune checkpoint={source.label}"
        )
    if "name" not in source.card["data"]:  # official weights, which know no images
        source = replace(source, card=source.card | {"format": CARD_FORMAT, "data": config.data.on_card()})
    if config.push is not None:
        _check_name(config.push)
    lacking = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if "onnx" in config.formats and lacking:
        raise UsageError(f"formats=onnx needs {lacking[0]}, which is not installed: pip install 'softmoe-cli[onnx]'")
    settings = settings_of_export(config, model, source)
    folder = folder_of("exported", config, model.name, source, settings)
    receipt = already_made(folder, source, settings)
    if receipt is None:
        receipt = {"source": {"checkpoint": source.label, "digest": source.digest}, "settings": settings}
        make_whole(folder, partial(_fill, config, model, source, receipt))
    else:
        Screen().say(f"{folder} holds this already" + ("; nothing to do" if config.push is None else ""))
    if config.push is not None:
        receipt["pushed"] = push(folder, config.push)
    return receipt | {"folder": str(folder)}


def _fill(config: ExportConfig, model: Model, source: Source, receipt: dict[str, Any], folder: Path) -> None:
    """Makes the folder and completes its receipt."""
    trained = _built(model, source.weights)
    model, weights, card = whole(model, source)
    vit = _built(model, weights)
    splits = sets.load(config.data)
    splits.need("validation")
    images = batches.first_images(splits.validation, config.data, model, config.images).images
    group = evaluation_group(model)
    batch = None if group == 1 else group
    if config.formats:  # a program takes whole groups, and there may be fewer images than were asked for
        images = images[: len(images) // group * group]
        if not len(images):
            raise UsageError(
                f"formats={','.join(config.formats)}: data={config.data.name} has fewer validation images than one "
                f"group of model.router.images_per_group={group}, with which a program is compared; leave formats=[]"
            )

    folder.mkdir(parents=True)
    save_file(weights, folder / WEIGHTS, metadata={"softmoe": json.dumps(card)})
    (folder / "config.json").write_text(json.dumps(hub_config(model, vit, card), indent=1) + "\n")
    (folder / "README.md").write_text(_readme(model, card, config.formats))
    programs: dict[str, Program] = {"timm": timm.create_model(f"local-dir:{folder}", pretrained=True).eval()}
    if config.formats:
        graph = trace(vit, torch.zeros(batch or 2, *images.shape[1:]), batch, model.router_name)
        makers = {"torch_export": write_torch_export, "onnx": write_onnx}
        programs |= {name: makers[name](graph, folder, model.router_name) for name in sorted(set(config.formats))}
    with torch.no_grad():
        expected = trained(images)
        differences = {name: distance(name, program, images, expected, batch) for name, program in programs.items()}
    packages = ("torch", "timm", *(ONNX_PACKAGES if "onnx" in config.formats else ()))
    receipt |= {"images": len(images), "images_at_a_time": batch or "any", "programs": differences}
    receipt |= {"largest_output": expected.abs().max().item(), "versions": {name: version(name) for name in packages}}
    (folder / RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n")
    seal(folder)


def _built(model: Model, weights: dict[str, Tensor]) -> VisionTransformer:
    vit = build(model, weights["head.weight"].shape[0]).eval()
    load_weights(vit, weights, keep_head=True, allow_unexpected=[])
    return vit


def whole(model: Model, source: Source) -> tuple[Model, dict[str, Tensor], dict[str, Any]]:
    """The model that a folder holds, with its weights and its card: LoRA's matrices are added to those that they stand
    beside, other adapters stay in the model, and nothing is left of a delta."""
    card = {key: value for key, value in source.card.items() if key != "base"}
    if model.adapter.name != "lora":
        return model, source.weights, card
    assert model.adapter.alpha is not None
    bare = replace(model, adapter=no_adapter())
    card["model"] = card["model"] | {"adapter": asdict(bare.adapter)}
    return bare, merged(source.weights, model.adapter.alpha), card


def distance(
    name: str, program: Program, images: Tensor, expected: Float[Tensor, "b k"], batch: int | None
) -> dict[str, float]:
    """How far a program's outputs are from `expected`: all images at once, and the first one alone, or `batch` at a
    time.

    Raises:
        RunError: further than `TOLERANCE`, or not finite.
    """
    parts = [images, images[:1]] if batch is None else list(images.split(batch))
    got = torch.cat([program(part) for part in parts])
    want = expected if batch is not None else torch.cat([expected, expected[:1]])
    off = (got - want).abs().amax(dim=1)
    limit = TOLERANCE * max(1.0, expected.abs().max().item())
    if not off.max().item() <= limit:
        raise RunError(
            f"formats={name}: outputs are off by {off.max().item():.2g} where {limit:.2g} is allowed, on "
            f"{int((~(off <= limit)).sum())} of {len(off)} images; nothing was written"
        )
    same = (got.argmax(dim=1) == want.argmax(dim=1))[: len(images)]
    return {"max_difference": off.max().item(), "same_top1": int(same.sum())}


def trace(model: nn.Module, example: Tensor, batch: int | None, router: str) -> ExportedProgram:
    """The model as a graph, for any number of images unless `batch` says how many there must be.

    Raises:
        UsageError: a router that torch.export cannot follow.
    """
    free = {0: Dim("batch", min=1)} if batch is None else {}
    try:
        return torch.export.export(model, (example,), dynamic_shapes=(free,))
    except RuntimeError as error:  # torch.export's own errors all are
        raise UsageError(
            f"torch.export cannot follow router {router} ({first_line(error)}); leave formats=[]"
        ) from error


def write_torch_export(graph: ExportedProgram, folder: Path, router: str) -> Program:
    path, made = folder / "model.pt2", io.BytesIO()
    torch.export.save(graph, made)  # written to a full disk, torch's own file would end the process
    path.write_bytes(made.getbuffer())
    program: Program = torch.export.load(path).module()
    return program


def write_onnx(graph: ExportedProgram, folder: Path, router: str) -> Program:
    """Writes model.onnx, in opset 20, and returns it as a program of ONNX Runtime on the CPU.

    Raises:
        UsageError: a router with an operator that ONNX lacks.
    """
    import onnxruntime
    from onnxscript import opset20 as onnx

    def stable_sort(x: Any, stable: bool, dim: int = -1, descending: bool = False) -> Any:
        # TopK puts the lower index first among equals, which is what makes a sort stable.
        size = onnx.Gather(onnx.Shape(x), onnx.Constant(value_ints=[dim]))
        return onnx.TopK(x, size, axis=dim, largest=int(descending), sorted=1)

    try:
        program = torch.onnx.export(
            graph,
            input_names=["images"],
            output_names=["logits"],
            opset_version=20,
            custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        missing = re.search(r"OpOverload\(op='([\w.]+)'", str(error))
        raise UsageError(
            f"formats=onnx: ONNX has no operator for {missing[1] if missing else 'a part'} of router {router}; "
            "leave onnx out of formats"
        ) from error
    assert program is not None
    program.save(folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def hub_config(model: Model, vit: VisionTransformer, card: dict[str, Any]) -> dict[str, Any]:
    """config.json in timm's form: a dense timm model under timm's name, any other model as `softmoe_vit`."""
    timms = _is_timms(model)
    return {
        "architecture": str(model.backbone.timm).split(".")[0] if timms else softmoe_vit.__name__,
        "num_classes": vit.num_classes,
        "num_features": vit.num_features,
        "global_pool": vit.global_pool,
        "label_names": card["classes"],
        "model_args": {} if timms else {"softmoe": card["model"]},
        "pretrained_cfg": {
            "input_size": [model.in_chans, model.image_size, model.image_size],
            "fixed_input_size": True,
            **timm_pixels(model, card),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _readme(model: Model, card: dict[str, Any], formats: list[str]) -> str:
    """The page that the hub shows."""
    needs = "" if _is_timms(model) else ", softmoe_cli.model.hub"
    files = {"torch_export": "`model.pt2` (torch.export)", "onnx": "`model.onnx`"}
    also = f"\nThe same as a program: {', '.join(files[name] for name in formats)}.\n" if formats else ""
    return f"""---
library_name: timm
tags: [image-classification, softmoe]
---
# {model.name}, {"official weights" if card.get("unnamed") else f"trained on {card['data']['name']}"}

{len(card["classes"])} classes, images of {model.image_size} pixels in {model.in_chans} channels. Exported by softmoe;
`receipt.json` says from what, and how far outputs are from the trained model's.

```python
import timm{needs}
model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```
{also}"""


def _is_timms(model: Model) -> bool:
    unchanged = not model.mixture and model.adapter.name == "none" and model.head == "linear"
    return model.backbone.timm is not None and unchanged


def _check_name(push: str) -> None:
    """Raises UsageError unless `push` is of the form OWNER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(push)
        fault = "" if "/" in push else "it has no owner"
    except HFValidationError as error:
        fault = str(error)
    if fault:
        raise UsageError(f"push={push} is not of the form OWNER/NAME: {fault}")


def push(folder: Path, name: str) -> str:
    """Copies the folder to the hub and returns its address there.

    Raises:
        RunError: the hub could not be reached or refused.
    """
    from huggingface_hub import HfApi, errors

    hub = HfApi()
    try:
        hub.create_repo(name, private=True, exist_ok=True)
        # An earlier program of other weights must not stay beside these weights.
        hub.upload_folder(
            repo_id=name, folder_path=folder, commit_message="softmoe export", delete_patterns=["model.*"]
        )
    except (OSError, errors.HTTPError) as error:
        raise RunError(
            f"push={name} failed ({first_line(error)}); {folder} is whole, so type the same command "
            "again; to log in: hf auth login"
        ) from error
    return f"https://huggingface.co/{name}"
