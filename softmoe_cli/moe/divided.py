"""A layer's experts divided among processes: rows travel to their experts and back, the weights stay where they are.

GShard (Lepikhin et al., 2020), https://arxiv.org/abs/2006.16668, Section 3.2: two all-to-alls for a layer. As a process
computes its experts' rows of everyone's images, its experts' gradients are whole without being added up.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from softmoe_cli.moe.layer import Stacked, chosen, experts, ragged_experts


def span(length: int, size: int, place: int) -> tuple[int, int]:
    """Where a process's part of an axis begins and ends, as DTensor cuts it: all parts are equal, the last ones get the
    rest."""
    each = -(-length // size)
    return min(each * place, length), min(each * (place + 1), length)


def in_proportion(own: int, groups: Sequence[int], place: int) -> list[int]:
    """Rows of an expert that each process has in training, if the process at `place` has `own`."""
    return [own * each // groups[place] for each in groups]


class Visited(Stacked, ABC):
    """One process's experts in the place of all, to which the rows of every process come: the same names, each
    parameter a part of the whole one.

    Args:
        own: this process's part of w1, b1, w2 and b2.
        spans: which experts each process has, from the first to before the last.
        place: this process's place among them.
    """

    def __init__(self, own: Iterable[nn.Parameter], spans: list[tuple[int, int]], place: int, *, gelu: str) -> None:
        super().__init__(*own, gelu=gelu)
        self.spans, self.place = spans, place
        self._whole_spans = spans
        self.counts = [end - start for start, end in spans]

    def leave(self, left: Int[Tensor, " z"] | None) -> None:
        """`left` numbers the experts of all processes; a process keeps those that are its own."""
        bounds = [start for start, _ in self._whole_spans] + [self._whole_spans[-1][1]]
        if left is None:
            self.spans, self.left = self._whole_spans, None
        else:
            ends = torch.searchsorted(left, torch.tensor(bounds, device=left.device)).tolist()
            self.spans = list(pairwise(ends))
            self.left = left[slice(*self.spans[self.place])] - bounds[self.place]
        self.counts = [end - start for start, end in self.spans]

    def forward(
        self, rows: Float[Tensor, "*rows d"], offsets: Int[Tensor, " e"] | None = None
    ) -> Float[Tensor, "*rows d"]:
        if offsets is not None:
            return self.ragged(rows, offsets)
        (e, r, d), here = rows.shape, self.counts[self.place]
        everyones = self.rows_of_each(r)
        there, back = [r * count for count in self.counts], [here * each for each in everyones]
        arrived = self.exchange(rows.reshape(e * r, d), there, back).split(back)
        own_rows = torch.cat([part.view(here, each, d) for part, each in zip(arrived, everyones, strict=True)], dim=1)
        made = experts(own_rows, *self.local_weights(), self.gelu).split(everyones, dim=1)
        return self.exchange(torch.cat([part.reshape(-1, d) for part in made]), back, there).view(e, r, d)

    @abstractmethod
    def local_weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The numbers that are in this process, of w1, b1, w2 and b2."""

    @abstractmethod
    def rows_of_each(self, own: int) -> list[int]:
        """Rows of an expert that each process has, if this one has `own`."""

    @abstractmethod
    def exchange(self, rows: Float[Tensor, "r d"], there: list[int], back: list[int]) -> Float[Tensor, "s d"]:
        """Sends every process its run of rows, and receives the runs that the others have for this one."""

    @abstractmethod
    def ragged(self, rows: Float[Tensor, "r d"], offsets: Int[Tensor, " e"]) -> Float[Tensor, "r d"]:
        """The forward pass of runs of any length, of which expert i's ends at `offsets[i]`."""


class DividedExperts(Visited):
    """A process's part of experts that are divided among processes.

    Args:
        whole: all e experts. A process gets ceil(e / processes), the last one that has any fewer.
        mesh: the processes, one after the other.
        groups: routing groups that each of them has of a batch in training; a routing's rows are in proportion.
    """

    def __init__(self, whole: Stacked, mesh: DeviceMesh, groups: Sequence[int]) -> None:
        from torch.distributed.tensor import Shard, distribute_tensor  # which takes a second to import

        spans = [span(len(whole.w1), mesh.size(), place) for place in range(mesh.size())]
        own = [
            nn.Parameter(distribute_tensor(all_of_it.detach(), mesh, [Shard(0)], src_data_rank=None),
                         requires_grad=all_of_it.requires_grad)
            for all_of_it in whole.parameters()
        ]  # fmt: skip
        super().__init__(own, spans, mesh.get_local_rank(), gelu=whole.gelu)
        self._mesh, self._groups = mesh, groups
        self.leave(whole.left)

    def local_weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return chosen(self.left, *(getattr(self, name).to_local() for name in ("w1", "b1", "w2", "b2")))

    def ragged(self, rows: Float[Tensor, "r d"], offsets: Int[Tensor, " e"]) -> Float[Tensor, "r d"]:
        rank, size = self.place, len(self.counts)
        sizes = torch.zeros(size, len(offsets), dtype=torch.int64)
        sizes[rank] = offsets.diff(prepend=offsets.new_zeros(1)).cpu()
        dist.all_reduce(sizes)
        there = [int(part.sum()) for part in sizes[rank].split(self.counts)]
        behind = rows.new_zeros(len(rows) - sum(there), rows.shape[1])
        rows = rows[: sum(there)]
        mine = sizes[:, slice(*self.spans[rank])]
        back = mine.sum(dim=1).tolist()
        arrived = _turned(self.exchange(rows, there, back), mine)
        ends = mine.sum(dim=0).cumsum(0).int().to(rows.device)
        if len(ends):
            made = ragged_experts(arrived, ends, *self.local_weights(), self.gelu)
        else:  # nothing, but with a gradient: all processes keep moments of the same weights
            made = experts(arrived[None][:0], *self.local_weights(), self.gelu).flatten(0, 1)
        return torch.cat([self.exchange(_turned(made, mine.T), back, there), behind])

    def rows_of_each(self, own: int) -> list[int]:
        if self.training:
            return in_proportion(own, self._groups, self.place)
        everyones = torch.zeros(len(self.counts), dtype=torch.int64)  # batches of an evaluation are of any size
        everyones[self.place] = own
        dist.all_reduce(everyones)
        return everyones.tolist()

    def exchange(self, rows: Float[Tensor, "r d"], there: list[int], back: list[int]) -> Float[Tensor, "s d"]:
        from torch.distributed._functional_collectives import all_to_all_single_autograd

        return all_to_all_single_autograd(rows.contiguous(), back, there, self._mesh)


def _turned(rows: Float[Tensor, "r d"], sizes: Int[Tensor, "m n"]) -> Float[Tensor, "r d"]:
    """Reorders runs of rows. `sizes` is a matrix of their lengths: the runs come line by line and are returned column
    by column."""
    runs = rows.split(sizes.flatten().tolist())
    order = torch.arange(sizes.numel()).view(sizes.shape).T.flatten().tolist()
    return torch.cat([runs[place] for place in order]) if order else rows
