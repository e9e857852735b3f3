"""Sweeps through real processes and signals: what is lost is one job, and the others are what they are alone."""

import contextlib
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from softmoe_cli.errors import UsageError
from softmoe_cli.launch.sweep import Sweep
from softmoe_cli.launch.tables import fitted
from softmoe_cli.launch.typed import study_of
from softmoe_cli.options.compose import admit
from softmoe_cli.run import status
from tests.conftest import TINY, Softmoe, thinned
from tests.launch.sweeps import LINE, finish, finished, launch, rows_of, runs
from tests.processes import Started, until
from tests.runs import same

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
@pytest.mark.parametrize("good", thinned([3, 6], 1))
def test_jobs_with_a_raise_a_kill_too_little_memory_and_a_killed_launcher(good: int, tmp_path: Path) -> None:
    """The same command again ends the sweep: the others as if alone, none twice, and the right list of failures."""
    names = [f"ok{i}" for i in range(good)]
    jobs: dict[str, dict[str, Any]] = {name: {"seed": i, "train": {"steps": 10}} for i, name in enumerate(names)}
    jobs["long"] = {"train": {"steps": 200}}
    jobs["raises"] = {"train": {"steps": 1}, "optim": {"warmup": 0, "lr": 1e38, "clip_norm": None}}
    jobs["large"] = {"model": {"backbone": {"mlp_width": 2**31 - 1}}}
    order = ["long", "raises", "large", *names]
    for name in ("sweep", "alone"):
        (tmp_path / name / "conf" / "experiment").mkdir(parents=True)
        for job, values in jobs.items():
            text = "# @package _global_\n" + yaml.safe_dump(values)
            (tmp_path / name / "conf" / "experiment" / f"{job}.yaml").write_text(text)
    line = ("hydra.launcher.jobs=2", f"+experiment={','.join(order)}")
    without_large_width = [word for word in LINE if not word.startswith("model.backbone.mlp_width")]

    command = ["train", "-m", *without_large_width, *line]
    first = Started(tmp_path / "sweep", command, {}, out="first.txt", own_server=True)
    study = tmp_path / "sweep" / "outputs" / "default"
    until(lambda: list(study.glob("sweep-*/jobs.json")), first)
    folders = {name.removeprefix("+experiment="): folder for name, folder in runs(tmp_path / "sweep").items()}
    until((folders["long"] / "metrics.jsonl").exists, first)
    os.kill(int((folders["long"] / ".lock").read_text().split()[1]), signal.SIGKILL)
    until(
        lambda: (
            len(list(study.glob("*/result.json"))) >= good // 3
            and any(status.held(folder) and not finished(folder) for folder in folders.values())
        ),
        first,
    )
    first.send(signal.SIGKILL)
    _, out = first.wait()
    until(lambda: not any(map(status.held, folders.values())))  # the jobs that it leaves save, or end
    assert "failed   +experiment=long: killed by SIGKILL" in out
    done = {name: (folder / "result.json").stat().st_mtime_ns for name, folder in folders.items() if finished(folder)}
    assert len(done) >= good // 3

    second = Started(tmp_path / "sweep", command, {})
    out = finish(second, 1)
    assert "2 jobs failed; type the same command to try again\n  +experiment=raises: validation loss" in out
    assert "\n  +experiment=large: training " in out and "choose a smaller model" in out
    assert "2 failed, " in out and f"{len(done)} done before" in out
    assert {name: (folders[name] / "result.json").stat().st_mtime_ns for name in done} == done
    some = ["long", *names[2::3]]  # killed, perhaps met by the restart, last
    line = ("hydra/launcher=basic", f"+experiment={','.join(some)}")  # one after the other, without our launcher
    finish(Started(tmp_path / "alone", ["train", "-m", *without_large_width, *line], {}))
    for name in some:
        same(tmp_path / "alone" / "outputs" / "default" / folders[name].name, folders[name])
    assert not finished(folders["raises"]) and not finished(folders["large"])
    logs = {log.stem: log.read_text() for log in study.glob("sweep-*/*.log")}
    assert all(logs[f"{i:02}"].count("test top-1") <= 1 for i in (0, *range(3, len(order)))), "0: ended as it should"
    states = {each.run.removeprefix("+experiment="): each.state for each in status.read_states([study])}
    assert states == {name: "failed" if name in ("raises", "large") else "done" for name in order}


def test_a_launcher_that_has_ended_is_waited_for_no_longer(tmp_path: Path) -> None:
    process = launch(tmp_path, "stesp=1")
    with pytest.raises(AssertionError, match="there is no key 'stesp'"):
        until(lambda: list(tmp_path.glob("outputs/*/sweep-*/jobs.json")), process)


@pytest.mark.long
def test_an_interrupt_saves_every_job(tmp_path: Path) -> None:
    """Meanwhile a second command for the same sweep is refused."""
    line = ("train.steps=100000", "train.log_every=10", "seed=0,1,2", "hydra.launcher.jobs=2")
    process = launch(tmp_path, *line)
    study = tmp_path / "outputs" / "default"
    until(lambda: len([file for file in study.glob("*/metrics.jsonl") if file.stat().st_size]) == 2, process)
    assert "the same sweep is running already" in finish(launch(tmp_path, *line), 2)
    assert [each.state for each in status.read_states([study])] == ["running", "running", "waiting"]
    process.send(signal.SIGINT)
    out = finish(process, 130)
    assert "SIGINT: 2 jobs save and leave" in out
    assert out.rstrip().endswith("softmoe: stopped by SIGINT; type the same command to go on")
    assert len({saved.parent for saved in study.glob("*/checkpoints/last-*")}) == 2
    assert [each.state for each in status.read_states([study])] == ["stopped", "stopped", "waiting"]


@pytest.mark.long
def test_a_terminal_shows_a_table_and_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    line = [
        sys.executable,
        "-m",
        "softmoe_cli",
        "train",
        "-m",
        *LINE,
        "train.steps=100000",
        "train.log_every=10",
        "seed=0,1,2",
    ]
    environment = os.environ | {"COLUMNS": "120", "LINES": "20", "TERM": "xterm"}
    process = subprocess.Popen(line, cwd=tmp_path, stdout=theirs, stderr=theirs, env=environment, close_fds=True)
    os.close(theirs)
    shown = b""

    def table() -> bool:
        nonlocal shown
        if select.select([ours], [], [], 0)[0]:
            with contextlib.suppress(OSError):  # the other end has left
                shown += os.read(ours, 65536)
        seen = re.search(rb"seed=0 +running +[0-9]+%", shown) is not None and b"eta" in shown
        assert seen or process.poll() is None, shown.decode()
        return seen

    until(table)
    until(lambda: table() and list(tmp_path.glob("outputs/*/*/metrics.jsonl")))
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)  # at once would be the same request
    process.send_signal(signal.SIGINT)
    until(lambda: table() and process.poll() is not None)
    os.close(ours)
    assert process.returncode == 130
    assert not any(status.held(file.parent) for file in tmp_path.glob("outputs/*/*/.lock"))


SEARCH = (*(word for word in LINE if not word.startswith("model.router")), "train.steps=10", "hydra.launcher.jobs=2")


@pytest.mark.long
@pytest.mark.thorough
def test_a_search_under_a_limit(tmp_path: Path) -> None:
    """Optuna is told validation accuracy, or how far over the limit a job is, which is then not trained."""
    space = ("model.router.num_experts=choice(4,512)", "optim.lr=tag(log,interval(1e-4,1e-2))")
    options = ("hydra.sweeper.n_trials=3", "hydra.launcher.limit.params_m=0.05")
    limited = ["train", "-m", "+search=quality", *SEARCH, *options, *space]
    out = finish(Started(tmp_path, limited, {}))
    assert "over the limit" in out
    best = yaml.safe_load((tmp_path / "outputs/default/optimization_results.yaml").read_text())
    assert best["best_params"]["model.router.num_experts"] == 4
    results = [json.loads(file.read_text()) for file in tmp_path.glob("outputs/default/*/result.json")]
    assert max(row["best_validation_top1_pct"] for row in results) == best["best_value"]
    assert all(row["params_m"] <= 0.05 for row in results) and 1 <= len(results) < 3
    assert "done before" in finish(Started(tmp_path, limited, {})), "the same command asks for the same jobs"


@pytest.mark.long
@pytest.mark.thorough
def test_a_search_for_a_front(tmp_path: Path) -> None:
    other = ("hydra.sweeper.n_trials=2", "study=front", "model.router.num_experts=choice(4,8)")
    finish(Started(tmp_path, ["train", "-m", "+search=pareto", *SEARCH, *other], {}))
    solutions = yaml.safe_load((tmp_path / "outputs/front/optimization_results.yaml").read_text())["solutions"]
    told = {(row["best_validation_top1_pct"], row["train_pflop"]) for row in rows_of(tmp_path / "outputs/front")}
    assert solutions and all(tuple(each["values"]) in told for each in solutions)


def test_hydra_takes_our_launcher_and_no_other() -> None:
    """From the package itself, not from its hydra_plugins namespace: the way of `compose.admit`."""
    admit(Sweep)
    plugins = Plugins.instance()
    launcher = plugins._instantiate(OmegaConf.create({"_target_": "softmoe_cli.launch.sweep.Sweep", "where": "local"}))
    assert isinstance(launcher, Sweep)
    for target in ("softmoe_cli.launch.sweep.Entry", "os.system"):
        with pytest.raises(RuntimeError, match="not the hydra_plugins package"):
            plugins._instantiate(OmegaConf.create({"_target_": target}))


WRONG = {
    "every job": (("train.batch_size=8", "seed=0,-1", "model.backbone.heads=2,3"), "3 of 4 jobs cannot work"),
    "unknown key": (("+nix=1,2",), "nix: there is no key 'nix'"),
    "launcher option": (("seed=0,1", "hydra.launcher.jbos=2"), "Did you mean 'hydra.launcher.jobs'?"),
    "launcher value": (("seed=0,1", "hydra.launcher.jobs=0"), "must be >= 1"),
    "launcher": (("seed=0,1", "hydra/launcher=lokal"), "Did you mean 'local'?"),
    "objective alone": (("seed=0,1", "hydra.launcher.objective=[validation_top1_pct]"), "without a sweeper"),
    "test quality": (("seed=0,1", "hydra.launcher.objective=[top1_pct]"), "is not one of"),
    "limit alone": (("seed=0,1", "hydra.launcher.limit.params_m=1"), "goes with one quality"),
    "auto on a cluster": (("hydra/launcher=ray", "train.batch_size=auto", "seed=0,1"), "give a number"),
    "a precision on a cluster": (("hydra/launcher=ray", "train.precision=auto", "seed=0,1"), "give fp32, bf16 or fp16"),
    "queue of submitit": (("hydra/launcher=slurm", "hydra.launcher.cluster=local", "hydra.launcher.partition=gpu"),
                          "neither partition nor account"),
}  # fmt: skip


WRONG_SEARCH = {
    "which needs ['maximize']": ("seed=choice(0,1)", "hydra.sweeper.direction=minimize"),
    "cannot know the jobs of a search": ("seed=choice(0,1)", "--plan"),
    "train.minutes leaves train_pflop open": (
        "seed=choice(0,1)", "hydra.launcher.limit.train_pflop=1", "train.minutes=1", "optim.schedule=cosine",
        "optim.cooldown=0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", thinned(WRONG_SEARCH, 1))
def test_wrong_search(words: str, tmp_path: Path) -> None:
    out = finish(Started(tmp_path, ["train", "-m", *TINY, "+search=quality", *WRONG_SEARCH[words]], {}), 2)
    assert words in out and "Traceback" not in out


@pytest.mark.parametrize("name", WRONG)
def test_wrong_sweep(name: str, softmoe: Softmoe, tmp_path: Path) -> None:
    arguments, words = WRONG[name]
    answer = softmoe("train", "-m", *TINY, *arguments)
    assert answer.code == 2, answer
    assert words in answer.err and answer.err.startswith("softmoe: ") and "Traceback" not in answer.err
    assert not list(tmp_path.glob("outputs/*/*/*.json")), "no job may be started"


def test_the_same_run_twice_is_run_once(softmoe: Softmoe, tmp_path: Path) -> None:
    """What status says to type is the command as it was typed, options of the launcher included."""
    line = ("train", "-m", *LINE, "train.steps=2", "model.moe_blocks=last_1,[1]", "hydra.launcher.jobs=1")
    answer = softmoe(*line)
    assert answer.code == 0, answer
    assert "model.moe_blocks=[1] is the same run as model.moe_blocks=last_1" in answer.out
    (result,) = tmp_path.glob("outputs/default/*/result.json")
    result.unlink()
    assert f"to go on: {shlex.join(['softmoe', *line])}" in softmoe("status").out.splitlines()


@pytest.mark.thorough
def test_the_sweep_of_wandb(softmoe: Softmoe) -> None:
    """What an agent of W&B would type for the first choice of every parameter works as it is."""
    import wandb.sdk.launch.sweeps.utils as agent

    text = (Path(__file__).parents[2] / "experiments/wandb_sweep/sweep.yaml").read_text()
    asked = yaml.safe_load(text)
    drawn = {
        key: {"value": told.get("value", told.get("min", (told.get("values") or [0])[0]))}
        for key, told in asked["parameters"].items()
    }
    flags = agent.create_sweep_command_args({"args": drawn})["args_no_hyphens"]
    line = [word for part in asked["command"] for word in (flags if part == "${args_no_hyphens}" else [part])]
    readme = (Path(__file__).parents[2] / "experiments/wandb_sweep/README.md").read_text()
    assert " ".join(line) in readme
    assert line[:2] == ["softmoe", "train"]
    answer = softmoe(*line[1:], "train.epochs=null", "train.steps=2", "tracking=off")
    assert answer.code == 0, answer
    assert asked["metric"]["name"] == "validation/top1_pct", "a row's key, as the mirror names it"


def test_a_long_folder_for_temporary_files(tmp_path: Path) -> None:
    """Whose path leaves no room for that of a socket: the server's is in /tmp then."""
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    started = "from softmoe_cli.launch.job import start_server; start_server([]); import tempfile; "
    ran = subprocess.run(
        [sys.executable, "-c", started + "print(tempfile.gettempdir())"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, f"{folder}\n"), ran.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.long
@pytest.mark.thorough
def test_jobs_of_the_same_shapes_compile_once(tmp_path: Path) -> None:
    """By what torch notes of its caches, process by process: of two jobs that start together one compiles and the other
    finds all of it; so does a job of a later command, with another seed and rate. Nothing but torch's cache is left."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "temporary"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }  # fmt: skip
    (tmp_path / "temporary").mkdir()
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    found = ["aotautograd_cache_hit", "fx_graph_cache_hit"]
    made = ["aotautograd_cache_miss", "fx_graph_cache_miss"]
    common = ("train.compile=true", "train.steps=2", "model.backbone.depth=1", "hydra.launcher.jobs=2")
    for words, expected in ((("seed=0,1",), [found, made]), (("seed=2", "optim.lr=0.01"), [found])):
        trace = tmp_path / words[0]
        line = [sys.executable, "-m", "softmoe_cli", "train", "-m", *LINE, *common, *words]
        ran = subprocess.run(
            line,
            cwd=tmp_path,
            env=environment | {"TORCH_TRACE": str(trace)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        noted = [
            re.findall(r'"name": "((?:fx_graph|aotautograd)_cache_\w+)"', each.read_text()) for each in trace.iterdir()
        ]
        assert sorted(sorted(set(each)) for each in noted if each) == expected
    (cache,) = (tmp_path / "temporary").iterdir()
    assert cache.name.startswith("torchinductor_")
    assert {path.name for path in tmp_path.iterdir()} == {"temporary", "outputs", "seed=0,1", "seed=2"}


STUDIES = {
    ("model/router=dense,soft", "seed=0,1,2", "train.steps=5"): "router-seed",
    ("model.router.num_experts=8,16",): "num_experts",
    ("optim.lr=tag(log,interval(1e-4,1e-2))", "model=choice(vit_nano2_soft,vit_nano2_dense)"): "lr-model",
    ("seed=range(3)",): "seed",
    ("seed=1", "model.moe_blocks=[1,2]"): None,
    ("seed=0,1", "study=mine"): None,
    ("seed=0,1", "+experiment=expert_count"): None,
    ("seed=0,1", "name='"): None,
}


@pytest.mark.parametrize("words", STUDIES)
def test_a_sweep_is_named_after_what_varies(words: tuple[str, ...]) -> None:
    assert study_of(["-m", *words]) == STUDIES[words]


def test_sweeps_of_other_jobs_lie_in_other_folders(
    softmoe: Softmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one would write over the jobs and logs of the other. How many run at a time changes no job."""
    setup = Sweep.setup

    def told(sweep: Sweep, **given: Any) -> None:
        setup(sweep, **given)
        raise UsageError(f"in {sweep._folder.name}")

    monkeypatch.setattr(Sweep, "setup", told)
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(f"defaults: [train, _self_]\nname: {name}\n")

    def folder(*words: str) -> str:
        return softmoe("train", "-m", "model/router=dense,soft", "study=s", *words).err.split()[-1]

    others = [("-cn=a", "-cd=."), ("-cn=b", "-cd=."), ("equal=train_pflop",), ("equal=train_pflop", "tolerance=0.1"),
              ("tune=optim.lr", "tune_values=[1e-3,1e-2]"), ("tune=optim.lr", "tune_values=[1e-3,3e-2]")]  # fmt: skip
    assert folder() == folder("hydra.launcher.jobs=2") and folder().startswith("sweep-")
    assert len({folder(), *(folder(*words) for words in others)}) == 1 + len(others)


@pytest.mark.thorough
def test_runs_that_were_not_asked_for_few_shots(softmoe: Softmoe, tmp_path: Path) -> None:
    """They have ended: what is typed for them tells the figure that they would have written down."""
    line = (*TINY, "threads=1", "train.steps=2", "data.split_seed=3", "study=s")
    assert softmoe("train", *line, "train.fewshot=[1]").code == 0
    again = softmoe("train", *line, "train.fewshot=[1]").out
    assert "is finished; nothing to do" in again and "fewshot" not in again
    (run,) = tmp_path.glob("outputs/s/*/result.json")
    words = f"checkpoint={run.parent.relative_to(tmp_path)} split=validation 'fewshot=[5]' fewshot_seed=3"
    told = "train.fewshot=[5] is looked at while a run trains, and this one has ended; of its last weights: "
    told += f"softmoe evaluate {words}"
    assert told in softmoe("train", *line, "train.fewshot=[1,5]").out
    many = softmoe("train", "-m", *line, "seed=0", "train.fewshot=[1,5]")
    assert many.code == 0 and told in many.out
    answer = softmoe("evaluate", *shlex.split(words.replace("[5]", "[1]")), "threads=1", "format=json")
    assert json.loads(answer.out)["fewshot_1_top1_pct"] == json.loads(run.read_text())["validation_fewshot_1_top1_pct"]


def test_a_dangling_link_in_a_sweep(softmoe: Softmoe, tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        (tmp_path / "images" / label / "x.png").symlink_to("nowhere.png")
    answer = softmoe("train", "-m", *TINY, "data=folder", "data.root=images", "seed=0,1")
    assert answer.code == 2 and "x.png" in answer.err and "Traceback" not in answer.err


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_table_of_a_sweep_keeps_the_quality_in_every_width(width: int) -> None:
    rows = [["run", "state", "progress", "eta", "val top-1", "log"]]
    for experts in (4, 8):
        name = f"model.router.num_experts={experts} optim.lr=0.001"
        rows.append([name, "running", "51%", "1m05s", "87.41%", "00.log"])
    text = fitted(rows, width)
    assert all(len(line) <= width for line in text.splitlines()) and text.count("87.41%") == 2
    assert ("model.router.num_experts=4" in text) == (width == 200) and "=4" in text
