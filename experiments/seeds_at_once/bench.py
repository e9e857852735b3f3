"""Several seeds as one stacked computation, beside the run alone: what an update takes per seed, side by side in turns.

python experiments/seeds_at_once/bench.py CSV [model/backbone=vit_pico7 ...] [seeds=1,4,8] [rounds=15]
python experiments/seeds_at_once/bench.py batches data=exemplars data.root=PATH [...]

The second form says what making a batch takes beside an update, which no stacking of models shortens. Sides of the
first, on drawn images and labels (what they show changes no time):

- `alone`: train/loop.py's own update of one model; every other side is compared with it.
- `alone, N times the images`: the same on N batches at once. Stacked operations of the same kinds cannot take less:
  they compute as much, for as few calls, with N times the weights.
- `torch.func`: vmap over the model's own forward pass with stacked parameters, one backward pass of the sum of losses,
  norms for each seed, one AdamW over the stack.
- `by hand`: the forward pass written out for a stack, with fewer operations than timm's: norms' scales and shifts go
  into the matrices behind them, attention has its backward pass written out. Dense and soft models only.

Time is this process's processor time, on one thread: other programs on the machine take the core away, and time on the
wall with it, but not this. They still take caches, from all sides alike.

Before any clock runs, models are trained for 50 updates alone and by hand, on the same batches; what is printed is the
largest difference of a loss, and of a weight as a share of its tensor's largest.
"""

import csv
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from softmoe_cli.data import sets
from softmoe_cli.data.batches import Batch, train_batches
from softmoe_cli.device import hardware, keep_freed_memory, precision_context
from softmoe_cli.evaluate.quality import classification_loss
from softmoe_cli.model.vit import build
from softmoe_cli.moe.routers import soft
from softmoe_cli.moe.routing import routings
from softmoe_cli.optim import optimizer_of, settings
from softmoe_cli.options.compose import compose
from softmoe_cli.train.loop import Step, update

CPU = torch.device("cpu")
CLASSES, UPDATES, EACH = 10, 50, 2


class Stack:
    """N models of one architecture, by hand: `weights` are theirs, with the seeds in front."""

    def __init__(self, models: Sequence[VisionTransformer]) -> None:
        self.like, self.n = models[0], len(models)
        self.weights = {
            name: torch.stack([model.get_parameter(name).detach() for model in models]).requires_grad_()
            for name, _ in models[0].named_parameters()
        }

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (n b c) of images (n b c s s)."""
        like, w = self.like, self.weights
        side = like.patch_embed.patch_size[0]
        n, b, c, s, _ = images.shape
        grid = s // side
        patches = images.view(n * b, c, grid, side, grid, side).permute(0, 2, 4, 1, 3, 5).reshape(n, b * grid**2, -1)
        x = affine(patches, w["patch_embed.proj.weight"].flatten(2), w["patch_embed.proj.bias"])
        x = (x.view(n, b, grid**2, -1) + w["pos_embed"]).flatten(1, 2)
        for place, block in enumerate(like.blocks):
            x = x + self._attended(f"blocks.{place}.", x, b, block.attn.num_heads)
            mixed = hasattr(block.mlp, "experts")
            x = x + (self._mixed if mixed else self._mlp)(f"blocks.{place}.", x, b)
        pooled = normalised(x).view(n, b, grid**2, -1).mean(dim=2)
        return affine(pooled, *self._folded("norm", "head"))

    def _folded(self, norm: str, linear: str) -> tuple[Tensor, Tensor]:
        """A linear map that takes what a norm has made without its scale and shift."""
        w, matrix = self.weights, self.weights[f"{linear}.weight"]
        shifted = w[f"{linear}.bias"] + torch.bmm(matrix, w[f"{norm}.bias"][:, :, None])[:, :, 0]
        return matrix * w[f"{norm}.weight"][:, None], shifted

    def _attended(self, block: str, x: Tensor, b: int, heads: int) -> Tensor:
        w, n, width = self.weights, self.n, x.shape[2]
        qkv = affine(normalised(x), *self._folded(f"{block}norm1", f"{block}attn.qkv"))
        scale = w[f"{block}attn.q_norm.weight"] * w[f"{block}attn.k_norm.weight"] * (width // heads) ** -0.5
        out = Attention.apply(qkv.view(n * b, -1, 3, heads, width // heads), scale)
        return affine(out.view(n, -1, width), w[f"{block}attn.proj.weight"], w[f"{block}attn.proj.bias"])

    def _mlp(self, block: str, x: Tensor, _b: int) -> Tensor:
        inner = affine(normalised(x), *self._folded(f"{block}norm2", f"{block}mlp.fc1"))
        hidden = F.gelu(inner, approximate="tanh")
        return affine(hidden, self.weights[f"{block}mlp.fc2.weight"], self.weights[f"{block}mlp.fc2.bias"])

    def _mixed(self, block: str, x: Tensor, b: int) -> Tensor:
        """A Soft MoE layer with one slot for each expert."""
        w, n, width = self.weights, self.n, x.shape[2]
        phi = w[f"{block}mlp.router.phi"].flatten(2)  # n d e
        e = phi.shape[2]
        x = torch.addcmul(w[f"{block}norm2.bias"][:, None], normalised(x), w[f"{block}norm2.weight"][:, None])
        slots = w[f"{block}mlp.router.scale"][:, None, None] * soft.l2_normalize(phi, dim=1)
        logits = Cosines.apply(x, slots).view(n * b, -1, e)
        rows = torch.bmm(logits.softmax(dim=1).mT, x.view(n * b, -1, width))
        rows = rows.view(n, b, e, width).transpose(1, 2).reshape(n * e, b, width)
        w1, b1, w2, b2 = (w[f"{block}mlp.experts.{name}"].flatten(0, 1) for name in ("w1", "b1", "w2", "b2"))
        hidden = F.gelu(torch.baddbmm(b1[:, None], rows, w1), approximate="tanh")
        out = torch.baddbmm(b2[:, None], hidden, w2).view(n, e, b, width).transpose(1, 2).reshape(n * b, e, width)
        return torch.bmm(logits.softmax(dim=2), out).view(n, -1, width)


def affine(x: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """x (n r d) through each seed's own linear map."""
    return torch.baddbmm(bias[:, None], x, matrix.mT)


def normalised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class Attention(torch.autograd.Function):
    """Of qkv (images tokens 3 heads d), queries and keys normalised without scale; `scale` (n d) is both norms' and
    attention's own."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: Tensor) -> Tensor:
        images, tokens, _, heads, d = qkv.shape
        both = qkv[:, :, :2].permute(2, 0, 3, 1, 4).contiguous()
        unit, mean, rstd = torch.native_layer_norm(both, (d,), None, None, 1e-6)
        q = (unit[0].view(len(scale), -1, d) * scale[:, None]).view(-1, tokens, d)
        v = qkv[:, :, 2].transpose(1, 2).reshape(-1, tokens, d)
        shares = torch.bmm(q, unit[1].view(-1, tokens, d).mT).softmax(dim=2)
        ctx.save_for_backward(both, unit, mean, rstd, q, v, shares, scale)
        return torch.bmm(shares, v).view(images, heads, tokens, d).transpose(1, 2).reshape(images, tokens, heads * d)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        both, unit, mean, rstd, q, v, shares, scale = ctx.saved_tensors
        _, images, heads, tokens, d = both.shape
        grad = grad.view(images, tokens, heads, d).transpose(1, 2).reshape(-1, tokens, d)
        made = both.new_empty(3, images, heads, tokens, d)
        torch.bmm(shares.mT, grad, out=made[2].view(-1, tokens, d))
        of_logits = torch._softmax_backward_data(torch.bmm(grad, v.mT), shares, 2, shares.dtype)
        of_unit = torch.empty_like(unit)
        of_q = torch.bmm(of_logits, unit[1].view(-1, tokens, d)).view(len(scale), -1, d)
        torch.mul(of_q, scale[:, None], out=of_unit[0].view(len(scale), -1, d))
        torch.bmm(of_logits.mT, q, out=of_unit[1].view(-1, tokens, d))
        backwards = torch.ops.aten.native_layer_norm_backward
        made[:2] = backwards(of_unit, both, (d,), mean, rstd, None, None, [True, False, False])[0]
        return made.permute(1, 3, 0, 2, 4), (of_q * unit[0].view_as(of_q)).sum(dim=1)


class Cosines(torch.autograd.Function):
    """As the soft router's, of x (n r d) and slots (n d m)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor) -> Tensor:
        inverse = soft.inverse_length(x, dim=2)
        cosines = torch.bmm(x, slots).mul_(inverse)
        ctx.save_for_backward(x, slots, cosines, inverse)
        return cosines

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, slots, cosines, inverse = ctx.saved_tensors
        of_length = (grad * cosines).sum(dim=2, keepdim=True) * inverse.square()
        grad = grad * inverse
        return torch.addcmul(torch.bmm(grad, slots.mT), x, of_length, value=-1), torch.bmm(x.mT, grad)


class Stacked:
    """Updates of a stack: one backward pass of the sum of the seeds' losses, clipping for each seed, and one AdamW,
    which computes element by element."""

    def __init__(self, models: Sequence[VisionTransformer], weights: dict[str, Tensor], optim: Any) -> None:
        self.weights, self.clip = list(weights.values()), optim.clip_norm
        groups: dict[float, list[Tensor]] = {}
        for row in settings(models[0], optim):
            groups.setdefault(row.weight_decay, []).append(weights[row.name])
        params = [{"params": own, "weight_decay": decay} for decay, own in groups.items()]
        betas = (optim.betas[0], optim.betas[1])
        self.optimizer = torch.optim.AdamW(params, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)

    def step(self, losses: Tensor, lr: float) -> list[float]:
        """The losses (n), after an update."""
        losses.sum().backward()
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        each = [torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in gradients]
        norms = torch.stack(each).norm(dim=0)
        if self.clip is not None:
            factors = (self.clip / (norms + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, [factors.view(-1, *[1] * (g.ndim - 1)) for g in gradients])
        said: list[list[float]] = torch.stack([losses.detach(), norms]).tolist()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return said[0]


def alone(model: VisionTransformer, config: Any, open_hooks: ExitStack) -> Callable[[Tensor, Tensor, float], float]:
    """An update as a run makes it."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    seen = open_hooks.enter_context(routings(model))
    step = Step(
        model, model, optimizer_of(model, config.optim), scaler, precision_context("cpu", "fp32", cached=True), seen,
        config,
    )  # fmt: skip
    return lambda images, targets, lr: update(step, Batch(images, targets), lr)[0]


def by_hand(models: Sequence[VisionTransformer], config: Any) -> tuple[Stack, Callable[..., list[float]]]:
    stack = Stack(models)
    updates = Stacked(models, stack.weights, config.optim)

    def step(images: Tensor, targets: Tensor, lr: float) -> list[float]:
        losses = F.cross_entropy(stack(images).flatten(0, 1), targets.flatten(0, 1), reduction="none")
        return updates.step(losses.view(len(images), -1).mean(dim=1), lr)

    return stack, step


def by_vmap(models: Sequence[VisionTransformer], config: Any, open_hooks: ExitStack) -> Callable[..., list[float]]:
    for block in models[0].blocks:
        block.attn.fused_attn = False  # torch has no batching rule for the fused one, and goes seed by seed
    soft._Cosines.generate_vmap_rule = True  # type: ignore[attr-defined]
    weights, buffers = stack_module_state(list[nn.Module](models))
    updates = Stacked(models, {name: weight.requires_grad_() for name, weight in weights.items()}, config.optim)
    seen = open_hooks.enter_context(routings(models[0]))

    def loss_of(own: dict[str, Tensor], kept: dict[str, Tensor], images: Tensor, targets: Tensor) -> Tensor:
        seen.clear()
        loss = classification_loss(functional_call(models[0], (own, kept), (images,)), targets, "softmax")
        return loss + sum((each.aux_loss for each in seen), loss.new_zeros(()))

    each = vmap(loss_of, randomness="different")
    return lambda images, targets, lr: updates.step(each(weights, buffers, images, targets), lr)


def new_model(config: Any, seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    return build(config.model, CLASSES).train()


def drawn(config: Any, n: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (n b c s s) and targets (n b classes)."""
    m, b = config.model, config.train.batch_size
    images = torch.randn(n, b, m.in_chans, m.image_size, m.image_size, generator=chance)
    return images, F.one_hot(torch.randint(CLASSES, (n, b), generator=chance), CLASSES).float()


def check(config: Any, n: int) -> str:
    """Alone against by hand, over UPDATES updates."""
    chance = torch.Generator().manual_seed(0)
    models = [new_model(config, seed) for seed in range(n)]
    stack, step = by_hand(models, config)
    with ExitStack() as hooks:
        each = [alone(model, config, hooks) for model in models]
        apart = 0.0
        for _ in range(UPDATES):
            images, targets = drawn(config, n, chance)
            ours = step(images, targets, config.optim.lr)
            theirs = [run(*given, config.optim.lr) for run, *given in zip(each, images, targets, strict=True)]
            apart = max(apart, *(abs(a - b) for a, b in zip(ours, theirs, strict=True)))
    shares = [
        ((stack.weights[name][seed] - own).abs().max() / own.abs().max().clamp(min=1e-3)).item()
        for seed, model in enumerate(models)
        for name, own in model.named_parameters()
    ]
    return f"{n} seeds, {UPDATES} updates: losses differ by at most {apart:.1e}, weights by {max(shares):.1e}"


def batches_beside(config: Any) -> str:
    """What making a batch takes, and the update on it."""
    images = sets.load(config.data)
    classes = sets.num_classes(config.data, images)
    m, took = config.model, []
    made = train_batches(
        images.train, config.data, config.augment, image_size=m.image_size, in_chans=m.in_chans, num_classes=classes,
        batch_size=config.train.batch_size, label_smoothing=0.0, seed=0, first_step=0, device=CPU,
    )  # fmt: skip
    with ExitStack() as hooks:
        run = alone(build(m, classes).train(), config, hooks)
        for _ in range(UPDATES):
            start = time.process_time()
            batch = next(made)
            between = time.process_time()
            run(batch.images, batch.labels, config.optim.lr)
            took.append((1000 * (between - start), 1000 * (time.process_time() - between)))
    making, updating = (statistics.median(each) for each in zip(*took[5:], strict=True))
    return f"{m.name}, {config.train.batch_size} images: batch {making:.2f} ms, update {updating:.2f} ms"


def main() -> None:
    file, *words = sys.argv[1:]
    asked = {word.partition("=")[0]: word.partition("=")[2] for word in words if word.startswith(("seeds=", "rounds="))}
    config = compose(*[word for word in words if word.partition("=")[0] not in asked])
    numbers, rounds = [int(n) for n in asked.get("seeds", "1,4,8").split(",")], int(asked.get("rounds", "15"))
    torch.set_num_threads(1)
    keep_freed_memory(CPU, 2**30, 2**34)
    if file == "batches":
        print(batches_beside(config))
        return
    written = config.model.router_name in ("dense", "soft")
    if written:
        print(check(config, 4), flush=True)
    warnings.simplefilter("error")  # such as of operations for which vmap goes seed by seed
    with ExitStack() as hooks:
        sides: dict[tuple[str, int], Callable[[], Any]] = {}
        lr, chance = config.optim.lr, torch.Generator().manual_seed(0)
        for n in numbers:
            images, targets = drawn(config, n, chance)
            one, flat = alone(new_model(config, 0), config, hooks), (images.flatten(0, 1), targets.flatten(0, 1))
            if n == 1:
                sides["alone", 1] = lambda one=one, given=flat: one(*given, lr)
            else:
                sides["alone, N times the images", n] = lambda one=one, given=flat: one(*given, lr)
            models = [new_model(config, seed) for seed in range(n)]
            if written:
                _, step = by_hand(models, config)
                sides["by hand", n] = lambda step=step, given=(images, targets): step(*given, lr)
            step = by_vmap(models, config, hooks)
            sides["torch.func", n] = lambda step=step, given=(images, targets): step(*given, lr)
        took: dict[tuple[str, int], list[float]] = {side: [] for side in sides}
        order = list(sides)
        for turn in range(rounds + 2):
            random.Random(turn).shuffle(order)
            for side in order:
                start = time.process_time()
                for _ in range(EACH):
                    sides[side]()
                if turn >= 2:
                    took[side].append(1000 * (time.process_time() - start) / EACH)
    write(Path(file), config, took)


def write(file: Path, config: Any, took: dict[tuple[str, int], list[float]]) -> None:
    """A row for each side: milliseconds per seed, and the time of `alone` over it within a round, with the 95% interval
    of the median."""
    new = not file.exists()
    with file.open("a", newline="") as out:
        table = csv.writer(out)
        if new:
            head = "model,router,batch,side,seeds,ms_per_seed,speedup,low,high,rounds,hardware,torch"
            table.writerow(head.split(","))
        for (side, n), own in took.items():
            ratios = sorted(n * a / b for a, b in zip(took["alone", 1], own, strict=True))
            out_of = int(stats.binom.ppf(0.025, len(ratios), 0.5))
            low, middle, high = ratios[max(0, out_of - 1)], statistics.median(ratios), ratios[-max(1, out_of)]
            m = config.model
            row = [
                m.name, m.router_name, config.train.batch_size, side, n, f"{statistics.median(own) / n:.2f}",
                f"{middle:.2f}", f"{low:.2f}", f"{high:.2f}", len(ratios), hardware(CPU), torch.__version__,
            ]  # fmt: skip
            table.writerow(row)
            print(*row[:10], sep="  ")


if __name__ == "__main__":
    main()
