"""One expert that is left is an MLP: the folded ViT computes what the mixture does, at a dense model's cost."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from softmoe_cli.cost.flop import account, count_forward, on_meta
from softmoe_cli.model.vit import build
from softmoe_cli.moe.layer import MoE
from softmoe_cli.prune.fold import folded_model, folded_weights, timm_entry
from softmoe_cli.prune.smaller import smaller_model, smaller_weights
from tests.conftest import TINY
from tests.oracles import compose
from tests.prune.test_command import DENSE


@pytest.mark.parametrize("name", DENSE)
def test_one_expert_is_a_plain_vit(name: str) -> None:
    router, options = DENSE[name]
    config = compose(*TINY, f"model/router={router}", *options).model
    torch.manual_seed(0)
    vit = build(config, 10).double().eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for number, layer in enumerate(block.mlp for block in vit.blocks if isinstance(block.mlp, MoE)):
        layer.prunable()
        layer.leave([2 - number])
    model, weights = folded_model(config, vit), folded_weights(config, vit)
    dense = build(model, 10).double().eval()
    dense.load_state_dict(weights)
    x = torch.randn(9, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        want, got = vit(x), dense(x)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
        assert torch.equal(got.argmax(1), want.argmax(1))
        entry = timm_entry(model)
        plain = timm.create_model(entry["architecture"], num_classes=10, in_chans=1, **entry["model_args"]).double()
        assert type(plain) is VisionTransformer
        plain.load_state_dict(weights)
        torch.testing.assert_close(plain.eval()(x), want, atol=1e-12, rtol=1e-12)
    assert account(model, 10).forward_flop == count_forward(on_meta(model, 10)).flop


def test_blocks_with_routers_of_their_own_keep_them() -> None:
    """Each with as many experts as it has left."""
    words = ("model/router=tokens_choice_dropless", "model.moe_blocks=[0,1]", "+model.blocks.0=soft")
    config = compose(*TINY, *words).model
    torch.manual_seed(0)
    vit = build(config, 10).double().eval()
    for place, left in ((0, [1, 2, 5]), (1, [0, 3])):
        vit.blocks[place].mlp.prunable()
        vit.blocks[place].mlp.leave(left)
    model, weights = smaller_model(config, vit), smaller_weights(vit)
    assert {model.router_of(place)["num_experts"] for place in (0,)} == {3} and model.router_of(1)["num_experts"] == 2
    assert "soft" in model.router_of(0)["_target_"] and "dropless" in model.router_of(1)["_target_"]
    new = build(model, 10).double().eval()
    new.load_state_dict(weights)
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(new(x), vit(x), atol=1e-12, rtol=1e-12)
