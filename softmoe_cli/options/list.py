"""`softmoe list`: what can be chosen, a line each; models with their sizes."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from softmoe_cli import programs
from softmoe_cli.errors import UsageError, nearest
from softmoe_cli.options.conf_files import TITLES, conf_folder, files, laid, read_yaml
from softmoe_cli.options.help import bold, help_row
from softmoe_cli.options.sizes import Size, read_sizes

LIST_WIDTH = 100
CROSSING = """\
  Any backbone goes with any router, as model=vit_s16_soft model/backbone=vit_b16
  model/router=experts_choice, or model=small model/backbone=vit_micro2 model/router=soft"""
"""What reaches the models that have no name."""


def list_choices(arguments: Sequence[str]) -> str:
    """What `softmoe list ARGUMENTS` prints.

    Raises:
        UsageError: arguments that it does not have, or a word that nothing listed has.
    """
    names, wanted = _asked(arguments)
    blocks = [block for name in names if (block := _block(*TITLES[name], wanted))]
    if not blocks:
        words = " ".join(word for word in arguments if not word.startswith("-") and word != wanted)
        raise UsageError(f"softmoe list {words}: nothing has the word '{wanted}'".replace(" :", ":"))
    return "\n\n".join(blocks)


def _asked(arguments: Sequence[str]) -> tuple[list[str], str]:
    """The keys of TITLES that are asked for, and the word of --filter."""
    words, wanted = list(arguments), ""
    for i, argument in enumerate(words):
        if argument == "--filter" or argument.startswith("--filter="):
            wanted = argument.partition("=")[2] if "=" in argument else "".join(words[i + 1 : i + 2])
            if not wanted:
                raise UsageError("softmoe list --filter needs a word, as in softmoe list models --filter soft")
            del words[i : i + (1 if "=" in argument else 2)]
            break
    bad = next((word for word in words if word.startswith("-")), None)
    if bad is not None:
        raise UsageError(f"softmoe list has no option {bad}; it has --filter")
    return [_titled(word) for word in words] or list(TITLES), wanted


def list_as_typed(arguments: Sequence[str]) -> None:
    """Prints what `softmoe list ARGUMENTS` shows; for a program every choice as a row."""
    text = list_choices(arguments)
    if not programs.listen():
        print(text)
        return
    names, wanted = _asked(arguments)
    programs.reply([row for name in names for row in _rows(TITLES[name][0], wanted)])


def _rows(group: str, wanted: str) -> list[dict[str, Any]]:
    sizes = read_sizes(conf_folder()) if group == "model" else {}
    rows: list[dict[str, Any]] = []
    for name, file in files(group).items():
        if wanted.lower() in f"{name} {comment(file)}".lower():
            size = sizes.get(name) if file.parent == conf_folder() / group else None
            rows.append({"group": group, "name": name, "meaning": comment(file)} | (asdict(size) if size else {}))
    return rows


def _titled(word: str) -> str:
    """The key of TITLES that a word means: itself, its singular or its group."""
    for name, (group, _) in TITLES.items():
        if word.rstrip("=").lstrip("+") in (name, name.removesuffix("s"), group, group.rpartition("/")[2]):
            return name
    raise UsageError(f"softmoe list has no '{word}'.{nearest(word, TITLES)} It has {', '.join(TITLES)}")


def comment(file: Path) -> str:
    """The first comment of a yaml file, which says what it is."""
    try:
        lines = read_yaml(file).splitlines()
    except UsageError as error:
        return str(error).removeprefix(f"{file} ")
    return next((line[2:] for line in lines if line.startswith("# ") and not line.startswith("# @")), "")


def _block(group: str, title: str, wanted: str) -> str:
    """A heading and a row for each choice of a group that has the word in its name or meaning."""
    rows = {name: comment(file) for name, file in files(group).items()}
    rows = {name: text for name, text in rows.items() if wanted.lower() in f"{name} {text}".lower()}
    if not rows:
        return ""
    width = max(len(name) for name in rows)
    if group != "model":
        body = [help_row(name, text, LIST_WIDTH, width + 4) for name, text in rows.items()]
        return "\n".join([bold(title), *body, *(_tasks(rows) if group == "data" else [])])
    sizes = read_sizes(conf_folder())
    head = f"  {'':<{width}}   px  tokens  params, M    GFLOP"
    ours = files(group)
    body = []
    for name, text in rows.items():
        own = ours[name].parent != conf_folder() / group
        figures = _figures(None if own else sizes.get(name))
        body.append(help_row(f"{name:<{width}} {figures}", text, LIST_WIDTH, len(head) + 2))
    return "\n".join([bold(title), head, *body, "", CROSSING])


def _tasks(names: Iterable[str]) -> list[str]:
    """Which of these sets may be named in a mix, where each is a task; others need options, or are no such set."""
    known = []
    for name in names:
        try:
            own = laid("data", name)
        except UsageError:  # which its row tells
            continue
        if type(own.get("num_classes")) is int and not own.get("from_file"):
            known.append(name)
    return ["", f"  Tasks of data=mix by their names alone: {', '.join(known)}"]


def _figures(size: Size | None) -> str:
    if size is None:
        return " " * 36
    params, gflop = size.params / 1e6, size.forward_flop / 1e9
    return f"{size.image_size:>4} {size.tokens:>7} {params:>10.{_digits(params)}f} {gflop:>8.{_digits(gflop)}f}"


def _digits(number: float) -> int:
    """Decimals that leave at least three figures."""
    return next(digits for digits, least in enumerate((100, 10, 1, 0)) if number >= least)
