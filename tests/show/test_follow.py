"""--follow: a page is served on this machine alone, renewed while the run goes on, and ends with it."""

import contextlib
import socket
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softmoe_cli.errors import UsageError
from softmoe_cli.show import command
from softmoe_cli.show.follow import LOOPBACK, Served, follow
from softmoe_cli.show.page import Shown


def asked(address: str) -> str:
    with urllib.request.urlopen(address, timeout=30) as answer:
        return str(answer.read().decode())


def test_a_page_is_served_here_alone_and_renewed() -> None:
    served = Served(0)
    try:
        assert served.address.startswith("http://127.0.0.1:")
        served.renew("one")
        assert asked(served.address) == "one" and served.asked.wait(30)
        served.renew("two ü")
        assert not served.asked.is_set() and asked(served.address + "?again") == "two ü"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            asked(served.address + "../../etc/passwd")
        port = int(served.address.rpartition(":")[2].strip("/"))
        with pytest.raises(UsageError, match=f"port={port} cannot be served on"):
            Served(port)
    finally:
        served.close()


def test_other_names_for_this_machine_are_refused() -> None:
    """A page from elsewhere whose name leads to this machine would read the run."""
    served = Served(0)
    try:
        served.renew("one")
        port = served.address.rpartition(":")[2].strip("/")
        assert asked(served.address.replace("127.0.0.1", "localhost")) == "one"
        for host in ("elsewhere.example", f"elsewhere.example:{port}", "127.0.0.1", f"127.0.0.1:{int(port) - 1}"):
            with pytest.raises(urllib.error.HTTPError, match="403") as refused:
                urllib.request.urlopen(urllib.request.Request(served.address, headers={"Host": host}), timeout=30)
            assert refused.value.read() == b""
    finally:
        served.close()


def test_a_browser_that_closes_in_the_middle_is_no_fault(capfd: pytest.CaptureFixture[str]) -> None:
    served = Served(0)
    try:
        served.renew("x" * 2**26)
        host = served.address.removeprefix("http://").strip("/")
        with socket.create_connection((LOOPBACK, int(host.partition(":")[2])), timeout=30) as browser:
            browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes at once
            browser.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert browser.recv(10)
        assert not served.asked.wait(0.3)
        served.renew("two")
        assert asked(served.address) == "two"
    finally:
        served.close()
    assert capfd.readouterr().err == ""


def test_a_checkpoint_that_has_gone_leaves_the_last_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again the next time, with the options as they were typed."""
    (tmp_path / "metrics.jsonl").touch()
    answers: list[Shown | str] = ["none", Shown("one"), "gone", Shown("two")]

    def look(tree: dict[str, Any], _record: object, _typed: list[str]) -> Shown:
        assert tree == {"data": {}}
        tree["data"]["name"] = "changed"
        answer = answers.pop(0)
        if isinstance(answer, str):
            raise UsageError(answer)
        return answer

    def checkpoint(step: int) -> None:
        (tmp_path / f"checkpoints/last-{step}").mkdir(parents=True)
        (tmp_path / f"checkpoints/last-{step}/SHA256SUMS").touch()

    monkeypatch.setattr(command, "what_is_shown", look)
    make = command.pages_of(tmp_path, {"data": {}}, [], 5)
    with pytest.raises(UsageError, match="none"):
        make(True)
    assert "<p>one</p>" in make(True)[0] and len(answers) == 2
    assert "<p>one</p>" in make(True)[0] and len(answers) == 2, "nothing is new"
    checkpoint(1)
    page, _ = make(True)
    assert "<p>one</p>" in page and "could not be looked at: gone" in page
    page, _ = make(True)
    assert "<p>two</p>" in page and "could not" not in page and answers == []


class Reader:
    """Asks for the page again and again, as a browser does, until it has the last one."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.pages: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)
        if text.startswith("http:"):
            self.thread = threading.Thread(target=self.read, args=(text.split()[0],), daemon=True)
            self.thread.start()

    def read(self, address: str) -> None:
        with contextlib.suppress(OSError):  # nobody serves it any more
            while "last" not in self.pages:
                self.pages.append(asked(address))


def made(states: list[str]) -> Callable[[bool], tuple[str, str]]:
    def make(goes_on: bool) -> tuple[str, str]:
        return ("goes on" if goes_on else "last"), states.pop(0) if len(states) > 1 else states[0]

    return make


def test_a_run_is_followed_to_its_end() -> None:
    reader = Reader()
    follow(made(["running", "running", "running", "done"]), 0, 0.05, reader.say, last_s=60)
    reader.thread.join(60)
    assert (reader.pages[0], reader.pages[-1]) == ("goes on", "last") and reader.said[-1] == "the run is done"


def test_nobody_has_to_ask() -> None:
    said: list[str] = []
    follow(made(["running", "done"]), 0, 0.01, said.append, last_s=0.05)
    assert said[-1] == "the run is done"


def test_a_run_that_is_quiet_elsewhere_is_left() -> None:
    said: list[str] = []
    options: dict[str, Any] = {"last_s": 0.01, "quiet_s": 5, "age_s": lambda: 6.0}
    follow(made(["running or killed"]), 0, 0.01, said.append, **options)
    assert said[-1] == "the run is running or killed"


def test_a_run_that_has_ended_is_not_followed() -> None:
    with pytest.raises(UsageError, match="the run is done"):
        follow(made(["done"]), 0, 0.01, print)
