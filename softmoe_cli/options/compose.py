"""Hydra in, checked dataclasses out: below this file nobody knows Hydra or OmegaConf.

torch is not imported here, and Hydra by the functions that need it: `--help` answers at once.
"""

import contextlib
import copy
import dataclasses
import functools
import logging
import os
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from softmoe_cli.config.commands import SCHEMAS, DataCheckConfig, MatchConfig
from softmoe_cli.config.data import DATA_FORMATS, KNOWN_SETS, OF_A_SET, Data, check_side, check_source
from softmoe_cli.config.launch import LAUNCHERS
from softmoe_cli.config.option import Section, absent_keys
from softmoe_cli.config.run import Config
from softmoe_cli.errors import UsageError, first_line
from softmoe_cli.failures import ours
from softmoe_cli.options.blocks import fill_up, spell_out
from softmoe_cli.options.conf_files import (
    chosen_groups,
    conf_folder,
    defaults,
    files,
    load_yaml,
    own_conf_folder,
    value_of,
)
from softmoe_cli.options.explain import crossing, explain, no_key, refused
from softmoe_cli.options.help import options
from softmoe_cli.options.mixes import spell_sets
from softmoe_cli.text import printable_lines

S = typing.TypeVar("S", bound=Section)

WITHOUT_FILES = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")
"""What conf/_quiet.yaml says, as arguments."""


class Jobs:
    """The configurations of a command line: one, or with -m several, which are done one after the other. None where
    Hydra only shows something (--cfg), or where a launcher of our own has the jobs done elsewhere.

    for config, typed in jobs:  # typed: the overrides of this job
        with jobs.attempt():
            ...
    jobs.end()
    """

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        """Composes the arguments, which `check_line` has read, with Hydra.

        Raises:
            UsageError: what Hydra or OmegaConf refuses, in one sentence.
        """
        self._command, self._arguments = command, list(arguments)
        self._composed: list[tuple[Any, list[str]]] = []
        self._typed: list[str] = []
        self._failures: list[Exception] = []
        self._compose()

    def __iter__(self) -> Iterator[tuple[Any, list[str]]]:
        for config, typed in self._composed:
            self._typed = typed
            yield config, typed

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Inside, a failure is kept until the end, so that the next job is tried; a defect is raised."""
        from omegaconf.errors import OmegaConfBaseException

        try:
            yield
        except OmegaConfBaseException as error:
            self._keep(UsageError(explain(error, self._command, self._arguments)))
        except Exception as error:
            known = ours(error, self._typed)
            if known is None:
                raise
            self._keep(known)

    def _keep(self, failure: Exception) -> None:
        if self._failures:  # the last one is raised at the end
            print(f"softmoe: {printable_lines(str(self._failures[-1]))}", file=sys.stderr)
        self._failures.append(failure)

    def end(self) -> None:
        """Raises the last failure, if there was one."""
        if self._failures:
            raise self._failures[-1]

    def _compose(self) -> None:
        import hydra
        from hydra.core.hydra_config import HydraConfig
        from hydra.core.plugins import Plugins
        from hydra.errors import HydraException
        from omegaconf import DictConfig
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        from softmoe_cli.options.own_conf import OwnConf, OwnSource, ignored

        store_schema(self._command)
        own = OwnConf.own = own_conf_folder()
        for plugin in (OwnConf, OwnSource):
            Plugins.instance().register(plugin)
        if own is not None and (sentence := ignored(own, self._command)) is not None:
            say_once(sentence)
        arguments = self._arguments
        if any(word.startswith(("-cn", "--config-name")) for word in arguments):  # such as a run's config.yaml,
            arguments += WITHOUT_FILES  # which says nothing of Hydra's own files
        if any(word.startswith(("-i", "--info", "--hydra-help")) for word in arguments):
            logging.raiseExceptions = False  # Hydra logs it, and `| head` reads no more than the first lines
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and leaving with status 1
        sys.argv = ["softmoe", *arguments]

        def task(config: DictConfig) -> None:
            own = HydraConfig.get()
            self._composed.append((config, [*own.overrides.task, *said_of_data(own)]))

        if not any("hydra.mode" in word or word.startswith(OTHER_FILES) for word in arguments):
            compose_once()
        try:
            hydra.main(version_base=None, config_path=str(conf_folder()), config_name=self._command)(task)()
        except (HydraException, OmegaConfBaseException) as error:
            raise UsageError(explain(error, self._command, arguments)) from error
        except UsageError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError, YAMLError) as error:
            raise UsageError(refused(error, arguments)) from error
        except RecursionError:
            defaults(self._command, chosen_groups(arguments))  # names the file whose defaults list has no end
            raise
        except SystemExit as error:
            if not error.code:
                raise
            raise UsageError("") from error  # Hydra has said why


@functools.cache
def admit(launcher: type) -> None:
    """Makes Hydra accept a launcher of our own package. Hydra up to 1.3 makes only launchers from its namespace
    hydra_plugins, a folder beside the package that every Hydra program of the environment would import. The check is a
    method of Hydra's (the same in 1.3.2 and 1.3.8), replaced here; from 1.4 on (1.4.0rc3) registering is enough."""
    from hydra.core.plugins import Plugins

    Plugins.instance().register(launcher)
    known, name = getattr(Plugins, "is_in_toplevel_plugins_module", None), f"{launcher.__module__}.{launcher.__name__}"
    if known is not None:
        takes = staticmethod(lambda target: target == name or known(target))
        Plugins.is_in_toplevel_plugins_module = takes  # type: ignore[method-assign, assignment]


def said_of_data(own: Any) -> list[str]:
    """What the file of -cn says of data, as words: it counts as typed, so that no checkpoint decides of it. Such a file
    is a run's config.yaml, with which the run goes on. `own`: Hydra's own node. Without -cn nothing is said."""
    name = f"{str(own.job.config_name).removesuffix('.yaml')}.yaml"
    places = [Path(each.path, name) for each in own.runtime.config_sources if each.schema == "file"]
    file = next((place for place in places if place.is_file()), None)
    if file is None or file.resolve().parent == conf_folder():
        return []
    data = load_yaml(file).get("data")
    return [f"data.{key}={value}" for key, value in data.items()] if isinstance(data, dict) else []


OTHER_FILES = ("-cd", "--config-dir", "-cp", "--config-path", "-cn", "--config-name")
"""Words that name files of Hydra's beside ours."""


@functools.cache
def compose_once() -> None:
    """Stops Hydra, in this process, from composing each configuration twice: the first time only shows whether the
    files ask for a sweep, as `hydra.mode` there does. Ours never do, and from a user's own conf folder it is not taken.
    The question is a method of Hydra's (the same in 1.3.2 and 1.3.8), replaced here."""
    from hydra._internal.hydra import Hydra

    Hydra.get_mode = lambda *_, **__: None  # type: ignore[method-assign]


@functools.cache
def store_schema(command: str) -> None:
    """Tells Hydra the schemas that a command's yaml file in conf/ starts from, once."""
    from hydra.core.config_store import ConfigStore

    _register_resolvers()
    store = ConfigStore.instance()
    if command in ("train", "finetune"):
        store.store(name="schema", node=Config)
    else:
        store.store(name=f"{command}_schema", node=DataCheckConfig if command == "data_check" else SCHEMAS[command])
    for name, launcher in LAUNCHERS.items():
        store.store(group="hydra/launcher", name=f"_{name}", node=launcher)


def _refuse_unknown(node: Any, section: type, prefix: str = "", root: type | None = None) -> None:
    """Raises UsageError for a key that `+key=value` has added: Hydra lets it pass although the schema has none."""
    hints = typing.get_type_hints(section)
    for key in node:
        if key not in hints:
            known = [option.key for option in options(root or section)]
            known += {each.partition(".")[0] for each in known if "." in each}
            raise UsageError(no_key(f"{prefix}{key}", f"{prefix}{key}", known))
        if dataclasses.is_dataclass(hints[key]) and isinstance(node[key], dict):
            _refuse_unknown(node[key], typing.cast(type, hints[key]), f"{prefix}{key}.", root or section)


def plain(config: Any, section: type) -> dict[str, Any]:
    """The composed configuration as dictionaries and lists, with ${…} as it stands.

    Raises:
        UsageError: a key that the section does not have.
    """
    from omegaconf import OmegaConf

    tree = tree_of(config)
    _refuse_unknown(tree, section)
    spell_out(tree)
    if isinstance(tree.get("data"), dict):
        tree["data"] = {k: v for k, v in tree["data"].items() if v != "???" or k not in absent_keys(Data)}
    spell_sets(tree)
    root = OmegaConf.select(config, "data.root", throw_on_resolution_failure=False)
    if root is not None:
        tree["data"]["root"] = root  # resolved, because it is compared with a checkpoint's
    return tree


def tree_of(config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    tree = OmegaConf.to_container(config, resolve=False, throw_on_missing=False)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def door(tree: dict[str, Any], section: type[S]) -> S:
    """Turns dictionaries into the checked dataclasses that the rest of the program works with.

    Raises:
        UsageError: a value that is missing, of the wrong type or out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException, ValidationError

    _register_resolvers()
    try:
        _settle_side(tree)
        fill_up(tree)
        tree = _with_absent(tree, section)
        merged = OmegaConf.merge(OmegaConf.structured(section), tree)
        missing = OmegaConf.missing_keys(merged)
        if missing:
            raise UsageError(f"{sorted(missing)[0]} has no default; type {sorted(missing)[0]}=VALUE")
        checked = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        kind = next((option.kind for option in options(section) if option.key == key), "")
        if isinstance(error, ValidationError) and kind:
            raise UsageError(f"{key}={value_of(tree, key)}: expected {kind}") from error
        raise UsageError(f"{key}: {first_line(error)}") from error
    assert isinstance(checked, section)
    return checked.settled()


def _with_absent(tree: dict[str, Any], section: type) -> dict[str, Any]:
    """A copy with null for what is there only where some file gives it; a model's tasks are those of the data.

    Raises:
        UsageError: a set of a mix with a value of the wrong type.
    """
    filled = dict(tree)
    for key, hint in typing.get_type_hints(section).items():
        if dataclasses.is_dataclass(hint) and isinstance(filled.get(key), dict):
            filled[key] = _with_absent(filled[key], typing.cast(type, hint))
    if issubclass(section, Section):
        filled |= {key: None for key in absent_keys(section) if filled.get(key, "???") == "???"}
    if section is Data and isinstance(filled["sets"], dict):
        filled["sets"] = {name: _typed_set(name, own) for name, own in filled["sets"].items()}
    data, model = filled.get("data"), filled.get("model")
    if isinstance(data, dict) and isinstance(model, dict) and "tasks" in model:
        tasks = {name: own["num_classes"] for name, own in data["sets"].items()} if data["sets"] else None
        if model["tasks"] not in (None, tasks):
            raise UsageError(f"model.tasks={model['tasks']} is not what the data have; tasks follow data.sets")
        model["tasks"] = tasks
    return filled


def _typed_set(name: str, own: Any) -> dict[str, Any]:
    """The options of one set of a mix, with whole numbers as the numbers that they are meant for."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        if not isinstance(own, dict):
            raise UsageError(f"data.sets: {name} is {own}, and no group of options")
        merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(Data), own))
    except OmegaConfBaseException as error:
        raise UsageError(f"data.sets, {name}: {error.full_key}: {first_line(error)}") from error
    assert isinstance(merged, dict)
    missing = [key for key in OF_A_SET if key != "root" and merged[key] == "???"]
    if missing or (merged["root"] == "???" and merged["format"] is not None):
        raise UsageError(f"data.sets, {name}: {(missing or ['root'])[0]} has no default; give it a value")
    return {key: merged[key] for key in OF_A_SET if merged[key] != "???"}


def _settle_side(tree: dict[str, Any]) -> None:
    """data.image_size=auto becomes a number of pixels: for exemplars of a known set, those of that set; else those of a
    model that has its own; else what suits the files.

    Raises:
        UsageError: the files cannot be used.
    """
    data, model = tree.get("data"), tree.get("model")
    if not isinstance(data, dict) or "${" in str(data["image_size"]):
        return
    source = data.get("source")
    if data["format"] is None:
        check_source(data["name"], source)
    if data["image_size"] == "auto" and source in KNOWN_SETS:
        data["image_size"] = KNOWN_SETS[source]
    check_side(data["name"], source if source in DATA_FORMATS else data["format"], data["image_size"])
    if data["image_size"] != "auto" or not isinstance(model, dict) or model["image_size"] == "???":
        return
    if data["root"] == "???":
        raise UsageError("data.root has no default; type data.root=FOLDER")
    if isinstance(model["image_size"], int):
        data["image_size"] = model["image_size"]
        return
    if model["backbone"]["timm"] not in (None, "???"):
        data["image_size"] = TIMM_SIDE
        return
    import statistics

    from omegaconf import OmegaConf

    from softmoe_cli.data.suit import shorter_sides, side_for

    read = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Data), _with_absent(data, Data)))
    assert isinstance(read, Data)
    read = read.settled().made_of
    sides, patch = shorter_sides(read), model["backbone"]["patch_size"]
    data["image_size"] = side = side_for(sides, patch if isinstance(patch, int) else None)
    if os.environ.get("RANK", "0") == "0":
        seen = f"{min(sides)} to {max(sides)}" if min(sides) < max(sides) else f"{min(sides)}"
        say_once(
            f"data.image_size=auto: {side}, as the shorter sides of the images have {seen} pixels, median "
            f"{statistics.median(sides):g}; type data.image_size={side} to have it whatever files come"
        )


TIMM_SIDE = 224
"""Pixels that most of timm's ViTs are made for."""


@functools.cache
def _register_resolvers() -> None:
    """Registers what conf/ calls in ${…}: `suits:SIDE,KEY`, a setting of the small backbone for images of so many
    pixels."""
    from omegaconf import OmegaConf

    from softmoe_cli.data.suit import backbone_for

    def suits(side: Any, key: str) -> Any:
        if not isinstance(side, int):
            raise ValueError(f"the model follows data.image_size={side}, which the command settles when it runs")
        return load_yaml(files("model/backbone")[backbone_for(side)])[key]

    OmegaConf.register_new_resolver("suits", suits, replace=True)


def overlay(base: dict[str, Any], typed: Any) -> dict[str, Any]:
    """A copy of `base` in which every value of `typed` that is not `???` replaces its own."""
    merged = dict(base)
    for key, value in (typed if isinstance(typed, dict) else {}).items():
        if key != "sets" and isinstance(value, dict) and isinstance(base.get(key), dict):  # a mix is replaced whole
            merged[key] = overlay(base[key], value)
        elif value != "???":
            merged[key] = value
    return merged


def compose(*overrides: str) -> Config:
    """The checked configuration that `softmoe train OVERRIDES` would run, for use from Python.

    Raises:
        UsageError: a value that cannot work.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    store_schema("train")
    try:
        with initialize_config_dir(str(conf_folder()), version_base=None):
            return door(plain(hydra_compose("train", list(overrides)), Config), Config)
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(explain(error, "train", list(overrides))) from error


def names(key: str, typed: Sequence[str]) -> bool:
    return any(override.partition("=")[0].lstrip("+") == key for override in typed)


def other_model(to: str, typed: Sequence[str]) -> MatchConfig:
    """The configuration of the model whose cost is to be met; everything but the model is as typed."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    kept = [override for override in typed if re.split(r"[.=/@]", override.lstrip("+~"))[0] != "model"]
    quoted = to.replace("\\", "\\\\").replace("'", "\\'")  # as text, whatever it looks like
    try:
        with initialize_config_dir(str(conf_folder()), version_base=None):
            config = compose("match", [*kept, *(crossing(to) or [f"model='{quoted}'"])])
    except HydraException as error:
        raise UsageError(f"to={to}: {explain(error, 'match', []).partition(': ')[2]}") from error
    return door(plain(config, MatchConfig), MatchConfig)


def changed(tree: dict[str, Any], changes: dict[str, Any]) -> MatchConfig:
    """The configuration in `tree` with some keys changed."""
    return door(changed_tree(tree, changes), MatchConfig)


def changed_tree(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of the tree with some keys, as section.key, changed."""
    other = copy.deepcopy(tree)
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        node = other
        for section in sections:
            node = node[section]
        node[leaf] = value
    return other


@functools.cache
def say_once(text: str) -> None:
    """Prints a sentence to standard error, once however many jobs say it."""
    print(f"softmoe: {text}", file=sys.stderr)
