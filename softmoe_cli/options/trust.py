"""Whose code a checkpoint may run: importing the module of a router runs it."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softmoe_cli.errors import UsageError
from softmoe_cli.options.conf_files import load_yaml, own_conf_folder

if TYPE_CHECKING:
    from softmoe_cli.run.header import Source


def require_trust(model: dict[str, Any], source: "Source", trusted: str | None, typed: Collection[str] = ()) -> None:
    """Refuses a router that only the checkpoint names, unless it is `trusted`: importing a module runs its code. A
    router in conf/model/router of the working folder is accepted too, but not for a checkpoint inside that folder:
    whoever downloads the folder gets both. `typed`: the classes that the user has chosen.

    Raises:
        UsageError: only the checkpoint names the router.
    """
    for target in targets(source.card.get("model", {})):
        ours = target.startswith("softmoe_cli.moe.routers.")
        if target in targets(model) and not ours and target not in (trusted, *typed):
            _require_vouched(target, source)


def router_targets(model: dict[str, Any]) -> dict[str, Any]:
    """The class of each of a model's routers as its options name it, by where they stand."""
    blocks = model["blocks"] if isinstance(model.get("blocks"), dict) else {}
    every = {"router": model.get("router"), **blocks}
    return {str(place): each.get("_target_") for place, each in every.items() if isinstance(each, dict)}


def targets(model: dict[str, Any]) -> list[str]:
    """These classes, each once."""
    return [target for target in dict.fromkeys(router_targets(model).values()) if target is not None]


def _require_vouched(target: str, source: "Source") -> None:
    """Raises UsageError unless a file of one's own, outside the checkpoint's folder, names this class."""
    own = own_conf_folder()
    files = sorted((own / "model/router").glob("*.yaml")) if own else []
    vouching = next((file for file in files if load_yaml(file).get("_target_") == target), None)
    here, place = Path.cwd().resolve(), Path(source.label)
    inside = here in place.resolve().parents or here in Path(os.path.abspath(place)).parents
    if vouching is None:
        raise UsageError(
            f"checkpoint={source.label} names the router {target}, which is not softmoe's; if you trust it, put its "
            f"yaml into conf/model/router where you type the command, or say trust={target}"
        )
    if inside and not source.label.startswith("hf-hub:"):
        raise UsageError(
            f"checkpoint={source.label} names the router {target}, which is not softmoe's, and what vouches for it "
            f"({vouching}) lies in the same folder; if you trust that, say trust={target}"
        )
