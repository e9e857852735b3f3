"""What a run says at its end, from its result row alone: a run that has ended before says it again, without torch."""

import shlex
from pathlib import Path
from typing import Any

from softmoe_cli.compare.intervals import at_chance
from softmoe_cli.config.run import Config
from softmoe_cli.run import rows
from softmoe_cli.run.finished import not_looked_at
from softmoe_cli.terminal import Screen
from softmoe_cli.text import flop, in_words, si


def close_again(screen: Screen, config: Config, result: dict[str, Any], folder: Path) -> None:
    """What a run says that has ended before."""
    screen.say(f"{folder} is finished; nothing to do")
    if lacking := not_looked_at(config, result, folder):
        screen.say(lacking)
    close(screen, result, folder)


def close(screen: Screen, result: dict[str, Any], folder: Path) -> None:
    """The closing table, and what may be typed next: lines of their own, to be copied whole."""
    screen.table("result", shown(result, folder))
    screen.table("next", {})
    screen.say(f"  softmoe evaluate checkpoint={shlex.quote(str(folder))}")
    screen.say(f"  softmoe compare {shlex.quote(str(folder.parent))}")


def shown(result: dict[str, Any], folder: Path) -> dict[str, str]:
    """Title -> what the result says, for the closing table."""
    energy = f"; {result['energy_kj']:.4g} kJ in all" if result.get("energy_kj") is not None else ""
    compilation = f", compilation {in_words(result['compile_s'])}" if result["compile_s"] else ""
    titled = {
        "test top-1": f"{result['top1_pct']:.2f}%  ({result['test_images']:,} images, read once, last weights)",
        "by task": _by_task(result),
        "chance": chance(result),
        "test top-5": f"{result['top5_pct']:.2f}%" if result["classes"] > 5 else "",
        "test loss": f"{result['loss']:.4f}",
        "validation top-1": f"{result['validation_top1_pct']:.2f}%  (best {result['best_validation_top1_pct']:.2f}% "
        f"at step {result['best_step']:,})",
        "routing": result.get("remark", ""),
        "experts left": _left(result),
        "served as": _served(result),
        "trained on": f"{result['images']:,} images, {result['epochs']:.1f} epochs{_epochs_said(result)}, "
        f"{result['steps']:,} steps",
        "training cost": f"{flop(1e15 * result['train_pflop'])}, {in_words(result['device_s'])}{energy}",
        "beside it": f"evaluation {in_words(result['eval_s'])}, saving {in_words(result['save_s'])}{compilation}",
        "folder": str(folder),
    }
    return {key: value for key, value in titled.items() if value}


def _by_task(result: dict[str, Any]) -> str:
    """Test top-1 of each task and both means; nothing where there is one set."""
    means = {"tasks": result.get(rows.OVER_TASKS.format("top1_pct")), "images": result["top1_pct"]}
    if means["tasks"] is None:
        return ""
    each = [f"{name} {figure:.2f}%" for name, figure in rows.of_tasks(result, "top1_pct").items()]
    return "; ".join([", ".join(each), *(f"mean over {what} {figure:.2f}%" for what, figure in means.items())])


def _epochs_said(result: dict[str, Any]) -> str:
    each = [f"{number:.1f} of {name}" for name, number in rows.of_tasks(result, "epochs").items()]
    return f" ({', '.join(each)})" if each else ""


def _left(result: dict[str, Any]) -> str:
    """The experts that are left, where some were pruned or could be."""
    if not result.get("experts_left"):
        return ""
    return f"{result['experts_left']} in blocks {result['moe_blocks']}"


def _served(result: dict[str, Any]) -> str:
    """What would be served instead of what was trained, and its cost; nothing where that is the same."""
    if not result.get("served_as"):
        return ""
    kind = {
        "dense": "a plain ViT (softmoe prune to=dense)", "experts": "a mixture (softmoe prune)",
        "task": "one task alone (softmoe extract)",
    }[result["served_as"]]  # fmt: skip
    parameters = f"{si(1e6 * result['served_params_m'])} parameters for {si(1e6 * result['params_m'])}"
    forward = f"{flop(1e9 * result['served_forward_gflop'])} for {flop(1e9 * result['forward_gflop'])} forward"
    return f"{kind}: {parameters}, {forward}"


def chance(result: dict[str, Any]) -> str:
    """A sentence where top-1 on the test images cannot be told from that of a model which always answers with their
    commonest class; else nothing."""
    if not at_chance([result["top1_pct"]], result["chance_pct"], result["test_images"]):
        return ""
    commonest = f"always the commonest of {result['classes']} classes"
    if rows.OVER_TASKS.format("top1_pct") in result:
        commonest = "always the commonest class of an image's task"
    return (
        f"top-1 cannot be told from chance: {commonest} is right for "
        f"{result['chance_pct']:.1f}% of these {result['test_images']:,} images"
    )
