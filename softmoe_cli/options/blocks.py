"""Routers of single blocks, as one types them in model.blocks: a name, or options."""

from typing import Any

from softmoe_cli.errors import UsageError, nearest
from softmoe_cli.options.conf_files import files, laid


def spell_out(tree: dict[str, Any]) -> None:
    """In a composed configuration, replaces names in model.blocks by all options of their routers.

    Raises:
        UsageError: there is no such router.
    """
    model = tree.get("model")
    if isinstance(model, dict) and isinstance(model.get("blocks"), dict):
        model["blocks"] = {str(block): _spelt_out(block, entry) for block, entry in model["blocks"].items()}


def _spelt_out(block: Any, entry: Any) -> Any:
    given = {"router": entry} if isinstance(entry, str) else entry
    if not isinstance(given, dict) or "router" not in given:
        return entry
    name, known = given["router"], files("model/router")
    if name not in known:
        raise UsageError(f"model.blocks.{block}: there is no router '{name}'.{nearest(str(name), known)}")
    return laid("model/router", name) | {key: value for key, value in given.items() if key != "router"}


def fill_up(tree: dict[str, Any]) -> None:
    """Options in model.blocks that name no router are of model.router, whose other options they get."""
    model = tree.get("model", tree)  # a command's configuration, or the model's part of one
    if isinstance(model, dict) and isinstance(model.get("blocks"), dict) and isinstance(model.get("router"), dict):
        model["blocks"] = {
            block: model["router"] | entry if isinstance(entry, dict) and "_target_" not in entry else entry
            for block, entry in model["blocks"].items()
        }
