"""The audit: it must find nothing where nothing depends on the batch, and the right thing where something does."""

import math
import re
from typing import Any

import pytest
import torch
import yaml
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from softmoe_cli.data.batches import eval_batches
from softmoe_cli.data.splits import ImageSet
from softmoe_cli.evaluate.audit import Audit, polysemanticity, summary
from softmoe_cli.evaluate.quality import Outcomes, outcomes
from softmoe_cli.model.vit import build, portable
from softmoe_cli.options.conf_files import conf_folder
from tests.conftest import TINY
from tests.oracles import compose

NO_AUTOCAST = torch.autocast("cpu", enabled=False)
Weights = dict[str, Tensor]


def images(n: int = 24) -> ImageSet:
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (n, 1, 8, 8), generator=rng, dtype=torch.uint8)
    return ImageSet(torch.randint(10, (n,), generator=rng), pixels, 8, 1)


def audit(router: str = "soft", *, changed: Weights | None = None, **options: Any) -> Audit:
    """Of a model with random weights, head, experts and gates included, so that predictions differ."""
    config = compose(*TINY)
    settings = yaml.safe_load((conf_folder() / "model" / "router" / f"{router}.yaml").read_text())
    config.model.router = settings if router == "dense" else settings | {"num_experts": 4} | options
    config.model = config.model.settled()
    torch.manual_seed(0)
    model = build(config.model, 10)
    if router != "dense":
        config.model.router = portable(config.model, model)["router"]
    weights = dict(model.state_dict())
    for key, value in weights.items():
        if key.startswith("head.") or ".experts." in key or key.endswith("gate.kernel"):
            weights[key] = torch.randn_like(value)

    def said(model: VisionTransformer, some: ImageSet, size: int) -> Outcomes:
        device = torch.device("cpu")
        given = eval_batches(some, config.data, image_size=8, in_chans=1, batch_size=size, device=device)
        return outcomes(model, given, loss="softmax", autocast=NO_AUTOCAST)

    return Audit(config.model, weights | (changed or {}), said, images(), batch_size=8)


@pytest.mark.parametrize("router", ["dense", "soft", "tokens_choice_bpr", "tokens_choice_dropless", "experts_choice"])
def test_neighbours_of_a_lone_image_have_no_influence(router: str) -> None:
    findings = list(audit(router).findings("neighbours"))
    assert len(findings) == 5
    for finding in findings:
        assert finding.changed_pct == 0 and finding.top1_change_pct == 0
        assert finding.probability_change_max < 1e-5, finding


@pytest.mark.parametrize("router", ["tokens_choice", "tokens_choice_bpr", "experts_choice"])
def test_neighbours_in_a_group_have_influence(router: str) -> None:
    made = audit(router, images_per_group=4, capacity_factor=0.5)
    findings = list(made.findings("neighbours"))
    same = [finding for finding in findings if "batches of 4" in finding.setting or "batches of 16" in finding.setting]
    assert len(same) == 2 and all(finding.changed_pct == 0 for finding in same)  # whole groups: the same neighbours
    others = [finding for finding in findings if finding not in same]
    assert len(others) == 4 and all(finding.probability_change_max > 1e-3 for finding in others)
    assert max(finding.changed_pct for finding in others) > 0


def test_with_room_for_all_capacity_is_that_of_the_router_without() -> None:
    made = audit("tokens_choice", k=2, capacity_factor=0.5)
    settings = [finding.setting for finding in made.findings("capacity")]
    assert settings == [f"{p} slots per expert (factor {p * 4 / 32:.3g}) for 4" for p in (1, 2, 3, 5, 6, 8, 16)]
    roomy = made.said(made._variant({"slots_per_expert": 16}, made.weights), made.images, 8)
    dropless = audit("tokens_choice_dropless", k=2)
    assert all(torch.equal(dropless.weights[key], value) for key, value in made.weights.items())
    torch.testing.assert_close(roomy.label_probability, dropless.reference.label_probability, rtol=1e-4, atol=1e-6)
    assert (made.reference.label_probability - roomy.label_probability).abs().max() > 1e-3


def test_a_slot_that_repeats_another_is_not_missed() -> None:
    """Two equal slots share what one of them alone has."""
    phi = audit(slots_per_expert=4).weights["blocks.1.mlp.router.phi"]
    twice = {"blocks.1.mlp.router.phi": phi[:, :, :1].expand_as(phi).contiguous()}
    findings = list(audit(slots_per_expert=4, changed=twice).findings("slots"))
    assert [finding.setting for finding in findings] == ["1 slots per expert for 4", "2 slots per expert for 4"]
    assert all(finding.changed_pct == 0 and finding.probability_change_max < 1e-5 for finding in findings)
    for finding in audit(slots_per_expert=4).findings("slots"):  # while slots that differ are
        assert finding.probability_change_max > 1e-4


@pytest.mark.parametrize("router", ["soft", "tokens_choice", "tokens_choice_dropless"])
def test_a_silenced_expert_is_one_whose_last_weights_are_zero(router: str) -> None:
    made = audit(router)
    layer = made.layers[1]
    changed = dict(made.weights)
    for name in ("w2", "b2"):
        key = f"blocks.1.mlp.experts.{name}"
        changed[key] = changed[key].index_fill(0, torch.tensor([1, 2]), 0)
    want = made.said(made._variant({}, changed), made.images, 8)
    with layer.silenced([1, 2]):
        got = made.said(made.model, made.images, 8)
    assert torch.equal(got.label_probability, want.label_probability)
    assert not torch.equal(got.label_probability, made.reference.label_probability)
    after = made.said(made.model, made.images, 8)
    assert torch.equal(after.label_probability, made.reference.label_probability)


def test_experts_in_turn_and_at_random() -> None:
    made = audit("tokens_choice")
    findings = list(made.findings("experts"))
    assert [finding.block for finding in findings] == [1] * 4 + [None] * 6
    shown = summary(findings)
    assert len(shown) == 8
    alone = findings[:4]
    mean, worst = (finding for finding in shown if finding.block == 1)
    assert mean.top1_pct == pytest.approx(sum(finding.top1_pct for finding in alone) / 4)
    assert worst.top1_pct == min(finding.top1_pct for finding in alone)
    assert all(finding.polysemanticity is None for finding in findings[4:])


def test_experts_of_a_pruned_model_keep_their_numbers() -> None:
    made = audit("tokens_choice", changed={"blocks.1.mlp.alive": torch.tensor([True, False, False, True])})
    findings = {each.setting: each for each in made.findings("experts") if each.block == 1}
    assert list(findings) == ["without expert 0", "without expert 3"]
    weights = made.weights | {key: made.weights[key].index_fill(0, torch.tensor(3), 0)
                              for key in ("blocks.1.mlp.experts.w2", "blocks.1.mlp.experts.b2")}  # fmt: skip
    want = made.said(made._variant({}, weights), made.images, 8)
    moved = (want.label_probability - made.reference.label_probability).abs().max().item()
    assert findings["without expert 3"].probability_change_max == moved > 0


def test_forbidden_kinds() -> None:
    """Without the kinds that cost nothing a token takes two MLPs; forbidding what nobody chooses changes nothing."""
    made = audit("zero_computation", num_constant=2)
    findings = list(made.findings("kinds"))
    said = [
        re.fullmatch(r"without (\w+) experts: ([\d.]+) MLPs per token for ([\d.]+)", each.setting) for each in findings
    ]
    assert [each and each[1] for each in said] == ["ffn", "constant", "copy", "zero"]
    assert len({each and each[3] for each in said}) == 1
    assert [float(each[2]) >= float(each[3]) for each in said if each] == [False, True, True, True]
    assert said[0] is not None and float(said[0][2]) == 0
    bare = audit("zero_computation", num_constant=0, num_copy=0, num_zero=1)
    (only,) = bare.findings("kinds")  # without MLPs a token would have one choice left, of two
    assert only.setting.startswith("without zero experts: 2.00 MLPs per token")
    again = bare.said(bare.model, bare.images, 8)
    assert torch.equal(again.label_probability, bare.reference.label_probability)
    alike = audit("zero_computation", num_constant=0, num_copy=0, num_zero=0, tau=1.0)
    assert list(alike.findings("kinds")) == [] and "do without" in str(alike.not_applicable("kinds"))
    assert "do without" in str(audit("tokens_choice").not_applicable("kinds"))


def predicted(*predictions: int) -> Outcomes:
    """Of six images, two of each of three classes."""
    label, said = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor(predictions)
    sure = torch.ones(6, dtype=torch.float64)
    return Outcomes(label, said, sure, sure, torch.ones(6, dtype=torch.bool), 0.0, 0.0, 3)


def test_polysemanticity_by_hand() -> None:
    """An expert that only class 1 needs; one that classes 0 and 1 need, class 0 twice as much; one that nobody does."""
    then = predicted(0, 0, 1, 1, 2, 0)
    assert polysemanticity(then, predicted(0, 0, 0, 0, 2, 0)) == 0
    found = polysemanticity(then, predicted(1, 1, 1, 0, 2, 0))
    assert found == pytest.approx(math.dist((2 / math.sqrt(5), 1 / math.sqrt(5)), (1, 0)))
    assert polysemanticity(then, predicted(0, 0, 1, 1, 2, 2)) is None


@pytest.mark.parametrize(
    ("router", "part", "reason"),
    [
        ("dense", "experts", "dense has no experts"),
        ("soft", "capacity", "no capacity"),
        ("tokens_choice_dropless", "capacity", "no capacity"),
        ("tokens_choice", "slots", "no slots of their own"),
        ("soft", "slots", "one slot"),
    ],
)
def test_what_does_not_apply_says_why(router: str, part: str, reason: str) -> None:
    made = audit(router)
    assert reason in (made.not_applicable(part) or "")
    assert made.not_applicable("neighbours") is None


def test_capacity_of_a_pruned_model_is_not_asked_for() -> None:
    alive = {"blocks.1.mlp.alive": torch.tensor([True, False, True, False])}
    assert audit("tokens_choice").not_applicable("capacity") is None
    assert "softmoe prune it first" in (audit("tokens_choice", changed=alive).not_applicable("capacity") or "")
    whole = {"blocks.1.mlp.alive": torch.ones(4, dtype=torch.bool)}
    assert audit("tokens_choice", changed=whole).not_applicable("capacity") is None
