"""The commands. Hydra begins and ends here; torch, timm and wandb are imported by the command that needs them."""

import contextlib
import copy
import dataclasses
import functools
import json
import os
import re
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from softmoe_cli.config import (
    CUT,
    Config,
    CostConfig,
    DataCheckConfig,
    EvaluateConfig,
    ExportConfig,
    LocalLauncher,
    MatchConfig,
    Model,
    RayLauncher,
    SlurmLauncher,
    UpcycleConfig,
    UsageError,
    check_channels,
    nearest,
    same_set,
)
from softmoe_cli.files import RunError
from softmoe_cli.text import first_line

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


def main() -> None:
    """The entry point: runs sys.argv and exits with 0, 1 (it failed, or found faults), 2 (cannot work) or 130
    (interrupted)."""
    code, text = run(sys.argv[1:])
    if text:
        print(f"softmoe: {text.removeprefix('softmoe ')}", file=sys.stderr)
    leave(code)


def run(arguments: Sequence[str]) -> tuple[int, str]:
    """Runs a command line; returns its exit status and, where an error caused it, the sentence that says why."""
    debug = "--debug" in arguments
    try:
        return _dispatch([argument for argument in arguments if argument != "--debug"]), ""
    except UsageError as error:
        return _failed(error, 2, debug)
    except KeyboardInterrupt as error:
        return _failed(error, 130, debug)
    except BrokenPipeError:
        _nobody_listens()
        return 1, ""
    except RunError as error:
        return _failed(error, 1, debug)


def leave(code: int) -> typing.NoReturn:
    """Ends the process."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _nobody_listens()
        code = code or 1
    if "softmoe_cli.mirror" in sys.modules and sys.modules["softmoe_cli.mirror"].stuck:
        os._exit(code)  # W&B's own goodbye would wait for a server that does not answer
    sys.exit(code)


def _nobody_listens() -> None:
    """`softmoe list | head`: what is still to be said meets no closed pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _failed(error: BaseException, code: int, debug: bool) -> tuple[int, str]:
    if debug:
        raise error
    text = str(error)
    if isinstance(error, KeyboardInterrupt):
        text = f"stopped by {text or 'SIGINT'}; type the same command to go on"
    return code, text


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
    if not folders:
        raise UsageError("softmoe status needs a folder: a study such as outputs/default, a sweep, a run or outputs")
    from softmoe_cli.status import read, show

    states = read(folders)
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
    except (ImportError, SyntaxError, NameError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error
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
    import hydra
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.errors import HydraException
    from hydra.plugins.search_path_plugin import SearchPathPlugin
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    class OwnConf(SearchPathPlugin):
        """A conf folder in the working directory comes first, so that it can add and replace."""

        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            own = _own_conf()
            if own is not None:
                search_path.prepend("softmoe-own", f"file://{own}")

    from softmoe_cli.explain import check_line, explain, refused

    _store_schemas()
    Plugins.instance().register(OwnConf)
    arguments = check_line(command, arguments)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing and leaving with status 1
    many = any(argument in ("-m", "--multirun") for argument in arguments)
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
        except OmegaConfBaseException as error:
            failures.append(UsageError(explain(error, command, arguments)))
        except (UsageError, RunError) as error:
            if failures:
                print(f"softmoe: {failures[-1]}", file=sys.stderr)
            failures.append(error)

    try:
        with contextlib.ExitStack() as nowhere:
            if "--plan" in arguments:  # and Hydra's own files go nowhere
                import tempfile

                folder = nowhere.enter_context(tempfile.TemporaryDirectory())
                arguments = [argument for argument in arguments if argument != "--plan"]
                arguments += ["hydra.launcher.plan=true", f"hydra.sweep.dir={folder}"]
            if any(argument.startswith(("-i", "--info", "--hydra-help")) for argument in arguments):
                import logging

                logging.raiseExceptions = False  # Hydra logs it, and `| head` reads no more than the first lines
            sys.argv = ["softmoe", *arguments]
            hydra.main(version_base=None, config_path=str(conf_folder()), config_name=command)(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(explain(error, command, arguments)) from error
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, OSError, YAMLError) as error:
        if began or isinstance(error, UsageError | RunError | BrokenPipeError):
            raise
        raise UsageError(refused(error, arguments)) from error
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

    try:
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
    if command == "train":
        checked = _door(tree, Config)
        if checked.slots != "kept":
            raise UsageError(f"slots={checked.slots} belongs to softmoe finetune: there is no checkpoint to keep to")
        if checked.checkpoint is not None:
            raise UsageError(
                f"checkpoint={checked.checkpoint} belongs to softmoe finetune; softmoe train starts afresh"
            )
        return checked, None
    if not tree["checkpoint"]:
        raise UsageError(
            "softmoe finetune needs checkpoint=: a run folder, a .safetensors file, hf-hub:OWNER/NAME or timm:NAME"
        )
    from softmoe_cli.models import proportional_slots, read_checkpoint

    source = read_checkpoint(tree["checkpoint"])
    _inherit(tree, source.card, source.label, typed)
    checked = _door(tree, Config)
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


def _inherit(tree: dict[str, Any], card: dict[str, Any], label: str, typed: Sequence[str]) -> None:
    """Model and pixel normalisation are the checkpoint's, but for what was typed."""
    if "model" not in card and (not isinstance(tree["model"], dict) or tree["model"].get("image_size") == "???"):
        raise UsageError(f"checkpoint={label} does not say what model it is; name one with model=")
    tree["model"] = _overlay(card.get("model", {}), tree["model"])
    _trust(tree["model"], card, label)
    for key in ("mean", "std"):
        if key in card.get("data", {}) and not _names(f"data.{key}", typed):
            tree["data"][key] = card["data"][key]
    _keep_cut(tree["data"], card.get("data", {}), typed)


def _trust(model: dict[str, Any], card: dict[str, Any], label: str) -> None:
    """Refuses a router that only a checkpoint's own words name: to import a module is to run it."""
    target = model["router"].get("_target_") if isinstance(model.get("router"), dict) else None
    if target is None or target != card.get("model", {}).get("router", {}).get("_target_"):
        return
    import yaml

    own = _own_conf()
    files = (own / "model/router").glob("*.yaml") if own else ()
    known = [yaml.safe_load(file.read_text()).get("_target_") for file in files]
    if not str(target).startswith("softmoe_cli.moe.routers.") and target not in known:
        raise UsageError(
            f"checkpoint={label} names the router {target}, which is not softmoe's; if you trust it, put its yaml into "
            "conf/model/router where you type the command"
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
    from softmoe_cli.models import read_checkpoint
    from softmoe_cli.scorecard import evaluate_checkpoint
    from softmoe_cli.soup import check_alike

    sources = [read_checkpoint(name) for name in names]
    model, *_ = [_model_of(source) for source in sources]
    _take_data(tree, sources[0])
    own = next((source for source in sources if same_set(tree["data"], source.card["data"])), sources[0])
    _keep_cut(tree["data"], own.card["data"], _typed())
    check_alike(sources, tree["data"])
    checked = _door(tree, EvaluateConfig)
    check_channels(checked.data, model.in_chans)
    evaluate_checkpoint(checked, model, sources)


def _model_of(source: "Source") -> Model:
    """The model that a checkpoint says it is."""
    if "model" not in source.card:
        raise UsageError(f"checkpoint={source.label} does not say what model it is; softmoe saved no such file")
    _trust(source.card["model"], source.card, source.label)
    return _door(source.card["model"], Model)


def _take_data(tree: dict[str, Any], source: "Source") -> None:
    """The data are the checkpoint's unless some were named, and then at least the pixels' mean and deviation."""
    named = isinstance(tree["data"], dict) and tree["data"].get("name") != "???"
    tree["data"] = _overlay(source.card["data"], tree["data"])
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
    from softmoe_cli.models import read_checkpoint

    source = read_checkpoint(tree["checkpoint"])
    model = _model_of(source)
    _take_data(tree, source)
    checked = _door(tree, ExportConfig)
    check_channels(checked.data, model.in_chans)
    show(export(checked, model, source), checked.format)


def _upcycle(config: Any) -> None:
    tree = plain(config, UpcycleConfig)
    if tree["checkpoint"] == "???":
        raise UsageError(
            "softmoe upcycle needs checkpoint= of a dense model: a run folder, a .safetensors file, "
            "hf-hub:OWNER/NAME or timm:NAME"
        )
    from softmoe_cli.models import read_checkpoint, timm_card
    from softmoe_cli.upcycle import show, upcycle

    source = read_checkpoint(tree["checkpoint"])
    name = tree["model"]["backbone"]["timm"]
    if "model" not in source.card and name not in (None, "???"):
        source = dataclasses.replace(source, card=timm_card(name))
    _take_backbone(tree["model"], source, _typed())
    tree["data"] = _overlay(source.card.get("data", {}), tree["data"])
    _inherit(tree, source.card, source.label, _typed())
    if tree["data"].get("name", "???") == "???":
        raise UsageError(f"checkpoint={source.label} names no images; choose some with data=, for the receipt")
    if tree["model"]["router"] == "???" or tree["model"]["router"]["_target_"] is None:
        raise UsageError(
            "softmoe upcycle needs a router: model/router=NAME with model.moe_blocks=last_N, or a named point as model="
        )
    checked = _door(tree, UpcycleConfig)
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
