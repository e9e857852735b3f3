"""Self-contrast: the official numbers, slow loops, and what must hold of two passes and of the trial around them."""

import csv
import json
import math
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from softmoe_cli.check.official import layer_weights, official_cases, read_case
from softmoe_cli.cost.flop import account_model, counter
from softmoe_cli.errors import UsageError
from softmoe_cli.evaluate.contrast import (
    WeakPass,
    check_weak,
    contrasted,
    flop_ratios,
    mcnemar,
    ranking,
    strong_pass,
    weak_named,
)
from softmoe_cli.evaluate.trial import Answers, Way, answers_to, best_settings, line_of
from softmoe_cli.model.router import make_layer
from softmoe_cli.moe.kind import Weak
from softmoe_cli.moe.layer import MoE
from softmoe_cli.moe.weak import WeakChoice, weak_layer
from tests import oracles
from tests.conftest import TINY, Softmoe
from tests.model.models import make
from tests.moe.layers import EXPERTS, QUIET, TOKENS, close, expert_weights, layer, tokens
from tests.routers import ROUTERS
from tests.runs import saved

RANDOM = torch.Generator().manual_seed(0)
CASES = {name: meta["kind"] for name, meta in official_cases().items() if meta["kind"].startswith("self_contrast_")}


def of_kind(kind: str) -> list[str]:
    return [name for name, each in CASES.items() if each == kind]


def logits(images: int = 40, classes: int = 6) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    strong, weak = (torch.randn(images, classes, generator=rng, dtype=torch.float64) * 2 for _ in range(2))
    return strong, weak


# --- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", of_kind("self_contrast_logits"))
def test_official_contrasts(name: str) -> None:
    meta, z = read_case(name)
    for i, setting in enumerate(meta["config"]["settings"]):
        strong = torch.tensor(z["strong"]) / setting["strong_temperature"]
        weak = torch.tensor(z["weak"]) / setting["weak_temperature"]
        made, valid = contrasted(strong, weak, alpha=setting["alpha"], beta=setting["beta"])
        assert torch.equal(valid, torch.tensor(z[f"out/{i}/valid"]).bool())
        torch.testing.assert_close(made, torch.tensor(z[f"out/{i}/logits"]), atol=1e-5, rtol=0)
        torch.testing.assert_close(made.softmax(1), torch.tensor(z[f"out/{i}/probability"]), atol=1e-5, rtol=0)
        assert ranking(made, valid, strong).argmax(1).tolist() == z[f"out/{i}/prediction"].tolist()


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.5), (0.3, 0.1), (0.0, 0.9)])
def test_a_slow_loop_over_images_and_classes(alpha: float, beta: float) -> None:
    strong, weak = logits()
    made, valid = contrasted(strong, weak, alpha=alpha, beta=beta)
    for image in range(len(strong)):
        p = oracles.softmax(strong[image].tolist())
        for c in range(strong.shape[1]):
            assert bool(valid[image, c]) == (p[c] >= alpha * max(p))
            want = (1 + beta) * strong[image, c].item() - beta * weak[image, c].item()
            assert made[image, c].item() == (pytest.approx(want, rel=1e-12) if valid[image, c] else -math.inf)


def test_a_known_answer() -> None:
    """Two classes: the second wins from beta = 1 / 19 on."""
    strong, weak = torch.tensor([[2.0, 1.9]]).double(), torch.tensor([[2.0, 0.0]]).double()
    for beta, winner in ((1 / 19 - 1e-6, 0), (1 / 19 + 1e-6, 1)):
        assert contrasted(strong, weak, alpha=0.1, beta=beta)[0].argmax().item() == winner


def test_settings_that_change_nothing() -> None:
    """beta = 0, or alpha = 1, or a weak pass that says what the strong one does."""
    strong, weak = logits()
    weak[0, 0] = -math.inf  # times 0 it is no number
    best = strong.argmax(1)
    for alpha, beta in product((0.0, 0.1, 0.5, 1.0), (0.0, 0.5, 0.9)):
        if beta == 0 or alpha == 1:
            some = weak.clamp(min=-1e9) if beta else weak[1:]
            made, _ = contrasted(strong[len(strong) - len(some) :], some, alpha=alpha, beta=beta)
            assert torch.equal(made.argmax(1), best[len(strong) - len(some) :])
        same, valid = contrasted(strong, strong, alpha=alpha, beta=beta)
        torch.testing.assert_close(same[valid], strong[valid], rtol=1e-12, atol=1e-12)


def test_constants_do_not_matter_and_classes_have_no_order() -> None:
    strong, weak = logits()
    made, valid = contrasted(strong, weak, alpha=0.2, beta=0.7)
    moved, same = contrasted(strong + 3, weak - 5, alpha=0.2, beta=0.7)
    assert torch.equal(valid, same)
    torch.testing.assert_close(made.softmax(1), moved.softmax(1), rtol=1e-10, atol=0)
    order = torch.randperm(strong.shape[1], generator=RANDOM)
    assert torch.equal(contrasted(strong[:, order], weak[:, order], alpha=0.2, beta=0.7)[0], made[:, order])


def test_the_mask_shrinks_and_holds_the_prediction() -> None:
    strong, weak = logits()
    before = torch.ones_like(strong).bool()
    for alpha in (0.0, 0.01, 0.1, 0.5, 1.0):
        made, valid = contrasted(strong, weak, alpha=alpha, beta=0.9)
        assert bool((valid <= before).all()) and bool(valid.gather(1, made.argmax(1, keepdim=True)).all())
        before = valid
        order = ranking(made, valid, strong)
        assert torch.equal(order.argmax(1), made.argmax(1))
        for row, kept, first in zip(order, valid, strong, strict=True):  # the rest follows by the strong logits
            assert row[~kept].numel() == 0 or row[~kept].max() < row[kept].min()
            assert torch.equal(row[~kept].argsort(), first[~kept].argsort())


def test_half_precision_is_left_before_anything_cancels() -> None:
    strong, weak = logits()
    made, _ = contrasted(strong.bfloat16(), weak.bfloat16(), alpha=0.0, beta=0.9)
    want, _ = contrasted(strong.bfloat16().float(), weak.bfloat16().float(), alpha=0.0, beta=0.9)
    assert made.dtype == torch.float32 and torch.equal(made, want)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (3, 0), (0, 8), (5, 5), (7, 2), (30, 12)])
def test_mcnemars_exact_test(gained: int, lost: int) -> None:
    n = gained + lost
    tail = sum(math.comb(n, i) for i in range(min(gained, lost) + 1))
    assert mcnemar(gained, lost) == pytest.approx(float(min(Fraction(1), Fraction(2 * tail, 2**n))), rel=1e-12)


# --- weak layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", of_kind("self_contrast_layer"))
def test_official_weak_layers(name: str) -> None:
    meta, z = read_case(name)
    config, width, hidden = meta["config"], z["x"].shape[2], z["param/Mlp/Dense_0/kernel"].shape[2]
    options = ROUTERS["tokens_choice_dropless"] | QUIET | {
        "num_experts": config["num_experts"], "k": config["k"], "renormalise": config["renormalised"],
        "shared_experts": config["shared_experts"],
    }  # fmt: skip
    made = make_layer(options, width, hidden, z["x"].shape[1], gelu="tanh", identical=True)
    state = layer_weights(z, "param/Mlp", "param/Router")
    if config["shared_experts"]:
        shared = layer_weights(z, "param/Shared", "none")
        state |= {key.replace("experts.", "shared."): value for key, value in shared.items()}
    made.load_state_dict(state)
    x = torch.tensor(z["x"])

    def compare(how: Weak, want: np.ndarray, given: Tensor | None = None) -> None:
        with torch.no_grad():
            got = weak_layer(made.eval(), how, given)(x)
        torch.testing.assert_close(got, torch.tensor(want), atol=1e-5, rtol=0)

    for number in range(1, config["num_experts"] + 1):
        compare(Weak("rank", number), z["out/y_rank"][number - 1])
        compare(Weak("top", number), z["out/y_top"][number - 1])
    if "out/y_random_1" in z:
        compare(Weak("random", 1), z["out/y_random_1"], torch.tensor(z["random_expert"]).long())


CHOOSING = ("tokens_choice", "tokens_choice_bpr", "tokens_choice_dropless", "experts_choice")


@pytest.mark.parametrize("router", CHOOSING)
def test_ranks_are_a_slow_loop_over_tokens(router: str) -> None:
    for renormalise in (False, True):
        moe = layer(router, k=2, renormalise=renormalise, capacity_factor=0.5, images_per_group=2, **QUIET)
        logits = [[oracles.softmax(row) for row in image] for image in (tokens() @ kernel(moe)).tolist()]
        weights = list(zip(*expert_weights(moe), strict=True))
        for rank in range(1, EXPERTS + 1):
            want = []
            for image, gates in zip(tokens().tolist(), logits, strict=True):
                best = [gate.index(sorted(gate, reverse=True)[rank - 1]) for gate in gates]
                scale = [1.0 if renormalise else gate[e] for gate, e in zip(gates, best, strict=True)]
                made = [oracles.mlp(token, *weights[e]) for token, e in zip(image, best, strict=True)]
                want.append([[s * v for v in row] for s, row in zip(scale, made, strict=True)])
            close(weak_layer(moe, Weak("rank", rank), None)(tokens()), want)


def kernel(moe: MoE) -> Tensor:
    return moe.router.get_parameter("gate.kernel").detach()


@pytest.mark.parametrize("router", CHOOSING)
def test_nobody_is_dropped_in_a_weak_pass(router: str) -> None:
    """Where the trained layer has room for few, and all ask for the same expert."""
    moe = layer(router, capacity_factor=0.3, images_per_group=2, **QUIET)
    with torch.no_grad():
        kernel(moe).zero_()
    x = tokens()
    for how in (Weak("rank", 1), Weak("rank", 3), Weak("random", 1)):
        drawn = torch.randint(EXPERTS, x.shape[:2]) if how.kind == "random" else None
        weak = weak_layer(moe, how, drawn)
        assert isinstance(weak, MoE)
        routing = weak.router(x)
        assert routing.token.sort().values.tolist() == list(range(x.shape[0] * TOKENS))
        assert int(routing.demand.sum()) == x.shape[0] * TOKENS == x.shape[0] * weak.router.rows(TOKENS)
        again = weak_layer(moe, how, None if drawn is None else drawn[:1])(x[:1])
        torch.testing.assert_close(again, weak(x)[:1])  # nor does a token depend on another image


def test_rank_1_is_the_model_with_one_choice() -> None:
    moe = layer("tokens_choice_dropless", k=2, **QUIET)
    single = layer("tokens_choice_dropless", k=1, **QUIET)
    single.load_state_dict(moe.state_dict())
    torch.testing.assert_close(weak_layer(moe, Weak("rank", 1), None)(tokens()), single(tokens()), rtol=1e-12, atol=0)


def test_all_ranks_together_are_all_experts() -> None:
    """With raw gates, which add up."""
    moe = layer("tokens_choice_dropless", k=2, **QUIET)
    parts = sum(weak_layer(moe, Weak("rank", r), None)(tokens()) for r in range(1, EXPERTS + 1))
    every = weak_layer(moe, Weak("top", EXPERTS), None)(tokens())
    torch.testing.assert_close(parts, every, rtol=1e-12, atol=1e-12)


def test_one_expert_is_the_mlp() -> None:
    moe = layer("tokens_choice", num_experts=1, k=1, **QUIET)
    want = [[oracles.mlp(t, *(w[0] for w in expert_weights(moe))) for t in image] for image in tokens().tolist()]
    close(weak_layer(moe, Weak("rank", 1), None)(tokens()), want)


def test_the_balancing_bias_chooses_and_does_not_weigh() -> None:
    moe = layer("tokens_choice_dropless", k=1, bias_rate=0.1, **QUIET)
    bias = torch.tensor([0.0, 5.0, 10.0])
    moe.router.get_buffer("balance.bias").copy_(bias)
    gates = (tokens() @ kernel(moe)).softmax(2)
    for rank, expert in ((1, 2), (2, 1), (3, 0)):
        weak = weak_layer(moe, Weak("rank", rank), None)
        assert isinstance(weak, MoE)
        routing = weak.router(tokens())
        assert routing.demand.tolist() == [len(gates) * TOKENS if e == expert else 0 for e in range(EXPERTS)]
        torch.testing.assert_close(routing.gate, gates[:, :, expert].flatten())


def test_a_gate_of_nothing_still_has_weight_one() -> None:
    moe = layer("tokens_choice_dropless", k=2, renormalise=True, **QUIET)
    with torch.no_grad():
        kernel(moe).mul_(1e4)
    weak = weak_layer(moe, Weak("rank", EXPERTS), None)
    assert isinstance(weak, MoE)
    assert torch.equal(weak.router(tokens()).gate, torch.ones(len(tokens()) * TOKENS, dtype=torch.float64))


@pytest.mark.parametrize("router", ["soft", "uniform_soft"])
def test_weak_mixtures(router: str) -> None:
    """A slow loop over the tokens' combine weights, and a layer that was built with fewer experts."""
    moe = layer(router, slots_per_expert=2)
    x = tokens()
    routing = moe.router(x)
    outputs = moe.experts(routing.dispatch(x)).transpose(0, 1).unflatten(0, (len(x), -1))  # b p e d
    slots = outputs.transpose(1, 2).flatten(1, 2)
    flat = routing.combine_weights.flatten(2)
    for rank in (1, 2, 2 * EXPERTS):
        best = flat.sort(dim=2, descending=True, stable=True).indices[:, :, rank - 1]
        want = torch.stack([slots[i, best[i]] for i in range(len(x))])
        torch.testing.assert_close(weak_layer(moe, Weak("slot_rank", rank), None)(x), want)
    mean = slots.mean(dim=1, keepdim=True).expand_as(x)
    torch.testing.assert_close(weak_layer(moe, Weak("flat"), None)(x), mean)
    kept = torch.tensor([0, 2])
    fewer = layer(router, num_experts=2, slots_per_expert=2)
    state = {
        key: value[kept] if key.startswith("experts.") else value[:, kept] if key.endswith("phi") else value
        for key, value in moe.state_dict().items()
    }
    fewer.load_state_dict(state)
    dropped = weak_layer(moe, Weak("drop", 2), kept)
    assert isinstance(dropped, MoE)
    assert torch.equal(dropped(x), fewer(x)) and dropped.flop(TOKENS) == fewer.flop(TOKENS)
    assert moe.router.num_experts == EXPERTS  # the layer itself is as it was


@pytest.mark.parametrize(("router", "how"), [("tokens_choice", Weak("rank", 2)), ("soft", Weak("drop", 1))])
def test_of_a_pruned_layer_the_experts_that_are_left(router: str, how: Weak) -> None:
    moe = layer(router, k=1, **QUIET)
    moe.prunable()
    moe.leave([0, 2])
    small = layer(router, k=1, num_experts=2, **QUIET)
    small.load_state_dict(moe.weights_left())
    given = torch.tensor([1]) if how.kind == "drop" else None
    torch.testing.assert_close(weak_layer(moe, how, given)(tokens()), weak_layer(small, how, given)(tokens()))


# --- two passes -------------------------------------------------------------------------------------------------------


DEEPER = (*TINY[:-1], "model.backbone.depth=3", "model.moe_blocks=[1]")
"""With plain blocks before and behind the one with experts."""


def model(router: str, *overrides: str) -> VisionTransformer:
    quiet = [] if router in ("soft", "uniform_soft") else ["model.router.noise_std=0"]
    quiet += ["model.router.load_weight=0"] if router.startswith("tokens") else []
    made = make(
        *TINY[:-1], "model.backbone.depth=3", "model.moe_blocks=[1]", f"model/router={router}", *quiet, *overrides
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.4)
    return made.eval()


def pixels(images: int = 6) -> Tensor:
    return torch.randn(images, 1, 8, 8, generator=torch.Generator().manual_seed(2))


def weak_logits(made: VisionTransformer, passed: WeakPass, x: Tensor, first: int = 0) -> Tensor:
    return passed(strong_pass(made, x)[1], first)


EVERY = [
    ("tokens_choice", "rank_2"), ("tokens_choice", "random_1"), ("tokens_choice_dropless", "skip"), ("soft", "flat"),
    ("experts_choice", "rank_1"), ("soft", "slot_rank_2"),
]  # fmt: skip


@pytest.mark.parametrize(("router", "word"), EVERY)
def test_the_shared_part_is_the_same_bits(router: str, word: str) -> None:
    """As a whole model with a weak layer in it; and the strong pass is the model's own."""
    made, x = model(router), pixels()
    strong, entering = strong_pass(made, x)
    assert torch.equal(strong, made(x))
    passed = WeakPass(made, weak_named(word))
    alone = passed(entering, 0)
    layer = passed.layer(1, entering, 0)
    whole, made.blocks[1].mlp = made.blocks[1].mlp, layer
    assert torch.equal(alone, made(x))
    made.blocks[1].mlp = whole
    assert torch.equal(strong, made(x)) and not torch.equal(alone, strong)
    one_by_one = torch.cat([weak_logits(made, passed, x[i : i + 1], i) for i in range(len(x))])
    torch.testing.assert_close(one_by_one, alone, rtol=1e-4, atol=1e-5)


def test_random_experts_do_not_depend_on_the_batch() -> None:
    made, x = model("tokens_choice"), pixels()
    passed, entering = WeakPass(made, Weak("random", 1), seed=3), strong_pass(made, x)[1]
    whole = passed._drawn(1, entering, 10)
    assert torch.equal(whole[2:4], passed._drawn(1, entering[2:4], 12))
    others = [
        WeakPass(made, Weak("random", 1), seed=s, draw=d)._drawn(i, entering, 10) for s, d, i in ((4, 0, 1), (3, 1, 1))
    ]
    assert all(not torch.equal(whole, each) for each in others)
    assert whole.unique().tolist() == [0, 1, 2, 3]


def test_the_strong_experts_as_the_weak_ones_change_nothing() -> None:
    made, x = model("tokens_choice_dropless", "model.router.k=2"), pixels()
    strong = made(x)
    weak = weak_logits(made, WeakPass(made, Weak("top", 2)), x)
    torch.testing.assert_close(weak, strong, rtol=1e-5, atol=1e-6)
    logits, valid = contrasted(strong, weak, alpha=0.1, beta=0.9)
    torch.testing.assert_close(logits[valid], strong[valid], rtol=1e-4, atol=1e-5)
    assert torch.equal(logits.argmax(1), strong.argmax(1))


@pytest.mark.parametrize("gates", ["trained", "one"])
def test_a_single_expert_can_be_given_weight_one(gates: str) -> None:
    made, x = model("tokens_choice"), pixels()
    layer = WeakPass(made, Weak("rank", 2), renormalise=gates == "one").layer(1, x, 0)
    assert isinstance(layer, MoE) and isinstance(layer.router, WeakChoice)
    ones = bool((layer.router(torch.randn(2, 4, 16)).gate == 1).all())
    assert ones == (gates == "one") and not made.blocks[1].mlp.router.renormalise


@pytest.mark.parametrize(("router", "word"), EVERY)
def test_the_counter_sees_what_the_formula_says(router: str, word: str) -> None:
    with torch.device("meta"):
        made = make(*DEEPER, f"model/router={router}").eval()
    for block in made.blocks:
        block.attn.fused_attn = False
    passed = WeakPass(made, weak_named(word))
    with counter() as seen, torch.no_grad():
        x = torch.empty(1, 1, 8, 8, device="meta")
        passed(strong_pass(made, x)[1], 0)
    one = account_model(made, batch=None, recompute=False).forward_flop
    ratio = flop_ratios(made, {word: passed}, {word + " alone": passed})
    assert seen.get_total_flops() == round(ratio[word] * one)
    with counter() as seen, torch.no_grad():
        strong = seen.get_total_flops()
        made(torch.empty(1, 1, 8, 8, device="meta"))
    assert seen.get_total_flops() - strong == one
    assert ratio[word + " alone"] < ratio[word]


@pytest.mark.parametrize(
    ("router", "word", "says"),
    [
        ("soft", "rank_2", r"contrast=rank_2: soft has no unchosen experts; it has drop_Q, slot_rank_R, flat, skip"),
        ("tokens_choice", "rank_9", r"with 4 experts, has rank_N for N from 1 to 4"),
        ("tokens_choice", "top_1", r"has no ranks of experts; it has rank_R, random_1, skip"),
        ("soft", "drop_4", r"has drop_N for N from 1 to 3"),
        ("identity", "skip", r"identity has nothing that could be routed otherwise"),
        ("uniform", "flat", r"none of which comes before another; it has skip"),
        ("mumoe_cp", "rank_1", r"gives every expert a part in every token; it has skip"),
        ("zero_computation", "rank_1", r"ranks are of different kinds; it has skip"),
        ("dense", "rank_1", r"dense has no experts"),
        ("tokens_choice", "rank", r"contrast=rank is none of rank_R, random_1, top_J"),
        ("tokens_choice", "random_2", r"has random_N for N from 1 to 1"),
    ],
)  # fmt: skip
def test_what_means_nothing_says_why(router: str, word: str, says: str) -> None:
    tiny = TINY if router != "dense" else TINY[:5]
    extra = ["model.expert_init=independent"] if router == "uniform" else []
    with pytest.raises(UsageError, match=says):
        check_weak(make(*tiny, f"model/router={router}", *extra), [word], router)


# --- the trial --------------------------------------------------------------------------------------------------------


def test_figures_under_a_mask_by_hand() -> None:
    """Three images of seven classes; of the last, the label is masked."""
    strong = torch.tensor([[5.0, 4, 0, 0, 0, 0, 0], [5.0, 4, 0, 0, 0, 0, 0], [9.0, 0, 3, 2, 1, 0.5, 0.4]])
    weak = torch.tensor([[5.0, 0, 0, 0, 0, 0, 0], [5.0, 3, 0, 0, 0, 0, 0], [9.0, 0, 0, 0, 0, 0, 0]])
    label = torch.tensor([1, 0, 4])
    made, valid = contrasted(strong, weak, alpha=0.1, beta=0.5)

    def said(order: Tensor, logits: Tensor) -> Answers:
        integers, numbers = answers_to(order, logits, label)
        return Answers(integers[0], integers[1], integers[2].bool(), integers[3], *numbers.double())

    alone, both = said(strong, strong), said(ranking(made, valid, strong), made)
    assert both.prediction.tolist() == [1, 0, 0] and both.choices.tolist() == [2, 2, 1]
    assert both.label_probability[2] == 0 and both.nll[2] == math.inf and both.in_top5.tolist() == [True] * 3
    line = line_of(Way("rank_2", 0, 0.5, 0.1), [both], alone, 15)
    assert (line["gained"], line["lost"], line["p"]) == (1, 0, 1.0)
    assert line["top1_pct"] == pytest.approx(200 / 3) and line["top1_change_pct"] == pytest.approx(100 / 3)
    assert line["label_masked_pct"] == pytest.approx(100 / 3) == line["changed_pct"]
    assert line["could_change_pct"] == pytest.approx(200 / 3)
    # 6, 6 - 4.5 + 1.5 * 4 ... by hand: (1.5 * 5 - 2.5, 1.5 * 4) and (5, 6 - 1.5)
    want = [math.log(1 + math.exp(5 - 6)), math.log(1 + math.exp(4.5 - 5))]
    assert line["nll_where_not_masked"] == pytest.approx(sum(want) / 2, rel=1e-6)


def test_of_equal_settings_the_milder_is_chosen() -> None:
    right = torch.tensor([1, 1, 0])
    zero = torch.zeros(3, dtype=torch.float64)

    def guessed(*predictions: int) -> Answers:
        return Answers(right, torch.tensor(predictions), right.bool(), right, zero, zero, zero)

    read = {
        Way("strong alone"): guessed(0, 0, 0),
        Way("rank_2", 0, 0.5, 0.1): guessed(1, 1, 1),
        Way("rank_2", 0, 0.1, 0.1): guessed(1, 0, 0),
        Way("rank_2", 0, 0.1, 0.5): guessed(0, 1, 0),
        Way("random_1", 0, 0.1, 0.1): guessed(1, 1, 0),
        Way("random_1", 1, 0.1, 0.1): guessed(0, 0, 1),
        Way("random_1", 0, 0.9, 0.1): guessed(1, 0, 0),
        Way("random_1", 1, 0.9, 0.1): guessed(1, 0, 0),
    }
    best, reached = best_settings(read)
    assert best == {"rank_2": Way("rank_2", 0, 0.1, 0.5), "random_1": Way("random_1", 0, 0.9, 0.1)}
    assert reached == {"rank_2": pytest.approx(200 / 3), "random_1": pytest.approx(200 / 3)}


def told(softmoe: Softmoe, *arguments: str) -> dict[str, Any]:
    answer = softmoe("evaluate", "format=json", *arguments)
    assert answer.code == 0, answer.err
    row: dict[str, Any] = json.loads(answer.out)
    return row


def test_a_trial_as_typed(softmoe: Softmoe, tmp_path: Path) -> None:
    """Choice on validation, figures that the file of predictions says again, and the same in any batches."""
    run = saved(tmp_path / "given.safetensors", 0, "model/router=tokens_choice", "model.router.k=2")
    words = (f"checkpoint={run}", "contrast=[rank_2,random_1,top_1,skip]", "contrast_beta=[0.5,5]")
    row = told(softmoe, *words, "contrast_alpha=[0,0.1]", "predictions=said.csv")
    lines = {line["way"]: line for line in row["contrast"]}
    controls = ["strong alone", "flip average", *(f"top_{j} alone" for j in range(1, 5))]
    assert list(lines) == [*controls, "rank_2", "random_1", "top_1", "skip"]
    assert row["contrast_chosen_on"] == "validation" and row["contrast_settings_tried"] == 16
    with (tmp_path / "said.csv").open() as file:
        said = list(csv.DictReader(file))
    label = [each["label"] for each in said]
    strong = [each["strong_prediction"] for each in said]
    assert 100 * sum(a == b for a, b in zip(label, strong, strict=True)) / len(said) == pytest.approx(row["top1_pct"])
    for way in ("flip average", "top_1 alone", "rank_2", "skip"):
        now = [each[f"{way.replace(' ', '_')}_prediction"] for each in said]
        gained = sum(a == true != b for a, b, true in zip(now, strong, label, strict=True))
        lost = sum(b == true != a for a, b, true in zip(now, strong, label, strict=True))
        line = lines[way]
        assert (line["gained"], line["lost"]) == (gained, lost) and line["p"] == mcnemar(gained, lost)
        assert line["top1_change_pct"] == pytest.approx(100 * (gained - lost) / len(said))
        assert line["p"] <= line["p_holm"] <= 1
    assert lines["random_1"]["draws"] == 3 and lines["random_1"]["top1_pct_low"] <= lines["random_1"]["top1_pct"]
    chosen = row["contrast_chosen"]
    name = chosen if chosen != "random_1" else "random_1_draw_0"
    assert [each["prediction"] for each in said] == [each[f"{name}_prediction"] for each in said]
    assert [line["ours"] for line in row["contrast"] if line["beta"]] == [False, False, False, True]


@pytest.mark.thorough
def test_what_a_trial_does_not_depend_on(softmoe: Softmoe, tmp_path: Path) -> None:
    """The size of a batch; and what was chosen on validation images is the best there."""
    run = saved(tmp_path / "given.safetensors", 0, "model/router=tokens_choice", "model.router.k=2")
    words = (f"checkpoint={run}", "contrast=[rank_2,random_1,top_1,skip]", "contrast_beta=[0.5,5]")
    row = told(softmoe, *words)
    again = told(softmoe, *words, "batch_size=31")
    lines, chosen = {line["way"]: line for line in row["contrast"]}, row["contrast_chosen"]
    keys = ("way", "beta", "alpha", "top1_pct", "gained", "lost", "flop_ratio")
    assert [[line[key] for key in keys] for line in again["contrast"]] == [
        [line[key] for key in keys] for line in row["contrast"]
    ]
    setting = [f"contrast_beta={lines[chosen]['beta']}", f"contrast_alpha={lines[chosen]['alpha']}"]
    there = told(softmoe, *words[:1], f"contrast={chosen}", *setting, "split=validation")
    (line,) = (each for each in there["contrast"] if each["way"] == chosen)
    assert line["top1_pct"] == pytest.approx(lines[chosen]["top1_pct_where_chosen"])
    assert there["contrast_chosen_on"] == "nothing"
    assert there["top1_pct"] == pytest.approx(row["contrast_strong_top1_pct_where_chosen"])


@pytest.mark.thorough
def test_trials_of_soft_models_and_of_the_scored_images(softmoe: Softmoe, tmp_path: Path) -> None:
    run = saved(tmp_path / "given.safetensors", 0, "model.router.slots_per_expert=2")
    words = (f"checkpoint={run}", "contrast=[drop_2,slot_rank_1,flat,skip]", "contrast_beta=[0.5,2]")
    row = told(softmoe, *words)
    assert [line["way"] for line in row["contrast"]][:2] == ["strong alone", "flip average"]
    assert all(line["ours"] for line in row["contrast"] if line["beta"])
    best = told(softmoe, *words, "contrast_by=scored")
    assert best["contrast_chosen_on"] == "the scored test"
    ours = {line["way"]: line["top1_pct"] for line in row["contrast"]}
    assert all(line["top1_pct"] >= ours[line["way"]] for line in best["contrast"])
    table = softmoe("evaluate", *words, "contrast_by=scored", "contrast_clock=true")
    for line in best["contrast"]:  # by the number of all settings that were tried on these images
        if line["beta"]:
            assert line["p_holm"] >= min(1.0, line["p"] * 2)
    assert "Holm over all 8" in table.out and "time over one pass" in table.out and "skip (ours)" in table.out
    assert "test images were read once" in softmoe("evaluate", *words).out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("contrast_by=scored",), "contrast_by=scored has no effect without contrast"),
        (("contrast_clock=true",), "contrast_clock=true has no effect without contrast"),
        (("contrast=[skip,skip]",), "is no list of weak activations, each once"),
        (("contrast=skip", "contrast_beta=0"), "contrast_beta=0 is out of range"),
        (("contrast=skip", "contrast_alpha=[0.1,2]"), "contrast_alpha=[0.1,2] is out of range"),
        (("contrast=skip", "contrast_beta=much"), "is neither a number nor a list of numbers"),
        (("contrast=skip", "contrast_gates=one"), "contrast_gates=one is about the gates of rank_R and top_J"),
    ],
)  # fmt: skip
def test_options_of_a_trial_that_cannot_work(softmoe: Softmoe, tmp_path: Path, words: Any, says: str) -> None:
    refused = softmoe("evaluate", f"checkpoint={saved(tmp_path / 'given.safetensors', 0)}", *words)
    assert refused.code == 2 and says in refused.err, refused
