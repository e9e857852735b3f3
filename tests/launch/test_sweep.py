"""Sweeps through real processes and signals: what is lost is one job, and the others are what they are alone."""

import contextlib
import fcntl
import json
import os
import platform
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from softmoe_cli.launch.sweep import Sweep
from softmoe_cli.options.compose import admit
from softmoe_cli.run import status
from tests.conftest import TINY, Softmoe, thinned
from tests.oracles import compose
from tests.processes import Started
from tests.runs import same

ROOT = Path(__file__).resolve().parents[2]
LINE = (*TINY, "threads=1", "train.batch_size=8", "study=default")


def launch(folder: Path, *arguments: str) -> Started:
    return Started(folder, ["train", "-m", *LINE, *arguments], {})


def finish(process: Started, code: int = 0) -> str:
    left, out = process.wait()
    assert left == code, out
    return out


def until(happens: Callable[[], Any], seconds: float = 600) -> Any:
    end = time.monotonic() + seconds
    while not (found := happens()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
    return found


def runs(folder: Path) -> dict[str, Path]:
    """Run folders by the name of their job."""
    (jobs,) = folder.glob("outputs/*/sweep-*/jobs.json")
    return {job["run"]: jobs.parent / job["folder"] for job in json.loads(jobs.read_text())["jobs"]}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of `softmoe train` with one seed and 30 steps, made once."""
    made: dict[str, Path] = {}

    def run(seed: str) -> Path:
        if seed not in made:
            folder = tmp_path_factory.mktemp("alone")
            finish(Started(folder, ["train", *LINE, "train.steps=30", seed], {}))
            (made[seed],) = (path.parent for path in folder.glob("outputs/default/*/result.json"))
        return made[seed]

    return run


@pytest.mark.long
def test_twelve_jobs_with_a_raise_a_kill_too_little_memory_and_a_killed_launcher(tmp_path: Path) -> None:
    """The same command again ends the sweep: the others as if alone, none twice, and the right list of failures."""
    jobs: dict[str, dict[str, Any]] = {f"ok{i}": {"seed": i, "train": {"steps": 20}} for i in range(9)}
    jobs["long"] = {"train": {"steps": 400}}
    jobs["raises"] = {"train": {"steps": 1}, "optim": {"warmup": 0, "lr": 1e38, "clip_norm": None}}
    jobs["large"] = {"model": {"backbone": {"mlp_width": 2**33}}}
    order = ["long", "raises", "large", *(f"ok{i}" for i in range(9))]
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
    until(lambda: list(study.glob("sweep-*/jobs.json")))
    folders = {name.removeprefix("+experiment="): folder for name, folder in runs(tmp_path / "sweep").items()}
    until((folders["long"] / "metrics.jsonl").exists)
    os.kill(int((folders["long"] / ".lock").read_text().split()[1]), signal.SIGKILL)
    until(
        lambda: (
            len(list(study.glob("*/result.json"))) >= 4
            and any(status.held(folder) and not finished(folder) for folder in folders.values())
        )
    )
    first.send(signal.SIGKILL)
    _, out = first.wait()
    until(lambda: not any(map(status.held, folders.values())))  # the jobs that it leaves save, or end
    assert "failed   +experiment=long: killed by SIGKILL" in out
    done = {name: (folder / "result.json").stat().st_mtime_ns for name, folder in folders.items() if finished(folder)}
    assert 4 <= len(done) < 9

    second = Started(tmp_path / "sweep", command, {})
    out = finish(second, 1)
    assert "2 jobs failed; type the same command to try again\n  +experiment=raises: validation loss" in out
    assert "\n  +experiment=large: training " in out and "choose a smaller model" in out
    assert "2 failed, " in out and f"{len(done)} done before" in out
    assert {name: (folders[name] / "result.json").stat().st_mtime_ns for name in done} == done
    good = ["long", "ok3", "ok8"]  # killed, perhaps met by the restart, last
    line = ("hydra/launcher=basic", f"+experiment={','.join(good)}")  # one after the other, without our launcher
    finish(Started(tmp_path / "alone", ["train", "-m", *without_large_width, *line], {}))
    for name in good:
        same(tmp_path / "alone" / "outputs" / "default" / folders[name].name, folders[name])
    assert not finished(folders["raises"]) and not finished(folders["large"])
    logs = {log.stem: log.read_text() for log in study.glob("sweep-*/*.log")}
    assert all(logs[f"{i:02}"].count("test top-1") <= 1 for i in (0, *range(3, 12))), "0: ended as it was to be said"
    states = {each.run.removeprefix("+experiment="): each.state for each in status.read_states([study])}
    assert states == {name: "failed" if name in ("raises", "large") else "done" for name in order}


def finished(folder: Path) -> bool:
    return (folder / "result.json").exists()


PLACES = {
    "submitit": ("slurm", "hydra.launcher.cluster=local", "hydra.launcher.gpus=0", "hydra.launcher.cpus=1"),
    "ray": ("ray", "hydra.launcher.cpus=1"),
}


@pytest.mark.long
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.thorough
def test_other_places_give_the_same_results(place: str, tmp_path: Path, alone: Callable[[str], Path]) -> None:
    line = ("train.steps=30", "seed=0,1", "hydra.launcher.jobs=2", f"hydra/launcher={PLACES[place][0]}")
    out = finish(launch(tmp_path, *line, *PLACES[place][1:]))
    assert out.splitlines()[-1] == "2 done"
    for seed, folder in runs(tmp_path).items():
        same(alone(seed), folder)


def below(pid: int) -> list[int]:
    """A process's children, and theirs."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found += [int(path.parent.name), *below(int(path.parent.name))]
    return found


@pytest.mark.long
@pytest.mark.thorough
def test_a_job_of_two_processes_whose_end_is_near_is_queued_again(tmp_path: Path) -> None:
    """submitit's signal reaches all that the job has started, as it may under Slurm."""
    line = ("train.steps=2000", "train.log_every=1", "devices=2", "hydra/launcher=slurm", *PLACES["submitit"][1:])
    process = launch(tmp_path, *line)

    def task() -> int | None:
        for pid in below(process.pid):
            with contextlib.suppress(OSError):
                if b"submitit.core._submit" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return None

    rows = until(lambda: next(tmp_path.glob("outputs/default/*/metrics.jsonl"), None))
    until(lambda: rows.stat().st_size)
    first = until(task)
    for pid in [*below(first), first]:
        os.kill(pid, signal.SIGUSR2)
    until(lambda: task() not in (None, first))
    process.send(signal.SIGINT)
    assert "failed" not in finish(process, 130)
    told = next(tmp_path.glob("outputs/default/sweep-*/00.log")).read_text()
    assert told.count("the job is queued again") == 1 and "was killed" not in told
    assert list(rows.parent.glob("checkpoints/last-*"))


STUB = """#!/bin/bash
trap 'echo saved >> "$LOG"; exit 143' TERM
echo "{name} $*" >> "$LOG"
case "{name} $1" in
  "scontrol show") echo node7 ;;
  "srun torchrun") {work} ;;
esac
"""


@pytest.mark.parametrize("ends_by_itself", [True, False])
def test_the_readmes_batch_script(ends_by_itself: bool, tmp_path: Path) -> None:
    """Run by bash with stand-ins for Slurm: told that its time is over, it has the run saved, then queues it again."""
    text = (ROOT / "softmoe_cli/launch/README.md").read_text()
    (script,) = re.findall(r"^```\n(#!/bin/bash\n.*?)^```", text, re.DOTALL | re.MULTILINE)
    work = ":" if ends_by_itself else "while :; do sleep 0.05; done"
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text(STUB.format(name=name, work=work))
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    slurm = {"SLURM_JOB_ID": "41", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7-8]", "LOG": str(log)}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen(["bash", "-c", script], env=environment, start_new_session=True) as job:
        try:
            if not ends_by_itself:
                until(lambda: log.exists() and "srun" in log.read_text())
                time.sleep(0.5)  # srun runs before bash knows its number
                job.send_signal(signal.SIGUSR1)
            job.wait(300)
        finally:
            with contextlib.suppress(ProcessLookupError):  # as it should be
                os.killpg(job.pid, signal.SIGKILL)
    told = log.read_text().splitlines()
    command = next(line for line in told if line.startswith("srun "))
    assert "--nnodes=2" in command and "--rdzv-endpoint=node7:29500" in command and "--rdzv-id=41" in command
    program, _, overrides = command.partition(" -m softmoe_cli train ")
    assert program.startswith("srun torchrun ") and compose(*overrides.split()).model.name == "vit_b16_soft"
    assert told[2:] == ([] if ends_by_itself else ["saved", "scontrol requeue 41"])


@pytest.mark.long
def test_an_interrupt_saves_every_job(tmp_path: Path) -> None:
    """Meanwhile a second command for the same sweep is refused."""
    line = ("train.steps=100000", "train.log_every=10", "seed=0,1,2", "hydra.launcher.jobs=2")
    process = launch(tmp_path, *line)
    study = tmp_path / "outputs" / "default"
    until(lambda: len([file for file in study.glob("*/metrics.jsonl") if file.stat().st_size]) == 2)
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
        return re.search(rb"seed=0 +running +[0-9]+%", shown) is not None and b"eta" in shown

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


def rows_of(study: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in study.glob("*/result.json")]


def test_a_plan_writes_nothing(softmoe: Softmoe, tmp_path: Path) -> None:
    answer = softmoe("train", "-m", *LINE, "train.steps=100", "seed=0,1", "data.hflip=0,0.5", "--plan")
    assert answer.code == 0, answer
    assert "seed=1 data.hflip=0.5" in answer.out or "data.hflip=0.5" in answer.out
    lines = answer.out.splitlines()
    assert lines[-1].startswith("4 jobs, 4 to do: 1.412 GFLOP, ") and "at a time" in lines[-1]
    assert all("waiting" in line and "outputs/default/vit_nano2_soft-digits-" in line for line in lines[1:5])
    assert list(tmp_path.iterdir()) == []


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


def test_a_plan_is_of_a_sweep(softmoe: Softmoe) -> None:
    for line in (("train", "--plan"), ("cost", "-m", "--plan")):
        answer = softmoe(*line)
        assert answer.code == 2 and "--plan lists the jobs of a sweep" in answer.err


def test_the_same_run_twice_is_run_once(softmoe: Softmoe, tmp_path: Path) -> None:
    answer = softmoe("train", "-m", *LINE, "train.steps=2", "model.moe_blocks=last_1,[1]", "hydra.launcher.jobs=1")
    assert answer.code == 0, answer
    assert "model.moe_blocks=[1] is the same run as model.moe_blocks=last_1" in answer.out
    assert len(list(tmp_path.glob("outputs/default/*/result.json"))) == 1


def made(run: Path, rows: Sequence[dict[str, Any]], lock: str = "") -> None:
    """A run's folder as far as status reads it."""
    run.mkdir(parents=True)
    budgets = {"steps": 100, "epochs": None, "images": None, "minutes": None}
    (run / "config.yaml").write_text(yaml.safe_dump({"train": budgets}))
    lines = [json.dumps({"format": 1} | row) + "\n" for row in rows]
    (run / "metrics.jsonl").write_text("".join(lines) + '{"step": 99, "spl')
    (run / ".lock").write_text(lock)


def test_status_from_files_alone(softmoe: Softmoe, tmp_path: Path) -> None:
    rows = [{"step": 50, "epoch": 1, "images": 400, "device_s": 1.0, "split": "validation", "top1_pct": 91.5}]
    rows += [{"step": step, "epoch": 1, "images": 8 * step, "device_s": 1.0, "split": "train"} for step in (51, 60)]
    study = tmp_path / "outputs" / "mine"
    for name, lock in {"a-stopped": "", "b-elsewhere": "another-machine 7", "c-killed": f"{platform.node()} 7"}.items():
        made(study / name, rows, lock)
    with (study / "a-stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "split": "trai\n')  # damage is compare's to name
    made(study / "d-held", rows)
    made(study / "e-done", rows)
    (study / "e-done" / "result.json").write_text('{"format": 1, "validation_top1_pct": 93.25}')
    sweep = study / "sweep-0123abcd"
    sweep.mkdir()
    jobs = [{"run": f"seed={i}", "folder": f"../{name}"} for i, name in enumerate(("e-done", "f-failed", "g-waiting"))]
    (sweep / "jobs.json").write_text(json.dumps({"jobs": jobs}))
    (sweep / "01.json").write_text('{"reason": "out of memory at step 3"}')
    (sweep / "01.log").write_text("")
    with (study / "d-held" / ".lock").open() as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        told = {each["run"]: each for each in json.loads(softmoe("status", "outputs", "--json").out)}
        table = softmoe("status", "outputs/mine")
    assert {name: each["state"] for name, each in told.items()} == {
        "a-stopped": "stopped", "b-elsewhere": "running or killed", "c-killed": "stopped", "d-held": "running",
        "seed=0": "done", "seed=1": "failed", "seed=2": "waiting",
    }  # fmt: skip
    assert (told["a-stopped"]["progress"], told["a-stopped"]["top1_pct"]) == (0.6, 91.5)
    assert told["seed=0"]["top1_pct"] == 93.25 and told["seed=1"]["log"] == "outputs/mine/sweep-0123abcd/01.log"
    assert 0 <= told["b-elsewhere"]["age_s"] < 100
    assert "failed: seed=1: out of memory at step 3" in table.out and "1 running, 1 running or killed" in table.out
    assert "stopped" in softmoe("status", "outputs/mine/a-stopped").out
    config = study / "a-stopped" / "config.yaml"
    timed = yaml.safe_load(config.read_text())["train"] | {"steps": None, "minutes": 1 / 60}
    config.write_text(yaml.safe_dump({"train": timed, "devices": 4}))
    (state,) = json.loads(softmoe("status", "outputs/mine/a-stopped", "--json").out)
    assert state["progress"] == 0.25, "four devices have spent one second together, of one"
    config.write_text(yaml.safe_dump({"train": timed | {"steps": 100, "minutes": None}}))
    twice = softmoe("status", "outputs/mine", "outputs/mine/a-stopped").out
    assert sum(line.startswith("a-stopped ") for line in twice.splitlines()) == 1, "a run that is named twice"
    (tmp_path / "empty").mkdir()
    wrong = {
        ("nix",): "nix is no folder",
        ("n" * 300,): "is no folder",
        ("empty",): "holds neither",
        ("outputs", "--jsno"): "--json",
    }
    for arguments, words in wrong.items():
        answer = softmoe("status", *arguments)
        assert answer.code == 2 and words in answer.err
    answer = softmoe("status")
    assert (answer.code, answer.out.splitlines()[0]) == (0, "outputs/mine"), "outputs, where no folder is named"
    shutil.rmtree(tmp_path / "outputs")
    assert "there is no folder outputs here" in softmoe("status").err


BAD: dict[str, tuple[str, str | bytes | None, str]] = {
    "a-empty": ("config.yaml", "", "config.yaml is empty"),
    "a-list": ("config.yaml", "[1, 2]", "config.yaml does not say what train is"),
    "a-text": ("config.yaml", "train: 5", "config.yaml does not say what train is"),
    "a-none": ("config.yaml", "seed: 0", "config.yaml does not say what train is"),
    "a-no-yaml": ("config.yaml", "train: [", "config.yaml is no YAML"),
    "a-latin": ("config.yaml", b"train: {steps: 5} # caf\xe9", "config.yaml is no YAML"),
    "a-zero": ("config.yaml", "train: {steps: 0}", "config.yaml says train.steps is 0"),
    "a-huge": ("config.yaml", "train: {epochs: 1e999}", "config.yaml says train.epochs is 1e999"),
    "a-word": ("config.yaml", "train: {steps: many}", "config.yaml says train.steps is many"),
    "a-date": ("config.yaml", "train: {steps: 2020-99-99}", "config.yaml says train.steps is 2020-99-99"),
    "a-map": ("config.yaml", "train: {steps: {a: b}}", "config.yaml says train.steps is"),
    "a-free": ("config.yaml", "train: {steps: null}", "config.yaml has none of train.steps"),
    "a-devices": ("config.yaml", "train: {steps: 9}\ndevices: 0", "config.yaml says devices is 0"),
    "a-deep": ("config.yaml", "[" * 200_000, "config.yaml is no YAML"),
    "a-unhashable": ("config.yaml", "? [a]\n: 1", "config.yaml is no YAML"),
    "a-config-folder": ("config.yaml", None, "config.yaml is no file"),
    "b-folder": ("result.json", None, "result.json is no file"),
    "b-deep": ("result.json", "[" * 200_000, "result.json is truncated or damaged"),
    "b-cut": ("result.json", '{"validation_top1_p', "result.json is truncated or damaged"),
    "b-list": ("result.json", "[]", "result.json is no row"),
    "b-bytes": ("result.json", b"\xff\xfe\x00", "result.json is truncated or damaged"),
    "b-nan": ("result.json", '{"validation_top1_pct": NaN}', "result.json is truncated or damaged"),
    "b-word": ("result.json", '{"validation_top1_pct": "\x1b[2Jhigh"}', "result.json is truncated or damaged"),
    "b-kind": ("result.json", '{"format": 1, "validation_top1_pct": "\\u001b[2Jx"}', "says validation_top1_pct is"),
    "b-true": ("result.json", '{"format": 1, "validation_top1_pct": true}', "which is not a number"),
    "b-format": ("result.json", '{"format": 2}', "result.json has format 2, and this softmoe reads format 1"),
    "c-lock": (".lock", None, ".lock is no file"),
    "d-rows": ("metrics.jsonl", '{"step": "5", "split": "train"}\n', "metrics.jsonl has no row that tells how far"),
    "d-deep": ("metrics.jsonl", "[" * 200_000 + "\n", "metrics.jsonl has no row that tells how far"),
    "d-huge": ("metrics.jsonl", f'{{"step": 1{"0" * 400}, "epoch": 1, "images": 1, "device_s": 1}}\n', "has no row"),
    "d-folder": ("metrics.jsonl", None, "metrics.jsonl is no file"),
}  # fmt: skip


def test_a_bad_run_hides_no_other(softmoe: Softmoe, tmp_path: Path) -> None:
    """Each costs its own line, which names the file; what those lines show is nothing that a terminal obeys."""
    good = [{"step": 50, "epoch": 1, "images": 400, "device_s": 1.0, "split": "validation", "top1_pct": 91.5}]
    study = tmp_path / "outputs" / "mine"
    for name, (file, text, _) in BAD.items():
        made(study / name, good)
        (study / name / file).unlink(missing_ok=True)
        if text is None:
            (study / name / file).mkdir()
        else:
            (study / name / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    made(study / "e-good", [*good, {**good[0], "top1_pct": None}, {**good[0], "top1_pct": "high"}, {"step": [1]}])
    made(study / "e-\x1b[31mred", good)
    os.mkfifo(study / "e-good" / "result.json")
    broken = {
        "f": "{",
        "g": '{"jobs": 5}',
        "h": '{"jobs": [{"run": "x"}]}',
        "i": '{"jobs": [{"run": "x", "folder": 5}]}',
    }
    for name, text in broken.items():
        (study / f"sweep-{name}").mkdir()
        (study / f"sweep-{name}" / "jobs.json").write_text(text)
    (study / "sweep-j").mkdir()
    jobs = [
        {"run": "seed=\x1b]0;x\x07", "folder": "../" + "n" * 300},
        {"run": "seed=1", "folder": "../e-good/config.yaml"},
    ]
    (study / "sweep-j" / "jobs.json").write_text(json.dumps({"typed": ["a=b c", "seed=0"], "jobs": jobs}))
    answer = softmoe("status")
    assert (answer.code, answer.err) == (0, "")
    assert "\x1b" not in answer.out and "e-\\x1b[31mred" in answer.out
    lines = answer.out.splitlines()
    for name, (_, _, told) in BAD.items():
        (line,) = [line for line in lines if line.startswith(f"damaged: {name}: ")]
        assert told in line and len(line) < 300
    for name, told in {
        "f": "is truncated",
        "g": "no list of jobs",
        "h": "job 0 has no folder",
        "i": "folder is 5",
    }.items():
        assert any(f"damaged: sweep-{name}: jobs.json" in line and told in line for line in lines)
    assert any(line.startswith("damaged: seed=\\x1b]0;x\\x07: ") for line in lines)
    (pipe,) = [line for line in lines if line.startswith("damaged: e-good")]
    assert "result.json is no file" in pipe, "a pipe is not waited for"
    (study / "e-good" / "result.json").unlink()
    rows = {each["run"]: each for each in json.loads(softmoe("status", "outputs", "--json").out)}
    assert (rows["e-good"]["state"], rows["e-good"]["top1_pct"], rows["e-good"]["progress"]) == ("stopped", 91.5, 0.5)
    assert rows["e-good"]["resume"] == f"softmoe train -cp {study / 'e-good'} -cn config"


def test_what_to_type_to_go_on(softmoe: Softmoe, tmp_path: Path) -> None:
    """A stopped sweep's own words; a stopped run's configuration, with which it is the same run and goes on."""
    run = tmp_path / "outputs" / "mine" / "run"
    made(run, [])
    (run / "config.yaml").write_text("train: {steps: 9}\ncheckpoint: outputs/x\n")
    (tmp_path / "outputs" / "mine" / "sweep-1").mkdir()
    jobs = [{"run": f"seed={i}", "folder": f"../r{i}"} for i in range(3)]
    said = {"command": "train", "typed": ["seed=0,1", "name=a b"], "jobs": jobs}
    (tmp_path / "outputs" / "mine" / "sweep-1" / "jobs.json").write_text(json.dumps(said))
    lines = softmoe("status").out.splitlines()
    told = [line.removeprefix("to go on: ") for line in lines if line.startswith("to go on: ")]
    assert told == [
        "softmoe train -m seed=0,1 'name=a b'",
        f"softmoe finetune -cp {run} -cn config",
    ]
    trained = softmoe("train", *TINY, "threads=1", "train.steps=2", "study=own")
    assert trained.code == 0, trained
    (own,) = tmp_path.glob("outputs/own/*")
    (own / "result.json").unlink()
    (line,) = [line for line in softmoe("status", "outputs/own").out.splitlines() if line.startswith("to go on: ")]
    again = softmoe(*shlex.split(line.removeprefix("to go on: softmoe ")))
    assert again.code == 0 and "going on from step 2" in again.out, again
    assert list(tmp_path.glob("outputs/own/*")) == [own] and (own / "result.json").exists()
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {"mine", "own"}, "no files of Hydra's"


def test_status_of_many_runs_needs_no_torch(tmp_path: Path) -> None:
    row = {"step": 50, "epoch": 1, "images": 400, "device_s": 1.0, "split": "validation", "top1_pct": 91.5}
    for number in range(200):
        made(tmp_path / "outputs" / "mine" / f"run-{number}", [row] * 100)
    code = (
        "import sys; sys.argv = ['softmoe', 'status', 'outputs']\n"
        "from softmoe_cli.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print('TORCH', 'torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "200 stopped" in told.stdout
    assert told.stdout.split()[-1] == "False"


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
