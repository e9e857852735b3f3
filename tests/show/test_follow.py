"""--follow: a page is served on this machine alone, renewed while the run goes on, and ends with it."""

import contextlib
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from softmoe_cli.errors import UsageError
from softmoe_cli.show.follow import Served, follow


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
