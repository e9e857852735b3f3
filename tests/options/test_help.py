"""What the command line says of itself: help, lists, refusals by another name, completion."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from softmoe_cli import cli
from softmoe_cli.config import LAUNCHERS, SCHEMAS
from softmoe_cli.errors import UsageError
from softmoe_cli.options import completion, conf_files, explain, help, sizes, usage
from softmoe_cli.options.compose import store_schemas
from softmoe_cli.options.conf_files import conf_folder
from softmoe_cli.options.list import LIST_WIDTH
from tests.conftest import Softmoe

COMPOSED = [
    ("train", {}),
    ("train", {"model": "vit_s16_soft", "data": "imagenet", "recipe": "paper", "hydra/launcher": "slurm"}),
    ("train", {"model/backbone": "vit_micro4", "model/router": "tokens_choice", "recipe": "finetune_sgd"}),
    ("train", {"model": "vit_h14_experts_choice", "recipe": "strong", "hydra/launcher": "ray"}),
    ("finetune", {"recipe": "finetune_adamw"}),
    ("evaluate", {"data": "imagenet_v2"}),
    ("upcycle", {"model": "small", "model/router": "experts_choice"}),
    ("upcycle", {}),
    ("export", {}),
    ("cost", {"model/router": "dense"}),
    ("match", {}),
    ("data", {"data": "folder"}),
]


def without_missing(tree: Any) -> Any:
    if isinstance(tree, dict):
        kept = {key: without_missing(value) for key, value in tree.items()}
        return {key: value for key, value in kept.items() if value not in ("???", {})}
    return tree


@pytest.mark.parametrize(("command", "chosen"), COMPOSED, ids=str)
def test_help_has_the_values_that_hydra_composes(command: str, chosen: Mapping[str, str]) -> None:
    store_schemas()
    name = "data_check" if command == "data" else command
    overrides = [f"{group}={choice}" for group, choice in chosen.items()]
    with initialize_config_dir(str(conf_folder()), version_base=None):
        config = hydra_compose(name, overrides, return_hydra_config=True)
    composed = OmegaConf.to_container(config, resolve=False, throw_on_missing=False)
    assert isinstance(composed, dict)
    launcher = composed.pop("hydra")["launcher"]
    read = conf_files.defaults(command, chosen)
    ours = read.pop("hydra", {}).get("launcher")
    assert without_missing(read) == without_missing(composed)
    if command in ("train", "finetune"):
        assert ours == launcher
    for key in conf_files.keys(read):
        value = OmegaConf.select(config, key, throw_on_missing=False, throw_on_resolution_failure=False)
        shown = conf_files.value_of(read, key) if not isinstance(value, dict) and value is not None else None
        if shown is not None and not OmegaConf.is_config(value) and "${" not in str(shown) and shown != "???":
            assert shown == value, key


@pytest.mark.parametrize("command", usage.COMMANDS)
def test_help_fits_a_terminal_and_names_every_option(command: str) -> None:
    shown = help.usage(command, ["all"] if command in SCHEMAS else [])
    assert max(map(len, shown.splitlines())) <= help.WIDTH
    assert max(map(len, help.usage(command, []).splitlines())) <= help.WIDTH
    for option in help.options(SCHEMAS[command]) if command in SCHEMAS else ():
        if option.key != "model.router" and not (command == "train" and option.meaning.startswith("finetune:")):
            assert f"  {option.key}" in shown
    assert command in cli.ACTIONS
    if command in SCHEMAS:
        assert "\n  data=" in help.usage(command, [])
    assert f"  {command}" in usage.HELP and max(map(len, usage.HELP.splitlines())) <= help.WIDTH


def test_help_shows_values_kinds_groups_and_the_chosen_router(softmoe: Softmoe) -> None:
    text = " ".join(softmoe("train", "model/router=tokens_choice", "recipe=paper", "--help").out.split())
    assert "optim.lr=0.001 peak learning rate [number > 0]" in text
    assert "train.precision=fp32 arithmetic under autocast; weights stay fp32 [fp32|bf16|fp16]" in text
    assert "model.router.k=1 experts that each token takes" in text
    assert "recipe=paper" in text and "hydra/launcher=local" in text and "+experiment=" in text
    assert "augment.crop=resized" in softmoe("train", "recipe=strong", "--help", "crop").out
    words = softmoe("train", "--help", "activation checkpointing")
    assert "train.recompute=false" in words.out and "optim.lr" not in words.out
    assert softmoe("train", "--help", "zzz").code == 2


def test_every_router_option_has_a_meaning() -> None:
    """Its yaml file says it, behind the option."""
    for name, file in conf_files.files("model/router").items():
        body = conf_files.load_yaml(file)
        meanings = conf_files.router_options(body["_target_"])
        assert all(meanings[key] for key in body if key != "_target_"), name
        assert file.read_text().count("  # ") == len(body) - 1, name


def test_help_reads_what_a_router_of_ones_own_says(softmoe: Softmoe, tmp_path: Path) -> None:
    routers = tmp_path / "conf/model/router"
    routers.mkdir(parents=True)
    (routers / "mine.yaml").write_text(
        "_target_: my_router.Mine\nnum_experts: 4  # mine alone\nzzz: 2  # to agree (elsewhere voters)\nodd: '#'\n"
    )
    (routers / "broken.yaml").write_text("a: [1")
    text = " ".join(softmoe("train", "model/router=mine", "--help").out.split())
    assert "model.router.num_experts=16 mine alone model.router.zzz=2 to agree (elsewhere voters)" in text
    assert "model.router.odd=# its yaml file does not say" in text
    assert "Did you mean 'model.router.zzz'?" in softmoe("train", "model/router=mine", "voters=3").err
    (routers / "broken.yaml").unlink()
    assert "model.router.zzz is an option of model/router=mine" in softmoe("train", "zzz=3").err


def test_a_launchers_options_are_said_once() -> None:
    text = help.usage("train", ["all"])
    assert all(text.count(f"  {o.key}") == 1 for o in help.options(LAUNCHERS["local"], "hydra.launcher."))


def test_ways_to_ask(softmoe: Softmoe) -> None:
    told = softmoe("train", "--help").out
    assert told == softmoe("help", "train").out == softmoe("train", "help").out == softmoe("train", "-h").out
    assert softmoe("data", "check", "help").out == softmoe("data", "--help").out
    assert softmoe("-V").out == softmoe("--version").out
    assert softmoe("help", "trian").err == softmoe("trian").err


def test_headings_are_bold_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033[1m" in help.usage("cost", [])
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033[1m" not in help.usage("cost", [])


def test_sizes_are_those_of_cost() -> None:
    """`python -m softmoe_cli.options.sizes` writes the file anew."""
    found = {name: sizes.sized(name) for name in conf_files.files("model")}
    assert sizes.read_sizes(conf_folder()) == {name: size for name, size in found.items() if size is not None}


def test_list(softmoe: Softmoe, tmp_path: Path) -> None:
    everything = softmoe("list").out
    assert max(map(len, everything.splitlines())) <= LIST_WIDTH
    assert "placement/every_2" in everything and "placement/_shared" not in everything
    rows = softmoe("list", "model", "--filter=SOFT").out.splitlines()
    (row,) = (row for row in rows if row.startswith("  vit_s16_soft "))
    assert row.split()[1:5] == ["224", "196", "923", "8.53"]
    assert not any("dense" in row for row in rows)
    assert softmoe("list", "routers").out.startswith("routers, model/router=\n  dense ")
    for word, said in {
        "modles": "Did you mean 'models'?",
        "--flter": "it has --filter",
        "--filter": "needs a word",
    }.items():
        answer = softmoe("list", word)
        assert answer.code == 2 and said in answer.err
    assert "nothing has the word 'zzz'" in softmoe("list", "models", "--filter", "zzz").err


def test_a_conf_of_ones_own_that_cannot_be_read(softmoe: Softmoe, tmp_path: Path) -> None:
    routers, models = tmp_path / "conf/model/router", tmp_path / "conf/model"
    (routers / "hollow.yaml").mkdir(parents=True)
    (routers / "latin.yaml").write_bytes(b"# caf\xe9\n_target_: x.Y\n")
    (routers / "broken.yaml").write_text("# broken\n_target_: [x\n")
    (routers / "list.yaml").write_text("- a\n")
    (models / "latin.yaml").write_bytes(b"# caf\xe9\nimage_size: 8\n")
    told = softmoe("list")
    assert told.code == 0 and "latin" in told.out and "it is no UTF-8" in told.out and "hollow" not in told.out
    for router, words in {"latin": "is no UTF-8", "broken": "is no YAML", "list": "no keys with values"}.items():
        answer = softmoe("check", router)
        assert answer.code == 2 and words in answer.err and f"{router}.yaml" in answer.err
    (tmp_path / "conf/experiment").mkdir()
    (tmp_path / "conf/experiment/cut.yaml").write_text("a: [1")
    (models / "odd.yaml").write_text("defaults: 3\n")
    assert softmoe("train", "model=odd", "--help").code == 0
    assert "cut.yaml is no YAML" in softmoe("train", "+experiment=cut").err
    answer = softmoe("train", "model=latin")
    assert answer.code == 2 and "latin.yaml" in answer.err and len(answer.err.splitlines()) == 1


KNOWN = {
    "learning_rate": "optim.lr", "weight_decay": "optim.weight_decay", "wd": "optim.weight_decay",
    "bs": "train.batch_size", "batch": "train.batch_size", "workers": "data.workers", "gpus": "devices",
    "epochs": "train.epochs", "num_classes": "data.num_classes", "model.num_classes": "data.num_classes",
    "drop_path_rate": "model.backbone.drop_path", "router": "model/router", "optim.learning_rate": "optim.lr",
    "gradient_accumulation_steps": "train.accumulate", "train.lr": "optim.lr", "sede": "seed",
}  # fmt: skip


def test_what_others_call_our_options() -> None:
    known = explain.known_keys("train", [])
    for word, key in KNOWN.items():
        assert f"Did you mean '{key}'?" in explain.no_key(f"{word}=1", word, known)
    everywhere = {key for command in SCHEMAS for key in explain.known_keys(command, ["model/router=tokens_choice"])}
    assert {key for keys in explain.SYNONYMS.values() for key in keys.split()} <= everywhere
    assert not {key.rpartition(".")[2] for key in known} & set(explain.SYNONYMS) - {
        "backbone",
        "router",
        "gpus",
        "slots",
    }
    assert "'batch_size'" in explain.no_key("bs=1", "bs", explain.known_keys("evaluate", []))
    for key in ("dropout", "model.drop_rate", "model.backbone.dropout"):
        told = explain.no_key(f"{key}=0.1", key, known)
        assert told == f"{key}=0.1: there is no key '{key}'. {explain.NO_DROPOUT}"  # and not: Did you mean drop_path


REFUSED = {
    "another's flag": ("train --lr 0.1", "--lr: options are written KEY=VALUE: optim.lr=0.1"),
    "another's dropout": ("train --dropout 0.1", "softmoe: --dropout: softmoe has no dropout; "),
    "another's flag with =": ("cost --batch-size=8", "KEY=VALUE: batch_size=8"),
    "a flag misspelt": ("train --helpp", "Did you mean '--help'?"),
    "a flag's value": ("train --cfg all jobs", "cannot read 'jobs'"),
    "flags and sweeps": ("train -m seed=1,2 --cfg job", "leave out -m"),
    "Hydra's completion": ("train -sc install=bash", 'eval "$(softmoe completion bash)"'),
    "Hydra's completion, asked": ("-sc query=bash", 'eval "$(softmoe completion bash)"'),
    "Hydra's completion, bare": ("train --shell-completion", 'eval "$(softmoe completion bash)"'),
    "key of the chosen router": ("train model/router=tokens_choice k=2", "Did you mean 'model.router.k'?"),
    "key of another router": ("train k=2", "model.router.k is an option of model/router=tokens_choice, "),
    "appended key": ("train +epochs=3", "Did you mean 'train.epochs'?"),
    "no key": ("train =5", "'=5' has no key"),
    "no key, appended": ("train +=5", "'+=5' has no key"),
    "letters": ("train é=5", "'é' is no key"),
    "dots": ("train optim..lr=5", "'optim..lr' is no key. Did you mean 'optim.lr'?"),
    "a package": ("train model@x=vit_nano2_soft", "write model=vit_nano2_soft"),
    "an added choice": ("train +recipe=paper", "recipe is chosen already; leave out the +"),
    "a key in a section's value": ("train train={steps:2,foo:3}", "there is no key 'train.foo'"),
    "no whole number": ("train seed=1.5", "seed=1.5: expected whole number 0 to 2147483647"),
    "an element": ("train data.mean=[a]", "data.mean=[a]: expected list of numbers"),
    "an escape": ("train se\x1b[31med=3", "cannot read 'se\\x1b[31med=3'"),
    "a section": ("train optim=3", "optim is a section; its keys are optim.name, optim.lr"),
    "below a key": ("train seed.x=3", "there is no key 'seed.x'. Did you mean 'seed'?"),
    "no choice": ("train model=", "model=: no choice is named. Such as "),
    "null for a choice": ("train model=null", "model takes the name of a choice"),
    "a number for hydra": ("train hydra=3", "cannot use 'hydra=3'"),
    "choice alone": ("train vit_s16_soft", "here model=vit_s16_soft"),
    "nested experiment": ("train +experiment=placement/last_9", "experiment=placement/last_9: no such choice"),
    "an interpolation": ("train optim.lr=${nope}", "optim.lr=${nope}: Interpolation key 'nope' not found"),
    "an environment": ("train seed=${oc.env:NOPE_}", "seed=${oc.env:NOPE_}: "),
    "budgets as typed": ("train train.epochs=2 train.steps=3", "train.steps=3 and train.epochs=2 are two"),
    "numbers as typed": ("train optim.lr=-1", "optim.lr=-1 is out of range"),
    "no word for data": ("data", "softmoe: data takes the word check, as in"),
    "another word for data": ("data chek", "not chek. Did you mean 'check'?"),
    "no shell": ("completion", "completion is for bash, zsh, fish; none was named"),
    "another shell": ("completion bsh", "Did you mean 'bash'?"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, softmoe: Softmoe, tmp_path: Path) -> None:
    line, words = REFUSED[name]
    answer = softmoe(*line.split(" "))
    assert (answer.code, answer.out) == (2, "")
    assert words in answer.err
    sentence = [row for row in answer.err.splitlines() if not row.startswith("Error executing job")]
    assert len(sentence) == 1 and sentence[0].startswith("softmoe: ") and len(sentence[0]) < 700
    assert list(tmp_path.iterdir()) == []


def test_what_is_long_is_cut(softmoe: Softmoe) -> None:
    for line in (("train", f"model=vit_{'x' * 5000}"), ("train", f"{'x' * 5000}=3"), ("train", f"seed={'x' * 5000}")):
        answer = softmoe(*line)
        assert answer.code == 2 and len(answer.err) < 1200
    answer = softmoe("train", "model=vit_nano2_sof")
    assert "Did you mean 'vit_nano2_soft'?" in answer.err
    assert f"softmoe list models shows all {len(conf_files.files('model'))}" in answer.err and len(answer.err) < 250
    assert softmoe("train", "").err == "softmoe: an argument is empty\n"


def test_overrides_may_stand_before_flags(softmoe: Softmoe) -> None:
    assert "seed: 3" in softmoe("train", "seed=3", "--cfg", "job", "train.steps=2").out


# --- completion -------------------------------------------------------------------------------------------------------


@pytest.fixture
def studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for run in ("digits/one-1", "digits/two-2", "a study/run 1"):
        folder = tmp_path / "outputs" / run
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
    (tmp_path / "w.safetensors").touch()
    return tmp_path


COMPLETED = {
    "softmoe tr": ["train"],
    "softmoe data ": ["check"],
    "softmoe help ev": ["evaluate"],
    "softmoe completion f": ["fish"],
    "softmoe list r": ["routers", "recipes"],
    "softmoe train model=vit_nano2_s": ["model=vit_nano2_soft"],
    "softmoe train -m model=vit_nano2_dense,vit_nano2_s": ["model=vit_nano2_dense,vit_nano2_soft"],
    "softmoe train mo": ["model=", "model/backbone=", "model/router=", "model."],
    "softmoe train optim.l": ["optim.lr=", "optim.layer_decay="],
    "softmoe train 'optim.l": ["optim.lr=", "optim.layer_decay="],
    "softmoe train model.router.k": [],
    "softmoe train model/router=tokens_choice model.router.k": ["model.router.k="],
    "softmoe train train.compile=": ["train.compile=true", "train.compile=false"],
    "softmoe train +experiment=placement/e": ["+experiment=placement/every_2"],
    "softmoe train --cfg j": ["job"],
    "softmoe train --g": ["--groups"],
    "softmoe match to=vit_s16_d": ["to=vit_s16_dense"],
    "softmoe check soft_": ["soft_uniform"],
    "softmoe check tokens_choice k": ["k="],
    "softmoe evaluate checkpoint=w": ["checkpoint=w.safetensors"],
    "softmoe evaluate checkpoint=outputs/digits/t": [
        "checkpoint=outputs/digits/two-2", "checkpoint=outputs/digits/two-2/"
    ],
    "softmoe evaluate checkpoint=outputs/a\\ study/r": [
        "checkpoint=outputs/a\\ study/run\\ 1", "checkpoint=outputs/a\\ study/run\\ 1/"
    ],
    "softmoe compare outputs/d": ["outputs/digits"],
    "softmoe status outputs/digits/o": ["outputs/digits/one-1/"],
    "softmoe compare --c": ["--cost", "--columns"],
    "softmoe nonsense ": [],
    "softmoe train data.root=/no/such/place/": [],
}  # fmt: skip


@pytest.mark.parametrize("line", COMPLETED)
def test_completion(line: str, studies: Path) -> None:
    assert completion.answers(line) == COMPLETED[line]


def test_completion_in_bash(studies: Path) -> None:
    """As readline calls it: what it takes for the word is what follows the =; nothing is ever written to the prompt."""
    binaries = studies / "bin"
    binaries.mkdir()
    (binaries / "softmoe").write_text(f'#!/bin/sh\nexec {sys.executable} -m softmoe_cli "$@"\n')
    (binaries / "softmoe").chmod(0o755)
    (studies / "conf/model").mkdir(parents=True)
    (studies / "conf/model/latin.yaml").write_bytes(b"\xe9: 1")
    code = (
        'eval "$(softmoe completion bash)"; complete -p softmoe\n'
        'ask() { COMP_LINE=$1 COMP_POINT=${#1}; _softmoe softmoe "$2"; printf "%s\\n" "${COMPREPLY[@]}"; }\n'
        'ask "softmoe train model=vit_nano2_s" vit_nano2_s; ask "softmoe evaluate checkpoint=" ""\n'
        'ask "softmoe train model=latin model.router.k" model.router.k; ask "softmoe trainn x" x\n'
    )
    root = str(Path(__file__).parents[2])
    env = os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": root}
    told = subprocess.run(["bash", "-c", code], cwd=studies, env=env, capture_output=True, text=True, check=False)
    assert told.stderr == ""
    first, choice, *runs = told.stdout.splitlines()
    assert first == "complete -F _softmoe softmoe" and choice == "vit_nano2_soft"
    assert sorted(runs[:3]) == ["outputs/a\\ study/run\\ 1", "outputs/digits/one-1", "outputs/digits/two-2"]


def test_completion_imports_neither_torch_nor_hydra(studies: Path) -> None:
    code = (
        "import sys; from softmoe_cli.cli import run\n"
        "run(['completion', 'answer', 'softmoe train model/router=soft model.router.num'])\n"
        "print([m for m in ('torch', 'hydra', 'omegaconf', 'timm', 'numpy') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "model.router.num_experts=\n[]\n"


def test_a_model_that_has_no_name_is_crossed(softmoe: Softmoe) -> None:
    """The words that replace its name lead to its backbone and router; where one has a name there are none."""
    routers = {name: conf_files.load_yaml(file)["_target_"] for name, file in conf_files.files("model/router").items()}
    for backbone in conf_files.files("model/backbone").keys() - {"small", "timm"}:
        for router, target in routers.items():
            words = explain.crossing(f"{backbone}_{router}")
            assert (words == []) == (f"{backbone}_{router}" in conf_files.files("model"))
            model = conf_files.defaults("train", conf_files.chosen_groups(words))["model"]
            if words == ["model=vit_s16_tokens_choice", f"model/backbone={backbone}"]:  # the paper's: the surest first
                target = routers["tokens_choice_bpr"]
            assert not words or (model["backbone"]["name"], model["router"]["_target_"]) == (backbone, target)
    answer = softmoe("train", "model=vit_b16_tokens_choice")
    assert answer.code == 2 and "type model=vit_s16_tokens_choice model/backbone=vit_b16" in answer.err
    assert explain.crossing("vit_b16_sotf") == []


def test_info_into_a_closed_pipe(tmp_path: Path) -> None:
    line = f"{sys.executable} -m softmoe_cli train --info config | head -2"
    told = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert told.stderr == ""


def test_python_asks_as_the_command_does() -> None:
    from softmoe_cli.options.compose import compose

    with pytest.raises(UsageError, match=r"optim.learning_rate=1: .*Did you mean 'optim.lr'\?"):
        compose("optim.learning_rate=1")
