"""What serving costs before and after experts were cut away: latency and memory of all forms, in turns in one process.

python experiments/served_speed/bench.py FILE.csv [batch=1,32] [repeats=21] [threads=1] [OVERRIDES...]

Two mixtures with random weights, whose FLOPs are those of one dense ViT: task_choice with two tasks (`softmoe extract`)
and tokens_choice_dropless (`softmoe prune`). Each is measured whole and in every form that those commands make of it,
by their own functions. FILE.csv gets a row for each form and batch.
"""

import csv
import sys
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from softmoe_cli.config.model import Model
from softmoe_cli.cost.flop import account
from softmoe_cli.cost.memory import Live
from softmoe_cli.device import hardware
from softmoe_cli.extract.forms import Made, one_task
from softmoe_cli.model.vit import build, prepare
from softmoe_cli.options.compose import compose
from softmoe_cli.prune.fold import folded_model, folded_weights
from softmoe_cli.prune.smaller import latencies, smaller_model, smaller_weights

TASK = "digits"
BACKBONE = (
    "data.image_size=224", "model/backbone=vit_s16", "model.moe_blocks=last_half", "model.expert_init=independent",
)  # fmt: skip
MIXTURES = {
    "task_choice": ("data=mix", "data.sets=[digits,fashion_mnist]", "model/router=task_choice",
                    "model.router.num_experts=16", "model.router.k=2", "model.expert_width=768"),
    "tokens_choice_dropless": ("model/router=tokens_choice_dropless", "model.router.num_experts=16",
                               "model.router.k=1"),
}  # fmt: skip
KEPT = (8, 4, 1)
Form = tuple[Model, VisionTransformer, nn.Module]
"""A model's configuration, its modules, and what is called with images."""


def extracted(overrides: tuple[str, ...]) -> dict[str, Form]:
    """The whole model of two tasks, and one task in the three forms of softmoe extract."""
    model = compose(*BACKBONE, *MIXTURES["task_choice"], *overrides).model
    vit = build(model, sum(model.tasks.values()))
    made = {form: Made.of(form, model, vit.double().eval(), [TASK]) for form in ("experts", "folded", "dense")}
    forms: dict[str, Form] = {"whole": (model, vit.float(), one_task(model, vit, TASK))}
    for form, each in made.items():
        new = each.built(torch.float32)
        forms[f"extracted, {form}"] = (each.model, new, one_task(each.model, new, TASK))
    return forms


def pruned(overrides: tuple[str, ...]) -> dict[str, Form]:
    """The whole model, and what softmoe prune makes of it with fewer experts and as a plain ViT."""
    model = compose(*BACKBONE, *MIXTURES["tokens_choice_dropless"], *overrides).model
    vit = build(model, 10).eval()
    forms: dict[str, Form] = {"whole": (model, vit, vit)}
    cut = build(model, 10).eval()
    layers = [cut.blocks[place].mlp for place in model.moe_blocks]
    for layer in layers:
        layer.prunable()
    for keep in KEPT:
        for layer in layers:
            layer.leave(range(keep))
        forms[f"pruned, keep={keep}"] = _built(smaller_model(model, cut), smaller_weights(cut))
    forms["pruned, dense"] = _built(folded_model(model, cut), folded_weights(model, cut))
    return forms


def _built(model: Model, weights: dict[str, Tensor]) -> Form:
    new = build(model, 10).eval()
    new.load_state_dict(weights)
    return model, new, new


def peak_mib(vit: VisionTransformer, call: nn.Module, x: Tensor) -> float:
    """Weights, images and the most that a forward pass holds beside them, in MiB."""
    state = [*vit.state_dict().values(), x]
    held = sum(each.untyped_storage().nbytes() for each in state)
    with torch.no_grad(), Live() as live:
        live.forget([*vit.parameters(), *vit.buffers(), x])
        call(x)
    return (held + live.peak) / 2**20


def main() -> None:
    file, *words = sys.argv[1:]
    own = {"batch": "1,32", "repeats": "21", "threads": "1"}
    own |= dict(word.split("=", 1) for word in words if word.split("=", 1)[0] in own)
    overrides = tuple(word for word in words if word.split("=", 1)[0] not in own)
    torch.set_num_threads(int(own["threads"]))
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for router, make in {"task_choice": extracted, "tokens_choice_dropless": pruned}.items():
        forms = make(overrides)
        for _, vit, _ in forms.values():
            prepare(vit, torch.device("cpu"), "fp32")
        for batch in map(int, own["batch"].split(",")):
            model = forms["whole"][0]
            x = torch.randn(batch, model.in_chans, model.image_size, model.image_size)
            times = latencies({form: call for form, (_, _, call) in forms.items()}, x, int(own["repeats"]))
            for form, (config, vit, call) in forms.items():
                cost = account(config, vit.num_classes)
                rows.append({
                    "router": router, "form": form, "batch": batch, **times[form],
                    "over_whole": times[form]["latency_ms"] / times["whole"]["latency_ms"],
                    "params_m": cost.params / 1e6, "forward_gflop": cost.forward_flop / 1e9,
                    "peak_mib": peak_mib(vit, call, x), "repeats": own["repeats"],
                    "hardware": hardware(torch.device("cpu")), "torch": torch.__version__,
                })  # fmt: skip
                print({key: value for key, value in rows[-1].items() if key not in ("hardware", "torch", "repeats")})
    with Path(file).open("x", newline="") as out:
        writer = csv.DictWriter(out, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
