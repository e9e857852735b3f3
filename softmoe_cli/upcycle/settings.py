"""What an upcycling is of: torch is not needed to know."""

from dataclasses import asdict, replace
from typing import Any

from softmoe_cli.config.commands import UpcycleConfig
from softmoe_cli.config.model import Model
from softmoe_cli.data.contents import identity
from softmoe_cli.run.identity import settings_of


def started(config: UpcycleConfig) -> Model:
    """The model with how its experts start: as copies, unless something sets them apart."""
    apart = config.expert_noise or config.expert_redraw or config.model.expert_width
    return replace(config.model, expert_init="independent" if apart else "identical")


def settings_of_upcycling(config: UpcycleConfig, *, carried: bool) -> dict[str, Any]:
    """What decides the result, beside the source's weights; `carried`: the optimizer's moments come along."""
    chosen = {key: getattr(config, key) for key in ("expert_noise", "expert_redraw", "preserve", "seed", "images")}
    data = settings_of(config.data) | {"identity": identity(config.data)}
    return {"model": asdict(started(config)), "data": data, **chosen} | ({"carry_optimizer": True} if carried else {})
