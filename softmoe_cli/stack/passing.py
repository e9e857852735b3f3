"""One forward and backward pass of several models.

The pass is written down once, as the plain operations that torch.func makes of one model's pass (make_fx), and then
carried out from there: what torch.func and autograd add to each operation is paid once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from softmoe_cli.config.run import Config
from softmoe_cli.device import compiled, compiling_alone
from softmoe_cli.errors import UsageError, first_line
from softmoe_cli.moe.routing import drawn_by
from softmoe_cli.parallel import draw_elsewhere
from softmoe_cli.run.checkpoint import random_state, set_random_state
from softmoe_cli.run.identity import flat_science
from softmoe_cli.stack.folded import Folding
from softmoe_cli.stack.refused import UNORDERED
from softmoe_cli.stack.updating import Updates, alike, clip, norms

Losses = Callable[..., tuple[Tensor, Tensor, Tensor]]
"""Of a forward pass, targets and what the model is called with: the loss, the auxiliary loss, and what has landed."""


@dataclass(frozen=True)
class Handed:
    """What a run hands in for its next update.

    Attributes:
        config: the settings that the pass is computed with.
        parts: targets and inputs of each part of its batch.
        landed: what the routings of all updates say has landed.
        lr: the learning rate of this update.
        clip_norm: what gradients are shortened to; None: nothing.
    """

    model: nn.Module
    losses: Losses
    config: Config
    parts: list[tuple[Tensor, ...]]
    landed: Tensor
    optimizer: torch.optim.Optimizer
    lr: float
    clip_norm: float | None


@dataclass(frozen=True)
class Returned:
    """What a run gets back: its losses, (2); and of an update that was made already the loss, the auxiliary loss and
    the gradients' norm before clipping. Where none was made, its parameters have their gradients."""

    losses: Tensor
    update: tuple[float, float, float] | None = None


class Stack:
    """The parameters and buffers of models of one architecture, stacked. The models go on as they are: theirs are views
    of the stack from now on."""

    def __init__(self, handed: Sequence[Handed]) -> None:
        """Writes the pass down too, for batches in the shapes of these: make it inside `own_draws`."""
        self._models = models = [each.model for each in handed]
        first, *others = [_shapes(each) for each in handed]
        for other in others:
            if odd := next((name for name in [*first, *other] if first.get(name) != other.get(name)), None):
                raise UsageError(f"these runs differ in more than the seed ({odd}); leave seeds_at_once out")
        for model in models:
            draw_elsewhere(model)
        self._weights = _stacked([dict(model.named_parameters()) for model in models])
        self._buffers = _stacked([dict(model.named_buffers()) for model in models])
        self._trained = [name for name, each in models[0].named_parameters() if each.requires_grad]
        self._draws: list[Callable[[Tensor], Tensor]] = []
        optimizers = [each.optimizer for each in handed]
        self._updates = Updates(models, optimizers) if alike(models, optimizers) else None
        first_parts = [torch.stack(each) for each in zip(*(each.parts[0] for each in handed), strict=True)]
        key = (len(models), first) if handed[0].config.train.compile else None
        self._graph = self._written_down(handed[0].losses, first_parts, key)

    def holds(self, handed: Sequence[Handed]) -> bool:
        return [id(each.model) for each in handed] == [id(model) for model in self._models]

    def passed(self, handed: Sequence[Handed]) -> list[Returned]:
        """Forwards and backwards; and the update, where all have the same optimizer and are equally far."""
        losses, gradients = self._gradients(handed)
        trained = list(gradients.values())
        norm = norms(trained)
        told: list[list[float]] = torch.cat([losses, norm[:, None]], dim=1).tolist()
        one_rate = len({(each.lr, each.clip_norm) for each in handed}) == 1
        if self._updates is not None and one_rate and all(math.isfinite(each) for own in told for each in own):
            clip(trained, norm, handed[0].clip_norm)
            self._updates.step(self._weights, gradients, handed[0].lr)
            return [Returned(own, (loss, aux, of)) for own, (loss, aux, of) in zip(losses, told, strict=True)]
        for name, gradient in gradients.items():
            for model, mine in zip(self._models, gradient, strict=True):
                model.get_parameter(name).grad = mine
        return [Returned(own) for own in losses]

    def _gradients(self, handed: Sequence[Handed]) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (n 2), and by name the gradients (n ...) of the parameters that have one."""
        sums: list[Tensor] = []
        for parts in zip(*(each.parts for each in handed), strict=True):
            tensors = [torch.stack(each) for each in zip(*parts, strict=True)]
            with torch.no_grad(), _carrying_out(self._draws):
                made = self._graph(self._weights, self._buffers, tensors)
            sums = made if not sums else [a if a is None else a + b for a, b in zip(sums, made, strict=True)]
        losses, landed, *gradients = sums
        for each, count in zip(handed, landed, strict=True):
            each.landed.add_(count)
        return losses, {n: each for n, each in zip(self._trained, gradients, strict=True) if each is not None}

    def _written_down(self, losses: Losses, tensors: list[Tensor], compile_as: object | None) -> GraphModule:
        """The pass as plain operations; compiled, and carried out once, where there is a key for that."""
        model = self._models[0]

        def alone(weights: dict[str, Tensor], buffers: dict[str, Tensor], *given: Tensor) -> tuple[Tensor, ...]:
            def forward(*inputs: Tensor) -> Tensor:
                tensors = weights | buffers
                logits: Tensor = functional_call(model, tensors, inputs)
                for name, buffer in buffers.items():
                    if (put := tensors[name]) is not buffer:  # a new tensor in its place
                        if (put.shape, put.dtype) != (buffer.shape, buffer.dtype):
                            raise RuntimeError(f"{name} gets another shape or type")
                        buffer.copy_(put.detach())
                return logits

            return losses(forward, *given)

        def together(weights: dict[str, Tensor], buffers: dict[str, Tensor], given: list[Tensor]) -> list[Any]:
            leaves = {name: weight.detach().requires_grad_(name in self._trained) for name, weight in weights.items()}
            with Folding(), drawn_by(self._draw):
                loss, aux, landed = vmap(alone)(leaves, buffers, *given)
            wanted = [leaves[name] for name in self._trained]
            gradients = torch.autograd.grad((loss + aux).sum(), wanted, allow_unused=True)
            laid_out = [None if each is None else each.contiguous() for each in gradients]  # as optimizers need them
            return [torch.stack([loss.detach(), aux.detach()], dim=1), landed, *laid_out]

        before = {name: buffer.clone() for name, buffer in self._buffers.items()}
        states = [dict(state) for state in _states]
        kept = [(module, dict(vars(module))) for module in model.modules()]
        try:
            with _carrying_out(self._draws):
                graph = make_fx(together)(self._weights, self._buffers, tensors)
            if odd := next(_changed(kept), None):  # it would stay what it was while the pass was written down
                raise RuntimeError(f"{odd} changes in a pass, and is no buffer")
            if compile_as is None:
                return graph
            if self._draws:
                raise UsageError(f"train.compile=true {UNORDERED}; set train.compile=false, or leave seeds_at_once out")
            made = compiled(graph, dynamic=False)
            with compiling_alone(compile_as, lambda: None), torch.no_grad():
                made(self._weights, self._buffers, tensors)
            return made
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # such as a router's that asks what numbers are
            raise UsageError(
                f"these models cannot be computed {len(self._models)} at once ({first_line(error)}); leave "
                "seeds_at_once out"
            ) from error
        finally:  # writing down was a pass too, and what runs keep is saved also when it has failed
            for name, buffer in self._buffers.items():
                buffer.copy_(before[name])
            for module, own in kept:
                vars(module).clear()
                vars(module).update(own)
            _states[:] = states

    def _draw(self, like: Tensor, draw: Callable[[Tensor], Tensor]) -> Tensor:
        self._draws.append(draw)
        drawn: Tensor = _Drawn.apply(like.detach(), len(self._draws) - 1)
        return drawn


def _changed(kept: Sequence[tuple[nn.Module, dict[str, Any]]]) -> Iterator[str]:
    """What modules have beside their tensors and did not have before."""
    for module, own in kept:
        yield from (
            f"{type(module).__name__}.{key}" for key, value in vars(module).items() if own.get(key, own) is not value
        )


def _shapes(handed: Handed) -> dict[str, object]:
    """What runs of one stack have in common, by name: the pass is written down from the first one's settings."""
    said = flat_science(handed.config).items()
    shapes: dict[str, object] = {name: (p.shape, p.requires_grad) for name, p in handed.model.named_parameters()}
    shapes |= {name: buffer.shape for name, buffer in handed.model.named_buffers()}
    shapes |= {key: value for key, value in said if key.startswith("model.") or key == "train.loss"}
    return shapes | {"the batch": [[tensor.shape for tensor in part] for part in handed.parts]}


def _stacked(of_each: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all, by name; each's own become views of them."""
    stacked = {}
    for name in of_each[0]:
        own = [tensors[name] for tensors in of_each]
        stacked[name] = torch.stack([each.detach() for each in own])
        for each, view in zip(own, stacked[name], strict=True):
            each.data = view
    return stacked


# --- random numbers ---------------------------------------------------------------------------------------------------

_states: list[dict[str, Tensor]] = []
"""The runs' random states, while a pass is made for them."""
_draws: list[Callable[[Tensor], Tensor]] = []
"""The functions that fill a tensor with random numbers, by their number in the pass that is carried out."""


@contextmanager
def own_draws(states: list[dict[str, Tensor]]) -> Iterator[None]:
    """Inside, each run's random numbers come from its own state, which moves on."""
    _states[:] = states
    try:
        yield
    finally:
        for own, moved in zip(states, _states, strict=True):
            own.update(moved)
        _states.clear()


@contextmanager
def _carrying_out(draws: list[Callable[[Tensor], Tensor]]) -> Iterator[None]:
    global _draws
    before, _draws = _draws, draws
    try:
        yield
    finally:
        _draws = before


@torch.library.custom_op("softmoe::drawn", mutates_args=())
def drawn_alone(like: Tensor, number: int) -> Tensor:
    """Random numbers in the shape of `like` (n ...), of each run as it would draw them alone."""
    made = torch.empty_like(like)
    for place, own in enumerate(made):
        set_random_state(_states[place])
        own.copy_(_draws[number](torch.empty_like(like[place])))
        _states[place] = random_state()
    return made


@drawn_alone.register_fake
def _(like: Tensor, number: int) -> Tensor:
    return torch.empty_like(like)


class _Drawn(torch.autograd.Function):
    @staticmethod
    def forward(like: Tensor, number: int) -> Tensor:
        raise AssertionError("what models draw depends on what each of them computes")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return

    @staticmethod
    def vmap(info: Any, dims: Any, like: Tensor, number: int) -> tuple[Tensor, int]:
        return drawn_alone(like.movedim(dims[0], 0), number), 0
