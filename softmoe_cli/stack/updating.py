"""One update of all models of a stack, where they have the same rates and are equally far."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from softmoe_cli.optim import FusedAdamW, state_of


class Updates:
    """AdamW with stacked moments. What each run's own optimizer keeps are views of them from now on."""

    def __init__(self, models: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        name_of = {parameter: name for name, parameter in models[0].named_parameters()}
        self._groups = [(group, [name_of[p] for p in group["params"]]) for group in optimizers[0].param_groups]
        names = [name for _, own in self._groups for name in own]
        first = models[0].get_parameter(names[0])
        self._steps = torch.zeros(len(names), len(models), device=first.device)
        self._moments: dict[str, list[Tensor]] = {}
        for name, step in zip(names, self._steps, strict=True):
            own = [model.get_parameter(name) for model in models]
            kept = [optimizer.state.get(p, {}) for p, optimizer in zip(own, optimizers, strict=True)]
            moments = [torch.stack([state.get(key, torch.zeros_like(p)) for p, state in zip(own, kept, strict=True)])
                       for key in ("exp_avg", "exp_avg_sq")]  # fmt: skip
            step.copy_(torch.stack([torch.as_tensor(state.get("step", 0.0)) for state in kept]))
            for place, (parameter, optimizer) in enumerate(zip(own, optimizers, strict=True)):
                views = {"step": step[place], "exp_avg": moments[0][place], "exp_avg_sq": moments[1][place]}
                optimizer.state[parameter] = views
            self._moments[name] = [step[0], *moments]

    @torch.no_grad()
    def step(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], lr: float) -> None:
        """One step with this rate, times each group's share. Those without a gradient stay as they are."""
        for group, own in self._groups:
            names = [name for name in own if name in gradients]
            steps, first, second = ([self._moments[name][i] for name in names] for i in range(3))
            beta1, beta2 = group["betas"]
            adamw(
                [weights[name] for name in names], [gradients[name] for name in names], first, second, [], steps,
                fused=True, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2, lr=lr * group["lr_scale"],
                weight_decay=group["weight_decay"], eps=group["eps"],
            )  # fmt: skip
        self._steps[:, 1:] = self._steps[:, :1]


def alike(models: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    """Whether one update of all is what each optimizer would make of its own: AdamW with moments in float32, after as
    many steps, with the same decay and shares of the rate (which may be written so that they follow the seed)."""
    if {type(optimizer) for optimizer in optimizers} not in ({FusedAdamW}, {torch.optim.AdamW}):  # or offloaded, SGD
        return False
    rates = [
        [{key: group[key] for key in ("betas", "eps", "weight_decay", "lr_scale")} for group in optimizer.param_groups]
        for optimizer in optimizers
    ]
    if any(each != rates[0] for each in rates):
        return False
    steps = [
        [float(state_of(optimizer, p).get("step", 0.0)) for p in model.parameters()]
        for model, optimizer in zip(models, optimizers, strict=True)
    ]
    return all(each == steps[0] for each in steps)


def norms(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients of each model, (n)."""
    of_each = torch.stack([torch.linalg.vector_norm(each.view(len(each), -1), dim=1) for each in gradients])
    return torch.linalg.vector_norm(of_each, dim=0)


def clip(gradients: Sequence[Tensor], norm: Tensor, most: float | None) -> None:
    """Shortens the gradients of each model whose norm is larger than `most`, as the loop does."""
    if most is not None:
        shorter = (most / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(list(gradients), [shorter.view(-1, *[1] * (g.ndim - 1)) for g in gradients])
