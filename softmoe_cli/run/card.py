"""What the header of a checkpoint says of its model: read and checked against its types, for all commands.

A file may say anything. A card that passes here may still describe a model that cannot be built, or not the model of
these weights; see `Model.check`, `weights.require_described`.
"""

import json
import math
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from softmoe_cli.config.data import Data
from softmoe_cli.config.model import Model
from softmoe_cli.config.option import absent_keys
from softmoe_cli.config.recipe import Train
from softmoe_cli.errors import UsageError

CARD_FORMAT = 2
"""The format of cards, and of the state.json beside training tensors, that this version writes; it reads no other."""


def other_format(said: dict[str, Any]) -> str | None:
    """Why this version cannot read something of another format; None if it can."""
    if type(said.get("format")) is int and said["format"] == CARD_FORMAT:
        return None
    which = f"is of format {json.dumps(said['format'])[:40]}" if "format" in said else "says no format"
    return f"{which}, and this version of softmoe reads format {CARD_FORMAT}; use the version that wrote it"


def read_card(text: str, path: Path) -> dict[str, Any]:
    """The card of a checkpoint: `format`, `model` and `data` as of their dataclasses, `classes`, `loss`, `precision`,
    and where they are given `origin`, `receipt` and, of a delta, `base`.

    Raises:
        UsageError: this version of softmoe saved no such card.
    """
    start = f"checkpoint={path}: what it says of its model"
    try:
        card = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{start} is no JSON ({error})") from error
    if isinstance(card, dict) and (fault := other_format(card)) is not None:
        raise UsageError(f"{start} {fault}")
    fault = _card_fault(card)
    if fault is not None:
        raise UsageError(f"{start} cannot be read: {fault}; softmoe saved no such file")
    if "${" in json.dumps([card["model"], card["data"]]):
        raise UsageError(f"{start} holds ${{…}}, which softmoe never writes")
    return typing.cast(dict[str, Any], card)


def _card_fault(card: Any) -> str | None:
    if not isinstance(card, dict):
        return f"it is {_kind(card)}"
    for key, section in {"model": Model, "data": Data}.items():
        if not isinstance(card.get(key), dict):
            return f"{key} is {_kind(card.get(key))}" if key in card else f"it lacks {key}"
        fault = _section_fault(card[key], section, key)
        if fault is not None:
            return fault
    if not card["model"]["backbone"]["name"].isprintable():
        return "model.backbone.name holds what cannot be printed"
    router = card["model"]["router"]
    if not isinstance(router, dict) or "_target_" not in router:
        return "model.router names no router" if isinstance(router, dict) else f"model.router is {_kind(router)}"
    if not _fits(router["_target_"], str | None):
        return f"model.router._target_ is {_kind(router['_target_'])}"
    blocks = card["model"]["blocks"]
    if not isinstance(blocks, dict):
        return f"model.blocks is {_kind(blocks)}"
    for block, options in blocks.items():
        if not isinstance(options, dict) or not _fits(options.get("_target_"), str):
            return f"model.blocks.{block} names no router"
    if not _fits(card["model"]["moe_blocks"], str | list[int]):
        return "model.moe_blocks is neither a text nor a list of numbers"
    tasks = card["model"].get("tasks")
    if tasks is not None and not (isinstance(tasks, dict) and all(type(classes) is int for classes in tasks.values())):
        return "model.tasks is no group of names with numbers of classes"
    if not _fits(card.get("classes"), list[str]) or not card["classes"]:
        return "classes is no list of names" if "classes" in card else "it lacks classes"
    for key in ("loss", "precision"):
        choices = next(f.metadata["choices"] for f in fields(Train) if f.name == key)
        choices = [choice for choice in choices if choice != "auto"]  # a run settles that
        if card.get(key) not in choices:
            return f"{key} is none of {', '.join(choices)}" if key in card else f"it lacks {key}"
    if not isinstance(card.get("origin", ""), str):
        return f"origin is {_kind(card['origin'])}"
    if "base" in card:
        base, kinds = card["base"], {"checkpoint": str, "digest": str, "left_out": list[str]}
        if not isinstance(base, dict) or not all(_fits(base.get(key), kind) for key, kind in kinds.items()):
            return "base names no checkpoint with its digest"
    return _receipt_fault(card["receipt"]) if "receipt" in card else None


def _receipt_fault(receipt: Any) -> str | None:
    """What is wrong with those parts of an upcycling's receipt that finetuning uses; None if nothing is."""
    if not isinstance(receipt, dict):
        return f"receipt is {_kind(receipt)}"
    carried = receipt.get("optimizer")
    if carried is not None and not (isinstance(carried, dict) and isinstance(carried.get("digest"), str)):
        return "receipt.optimizer has no digest"
    return None


def _section_fault(said: Any, section: type, path: str) -> str | None:
    """Why a mapping is no dataclass of the configuration; None if it is one."""
    if not isinstance(said, dict):
        return f"{path} is {_kind(said)}"
    hints = typing.get_type_hints(section)
    known = {f.name: hints[f.name] for f in fields(section)}
    for key in said:
        if key not in known:
            return f"{path} has a key {json.dumps(key)[:40]}, which is no option"
    for key, hint in known.items():
        if key not in said:
            if key in absent_keys(section):
                continue
            return f"it lacks {path}.{key}"
        if isinstance(hint, type) and is_dataclass(hint):
            fault = _section_fault(said[key], hint, f"{path}.{key}")
            if fault is not None:
                return fault
        elif not _fits(said[key], hint):
            return f"{path}.{key} is {_kind(said[key])}"
    return None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of a type; whole numbers are numbers, truth values are not."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, kind) for kind in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    if type(value) is int:
        return hint in (int, float, Any) and abs(value) < 2**63
    if hint is float:
        return type(value) is float and math.isfinite(value)
    return hint is Any or type(value) is hint


def _kind(value: Any) -> str:
    """What a value of JSON is, for a sentence."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"the number {value:.6g}"
    return "a text" if isinstance(value, str) else "a list" if isinstance(value, list) else "a group of keys"


def card_text(card: dict[str, Any]) -> str:
    return json.dumps({"format": CARD_FORMAT} | card)
