"""A ViT that knows several tasks: what is an answer, what travels with the images, and what a loss makes of it."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from softmoe_cli.cost.flop import account, count_flop, on_meta
from softmoe_cli.device import compiled
from softmoe_cli.errors import UsageError
from softmoe_cli.evaluate.quality import classification_loss
from softmoe_cli.model.blocks import CarryingBlock
from softmoe_cli.model.tasks import TaskVit, valid_answers
from softmoe_cli.model.vit import build
from softmoe_cli.model.weights import require_described
from softmoe_cli.run.header import Source
from tests.mixes import mix
from tests.oracles import compose
from tests.processes import forked

TASKS = torch.tensor([0, 1, 1, 0])
FOUR = ("model.backbone.depth=4", "model.moe_blocks=[1,3]")


def made(*overrides: str) -> TaskVit:
    torch.manual_seed(0)
    model = build(compose(*mix(Path("x")), *overrides).model, 20)
    assert isinstance(model, TaskVit)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def images() -> torch.Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("router", ["task_choice", "dense", "tokens_choice", "zero_computation"])
def test_classes_of_other_tasks_are_no_answer(router: str) -> None:
    model, x = made(f"model/router={router}").eval(), images()
    logits = model(x, TASKS)
    assert torch.equal(logits.isneginf(), torch.tensor([[t == 1] * 10 + [t == 0] * 10 for t in (0, 1, 1, 0)]))
    alone = torch.cat([model(x[i : i + 1], TASKS[i : i + 1]) for i in range(4)])
    valid = valid_answers(model, (x, TASKS))
    assert valid is not None
    torch.testing.assert_close(alone[valid], logits[valid], atol=1e-5, rtol=1e-5)


def test_an_unknown_task_has_no_answer() -> None:
    model = made()
    with pytest.raises(ValueError, match="knows the tasks digits, fashion_mnist, and an image of an unknown task"):
        model(images())
    for task in (2, -1):
        with pytest.raises(ValueError, match="a task that is none of 0 to 1"):
            model(images(), TASKS.clone().fill_(task))


def test_a_file_that_says_other_classes_than_its_head_has_is_refused() -> None:
    model = made()
    card = compose(*mix(Path("x"))).model
    source = Source("odd.safetensors", "", model.state_dict(), {"model": asdict(card)})
    require_described(source, card)
    odd = replace(card, tasks={"digits": 10, "fashion_mnist": 11})
    with pytest.raises(UsageError, match=r"odd\.safetensors is of another .* have 21 classes, and the head has 20"):
        require_described(source, odd)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_loss_is_that_of_a_head_for_each_task(kind: str) -> None:
    """Its gradient too; other tasks' classes get none, whatever their logits are."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 20, generator=rng, dtype=torch.float64)
    own = torch.randn(4, 10, generator=rng, dtype=torch.float64).softmax(dim=1)
    targets, valid = torch.zeros(4, 20, dtype=torch.float64), torch.zeros(4, 20, dtype=torch.bool)
    parts = []
    for i, task in enumerate(TASKS.tolist()):
        part = slice(10 * task, 10 * task + 10)
        targets[i, part], valid[i, part] = own[i], True
        parts.append(logits[i, part].clone())
    small = torch.stack(parts).requires_grad_()
    whole = logits.masked_fill(~valid, -torch.inf).requires_grad_()
    a, b = classification_loss(whole, targets, kind, valid), classification_loss(small, own, kind)
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    (a_grad,), (b_grad,) = torch.autograd.grad(a, whole), torch.autograd.grad(b, small)
    torch.testing.assert_close(a_grad[valid].view(4, 10), b_grad, atol=1e-12, rtol=1e-12)
    assert not a_grad[~valid].any()


def test_token_level_first_and_task_level_later() -> None:
    """The task goes through blocks that do not ask for it, and reaches the ones that do."""
    model = made(*FOUR, "model/router=tokens_choice", "model.blocks={3: task_choice}").eval()
    assert [type(block) for block in model.blocks] == [CarryingBlock] * 4
    x, seen = images(), []
    model.blocks[3].mlp.router.register_forward_hook(lambda _m, _i, routing: seen.append(routing))
    model(x, TASKS)
    assert torch.equal(seen[0].carried.task, TASKS)
    model.blocks[3].mlp.router.table.data[1] = model.blocks[3].mlp.router.table.data[0]
    same, other = model.forward_features(x, TASKS), model.forward_features(x, 1 - TASKS)
    assert torch.equal(same, other)  # tasks that take the same experts differ in nothing else


@pytest.mark.thorough
def test_it_compiles_as_one_graph(tmp_path: Path) -> None:
    told = tmp_path / "told.txt"
    assert forked(told, compile_all, timeout=600) == 0, told.read_text()


def compile_all() -> None:
    """By task, by token first and by task later, and with no router at all: outputs and gradients."""
    for words in (("model.router.noise_std=0",), (*FOUR, "model.blocks={1: tokens_choice}"), ("model/router=dense",)):
        torch.compiler.reset()
        model = made(*words).eval()
        graph = compiled(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(graph(images(), TASKS), model(images(), TASKS))
        found = []
        for each in (model, graph):
            model.zero_grad()
            F.cross_entropy(each(images(), TASKS), torch.tensor([0, 10, 11, 1])).backward()
            found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_recomputation_gives_the_same_gradients() -> None:
    model, x = made("model.router.noise_std=0"), images()
    found = []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        logits = model.train()(x, TASKS)
        F.cross_entropy(logits, torch.tensor([3, 14, 11, 0])).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("router", ["task_choice", "static_tasks"])
def test_costs_by_formula_and_by_counter(router: str) -> None:
    """A decision costs nothing: what is computed is k experts for each token, and 4 d h more for each expert more."""
    words = (*mix(Path("x"), f"model/router={router}", *FOUR), "model.expert_init=independent")
    config = compose(*words).model
    cost = account(config, 20, batch=8)
    forward, step = count_flop(on_meta(config, 20), batch=8)
    assert (forward.flop / forward.images, step.flop / step.images) == (cost.forward_flop, cost.train_flop)
    more = account(compose(*words, "model.router.k=3").model, 20, batch=8)
    assert more.forward_flop - cost.forward_flop == 2 * 16 * 4 * 16 * 32
    experts = next(part for part in cost.parts if part.name == "experts")
    assert (experts.params, experts.active_params) == (2 * 4 * (2 * 16 * 32 + 16 + 32), 2 * 2 * (2 * 16 * 32 + 16 + 32))
