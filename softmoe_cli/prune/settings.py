"""What a pruning is of: torch is not needed to know."""

from typing import Any

from softmoe_cli.config.commands import PruneConfig
from softmoe_cli.config.pruning import MEASURED
from softmoe_cli.data.contents import identity
from softmoe_cli.run.header import Source
from softmoe_cli.run.identity import settings_of


def settings_of_pruning(config: PruneConfig, before: Source | None) -> dict[str, Any]:
    """What decides the result, beside the source's weights."""
    chosen: dict[str, Any] = {"keep": config.keep, "to": config.to, "by": config.by}
    if config.by in MEASURED:
        chosen["images"] = config.images
    if config.by == "random":
        chosen["seed"] = config.seed
    if before is not None:
        chosen["before"] = before.digest
    return chosen | {"data": settings_of(config.data) | {"identity": identity(config.data)}}
