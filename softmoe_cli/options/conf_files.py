"""What conf/ says, read without Hydra: its folders, the choices of each group, and the values that they give.

A conf folder of the user's in the working directory comes first everywhere.
"""

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from softmoe_cli.errors import UsageError

CONF_GROUPS = {
    "model": "a named model: backbone, router and place of the experts",
    "model/backbone": "the backbone alone",
    "model/router": "the router alone",
    "adapter": "what is trained beside a frozen backbone; its options are model.adapter.OPTION",
    "data": "a data set, or the format of your own files",
    "recipe": "optimizer, augmentation and budget",
    "experiment": "a study's settings",
    "search": "with -m: a search with Optuna",
    "hydra/launcher": "with -m: where a sweep's jobs run",
}
"""What is chosen by name, GROUP=CHOICE, and is a folder of conf/."""

TITLES = {
    "models": ("model", "models, model="),
    "backbones": ("model/backbone", "backbones, model/backbone="),
    "routers": ("model/router", "routers, model/router="),
    "adapters": ("adapter", "adapters, finetune adapter="),
    "data": ("data", "data sets, data="),
    "recipes": ("recipe", "recipes, recipe="),
    "experiments": ("experiment", "experiments, +experiment="),
    "searches": ("search", "searches with Optuna, -m +search="),
    "launchers": ("hydra/launcher", "where a sweep's jobs run, -m hydra/launcher="),
}
"""What `softmoe list` takes: the word, the group and the heading."""

ADDED = ("experiment", "search")
"""Groups of which nothing is chosen until it is added, +GROUP=CHOICE."""


def conf_folder() -> Path:
    """conf/ beside the package in a checkout, inside it in an installed wheel."""
    here = Path(__file__).resolve().parents[1]
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


def own_conf_folder() -> Path | None:
    """A conf folder of the user's in the working directory, if it is not ours."""
    own = Path.cwd() / "conf"
    return own if own.is_dir() and own.resolve() != conf_folder() else None


def files(group: str) -> dict[str, Path]:
    """The yaml file of each choice of a group, by name; one's own conf folder comes last, so that it replaces."""
    by_name = {}
    for root in (conf_folder(), own_conf_folder()):
        if root is None:
            continue
        folder = root / group
        # Folders in model/ and hydra/ are groups of their own; elsewhere they are part of a name.
        pattern = "*.yaml" if group in ("model", "hydra/launcher") else "**/*.yaml"
        for file in folder.glob(pattern):
            name = file.relative_to(folder).with_suffix("").as_posix()
            if not file.name.startswith("_") and file.is_file():
                by_name[name] = file
    return dict(sorted(by_name.items()))


def read_yaml(file: Path) -> str:
    """The text of a yaml file.

    Raises:
        UsageError: it cannot be read or is no UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = "it is no UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UsageError(f"{file} cannot be read: {why}") from error


def without_launcher(told: Any) -> str:
    """The words of Hydra's command line that name a file which chooses no launcher, as a run's config.yaml: nothing of
    -cp does, and of -cd, or of one's own conf folder, what has no defaults list. Empty where there is none."""
    if told.config_path is not None:
        return f"-cp {told.config_path}"
    name = (told.config_name or "").removesuffix(".yaml")
    for folder in (told.config_dir, own_conf_folder()):
        file = Path(folder or "", f"{name}.yaml")
        if folder is not None and name and file.is_file():
            return "" if "defaults" in load_yaml(file) else f"-cn {told.config_name}"
    return ""


def load_yaml(file: Path) -> dict[str, Any]:
    """The contents of a yaml file.

    Raises:
        UsageError: it cannot be read, is no YAML, or holds something other than keys with values.
    """
    import yaml

    try:
        body = yaml.load(read_yaml(file), Loader=_loader())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{file} is no YAML: {getattr(error, 'problem', None) or 'no text'}{where}") from error
    if not isinstance(body, dict | None):
        raise UsageError(f"{file} holds no keys with values")
    return body or {}


def router_options(target: str | None = None) -> dict[str, str]:
    """What every option of a router means: the comment behind it in conf/model/router, or nothing. Those of the router
    that is called `target` come first. Files that cannot be read are left out: who chooses one is told why."""
    own: dict[str, str] = {}
    others: dict[str, str] = {}
    for file in files("model/router").values():
        with contextlib.suppress(UsageError):
            body = load_yaml(file)
            found = own if body.get("_target_") == target else others
            said = dict(re.findall(r"^(\w+):.*?[ \t]#[ \t]*(.+)$", read_yaml(file), re.MULTILINE))
            for key in body:
                if key not in ("_target_", "defaults"):
                    found[key] = found.get(key) or said.get(key, "")
    return own | {key: said for key, said in others.items() if not own.get(key)}


@functools.cache
def _loader() -> Any:
    """A YAML reader that takes 1e-4 for a number, as OmegaConf does; the one in C where it is installed."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        pass

    number = (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?)"
    )
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^{number}$"), list("-+0123456789."))
    return Loader


def defaults(command: str, chosen: Mapping[str, str]) -> dict[str, Any]:
    """The values that conf/ gives to a command's options with these choices of groups, as Hydra would compose them, but
    without Hydra, which takes a second.

    Raises:
        UsageError: a file of one's own that cannot be read.
    """
    tree: dict[str, Any] = {}
    chosen = by_experiment(chosen)
    _lay(tree, "", "data_check" if command == "data" else command, chosen)
    if "experiment" in chosen:
        _lay(tree, "experiment", chosen["experiment"], chosen)
    return tree


def by_experiment(chosen: Mapping[str, str]) -> dict[str, str]:
    """These choices of groups, and those that a chosen experiment makes of the other groups.

    Raises:
        UsageError: a file of one's own that cannot be read.
    """
    return _overridden(chosen["experiment"]) | dict(chosen) if "experiment" in chosen else dict(chosen)


def _overridden(experiment: str, above: tuple[Path, ...] = ()) -> dict[str, str]:
    """The choices of groups in an experiment's defaults list; its own count before those of experiments in there."""
    file = _file("experiment", experiment)
    if file is None or file in above:  # `_lay` says what is wrong with a list that leads back
        return {}
    inherited: dict[str, str] = {}
    own: dict[str, str] = {}
    listed = load_yaml(file).get("defaults", [])
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, str) and entry != "_self_":
            inherited |= _overridden(entry, (*above, file))
        elif isinstance(entry, dict):
            own |= {
                str(key).removeprefix("override /"): choice
                for key, choice in entry.items()
                if str(key).startswith("override /") and isinstance(choice, str)
            }
    return inherited | own


def laid(group: str, name: str) -> dict[str, Any]:
    """What the file of one choice of a group says, with what it inherits.

    Raises:
        UsageError: a file that cannot be read, or inherits without end.
    """
    tree: dict[str, Any] = {}
    _lay(tree, group, name, {})
    for part in group.split("/"):
        tree = tree[part]
    return tree


def _file(group: str, name: str) -> Path | None:
    """The yaml file of a choice; None where there is none."""
    places = [root / group / f"{name}.yaml" for root in (own_conf_folder() if group else None, conf_folder()) if root]
    return next((place for place in places if place.is_file()), None)


def _lay(tree: dict[str, Any], group: str, name: str, chosen: Mapping[str, str], above: tuple[Path, ...] = ()) -> None:
    """Merges one file, and those in its defaults list, into the tree. `above`: the files whose lists led to it."""
    file = _file(group, name)
    if file is None:  # a schema, which Hydra has from Python, or a file of Hydra's own
        return
    if file in above:
        raise UsageError(f"{file}: its defaults list leads back to the file itself, by {above[-1]}")
    above = (*above, file)
    body = load_yaml(file)
    listed = body.pop("defaults", [])
    entries = listed if isinstance(listed, list) else []
    if "_self_" not in entries:
        entries = [*entries, "_self_"]
    for entry in entries:
        if entry == "_self_":
            said = re.search(r"^# @package (\S+)$", read_yaml(file), re.MULTILINE)
            place = group.split("/") if said is None else [] if said[1] == "_global_" else said[1].split(".")
            for part in reversed(place if group else []):
                body = {part: body}
            _merge(tree, body)
        elif isinstance(entry, str) and entry != name:
            _lay(tree, group, entry, chosen, above)
        elif isinstance(entry, dict):
            for key, choice in entry.items():
                if group and str(key).startswith("override "):
                    continue  # `by_experiment` has made the choice, where that group is laid
                inner = str(key).removeprefix("override ")
                inner = inner[1:] if inner.startswith("/") else f"{group}/{inner}".lstrip("/")
                choice = chosen.get(inner, choice)
                if isinstance(choice, str) and (inner, choice) != (group, name):
                    _lay(tree, inner, choice, chosen, above)


def _merge(tree: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = dict(value) if isinstance(value, dict) else value


def value_of(tree: Mapping[str, Any], key: str, asked: tuple[str, ...] = ()) -> Any:
    """The value at the key a.b.c, with ${x.y} followed. KeyError if there is none, or if the references lead back to a
    key in `asked`."""
    node: Any = tree
    for part in key.split("."):
        if not isinstance(node, dict) or key in asked:
            raise KeyError(key)
        node = node[part]
    other = re.fullmatch(r"\$\{(\.?)([\w.]+)\}", node) if isinstance(node, str) else None
    if other is None:
        return node
    return value_of(tree, f"{key.rpartition('.')[0]}.{other[2]}" if other[1] else other[2], (*asked, key))


def keys(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Every key of the tree, in its order, sections before what is in them."""
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{key}.")


def chosen_groups(arguments: Sequence[str]) -> dict[str, str]:
    """The choice of each group that a command line names; choices that do not exist are left out."""
    pairs = (argument.lstrip("+").partition("=")[::2] for argument in arguments)
    return {group: choice for group, choice in pairs if group in CONF_GROUPS and choice in files(group)}
