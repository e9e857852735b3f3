"""What makes a run this run: the signature of what it computes, and where its weights come from."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softmoe_cli.config.data import Data
from softmoe_cli.config.option import absent_keys
from softmoe_cli.config.run import NOT_SCIENCE, Config

if TYPE_CHECKING:  # importing it takes seconds, and a run that is finished needs none of its weights
    from softmoe_cli.run.header import Source


def run_folder(config: Config, command: str, source: "Source | None", images_digest: str | None) -> Path:
    """Where a run on these images (`contents.identity`) goes."""
    name = config.name or f"{config.model.name}-{config.data.name}"
    mark = signature(config, command, source.digest if source else None, images_digest)
    return Path(config.output_root) / config.study / f"{name.replace('/', '_')}-{mark}"


def signature(config: Config, command: str, source_digest: str | None, data_digest: str | None) -> str:
    """Ten hex digits of what the run computes: its scientific config, the command, the weights that it starts from and,
    where the config does not say it, which images it reads."""
    given = [digest for digest in (data_digest,) if digest]
    text = json.dumps([command, source_digest, _science(config), *given], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _science(config: Config) -> dict[str, Any]:
    science = dataclasses.asdict(config)
    for key in NOT_SCIENCE:
        section, _, leaf = key.rpartition(".")
        del (science[section] if section else science)[leaf]
    del science["model"]["tasks"]  # they follow the data
    for key in absent_keys(Data):
        if science["data"].get(key, "") is None:
            del science["data"][key]
    for own in science["data"].get("sets", {}).values():  # the same images at another place are the same
        own.pop("root", None)
    if science["model"]["backbone"]["pre_logits"] is None:
        del science["model"]["backbone"]["pre_logits"]
    if config.prune.keep is None:  # the others are idle
        del science["prune"]
    own = {key: value for key, value in science["model"].pop("adapter").items() if value is not None}
    if own != {"name": "none"}:  # a run without adapters has no settings of adapters, as a dense one none of routers
        science["model"]["adapter"] = own
    return _whole_numbers(science)


def flat_science(config: Config) -> dict[str, Any]:
    """The values that the signature is made of, as `section.key`. With them in a result row, rows show in what runs
    differ."""

    def walk(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(walk(_science(config), ""))


def _whole_numbers(value: Any) -> Any:
    """The value with whole numbers as int: `capacity_factor=2` and `2.0` are one run."""
    if isinstance(value, dict):
        return {key: _whole_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def settings_of(data: Data) -> dict[str, Any]:
    """What a receipt says of images: not where they lie, and how fast they are read."""
    said = dataclasses.asdict(data)
    for own in (said["sets"] or {}).values():
        own.pop("root", None)
    absent = [key for key in absent_keys(Data) if said[key] is None]
    return {key: value for key, value in said.items() if key not in ("root", "workers", "memory_gib", "cache", *absent)}


def made_from(source: "Source", settings: dict[str, Any]) -> str:
    """Ten hex digits of what a folder is made from and how: part of its name where none is chosen."""
    return hashlib.sha256(json.dumps([source.digest, settings], sort_keys=True).encode()).hexdigest()[:10]


def origin(command: str, settings: dict[str, Any], source: "Source | None") -> str:
    """Ten hex digits that are equal for weights that were made with the same settings but for the seed and the cut of
    the data, from weights of one origin. Two checkpoints of one origin differ only by chance, so comparisons may group
    runs that were finetuned from them."""
    kept = {key: value for key, value in settings.items() if key not in ("seed", "data.split_seed")}
    if "split_seed" in kept.get("data", {}):  # receipts hold the images' settings in a group of their own
        kept["data"] = kept["data"] | {"split_seed": 0}
    text = json.dumps([command, origin_of(source) if source else None, kept], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def origin_of(source: "Source") -> str:
    """What a checkpoint says of its origin; of elsewhere, its contents."""
    return str(source.card.get("origin", source.digest))
