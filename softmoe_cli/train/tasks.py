"""What a run on a mix does and says beside others: the tasks' shares, their experts, and how these change."""

from collections.abc import Mapping, Sequence
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from softmoe_cli.config.run import Config
from softmoe_cli.data.mix import MixedSet, task_shares
from softmoe_cli.data.splits import ImageSet
from softmoe_cli.moe.by_task import TaskRouter

TAKEN_BY = "tasks_of_expert_{}_block_{}"
"""In validation rows: how many tasks take an expert."""


def routers_by_task(model: VisionTransformer) -> dict[int, TaskRouter]:
    """The routers that decide for tasks, by block."""
    routers = {place: getattr(block.mlp, "router", None) for place, block in enumerate(model.blocks)}
    return {place: router for place, router in routers.items() if isinstance(router, TaskRouter)}


def tell_shares(model: VisionTransformer, config: Config, images: ImageSet) -> None:
    """Tells routers how large a part of training each task is, which they balance experts by."""
    if isinstance(images, MixedSet):
        sizes = [int((images.tasks == task).sum()) for task in range(len(images.parts))]
        for router in routers_by_task(model).values():
            router.told_shares(task_shares(sizes, config.data.temperature).tolist())


def task_rows(model: VisionTransformer, tasks: Mapping[str, int] | None) -> list[tuple[str, str]]:
    """The experts of each task in each block, with titles for the header; and how many experts no task takes."""
    of_blocks = {place: (router, router.settled()[1]) for place, router in routers_by_task(model).items()}
    if not of_blocks or tasks is None:
        return []
    found = []
    for task, name in enumerate(tasks):
        experts = {place: " ".join(map(str, sorted(chosen[task]))) for place, (_, chosen) in of_blocks.items()}
        found.append(("experts", f"{name}: " + "; ".join(f"block {place}: {own}" for place, own in experts.items())))
    idle = {
        place: f"{router.num_experts - router.num_tasks * router.k} of {router.num_experts} in block {place}"
        for place, (router, _) in of_blocks.items()
        if router.num_experts > router.num_tasks * router.k
    }
    if idle:
        found.append(("idle experts", f"at least {', '.join(idle.values())}: {len(tasks)} tasks take no more"))
    return found


def told_by_name(told: Mapping[str, Any], tasks: Mapping[str, int] | None) -> dict[str, Any]:
    """What a look says of a block beside numbers, with the tasks by their names; of a single task, which has no name,
    nothing: which experts it takes says its model."""
    if tasks is None or "task_experts" not in told:
        return {key: each for key, each in told.items() if key != "task_experts"}
    return {**told, "task_experts": dict(zip(tasks, map(sorted, told["task_experts"]), strict=True))}


def changes(rows: Sequence[Mapping[str, Any]], block: int, now: Mapping[str, Any]) -> dict[str, float]:
    """How many tasks take other experts in a block than at the last look before, which `rows` of routing.jsonl tell;
    nothing at the first look, or where no router decides for tasks."""
    if "task_experts" not in now:
        return {}
    last = next((row for row in reversed(rows) if row["block"] == block and "task_experts" in row), None)
    if last is None:
        return {}
    return {"task_changes": float(sum(last["task_experts"][name] != own for name, own in now["task_experts"].items()))}


def taken_by(block: int, now: Mapping[str, Any], experts: int) -> dict[str, float]:
    """How many tasks take each expert of a block."""
    of_tasks = [expert for own in now.get("task_experts", {}).values() for expert in own]
    return {TAKEN_BY.format(expert, block): float(of_tasks.count(expert)) for expert in range(experts)}
