"""One sentence for a command line that Hydra or OmegaConf refuses: the key, the value, the choices, the nearest."""

import dataclasses
import difflib
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from softmoe_cli.config.commands import SCHEMAS
from softmoe_cli.config.settle import Fairness
from softmoe_cli.errors import UsageError, first_line, nearest
from softmoe_cli.options.conf_files import (
    ADDED,
    CONF_GROUPS,
    TITLES,
    chosen_groups,
    defaults,
    files,
    keys,
    load_yaml,
    own_conf_folder,
    router_options,
    without_launcher,
)
from softmoe_cli.options.help import Option, launcher_options, options
from softmoe_cli.text import printable

if TYPE_CHECKING:
    from argparse import ArgumentParser


SYNONYMS = {
    "learning_rate": "optim.lr", "base_lr": "optim.lr", "blr": "optim.lr", "peak_lr": "optim.lr",
    "wd": "optim.weight_decay", "decay": "optim.weight_decay", "l2": "optim.weight_decay",
    "optimizer": "optim.name", "opt": "optim.name", "scheduler": "optim.schedule", "sched": "optim.schedule",
    "lr_scheduler": "optim.schedule", "min_lr": "optim.final_lr", "warmup_steps": "optim.warmup",
    "warmup_epochs": "optim.warmup", "clip": "optim.clip_norm", "clip_grad": "optim.clip_norm",
    "grad_clip": "optim.clip_norm", "max_grad_norm": "optim.clip_norm", "gradient_clip_val": "optim.clip_norm",
    "bs": "train.batch_size batch_size", "batch": "train.batch_size batch_size",
    "batchsize": "train.batch_size batch_size", "train_batch_size": "train.batch_size batch_size",
    "epoch": "train.epochs", "num_epochs": "train.epochs", "n_epochs": "train.epochs", "max_epochs": "train.epochs",
    "iterations": "train.steps", "iters": "train.steps", "max_steps": "train.steps", "num_steps": "train.steps",
    "time": "train.minutes", "max_time": "train.minutes",
    "grad_accum": "train.accumulate accumulate", "accum": "train.accumulate accumulate",
    "gradient_accumulation": "train.accumulate accumulate",
    "gradient_accumulation_steps": "train.accumulate accumulate",
    "accumulate_grad_batches": "train.accumulate accumulate", "micro_batches": "train.accumulate accumulate",
    "gradient_checkpointing": "train.recompute recompute", "grad_checkpointing": "train.recompute recompute",
    "activation_checkpointing": "train.recompute recompute", "amp": "train.precision precision",
    "dtype": "train.precision precision", "mixed_precision": "train.precision precision",
    "bf16": "train.precision precision", "fp16": "train.precision precision", "fp32": "train.precision precision",
    "smoothing": "train.label_smoothing", "model_ema": "train.ema", "val_every": "train.eval_every",
    "eval_interval": "train.eval_every", "val_interval": "train.eval_every", "log_interval": "train.log_every",
    "save_every": "train.save_seconds", "torchcompile": "train.compile",
    "num_workers": "data.workers", "nworkers": "data.workers", "classes": "data.num_classes",
    "nb_classes": "data.num_classes", "n_classes": "data.num_classes", "dataset": "data", "data_set": "data",
    "data_dir": "data.root", "data_path": "data.root", "dir": "data.root", "img_size": "data.image_size",
    "input_size": "data.image_size", "resolution": "data.image_size", "val_split": "data.validation_fraction",
    "gpus": "devices hydra.launcher.gpus", "num_gpus": "devices", "ngpus": "devices", "nproc_per_node": "devices",
    "world_size": "devices", "cuda": "device", "gpu": "device", "cpu": "device", "num_threads": "threads",
    "drop_path_rate": "model.backbone.drop_path",
    "stochastic_depth": "model.backbone.drop_path", "layers": "model.backbone.depth",
    "num_layers": "model.backbone.depth", "n_layers": "model.backbone.depth", "dim": "model.backbone.width",
    "embed_dim": "model.backbone.width", "hidden_dim": "model.backbone.width", "hidden_size": "model.backbone.width",
    "num_heads": "model.backbone.heads", "n_heads": "model.backbone.heads", "mlp_dim": "model.backbone.mlp_width",
    "patch": "model.backbone.patch_size", "arch": "model", "architecture": "model", "backbone": "model/backbone",
    "router": "model/router", "routing": "model/router",
    "aa": "augment.randaugment", "rand_augment": "augment.randaugment", "random_erasing": "augment.erase",
    "reprob": "augment.erase", "flip": "augment.hflip", "ckpt": "checkpoint", "resume": "checkpoint",
    "pretrained": "checkpoint", "weights": "checkpoint", "out": "output_root", "output": "output_root",
    "output_dir": "output_root", "outdir": "output_root", "save_dir": "output_root", "log_dir": "output_root",
    "run_name": "name", "exp_name": "study", "wandb_project": "wandb.project",
    "random_seed": "seed", "launcher": "hydra/launcher",
    "optim_lr": "optim.lr",
}  # fmt: skip
"""Other programs' names of our options. Of several the first that the command has is suggested. Those of a router's
options stand in its yaml file, as `k: 1  # experts that each token takes (elsewhere top_k, topk)`."""

DROPOUT = (
    "dropout", "drop", "drop_rate", "dropout_rate", "attn_drop", "attn_drop_rate", "proj_drop_rate",
    "attention_dropout", "hidden_dropout",
)  # fmt: skip
NO_DROPOUT = "softmoe has no dropout; what leaves out whole blocks in training is model.backbone.drop_path"
"""Said instead of "Did you mean": drop_path leaves out blocks and dropout leaves out numbers."""

ARGUMENT_LETTERS = 200
"""Letters of a typed argument that a sentence repeats."""


def short(text: str) -> str:
    """A typed word as a sentence repeats it: on one line, without control characters, its middle cut out where long."""
    text = printable(text)
    return text if len(text) <= ARGUMENT_LETTERS else f"{text[: ARGUMENT_LETTERS // 2]}… ({len(text):,} letters)"


WHERE_HYDRA_WRITES = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.job.chdir")
"""Keys by which runs of other programs with Hydra get their folders."""

OF_CHECKPOINTS = ("evaluate", "export", "prune", "extract", "show")
"""Commands whose model is the checkpoint's, whole."""

OWN_FLAGS = ("--plan", "--groups", "--debug")
"""Flags that are not Hydra's."""


# --- before Hydra -----------------------------------------------------------------------------------------------------


class _Flags(Exception):
    """argparse refuses a command line; the message says why."""


def check_line(command: str, arguments: Sequence[str]) -> list[str]:
    """The arguments with flags before overrides, as Hydra wants them, with the choices that glob(…) stands for, and
    with the whole path of -cp, which Hydra would look for beside Python's files.

    Raises:
        UsageError: a flag that Hydra does not have, or an argument that is no override.
    """
    from hydra._internal.utils import get_args_parser
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob
    from hydra.errors import HydraException

    learns, many = command in ("train", "finetune"), any(word in ("-m", "--multirun") for word in arguments)
    if "--plan" in arguments and not (learns and many):
        raise UsageError("--plan lists the jobs of a sweep: softmoe train -m … --plan or softmoe finetune -m … --plan")
    if "--groups" in arguments and (many or not learns):
        raise UsageError("--groups lists the parameters of one run: softmoe train … --groups, without -m")
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise _Flags(message)

    parser.error = refuse  # type: ignore[method-assign]
    named = {flag for action in parser._actions if action.nargs is None for flag in action.option_strings}  # -cp PATH
    pairs = list(zip(arguments, ["", *arguments], strict=False))
    overrides = [a for a, before in pairs if "=" in a and not a.startswith("-") and before not in named]
    ordered = [a for a in arguments if a not in overrides] + overrides
    try:
        told, unknown = parser.parse_known_args([a for a in ordered if a not in OWN_FLAGS])
    except _Flags as error:
        raise UsageError(f"{error}; softmoe {_spoken(command)} --help shows what there is") from error
    unknown = [word for word in unknown if word.startswith("-")]
    if unknown:
        raise UsageError(_flag(unknown[0], command, arguments, parser))
    if told.config_path is not None and not os.path.isdir(told.config_path):
        raise UsageError(f"-cp {short(told.config_path)} is no folder; a run goes on with -cp RUN -cn config")
    if learns and told.multirun and (named_file := without_launcher(told)):
        raise UsageError(
            f"{short(named_file)} with -m: the file of a run knows of no sweep; type its settings, or write "
            f"defaults: [{command}, _self_] above them in a file of your own, and name that with -cd FOLDER -cn NAME"
        )
    if told.config_path is not None and not os.path.isabs(told.config_path):
        ordered.insert(len(ordered) - len(overrides), f"--config-path={os.path.abspath(told.config_path)}")
    if told.multirun and (told.cfg or told.info):
        raise UsageError(f"{'--cfg' if told.cfg else '--info'} shows one configuration; leave out -m")
    reader = OverridesParser.create()
    choices: dict[str, str] = {}
    for word in told.overrides:
        if word.startswith("~") and not word.startswith("~hydra"):
            raise UsageError(f"{short(word)}: an option cannot be taken away; give it a value")
        key, equals, value = word.lstrip("+").partition("=")
        if not key:
            raise UsageError(f"'{short(word)}' has no key; write KEY=VALUE" if word else "an argument is empty")
        try:
            parsed = reader.parse_override(word)
        except HydraException as error:
            raise UsageError(_unread(word, command)) from error
        if "@" in key:
            raise UsageError(f"{short(word)}: a group has one place here; write {key.partition('@')[0]}={short(value)}")
        pattern = parsed.value()
        if isinstance(pattern, Glob):
            choices[word] = f"{word.partition('=')[0]}={','.join(_fitting(word, key, pattern.filter))}"
        elif parsed.is_discrete_sweep() and next(parsed.sweep_iterator(), None) is None:
            raise UsageError(f"{short(word)} lists no value; a sweep needs one or more")
        if parsed.is_sweep_override() and not told.multirun:
            raise UsageError(
                f"{short(word)}: several values make a sweep, which takes -m (--multirun); a list is [a,b]"
            )
        if key in CONF_GROUPS and key not in ADDED and word.startswith("+"):
            raise UsageError(f"{short(word)}: {key} is chosen already; leave out the +")
        if (
            key in CONF_GROUPS
            and equals
            and not parsed.is_sweep_override()
            and not isinstance(parsed.value(), str | list)
        ):
            raise UsageError(f"{short(word)}: {key} takes the name of a choice.{_choices(key, '')}")
    _refuse_of_hydra(ordered)
    return [choices.get(word, word) for word in ordered]


def _fitting(word: str, key: str, fits: Callable[[list[str]], list[str]]) -> list[str]:
    """The choices of a group that a pattern, `glob(vit_*)`, stands for."""
    if key not in CONF_GROUPS:
        raise UsageError(
            f"{short(word)}: glob is for the choices of a group, and {key} is none; list its values with commas"
        )
    found = fits(list(files(key)))
    if not found:
        raise UsageError(f"{short(word)} fits no choice.{_choices(key, '')}")
    return found


def _refuse_of_hydra(arguments: Sequence[str]) -> None:
    """Raises UsageError for a key of hydra that does not exist, typed as +hydra.key=value, or that moves no run."""
    from hydra.conf import HydraConf

    for argument in arguments:
        if argument.lstrip("+").partition("=")[0] in WHERE_HYDRA_WRITES:
            raise UsageError(
                f"{short(argument)} moves no run: a run's folder is output_root/study/name-signature; "
                "type output_root=, study= or name="
            )
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


def _spoken(command: str) -> str:
    return "data check" if command == "data_check" else command


def _flag(flag: str, command: str, arguments: Sequence[str], parser: "ArgumentParser") -> str:
    """The sentence for a flag that does not exist: `--lr 0.1` means our option optim.lr, `--helpp` Hydra's --help."""
    word, _, value = flag.lstrip("-").partition("=")
    place = list(arguments).index(flag) if flag in arguments else len(arguments)
    follows = arguments[place + 1 : place + 2]
    if not value and follows and not follows[0].startswith("-") and "=" not in follows[0]:
        value = follows[0]
    known = known_keys(command, arguments)
    flags = [option for action in parser._actions for option in action.option_strings] + list(OWN_FLAGS)
    close = difflib.get_close_matches(flag, flags, n=1, cutoff=0.8)
    if close:
        return f"{flag}: there is no such option. Did you mean '{close[0]}'?"
    name = word.replace("-", "_")
    if name in DROPOUT:
        return f"{short(flag)}: {NO_DROPOUT}"
    key = name if name in known else _meant(name, known)
    way = f"{key}={value or 'VALUE'}" if key else f"softmoe {_spoken(command)} --help shows them"
    return f"{short(flag)}: options are written KEY=VALUE: {short(way)}"


def _unread(word: str, command: str) -> str:
    """The sentence for a word that Hydra cannot parse."""
    key, equals, _ = word.lstrip("+").partition("=")
    if not equals:
        group = next((group for group in CONF_GROUPS if word in files(group)), None)
        known = known_keys(command, ())
        if group is not None:
            way = f"{group}={word}"
        else:
            found = word if word in known else _meant(word, known)
            added = "+" if found in ADDED else ""
            way = f"{added}{found}=VALUE" if found else "KEY=VALUE"
        return f"cannot read '{short(word)}': write KEY=VALUE" + (f", here {way}" if way != "KEY=VALUE" else "")
    if not all(part.isidentifier() and part.isascii() for part in key.replace("/", ".").split(".")):
        return f"cannot read '{short(word)}': '{short(key)}' is no key.{_did_you_mean(key, known_keys(command, ()))}"
    return (
        f"cannot read '{short(word)}'; write KEY=VALUE, and values with spaces or signs in quotes of their own, as in "
        "'data.root=\"my folder\"'"
    )


# --- after it ---------------------------------------------------------------------------------------------------------


def explain(error: Exception, command: str, arguments: Sequence[str]) -> str:
    """One sentence for what Hydra or OmegaConf refused."""
    from hydra.errors import MissingConfigException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, InterpolationResolutionError, ValidationError

    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        path = str(error.missing_cfg_file)
        group = max((g for g in (*CONF_GROUPS, "hydra/sweeper") if path.startswith(f"{g}/")), key=len, default="")
        if group:
            return no_choice(group, path.removeprefix(f"{group}/"), error.options)
        if "primary config" in str(error):
            return f"-cn {short(path)}: there is no such file in the folder of -cp; that of a run is -cn config"
    text = " ".join(str(error).split())
    if text.startswith("In 'experiment/") and "study" not in known_keys(command, ()):
        named = "+experiment=" + text.removeprefix("In 'experiment/").partition("'")[0]
        typed = next((short(a) for a in arguments if a.lstrip("+").startswith("experiment=")), named)
        return (
            f"{typed}: an experiment describes runs, and softmoe {_spoken(command)} makes none; what its runs "
            f"cost is told by softmoe train -m {typed} --plan"
        )
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, InterpolationResolutionError):
        return unresolved(cause, arguments)
    known = known_keys(command, arguments)
    named = str(getattr(cause, "full_key", None) or text.partition("'")[2].partition("'")[0])
    said = _of_the_checkpoint(named.lstrip("+").partition("=")[0], command, arguments)
    if said is not None:
        return said
    in_file = re.match(r"In '([^']+)': \w+ raised while composing config: .* full_key: (\S+)", text)
    if in_file is not None:
        return _in_file(in_file[1], in_file[2], command, known)
    if isinstance(cause, ValidationError):
        key = str(cause.full_key).partition("[")[0]
        below = next((a for a in arguments if a.lstrip("+").startswith(f"{key}.")), None)
        typed = _typed(key, arguments)
        if below is not None and typed == key and key in known:
            return no_key(below, below.lstrip("+").partition("=")[0], known)
        inner = [k for k in known if k.startswith(f"{key}.") and "." not in k.removeprefix(f"{key}.")]
        if inner:
            return f"{typed}: {key} is a section; its keys are {', '.join(inner)}"
        kind = next((option.kind for option in _options(command) if option.key == key), "")
        return f"{typed}: expected {kind}" if kind else f"{typed}: {short(first_line(cause))}"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key and str(cause.full_key) not in known:
        key = str(cause.full_key)
        typed = next((a for a in arguments if f"{key}.".startswith(a.lstrip("+").partition("=")[0] + ".")), key)
        return no_key(short(typed), key, known)
    for start in ("Could not override", "Could not append to config", "Could not delete"):
        if text.startswith(start) and "'" in text:
            key = text.split("'")[1].lstrip("+~").partition("@")[0].partition("=")[0]
            return no_key(_typed(key, arguments), key, known)
    return short(text.partition(" Config search path:")[0])


def _of_the_checkpoint(key: str, command: str, arguments: Sequence[str]) -> str | None:
    """The sentence for a part of the model that a command takes from its checkpoint; None for any other key."""
    typed = next((a for a in arguments if re.split(r"[./=]", a)[0] == "model" == re.split(r"[./]", key)[0]), None)
    if typed is not None and command in OF_CHECKPOINTS:
        return f"{short(typed)}: the model is the checkpoint's, and softmoe {command} changes none of it; leave it out"
    typed, option = _typed(key, arguments), key.rpartition(".")[2]
    if key.startswith("model.router.") and option in router_options() and not typed.startswith("+"):
        if command == "upcycle":
            return f"{typed}: {option} is an option of a router; type the router as well, model/router=NAME"
        if command == "finetune":
            return f"{typed}: the router is the checkpoint's; to give it another {option}, type +{typed}"
    if key in ("model/router", "model/backbone") and command == "finetune":
        return (
            f"{typed}: the model is the checkpoint's; type model=NAME as well for one that its weights fit; experts "
            "for a dense one are made by softmoe upcycle"
        )
    return None


def _in_file(place: str, key: str, command: str, known: Sequence[str]) -> str:
    """The sentence for a key of a yaml file, as of `recipe/mine`: there is no such key, or its value is of another
    type."""
    from softmoe_cli.options.own_conf import GLOBAL_GROUPS

    group = place.partition("/")[0]
    if key == group and group in GLOBAL_GROUPS:
        return f"{place}.yaml lacks the line # @package _global_, which must be its first: its keys are of all sections"
    kind = next((option.kind for option in _options(command) if option.key == key), "")
    found = f"{key}: expected {kind}" if kind else no_key(key, key, [each for each in known if each != key])
    return f"{place}.yaml: {found}"


def refused(error: Exception, arguments: Sequence[str]) -> str:
    """What Hydra raised before a job began, in Python's words: files of one's own conf, or values that it did not
    expect."""
    own = own_conf_folder()
    chosen = [files(group)[name] for group, name in chosen_groups(arguments).items()]
    for file in [*chosen, *(file for group in CONF_GROUPS for file in files(group).values())]:
        if own is not None and own in file.parents:
            load_yaml(file)  # which says what is wrong with it
    told = " ".join(short(argument) for argument in arguments)
    return f"cannot use '{short(told)}': {short(first_line(error))}"


def unresolved(error: Exception, arguments: Iterable[str]) -> str:
    """The sentence for a ${…} that cannot be resolved, with its key."""
    key = str(getattr(error, "full_key", None) or "")
    typed = _typed(key, arguments) if key else next((short(a) for a in arguments if "${" in a), "")
    return f"{typed}: {short(first_line(error))}".removeprefix(": ")


def _typed(key: str, arguments: Iterable[str]) -> str:
    """The argument that sets this key; the key itself where none does."""
    return short(next((a for a in arguments if a.lstrip("+~").partition("=")[0].partition("@")[0] == key), key))


def no_choice(group: str, name: str, there: Iterable[str] | None) -> str:
    """The sentence for a choice that a group does not have, with the nearest ones."""
    choices = [choice for choice in there or () if not choice.startswith("_")]
    if group == "model" and (words := crossing(name)):
        return f"model={short(name)} is not one of the named models; type {' '.join(words)}"
    said = f"{group}={short(name)}: " + ("no such choice." if name else "no choice is named.")
    return said + nearest(name, choices) + _choices(group, name, choices)


def crossing(name: str) -> list[str]:
    """What to type for a model that is named after a backbone and a router and has no file of its own: a named one from
    the same base, with that backbone or that router instead. Empty where the name is none of that kind."""
    backbones, routers, models = files("model/backbone"), files("model/router"), files("model")
    backbone, router = next(
        ((b, r) for r in routers for b in backbones if name == f"{b}_{r}" and name not in models), ("", "")
    )
    if not backbone:
        return []
    if "_small" in load_yaml(backbones[backbone]).get("defaults", []):
        return ["model=small", f"model/backbone={backbone}", f"model/router={router}"]
    large = [model for model, file in models.items() if "_paper" in load_yaml(file).get("defaults", [])]
    same = [model for model in large if model.endswith(f"_{router}") and model.removesuffix(f"_{router}") in backbones]
    if same:
        return [f"model={difflib.get_close_matches(name, same, n=1, cutoff=0)[0]}", f"model/backbone={backbone}"]
    return [f"model={backbone}_soft", f"model/router={router}"] if f"{backbone}_soft" in large else []


def _choices(group: str, name: str, there: Iterable[str] = ()) -> str:
    """A group's choices: all, or of more than ten the five that are nearest to `name`."""
    choices = list(files(group)) if group in CONF_GROUPS else list(there)
    if len(choices) <= 10:
        return f" Choices: {', '.join(choices)}"
    word = next(title for title, (each, _) in TITLES.items() if each == group)
    close = difflib.get_close_matches(name, choices, n=5, cutoff=0)
    return f" Such as {', '.join(close)}; softmoe list {word} shows all {len(choices)}"


def no_key(typed: str, key: str, known: Sequence[str]) -> str:
    """The sentence for a key that does not exist: with the key that was meant, or those of its section."""
    if key == "experiment" or key == "search":
        return f"{typed}: a{'n experiment' if key == 'experiment' else ' search'} is added to the rest; write +{typed}"
    if key in known and typed.startswith("+"):
        return f"{typed}: {key} exists already; leave out the +"
    hint = _did_you_mean(key, known)
    section = key.rpartition(".")[0]
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    if not hint and siblings:
        hint = f" {section or 'top-level'} keys: {', '.join(siblings)}"
    return f"{typed}: there is no key '{short(key)}'.{hint}"


def _did_you_mean(key: str, known: Sequence[str]) -> str:
    """A hint that follows a full stop; empty where nothing is close."""
    found = _meant(key, known)
    if found is not None:
        return f" Did you mean '{found}'?"
    leaf = key.rpartition(".")[2]
    if leaf in DROPOUT:
        return f" {NO_DROPOUT}"
    if leaf in router_options() and any(k.startswith("model.") for k in known):
        having = [name for name, file in files("model/router").items() if leaf in load_yaml(file)]
        return f" model.router.{leaf} is an option of model/router={', '.join(having)}"
    return ""


def _meant(key: str, known: Sequence[str]) -> str | None:
    """The known key that someone means who writes `key`: another name for it, the same name elsewhere, or the closest
    spelling."""
    leaf = key.rpartition(".")[2].rpartition("/")[2].lower().replace("-", "_")
    if leaf in DROPOUT:
        return None
    for other in SYNONYMS.get(leaf, "").split():
        if other in known:
            return other
    for option, meaning in router_options().items():
        elsewhere = re.search(r"\(elsewhere ([^)]*)\)", meaning)
        if elsewhere and leaf in elsewhere[1].split(", ") and f"model.router.{option}" in known:
            return f"model.router.{option}"
    same = [k for k in known if k.rpartition(".")[2] == leaf and k != key]
    if same:
        return max(same, key=lambda k: (difflib.SequenceMatcher(None, key, k).ratio(), -len(k)))
    close = difflib.get_close_matches(key, [k for k in known if k != key], n=1, cutoff=0.6)
    if close:
        return close[0]
    leaves = {k.rpartition(".")[2]: k for k in reversed(known)}
    close = difflib.get_close_matches(leaf, [each for each in leaves if leaves[each] != key], n=1, cutoff=0.6)
    return leaves[close[0]] if close else None


def known_keys(command: str, arguments: Sequence[str]) -> list[str]:
    """Every key and group of the command, with the router that is chosen."""
    found = list(keys(_without_hydra(defaults(command, chosen_groups(arguments)))))
    found += [option.key for option in _options(command)]
    groups = [group for group in CONF_GROUPS if group.partition("/")[0] in {key.partition(".")[0] for key in found}]
    if command in ("train", "finetune"):
        groups = list(CONF_GROUPS)
    return list(dict.fromkeys([key for key in found if not key.endswith("._target_")] + groups))


def _options(command: str) -> Iterator[Option]:
    """What config/ says of the command's options."""
    yield from options(SCHEMAS["data" if command == "data_check" else command])
    if command in ("train", "finetune"):
        for _, each in launcher_options():
            yield from each
        yield from options(Fairness)


def _without_hydra(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key != "hydra"}
