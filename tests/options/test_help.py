"""What the command line says of itself: help."""

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
from softmoe_cli.config.commands import SCHEMAS
from softmoe_cli.config.launch import LAUNCHERS
from softmoe_cli.errors import UsageError
from softmoe_cli.options import conf_files, help, usage
from softmoe_cli.options.compose import store_schema
from softmoe_cli.options.conf_files import conf_folder
from tests.conftest import Softmoe

COMPOSED = [
    ("train", {}),
    ("train", {"model": "vit_s16_soft", "data": "imagenet", "recipe": "paper", "hydra/launcher": "slurm"}),
    ("train", {"model/backbone": "vit_micro4", "model/router": "tokens_choice", "recipe": "finetune_sgd"}),
    ("train", {"model": "vit_h14_experts_choice", "recipe": "strong", "hydra/launcher": "ray"}),
    ("train", {"experiment": "exemplars/tokens_choice_bpr_64"}),
    ("train", {"experiment": "exemplars/soft", "model/router": "experts_choice", "data": "fashion_mnist"}),
    ("train", {"experiment": "task_routing/hybrid"}),
    ("finetune", {"recipe": "finetune_adamw"}),
    ("evaluate", {"data": "imagenet_v2"}),
    ("upcycle", {"model": "small", "model/router": "experts_choice"}),
    ("upcycle", {}),
    ("prune", {}),
    ("export", {}),
    ("show", {"data": "digits"}),
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
    name = "data_check" if command == "data" else command
    store_schema(name)
    overrides = [f"{'+' if group in conf_files.ADDED else ''}{group}={choice}" for group, choice in chosen.items()]
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
    assert "train.precision=fp32 arithmetic under autocast; weights stay fp32; auto: bf16 where that is" in text
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


# --- completion -------------------------------------------------------------------------------------------------------


def test_info_into_a_closed_pipe(tmp_path: Path) -> None:
    line = f"{sys.executable} -m softmoe_cli train --info config | head -2"
    told = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert told.stderr == ""


def test_python_asks_as_the_command_does() -> None:
    from softmoe_cli.options.compose import compose

    with pytest.raises(UsageError, match=r"optim.learning_rate=1: .*Did you mean 'optim.lr'\?"):
        compose("optim.learning_rate=1")
