"""What a run may use, read from its config.yaml."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from softmoe_cli.config.recipe import BUDGETS
from softmoe_cli.errors import first_line
from softmoe_cli.run import rows
from softmoe_cli.text import shortened


@dataclass(frozen=True)
class ConfiguredBudget:
    """What a run may use: `amount` of the budget `key` (train.KEY); and the command that it belongs to, with where that
    puts it (None: not said)."""

    key: str
    amount: float
    devices: float
    command: str
    output_root: str | None
    study: str | None


def configured_budget(path: Path) -> ConfiguredBudget:
    """The budget of a run, from its config.yaml.

    Raises:
        FileNotFoundError, Unreadable: there is none, or it tells no budget.
    """
    said = config_tree(path)
    train = said.get("train")
    if not isinstance(train, dict):
        raise rows.Unreadable("does not say what train is")
    given = [key for key in BUDGETS if train.get(key) not in NOTHING]
    if not given:
        raise rows.Unreadable(f"has none of {', '.join(f'train.{key}' for key in BUDGETS)}")
    amount = _amount(f"train.{given[0]}", train[given[0]])
    devices = _amount("devices", said.get("devices", "1"))
    command = "train" if said.get("checkpoint") in NOTHING else "finetune"
    root, study = (value if isinstance(value, str) else None for value in map(said.get, ("output_root", "study")))
    return ConfiguredBudget(given[0], amount, devices, command, root, study)


def config_tree(path: Path) -> dict[str, Any]:
    """A run's config.yaml, in which every value stays text as it is written; empty where it is no mapping.

    Raises:
        FileNotFoundError, Unreadable: there is none, it is empty, or no YAML.
    """
    text, loader = rows.contents(path), getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    if not text.strip():
        raise rows.Unreadable("is empty")
    try:  # scalars stay as they are written: no YAML type is needed
        depth = 0
        for event in yaml.parse(text, Loader=loader):  # libyaml's composer ends the process at great depth
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise rows.Unreadable("is no YAML (nested too deeply)")
        said = yaml.load(text, Loader=loader)
    except rows.Unreadable:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise rows.Unreadable(f"is no YAML ({first_line(error)})") from error
    return said if isinstance(said, dict) else {}


DEEPEST = 50
NOTHING = (None, "null", "~", "")


def _amount(key: str, value: Any) -> float:
    try:
        amount = float(value)
    except (TypeError, ValueError):
        amount = 0.0
    if not rows.number(amount) or amount <= 0:
        raise rows.Unreadable(f"says {key} is {shortened(str(value), 40)}, which is no amount")
    return amount
