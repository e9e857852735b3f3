"""What an extraction is of: torch is not needed to know."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from softmoe_cli.config.commands import ExtractConfig, as_list
from softmoe_cli.config.data import Data
from softmoe_cli.data.contents import identity
from softmoe_cli.errors import UsageError, nearest
from softmoe_cli.run.identity import settings_of


def settings_of_extract(config: ExtractConfig, which: list[str]) -> dict[str, Any]:
    """What decides the result, beside the source's weights."""
    data = data_of(config.data, which)
    return {"tasks": which, "form": config.form, "data": settings_of(data) | {"identity": identity(data)}}


def tasks_asked(config: ExtractConfig, tasks: Mapping[str, int]) -> list[str]:
    """The tasks to extract, in the order in which the model knows them.

    Raises:
        UsageError: there is no such task, or nothing would change.
    """
    which = as_list(config.task)
    for name in which:
        if name not in tasks:
            raise UsageError(f"task={name}: the checkpoint knows the tasks {', '.join(tasks)}.{nearest(name, tasks)}")
    if len(which) > 1 and config.form != "experts":
        raise UsageError(
            f"form={config.form} is of one task, since another one takes other experts with other gates; extract one "
            "at a time, or leave form=experts"
        )
    return [name for name in tasks if name in which]


def data_of(data: Data, which: list[str]) -> Data:
    """The sets of these tasks: of one, that set with its own pixels."""
    if len(which) == 1:
        return next(own for own in data.of_sets() if own.name == which[0])
    own_sets = {name: own for name, own in data.sets.items() if name in which}
    classes = sum(own["num_classes"] for own in own_sets.values())
    return replace(
        data, sets=own_sets, num_classes=classes, channels=max(own["channels"] for own in own_sets.values())
    ).settled()
