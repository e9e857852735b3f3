"""Routers that decide for tasks, against loops over images and tokens, and what a decision may depend on."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from softmoe_cli.errors import UsageError
from softmoe_cli.model.router import make_layer
from softmoe_cli.moe.by_task import TaskRouter, overlap
from softmoe_cli.moe.layer import MoE
from softmoe_cli.moe.routing import Carried
from tests.routers import ROUTERS

DIM, HIDDEN, TOKENS, T, E, K = 8, 12, 5, 3, 5, 2
TASKS = torch.tensor([2, 0, 1, 2])


def router_of(made: MoE) -> Any:
    """Its router, whatever that is."""
    return made.router


def layer(name: str = "task_choice", **changes: Any) -> MoE:
    """In evaluation, with random weights, in float64."""
    torch.manual_seed(0)
    options = ROUTERS[name] | {"num_tasks": T, "num_experts": E, "k": K} | changes
    made = make_layer(options, DIM, HIDDEN, TOKENS, gelu="none", identical=False).double().eval()
    assert isinstance(made, MoE)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def images(n: int = len(TASKS)) -> Tensor:
    return torch.randn(n, TOKENS, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run(made: MoE, x: Tensor, task: Tensor = TASKS, keep: Tensor | None = None) -> Tensor:
    y, _ = made(x, keep, Carried(task=task))
    return y


def expert(made: MoE, number: int, token: Tensor) -> Tensor:
    e = made.experts
    return F.gelu(token @ e.w1[number] + e.b1[number]) @ e.w2[number] + e.b2[number]


def chosen_by_hand(made: MoE, task: int, renormalise: bool) -> list[tuple[int, float]]:
    """The k experts of a row of logits, and their gates."""
    row = router_of(made).table[task].tolist()
    best = sorted(range(len(row)), key=lambda i: (-row[i], i))[: router_of(made).k]
    total = sum(math.exp(row[i]) for i in (best if renormalise else range(len(row))))
    return [(i, math.exp(row[i]) / total) for i in best]


@pytest.mark.parametrize("renormalise", [True, False])
def test_task_choice_is_a_loop_over_images(renormalise: bool) -> None:
    made, x = layer(renormalise=renormalise), images()
    want = torch.zeros_like(x)
    for b, task in enumerate(TASKS.tolist()):
        for n in range(TOKENS):
            for number, gate in chosen_by_hand(made, task, renormalise):
                want[b, n] += gate * expert(made, number, x[b, n])
    torch.testing.assert_close(run(made, x), want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("assigned", "of_tasks"), [
    (None, [[0, 1], [2, 3], [4, 0]]), ([[1, 4], [0, 2], [3, 1]], [[1, 4], [0, 2], [3, 1]]),
])  # fmt: skip
def test_static_tasks_is_a_rule(assigned: list[list[int]] | None, of_tasks: list[list[int]]) -> None:
    made, x = layer("static_tasks", assigned=assigned), images()
    want = torch.zeros_like(x)
    for b, task in enumerate(TASKS.tolist()):
        for n in range(TOKENS):
            want[b, n] = sum(expert(made, number, x[b, n]) for number in of_tasks[task]) / K
    torch.testing.assert_close(run(made, x), want, atol=1e-12, rtol=1e-12)
    assert isinstance(made.router, TaskRouter) and router_of(made).settled()[1] == of_tasks


@pytest.mark.parametrize("name", ["task_choice", "static_tasks"])
def test_a_decision_depends_on_the_task_alone(name: str) -> None:
    """Neither on pixels nor on what else is in the batch; padding is nothing, tokens are alike."""
    made, x = layer(name), images()
    with torch.no_grad():
        decided = [made.router(each, None, Carried(task=TASKS)) for each in (x, 100 * x.flip(0))]
        assert torch.equal(decided[0].token, decided[1].token) and torch.equal(decided[0].gate, decided[1].gate)
        whole = run(made, x)
        alone = torch.cat([run(made, x[i : i + 1], TASKS[i : i + 1]) for i in range(len(x))])
        torch.testing.assert_close(alone, whole, atol=1e-12, rtol=1e-12)
        order = torch.randperm(TOKENS)
        torch.testing.assert_close(run(made, x[:, order]), whole[:, order], atol=1e-12, rtol=1e-12)
        keep = torch.arange(TOKENS).expand(len(x), -1) < 3
        padded = run(made, x, TASKS, keep)
        torch.testing.assert_close(padded[:, :3], whole[:, :3], atol=1e-12, rtol=1e-12)
        assert not padded[:, 3:].any()


def test_all_experts_is_a_weighted_mean_and_one_is_the_mlp() -> None:
    x = images()
    every = layer("static_tasks", num_experts=K)
    mean = sum(expert(every, i, x) for i in range(K)) / K
    torch.testing.assert_close(run(every, x), torch.as_tensor(mean), atol=1e-12, rtol=1e-12)
    one = layer(num_experts=1, k=1)
    torch.testing.assert_close(run(one, x), expert(one, 0, x), atol=1e-12, rtol=1e-12)


def test_one_task_is_a_wider_mlp() -> None:
    """Of k h hidden units, gradients included up to the gates; and it needs no task."""
    made = layer(num_tasks=1)
    x, leaf = images(), images().requires_grad_()
    gates, ((a, b),) = router_of(made).settled()
    e, c = made.experts, gates[0]
    w1, b1 = torch.cat([e.w1[a], e.w1[b]], dim=1), torch.cat([e.b1[a], e.b1[b]])
    w2, b2 = torch.cat([c[0] * e.w2[a], c[1] * e.w2[b]]), c[0] * e.b2[a] + c[1] * e.b2[b]
    weights = [each.detach().requires_grad_() for each in (w1, b1, w2, b2)]
    y, want = made(leaf), F.gelu(x @ weights[0] + weights[1]) @ weights[2] + weights[3]
    torch.testing.assert_close(y, want, atol=1e-12, rtol=1e-12)
    y.square().sum().backward()
    want.square().sum().backward()
    assert e.w1.grad is not None and e.w2.grad is not None and weights[0].grad is not None
    torch.testing.assert_close(torch.cat([e.w1.grad[a], e.w1.grad[b]], dim=1), weights[0].grad, atol=1e-9, rtol=1e-9)
    assert weights[2].grad is not None
    scaled = torch.cat([c[0] * weights[2].grad[:HIDDEN], c[1] * weights[2].grad[HIDDEN:]])
    torch.testing.assert_close(torch.cat([e.w2.grad[a], e.w2.grad[b]]), scaled, atol=1e-9, rtol=1e-9)


def test_rows_move_by_noise_and_by_balance() -> None:
    """Without noise a task meets its k experts only; the balance alone reaches all logits of its row."""
    made = layer(noise_std=50.0).train()
    met = {tuple(router_of(made).decided()[1][0].tolist()) for _ in range(40)}
    assert len(met) > 3
    quiet = layer(noise_std=0.0, balance_weight=0.0).train()
    y, _ = quiet(images(), None, Carried(task=TASKS))
    y.sum().backward()
    table = router_of(quiet).table
    assert isinstance(table, nn.Parameter) and table.grad is not None
    ((a, b),) = router_of(quiet).settled()[1][:1]
    assert (table.grad[0].abs() > 1e-9).nonzero()[:, 0].tolist() == sorted([a, b])
    balanced = layer(noise_std=0.0, balance_weight=1.0)
    balanced.router(images(), None, Carried(task=TASKS)).aux_loss.backward()
    assert router_of(balanced).table.grad.ne(0).all()


def test_balance_is_over_tasks_by_their_shares_of_images() -> None:
    """Whatever the batch has; by hand."""
    made = layer(balance_weight=0.5)
    router_of(made).told_shares([0.5, 0.3, 0.2])
    gates = router_of(made).table.softmax(dim=1)
    load = 0.5 * gates[0] + 0.3 * gates[1] + 0.2 * gates[2]
    want = 0.5 * load.var(correction=0) / load.mean() ** 2
    for some in (TASKS, torch.zeros(4, dtype=torch.int64)):
        loss = made.router(images(), None, Carried(task=some)).aux_loss
        torch.testing.assert_close(loss, want, atol=1e-7, rtol=1e-6)  # shares are kept in single precision


def test_statistics_tell_choices_and_their_overlap() -> None:
    made = layer("static_tasks", num_experts=4)
    with torch.no_grad():
        routing = made.router(images(), None, Carried(task=TASKS))
    assert routing.told() == {"task_experts": [[0, 1], [2, 3], [0, 1]]}
    assert routing.statistics()["task_overlap"] == pytest.approx(1 / 3)
    assert overlap([[0, 1], [1, 2]]) == pytest.approx(1 / 3) and overlap([[0, 1]]) == 1.0


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("task_choice", {"num_tasks": None}, "classes of one set are none, as which class an image has is what"),
        ("task_choice", {"k": 1}, "renormalise=true with k=1 makes every gate 1, which teaches the router nothing"),
        ("task_choice", {"k": 9}, "k=9 experts per token must be from 1 to num_experts=5"),
        ("task_choice", {"balance_weight": -1.0}, "balance_weight=-1.0 must not be negative"),
        ("static_tasks", {"assigned": [[0, 1], [2, 3]]}, "does not give 2 different experts to each of 3 tasks"),
        ("static_tasks", {"assigned": [[0, 1], [2, 2], [3, 4]]}, "does not give 2 different experts"),
        ("static_tasks", {"assigned": [[0, 1], [2, 3], [3, 5]]}, "is not of the experts 0 to 4"),
        ("static_tasks", {"assigned": [0, 1, 2]}, "assigned=[0, 1, 2] is of type list; it must be list of list of int"),
        ("static_tasks", {"assigned": [[0, 1.0], [2, 3], [3, 4]]}, "it must be list of list of int or null"),
    ],
)  # fmt: skip
def test_what_cannot_be(name: str, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as told:
        layer(name, **changes)
    assert says in str(told.value)


def test_a_decision_needs_the_task() -> None:
    with pytest.raises(ValueError, match="decides by the task of each image, of 3, and none is given"):
        layer()(images())
