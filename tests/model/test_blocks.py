"""What travels with the forward pass: MoE++'s logits, from block to block, whatever else is done with the model."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from softmoe_cli.device import compiled
from softmoe_cli.export.make import distance, trace, write_torch_export
from softmoe_cli.model.blocks import CarryingBlock
from softmoe_cli.model.vit import build
from softmoe_cli.moe.layer import MoE
from softmoe_cli.moe.routing import Carried, Routing, routings
from tests.oracles import compose
from tests.processes import forked

SIZES = ("model.backbone.width=16", "model.backbone.depth=4", "model.backbone.heads=2", "model.backbone.mlp_width=32")


def vit(*overrides: str, blocks: str = "[0,2,3]") -> VisionTransformer:
    """With a dense block between the first layer and the others, and random weights."""
    torch.manual_seed(0)
    line = (*SIZES, "model/router=zero_computation", "model.router.num_experts=4", f"model.moe_blocks={blocks}")
    model = build(compose(*line, *overrides).model, 10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def images(number: int = 6) -> Tensor:
    return torch.randn(number, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def by_hand(model: VisionTransformer, x: Tensor) -> Iterator[Tensor]:
    """The tokens behind every block, each block's two lines written out."""
    tokens, carried = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x)))), Carried()
    for block in model.blocks:
        tokens = tokens + block.attn(block.norm1(tokens))
        inner = block.norm2(tokens)
        if isinstance(block.mlp, MoE):
            made, carried = block.mlp(inner, None, carried)
        else:
            made = block.mlp(inner)
        tokens = tokens + made
        yield tokens


@pytest.mark.parametrize("training", [False, True])
def test_logits_reach_the_next_layer_through_dense_blocks(training: bool) -> None:
    model, x = vit().train(training), images()
    assert [type(block) for block in model.blocks] == [CarryingBlock] * 4
    *_, last = by_hand(model, x)
    assert torch.equal(model.forward_features(x), model.norm(last))
    with_residual = [block.mlp.router.residual is not None for block in model.blocks if isinstance(block.mlp, MoE)]
    assert with_residual == [False, True, True]
    model.blocks[2].mlp.router.residual.weight.data.zero_()
    assert not torch.equal(model.forward_features(x), model.norm(last))


def test_other_models_keep_timms_blocks() -> None:
    for model in (vit("model.router.gating_residual=false"), vit(blocks="[1]"), vit(blocks="[2,3]")):
        layers = [place for place, block in enumerate(model.blocks) if isinstance(block.mlp, MoE)]
        joined = [place for place, block in enumerate(model.blocks) if type(block) is CarryingBlock]
        assert joined == ([2, 3] if layers == [2, 3] else [])
        assert {type(block) for block in model.blocks} <= {Block, CarryingBlock}
        assert {name.split(".")[2] for name in model.state_dict() if name.startswith("blocks.")} == {
            "norm1", "attn", "norm2", "mlp",
        }  # fmt: skip


def test_nothing_stays_on_a_module() -> None:
    """Passes of other images, sizes and modes in between change nothing, and no module holds a tensor of a pass."""
    model, x = vit().train(), images()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    first = model(x)
    with torch.no_grad():
        model.eval()(images(3).flip(0))
    assert torch.equal(model.train()(x), first)
    for name, module in model.named_modules():
        assert set(vars(module)) == before[name]
        assert not [key for key, value in vars(module).items() if isinstance(value, Tensor | Carried)]


def gradients(model: VisionTransformer, x: Tensor, parts: int = 1) -> list[Tensor]:
    model.zero_grad()
    with routings(model) as seen:
        for part in x.chunk(parts):
            seen.clear()
            logits = model(part)
            loss = logits.square().sum() / len(x) + sum((r.aux_loss for r in seen), torch.zeros(())) / parts
            loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_recomputation_changes_no_bit() -> None:
    model, x = vit().train(), images()
    want = gradients(model, x)
    assert len(want) == len(list(model.parameters()))
    model.set_grad_checkpointing(True)
    for got, plain in zip(gradients(model, x), want, strict=True):
        assert torch.equal(got, plain)


def test_parts_of_a_batch_add_up() -> None:
    """Groups are whole images, so that room in training does not depend on how a batch is cut."""
    model, x = vit("model.router.images_per_group=2").double().train(), images(12).double()
    for got, whole in zip(gradients(model, x, 3), gradients(model, x), strict=True):
        torch.testing.assert_close(got, whole, atol=1e-12, rtol=1e-9)


def test_first_logits_get_gradients_from_later_layers() -> None:
    model = vit().eval()
    with routings(model) as seen:
        model(images())
        assert isinstance(seen[0], Routing)
        first = seen[0].carried
        assert first is not None and first.logits is not None
        (got,) = torch.autograd.grad(seen[-1].aux_loss, first.logits)
    assert got.abs().max() > 0


@pytest.mark.thorough
def test_torch_export_takes_the_whole_model(tmp_path: Path) -> None:
    model, x = vit().eval(), images(5)
    with torch.no_grad():
        expected = model(x)
    program = write_torch_export(trace(model, images(2), None, "zero_computation"), tmp_path, "zero_computation")
    assert distance("", program, x, expected, None)["max_difference"] < 1e-4


@pytest.mark.thorough
def test_it_compiles_as_one_graph(tmp_path: Path) -> None:
    told = tmp_path / "told.txt"
    assert forked(told, compile_it, timeout=600) == 0, told.read_text()


def compile_it() -> None:
    model, x = vit().train(), images()
    graph = compiled(model, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    got = torch.autograd.grad(graph(x).square().sum(), list(model.parameters()))
    for ours, theirs in itertools.zip_longest(got, want):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
