"""Which patches get fewer MLPs: the mean number per token, by a patch's brightness and by its edges.

cd FOLDER_OF_OUTPUTS
python patches.py RUN [RUN ...]

A RUN is a folder of a finished run with `model/router=zero_computation`. Goes through its test images in evaluation,
where nothing is dropped, and prints Markdown: five equal shares of all patches, from the darkest to the brightest, and
from the flattest to the one with most contrast; and the share of choices that MLPs get, beside the balanced one.
"""

import sys

import torch
from torch import Tensor
from torch.nn import functional as F

from softmoe_cli.config.data import Data
from softmoe_cli.data import sets
from softmoe_cli.data.batches import eval_batches
from softmoe_cli.model.vit import build
from softmoe_cli.model.weights import load_weights
from softmoe_cli.moe.routers.zero_computation import ZeroComputationRouter, ZeroComputationRouting, ffn_share
from softmoe_cli.options.inherit import model_of
from softmoe_cli.run.source import read_source

SHARES = 5


@torch.no_grad()
def looked_at(run: str) -> tuple[Tensor, Tensor, Tensor, ZeroComputationRouter]:
    """Of every patch of the test images its brightness, its contrast and its MLPs in each layer; and a router."""
    source = read_source(run)
    config, data = model_of(source, None), Data(**source.card["data"])
    vit = build(config, source.weights["head.weight"].shape[0]).eval()
    load_weights(vit, source.weights, keep_head=True, allow_unexpected=[])
    routers = [module for module in vit.modules() if isinstance(module, ZeroComputationRouter)]
    seen: list[Tensor] = []

    def count(router: ZeroComputationRouter, _inputs: object, routing: ZeroComputationRouting) -> None:
        chosen, _, landed, *_ = routing.choices
        mlps = (landed & (chosen < router.num_experts)).sum(dim=2)
        seen.append(mlps.reshape(-1, vit.patch_embed.num_patches))

    for router in routers:
        router.register_forward_hook(count)
    bright, edges, mlps = [], [], []
    side = vit.patch_embed.patch_size[0]
    batches = eval_batches(
        sets.load(data).test, data, image_size=config.image_size, in_chans=config.in_chans, batch_size=64,
        device=torch.device("cpu"),
    )  # fmt: skip
    for x, *_ in batches:
        seen.clear()
        vit(x)
        patches = F.unfold(x.mean(dim=1, keepdim=True), side, stride=side)  # b pixels patches
        bright.append(patches.mean(dim=1).flatten())
        edges.append(patches.std(dim=1, correction=0).flatten())
        mlps.append(torch.stack([each[: len(x)].flatten() for each in seen], dim=1))
    return torch.cat(bright), torch.cat(edges), torch.cat(mlps), routers[0]


def table(run: str) -> None:
    bright, edges, mlps, router = looked_at(run)
    by_token, share = mlps.float().mean(dim=1), ffn_share(router.num_experts, router.num_free, router.tau)
    print(f"\n{run}: {len(bright):,} patches, {mlps.shape[1]} layers; of the choices MLPs get")
    print(f"{by_token.mean() / router.k:.3f}, in balance {share:.3f}; MLPs per token, mean and standard deviation:\n")
    print("| fifth of the patches | by brightness | by contrast |\n|---|---|---|")
    orders = [by_token[values.argsort(stable=True)].chunk(SHARES) for values in (bright, edges)]
    for place, (light, sharp) in enumerate(zip(*orders, strict=True)):
        name = {0: "lowest", SHARES - 1: "highest"}.get(place, str(place + 1))
        print(f"| {name} | {light.mean():.2f} ({light.std():.2f}) | {sharp.mean():.2f} ({sharp.std():.2f}) |")


if __name__ == "__main__":
    for each in sys.argv[1:]:
        table(each)
