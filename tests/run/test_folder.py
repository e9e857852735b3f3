"""A run's folder: one writer, rows on disk when they happen, files of others named and left alone."""

import resource
import signal
from pathlib import Path

import pytest

from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.run.finished import finished
from softmoe_cli.run.folder import Run
from tests.conftest import TINY, Softmoe
from tests.oracles import compose
from tests.processes import until
from tests.runs import start


def test_files_of_a_run_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    run = Run(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"format": 1}\n\xff{"step"\n')
    with pytest.raises(UsageError, match=r"metrics\.jsonl is damaged in line 2.*remove"):
        run.rows("metrics.jsonl")
    for name, content in {"brackets": b"[" * 200_000, "bytes": b"\xff", "less": b'{"signature": "x"}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_bytes(content)
        with pytest.raises(UsageError, match=r"result\.json .*; remove it to run again"):
            _ = finished(tmp_path / name)
    (tmp_path / "result.json").mkdir()
    with pytest.raises(UsageError, match=r"result\.json is no file; remove it to run again"):
        _ = finished(run.folder)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="can be no run's folder: Not a directory"):
        _ = finished(tmp_path / "file" / "run")


def test_no_byte_left_when_a_run_begins_is_one_sentence(tmp_path: Path) -> None:
    run, before = Run(tmp_path / "run"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(RunError, match=r"cannot write .*\.lock"):
            run.open(compose())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        run.close()


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl"])
def test_links_in_a_runs_folder_are_not_followed(name: str, tmp_path: Path) -> None:
    """A folder that was downloaded may hold one, to any file of the user's."""
    (tmp_path / "mine").write_text("mine")
    run = Run(tmp_path / "run")
    run.checkpoints.folder.mkdir(parents=True)
    (run.folder / name).symlink_to(tmp_path / "mine")
    write = run.append if name == "metrics.jsonl" else lambda *_: run.open(compose())
    with pytest.raises((UsageError, RunError), match="symbolic links"):
        write("metrics.jsonl", {"step": 1})
    run.close()
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_folder_has_one_writer(softmoe: Softmoe, tmp_path: Path) -> None:
    process = start(tmp_path, "train.steps=5000", "train.log_every=1")
    until(lambda: list(tmp_path.glob("outputs/*/*/metrics.jsonl")), process)
    refused = softmoe("train", *TINY, "threads=1", "train.steps=5000", "train.log_every=1")
    assert refused.code == 2 and "in use by another process" in refused.err
    process.send(signal.SIGKILL)
    process.wait()
