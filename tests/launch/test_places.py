"""Where jobs run: here, Slurm, Ray; and the README's batch script."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from softmoe_cli.config.launch import SlurmLauncher
from softmoe_cli.launch.job import Order, note, perform
from softmoe_cli.launch.places import Slurm
from softmoe_cli.launch.plan import Job
from softmoe_cli.launch.sweep import Sweep
from softmoe_cli.launch.tables import Entry
from tests.launch.sweeps import below, finish, launch, runs
from tests.oracles import compose
from tests.processes import until
from tests.runs import same

ROOT = Path(__file__).resolve().parents[2]
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

    rows = until(lambda: next(tmp_path.glob("outputs/default/*/metrics.jsonl"), None), process)
    until(lambda: rows.stat().st_size, process)
    first = until(task, process)
    for pid in [*below(first), first]:
        os.kill(pid, signal.SIGUSR2)
    until(lambda: task() not in (None, first), process)
    process.send(signal.SIGINT)
    assert "failed" not in finish(process, 130)
    told = next(tmp_path.glob("outputs/default/sweep-*/00.log")).read_text()
    assert told.count("the job is queued again") == 1 and "was killed" not in told
    assert list(rows.parent.glob("checkpoints/last-*"))


def test_what_slurm_has_already_is_followed_and_the_rest_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the stacks of the launcher before were others: each job has an end of its own, and none is lost."""
    queued: list[list[str]] = []

    class Number:
        def __init__(self, _folder: Path, job_id: str) -> None:
            self.job_id = job_id

        def done(self) -> bool:
            return True

        def result(self) -> int:
            return int(self.job_id == "7")

    class Queue:
        def __init__(self, *_: object, **__: object) -> None: ...

        def update_parameters(self, **_: object) -> None: ...

        def submit(self, _work: object, orders: list[Order], _run: object) -> Number:
            queued.append([order.log.name for order in orders])
            return Number(tmp_path, "8")

    monkeypatch.setattr("submitit.AutoExecutor", Queue)
    monkeypatch.setattr("submitit.SlurmJob", Number)
    orders = [Order([], "", {}, tmp_path / f"{i:02}.log") for i in range(4)]
    for i in (1, 2):
        (tmp_path / f"{i:02}.slurm").write_text("7")
    attempt = Slurm(SlurmLauncher(cluster="slurm"), tmp_path, lambda _: (0, "")).start(orders)
    assert queued == [["00.log", "03.log"]]
    assert [(tmp_path / f"{i:02}.slurm").read_text() for i in range(4)] == ["8", "7", "7", "8"]
    assert attempt.ended() == 1
    assert not list(tmp_path.glob("*.slurm"))


def test_why_a_job_failed_is_kept_where_slurm_has_it_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launcher was killed, and the next one follows it: a note there is of this attempt. Others start anew."""
    entries = [Entry(Job(name, [name], tmp_path / name, 1), tmp_path / f"{name}.log") for name in ("known", "anew")]
    orders = {entry: Order([], "", {}, entry.log) for entry in entries}
    for order in orders.values():
        note(order, "why")
    orders[entries[0]].ticket.write_text("7")
    sweep = Sweep()
    monkeypatch.setattr(sweep, "_place", SimpleNamespace(start=list), raising=False)
    monkeypatch.setattr(sweep, "_order", orders.get)
    monkeypatch.setattr(sweep, "_line", lambda *_: None)
    sweep._start(entries, "")
    assert [order.failure.exists() for order in orders.values()] == [True, False]


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
                until(lambda: job.poll() is not None or (log.exists() and "srun" in log.read_text()))
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


def test_a_job_whose_directory_is_gone_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = Order([], str(tmp_path / "gone"), {}, tmp_path / "00.log")
    assert perform([order], lambda _: (0, "")) == os.EX_CANTCREAT
    assert capsys.readouterr().err == f"softmoe: cannot write {order.log}: No such file or directory\n"
