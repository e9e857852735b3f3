"""A conf folder in the working directory is data: it adds to what there is to choose from, and runs nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from softmoe_cli.errors import UsageError
from softmoe_cli.options.own_conf import OwnSource
from softmoe_cli.options.trust import require_trust
from softmoe_cli.run.header import Source
from softmoe_cli.run.source import read_source
from tests.conftest import TINY, Softmoe
from tests.runs import saved

CALLBACK = "callbacks: {x: {_target_: torch.hub.load, repo_or_dir: ., model: x, source: local}}"
"""Hydra would call this, which imports hubconf.py from the working folder."""
GLOBAL = "# @package _global_\n"


def put(folder: Path, name: str, text: str) -> Path:
    path = folder / "conf" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A file that is there when code of the working folder ran."""
    ran = tmp_path / "ran"
    (tmp_path / "hubconf.py").write_text(f"open({str(ran)!r}, 'w')\ndef x(): return lambda: None\n")
    return ran


def test_a_commands_own_configuration_is_not_taken_from_there(softmoe: Softmoe, tmp_path: Path, trap: Path) -> None:
    """Neither that of a downloaded folder nor of another Hydra project, and the file is named."""
    ours = (Path(__file__).parents[2] / "conf" / "evaluate.yaml").read_text()
    put(tmp_path, "evaluate.yaml", ours + f"  {CALLBACK}\n")
    answer = softmoe("evaluate", "checkpoint=nothing")
    assert answer.code == 2 and "checkpoint=nothing does not exist" in answer.err and not trap.exists()
    assert f"{tmp_path}/conf/evaluate.yaml is not read" in answer.err
    put(tmp_path, "cost.yaml", "lr: 0.1\n")
    answer = softmoe("cost", "format=json", *TINY[1:])
    assert answer.code == 0 and "conf/cost.yaml is not read" in answer.err, answer


def test_hydras_own_node_is_not_taken_from_there(softmoe: Softmoe, tmp_path: Path, trap: Path) -> None:
    put(tmp_path, "recipe/scratch.yaml", f"{GLOBAL}hydra: {{{CALLBACK}}}\n")
    answer = softmoe("train", "train.steps=1", "tracking=off")
    assert answer.code == 2 and "conf/recipe/scratch.yaml" in answer.err and not trap.exists(), answer
    assert len(answer.err.splitlines()) == 1
    put(tmp_path, "recipe/scratch.yaml", f"{GLOBAL}defaults: [hydra/callbacks: evil]\n")
    put(tmp_path, "recipe/hydra/callbacks/evil.yaml", CALLBACK.removeprefix("callbacks: "))
    answer = softmoe("train", "train.steps=1", "tracking=off")
    assert answer.code == 2 and "hydra/callbacks" in answer.err and not trap.exists(), answer


BAD = {
    "recipe/a.yaml": f"{GLOBAL}hydra: {{{CALLBACK}}}",
    "experiment/b.yaml": f"{GLOBAL}hydra: {{launcher: {{_target_: os.system}}}}",
    "experiment/c.yaml": f"{GLOBAL}hydra: {{sweeper: {{custom_search_space: evil.function}}}}",
    "experiment/d.yaml": f"{GLOBAL}hydra: {{sweeper: {{params: {{+hydra.callbacks.x._target_: torch.hub.load}}}}}}",
    "experiment/e.yaml": f"{GLOBAL}hydra: {{sweeper: {{params: {{+data@hydra.callbacks: evil}}}}}}",
    "search/f.yaml": f"{GLOBAL}hydra: {{sweeper: {{sampler: {{_target_: torch.hub.load}}}}}}",
    "search/g.yaml": f"{GLOBAL}hydra: {{sweeper: {{sampler: {{x: '${{model.router}}'}}}}}}",
    "search/h.yaml": f"{GLOBAL}hydra: '${{model.router}}'",
    "search/i.yaml": f"{GLOBAL}hydra: {{searchpath: [file:///tmp]}}",
    "model/j.yaml": f"# @package hydra.callbacks\n{CALLBACK}",
    "data/k.yaml": "defaults: [/data@hydra.callbacks: evil]",
    "data/l.yaml": f"{GLOBAL}name: x",
    "experiment/m.yaml": f"{GLOBAL}defaults: [override /hydra/launcher: evil]",
    "experiment/n.yaml": f"{GLOBAL}defaults: [/hydra/job_logging/evil]",
    "model/o.yaml": "- a list",
    "model/p.yaml": "{no: yaml",
    "model/q.yaml": "# @package\nx: 1",
}


@pytest.mark.parametrize("name", BAD)
def test_what_could_name_code_is_refused_with_its_file(name: str, tmp_path: Path) -> None:
    path = put(tmp_path, name, BAD[name] + "\n")
    with pytest.raises(UsageError, match=str(path)):
        OwnSource("softmoe-own", f"softmoe-own://{tmp_path}/conf").load_config(name.removesuffix(".yaml"))


def test_bytes_that_are_no_text_are_one_sentence(softmoe: Softmoe, tmp_path: Path) -> None:
    put(tmp_path, "model/mine.yaml", "").write_bytes(b"\xff\xfe\x00x")
    answer = softmoe("cost", "model=mine")
    assert answer.code == 2 and "conf/model/mine.yaml cannot be read" in answer.err, answer


def test_only_the_groups_are_there(tmp_path: Path) -> None:
    """Nor by a way around: a folder called hydra, or one outside."""
    for name in ("train.yaml", "hydra/launcher/x.yaml", "experiment/hydra/x.yaml", "data/hydra.x.yaml", "model/x.yaml"):
        put(tmp_path, name, "a: 1\n")
    source = OwnSource("softmoe-own", f"softmoe-own://{tmp_path}/conf")
    seen = ("train", "hydra/launcher/x", "experiment/hydra/x", "data/hydra.x", "data/../train", "model/x")
    assert [name for name in seen if source.is_config(name)] == ["model/x"]
    folders = ("hydra", "hydra/launcher", "experiment/hydra", "..", "data")
    assert [name for name in folders if source.is_group(name)] == ["data"]


def test_models_data_experiments_and_searches_of_ones_own(softmoe: Softmoe, tmp_path: Path) -> None:
    put(tmp_path, "model/mine.yaml", "defaults: [vit_nano2_soft, _self_]\nrouter: {num_experts: 3}\n")
    answer = softmoe("cost", "model=mine", "format=json")
    assert answer.code == 0 and json.loads(answer.out)["model"] == "vit_nano2_soft", answer
    tried = "hydra: {sweeper: {params: {seed: '0,1', model.router.num_experts: '2,4'}}}\n"
    put(tmp_path, "experiment/mine.yaml", f"{GLOBAL}defaults: [override /model: mine]\ntrain: {{steps: 1}}\n{tried}")
    answer = softmoe("train", "+experiment=mine", "--cfg", "all")
    assert answer.code == 0 and "num_experts: 3" in answer.out and "model.router.num_experts: 2,4" in answer.out, answer


def test_python_m_imports_nothing_from_the_working_folder(tmp_path: Path) -> None:
    """Hydra imports every plugin that it finds on the path."""
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "x.py").write_text("open('ran', 'w')\n")
    words = [sys.executable, "-m", "softmoe_cli", "evaluate"]
    place = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""}
    done = subprocess.run(words, cwd=tmp_path, env=place, capture_output=True, text=True)
    assert done.returncode == 2 and "needs checkpoint=" in done.stderr, done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_folder_does_not_vouch_for_what_lies_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever downloads a checkpoint gets the yaml that vouches for its router, and its code, with it."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for folder in (here / "runs", elsewhere / "runs"):
        folder.mkdir(parents=True)
        (folder / "x").write_text("")
    (here / "link").symlink_to(elsewhere / "runs")
    (elsewhere / "link").symlink_to(here / "runs")
    monkeypatch.chdir(here)
    model = {"router": {"_target_": "mine.Router"}}

    def trusted(checkpoint: Path | str, word: str | None = None) -> bool:
        try:
            require_trust(model, Source(str(checkpoint), "", {}, {"model": model}), word)
        except UsageError as error:
            return "trust=mine.Router" not in str(error)
        return True

    assert not trusted(elsewhere / "runs" / "x")
    put(here, "model/router/mine.yaml", "_target_: mine.Router\n")
    assert trusted(elsewhere / "runs" / "x") and trusted("hf-hub:a/b") and trusted("../elsewhere/runs/x")
    inside: tuple[Path | str, ...] = (
        here / "runs" / "x",
        "runs/x",
        "x",
        "link/x",
        "../elsewhere/link/x",
        "../here/runs/x",
    )
    assert not any(map(trusted, inside))
    assert all(trusted(place, "mine.Router") for place in inside) and not trusted("runs/x", "other.Router")


@pytest.mark.parametrize(
    ("words", "code_runs"),
    [
        ([], True),
        (["+model.router._target_=softmoe_cli.moe.routers.soft.SoftRouter"], True),  # block 0 keeps the checkpoint's
        (["model.blocks={0: tokens_choice}"], False),
    ],
)
def test_a_blocks_router_needs_trust_too(
    words: list[str], code_runs: bool, softmoe: Softmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever main router is typed; and what a typed one replaces is not imported."""
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.syspath_prepend(tmp_path)
    source = saved(tmp_path / "x.safetensors", 0, "model/router=soft", "model.moe_blocks=[0,1]")
    card = read_source(str(source)).card
    card["model"]["blocks"] = {"0": {"_target_": "evil.Evil"}}
    save_file(load_file(source), source, metadata={"softmoe": json.dumps(card)})
    answer = softmoe("finetune", f"checkpoint={source}", *words, "train.steps=1", "tracking=off", "threads=1")
    assert answer.code == 2, answer
    assert ("trust=evil.Evil" if code_runs else "another architecture: blocks.") in answer.err


def test_a_defaults_list_without_end_is_named(softmoe: Softmoe, tmp_path: Path) -> None:
    put(tmp_path, "model/one.yaml", "defaults: [two]\n")
    put(tmp_path, "model/two.yaml", "defaults: [one]\n")
    for line in (["--help"], ["--cfg", "job"], ["lerning_rate=1"]):
        answer = softmoe("train", "model=one", *line)
        assert answer.code == 2 and "model/one.yaml: its defaults list leads back to the file itself" in answer.err
        assert answer.err.count("\n") == 1


def test_values_that_follow_each_other_have_none_in_help(softmoe: Softmoe, tmp_path: Path) -> None:
    put(tmp_path, "model/round.yaml", "image_size: ${model.in_chans}\nin_chans: ${.image_size}\n")
    answer = softmoe("cost", "model=round", "--help")
    assert answer.code == 0 and "\n  model.image_size  " in answer.out


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
