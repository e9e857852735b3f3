"""Weights & Biases mirrors a run. It only ever reads rows that are on disk already, from a thread of its own:
when it is slow, broken or unreachable the run neither waits nor loses anything."""

import http.client
import netrc
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

AXES = ("images", "step", "epoch", "train_pflop", "device_s", "eval_s", "save_s", "compile_s")
INIT_TIMEOUT_S = 10
LAST_WAIT_S = 30

stuck = False
"""Whether some mirror gave up waiting; the process must then leave without W&B's own goodbye, which would wait."""


def resolve(tracking: str) -> str:
    """online, offline or off for `tracking=`; auto is online when W&B has a key, and WANDB_MODE overrules it."""
    if tracking != "auto":
        return tracking
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return {"online": "online", "offline": "offline"}.get(mode, "off")
    return "online" if _has_key() else "offline"


def _server() -> str:
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(urlparse(_server()).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Mirror:
    """Sends rows to one W&B run, whose id is the run's signature: a resumed run goes on in the same place.

    Args:
        mode: online, offline or off.
        settings: keyword arguments of wandb.init: id, project, entity, group, job_type, tags, name, config.
        folder: where wandb/ goes.
        earlier: rows of an earlier part of this run; those that W&B lacks are sent first.
        say: prints a sentence.
    """

    def __init__(
        self,
        mode: str,
        settings: dict[str, Any],
        folder: Path,
        earlier: list[dict[str, Any]],
        say: Callable[[str], None],
    ) -> None:
        self._mode, self._settings, self._folder, self._earlier, self._say = mode, settings, folder, earlier, say
        self._queue: queue.SimpleQueue[tuple[str, dict[str, Any]]] = queue.SimpleQueue()
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._work, daemon=True)
        if mode != "off":
            self._thread.start()

    def row(self, row: dict[str, Any]) -> None:
        self._queue.put(("row", row))

    def close(self, result: dict[str, Any] | None) -> None:
        """Hands over the final row, if the run is done, and waits a second per minute of the run; longer only while
        the server answers."""
        global stuck
        if self._mode == "off":
            return
        self._queue.put(("end", result or {}))
        now = time.monotonic()
        self._thread.join(max(1.0, (now - self._started) / 60))
        while self._thread.is_alive() and time.monotonic() < now + LAST_WAIT_S and self._answers():
            self._thread.join(1)  # slow is not broken: what is on its way arrives
        if self._thread.is_alive():
            stuck = True
            self._say(f"W&B has not taken every row; all are in {self._folder}/metrics.jsonl")

    def _answers(self) -> bool:
        """Whether the server speaks HTTP within a second and does not report a failure of its own; a disk does."""
        if self._mode == "offline":
            return True
        try:
            urllib.request.urlopen(_server(), timeout=1).close()
        except urllib.error.HTTPError as error:
            return error.code < 500
        except (OSError, http.client.HTTPException, ValueError):
            return False
        return True

    def _work(self) -> None:
        try:
            self._send()
        except Exception as error:  # whatever W&B raises must not reach the run: say it and stop mirroring
            self._say(f"W&B stopped mirroring ({type(error).__name__}: {str(error).splitlines()[0]}); the run goes on")

    def _send(self) -> None:
        run = self._init()
        run.define_metric("*", step_metric="images")
        for row in self._earlier[run.step :]:
            run.log(_named(row))
        while True:
            kind, row = self._queue.get()
            if kind == "end":
                run.summary.update({f"result/{key}": value for key, value in row.items()})
                run.finish()
                return
            run.log(_named(row))

    def _init(self) -> Any:
        import wandb

        def init(mode: Literal["online", "offline"]) -> Any:
            return wandb.init(
                **self._settings,
                mode=mode,
                dir=self._folder,
                resume="allow" if mode == "online" else None,
                reinit="finish_previous",
                settings=wandb.Settings(init_timeout=INIT_TIMEOUT_S, silent=True, console="off"),
            )

        if self._mode == "online":
            try:
                return init("online")
            except wandb.Error as error:
                self._say(
                    f"W&B is not reachable ({str(error).splitlines()[0]}); recording offline, "
                    f"'wandb sync' sends {self._folder}/wandb later"
                )
        return init("offline")


def _named(row: dict[str, Any]) -> dict[str, Any]:
    """A row as W&B names it: train/loss, validation/top1_pct, and the shared axes bare."""
    return {
        key if key in AXES else f"{row['split']}/{key}": value
        for key, value in row.items()
        if key != "split" and value is not None
    }
