"""Files that softmoe writes replace nothing that it was not asked to replace."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.files import RULE, require_vacant, unused, write_atomically
from softmoe_cli.run.header import Source
from softmoe_cli.run.receipt import RECEIPT, already_made, make_whole
from softmoe_cli.run.sealed import SUMS, sha256
from tests.conftest import Softmoe


def test_a_file_is_written_beside_neighbours(tmp_path: Path) -> None:
    """A hidden file of nearly the same name belongs to somebody else, and a link is not followed."""
    (tmp_path / ".bashrc").write_text("mine")
    write_atomically(tmp_path / "bashrc", "new")
    assert (tmp_path / ".bashrc").read_text() == "mine" and (tmp_path / "bashrc").read_text() == "new"
    (tmp_path / "target").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_text() == "mine" and (tmp_path / "link").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {".bashrc", "bashrc", "target", "link"}


def test_a_file_may_be_read_by_whom_the_system_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_atomically(tmp_path / "row", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "row").stat().st_mode & 0o777 == 0o644


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(RunError, match="cannot write"):
        write_atomically(tmp_path / "taken", "x")
    with pytest.raises(RunError, match="cannot write"):
        write_atomically(tmp_path / "none" / "x", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_names_that_are_no_unicode_stay_what_they_were(tmp_path: Path) -> None:
    write_atomically(tmp_path / "list", os.fsdecode(b"caf\xe9.png"))
    assert (tmp_path / "list").read_bytes() == b"caf\xe9.png"


def test_other_names_are_never_long_nor_twice_the_same(tmp_path: Path) -> None:
    long = tmp_path / ("\U0001f600" * 63)  # 252 bytes
    names = {unused(long).name for _ in range(100)}
    assert len(names) == 100 and all(len(os.fsencode(name)) <= 255 for name in names)
    write_atomically(long, "x")
    assert long.read_text() == "x"


TAKEN = {
    "file": "exists", "folder": "exists", "empty": "exists", "dangling": "exists", ".": "exists", "": "exists",
    "file/x": "Not a directory", "n" * 256: "too long", "\N{CJK UNIFIED IDEOGRAPH-4E00}" * 100: "too long",
    "a\0b": "null",
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_what_exists_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    Path("folder").mkdir()
    Path("folder", "x").write_text("x")
    Path("empty").mkdir()
    Path("dangling").symlink_to("nowhere")
    with pytest.raises(UsageError, match=f"^predictions=.*{TAKEN[name]}"):
        require_vacant("predictions", Path(name))
    with pytest.raises(UsageError, match=f"^folder=.*{TAKEN[name]}"):
        already_made(Path(name), Source("x", "digest", {}, {}), {})
    require_vacant("predictions", Path("new"))


@pytest.mark.parametrize(
    ("timed", "plain"),
    [({"clock": {}}, {}), ({"of_each": {"a": {"clock": {}}}}, {"of_each": {"a": {}}})],
    ids=["prune", "extract"],
)
def test_latencies_are_asked_of_what_has_them(timed: dict[str, Any], plain: dict[str, Any], tmp_path: Path) -> None:
    """The same command twice finds what it made."""
    source = Source("x", "digest", {}, {})
    for name, own in (("timed", timed), ("plain", plain)):
        receipt = {"settings": {}, "source": {"digest": "digest"}} | own
        (tmp_path / name).mkdir()
        (tmp_path / name / RECEIPT).write_text(json.dumps(receipt))
        (tmp_path / name / SUMS).write_text(f"{sha256(tmp_path / name / RECEIPT)}  {RECEIPT}\n")
        assert already_made(tmp_path / name, source, {}) == receipt
    assert already_made(tmp_path / "timed", source, {}, clock=True) is not None
    with pytest.raises(UsageError, match=r"^clock=true: .*plain was made without it"):
        already_made(tmp_path / "plain", source, {}, clock=True)


def test_a_folder_is_made_whole_beside_neighbours(tmp_path: Path) -> None:
    """`folder=git` once removed .git."""
    for name in (".git", ".config"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "inside").write_text("mine")

    def fill(folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_text("new")

    def fail(folder: Path) -> None:
        fill(folder)
        raise OSError("no room")

    make_whole(tmp_path / "git", fill)
    with pytest.raises(RunError, match="no room"):
        make_whole(tmp_path / "config", fail)
    assert {path.name for path in tmp_path.iterdir()} == {".git", ".config", "git"}
    assert (tmp_path / ".git" / "inside").read_text() == (tmp_path / ".config" / "inside").read_text() == "mine"
    with pytest.raises(RunError, match="cannot write"):  # somebody else has made it meanwhile
        make_whole(tmp_path / "git", fill)
    assert (tmp_path / "git" / "weights").read_text() == "new"


@pytest.mark.parametrize("command", ["evaluate", "export", "upcycle", "compare", "scaling"])
def test_help_says_that_nothing_is_overwritten(command: str, softmoe: Softmoe) -> None:
    assert RULE in " ".join(softmoe(command, "--help").out.split())
