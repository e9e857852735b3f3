"""The memory that one of several processes needs beside a training step's: the buffers of torch's fully_shard, and rows
of experts on their way between processes. `memory.predict` uses it.

Nothing here computes. This code allocates tensors without contents in the order in which torch allocates real ones, and
so depends on the internals of one version of torch: CHECKED_WITH. Its predictions are compared with real memory by
test_predicted_peak_of_each_of_two_processes.
"""

from collections.abc import Iterable
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from softmoe_cli.model.blocks import tokens_of
from softmoe_cli.moe.divided import Visited, in_proportion, span
from softmoe_cli.moe.kind import Layer
from softmoe_cli.moe.layer import MoE, Stacked, chosen, ragged_experts
from softmoe_cli.moe.routing import Carried
from softmoe_cli.parallel import cut_axis

CHECKED_WITH = "2.15"
"""The version of torch whose fully_shard is imitated here."""


def indivisible(vit: VisionTransformer, processes: int) -> str | None:
    """What keeps so many processes from getting at least one expert of each MoE layer; None where nothing does."""
    layers = [block.mlp for block in vit.blocks if isinstance(block.mlp, Layer)]
    if not layers:
        return "no experts"
    if not all(isinstance(layer, MoE) for layer in layers):
        return "experts that share their weights"
    experts = min(layer.router.num_experts for layer in layers)
    return f"{experts} experts" if experts < processes else None


class Sent(torch.autograd.Function):
    """Rows that are sent away, and `arriving` ones that come instead; backwards the other way round. Only their memory:
    nothing is sent."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, arriving: int) -> Tensor:
        ctx.leaving = len(rows)
        return rows.new_empty(arriving, rows.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        sent = gradients[0].contiguous()
        return sent.new_empty(ctx.leaving, sent.shape[1]), None


class FirstExperts(Visited):
    """The first process's experts of a layer in training, without other processes to exchange rows with. `groups`:
    routing groups that each process has of a batch."""

    def __init__(self, whole: Stacked, processes: int, groups: list[int]) -> None:
        spans = [span(len(whole.w1), processes, place) for place in range(processes)]
        first = slice(*spans[0])
        super().__init__((nn.Parameter(each[first].detach()) for each in whole.parameters()), spans, 0, gelu=whole.gelu)
        self._groups = groups

    def leave(self, left: Tensor | None) -> None:
        """As if as many were left to each process as to the next."""
        of_all = self._whole_spans[-1][1] if left is None else len(left)
        self.spans = [span(of_all, len(self.counts), place) for place in range(len(self.counts))]
        self.counts = [end - start for start, end in self.spans]
        self.left = None if left is None else left[: self.counts[0]]

    def local_weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return chosen(self.left, self.w1, self.b1, self.w2, self.b2)

    def rows_of_each(self, own: int) -> list[int]:
        return in_proportion(own, self._groups, self.place)

    def exchange(self, rows: Tensor, there: list[int], back: list[int]) -> Tensor:
        arrived: Tensor = Sent.apply(rows.contiguous(), sum(back))
        return arrived

    def ragged(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Assumes that every process gets as many rows as it sends: only real images could tell which experts get
        more."""
        turned = torch.cat(self.exchange(rows, [], [len(rows)]).split(1 + len(rows) // 2))
        made = ragged_experts(turned, offsets[: self.counts[0]], *self.local_weights(), self.gelu)
        return self.exchange(torch.cat(made.split(1 + len(rows) // 2)), [], [len(rows)])


class FullyShard:
    """Allocates and frees buffers without contents at the moments when torch's fully_shard does. The model itself stays
    whole here; its weights are not to be counted.

    A group is a block, or all that lies outside of the blocks (the last group). Before a group computes, forwards or
    backwards, its weights are gathered through a buffer of their size. That buffer lives until the next group's is
    there; on the way back the next one comes before this group is done. A group's gradients are whole until they have
    been copied to a second buffer, in which the processes add them up, and that one lives until the next group's.
    """

    def __init__(self, vit: VisionTransformer, processes: int, apart: Iterable[nn.Parameter]) -> None:
        """`apart`: parameters that are not divided. Single numbers never are."""
        self._processes = processes
        self._apart = {*apart, *(parameter for parameter in vit.parameters() if not parameter.ndim)}
        blocks = [list(block.parameters()) for block in vit.blocks]
        inside = {parameter for block in blocks for parameter in block}
        outside = [parameter for parameter in vit.parameters() if parameter not in inside]
        self._groups = [[p for p in group if p not in self._apart] for group in (*blocks, outside)]
        self._outside = len(blocks)
        self._device = next(vit.parameters()).device
        self._whole: dict[int, Tensor] = {}
        self._summed: dict[int, Tensor] = {}
        self._waiting = set(range(len(self._groups)))
        self._buffer: Tensor | None = None
        self._sums: Tensor | None = None
        self._on_the_way_back = False
        vit.register_forward_pre_hook(lambda _module, _inputs: self._gather(self._outside))
        for group, block in enumerate(vit.blocks):
            block.register_forward_pre_hook(lambda _module, inputs, group=group: self._before(group, *inputs))
            block.register_forward_hook(lambda _module, _inputs, out, group=group: self._after(group, out))
        vit.register_forward_hook(lambda _module, _inputs, out: self._turn(out))

    def own_bytes(self, parameter: nn.Parameter) -> int:
        """Bytes of a parameter on the process with the largest piece of it."""
        if parameter in self._apart:
            return parameter.nbytes
        length = parameter.shape[cut_axis(parameter.shape, self._processes)]
        return parameter.numel() // length * -(-length // self._processes) * parameter.element_size()

    def _take(self, parameters: Iterable[nn.Parameter], pieces: int) -> Tensor:
        size = sum(map(self.own_bytes, parameters)) * pieces
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _all_of(self, group: int) -> Tensor:
        return self._take(self._groups[group], self._processes)

    def _copy_out(self, group: int) -> None:
        """Copies the buffer to the weights; a weight that was not cut along its first axis is put together on the
        way."""
        self._whole[group] = self._all_of(group)
        self._take((p for p in self._groups[group] if cut_axis(p.shape, self._processes)), self._processes)

    def _gather(self, group: int) -> None:
        self._buffer = self._all_of(group)  # while the buffer before it is still there
        self._copy_out(group)

    def _before(self, group: int, passed: Tensor | tuple[Tensor, Carried]) -> None:
        if self._on_the_way_back:  # recomputation
            return
        self._gather(group)

        def back(_gradient: Tensor) -> None:
            self._leave(group)
            if group:
                self._enter(group - 1)

        x = tokens_of(passed)
        if x.requires_grad:
            x.register_hook(back)

    def _after(self, group: int, passed: Tensor | tuple[Tensor, Carried]) -> None:
        if self._on_the_way_back:
            return
        del self._whole[group]
        out = tokens_of(passed)
        if group == self._outside - 1 and out.requires_grad:
            out.register_hook(lambda _gradient: self._enter(group))

    def _turn(self, out: Tensor) -> None:
        self._buffer, self._on_the_way_back = None, True
        self._waiting = set(range(len(self._groups)))
        del self._whole[self._outside]

        def back(_gradient: Tensor) -> None:
            self._buffer = self._all_of(self._outside)
            self._enter(self._outside)

        out.register_hook(back)

    def _enter(self, group: int) -> None:
        self._copy_out(group)
        self._buffer = None
        if group:
            self._buffer = self._all_of(group - 1)

    def _leave(self, group: int) -> None:
        self._whole.pop(group, None)
        self._waiting.discard(group)
        self._sums = None
        trained = [parameter for parameter in self._groups[group] if parameter.grad is not None]
        self._sums = self._take(trained, self._processes)
        for parameter in trained:
            parameter.grad = None
        self._summed.setdefault(group, self._take(trained, 1))  # a later part's is added to the first's and freed

    def finish(self) -> None:
        """The end of a backward pass."""
        for group in sorted(self._waiting):
            self._leave(group)
        self._sums = self._buffer = None
        self._on_the_way_back = False
