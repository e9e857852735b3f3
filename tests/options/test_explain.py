"""What cannot be composed is one sentence, with what others call our options."""

from pathlib import Path

import pytest

from softmoe_cli.config.commands import SCHEMAS
from softmoe_cli.options import conf_files, explain
from tests.conftest import Softmoe

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
    "a folder of Hydra's": ("train hydra.run.dir=mine", "hydra.run.dir=mine moves no run: "),
    "a folder of Hydra's for a sweep": ("train -m seed=0,1 hydra.sweep.dir=mine", "type output_root=, study= or name="),
    "a checkpoint's router": ("finetune checkpoint=x model/router=soft", "model is the checkpoint's; type model=NAME"),
    "its option": ("finetune checkpoint=x model.router.noise_std=0", "noise_std, type +model.router.noise_std=0"),
    "an option without its router": ("upcycle checkpoint=x model.router.k=2", "the router as well, model/router=NAME"),
    "a checkpoint's model": ("evaluate checkpoint=x model.router.k=2", "k=2: the model is the checkpoint's"),
    "a checkpoint's model by name": ("export checkpoint=x model=small", "softmoe export changes none of it"),
    "a pattern without choices": ("train -m model=glob(zzz*)", "model=glob(zzz*) fits no choice. Such as vit_"),
    "a pattern of values": ("train -m seed=glob(*)", "glob is for the choices of a group, and seed is none"),
    "a pattern without -m": ("cost model=glob(vit_nano2*)", "several values make a sweep, which takes -m"),
    "Hydra's completion": ("train -sc install=bash", 'eval "$(softmoe completion bash)"'),
    "Hydra's completion, asked": ("-sc query=bash", 'eval "$(softmoe completion bash)"'),
    "Hydra's completion, bare": ("train --shell-completion", 'eval "$(softmoe completion bash)"'),
    "key of the chosen router": ("train model/router=tokens_choice k=2", "Did you mean 'model.router.k'?"),
    "key of another router": ("train k=2", "model.router.k is an option of model/router=image_choice, static_tasks, "),
    "an experiment without runs": ("data check +experiment=exemplars/soft", "softmoe data check makes none; "),
    "an experiment's cost": ("cost +experiment=expert_count", "softmoe train -m +experiment=expert_count --plan"),
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


def test_a_folder_with_an_equals_sign_belongs_to_its_flag(tmp_path: Path) -> None:
    run = tmp_path / "lr=0.1" / "run"
    run.mkdir(parents=True)
    line = ["seed=3", "-cp", str(run), "--config-name", "a=b", "--cfg", "job"]
    assert explain.check_line("train", line) == [*line[1:], "seed=3"]


def test_a_run_goes_on_by_its_folder_as_typed(softmoe: Softmoe, tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(softmoe("train", "seed=3", "--cfg", "job").out)
    for flags in (("-cp", "outputs/run"), ("--config-path=./outputs/run",), ("-cp", str(run))):
        assert "seed: 3" in softmoe("train", *flags, "-cn", "config", "--cfg", "job").out
    assert "the file of a run knows of no sweep" in softmoe("train", "-m", "-cp", "outputs/run", "-cn", "config").err
    refused = softmoe("train", "-m", "-cd", "outputs/run", "-cn", "config", "seed=1,2").err
    assert "-cn config with -m: the file of a run knows of no sweep" in refused
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/own.yaml").write_text("defaults: [train, _self_]\nname: mine\n")
    planned = softmoe("train", "-m", "-cd", "mine", "-cn", "own", "seed=1,2", "--plan")
    assert planned.code == 0 and "2 jobs" in planned.out + planned.err
    assert "-cn train: there is no such file" in softmoe("train", "-cp", "outputs/run").err
    assert "-cp outputs/rnu is no folder" in softmoe("train", "-cp", "outputs/rnu", "-cn", "config").err


def test_a_pattern_stands_for_the_choices_that_it_fits() -> None:
    line = ["-m", "model=glob([vit_nano4*,small],exclude=*soft)", "+experiment=glob([pruning/e*,pruning/s*])", "seed=0"]
    assert explain.check_line("train", line) == [
        "-m",
        "model=small,vit_nano4_dense,vit_nano4_tokens_choice",
        "+experiment=pruning/eager,pruning/start",
        "seed=0",
    ]


OWN_FILES = {
    "recipe/mine.yaml": ("optim: {lr: 1}", "recipe/mine.yaml lacks the line # @package _global_"),
    "recipe/typo.yaml": ("# @package _global_\ntrain: {step: 3}", "recipe/typo.yaml: train.step: there is no key"),
    "recipe/text.yaml": ("# @package _global_\ntrain: {steps: abc}", "train.steps: expected whole number >= 1"),
    "model/odd.yaml": ("defaults: [small]\ndepht: 3", "model/odd.yaml: model.depht: there is no key 'model.depht'"),
    "data/odd.yaml": ("defaults: [digits]\nmeen: 3", "key 'data.meen'. Did you mean 'data.mean'?"),
}


@pytest.mark.parametrize("name", OWN_FILES)
def test_a_fault_in_a_file_of_ones_own(name: str, softmoe: Softmoe, tmp_path: Path) -> None:
    text, told = OWN_FILES[name]
    own = tmp_path / "conf" / name
    own.parent.mkdir(parents=True)
    own.write_text(text + "\n")
    answer = softmoe("train", name.removesuffix(".yaml").replace("/", "="), "--cfg", "job")
    assert answer.code == 2 and told in answer.err and "raised while" not in answer.err


def test_an_experiment_of_a_group_of_ones_own(softmoe: Softmoe, tmp_path: Path) -> None:
    own = tmp_path / "conf" / "experiment" / "mine" / "x.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\ndefaults:\n  - override /recipe: finetune\n")
    answer = softmoe("cost", "+experiment/mine=x")
    assert answer.code == 2 and "softmoe train -m +experiment=mine/x --plan" in answer.err


@pytest.mark.thorough
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
