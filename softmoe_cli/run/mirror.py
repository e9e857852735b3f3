"""Weights & Biases mirrors a run. It only ever reads rows that are on disk already, from a thread of its own:
when it is slow, broken or unreachable no step waits and nothing is lost; the end of a run waits (`close`)."""

import http.client
import netrc
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from softmoe_cli.config.run import WANDB_LETTERS, WANDB_WORDS, Config
from softmoe_cli.errors import UsageError, first_line, nearest
from softmoe_cli.run.rows import AXES, CURVES, charted
from softmoe_cli.run.trackio import check_trackio
from softmoe_cli.signals import waits_for_nobody

MODES = {"online": "online", "offline": "offline", "run": "online", "dryrun": "offline", "disabled": "off"}
"""What WANDB_MODE may say: W&B's words, two of them older ones."""
SECRET = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")

AXIS = "images"
"""A W&B metric has one x axis of its own. Validation quality is sent again under by_AXIS/ for each of the other axes,
so that W&B's charts show it against all at once."""
OTHER_AXES = tuple(axis for axis in AXES if axis != AXIS)
INIT_TIMEOUT_S = 10
LAST_WAIT_S = 30


def tracking_of(tracking: str | list[str]) -> str:
    """online, offline or off for `tracking=`; auto is what WANDB_MODE says, else online when W&B has a key. Of a list
    the word that is about W&B counts; without one it is off.

    Raises:
        UsageError: WANDB_MODE is no mode.
    """
    words = tracking if isinstance(tracking, list) else [tracking]
    word = next((each for each in words if each in WANDB_WORDS), "off")
    if word != "auto":
        return word
    mode = os.environ.get("WANDB_MODE")
    if not mode:
        return "online" if _has_key() else "offline"
    if mode not in MODES:
        raise UsageError(f"WANDB_MODE={mode} is not one of {', '.join(MODES)}.{nearest(mode, MODES)}")
    return MODES[mode]


def check(config: Config) -> None:
    """Checks what W&B would refuse later, when the run is on its way, and then not record; and that Trackio is there.

    Raises:
        UsageError: W&B or Trackio would refuse it; the sentence names the key or the variable.
    """
    check_trackio(config)
    if tracking_of(config.tracking) == "off":
        return
    if config.wandb.group is None and len(config.study) > WANDB_LETTERS:
        raise UsageError(
            f"study={config.study} has {len(config.study)} characters, and W&B takes up to {WANDB_LETTERS} as a run's "
            "group; set wandb.group, or tracking=off"
        )
    for name, value in os.environ.items():
        if name.startswith("WANDB_") and name != "WANDB_MODE" and (fault := _fault(name, value)) is not None:
            shown = "" if name in SECRET else f"={value}"
            raise UsageError(f"{name}{shown}: W&B refuses it ({fault}); change or unset it, or set tracking=off")


def _fault(name: str, value: str) -> str | None:
    """Why W&B would not take a variable of the environment, which it reads whatever the run is told."""
    import wandb
    from pydantic import ValidationError

    try:
        wandb.Settings().update_from_env_vars({name: value})
    except ValidationError as error:
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    except (wandb.Error, ValueError) as error:
        return first_line(error)
    return None


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
    """Sends rows to one W&B run, whose id is made of the run's signature, study and name: a resumed run goes on in the
    same place, and the same run in another study is another one there too.

    Args:
        mode: online, offline or off.
        settings: keyword arguments of wandb.init: id, project, entity, group, job_type, tags, name, config.
        folder: where wandb/ goes.
        earlier: rows of an earlier part of this run; those that W&B lacks are sent first.
        say: prints a sentence.
        pinned: keys of the config that stand at the top of the run's page.
    """

    def __init__(
        self,
        mode: str,
        settings: dict[str, Any],
        folder: Path,
        earlier: list[dict[str, Any]],
        say: Callable[[str], None],
        pinned: Sequence[str] = (),
    ) -> None:
        self._mode, self._settings, self._folder, self._earlier, self._say = mode, settings, folder, earlier, say
        self._pinned = list(pinned)
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
        if self._mode == "off":
            return
        self._queue.put(("end", result or {}))
        if not _ends(self._thread, max(1.0, (time.monotonic() - self._started) / 60), self._mode):
            self._say(f"W&B has not taken every row; all are in {self._folder}/metrics.jsonl")

    def _work(self) -> None:
        try:
            self._send()
        except Exception as error:  # whatever W&B raises must not reach the run: say it and stop mirroring
            self._say(f"W&B stopped mirroring ({type(error).__name__}: {first_line(error)}); the run goes on")

    def _send(self) -> None:
        run = _init(self._mode, self._settings, self._folder, self._say)
        run.define_metric("*", step_metric=AXIS)
        for axis in OTHER_AXES:  # by their full names, which go before the *
            for key in CURVES:
                run.define_metric(f"by_{axis}/{key}", step_metric=axis)
        for key, each in CURVES.items():  # the last value would hide a better one on the way
            best = "max" if each.better == "higher" else "min"
            run.define_metric(f"validation/{key}", step_metric=AXIS, summary=f"{best},last")
        pin = getattr(run, "pin_config_keys", None)  # since wandb 0.30
        if pin is not None:
            pin(self._pinned)
        for row in self._earlier[run.step :]:
            run.log(_by_axes(row))
        while True:
            kind, row = self._queue.get()
            if kind == "end":
                run.summary.update({f"result/{key}": value for key, value in row.items()})
                run.finish()
                return
            run.log(_by_axes(row))


def _ends(thread: threading.Thread, patience_s: float, mode: str) -> bool:
    """Waits for W&B for so long, and up to LAST_WAIT_S while its server answers; says whether it is done."""
    start = time.monotonic()
    thread.join(patience_s)
    while thread.is_alive() and time.monotonic() < start + LAST_WAIT_S and _answers(mode):
        thread.join(1)  # slow is not broken: what is on its way arrives
    if thread.is_alive():
        waits_for_nobody.append("W&B")  # whose own goodbye would wait too
        return False
    return True


def _answers(mode: str) -> bool:
    """Whether the server speaks HTTP within a second and does not report a failure of its own; a disk does."""
    if mode == "offline":
        return True
    try:
        urllib.request.urlopen(_server(), timeout=1).close()
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, http.client.HTTPException, ValueError):
        return False
    return True


def _init(mode: str, settings: dict[str, Any], folder: Path, say: Callable[[str], None]) -> Any:
    """A W&B run in `folder`; offline where the server cannot be reached."""
    import wandb

    def init(mode: Literal["online", "offline"]) -> Any:
        return wandb.init(
            **({"reinit": "finish_previous"} | settings),
            mode=mode,
            dir=folder,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(init_timeout=INIT_TIMEOUT_S, silent=True, console="off"),
        )

    if mode == "online":
        try:
            return init("online")
        except wandb.Error as error:
            say(
                f"W&B is not reachable ({first_line(error)}); recording offline, "
                f"'wandb sync {folder}/wandb/offline-run-*' sends it later"
            )
    return init("offline")


def _by_axes(row: dict[str, Any]) -> dict[str, Any]:
    """A row by its names, with by_device_s/top1_pct and so on."""
    if row["split"] != "validation":
        return charted(row)
    return charted(row) | {f"by_{axis}/{key}": row[key] for axis in OTHER_AXES for key in CURVES}


def publish(
    mode: str,
    settings: dict[str, Any],
    folder: Path,
    rows: list[dict[str, Any]],
    axes: tuple[str, str],
    files: list[str],
    say: Callable[[str], None],
    *,
    beside: Mapping[str, list[dict[str, Any]]] | None = None,
    numbers: Mapping[str, float] | None = None,
    step: int | None = None,
) -> None:
    """Sends what a command says of finished runs as one W&B run: `rows` as a table with a scatter plot of `axes`, more
    tables `beside` it, the figures, the page, and all `files` of `folder` as an artifact; and `numbers`, of which W&B
    draws charts over `step`."""
    more = _More(beside or {}, numbers or {}, step)
    deliver(
        mode, settings, folder, lambda run: _publish(run, settings["job_type"], folder, rows, axes, files, more), say
    )  # fmt: skip


def deliver(
    mode: str, settings: dict[str, Any], folder: Path, send: Callable[[Any], None], say: Callable[[str], None]
) -> None:
    """Sends files of `folder` as a W&B run of its own: `send` is given the run, and finishes it. Says how that went."""
    failures: list[Exception] = []

    def work() -> None:
        try:
            send(_init(mode, settings, folder, say))
        except Exception as error:  # whatever W&B raises: the files are written, and the reader is told
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    if not _ends(thread, INIT_TIMEOUT_S, mode):
        say(f"W&B has not taken everything; all files are in {folder}")
    elif failures:
        say(f"W&B refused ({type(failures[0]).__name__}: {first_line(failures[0])}); all files are in {folder}")
    else:
        where = f"offline; 'wandb sync {folder}/wandb/offline-run-*' sends it" if mode == "offline" else "sent"
        say(f"W&B: run {settings['name']} of group {settings['group']}, {where}")


@dataclass(frozen=True)
class _More:
    beside: Mapping[str, list[dict[str, Any]]]
    numbers: Mapping[str, float]
    step: int | None


def _table(rows: list[dict[str, Any]]) -> Any:
    import wandb

    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[row.get(column) for column in columns] for row in rows]
    return wandb.Table(columns=columns, data=cells, allow_mixed_types=True)


def _publish(
    run: Any, kind: str, folder: Path, rows: list[dict[str, Any]], axes: tuple[str, str], files: list[str], more: _More
) -> None:
    import wandb

    tables = {"table": _table(rows)} | {name: _table(each) for name, each in more.beside.items()}
    table = tables["table"]
    logged = {**tables, "scatter": wandb.plot.scatter(table, *axes, title=" against ".join(axes[::-1]))}
    logged |= dict(more.numbers)
    for path in (folder / file for file in files):
        if path.suffix == ".png":
            logged[path.stem] = wandb.Image(str(path))
        elif path.suffix == ".html":
            logged["page"] = wandb.Html(path.read_text(), inject=False)
    run.log({f"{kind}/{name}": value for name, value in logged.items()}, step=more.step)
    artifact = wandb.Artifact(run.id, type="comparison")
    for file in files:
        artifact.add_file(str(folder / file))
    for name, rows_of in {
        "table": rows,
        **more.beside,
    }.items():  # tables of their own: one belongs to what it is logged in
        artifact.add(_table(rows_of), name)
    run.log_artifact(artifact)
    run.finish()
