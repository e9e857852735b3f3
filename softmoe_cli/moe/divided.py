"""A layer's experts divided among processes: rows travel to their experts and back, the weights stay where they are.

GShard (Lepikhin et al., 2020), https://arxiv.org/abs/2006.16668, Section 3.2: two all-to-alls for a layer. As a process
computes its experts' rows of everyone's images, its experts' gradients are whole without being added up.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from softmoe_cli.moe.layer import Experts, experts, ragged_experts


def span(length: int, size: int, place: int) -> tuple[int, int]:
    """Where a process's part of an axis begins and ends, as DTensor cuts it: all parts are equal, the last ones get the
    rest."""
    each = -(-length // size)
    return min(each * place, length), min(each * (place + 1), length)


class DividedExperts(Experts):
    """A process's experts in the place of all: the same names, each parameter a part of the whole one.

    Args:
        whole: all e experts. A process gets ceil(e / processes), the last one that has any fewer.
        mesh: the processes, one after the other.
        groups: routing groups that each of them has of a batch in training; a routing's rows are in proportion.
    """

    def __init__(self, whole: Experts, mesh: DeviceMesh, groups: Sequence[int]) -> None:
        nn.Module.__init__(self)
        self.gelu, self.identical = whole.gelu, whole.identical
        self._mesh, self._groups = mesh, groups
        for name, parameter in whole.named_parameters():
            own = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
            self.register_parameter(name, nn.Parameter(own, requires_grad=parameter.requires_grad))
        self._spans = [span(len(whole.w1), mesh.size(), place) for place in range(mesh.size())]
        self._counts = [end - start for start, end in self._spans]

    def forward(
        self, rows: Float[Tensor, "*rows d"], offsets: Int[Tensor, " e"] | None = None
    ) -> Float[Tensor, "*rows d"]:
        if offsets is not None:
            return self._ragged(rows, offsets)
        (e, r, d), here = rows.shape, self._counts[self._mesh.get_local_rank()]
        everyones = self._rows_of_each(r)
        there, back = [r * count for count in self._counts], [here * each for each in everyones]
        arrived = self._exchange(rows.reshape(e * r, d), there, back).split(back)
        own_rows = torch.cat([part.view(here, each, d) for part, each in zip(arrived, everyones, strict=True)], dim=1)
        made = experts(own_rows, *self._weights(), self.gelu).split(everyones, dim=1)
        return self._exchange(torch.cat([part.reshape(-1, d) for part in made]), back, there).view(e, r, d)

    def _weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        w1, b1, w2, b2 = (getattr(self, name).to_local() for name in ("w1", "b1", "w2", "b2"))
        return w1, b1, w2, b2

    def _ragged(self, rows: Float[Tensor, "r d"], offsets: Int[Tensor, " e"]) -> Float[Tensor, "r d"]:
        rank, size = self._mesh.get_local_rank(), self._mesh.size()
        sizes = torch.zeros(size, len(offsets), dtype=torch.int64)
        sizes[rank] = offsets.diff(prepend=offsets.new_zeros(1)).cpu()
        dist.all_reduce(sizes)
        there = [int(part.sum()) for part in sizes[rank].split(self._counts)]
        behind = rows.new_zeros(len(rows) - sum(there), rows.shape[1])
        rows = rows[: sum(there)]
        mine = sizes[:, slice(*self._spans[rank])]
        back = mine.sum(dim=1).tolist()
        arrived = _turned(self._exchange(rows, there, back), mine)
        ends = mine.sum(dim=0).cumsum(0).int().to(rows.device)
        if len(ends):
            made = ragged_experts(arrived, ends, *self._weights(), self.gelu)
        else:  # nothing, but with a gradient: all processes keep moments of the same weights
            made = experts(arrived[None][:0], *self._weights(), self.gelu).flatten(0, 1)
        return torch.cat([self._exchange(_turned(made, mine.T), back, there), behind])

    def _rows_of_each(self, own: int) -> list[int]:
        """Rows of an expert that each process has, if this one has `own`."""
        rank = self._mesh.get_local_rank()
        if self.training:
            return [own * groups // self._groups[rank] for groups in self._groups]
        everyones = torch.zeros(self._mesh.size(), dtype=torch.int64)  # batches of an evaluation are of any size
        everyones[rank] = own
        dist.all_reduce(everyones)
        return everyones.tolist()

    def _exchange(self, rows: Float[Tensor, "r d"], there: list[int], back: list[int]) -> Float[Tensor, "s d"]:
        """Sends every process its run of rows, and receives the runs that the others have for this one."""
        return all_to_all_single_autograd(rows.contiguous(), back, there, self._mesh)


def _turned(rows: Float[Tensor, "r d"], sizes: Int[Tensor, "m n"]) -> Float[Tensor, "r d"]:
    """Reorders runs of rows. `sizes` is a matrix of their lengths: the runs come line by line and are returned column
    by column."""
    runs = rows.split(sizes.flatten().tolist())
    order = torch.arange(sizes.numel()).view(sizes.shape).T.flatten().tolist()
    return torch.cat([runs[place] for place in order]) if order else rows
