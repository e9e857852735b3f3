"""The counted bytes of experiments/scaling, against peers counted one by one."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).resolve().parents[1] / "experiments/scaling/scaling.py"


@pytest.fixture(scope="module")
def estimate() -> Any:
    spec = importlib.util.spec_from_file_location("scaling", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("gpus", "node"), [(4, 8), (8, 8), (16, 8), (6, 2)])
def test_bytes_of_collectives(estimate: Any, gpus: int, node: int) -> None:
    machine = estimate.Machine(gpus_per_node=node)
    others = [(peer, peer < min(node, gpus)) for peer in range(1, gpus)]  # of GPU 0, and whether in its node
    share = 12.0
    within, beyond = (sum(share for _, here in others if here is where) for where in (True, False))
    assert estimate.exchange(share * gpus, gpus, machine) == estimate.Traffic(within, beyond)
    gathered = estimate.ring(share * gpus, gpus, machine)
    assert gathered.nvlink == within + beyond
    assert gathered.infiniband * min(node, gpus) == beyond, "each share from another node comes in once for all"


def test_what_each_way_sends(estimate: Any) -> None:
    machine, size = estimate.Machine(), estimate.Sizes(experts=8e9, rest=1e9, slots=1e6, layers=3)
    ddp, fsdp, expert = (estimate.traffic(way, size, 10, 64, machine, False) for way in estimate.WAYS)
    assert 2 * fsdp.nvlink == pytest.approx(3 * ddp.nvlink)
    alone = estimate.traffic("fsdp", estimate.Sizes(0.0, 1e9, 0.0, 0), 10, 64, machine, False)
    rows = estimate.traffic("expert", estimate.Sizes(8e9, 0.0, 1e6, 3), 10, 64, machine, False)
    assert (expert.nvlink, expert.infiniband) == pytest.approx(
        (alone.nvlink + rows.nvlink, alone.infiniband + rows.infiniband)
    )
    assert rows.infiniband == pytest.approx(4 * 3 * 10 * 1e6 * 56 / 64)
