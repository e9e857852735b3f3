"""What `--help` and `softmoe list` say, in 80 and 100 columns, without torch and without Hydra."""

import dataclasses
import functools
import math
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from softmoe_cli.cli import LAUNCHERS, SCHEMAS, _own_conf, conf_folder
from softmoe_cli.config import Launcher, UsageError, nearest, typed
from softmoe_cli.files import RULE
from softmoe_cli.sizes import Size, read_sizes

HELP = """\
softmoe: train, cost and compare mixture-of-experts vision transformers

usage: softmoe COMMAND [ARGUMENTS]

  train       compose an experiment and train it
              softmoe train model=vit_nano2_soft seed=1
  finetune    the same loop, from a checkpoint
              softmoe finetune checkpoint=RUN data=digits
  upcycle     a dense checkpoint into a mixture of experts
              softmoe upcycle checkpoint=RUN model/router=soft
  evaluate    quality of a checkpoint on a data set
              softmoe evaluate checkpoint=RUN
  export      for timm, torch.export, ONNX and the hub
              softmoe export checkpoint=RUN 'formats=[onnx]'
  cost        parameters, FLOPs, memory, latency
              softmoe cost model=vit_s16_soft
  match       make one model cost what another does
              softmoe match model=vit_s16_soft to=vit_s16_dense
  compare     runs to tables, verdicts, Pareto front, plots
              softmoe compare outputs/default
  check       conformance report for a router
              softmoe check soft
  data check  read a data set before a long run does
              softmoe data check data=folder data.root=PATH
  status      what runs are doing, from their files
              softmoe status outputs/default
  list        models with their sizes, routers, data sets, recipes, experiments
              softmoe list models --filter soft
  completion  what the Tab key completes, for bash, zsh and fish
              eval "$(softmoe completion bash)"

softmoe COMMAND --help says more; --debug shows the traceback of an error;
--version prints the version."""

USAGE = {
    "train": """\
softmoe train [GROUP=CHOICE | KEY=VALUE]...

Composes an experiment and trains it.

  softmoe train                   a small Soft MoE on real digits, in a minute
  softmoe train model=vit_s16_soft data=folder data.root=PATH
  softmoe train model/backbone=vit_nano4 model/router=dense \\
    data=fashion_mnist train.minutes=5
  softmoe train -m model.router.num_experts=8,16,32 seed=0,1,2
                                  a sweep: every combination
  softmoe train -m seed=0,1,2 --plan
                                  list its jobs with cost and time, and stop
  softmoe train -m seed=0,1,2 hydra/launcher=slurm \\
    hydra.launcher.partition=gpu hydra.launcher.gpus=1
  softmoe train --cfg job         print the composed configuration, and stop
  softmoe train optim.layer_decay=0.7 --groups
                                  each parameter's learning rate and decay

The same configuration is the same folder: finished runs are not repeated,
stopped ones go on.""",
    "finetune": """\
softmoe finetune checkpoint=SOURCE [GROUP=CHOICE | KEY=VALUE]...

The same loop as softmoe train, from given weights.

  softmoe finetune checkpoint=outputs/default/RUN data=digits
  softmoe finetune checkpoint=weights.safetensors data=cifar10 \\
    model.image_size=64
  softmoe finetune checkpoint=timm:vit_tiny_patch16_224 data=folder \\
    data.root=PATH
  softmoe finetune checkpoint=RUN data=cifar10 recipe=finetune_adamw \\
    model.image_size=64 slots=proportional
  softmoe finetune checkpoint=RUN data=cifar10 \\
    'optim.freeze=[patch_embed.*,blocks.0.*]' --groups

SOURCE is a run folder, a .safetensors file, hf-hub:OWNER/NAME or timm:NAME. The
model is the checkpoint's, the images are those of data= (digits without it),
the checkpoint's own set cut as it was; the head is kept only when the classes
are the same. model.image_size resamples the position table and keeps the slots
per expert; slots=proportional lets them grow with the tokens. --groups lists
each parameter's learning rate and decay, and stops. What softmoe upcycle
carried over of an optimizer's state is where the new one starts.""",
    "upcycle": """\
softmoe upcycle checkpoint=SOURCE [GROUP=CHOICE | KEY=VALUE]...

Makes a mixture of experts of a dense checkpoint.

  softmoe upcycle checkpoint=outputs/default/RUN model/router=soft \\
    model.router.num_experts=16 model.moe_blocks=last_2
  softmoe upcycle checkpoint=RUN model=vit_micro7_experts_choice \\
    folder=upcycled               a named point with RUN's backbone
  softmoe upcycle checkpoint=timm:vit_tiny_patch16_224 data=cifar10 \\
    model/router=soft 'model.moe_blocks=[6,8,10]'
  softmoe upcycle checkpoint=timm_weights.safetensors data=cifar10 \\
    model.backbone.timm=vit_tiny_patch16_224 ...
  softmoe upcycle checkpoint=RUN model/router=tokens_choice_dropless \\
    model.router.k=2 model.router.renormalise=true \\
    model.moe_blocks=every_2 preserve=true
  softmoe finetune checkpoint=FOLDER data=...          goes on from there

SOURCE is what softmoe finetune takes. The backbone and, unless data= is given,
the images are SOURCE's. Every expert starts as a copy of the MLP that it
replaces or, with a smaller model.expert_width, as a part of one; the router
starts afresh. receipt.json, and the header of the weights, say where every
weight comes from, how much the outputs changed, loss and cost before and
after.""",
    "evaluate": """\
softmoe evaluate checkpoint=SOURCE [data=CHOICE] [KEY=VALUE]...

Quality of a checkpoint on a data set.

  softmoe evaluate checkpoint=outputs/default/RUN
  softmoe evaluate checkpoint=weights.safetensors data=folder \\
    data.root=PATH split=test format=json
  softmoe evaluate checkpoint=RUN predictions=predictions.csv \\
    confusion=confusion.csv
  softmoe evaluate checkpoint=RUN data=digits 'fewshot=[1,5,10,25]'
                                  ridge regression on frozen features
  softmoe evaluate checkpoint=RUN 'audit=[neighbours,capacity,slots,experts]'
  softmoe evaluate 'checkpoint=[RUN,RUN]' soup=greedy  average of weights

Without data= the set that the checkpoint was trained on is read; that set, by
its name and place, is cut as it was for the checkpoint, unless data.split_seed,
test_fraction or validation_fraction are typed. Few-shot quality needs no common
classes.""",
    "export": """\
softmoe export checkpoint=SOURCE [formats=[torch_export,onnx]] [KEY=VALUE]...

Writes a folder that other programs load.

  softmoe export checkpoint=outputs/default/RUN folder=exported
  softmoe export checkpoint=RUN 'formats=[torch_export,onnx]' folder=exported
  softmoe export checkpoint=RUN push=OWNER/NAME
                                  to the Hugging Face hub; hf auth login first
  softmoe evaluate checkpoint=exported
                                  the folder, or hf-hub:OWNER/NAME, is a
                                  checkpoint

The folder has the weights (model.safetensors), the hub's config.json for timm,
and the programs asked for: model.pt2 (torch.export) and model.onnx, for any
number of images. From Python, with timm and softmoe_cli installed:

  import timm, softmoe_cli.models
  model = timm.create_model("local-dir:exported", pretrained=True).eval()
                                  # or "hf-hub:OWNER/NAME"
  logits = model(images)          # b c s s, normalised

What is written is read back and run on validation images; an output that
differs by more than 1e-4, or 1e-4 of the largest where outputs are above 1, is
an error and leaves nothing behind. receipt.json has the figures. Precision is
fp32. ONNX needs pip install 'softmoe-cli[onnx]'.""",
    "cost": """\
softmoe cost [GROUP=CHOICE | KEY=VALUE]...

Parameters, FLOPs and memory of a model, by formula and by counter.

  softmoe cost model=vit_h14_soft data.num_classes=1000
  softmoe cost model=vit_s16_soft batch_size=64 recompute=true precision=bf16
  softmoe cost -m model=vit_s16_dense,vit_s16_soft format=csv
                                  one table for many models
  softmoe cost model=vit_nano2_soft clock=true threads=1
                                  measured as well, on this machine

A multiply-add is 2 FLOPs. No weights are allocated unless clock=true.""",
    "match": """\
softmoe match [GROUP=CHOICE | KEY=VALUE]... free=KEY to=MODEL by=COST

The value of KEY with which the costs are equal.

  softmoe match model=vit_s16_soft to=vit_s16_dense by=forward_gflop \\
    free=model.router.num_experts
  softmoe match model=vit_nano2_soft to=vit_nano2_tokens_choice \\
    by=latency_ms free=model.router.slots_per_expert
  softmoe match model=vit_s16_soft to=vit_s16_dense by=train_pflop \\
    steps=300000 free=train.steps

Prints the overrides to use and how close they come. Where nothing comes within
tolerance it names the nearest on both sides and the exit status is 1.""",
    "compare": """\
softmoe compare FOLDER... [--OPTION VALUE]...

Finished runs to tables, verdicts, a Pareto front and plots.

  softmoe compare outputs/expert_count
  softmoe compare outputs/expert_count --quality loss --cost device_s \\
    --columns num_experts,peak_mib --sort num_experts
  softmoe compare outputs/a outputs/b --where router=soft,dense \\
    --by router,num_experts --baseline num_experts=8
  softmoe compare outputs/expert_count --at train_pflop=0.002,0.004 \\
    --at device_s --reference pareto --wandb

Reads result.json and metrics.jsonl of every run below the folders. Runs that
differ in nothing but the seed are a group: mean, 95% interval and n; difference
from the baseline and whether it is distinguishable; quality at equal cost; the
Pareto front and how sure it is. Runs on other images are kept apart; what
cannot be read is named and left out.""",
    "check": """\
softmoe check ROUTER [KEY=VALUE]...

What every router must keep, measured; exit status 1 if anything fails.

  softmoe check tokens_choice k=2 images_per_group=4
  softmoe check my_router.py num_experts=8
                                  a file of one's own with one subclass of
                                  Router

ROUTER is a name from softmoe list, a name in your own conf/model/router, or a
Python file. KEY=VALUE are its options. SOFTMOE_VECTORS names another folder of
official numbers.""",
    "data": """\
softmoe data check [data=CHOICE] [KEY=VALUE]...

Reads a data set before a long run does; exit status 1 if it is faulty.

  softmoe data check data=folder data.root=PATH
  softmoe data check data=webdataset data.root=PATH data.workers=8 format=json

Faults: files that cannot be read, empty classes, classes that not every part
has, the same pixels in two of train, validation and test or under two labels.
It counts images by class, sizes, and repetitions in a part.""",
    "status": """\
softmoe status [FOLDER...] [--json]

What runs are doing, from their files alone, here or on another machine.

  softmoe status                  all of outputs, what wrote last first
  softmoe status outputs/expert_count
                                  a study, a sweep-* folder in it, or one run

done; running; stopped, with what to type to go on; failed, with the reason;
waiting; damaged, with the file. Runs of another machine that have neither ended
nor stopped are "running or killed": the age of the last row tells which.""",
    "list": """\
softmoe list [WHAT] [--filter WORD]

What can be chosen, a line each; models with tokens, parameters and FLOPs.

  softmoe list
  softmoe list models --filter soft
  softmoe list routers            models, backbones, routers, data, recipes,
                                  experiments, searches or launchers

FLOPs are those of an image's forward pass, of px by px pixels in three colours,
with 1,000 classes at 224 pixels and 10 below. What lies in a conf folder of the
working directory is listed too; softmoe cost says what such a model takes.""",
    "completion": """\
softmoe completion bash|zsh|fish

Prints what makes the Tab key complete commands, groups, keys, choices and
folders of runs. In ~/.bashrc, ~/.zshrc or ~/.config/fish/config.fish:

  eval "$(softmoe completion bash)"
  eval "$(softmoe completion zsh)"
  softmoe completion fish | source""",
}

for _command in ("evaluate", "export", "upcycle"):
    USAGE[_command] += f"\n{textwrap.fill(RULE, 80)}"
USAGE["compare"] += f"\n{textwrap.fill(f'{RULE} Only a folder that softmoe compare made is made anew.', 80)}"

COMMANDS = tuple(USAGE)

GROUPS = {
    "model": "a named model: backbone, router and place of the experts",
    "model/backbone": "the backbone alone",
    "model/router": "the router alone",
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
    "data": ("data", "data sets, data="),
    "recipes": ("recipe", "recipes, recipe="),
    "experiments": ("experiment", "experiments, +experiment="),
    "searches": ("search", "searches with Optuna, -m +search="),
    "launchers": ("hydra/launcher", "where a sweep's jobs run, -m hydra/launcher="),
}
"""What `softmoe list` takes: the word, the group and the heading."""

ADDED = ("experiment", "search")
"""Groups of which nothing is chosen until it is added, +GROUP=CHOICE."""

EVERYDAY = (
    "checkpoint", "data.root", "data.image_size", "model.image_size", "model.moe_blocks", "train.epochs",
    "train.steps", "train.minutes", "train.batch_size", "train.accumulate", "train.precision", "train.eval_every",
    "optim.lr", "optim.weight_decay", "seed", "study", "name", "device", "devices", "threads", "tracking", "slots",
)  # fmt: skip
"""What `--help` shows of train and finetune, and of other commands beside the options that are theirs alone."""

ROUTER_OPTIONS = {
    "num_experts": "experts in each MoE block",
    "slots_per_expert": "rows that an expert computes; null: from capacity_factor",
    "capacity_factor": "rows of all experts as a share of the tokens; null: from slots_per_expert",
    "capacity_rounding": "of the slots that come of it: round, as the soft router, or ceil (V-MoE)",
    "capacity_multiple": "slots are rounded up to a multiple of this (V-MoE 4)",
    "images_per_group": "images that share the slots",
    "k": "experts that each token takes",
    "gate": "softmax or sigmoid",
    "renormalise": "true: a token's gates add up to one over its experts",
    "noise_std": "noise on the logits in training; sparse routers divide it by the number of experts",
    "importance_weight": "weight of the loss that evens the experts' gates (V-MoE)",
    "load_weight": "weight of the loss that evens the experts' load (V-MoE)",
    "gshard_weight": "weight of GShard's loss of both",
    "bias_rate": "step of a bias that evens the load without a loss",
    "shared_experts": "experts that every token takes besides",
}
"""What an option of a router means; which router has it, and with which value, stands in conf/model/router."""

WIDTH = 80
LIST_WIDTH = 100
MEANING = 28
"""Column in which meanings begin."""


def bold(text: str) -> str:
    """On a terminal that shows it, unless NO_COLOR is set."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[1m{text}\033[0m"


# --- what conf/ says --------------------------------------------------------------------------------------------------


def files(group: str) -> dict[str, Path]:
    """The yaml file of each choice of a group, by name; one's own conf folder comes last, so that it replaces."""
    found = {}
    for root in (conf_folder(), _own_conf()):
        if root is None:
            continue
        folder = root / group
        # Folders in model/ and hydra/ are groups of their own; elsewhere they are part of a name.
        pattern = "*.yaml" if group in ("model", "hydra/launcher") else "**/*.yaml"
        for file in folder.glob(pattern):
            name = file.relative_to(folder).with_suffix("").as_posix()
            if not file.name.startswith("_") and file.is_file():
                found[name] = file
    return dict(sorted(found.items()))


def read(file: Path) -> str:
    """The text of a yaml file.

    Raises:
        UsageError: it cannot be read or is no UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = "it is no UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UsageError(f"{file} cannot be read: {why}") from error


def load(file: Path) -> dict[str, Any]:
    """The contents of a yaml file.

    Raises:
        UsageError: it cannot be read, is no YAML, or holds something other than keys with values.
    """
    import yaml

    try:
        body = yaml.load(read(file), Loader=_loader())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{file} is no YAML: {getattr(error, 'problem', None) or 'no text'}{where}") from error
    if not isinstance(body, dict | None):
        raise UsageError(f"{file} holds no keys with values")
    return body or {}


@functools.cache
def _loader() -> Any:
    """In C where it is there, and, as OmegaConf's, with 1e-4 a number."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        pass

    number = (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?)"
    )
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^{number}$"), list("-+0123456789."))
    return Loader


def defaults(command: str, chosen: Mapping[str, str]) -> dict[str, Any]:
    """The values that conf/ gives to a command's options with these choices of groups, as Hydra would compose them; it
    would take a second.

    Raises:
        UsageError: a file of one's own that cannot be read.
    """
    tree: dict[str, Any] = {}
    _lay(tree, "", "data_check" if command == "data" else command, chosen)
    return tree


def _lay(tree: dict[str, Any], group: str, name: str, chosen: Mapping[str, str], above: tuple[Path, ...] = ()) -> None:
    """One file, and those in its defaults list, over the tree; `above` are the files whose lists led to it."""
    places = [root / group / f"{name}.yaml" for root in (_own_conf() if group else None, conf_folder()) if root]
    file = next((place for place in places if place.is_file()), None)
    if file is None:  # a schema, which Hydra has from Python, or a file of Hydra's own
        return
    if file in above:
        raise UsageError(f"{file}: its defaults list leads back to the file itself, by {above[-1]}")
    above = (*above, file)
    body = load(file)
    listed = body.pop("defaults", [])
    entries = listed if isinstance(listed, list) else []
    if "_self_" not in entries:
        entries = [*entries, "_self_"]
    for entry in entries:
        if entry == "_self_":
            for part in reversed(() if "# @package _global_" in read(file) or not group else group.split("/")):
                body = {part: body}
            _merge(tree, body)
        elif isinstance(entry, str) and entry != name:
            _lay(tree, group, entry, chosen, above)
        elif isinstance(entry, dict):
            for key, choice in entry.items():
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
    """What stands at a.b.c, with ${x.y} followed; KeyError where nothing does, or where that leads back to a key that
    was `asked` for before."""
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
    """The groups that a command line chooses, as far as there are such choices."""
    pairs = (argument.lstrip("+").partition("=")[::2] for argument in arguments)
    return {group: choice for group, choice in pairs if group in GROUPS and choice in files(group)}


# --- --help -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Option:
    """A key that a command takes, with what config.py says of it."""

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
        word = f"list of {word}" + ("s" if one in (int, float) else "")
    low, high, above = limits["low"], limits["high"], limits["above"]
    bounds = []
    if low > -math.inf and high < math.inf:
        bounds = [f"{low:.10g} to {high:.10g}"]
    else:
        bounds += [f"> {above:g}"] * (above > -math.inf) + [f">= {low:g}"] * (low > -math.inf)
        bounds += [f"<= {high:.10g}"] * (high < math.inf)
    return " ".join(filter(None, [word, ", ".join(bounds)])) + (", or null" if null and word else "")


def row(head: str, meaning: str, width: int = WIDTH, column: int = MEANING) -> str:
    """`head` and what it means beside it, or below where it is long."""
    lines = textwrap.wrap(meaning, width - column, break_long_words=False, break_on_hyphens=False) or [""]
    first = f"  {head:<{column - 3}} {lines[0]}".rstrip() if len(head) < column - 2 else f"  {head}"
    rest = lines[1:] if len(head) < column - 2 else lines
    return "\n".join([first, *(" " * column + line for line in rest)])


def _option_row(option: Option, tree: Mapping[str, Any]) -> str:
    meaning = f"{option.meaning} [{option.kind}]" if option.kind else option.meaning
    try:
        value = value_of(tree, option.key)
    except KeyError:
        return row(option.key, meaning)
    if "${" in str(value):  # of the environment, or of what only a run knows
        return row(option.key, f"{meaning}; follows other settings")
    return row(f"{option.key}={'' if value == '???' else typed(value)}", meaning)


def usage(command: str, arguments: Sequence[str]) -> str:
    """What `softmoe COMMAND ARGUMENTS --help` prints. Groups that are chosen show their values; a word that is not
    GROUP=CHOICE picks options: all of them, or those that have it in key or meaning.

    Raises:
        UsageError: a word that no option has.
    """
    if command == "compare":
        from softmoe_cli.report import OPTIONS

        rows = [row(f"--{name} {value}".rstrip(), meaning) for name, (value, meaning) in OPTIONS.items()]
        return "\n".join([USAGE[command], "", bold("options"), *rows])
    if command not in SCHEMAS:
        return USAGE[command]
    words = [argument for argument in arguments if "=" not in argument and not argument.startswith("-")]
    words = [word for word in words if (command, word) != ("data", "check")]
    chosen = chosen_groups(arguments)
    tree = defaults(command, chosen)
    learns = command in ("train", "finetune")
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
    return sections + (list(launcher_options()) if command in ("train", "finetune") else [])


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
    names = router if isinstance(router, dict) else ROUTER_OPTIONS
    for name in names:
        if name != "_target_" and (_router(tree) != "dense"):
            yield Option(f"model.router.{name}", ROUTER_OPTIONS.get(name, "see its yaml file"), "", ())


def _router_lines(tree: Mapping[str, Any], found: Sequence[Option]) -> list[str]:
    name = _router(tree)
    title = f"options of model/router={name}; type another before --help to see its" if name else "options of routers"
    return [bold(title), *(_option_row(option, tree) for option in found)]


def _group_lines(command: str, tree: Mapping[str, Any], chosen: Mapping[str, str]) -> list[str]:
    """The groups that a command has, with what is chosen of each."""
    file = conf_folder() / f"{'data_check' if command == 'data' else command}.yaml"
    listed = [entry for entry in load(file).get("defaults", []) if isinstance(entry, dict)]
    picked = {key.removeprefix("override "): value for entry in listed for key, value in entry.items()}
    lines = [bold("groups, GROUP=CHOICE; softmoe list shows the choices")]
    for group, meaning in GROUPS.items():
        section = group.partition("/")[0]
        if group in ADDED:
            if command in ("train", "finetune"):
                lines.append(row(f"+{group}={chosen.get(group, '')}", meaning))
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
        lines.append(row(f"{group}={'' if none else choice}", f"{meaning}{follows}" if none else meaning))
    return lines


# --- softmoe list -----------------------------------------------------------------------------------------------------


def listing(arguments: Sequence[str]) -> str:
    """What `softmoe list ARGUMENTS` prints.

    Raises:
        UsageError: arguments that it does not have, or a word that nothing listed has.
    """
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
    names = [_titled(word) for word in words] or list(TITLES)
    blocks = [block for name in names if (block := _block(*TITLES[name], wanted))]
    if not blocks:
        raise UsageError(f"softmoe list {' '.join(words)}: nothing has the word '{wanted}'".replace(" :", ":"))
    return "\n\n".join(blocks)


def _titled(word: str) -> str:
    """The key of TITLES that a word means: itself, its singular or its group."""
    for name, (group, _) in TITLES.items():
        if word.rstrip("=").lstrip("+") in (name, name.removesuffix("s"), group, group.rpartition("/")[2]):
            return name
    raise UsageError(f"softmoe list has no '{word}'.{nearest(word, TITLES)} It has {', '.join(TITLES)}")


def comment(file: Path) -> str:
    """The first comment of a yaml file, which says what it is."""
    try:
        lines = read(file).splitlines()
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
        body = [row(name, text, LIST_WIDTH, width + 4) for name, text in rows.items()]
        return "\n".join([bold(title), *body])
    sizes = read_sizes(conf_folder())
    head = f"  {'':<{width}}   px  tokens  params, M    GFLOP"
    ours = files(group)
    body = []
    for name, text in rows.items():
        own = ours[name].parent != conf_folder() / group
        figures = _figures(None if own else sizes.get(name))
        body.append(row(f"{name:<{width}} {figures}", text, LIST_WIDTH, len(head) + 2))
    return "\n".join([bold(title), head, *body])


def _figures(size: Size | None) -> str:
    if size is None:
        return " " * 36
    params, gflop = size.params / 1e6, size.forward_flop / 1e9
    return f"{size.image_size:>4} {size.tokens:>7} {params:>10.{_digits(params)}f} {gflop:>8.{_digits(gflop)}f}"


def _digits(number: float) -> int:
    """Decimals that leave at least three figures."""
    return next(digits for digits, least in enumerate((100, 10, 1, 0)) if number >= least)
