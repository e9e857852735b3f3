"""Sweeps through real processes and signals: what is lost is one job, and the others are what they are alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from softmoe_cli import status
from tests.conftest import TINY
from tests.processes import Started
from tests.test_train import same

LINE = (*TINY, "threads=1", "train.batch_size=8")


def launch(folder: Path, *arguments: str) -> Started:
    return Started(folder, ["train", "-m", *LINE, *arguments], {})


def finish(process: Started, code: int = 0) -> str:
    left, out = process.wait()
    assert left == code, out
    return out


def until(happens: Callable[[], Any], seconds: float = 100) -> Any:
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


def test_twelve_jobs_with_a_raise_a_kill_too_little_memory_and_a_killed_launcher(tmp_path: Path) -> None:
    """The same command again ends the sweep: the others as if alone, none twice, and the right list of failures."""
    jobs: dict[str, dict[str, Any]] = {f"ok{i}": {"seed": i, "train": {"steps": 20}} for i in range(9)}
    jobs["long"] = {"train": {"steps": 300}}
    jobs["raises"] = {"train": {"steps": 1}, "optim": {"warmup": 0, "lr": 1e38, "clip_norm": None}}
    jobs["large"] = {"model": {"backbone": {"mlp_width": 2**27}}}
    order = ["long", "raises", "large", *(f"ok{i}" for i in range(9))]
    for name in ("sweep", "alone"):
        (tmp_path / name / "conf" / "experiment").mkdir(parents=True)
        for job, values in jobs.items():
            text = "# @package _global_\n" + yaml.safe_dump(values)
            (tmp_path / name / "conf" / "experiment" / f"{job}.yaml").write_text(text)
    line = ("hydra.launcher.jobs=2", f"+experiment={','.join(order)}")
    without_large_width = [word for word in LINE if not word.startswith("model.backbone.mlp_width")]

    first = subprocess.Popen(
        [sys.executable, "-m", "softmoe_cli", "train", "-m", *without_large_width, *line],
        cwd=tmp_path / "sweep", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    study = tmp_path / "sweep" / "outputs" / "default"
    until(lambda: list(study.glob("sweep-*/jobs.json")))
    folders = {name.removeprefix("+experiment="): folder for name, folder in runs(tmp_path / "sweep").items()}
    until((folders["long"] / "metrics.jsonl").exists)
    os.kill(int((folders["long"] / ".lock").read_text().split()[1]), signal.SIGKILL)
    until(lambda: len(list(study.glob("*/result.json"))) >= 4 and any(map(status.held, folders.values())))
    first.kill()
    out, _ = first.communicate()
    assert "failed   +experiment=long: killed by SIGKILL" in out
    done = {name: (folder / "result.json").stat().st_mtime_ns for name, folder in folders.items() if finished(folder)}
    assert 4 <= len(done) < 9

    second = Started(tmp_path / "sweep", ["train", "-m", *without_large_width, *line], {})
    out = finish(second, 1)
    assert "2 jobs failed; type the same command to try again\n  +experiment=raises: validation loss" in out
    assert "\n  +experiment=large: training " in out and "choose a smaller model" in out
    assert "2 failed, " in out and f"{len(done)} done before" in out
    assert {name: (folders[name] / "result.json").stat().st_mtime_ns for name in done} == done
    good = [name for name in order if name not in ("raises", "large")]
    line = ("hydra/launcher=basic", f"+experiment={','.join(good)}")  # one after the other, without our launcher
    finish(Started(tmp_path / "alone", ["train", "-m", *without_large_width, *line], {}))
    for name in good:
        same(tmp_path / "alone" / "outputs" / "default" / folders[name].name, folders[name])
    assert not finished(folders["raises"]) and not finished(folders["large"])
    logs = {log.stem: log.read_text() for log in study.glob("sweep-*/*.log")}
    assert all(logs[f"{i:02}"].count("test top-1") == 1 for i in (0, *range(3, 12)))
    states = {each.run.removeprefix("+experiment="): each.state for each in status.read([study])}
    assert states == {name: "failed" if name in ("raises", "large") else "done" for name in order}


def finished(folder: Path) -> bool:
    return (folder / "result.json").exists()


PLACES = {
    "submitit": ("slurm", "hydra.launcher.cluster=local", "hydra.launcher.gpus=0", "hydra.launcher.cpus=1"),
    "ray": ("ray", "hydra.launcher.cpus=1"),
}


@pytest.mark.parametrize("place", PLACES)
def test_other_places_give_the_same_results(place: str, tmp_path: Path, alone: Callable[[str], Path]) -> None:
    line = ("train.steps=30", "seed=0,1,2,3", "hydra.launcher.jobs=2", f"hydra/launcher={PLACES[place][0]}")
    out = finish(launch(tmp_path, *line, *PLACES[place][1:]))
    assert out.splitlines()[-1] == "4 done"
    for seed, folder in runs(tmp_path).items():
        same(alone(seed), folder)
    assert "4 done before" in finish(launch(tmp_path, *line, *PLACES[place][1:]))
