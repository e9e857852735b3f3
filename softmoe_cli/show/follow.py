"""`softmoe show --follow`: the page of a run that trains, served on this machine and renewed until the run ends."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from softmoe_cli.errors import UsageError

LOOPBACK = "127.0.0.1"
"""Nobody but users of this machine can ask."""
LAST_S = 30.0
"""After the end of the run a browser that shows the page has so long to ask for the last one."""
GOING_ON = ("running", "running or killed")


class Served:
    """A page that can be renewed while it is served.

    Attributes:
        asked: set when the page as it is now has been asked for.
    """

    def __init__(self, port: int) -> None:
        """
        Raises:
            UsageError: the port is taken, or not ours to take.
        """
        self.asked = threading.Event()
        self._page = b""
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status = 200 if self.path.partition("?")[0] in ("/", "/index.html") else 404
                if self.headers.get("Host") not in served.hosts:
                    status = 403  # a page from elsewhere, whose name was made to lead here
                page = served._page if status == 200 else b""
                with suppress(ConnectionError):  # the browser has closed
                    self.send_response(status)
                    self.send_header("Content-Type", "text/html; charset=utf-8")
                    self.send_header("Content-Length", str(len(page)))
                    self.send_header("Cache-Control", "no-store")
                    self.end_headers()
                    self.wfile.write(page)
                    if status == 200 and page is served._page:
                        served.asked.set()

            def log_message(self, *_: object) -> None:
                return

        try:
            self._server = ThreadingHTTPServer((LOOPBACK, port), Handler)
        except (OSError, OverflowError) as error:
            raise UsageError(f"port={port} cannot be served on: {error}; port=0 takes any that is free") from error
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://{self.hosts[0]}/"

    @property
    def hosts(self) -> tuple[str, str]:
        """What a browser may call this server."""
        port = self._server.server_address[1]
        place = "" if port == 80 else f":{port}"  # which browsers leave out
        return f"{LOOPBACK}{place}", f"localhost{place}"

    def renew(self, page: str) -> None:
        self._page = page.encode()
        self.asked.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def follow(
    make: Callable[[bool], tuple[str, str]],
    port: int,
    every_s: float,
    say: Callable[[str], None],
    *,
    last_s: float = LAST_S,
    quiet_s: float = 600.0,
    age_s: Callable[[], float | None] = lambda: 0.0,
) -> None:
    """Serves what `make` makes, anew every `every_s` seconds, until the run has ended; then the last page until it was
    asked for, or for `last_s`.

    Args:
        make: the page and the state of the run; given whether the page is to ask for the next one.
        age_s: seconds since the run wrote; one that may have been killed elsewhere and wrote nothing for `quiet_s` is
            followed no longer.

    Raises:
        UsageError: the run does not go on, or the port cannot be served on.
    """
    served = Served(port)
    try:
        page, state = make(True)
        if state not in GOING_ON:
            raise UsageError(f"follow=true: the run is {state}, and its page would not change; leave follow out")
        served.renew(page)
        say(f"{served.address} until the run ends; Ctrl-C ends it before")
        while state in GOING_ON and not (state == GOING_ON[1] and (age_s() or 0.0) > quiet_s):
            time.sleep(every_s)
            page, state = make(True)
            served.renew(page)
        page, state = make(False)
        served.renew(page)
        served.asked.wait(last_s)
        say(f"the run is {state}")
    finally:
        served.close()
