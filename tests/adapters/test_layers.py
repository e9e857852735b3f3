"""The adapters against plain float64 loops, in the special cases that have a simple answer, and under what must change
nothing."""

import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from softmoe_cli.adapters.bottleneck import Bottleneck
from softmoe_cli.adapters.dense_moa import DenseMoA
from softmoe_cli.adapters.lora import LowRank
from softmoe_cli.adapters.soft_moa import SoftMoA
from softmoe_cli.config.adapter import OWN
from tests.adapters.adapters import OPTIONS, layers, options, randomised, tokens
from tests.oracles import softmax, unit

D, R, E, P, N, B = 6, 3, 4, 2, 5, 2


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def gelu(v: float) -> float:
    return 0.5 * v * (1 + math.erf(v / math.sqrt(2)))


def bottleneck(x: list[float], w1: Any, b1: Any, w2: Any, b2: Any) -> list[float]:
    """w1 is d r and w2 is r d."""
    hidden = [gelu(b1[j] + sum(x[i] * w1[i][j] for i in range(D))) for j in range(len(b1))]
    return [b2[i] + sum(hidden[j] * w2[j][i] for j in range(len(b1))) for i in range(D)]


def of_expert(adapter: SoftMoA | DenseMoA, e: int, x: list[float]) -> list[float]:
    experts = adapter.experts
    return bottleneck(x, *(each[e].tolist() for each in (experts.w1, experts.b1, experts.w2, experts.b2)))


def soft(adapter: SoftMoA, x: list[list[float]]) -> list[list[float]]:
    """Soft-MoA of one image, slot by slot."""
    phi = adapter.router.phi.tolist()
    where = [(e, p) for e in range(E) for p in range(P)]
    of_slot = {(e, p): [phi[i][e][p] for i in range(D)] for e, p in where}
    compared, scale = x, 1.0
    if adapter.router.scale is not None:
        of_slot = {place: unit(vector) for place, vector in of_slot.items()}
        compared, scale = [unit(token) for token in x], adapter.router.scale.item()
    logits = [[scale * sum(a * b for a, b in zip(t, of_slot[s], strict=True)) for s in where] for t in compared]
    outputs = []
    for s, (e, _) in enumerate(where):
        dispatch = softmax([logits[n][s] for n in range(N)])
        outputs.append(of_expert(adapter, e, [sum(dispatch[n] * x[n][i] for n in range(N)) for i in range(D)]))
    combine = [softmax(row) for row in logits]
    return [[sum(combine[n][s] * outputs[s][i] for s in range(E * P)) for i in range(D)] for n in range(N)]


def dense(adapter: DenseMoA, x: list[list[float]]) -> list[list[float]]:
    weight, bias = adapter.router.weight.tolist(), adapter.router.bias.tolist()
    made = []
    for token in x:
        gates = softmax([bias[e] + sum(a * b for a, b in zip(token, weight[e], strict=True)) for e in range(E)])
        each = [of_expert(adapter, e, token) for e in range(E)]
        made.append([sum(gates[e] * each[e][i] for e in range(E)) for i in range(D)])
    return made


def slowly(adapter: Any, x: Tensor) -> Tensor:
    images = x.tolist()
    if isinstance(adapter, SoftMoA):
        return torch.tensor([soft(adapter, image) for image in images], dtype=torch.float64)
    if isinstance(adapter, DenseMoA):
        return torch.tensor([dense(adapter, image) for image in images], dtype=torch.float64)
    if isinstance(adapter, LowRank):
        return torch.tensor([[_low_rank(adapter, t) for t in image] for image in images], dtype=torch.float64)
    down, up = adapter.down, adapter.up
    weights = down.weight.T.tolist(), down.bias.tolist(), up.weight.T.tolist(), up.bias.tolist()
    return torch.tensor([[bottleneck(t, *weights) for t in image] for image in images], dtype=torch.float64)


def _low_rank(adapter: LowRank, x: list[float]) -> list[float]:
    """alpha is 3."""
    inner = [sum(a * b for a, b in zip(x, row, strict=True)) for row in adapter.down.weight.tolist()]
    return [3.0 / R * sum(a * b for a, b in zip(inner, row, strict=True)) for row in adapter.up.weight.tolist()]


@pytest.mark.parametrize("name", layers(2, 1, 1, 1))
def test_an_adapter_is_what_its_formula_says(name: str) -> None:
    adapter, x = layers(D, R, E, P)[name], tokens(B, N, D)
    torch.testing.assert_close(adapter(x), slowly(adapter, x), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", layers(2, 1, 1, 1))
def test_images_are_independent_and_the_order_of_tokens_does_not_matter(name: str) -> None:
    adapter, x, order = layers(D, R, E, P)[name], tokens(B, N, D), torch.randperm(N)
    torch.testing.assert_close(adapter(x[1:]), adapter(x)[1:], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(adapter(x[:, order]), adapter(x)[:, order], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["soft_moa", "soft_moa, normalised", "dense_moa"])
def test_the_order_of_adapters_does_not_matter(name: str) -> None:
    adapter, x = cast(Any, layers(D, R, E, P)[name]), tokens(B, N, D)
    before, order = adapter(x), torch.randperm(E)
    for parameter in adapter.experts.parameters():
        parameter.data = parameter.data[order]
    if isinstance(adapter, SoftMoA):
        adapter.router.phi.data = adapter.router.phi.data[:, order]
    else:
        for parameter in adapter.router.parameters():
            parameter.data = parameter.data[order]
    torch.testing.assert_close(adapter(x), before, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("normalised", [False, True])
def test_every_slot_is_a_mixture_of_tokens_and_every_token_one_of_slots(normalised: bool) -> None:
    adapter = randomised(SoftMoA(D, R, num_adapters=E, slots_per_adapter=P, normalised=normalised))
    assert isinstance(adapter, SoftMoA)
    routing = adapter.router(tokens(B, N, D))
    torch.testing.assert_close(routing.dispatch_weights.sum(dim=1), torch.ones(B, E, P).double())
    torch.testing.assert_close(routing.combine_weights.sum(dim=(2, 3)), torch.ones(B, N).double())


def soft_moa(number: int, slots: int) -> SoftMoA:
    made = randomised(SoftMoA(D, R, num_adapters=number, slots_per_adapter=slots, normalised=False))
    assert isinstance(made, SoftMoA)
    return made


def by_one(adapter: SoftMoA | DenseMoA, e: int, x: Tensor) -> Tensor:
    """Adapter e by itself, on every token."""
    single = Bottleneck(D, R).double()
    experts = adapter.experts
    for parameter, value in zip(
        single.parameters(), (experts.w1[e].T, experts.b1[e], experts.w2[e].T, experts.b2[e]), strict=True
    ):
        parameter.data.copy_(value)
    return single(x)


def test_one_slot_gives_all_tokens_the_same() -> None:
    adapter, x = soft_moa(1, 1), tokens(B, N, D)
    mixed = torch.einsum("bn,bnd->bd", adapter.router(x).dispatch_weights[:, :, 0, 0], x)[:, None]
    torch.testing.assert_close(adapter(x), by_one(adapter, 0, mixed).expand(B, N, D))


def test_of_one_token_soft_moa_is_dense_moa_without_bias() -> None:
    adapter, x = soft_moa(E, 1), tokens(B, 1, D)
    rival = DenseMoA(D, R, num_adapters=E).double()
    rival.experts.load_state_dict(adapter.experts.state_dict())
    rival.router.weight.data.copy_(adapter.router.phi[:, :, 0].T)
    torch.testing.assert_close(adapter(x), rival(x))


def test_without_slots_of_their_own_all_adapters_see_the_mean_token() -> None:
    adapter, x = soft_moa(E, P), tokens(B, N, D)
    adapter.router.phi.data.zero_()
    mean = x.mean(dim=1, keepdim=True)
    each = torch.stack([by_one(adapter, e, mean) for e in range(E)]).mean(dim=0)
    torch.testing.assert_close(adapter(x), each.expand(B, N, D))


def test_equal_adapters_are_one_in_dense_moa_and_still_mix_in_soft_moa() -> None:
    rivals = layers(D, R, E, P)
    x, soft_one, dense_one = tokens(B, N, D), cast(SoftMoA, rivals["soft_moa"]), cast(DenseMoA, rivals["dense_moa"])
    for adapter in (soft_one, dense_one):
        for parameter in adapter.experts.parameters():
            parameter.data = parameter.data[:1].expand_as(parameter).clone()
    torch.testing.assert_close(dense_one(x), by_one(dense_one, 0, x))
    routing = soft_one.router(x)
    slots = by_one(soft_one, 0, torch.einsum("bnep,bnd->bepd", routing.dispatch_weights, x).flatten(1, 2))
    torch.testing.assert_close(soft_one(x), torch.einsum("bns,bsd->bnd", routing.combine_weights.flatten(2), slots))
    assert (soft_one(x) - by_one(soft_one, 0, x)).abs().max() > 0.1


def test_dense_moa_of_one_adapter_is_that_adapter() -> None:
    rival = cast(DenseMoA, randomised(DenseMoA(D, R, num_adapters=1)))
    x = tokens(B, N, D)
    torch.testing.assert_close(rival(x), by_one(rival, 0, x))


def test_phi_starts_with_the_deviation_of_the_official_start() -> None:
    """sqrt(2 / (p (n + d))): 0.051 for 7 adapters of one slot at width 768."""
    phi = SoftMoA(768, 6, num_adapters=7, slots_per_adapter=1, normalised=False).router.phi
    assert phi.std().item() == pytest.approx(0.0508, rel=0.05)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_width_follows_from_the_reduction(name: str) -> None:
    """Half is rounded to even, and there are four at least."""
    chosen = options(name, width=None, reduction=128.0)
    assert [chosen.width_for(dim) for dim in (768, 832, 960, 64)] == [6, 6, 8, 4]
    assert options(name, width=3, reduction=None).width_for(768) == 3
    assert set(OWN) == {"none", *OPTIONS}
