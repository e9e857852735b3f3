"""Routing by image: slow loops, and what tokens, padding and neighbours have to do with it. The official numbers are in
tests/check/test_official.py; those of the token level of the same code are here."""

import pytest
import torch
from torch import Tensor

from softmoe_cli.check.official import official_cases, read_case, tolerance
from softmoe_cli.check.sentence import SENTENCE_KINDS, compare_sentence
from softmoe_cli.moe.kind import Weak
from softmoe_cli.moe.layer import MoE
from softmoe_cli.moe.routers.tokens_choice_dropless import TokensChoiceDroplessRouter
from softmoe_cli.moe.weak import weak_layer
from tests import oracles
from tests.moe.layers import EXPERTS, IMAGES, QUIET, TOKENS, close, expert_weights, layer, sparse, tokens

CASES = [name for name, meta in official_cases().items() if meta["kind"] in SENTENCE_KINDS]


@pytest.mark.parametrize("name", CASES)
def test_the_token_level_of_the_same_code(name: str) -> None:
    for what, got, want in compare_sentence(TokensChoiceDroplessRouter, read_case(name), torch.float64, level="token"):
        absolute, relative = tolerance(what, want, torch.float64)
        torch.testing.assert_close(got.double(), want.double(), atol=absolute, rtol=relative, msg=what)


def wanted(moe: MoE, x: Tensor, keep: Tensor, ranks: slice, *, renormalise: bool) -> list[list[list[float]]]:
    """Each image's experts by the mean of its tokens' logits, in a loop over images and tokens."""
    kernel, weights = moe.router.get_parameter("gate.kernel").tolist(), list(zip(*expert_weights(moe), strict=True))
    made = []
    for image, kept in zip(x.tolist(), keep.tolist(), strict=True):
        some = [token for token, there in zip(image, kept, strict=True) if there]
        of_tokens = [[sum(v * row[e] for v, row in zip(t, kernel, strict=True)) for e in range(EXPERTS)] for t in some]
        logits = [sum(column) / len(some) for column in zip(*of_tokens, strict=True)]
        gates = oracles.softmax(logits)
        best = sorted(range(EXPERTS), key=lambda e: -gates[e])[ranks]
        total = sum(gates[e] for e in best) if renormalise else 1.0
        rows = []
        for token, there in zip(image, kept, strict=True):
            outputs = [[gates[e] / total * v for v in oracles.mlp(token, *weights[e])] for e in best]
            rows.append([sum(column) if there else 0.0 for column in zip(*outputs, strict=True)])
        made.append(rows)
    return made


@pytest.mark.parametrize("renormalise", [True, False])
def test_a_slow_loop_over_images(renormalise: bool) -> None:
    moe, x = layer("image_choice", k=2, renormalise=renormalise, **QUIET), tokens()
    keep = torch.ones(IMAGES, TOKENS, dtype=torch.bool)
    keep[1, 4:] = False
    keep[3, 0] = False
    close(moe(x, keep), wanted(moe, x, keep, slice(2), renormalise=renormalise))
    moved = x + 100 * (~keep)[:, :, None]  # padding has no influence
    assert torch.equal(moe(moved, keep), moe(x, keep))


def test_tokens_of_an_image_share_experts_and_have_no_order() -> None:
    moe, x = layer("image_choice", k=2, **QUIET), tokens()
    routing = sparse(moe.router, x)
    assert routing.offsets is not None
    expert = torch.searchsorted(routing.offsets, torch.arange(len(routing.token)), right=True)
    per_image = [set(expert[routing.token // TOKENS == i].tolist()) for i in range(IMAGES)]
    assert [len(each) for each in per_image] == [2] * IMAGES and len(set(map(frozenset, per_image))) > 1
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(moe(x[:, order]), moe(x)[:, order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moe(x[:1]), moe(x)[:1], rtol=1e-12, atol=1e-12)  # nor do neighbours matter


def test_one_token_is_its_image() -> None:
    image, token = (layer(name, k=2, renormalise=True, **QUIET) for name in ("image_choice", "tokens_choice_dropless"))
    token.load_state_dict(image.state_dict())
    x = tokens()[:, :1]
    torch.testing.assert_close(image(x), token(x), rtol=1e-12, atol=1e-12)


def test_all_experts_of_an_image() -> None:
    """With k = e every expert sees every token."""
    moe, x = layer("image_choice", k=EXPERTS, **QUIET), tokens()
    gates = (x.mean(1) @ moe.router.get_parameter("gate.kernel")).softmax(1)
    every = moe.experts(x.flatten(0, 1).expand(EXPERTS, -1, -1)).unflatten(1, x.shape[:2])
    want = (gates.T[:, :, None, None] * every).sum(0)
    torch.testing.assert_close(moe(x), want, rtol=1e-10, atol=1e-12)


def test_losses_are_over_images() -> None:
    """Twice as many tokens, all images the same but longer: the same loss."""
    moe = layer("image_choice", k=2, images_per_group=2, noise_std=0.0, load_weight=0.0, importance_weight=0.5)
    moe.train()  # an evaluation has no groups
    x = tokens()
    loss = moe.router(x).aux_loss
    torch.testing.assert_close(moe.router(x.repeat(1, 2, 1)).aux_loss, loss)
    gates = (x.mean(1) @ moe.router.get_parameter("gate.kernel")).softmax(1).detach().tolist()
    pairs = [oracles.importance_loss(gates[i : i + 2]) for i in (0, 2)]
    assert loss.item() == pytest.approx(0.5 * sum(pairs) / 2, rel=1e-10)


def test_weak_passes_rank_experts_for_images() -> None:
    moe, x = layer("image_choice", k=2, renormalise=False, **QUIET), tokens()
    keep = torch.ones(IMAGES, TOKENS, dtype=torch.bool)
    for rank in range(1, EXPERTS + 1):
        want = wanted(moe, x, keep, slice(rank - 1, rank), renormalise=False)
        close(weak_layer(moe, Weak("rank", rank), None)(x), want)
    assert "random" not in moe.router.weak_limits()
