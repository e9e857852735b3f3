"""The commands. Hydra begins and ends here; torch, timm and wandb are imported by the command that needs them."""

import contextlib
import copy
import dataclasses
import functools
import io
import json
import os
import re
import statistics
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from softmoe_cli.config import (
    CUT,
    Config,
    CostConfig,
    Data,
    DataCheckConfig,
    EvaluateConfig,
    ExportConfig,
    LocalLauncher,
    MatchConfig,
    Model,
    RayLauncher,
    SlurmLauncher,
    UpcycleConfig,
    check_channels,
    check_side,
    same_set,
)
from softmoe_cli.errors import UsageError, first_line, nearest
from softmoe_cli.failures import defect, ours
from softmoe_cli.signals import end_children, interruptible
from softmoe_cli.text import printable_lines

if typing.TYPE_CHECKING:
    from softmoe_cli.record import Source

T = typing.TypeVar(
    "T", Config, EvaluateConfig, ExportConfig, CostConfig, MatchConfig, UpcycleConfig, DataCheckConfig, Model
)

SCHEMAS: dict[str, type] = {
    "train": Config, "finetune": Config, "evaluate": EvaluateConfig, "cost": CostConfig, "match": MatchConfig,
    "upcycle": UpcycleConfig, "export": ExportConfig, "data": DataCheckConfig,
}  # fmt: skip

LAUNCHERS = {"local": LocalLauncher, "slurm": SlurmLauncher, "ray": RayLauncher}

WITHOUT_FILES = ("hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")
"""As conf/train.yaml has it."""


def main() -> None:
    """The entry point: runs sys.argv and exits with 0, 1 (it failed, or found faults), 2 (cannot work) or 130
    (interrupted)."""
    for stream in (sys.stdout, sys.stderr):  # a name that is no UTF-8, or a terminal that is none: with escapes
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code, text = run(sys.argv[1:])
    if text:
        print(f"softmoe: {printable_lines(text.removeprefix('softmoe '))}", file=sys.stderr)
    leave(code)


def run(arguments: Sequence[str]) -> tuple[int, str]:
    """Runs a command line; returns its exit status and, where an error caused it, the sentence that says why."""
    debug = "--debug" in arguments
    trains = arguments[:1] in (["train"], ["finetune"])
    try:
        with interruptible(functools.partial(_stopped, trains)):
            return _dispatch([argument for argument in arguments if argument != "--debug"]), ""
    except KeyboardInterrupt as error:
        if debug:
            traceback.print_exception(error)
        return 130, _stopped(trains, str(error) or "SIGINT")
    except BrokenPipeError as error:
        if error.filename is not None:  # a named pipe among somebody's files
            return _failed(error, debug, arguments)
        _nobody_listens()
        return 1, ""
    except Exception as error:
        return _failed(error, debug, arguments)


def leave(code: int) -> typing.NoReturn:
    """Ends the process."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _nobody_listens()
        code = code or 1
    if "softmoe_cli.mirror" in sys.modules and sys.modules["softmoe_cli.mirror"].stuck:
        end_children()
        os._exit(code)  # W&B's own goodbye would wait for a server that does not answer
    sys.exit(code)


def _nobody_listens() -> None:
    """`softmoe list | head`: what is still to be said meets no closed pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stopped(trains: bool, name: str) -> str:
    """What a signal's name, as a KeyboardInterrupt has it, says to a reader."""
    why = "nobody reads what it says any more, so it stopped" if name == "SIGPIPE" else f"stopped by {name}"
    return f"{why}; type the same command to go on" if trains else why


def _failed(error: Exception, debug: bool, typed: Sequence[str]) -> tuple[int, str]:
    """Exit status and sentence of an error; with `debug` its traceback is printed, as that of a defect always is."""
    known = ours(error, typed)
    if known is None:
        return 1, defect(error)
    if debug:
        traceback.print_exception(error)
    return 2 if isinstance(known, UsageError) else 1, str(known)


def _dispatch(arguments: list[str]) -> int:
    from softmoe_cli import help

    if any(a == "-sc" or a.startswith("--shell-completion") for a in arguments):
        raise UsageError('what the Tab key completes comes from softmoe: type eval "$(softmoe completion bash)"')
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        topic = arguments[1:]
        print(help.usage(_command(topic[0]), topic[1:]) if topic else help.HELP)
        return 0
    if arguments[0] in ("-V", "--version", "version"):
        from importlib.metadata import version

        print(version("softmoe-cli"))
        return 0
    command, rest = _command(arguments[0]), arguments[1:]
    if "-h" in rest or "--help" in rest or rest[:1] == ["help"] or rest[:2] == ["check", "help"]:
        print(help.usage(command, [word for word in rest if word not in ("-h", "--help", "help")]))
        return 0
    if command == "compare":
        from softmoe_cli.report import run

        return run(rest)
    if command == "list":
        print(help.listing(rest))
        return 0
    if command == "completion":
        from softmoe_cli.completion import complete

        return complete(rest)
    if command == "check":
        return _check(rest)
    if command == "status":
        return _status(rest)
    if command == "data":
        if rest[:1] != ["check"]:
            got = f"not {rest[0]}.{nearest(rest[0], ['check'])}" if rest else "as in softmoe data check data=folder"
            raise UsageError(f"softmoe data takes the word check, {got}")
        return _hydra("data_check", rest[1:])
    return _hydra(command, rest)


def _command(word: str) -> str:
    from softmoe_cli.help import COMMANDS

    if word not in COMMANDS:
        raise UsageError(f"there is no command '{word}'.{nearest(word, COMMANDS)} Commands: {', '.join(COMMANDS)}")
    return word


def conf_folder() -> Path:
    """conf/ beside the package in a checkout, inside it in an installed wheel."""
    here = Path(__file__).resolve().parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


def _own_conf() -> Path | None:
    """A conf folder of the user's in the working directory, if it is not ours."""
    own = Path.cwd() / "conf"
    return own if own.is_dir() and own.resolve() != conf_folder() else None


def _check(arguments: list[str]) -> int:
    """`softmoe check`: prints the report; 1 if a check failed."""
    names = [argument for argument in arguments if "=" not in argument]
    if len(names) != 1:
        raise UsageError(
            f"softmoe check takes one router and its options as KEY=VALUE, got {' '.join(names) or 'none'}"
        )
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    options = _router_options(names[0])
    for argument in arguments:
        if "=" in argument:
            try:
                options |= _contents(OmegaConf.from_dotlist([argument]))
            except (yaml.YAMLError, OmegaConfBaseException) as error:
                raise UsageError(f"cannot read '{argument}': {first_line(error)}") from error
    from softmoe_cli.check import check_router

    outcomes = check_router(options)
    for outcome in outcomes:
        print(f"{outcome.verdict:<5} {outcome.name:<30} {outcome.figure}")
    failed = sum(outcome.verdict == "fail" for outcome in outcomes)
    passed = sum(outcome.verdict == "pass" for outcome in outcomes)
    print(f"{names[0]}: {passed} passed, {failed} failed, {len(outcomes) - passed - failed} not applicable")
    return 1 if failed else 0


def _status(arguments: list[str]) -> int:
    """`softmoe status`: prints the table, or JSON."""
    unknown = [a for a in arguments if a.startswith("-") and a != "--json"]
    folders = [Path(a) for a in arguments if not a.startswith("-")]
    if unknown:
        raise UsageError(f"softmoe status has no option {unknown[0]}; it has --json")
    if not folders and not Path("outputs").is_dir():
        raise UsageError("there is no folder outputs here; softmoe status FOLDER takes a study, a sweep or a run")
    from softmoe_cli.status import read, show

    states = read(folders or [Path("outputs")], newest_first=not folders)
    print(json.dumps([dataclasses.asdict(state) for state in states]) if "--json" in arguments else show(states))
    return 0


def _router_options(name: str) -> dict[str, Any]:
    """The options in a router's yaml, or the target of a Python file's one router."""
    from softmoe_cli.help import files as files_of
    from softmoe_cli.help import load

    files = files_of("model/router")
    if name in files:
        options = load(files[name])
        if options.get("_target_") is None:
            raise UsageError(f"{name} has no router to check")
        return options
    path = Path(name)
    if path.suffix != ".py":
        raise UsageError(f"there is no router '{name}'.{nearest(name, files)} Routers: {', '.join(sorted(files))}")
    if not path.is_file():
        raise UsageError(f"{name} does not exist")
    sys.path.insert(0, str(path.resolve().parent))
    import importlib
    import inspect

    from softmoe_cli.moe.routing import Router

    try:
        module = importlib.import_module(path.stem)
    except (Exception, SystemExit) as error:  # whatever it raises is its own
        raise UsageError(f"{name} cannot be imported: {type(error).__name__}: {first_line(error)}") from error
    own = [
        each
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Router) and each.__module__ == path.stem
    ]
    concrete = [each for each in own if not inspect.isabstract(each)]
    if len(concrete) != 1:
        found = ", ".join(each.__name__ for each in concrete) or "none"
        raise UsageError(f"{name} must define one subclass of softmoe_cli.moe.routing.Router; it has {found}")
    return {"_target_": f"{path.stem}.{concrete[0].__name__}"}


def _hydra(command: str, arguments: list[str]) -> int:
    """Composes with Hydra and runs the command for each job; Hydra's own errors become one sentence. Returns the exit
    status."""
    many = any(argument in ("-m", "--multirun") for argument in arguments)
    import hydra
    from hydra.core.plugins import Plugins
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from softmoe_cli.explain import check_line, explain, refused
    from softmoe_cli.help import chosen_groups, defaults
    from softmoe_cli.own_conf import OwnConf, OwnSource, ignored

    arguments = check_line(command, arguments)
    _refuse_unknown_to_hydra(arguments)
    if many and command in ("train", "finetune") and (study := _study_of(arguments)) is not None:
        _tell(f"study={study}, after the keys that vary; study= names another folder")
        arguments = [*arguments, f"study={study}"]
    _store_schemas()
    own = OwnConf.own = _own_conf()
    for plugin in (OwnConf, OwnSource):
        Plugins.instance().register(plugin)
    if own is not None and (sentence := ignored(own, command)) is not None:
        _tell(sentence)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and leaving with status 1
    if "--plan" in arguments and (command not in ("train", "finetune") or not many):
        raise UsageError("--plan lists the jobs of a sweep: softmoe train -m … --plan or softmoe finetune -m … --plan")
    if "--groups" in arguments and (command not in ("train", "finetune") or many):
        raise UsageError("--groups lists the parameters of one run: softmoe train … --groups, without -m")
    learn = functools.partial(_groups if "--groups" in arguments else _train, command)
    arguments = [argument for argument in arguments if argument != "--groups"]
    costed: list[CostConfig] = []
    tasks: dict[str, Callable[[Any], None]] = {
        "train": learn,
        "finetune": learn,
        "evaluate": _evaluate,
        "cost": lambda config: costed.append(_door(plain(config, CostConfig), CostConfig)),
        "match": _match,
        "upcycle": _upcycle,
        "export": _export,
        "data_check": lambda config: faulty.append(_data_check(config)),
    }
    failures: list[Exception] = []
    faulty: list[int] = []
    began: list[bool] = []

    def task(config: DictConfig) -> None:
        """One job. A sweep goes on after a failure; the last failure is what the command ends with."""
        began.append(True)
        try:
            tasks[command](config)
        except Exception as error:
            unread = isinstance(error, OmegaConfBaseException)
            known = UsageError(explain(error, command, arguments)) if unread else ours(error, _typed())
            if known is None:
                raise
            if failures:
                print(f"softmoe: {printable_lines(str(failures[-1]))}", file=sys.stderr)
            failures.append(known)

    try:
        with contextlib.ExitStack() as nowhere:
            if "--plan" in arguments:  # and Hydra's own files go nowhere
                import tempfile

                folder = nowhere.enter_context(tempfile.TemporaryDirectory())
                arguments = [argument for argument in arguments if argument != "--plan"]
                arguments += ["hydra.launcher.plan=true", f"hydra.sweep.dir={folder}"]
            if any(
                argument.startswith(("-cn", "--config-name")) for argument in arguments
            ):  # such as a run's config.yaml
                arguments = [*arguments, *WITHOUT_FILES]  # which says nothing of Hydra's own files
            if any(argument.startswith(("-i", "--info", "--hydra-help")) for argument in arguments):
                import logging

                logging.raiseExceptions = False  # Hydra logs it, and `| head` reads no more than the first lines
            sys.argv = ["softmoe", *arguments]
            hydra.main(version_base=None, config_path=str(conf_folder()), config_name=command)(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(explain(error, command, arguments)) from error
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, YAMLError) as error:
        if began or isinstance(error, UsageError):
            raise
        raise UsageError(refused(error, arguments)) from error
    except RecursionError:
        if not began:
            defaults(command, chosen_groups(arguments))  # which says whose defaults list has no end
        raise
    except SystemExit as error:  # Hydra has said why
        if not began and error.code:
            return 2
        raise
    if many and command in ("train", "finetune"):
        from softmoe_cli.sweep import report

        report()
    if failures:
        raise failures[-1]
    if costed:
        from softmoe_cli.ledger import costs, show

        print(show(costs(costed), costed[0].format, many=many))
    return max(faulty, default=0)


@functools.cache
def _store_schemas() -> None:
    """Tells Hydra the schemas that the yaml files in conf/ start from, once."""
    from hydra.core.config_store import ConfigStore

    _register_resolvers()
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for name in ("evaluate", "cost", "match", "upcycle", "export"):
        store.store(name=f"{name}_schema", node=SCHEMAS[name])
    store.store(name="data_check_schema", node=DataCheckConfig)
    for name, launcher in LAUNCHERS.items():
        store.store(group="hydra/launcher", name=f"_{name}", node=launcher)


def _refuse_unknown(node: Any, section: type, prefix: str = "", root: type | None = None) -> None:
    """`+key=value` slips past Hydra's schema; here it does not."""
    hints = typing.get_type_hints(section)
    for key in node:
        if key not in hints:
            from softmoe_cli.explain import no_key
            from softmoe_cli.help import options

            known = [option.key for option in options(root or section)]
            known += {each.partition(".")[0] for each in known if "." in each}
            raise UsageError(no_key(f"{prefix}{key}", f"{prefix}{key}", known))
        if dataclasses.is_dataclass(hints[key]) and isinstance(node[key], dict):
            _refuse_unknown(node[key], typing.cast(type, hints[key]), f"{prefix}{key}.", root or section)


def _study_of(arguments: Sequence[str]) -> str | None:
    """What a sweep's folder is called where nobody says it: the last words of the keys that vary, in the order in which
    they were typed. None where the study is typed, or an experiment's, or where Hydra has yet to refuse the words.

    `model/router=dense,soft seed=0,1` -> `router-seed`
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if any(word.lstrip("+").startswith(("study=", "experiment=", "experiment/")) for word in arguments):
        return None
    words = [word for word in arguments if not word.startswith("-") and "=" in word]
    try:
        typed = OverridesParser.create().parse_overrides(words)
    except HydraException:
        return None
    keys = [override.key_or_group for override in typed if override.is_sweep_override()]
    return "-".join(dict.fromkeys(re.split(r"[./]", key)[-1] for key in keys)) or None


def _refuse_unknown_to_hydra(arguments: Sequence[str]) -> None:
    """`+hydra.key=value` as well, where Hydra knows which keys it has."""
    from hydra.conf import HydraConf

    for argument in arguments:
        if not argument.startswith(("+hydra.", "++hydra.")):
            continue
        key, section = argument.lstrip("+").partition("=")[0].removeprefix("hydra."), HydraConf
        for word in key.split("."):
            hints = typing.get_type_hints(section)
            if word not in hints:
                raise UsageError(f"{argument}: there is no key 'hydra.{key}'.{nearest(word, hints)}")
            section = hints[word]
            if not dataclasses.is_dataclass(section):
                break


def plain(config: Any, section: type) -> dict[str, Any]:
    """The composed configuration as plain containers, unresolved, with unknown keys refused."""
    from omegaconf import OmegaConf

    tree = _contents(config)
    _refuse_unknown(tree, section)
    root = OmegaConf.select(config, "data.root", throw_on_resolution_failure=False)
    if root is not None:
        tree["data"]["root"] = root  # resolved: it is held against a checkpoint's
    return tree


def _contents(config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    tree = OmegaConf.to_container(config, resolve=False, throw_on_missing=False)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _door(tree: dict[str, Any], section: type[T]) -> T:
    """Plain containers to checked dataclasses: below this nobody knows OmegaConf.

    Raises:
        UsageError: a value that is missing, of the wrong type or out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _register_resolvers()
    try:
        _settle_side(tree)
        merged = OmegaConf.merge(OmegaConf.structured(section), tree)
        missing = OmegaConf.missing_keys(merged)
        if missing:
            raise UsageError(f"{sorted(missing)[0]} has no default; give it a value")
        checked = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UsageError(f"{error.full_key}: {first_line(error)}") from error
    assert isinstance(checked, section)
    checked.check()
    return checked


def _settle_side(tree: dict[str, Any]) -> None:
    """data.image_size=auto becomes a number of pixels: those of a model that has its own, else what suits the files.

    Raises:
        UsageError: the files cannot be used.
    """
    data, model = tree.get("data"), tree.get("model")
    if not isinstance(data, dict) or "${" in str(data["image_size"]):
        return
    check_side(data["name"], data["format"], data["image_size"])
    if data["image_size"] != "auto" or not isinstance(model, dict) or model["image_size"] == "???":
        return
    if data["root"] == "???":
        raise UsageError("data.root has no default; give it a value")
    if isinstance(model["image_size"], int):
        data["image_size"] = model["image_size"]
        return
    if model["backbone"]["timm"] not in (None, "???"):
        data["image_size"] = TIMM_SIDE
        return
    from omegaconf import OmegaConf

    from softmoe_cli.suit import shorter_sides, side_for

    read = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Data), data))
    assert isinstance(read, Data)
    read.check()
    sides, patch = shorter_sides(read), model["backbone"]["patch_size"]
    data["image_size"] = side = side_for(sides, patch if isinstance(patch, int) else None)
    if os.environ.get("RANK", "0") == "0":
        seen = f"{min(sides)} to {max(sides)}" if min(sides) < max(sides) else f"{min(sides)}"
        _tell(
            f"data.image_size=auto: {side}, as the shorter sides of the images have {seen} pixels, median "
            f"{statistics.median(sides):g}; type data.image_size={side} to have it whatever files come"
        )


TIMM_SIDE = 224
"""Pixels that most of timm's ViTs are made for."""


@functools.cache
def _register_resolvers() -> None:
    """What conf/ calls in ${…}: `suits:SIDE,KEY`, a setting of the small backbone for images of so many pixels."""
    from omegaconf import OmegaConf

    from softmoe_cli.help import files, load
    from softmoe_cli.suit import backbone_for

    def suits(side: Any, key: str) -> Any:
        if not isinstance(side, int):
            raise ValueError(f"the model follows data.image_size={side}, which the command settles when it runs")
        return load(files("model/backbone")[backbone_for(side)])[key]

    OmegaConf.register_new_resolver("suits", suits, replace=True)


def _overlay(base: dict[str, Any], typed: Any) -> dict[str, Any]:
    """`base` with what was typed on top; `???` is what nobody typed."""
    merged = dict(base)
    for key, value in (typed if isinstance(typed, dict) else {}).items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merged[key] = _overlay(base[key], value)
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

    _store_schemas()
    try:
        with initialize_config_dir(str(conf_folder()), version_base=None):
            return _door(plain(hydra_compose("train", list(overrides)), Config), Config)
    except (HydraException, OmegaConfBaseException) as error:
        from softmoe_cli.explain import explain

        raise UsageError(explain(error, "train", list(overrides))) from error


def _typed() -> list[str]:
    """What was typed, as Hydra took it."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task)


def _names(key: str, typed: Sequence[str]) -> bool:
    return any(override.partition("=")[0].lstrip("+") == key for override in typed)


def settle(command: str, tree: dict[str, Any], typed: Sequence[str]) -> "tuple[Config, Source | None]":
    """What `softmoe train` or `finetune` would run: the checked configuration and the weights to start from.

    Raises:
        UsageError: it cannot work.
    """
    from softmoe_cli import mirror

    if command == "train":
        checked = _door(tree, Config)
        if checked.slots != "kept":
            raise UsageError(f"slots={checked.slots} belongs to softmoe finetune: there is no checkpoint to keep to")
        for key in ("checkpoint", "trust"):
            if (value := getattr(checked, key)) is not None:
                raise UsageError(f"{key}={value} belongs to softmoe finetune; softmoe train starts afresh")
        mirror.check(checked)
        return checked, None
    if not tree["checkpoint"]:
        raise UsageError(
            "softmoe finetune needs checkpoint=: a run folder, a .safetensors file, hf-hub:OWNER/NAME or timm:NAME"
        )
    from softmoe_cli.models import proportional_slots

    source = _read(tree["checkpoint"])
    _inherit(tree, source, typed)
    checked = _door(tree, Config)
    mirror.check(checked)
    if checked.slots == "proportional":
        for key in ("model.router.slots_per_expert", "model.router.capacity_factor"):
            if _names(key, typed):
                raise UsageError(f"slots=proportional and {key} both say how many slots there are; leave one out")
        if "model" not in source.card:
            raise UsageError(f"slots=proportional: checkpoint={source.label} does not say how many slots it has")
        kept = _door(source.card["model"], Model)
        checked.model.router |= {"slots_per_expert": proportional_slots(kept, checked.model)}
    return checked, source


def _train(command: str, config: Any) -> None:
    checked, source = settle(command, plain(config, Config), _typed())
    if checked.devices > 1 and "RANK" not in os.environ:
        from softmoe_cli.launch import launch

        launch(checked, command)
        return
    from softmoe_cli.terminal import Screen
    from softmoe_cli.train import train

    train(checked, command, source, Screen())


def _groups(command: str, config: Any) -> None:
    """`--groups`: what the optimizer would do with each parameter."""
    checked, _ = settle(command, plain(config, Config), _typed())
    from softmoe_cli import data
    from softmoe_cli.cost import on_meta
    from softmoe_cli.optim import freeze, table

    vit = on_meta(checked.model, checked.data.num_classes or len(data.load(checked.data).classes))
    freeze(vit, checked.optim.freeze)
    print(table(vit, checked.optim))


def _read(checkpoint: str) -> "Source":
    """What `checkpoint=` names, with a word where its names are not as they stand in the file.

    Raises:
        UsageError: nothing usable there.
    """
    from softmoe_cli.models import read_checkpoint

    source = read_checkpoint(checkpoint)
    if source.prefix:
        _tell(f"checkpoint={source.label}: every name in it begins with '{source.prefix}'; read without that")
    return source


def _inherit(tree: dict[str, Any], source: "Source", typed: Sequence[str]) -> None:
    """Model and pixel normalisation are the checkpoint's, but for what was typed."""
    card, label = source.card, source.label
    if "model" not in card and (not isinstance(tree["model"], dict) or tree["model"].get("image_size") == "???"):
        raise UsageError(f"checkpoint={label} does not say what model it is; name one with model=")
    tree["model"] = _overlay(card.get("model", {}), tree["model"])
    if not any(_names(key, typed) for key in ("model", "model/router", "model.router._target_")):
        _trust(tree["model"], source, tree.get("trust"))
    if "classes" in card:  # ours, not timm's
        same = isinstance(tree["model"]["router"], dict) and tree["model"]["router"].get("_target_")
        router = card["model"]["router"]
        _described(source, router if same == router["_target_"] else {"_target_": None})
    for key in ("mean", "std"):
        if key in card.get("data", {}) and not _names(f"data.{key}", typed):
            tree["data"][key] = card["data"][key]
    _keep_cut(tree["data"], card.get("data", {}), typed)


def _trust(model: dict[str, Any], source: "Source", trusted: str | None) -> None:
    """Refuses a router that only a checkpoint's own words name, `trusted` apart: to import a module is to run it. The
    folder where the command is typed vouches for it in conf/model/router, but not for a checkpoint inside itself: who
    downloads one gets the other with it.

    Raises:
        UsageError: nobody vouches for it.
    """
    target = model["router"].get("_target_") if isinstance(model.get("router"), dict) else None
    if target is None or target != source.card.get("model", {}).get("router", {}).get("_target_"):
        return
    if target.startswith("softmoe_cli.moe.routers.") or target == trusted:
        return
    from softmoe_cli.help import load

    own = _own_conf()
    files = sorted((own / "model/router").glob("*.yaml")) if own else []
    vouching = next((file for file in files if load(file).get("_target_") == target), None)
    here, place = Path.cwd().resolve(), Path(source.label)
    inside = here in place.resolve().parents or here in Path(os.path.abspath(place)).parents
    if vouching is None:
        raise UsageError(
            f"checkpoint={source.label} names the router {target}, which is not softmoe's; if you trust it, put its "
            f"yaml into conf/model/router where you type the command, or say trust={target}"
        )
    if inside and not source.label.startswith("hf-hub:"):
        raise UsageError(
            f"checkpoint={source.label} names the router {target}, which is not softmoe's, and what vouches for it "
            f"({vouching}) lies in the same folder; if you trust that, say trust={target}"
        )


def _evaluate(config: Any) -> None:
    tree = plain(config, EvaluateConfig)
    if tree["checkpoint"] == "???":
        raise UsageError(
            "softmoe evaluate needs checkpoint=: a run folder, a .safetensors file or hf-hub:OWNER/NAME, or a list of "
            "them"
        )
    names = tree["checkpoint"] if isinstance(tree["checkpoint"], list) else [tree["checkpoint"]]
    if not names or not all(isinstance(name, str) for name in names):
        raise UsageError(f"checkpoint={tree['checkpoint']} is neither a path nor a list of paths")
    for name in names:
        if name.startswith("timm:"):
            raise UsageError(f"checkpoint={name} knows no classes of a data set here; use softmoe finetune")
    from softmoe_cli.scorecard import evaluate_checkpoint
    from softmoe_cli.soup import check_alike

    sources = [_read(name) for name in names]
    model, *_ = [_model_of(source, tree["trust"]) for source in sources]
    named = _named(tree["data"])
    _take_data(tree, sources[0])
    own = next((source for source in sources if same_set(tree["data"], source.card["data"])), sources[0])
    _keep_cut(tree["data"], own.card["data"], _typed())
    check_alike(sources, tree["data"])
    checked = _door(tree, EvaluateConfig)
    check_channels(checked.data, model.in_chans)
    if not named:
        _check_here(checked.data, sources[0])
    evaluate_checkpoint(checked, model, sources)


def _model_of(source: "Source", trusted: str | None) -> Model:
    """The model that a checkpoint says it is, and that its weights are of.

    Raises:
        UsageError: it does not say so, it cannot be, or nobody vouches for its router.
    """
    if "model" not in source.card:
        raise UsageError(f"checkpoint={source.label} does not say what model it is; softmoe saved no such file")
    _trust(source.card["model"], source, trusted)
    return _described(source, source.card["model"]["router"])


def _described(source: "Source", router: dict[str, Any]) -> Model:
    """The card's model with a router that may be imported; held against the weights before it is built."""
    from softmoe_cli.models import require_described

    try:
        model = _door(source.card["model"] | {"router": dict(router)}, Model)
    except UsageError as error:
        raise UsageError(f"checkpoint={source.label} says that it is a model that cannot be: {error}") from error
    require_described(source, model)
    return model


def _named(data: Any) -> bool:
    """Whether a set was typed."""
    return isinstance(data, dict) and data.get("name", "???") != "???"


def _check_here(data: Data, source: "Source") -> None:
    """Raises UsageError where a set that only the checkpoint names would have to be fetched."""
    from softmoe_cli.data import is_here

    if not is_here(data):
        raise UsageError(
            f"checkpoint={source.label} names data={data.name}, which is not in data.root={data.root}; only a set that "
            f"is typed is fetched: add data={data.name}"
        )


def _take_data(tree: dict[str, Any], source: "Source") -> None:
    """The data are the checkpoint's unless some were named, and then at least the pixels' mean and deviation."""
    named = _named(tree["data"])
    tree["data"] = _overlay(source.card["data"], tree["data"])
    if tree["data"]["image_size"] == "auto":
        own = same_set(tree["data"], source.card["data"])
        tree["data"]["image_size"] = (source.card["data"] if own else source.card["model"])["image_size"]
    if named:
        for key in ("mean", "std"):
            if not _names(f"data.{key}", _typed()):
                tree["data"][key] = source.card["data"][key]
        _keep_cut(tree["data"], source.card["data"], _typed())


def _keep_cut(data: dict[str, Any], card: dict[str, Any], typed: Sequence[str]) -> None:
    """The checkpoint's own set is cut as it was for the checkpoint, unless typed otherwise: another cut would have
    images that were trained on among those that are held out."""
    if "name" not in card or data["test_fraction"] == 1:  # all of it is for evaluation
        return
    other = {key: card[key] for key in CUT if key in card and data[key] != card[key]}
    other = {key: value for key, value in other.items() if not _names(f"data.{key}", typed)}
    words = " ".join(f"data.{key}={value}" for key, value in other.items())
    if other and same_set(data, card):
        data |= other
        said = f"cut as for the checkpoint: {words}"
    elif other and data.get("name") == card["name"] and data.get("format") == card.get("format"):
        said = (
            f"data.root={data['root']} is not the checkpoint's {card['root']}, so it is cut anew; if these are the "
            f"images that it was trained on, add {words}"
        )
    else:
        return
    if os.environ.get("RANK", "0") == "0":
        _tell(said)


@functools.cache
def _tell(text: str) -> None:
    """Once, whatever the number of jobs."""
    print(f"softmoe: {text}", file=sys.stderr)


def _export(config: Any) -> None:
    tree = plain(config, ExportConfig)
    if tree["checkpoint"] == "???":
        raise UsageError("softmoe export needs checkpoint=: a run folder, a .safetensors file or hf-hub:OWNER/NAME")
    if tree["checkpoint"].startswith("timm:"):
        raise UsageError(f"checkpoint={tree['checkpoint']} is timm's own; softmoe export is for what softmoe trained")
    from softmoe_cli.export import export, show

    source = _read(tree["checkpoint"])
    model = _model_of(source, tree["trust"])
    named = _named(tree["data"])
    _take_data(tree, source)
    checked = _door(tree, ExportConfig)
    check_channels(checked.data, model.in_chans)
    if not named:
        _check_here(checked.data, source)
    show(export(checked, model, source), checked.format)


def _upcycle(config: Any) -> None:
    tree = plain(config, UpcycleConfig)
    if tree["checkpoint"] == "???":
        raise UsageError(
            "softmoe upcycle needs checkpoint= of a dense model: a run folder, a .safetensors file, "
            "hf-hub:OWNER/NAME or timm:NAME"
        )
    from softmoe_cli.models import timm_card
    from softmoe_cli.upcycle import show, upcycle

    source = _read(tree["checkpoint"])
    name = tree["model"]["backbone"]["timm"]
    if "model" not in source.card and name not in (None, "???"):
        source = dataclasses.replace(source, card=timm_card(name))
    _take_backbone(tree["model"], source, _typed())
    named = _named(tree["data"])
    tree["data"] = _overlay(source.card.get("data", {}), tree["data"])
    _inherit(tree, source, _typed())
    if tree["data"].get("name", "???") == "???":
        raise UsageError(f"checkpoint={source.label} names no images; choose some with data=, for the receipt")
    if tree["model"]["router"] == "???" or tree["model"]["router"]["_target_"] is None:
        raise UsageError(
            "softmoe upcycle needs a router: model/router=NAME with model.moe_blocks=last_N, or a named point as model="
        )
    checked = _door(tree, UpcycleConfig)
    if not named:
        _check_here(checked.data, source)
    show(upcycle(checked, source), checked.format)


def _take_backbone(model: dict[str, Any], source: "Source", typed: Sequence[str]) -> None:
    """Everything but router, placement and experts is the checkpoint's; what was typed may not say otherwise."""
    if _names("model.expert_init", typed):
        raise UsageError(
            "model.expert_init has no effect here: experts start as copies; see expert_noise, expert_redraw"
        )
    own = source.card.get("model")
    if own is None:
        if model["image_size"] == "???":
            raise UsageError(
                f"checkpoint={source.label} does not say what model it is; name timm's with "
                "model.backbone.timm=NAME, or one of ours with model="
            )
        return
    if own["router"]["_target_"] is not None:
        raise UsageError(
            f"checkpoint={source.label} has a router already ({own['router']['_target_']}); use a dense one"
        )
    chosen = model["backbone"]
    free = ("name", "drop_path", "pos_std", "init")  # what says nothing of trained weights
    for key, value in own["backbone"].items():
        if str(chosen[key]).startswith("${suits:"):  # follows the images, and so the checkpoint
            chosen[key] = value
        if key not in free and chosen[key] not in ("???", value):
            raise UsageError(
                f"the backbone chosen has {key}={chosen[key]}, but checkpoint={source.label} has {key}={value} "
                f"({own['backbone']['name']}); choose only model/router=, model.moe_blocks= and the router's options"
            )
        if key == "name":
            chosen[key] = value
    if not _names("model.image_size", typed):
        model["image_size"] = own["image_size"]
    model["in_chans"] = own["in_chans"]


def _data_check(config: Any) -> int:
    checked = _door(plain(config, DataCheckConfig), DataCheckConfig)
    from softmoe_cli.data_check import check

    return check(checked)


def _match(config: Any) -> None:
    tree = plain(config, MatchConfig)
    checked = _door(tree, MatchConfig)
    from softmoe_cli.match import match, show

    print(show(match(checked, _other(checked.to, _typed()), functools.partial(_changed, tree)), checked))


def _other(name: str, typed: Sequence[str]) -> MatchConfig:
    """The model that is to be met, with everything else as typed."""
    from hydra import compose
    from hydra.errors import HydraException

    kept = [override for override in typed if re.split(r"[.=/@]", override.lstrip("+~"))[0] != "model"]
    try:
        config = compose("match", [*kept, f"model={name}"])
    except HydraException as error:
        from softmoe_cli.explain import explain

        raise UsageError(f"to={name}: {explain(error, 'match', []).partition(': ')[2]}") from error
    return _door(plain(config, MatchConfig), MatchConfig)


def _changed(tree: dict[str, Any], changes: dict[str, Any]) -> MatchConfig:
    """The configuration in `tree` with some keys changed."""
    changed = copy.deepcopy(tree)
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        node = changed
        for section in sections:
            node = node[section]
        node[leaf] = value
    return _door(changed, MatchConfig)
