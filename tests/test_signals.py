"""How commands end: by signals whatever the main thread is doing, by errors of the system, and by defects."""

import errno
import fcntl
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from softmoe_cli import cli
from softmoe_cli.failures import ours
from softmoe_cli.launch import job
from softmoe_cli.run import status
from softmoe_cli.signals import Asked, end_children, heard
from softmoe_cli.train.stop import Stop
from tests.conftest import TINY, Softmoe, thinned
from tests.processes import Started, forked, until

LONG = "torch.linalg.eigvals(torch.randn(4000, 4000))"
"""One operation that takes a minute or more, during which the main thread runs no line of Python."""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_second_signal_leaves_whatever_torch_is_doing(name: str, tmp_path: Path) -> None:
    told = tmp_path / "told.txt"
    assert forked(told, in_a_long_step, signal.Signals[name]) == 130
    text = told.read_text()
    assert f"{name}: saving and leaving after this step, which has taken" in text
    assert "so far, the one before 7 s; press Ctrl-C again to leave at once" in text
    assert "left at once" in text and "the step has ended" not in text


def in_a_long_step(number: int) -> None:
    with Stop() as stop:
        stop._step_s = 7
        threading.Thread(target=send, args=(number, 0.5, 1.3), daemon=True).start()
        eval(LONG, {"torch": torch})
    print("the step has ended", flush=True)


def send(number: int, *after: float) -> None:
    for seconds in after:
        time.sleep(seconds)
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("work", [LONG, "time.sleep(600)", "exec('try: time.sleep(600)\\nfinally: time.sleep(600)')"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_one_signal_ends_a_command(name: str, work: str, tmp_path: Path) -> None:
    """The signal comes during an operation, between two operations, and during a clean-up that does not end."""
    (tmp_path / "slow.py").write_text(f"import time, torch\nopen('begun', 'w')\n{work}\n")
    process = Started(tmp_path, ["check", "slow.py"], {})
    until((tmp_path / "begun").exists, process)
    time.sleep(0.1)
    process.send(getattr(signal, name))
    assert process.wait(60) == (130, f"softmoe: stopped by {name}\n")


def test_a_request_told_twice_is_one() -> None:
    """timeout signals the process that it has started, and then the whole group; torchrun passes Ctrl-C on."""
    asked = Asked()
    assert [asked.again(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT)] == [False] * 3
    assert asked.name == "SIGINT"
    asked._when -= 0.5
    assert not asked.again(signal.SIGTERM) and asked.again(signal.SIGINT)
    asked._when -= 1
    assert asked.again(signal.SIGTERM) and not asked.again(signal.SIGUSR1)


def test_what_was_heard_before_is_heard_again() -> None:
    before, outer, inner = signal.getsignal(signal.SIGUSR1), threading.Event(), threading.Event()
    with heard([signal.SIGUSR1], lambda _: outer.set()):
        with heard([signal.SIGUSR1], lambda _: inner.set()):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert inner.wait(60)
        assert not outer.is_set()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert outer.wait(60)
    assert signal.getsignal(signal.SIGUSR1) == before and signal.set_wakeup_fd(-1) == -1


def test_nobody_is_left_behind(tmp_path: Path) -> None:
    """Neither the process nor its children are left: both hold a lock while they live."""
    lock = tmp_path / "lock"
    assert forked(tmp_path / "told.txt", with_a_family, lock) == 0
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def with_a_family(lock: Path) -> None:
    job.SERVER.Process(target=parent, args=(lock,)).start()
    while not lock.exists() or lock.read_text() != "held":
        time.sleep(0.01)
    end_children()


def parent(lock: Path) -> None:
    os.setpgid(0, 0)
    file = lock.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    if os.fork() == 0:
        file.write("held")
        file.flush()
    time.sleep(600)


def test_a_run_whose_reader_is_gone_saves_and_says_so(tmp_path: Path) -> None:
    """`softmoe train | head -1`"""
    told, line = tmp_path / "told.txt", ["train", *TINY, "train.steps=300", "train.save_seconds=600"]
    assert forked(told, unread, tmp_path, line) == 130
    text = told.read_text()
    assert text == "softmoe: nobody reads what it says any more, so it stopped; type the same command to go on\n"
    (saved,) = tmp_path.glob("outputs/default/*/checkpoints/last-*")
    assert saved.is_dir() and not list(tmp_path.glob("outputs/default/*/result.json"))


def unread(folder: Path, line: list[str]) -> None:
    os.chdir(folder)
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout, sys.argv = os.fdopen(1, "w", closefd=False), ["softmoe", *line]
    cli.main()


def test_brackets_without_end() -> None:
    with pytest.raises(RecursionError) as raised:
        json.loads("[" * 100_000)
    assert "nested too deeply" in str(ours(raised.value))


def test_a_defect_says_whose_it_is(softmoe: Softmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object, **__: object) -> None:
        raise KeyError("folder")

    (tmp_path / "outputs").mkdir()
    monkeypatch.setattr(status, "read_states", lambda *_, **__: status.ago("x"))  # type: ignore[arg-type]
    answer = softmoe("status", "outputs")
    assert answer.code == 1 and answer.err.startswith("Traceback")
    assert answer.err.splitlines()[-1].startswith("softmoe: TypeError: ") and "a defect of softmoe" in answer.err
    monkeypatch.setattr(status, "read_states", wrong)
    answer = softmoe("status", "outputs")
    assert answer.code == 1 and f"raised in {__file__}, line " in answer.err.splitlines()[-1]


RAISED = ("RuntimeError('no GPU')", "OSError('no file')", "AssertionError('odd')", "SystemExit(0)", "KeyError('x')")


@pytest.mark.parametrize("raised", RAISED)
def test_a_router_file_that_raises(raised: str, softmoe: Softmoe, tmp_path: Path) -> None:
    name = f"raises{RAISED.index(raised)}.py"
    (tmp_path / name).write_text(f"raise {raised}\n")
    answer = softmoe("check", name)
    kind = raised.partition("(")[0]
    assert answer.code == 2 and answer.err.startswith(f"softmoe: {name} cannot be imported: {kind}: ")
    assert answer.err.count("\n") == 1


LETTERS = "n" * 300
REFUSED = {
    ("train", f"name={LETTERS}"): "name=nnnnnnnnnnnnnnnnnnnnnnnnnnnnnn… has 311 bytes with the signature behind it",
    ("train", f"study=a/{LETTERS}"): "has 300 bytes; a folder's name may have 255",
    ("train", 'name="' + "\u4e2d" * 100 + '"'): "has 311 bytes with the signature",
    ("train", 'name="a\x1b[31mb"'): r"name='a\x1b[31mb' must be a plain folder name",
    ("train", "=5"): "'=5' has no key; write KEY=VALUE",
    ("train", "+hydra.nosuch=1"): "+hydra.nosuch=1: there is no key 'hydra.nosuch'",
    ("train", "++hydra.job.nosuch=1"): "there is no key 'hydra.job.nosuch'",
    ("train", "train.log_every=5e-324", "train.minutes=0.001"): "e-324 is out of range: it must be >= 1e-06",
    ("train", "data.num_classes=1000000000000"): "data.num_classes=1000000000000 is out of range: it must be >= 1 and",
    ("train", "-m", "output_root=/dev/null/x", "seed=0,1"): "output_root=/dev/null/x: /dev/null/x/seed: Not a",
    ("train", f"wandb.tags=[{'t' * 70}]"): "has 70 characters; W&B takes 1 to 64",
    ("train", 'wandb.tags=[""]'): "the tag '' has 0 characters",
    ("train", "wandb.project=a/b"): "wandb.project=a/b has '/' in it",
    ("train", "wandb.project=''"): "wandb.project= has 0 characters",
    ("train", "wandb.entity=a:b"): "wandb.entity=a:b has ':' in it",
    ("train", f"wandb.group={'g' * 129}"): "has 129 characters; W&B takes 1 to 128",
    ("train", f"study={'s' * 129}", "tracking=offline"): "W&B takes up to 128 as a run's group; set wandb.group",
}  # fmt: skip


def test_a_full_place_before_a_sweep_begins(softmoe: Softmoe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system does not say which file it was, for example where a new file does not fit."""

    def save(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(OmegaConf, "save", save)  # Hydra's multirun.yaml is the first file
    answer = softmoe("train", "-m", "seed=0,1", "study=s")
    assert answer.code == 1
    assert answer.err == "softmoe: No space left on device; make room and type the same command again\n"


@pytest.mark.parametrize("line", thinned([(line,) for line in REFUSED], 9))
def test_refused_before_anything_is_made(line: tuple[str, ...], softmoe: Softmoe, tmp_path: Path) -> None:
    answer = softmoe(*line)
    assert answer.code == 2 and REFUSED[line] in answer.err and "Traceback" not in answer.err
    assert not any(tmp_path.iterdir())


def test_names_are_printed_as_they_are(softmoe: Softmoe, tmp_path: Path) -> None:
    """Characters that a terminal would obey are escaped, and no word between colons becomes an emoji."""
    (tmp_path / "a\x1b[31m:dog:").mkdir()
    answer = softmoe("data", "check", "data=folder", 'data.root="a\x1b[31m:dog:"')
    assert answer.code == 2 and r"a\x1b[31m:dog:" in answer.err
    answer = softmoe("train", *TINY, "name=lr :100: smile", "train.steps=1")
    assert "outputs/default/lr :100: smile-" in answer.out
