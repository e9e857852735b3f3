"""What was typed for a sweep: its name, what each of its jobs needs too, and words that stand for longer ones."""

import argparse
import re
import sys
from collections.abc import Sequence

from hydra.errors import HydraException
from omegaconf import DictConfig

SHORT = {"seeds_at_once": "hydra.launcher.seeds_at_once"}
"""Options of a launcher that may be typed without its name."""


def in_full(arguments: Sequence[str]) -> list[str]:
    """The words with the full names of keys that may be typed shorter."""
    halves = [word.partition("=") for word in arguments]
    return [f"{SHORT.get(key, key)}{equals}{value}" for key, equals, value in halves]


def files_typed() -> list[str]:
    """Where Hydra was told to take the configuration from."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for short, long in (("-cd", "--config-dir"), ("-cp", "--config-path"), ("-cn", "--config-name")):
        parser.add_argument(short, long)
    typed = vars(parser.parse_known_args(sys.argv[1:])[0])
    return [f"--{key.replace('_', '-')}={value}" for key, value in typed.items() if value is not None]


def flags_of(config: DictConfig) -> list[str]:
    """Options for Hydra itself that each job needs too: where its configuration comes from, but not where a sweep's
    jobs run or which jobs there are."""
    elsewhere = ("hydra/launcher=", "hydra/sweeper", "hydra.launcher", "hydra.sweep", "hydra.mode")
    return files_typed() + [
        word for word in config.hydra.overrides.hydra if not word.lstrip("+~").startswith(elsewhere)
    ]


def study_of(arguments: Sequence[str]) -> str | None:
    """The default name of a sweep's folder: the last words of the keys that vary, in the order in which they were
    typed. None if the command line or an experiment names the study, or if Hydra will refuse the words.

    `model/router=dense,soft seed=0,1` -> `router-seed`
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if any(word.lstrip("+").startswith(("study=", "experiment=", "experiment/")) for word in arguments):
        return None
    words = [word for word in arguments if not word.startswith("-") and "=" in word]
    try:
        typed = OverridesParser.create().parse_overrides(words)
    except HydraException:
        return None
    keys = [override.key_or_group for override in typed if override.is_sweep_override()]
    return "-".join(dict.fromkeys(re.split(r"[./]", key)[-1] for key in keys)) or None
