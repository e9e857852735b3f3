"""What the Tab key completes: a script for the shell, and the words that it asks for, without torch and Hydra."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from softmoe_cli.config.commands import SCHEMAS
from softmoe_cli.config.settle import SettleConfig
from softmoe_cli.errors import UsageError, nearest
from softmoe_cli.options.conf_files import ADDED, CONF_GROUPS, TITLES, chosen_groups, files, load_yaml, router_options
from softmoe_cli.options.explain import known_keys
from softmoe_cli.options.help import launcher_options, options
from softmoe_cli.options.usage import COMMANDS
from softmoe_cli.programs import listen, reply

SCRIPTS = {
    # bash cuts words at = and : too, and asks for the rest of what it calls the word, $2.
    "bash": r"""_softmoe() {
    local IFS=$'\n'
    COMPREPLY=($(command "$1" completion answer "${COMP_LINE:0:COMP_POINT}" "$2" 2>/dev/null))
    case "${COMPREPLY[0]}" in *=|*.|*/) compopt -o nospace 2>/dev/null ;; esac
}
complete -F _softmoe softmoe
""",
    "zsh": r"""(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
_softmoe() {
    local -a found open closed
    found=("${(@f)$(command $words[1] completion answer "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)}")
    open=(${(M)found:#*[=./]})
    closed=(${found:#*[=./]})
    compadd -Q -S '' -- $open
    compadd -Q -- $closed
}
compdef _softmoe softmoe
""",
    "fish": r"""complete -c softmoe -e
complete -c softmoe -f -a '(command softmoe completion answer (commandline -cp | string collect) 2>/dev/null)'
""",
}

FLAGS = {
    "train": ("--help", "--cfg", "--info", "--multirun", "--plan", "--groups", "--json", "--debug"),
    "status": ("--json", "--help"),
    "list": ("--filter", "--json", "--help"),
    "settle": ("--help", "--plan", "--json", "--debug"),
    "doctor": ("--json", "--help"),
}
FLAGS["finetune"] = FLAGS["train"]

PATHS = (
    "checkpoint",
    "run",
    "image",
    "data.root",
    "folder",
    "output_root",
    "predictions",
    "confusion",
    "real",
    "allow_unexpected",
)
"""Keys whose value may be a path."""


def complete(arguments: Sequence[str]) -> int:
    """`softmoe completion SHELL` prints its script; `softmoe completion answer LINE [END]` prints the words, one per
    line, that may replace the last word of LINE, or END, the end of that word.

    Raises:
        UsageError: there is no script for that shell.
    """
    if arguments[:1] == ["answer"]:
        for word in answers(*arguments[1:3]):
            print(word)
        return 0
    if len(arguments) != 1 or arguments[0] not in SCRIPTS:
        told = f"not {' '.join(arguments)}.{nearest(arguments[0], SCRIPTS)}" if arguments else "none was named"
        raise UsageError(f"completion is for {', '.join(SCRIPTS)}; {told}")
    reply({"script": SCRIPTS[arguments[0]]}) if listen() else print(SCRIPTS[arguments[0]], end="")
    return 0


def answers(line: str, end: str | None = None) -> list[str]:
    """What the last word of a command line up to the cursor, or `end`, the end of that word, may become when it is
    completed."""
    words = _words(line)
    *before, typed = words[1:] or [""]
    try:
        found = [word for word in dict.fromkeys(_candidates(before, typed)) if word.startswith(typed) and word != typed]
    except (UsageError, OSError):  # a file in the user's conf folder is wrong; the command itself will say so
        return []
    if end is not None:
        kept = len(typed) - len(_words(end)[-1].lstrip("=:"))
        found = [word[kept:] for word in found]
    return [re.sub(r"([\s'\"\\$&;()<>|`*?!#\[\]{}])", r"\\\1", word) for word in found]


def _words(line: str) -> list[str]:
    """A line's words without their quotes; the last is empty after a space."""
    words = [""]
    for quoted, escaped, space, other in re.findall(r"'([^']*)'?|\\(.)|(\s+)|([^\s'\\])", line.replace('"', "'")):
        if space:
            words.append("")
        else:
            words[-1] += quoted or escaped or other
    return words


def _candidates(before: Sequence[str], typed: str) -> Iterator[str]:
    if not before:
        yield from COMMANDS
        yield from ("help", "--help", "--version")
        return
    command, *rest = before
    if command == "help":
        yield from COMMANDS
    elif command == "completion":
        yield from SCRIPTS
    elif command == "list":
        yield from (*TITLES, *FLAGS["list"])
    elif command in ("compare", "scaling", "status", "doctor"):
        if typed.startswith("-"):
            yield from FLAGS.get(command) or _options_of(command)
        else:
            yield from _folders(typed)
    elif command == "check":
        yield from files("model/router") if not rest else (f"{name}=" for name in _router_options(rest[0]))
        if not rest:
            yield from _paths(typed, ".py")
    elif command == "data" and not rest:
        yield "check"
    elif command == "show" and typed.startswith("-"):
        yield from ("--follow", "--json", "--wandb", "--help", "--debug")
    elif command in (*SCHEMAS, "settle"):
        if typed.startswith("-"):
            yield from FLAGS.get(command, ("--help", "--cfg", "--multirun", "--json", "--debug"))
        elif rest[-1:] == ["--cfg"] or rest[-1:] == ["-c"]:
            yield from ("job", "hydra", "all")
        elif rest[-1:] == ["--info"] or rest[-1:] == ["-i"]:
            yield from ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
        elif "=" in typed:
            yield from _values(command, typed)
        else:
            yield from (f"{option.key}=" for option in (options(SettleConfig) if command == "settle" else ()))
            yield from _keys("train" if command == "settle" else command, rest, typed)
            if command == "show" and not rest:
                yield from _runs()


def _options_of(command: str) -> list[str]:
    from softmoe_cli.compare.command import OPTIONS
    from softmoe_cli.scaling.command import SCALING_OPTIONS

    return [*(f"--{name}" for name in (OPTIONS if command == "compare" else SCALING_OPTIONS)), "--json", "--help"]


def _router_options(name: str) -> Iterable[str]:
    file = files("model/router").get(name)
    return (key for key in load_yaml(file) if key != "_target_") if file is not None else router_options()


def _keys(command: str, rest: Sequence[str], typed: str) -> Iterator[str]:
    """Groups and keys, a section at a time: `train.` first, and what is in it when that is typed."""
    plus = typed[: len(typed) - len(typed.lstrip("+"))]
    depth = typed.count(".") + 1
    known = known_keys(command, rest)
    sections = {key.rpartition(".")[0] for key in known}
    for group in known:
        if group in CONF_GROUPS:
            yield f"{'+' if group in ADDED else plus}{group}="
    for key in known:
        parts = key.split(".")
        if key in CONF_GROUPS or len(parts) < depth:
            continue
        head = ".".join(parts[:depth])
        if head in sections:
            yield f"{plus}{head}."
        elif head == key:
            yield f"{plus}{key}="
    if chosen_groups(rest).get("hydra/launcher") and depth == 1:
        yield "hydra.launcher."


def _values(command: str, typed: str) -> Iterator[str]:
    """What may follow KEY=; after a comma of a sweep, or in a list, the next."""
    key, _, value = typed.partition("=")
    begun = value[: max(value.rfind(","), value.rfind("[")) + 1]
    name = key.lstrip("+")
    if name in CONF_GROUPS:
        found: Iterable[str] = files(name)
    elif name == "to" and command == "match":
        found = files("model")
    elif name == "checkpoint":
        found = [*_runs(), *_paths(value.removeprefix(begun), ".safetensors")]
    elif name in PATHS:
        found = _paths(value.removeprefix(begun), "")
    else:
        own = SCHEMAS["train" if command == "settle" else command]
        each = [*options(own), *options(SettleConfig), *(o for _, some in launcher_options() for o in some)]
        found = next((option.values for option in each if option.key == name), ())
    return (f"{key}={begun}{word}" for word in found)


def _runs() -> Iterator[str]:
    """Runs below outputs, the newest first."""
    runs = [file.parent for file in Path("outputs").glob("*/*/config.yaml")]
    yield from map(str, sorted(runs, key=lambda run: run.stat().st_mtime, reverse=True))


def _folders(typed: str) -> Iterator[str]:
    """Studies, and the runs in the study that is typed; other folders once the path to them is typed."""
    studies = [str(folder) for folder in sorted(Path("outputs").glob("*")) if folder.is_dir()]
    yield from studies
    yield from (path for path in _paths(typed, "/") if path[:-1] not in studies)


def _paths(typed: str, ending: str) -> Iterator[str]:
    """Folders, with a slash, and files of that ending."""
    place, _, name = typed.rpartition("/")
    start = f"{place}/" if "/" in typed else ""
    with os.scandir(os.path.expanduser(start) or ".") as entries:
        for entry in sorted(entries, key=lambda each: each.name):
            if entry.name.startswith(".") and not name.startswith("."):
                continue
            if entry.is_dir():
                yield f"{start}{entry.name}/"
            elif entry.name.endswith(ending):
                yield f"{start}{entry.name}"
