"""What `--help` says, in 80 columns, without torch and without Hydra."""

import dataclasses
import math
import os
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from softmoe_cli.config.commands import SCHEMAS
from softmoe_cli.config.launch import LAUNCHERS, Launcher
from softmoe_cli.config.option import typed
from softmoe_cli.config.settle import Fairness, SettleConfig
from softmoe_cli.errors import UsageError
from softmoe_cli.options.conf_files import (
    ADDED,
    CONF_GROUPS,
    by_experiment,
    chosen_groups,
    conf_folder,
    defaults,
    load_yaml,
    router_options,
    value_of,
)
from softmoe_cli.options.usage import USAGE

EVERYDAY = (
    "checkpoint", "data.root", "data.image_size", "model.image_size", "model.moe_blocks", "train.epochs",
    "train.steps", "train.minutes", "train.batch_size", "train.accumulate", "train.precision", "train.eval_every",
    "optim.lr", "optim.weight_decay", "seed", "study", "name", "device", "devices", "threads", "tracking", "slots",
)  # fmt: skip
"""What `--help` shows of train and finetune, and of other commands beside the options that are theirs alone."""

WIDTH = 80
MEANING = 28
"""Column in which meanings begin."""


def bold(text: str) -> str:
    """On a terminal that shows it, unless NO_COLOR is set."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[1m{text}\033[0m"


# --- --help -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Option:
    """A key that a command takes, with what config/ says of it."""

    key: str
    meaning: str
    kind: str
    values: tuple[str, ...]


def options(section: type, prefix: str = "") -> Iterator[Option]:
    """Every option of a config dataclass."""
    hints = typing.get_type_hints(section)
    for f in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from options(typing.cast(type, hints[f.name]), f"{prefix}{f.name}.")
        elif f.metadata:
            values = f.metadata["choices"] or (("true", "false") if hints[f.name] is bool else ())
            yield Option(f"{prefix}{f.name}", f.metadata["meaning"], _kind(hints[f.name], f.metadata), values)


def launcher_options() -> Iterator[tuple[str, list[Option]]]:
    """hydra.launcher's options: those of every place, and what a place adds."""
    common = list(options(Launcher, "hydra.launcher."))
    yield "with -m: a sweep's jobs", common
    for place, launcher in LAUNCHERS.items():
        own = [option for option in options(launcher, "hydra.launcher.") if option not in common]
        if own:
            yield f"with -m hydra/launcher={place}", own


def _kind(hint: Any, limits: Mapping[str, Any]) -> str:
    """Type and bounds in words."""
    inside = [each for each in typing.get_args(hint) if each is not type(None)]
    null = isinstance(hint, types.UnionType)
    hint = inside[0] if null else hint
    many = typing.get_origin(hint) is list
    one = typing.get_args(hint)[0] if many else hint
    word = {bool: "true|false", int: "whole number", float: "number", str: "text"}.get(one, "")
    if limits["choices"]:
        word = "|".join(limits["choices"])
        word = word if len(word) <= WIDTH - MEANING - 4 else word.replace("|", ", ")
    if many:
        word = f"list of {word or 'values'}" + ("s" if one in (int, float) else "")
    low, high, above = limits["low"], limits["high"], limits["above"]
    bounds = []
    if low > -math.inf and high < math.inf:
        bounds = [f"{low:.10g} to {high:.10g}"]
    else:
        signs = {f"> {above:g}": above, f">= {low:g}": low, f"<= {high:.10g}": high}
        bounds = [text for text, bound in signs.items() if math.isfinite(bound)]
    return " ".join(filter(None, [word, ", ".join(bounds)])) + (", or null" if null and word else "")


def help_row(head: str, meaning: str, width: int = WIDTH, column: int = MEANING) -> str:
    """One row: `head`, and its meaning beside it, or below it where `head` is long."""
    lines = textwrap.wrap(meaning, width - column, break_long_words=False, break_on_hyphens=False) or [""]
    first = f"  {head:<{column - 3}} {lines[0]}".rstrip() if len(head) < column - 2 else f"  {head}"
    rest = lines[1:] if len(head) < column - 2 else lines
    return "\n".join([first, *(" " * column + line for line in rest)])


def _option_row(option: Option, tree: Mapping[str, Any]) -> str:
    meaning = f"{option.meaning} [{option.kind}]" if option.kind else option.meaning
    try:
        value = value_of(tree, option.key)
    except KeyError:
        return help_row(option.key, meaning)
    if "${" in str(value):  # of the environment, or of what only a run knows
        return help_row(option.key, f"{meaning}; follows other settings")
    return help_row(f"{option.key}={'' if value == '???' else typed(value)}", meaning)


def usage(command: str, arguments: Sequence[str]) -> str:
    """What `softmoe COMMAND ARGUMENTS --help` prints. Groups that are chosen show their values; a word that is not
    GROUP=CHOICE picks options: all of them, or those that have it in key or meaning.

    Raises:
        UsageError: a word that no option has.
    """
    if command in ("compare", "scaling"):
        from softmoe_cli.compare.command import OPTIONS
        from softmoe_cli.scaling.command import SCALING_OPTIONS

        known = OPTIONS if command == "compare" else SCALING_OPTIONS
        rows = [help_row(f"--{name} {value}".rstrip(), meaning) for name, (value, meaning) in known.items()]
        return "\n".join([USAGE[command], "", bold("options"), *rows])
    if command == "settle":
        values, own = load_yaml(conf_folder() / "settle.yaml"), list(options(SettleConfig))
        foot = "All other options are those of softmoe train, or finetune: --help all."
        return "\n".join([USAGE[command], "", bold("options"), *(_option_row(o, values) for o in own), "", foot])
    if command not in SCHEMAS:
        return USAGE[command]
    words = [argument for argument in arguments if "=" not in argument and not argument.startswith("-")]
    words = [word for word in words if (command, word) != ("data", "check")]
    chosen = by_experiment(chosen_groups(arguments))
    learns = command in ("train", "finetune")
    tree = (load_yaml(conf_folder() / "settle.yaml") if learns else {}) | defaults(command, chosen)
    sections = _sections(command, tree)
    picks = bool(words) and words != ["all"]
    lines = [] if picks else [USAGE[command], "", *_group_lines(command, tree, chosen)]
    if not words:
        everyday = [o for _, each in sections for o in each if o.key in EVERYDAY or (not learns and "." not in o.key)]
        router = [o for title, each in sections if title.startswith("router ") for o in each]
        total = sum(len(each) for _, each in sections)
        lines += ["", bold("options, with the values that they have"), *(_option_row(o, tree) for o in everyday)]
        if router:
            lines += ["", *_router_lines(tree, router)]
        more = f"softmoe {'data check' if command == 'data' else command} --help"
        lines += ["", f"{more} all: all {total} options;", f"{more} WORD: those with the word."]
        return "\n".join(lines)
    shown = 0
    for title, found in sections:
        if picks:
            found = [o for o in found if all(w.lower() in f"{o.key} {o.meaning}".lower() for w in words)]
        shown += len(found)
        if found:
            lines += ["", bold(title), *(_option_row(option, tree) for option in found)]
    if not shown:
        raise UsageError(f"no option of softmoe {command} has the word '{' '.join(words)}'; --help all shows them all")
    return "\n".join(lines).lstrip("\n")


def _sections(command: str, tree: Mapping[str, Any]) -> list[tuple[str, list[Option]]]:
    """All options of a command under their headings."""
    found: dict[str, list[Option]] = {}
    for option in options(SCHEMAS[command]):
        if command == "train" and option.meaning.startswith("finetune:"):
            continue
        if option.key == "model.router":
            found["model.router"] = list(_router_options(tree))
        else:
            found.setdefault(option.key.rpartition(".")[0], []).append(option)
    sections = [(f"router {_router(tree)}" if key == "model.router" else key or "the run", each)
                for key, each in found.items()]  # fmt: skip
    if command not in ("train", "finetune"):
        return sections
    return [*sections, ("with -m: arms of equal cost, tuned alike", list(options(Fairness))), *launcher_options()]


def _router(tree: Mapping[str, Any]) -> str:
    """The chosen router's module name, dense, or nothing where the model is the checkpoint's."""
    router = tree.get("model", {}).get("router")
    if not isinstance(router, dict):
        return ""
    target = router.get("_target_")
    return "dense" if target is None else str(target).split(".")[-2]


def _router_options(tree: Mapping[str, Any]) -> Iterator[Option]:
    """The chosen router's options; of all routers where none is chosen."""
    router = tree.get("model", {}).get("router")
    meanings = router_options(router.get("_target_") if isinstance(router, dict) else None)
    for name in router if isinstance(router, dict) else meanings:
        if name != "_target_" and (_router(tree) != "dense"):
            yield Option(f"model.router.{name}", meanings.get(name) or "its yaml file does not say", "", ())


def _router_lines(tree: Mapping[str, Any], found: Sequence[Option]) -> list[str]:
    name = _router(tree)
    title = f"options of model/router={name}; type another before --help to see its" if name else "options of routers"
    return [bold(title), *(_option_row(option, tree) for option in found)]


def _group_lines(command: str, tree: Mapping[str, Any], chosen: Mapping[str, str]) -> list[str]:
    """The groups that a command has, with what is chosen of each."""
    file = conf_folder() / f"{'data_check' if command == 'data' else command}.yaml"
    listed = [entry for entry in load_yaml(file).get("defaults", []) if isinstance(entry, dict)]
    picked = {key.removeprefix("override "): value for entry in listed for key, value in entry.items()}
    lines = [bold("groups, GROUP=CHOICE; softmoe list shows the choices")]
    for group, meaning in CONF_GROUPS.items():
        section = group.partition("/")[0]
        if group in ADDED:
            if command in ("train", "finetune"):
                lines.append(help_row(f"+{group}={chosen.get(group, '')}", meaning))
            continue
        if section not in picked and group not in picked:
            continue
        choice = chosen.get(group, picked.get(group))
        if group == "model/router":
            choice = chosen.get(group, _router(tree))
        elif group == "model/backbone":
            choice = chosen.get(group, tree.get("model", {}).get("backbone", {}).get("name"))
        follows = "; follows other settings" if "${" in str(choice) else "; the checkpoint's"
        if (command, group) == ("upcycle", "model/router"):  # a dense checkpoint has none
            follows = "; to be chosen"
        none = not choice or str(choice).startswith(("_", "${"))
        lines.append(help_row(f"{group}={'' if none else choice}", f"{meaning}{follows}" if none else meaning))
    return lines
