"""What is typed: the commands and their exit statuses. torch, timm and wandb are imported by the command that needs
them."""

import functools
import os
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from typing import Any

from softmoe_cli import programs
from softmoe_cli.config.commands import CostConfig, DataCheckConfig, EvaluateConfig, MatchConfig
from softmoe_cli.config.data import check_channels
from softmoe_cli.config.run import Config
from softmoe_cli.config.settle import FAIR_KEYS
from softmoe_cli.errors import UsageError, nearest
from softmoe_cli.failures import defect, ours
from softmoe_cli.options.compose import Jobs, admit, changed, door, other_model, plain, say_once
from softmoe_cli.options.usage import COMMANDS, HELP
from softmoe_cli.process import settle_in
from softmoe_cli.run.finished import finished
from softmoe_cli.signals import interruptible, leave, nobody_listens
from softmoe_cli.text import printable_lines

if typing.TYPE_CHECKING:
    from pathlib import Path

    from softmoe_cli.train.first import First


def main() -> None:
    """The entry point: runs sys.argv and exits with 0, 1 (it failed, or found faults), 2 (cannot work) or 130
    (interrupted)."""
    settle_in()
    code, text = run(sys.argv[1:])
    if text:
        print(f"softmoe: {printable_lines(text.removeprefix('softmoe '))}", file=sys.stderr)
    leave(code)


def run(arguments: Sequence[str]) -> tuple[int, str]:
    """Runs a command line; returns its exit status and, where an error caused it, the sentence that says why. With
    --json that is an answer too."""
    if not programs.wanted_by(arguments):
        return _run(arguments)
    with programs.for_programs():
        code, text = _run(arguments)
        if text:
            programs.fail(text, code)
    return code, text


def _run(arguments: Sequence[str]) -> tuple[int, str]:
    debug = "--debug" in arguments
    trains = arguments[:1] in (["train"], ["finetune"], ["settle"])
    try:
        with interruptible(functools.partial(_stopped, trains)):
            command, words = _command(programs.as_option([word for word in arguments if word != "--debug"]))
            return ACTIONS[command](words), ""
    except KeyboardInterrupt as error:
        if debug:
            traceback.print_exception(error)
        return 130, _stopped(trains, str(error) or "SIGINT")
    except BrokenPipeError as error:
        if error.filename is not None:  # a named pipe among somebody's files
            return _failed(error, debug, arguments)
        nobody_listens()
        return 1, ""
    except Exception as error:
        return _failed(error, debug, arguments)


def _stopped(trains: bool, name: str) -> str:
    """The sentence for a command that a signal stopped; `name` is the signal's."""
    why = "nobody reads what it says any more, so it stopped" if name == "SIGPIPE" else f"stopped by {name}"
    return f"{why}; type the same command to go on" if trains else why


def _failed(error: Exception, debug: bool, typed: Sequence[str]) -> tuple[int, str]:
    """Exit status and sentence of an error. Prints the traceback of a defect, and with `debug` that of any error."""
    known = ours(error, typed)
    if known is None:
        return 1, defect(error)
    if debug:
        traceback.print_exception(error)
    return 2 if isinstance(known, UsageError) else 1, str(known)


def _command(arguments: list[str]) -> tuple[str, list[str]]:
    """Splits the words into a command and its arguments; every way to ask for help becomes the command `help`.

    Raises:
        UsageError: there is no such command.
    """
    if any(a == "-sc" or a.startswith("--shell-completion") for a in arguments):
        raise UsageError('what the Tab key completes comes from softmoe: type eval "$(softmoe completion bash)"')
    first, *rest = arguments or ["help"]
    if first in ("-h", "--help", "help"):
        return "help", rest
    if first in ("-V", "--version", "version"):
        return "version", rest
    _require_command(first)
    if "--version" in rest:  # Hydra would tell its own
        return "version", []
    if "-h" in rest or "--help" in rest or rest[:1] == ["help"] or rest[:2] == ["check", "help"]:
        return "help", [first, *(word for word in rest if word not in ("-h", "--help", "help"))]
    return first, rest


def _require_command(word: str) -> None:
    if word not in COMMANDS:
        raise UsageError(f"there is no command '{word}'.{nearest(word, COMMANDS)} Commands: {', '.join(COMMANDS)}")


def _help(words: list[str]) -> int:
    text = HELP
    if words:
        _require_command(words[0])
        from softmoe_cli.options.help import usage

        text = usage(words[0], words[1:])
    return _tell("help", text)


def _tell(what: str, text: str) -> int:
    """Prints a text; for a program as the value of `what`."""
    programs.reply({what: text}) if programs.listen() else print(text)
    return 0


def _version(_words: list[str]) -> int:
    from importlib.metadata import version

    return _tell("version", version("softmoe-cli"))


# --- commands that train ----------------------------------------------------------------------------------------------


def _learn(command: str, arguments: list[str]) -> int:
    """`softmoe train` and `softmoe finetune`: one run or, with -m, a sweep of several."""
    from softmoe_cli.options.explain import check_line

    many, line = _many(arguments), arguments
    if many:
        from softmoe_cli.launch.typed import in_full
        from softmoe_cli.settle.command import fair_words

        arguments, made_fair = fair_words(in_full(arguments))
    elif fair := [word for word in arguments if word.partition("=")[0] in (*FAIR_KEYS, "seeds_at_once")]:
        raise UsageError(f"{fair[0]} is about the jobs of a sweep; it goes with -m, or with softmoe settle")
    arguments = check_line(command, arguments)
    if "--groups" in arguments:
        return _groups(command, [argument for argument in arguments if argument != "--groups"])
    jobs = _sweep(command, arguments, made_fair, line) if many else Jobs(command, arguments)
    from softmoe_cli.options.inherit import resolve, resolved_early
    from softmoe_cli.train.first import first_words

    for config, typed in jobs:
        with jobs.attempt():
            tree = plain(config, Config)
            known = resolved_early(command, tree, typed)
            first = None if known is None else first_words(command, *known)
            if first is None or first.ended is None:
                checked, source = known if known is not None and command == "train" else resolve(command, tree, typed)
                folder = _train(command, checked, source, first or first_words(command, checked, source))
            else:
                folder = first.ended
            if programs.listen() and os.environ.get("RANK", "0") == "0":
                programs.reply({"folder": str(folder), **(finished(folder) or {})})
    jobs.end()
    return 0


def _train(command: str, config: Config, source: Any, first: "First") -> "Path":
    """One run, and its folder; torch is imported where it is needed. `source`: the weights that it begins with;
    `first`: what its settings have told."""
    from softmoe_cli.run import mirror

    if first.ended is not None:
        return first.ended
    together = "RANK" in os.environ  # one of several processes that train one model
    mirror.check(config)
    if config.devices > 1 and not together:
        from softmoe_cli.launch.devices import launch

        return launch(config, command)
    from softmoe_cli.train.loop import train
    from softmoe_cli.train.setup import begin

    with begin(config, command, source, first.screen, first.images) as begun:
        train(begun)
        return begun.run.folder


def _sweep(command: str, arguments: list[str], more: Sequence[str], line: list[str]) -> Jobs:
    """Lets a sweep's launcher run its jobs; returns the jobs that are still to be run here: all, if the launcher is
    Hydra's. `line`: the arguments as they were typed.

    Raises:
        RunError: some jobs failed; the message lists them.
    """
    from softmoe_cli.launch.sweep import Sweep
    from softmoe_cli.launch.typed import study_of

    study = study_of(arguments)
    if study is not None:
        say_once(f"study={study}, after the keys that vary; study= names another folder")
        arguments = [*arguments, f"study={study}"]
    arguments = [*arguments, *more]
    admit(Sweep)
    Sweep.run, Sweep.last, Sweep.line = staticmethod(run), None, (command, line)
    if "--plan" in arguments:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:  # Hydra writes its own files there
            arguments = [argument for argument in arguments if argument != "--plan"]
            return Jobs(command, [*arguments, "hydra.launcher.plan=true", f"hydra.sweep.dir={folder}"])
    jobs = Jobs(command, arguments)
    if Sweep.last is not None:
        Sweep.last.report()
        if programs.listen():
            programs.reply(Sweep.last.told())
    return jobs


def _settle(arguments: list[str]) -> int:
    """`softmoe settle`: rounds of seeds until every arm has its verdict."""
    from softmoe_cli.settle.command import settle_arms

    return settle_arms(arguments, run)


def _many(arguments: Sequence[str]) -> bool:
    return any(argument in ("-m", "--multirun") for argument in arguments)


def _groups(command: str, arguments: list[str]) -> int:
    """`--groups`: prints the learning rate and the decay of each parameter."""
    from softmoe_cli.options.inherit import resolve

    jobs = Jobs(command, arguments)
    for config, typed in jobs:
        with jobs.attempt():
            checked, _ = resolve(command, plain(config, Config), typed)
            from softmoe_cli.cost.flop import on_meta
            from softmoe_cli.data import sets
            from softmoe_cli.optim import freeze, settings, table

            vit = on_meta(checked.model, checked.data.num_classes or len(sets.load(checked.data).classes))
            freeze(vit, checked.optim.freeze)
            if programs.listen():
                programs.reply([row.told() for row in settings(vit, checked.optim)])
            else:
                print(table(vit, checked.optim))
    jobs.end()
    return 0


# --- commands that compose a configuration ----------------------------------------------------------------------------


def _composing(command: str, job: Callable[[Any, list[str]], int]) -> Callable[[list[str]], int]:
    """The command that composes a configuration from its arguments, or several (-m), and calls `job` with each."""

    def act(arguments: list[str]) -> int:
        from softmoe_cli.options.explain import check_line

        jobs, codes = Jobs(command, check_line(command, arguments)), [0]
        for config, typed in jobs:
            with jobs.attempt():
                codes.append(job(config, typed))
        jobs.end()
        return max(codes)

    return act


def _cost(arguments: list[str]) -> int:
    """`softmoe cost`: one table, whatever the number of models."""
    models: list[CostConfig] = []

    def job(config: Any, _typed: list[str]) -> int:
        models.append(door(plain(config, CostConfig), CostConfig))
        return 0

    code = _composing("cost", job)(arguments)
    if models:
        from softmoe_cli.cost.command import costs, show_costs

        programs.say(show_costs(costs(models), models[0].format, many=_many(arguments)))
    return code


def _match(config: Any, typed: list[str]) -> int:
    tree = plain(config, MatchConfig)
    checked = door(tree, MatchConfig)
    other = other_model(checked.to, typed)  # says that there is none before torch is imported
    from softmoe_cli.cost.match import match, show_match

    best = match(checked, other, functools.partial(changed, tree))
    programs.say(show_match(best, checked))
    return 0


def _data_check(config: Any, _typed: list[str]) -> int:
    checked = door(plain(config, DataCheckConfig), DataCheckConfig)
    if checked.data.format is not None:
        from softmoe_cli.data.listing import listing

        listing(checked.data)  # says what is wrong with a path before torch is imported
    from softmoe_cli.data.check import check_data

    return check_data(checked)


def _data(arguments: list[str]) -> int:
    if arguments[:1] != ["check"]:
        word = arguments[0] if arguments else ""
        got = f"not {word}.{nearest(word, ['check'])}" if word else "as in softmoe data check data=folder"
        raise UsageError(f"softmoe data takes the word check, {got}")
    return _composing("data_check", _data_check)(arguments[1:])


def _evaluate(config: Any, typed: list[str]) -> int:
    tree = plain(config, EvaluateConfig)
    if tree["checkpoint"] == "???":
        raise UsageError(
            "softmoe evaluate needs checkpoint=: a run folder, a .safetensors file, hf-hub:OWNER/NAME or vmoe:PATH, or "
            "a list of them"
        )
    paths = tree["checkpoint"] if isinstance(tree["checkpoint"], list) else [tree["checkpoint"]]
    if not paths or not all(isinstance(path, str) for path in paths):
        raise UsageError(f"checkpoint={tree['checkpoint']} is neither a path nor a list of paths")
    for path in paths:
        if path.startswith("timm:"):
            raise UsageError(f"checkpoint={path} knows no classes of a data set here; use softmoe finetune")
    from softmoe_cli.options import inherit

    sources = [inherit.named_source(path, tree["base"]) for path in paths]
    from softmoe_cli.evaluate.command import evaluate_checkpoint
    from softmoe_cli.evaluate.soup import check_alike

    model, *_ = [inherit.model_of(source, tree["trust"]) for source in sources]
    named = inherit.names_data(tree["data"])
    inherit.take_data(tree, sources[0], typed)
    own = next((source for source in sources if inherit.same_set(tree["data"], source.card["data"])), sources[0])
    inherit.keep_cut(tree["data"], own.card["data"], typed)
    check_alike(sources, tree["data"])
    inherit.take_task(tree, sources[0], typed, named=named)
    checked = door(tree, EvaluateConfig)
    check_channels(checked.data, model.in_chans)
    if not named:
        inherit.check_here(checked.data, sources[0])
    evaluate_checkpoint(checked, model, sources)
    return 0


def _export(config: Any, typed: list[str]) -> int:
    from softmoe_cli.export.command import export_as_typed

    return export_as_typed(config, typed)


def _prune(config: Any, typed: list[str]) -> int:
    from softmoe_cli.prune.command import prune_as_typed

    return prune_as_typed(config, typed)


def _extract(config: Any, typed: list[str]) -> int:
    from softmoe_cli.extract.command import extract_as_typed

    return extract_as_typed(config, typed)


def _upcycle(config: Any, typed: list[str]) -> int:
    from softmoe_cli.upcycle.command import upcycle_as_typed

    return upcycle_as_typed(config, typed)


# --- commands that compose nothing ------------------------------------------------------------------------------------


def _compare(arguments: list[str]) -> int:
    from softmoe_cli.compare import command as compare_command

    return compare_command.compare_folders(arguments)


def _scaling(arguments: list[str]) -> int:
    from softmoe_cli.scaling.command import run_scaling

    return run_scaling(arguments)


def _show(arguments: list[str]) -> int:
    """`softmoe show`: a word without = is the run, and two options are words of their own."""
    from softmoe_cli.show.command import show_as_typed, spelt_out

    return _composing("show", show_as_typed)(spelt_out(arguments))


def _check(arguments: list[str]) -> int:
    """`softmoe check`: prints the report; 1 if a check failed."""
    names = [argument for argument in arguments if "=" not in argument]
    if len(names) != 1:
        raise UsageError(
            f"softmoe check takes one router and its options as KEY=VALUE, got {' '.join(names) or 'none'}"
        )
    from softmoe_cli.check.command import check_as_typed

    return check_as_typed(names[0], [argument for argument in arguments if "=" in argument])


def _status(arguments: list[str]) -> int:
    from softmoe_cli.run.status import status_as_typed

    return status_as_typed(arguments)


def _doctor(arguments: list[str]) -> int:
    from softmoe_cli.doctor.command import doctor_as_typed

    return doctor_as_typed(arguments)


def _list(arguments: list[str]) -> int:
    from softmoe_cli.options.list import list_as_typed

    list_as_typed(arguments)
    return 0


def _completion(arguments: list[str]) -> int:
    from softmoe_cli.options.completion import complete

    return complete(arguments)


ACTIONS: typing.Final[dict[str, Callable[[list[str]], int]]] = {
    "train": functools.partial(_learn, "train"),
    "finetune": functools.partial(_learn, "finetune"),
    "settle": _settle,
    "upcycle": _composing("upcycle", _upcycle),
    "prune": _composing("prune", _prune),
    "extract": _composing("extract", _extract),
    "evaluate": _composing("evaluate", _evaluate),
    "export": _composing("export", _export),
    "cost": _cost,
    "match": _composing("match", _match),
    "compare": _compare,
    "scaling": _scaling,
    "show": _show,
    "check": _check,
    "data": _data,
    "status": _status,
    "doctor": _doctor,
    "list": _list,
    "completion": _completion,
    "help": _help,
    "version": _version,
}
"""Every command: a function from the words after its name to the exit status."""
