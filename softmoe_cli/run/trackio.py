"""Trackio mirrors a run: its rows in Trackio's own database on this machine, by the names that they have on W&B."""

import contextlib
import importlib.util
import io
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from softmoe_cli.config.run import Config
from softmoe_cli.errors import UsageError, first_line
from softmoe_cli.run.rows import charted, number

ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
"""Variables with which Trackio sends rows away, whatever it is told."""

GROUP = "_Group"
"""The key of a run's config by which Trackio knows its group."""


def check_trackio(config: Config) -> None:
    """Checks, where a run is to be mirrored to Trackio, that it can be, and to this machine.

    Raises:
        UsageError: Trackio is not installed, or the environment sends its rows away.
    """
    if "trackio" not in config.tracking:  # a word, or a list of words
        return
    if importlib.util.find_spec("trackio") is None:
        raise UsageError("tracking=trackio needs Trackio: pip install 'softmoe-cli[trackio]'")
    for name in ELSEWHERE:
        if os.environ.get(name):
            raise UsageError(
                f"{name}={os.environ[name]} sends Trackio's rows away, and tracking=trackio keeps them here; "
                "unset it, and send them afterwards with trackio sync"
            )


class Trackio:
    """Hands rows to a run in Trackio's database, which a thread of Trackio's writes. A resumed run is written anew,
    from the rows on the disk, so that no step is there twice.

    Args:
        settings: what W&B is told of the run; project, group and config are the same.
        name: the run's folder, by which it is known again in its group: another study may have the same run.
        earlier: rows of an earlier part of this run.
        say: prints a sentence.
    """

    def __init__(
        self, settings: dict[str, Any], name: str, earlier: Iterable[dict[str, Any]], say: Callable[[str], None]
    ) -> None:
        self._say, self._step = say, -1
        self._run: Any = None
        with self._stops_nothing():
            import trackio

            project = settings["project"]
            with contextlib.suppress(ValueError):  # no project of that name yet
                for run in trackio.Api().runs(project):
                    if run.name == name and (run.config or {}).get(GROUP, settings["group"]) == settings["group"]:
                        run.delete()
            self._run = trackio.init(
                project,
                name,
                settings["group"],
                config=settings["config"],
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
            for row in earlier:
                self._log(row)

    def row(self, row: dict[str, Any]) -> None:
        """Hands a row over."""
        with self._stops_nothing():
            self._log(row)

    def close(self, result: dict[str, Any] | None) -> None:
        """Hands over the final row, if the run is done, and waits until all is written, for half a minute at most."""
        with self._stops_nothing():
            if self._run is not None and result is not None:
                self._run.log(
                    {f"result/{key}": value for key, value in result.items() if number(value)}, max(0, self._step)
                )
            if self._run is not None:
                import trackio

                trackio.finish()  # which forgets the run, so that nothing is printed at the program's end

    def _log(self, row: dict[str, Any]) -> None:
        if self._run is not None:
            self._step = row["step"]
            self._run.log({key: value for key, value in charted(row).items() if key != "step"}, self._step)

    @contextlib.contextmanager
    def _stops_nothing(self) -> Iterator[None]:
        """What Trackio prints is not seen, and what it raises is said and ends the mirror, not the run."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield
        except Exception as error:  # whatever Trackio raises must not reach the run
            self._run = None
            self._say(f"Trackio stopped mirroring ({type(error).__name__}: {first_line(error)}); the run goes on")
