"""`softmoe` in real processes that start at once: forked from one that has imported torch and timm already."""

import multiprocessing
import os
import sys
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["softmoe_cli.train", "softmoe_cli.cli", "hydra"])


class Started:
    """A running command: a process of its own, with its own signals, folder and output. What torch makes without being
    told a type is of `dtype`."""

    def __init__(
        self, folder: Path, arguments: list[str], environment: dict[str, str], out: str = "stdout.txt", dtype: str = ""
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out = folder / out
        self._out.write_text("")
        words = (folder, arguments, os.environ | environment, self._out, dtype)
        self._process = _SERVER.Process(target=_main, args=words)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def ended(self) -> bool:
        return not self._process.is_alive()

    def send(self, signal: int) -> None:
        os.kill(self.pid, signal)

    def wait(self, timeout: float = 300) -> tuple[int | None, str]:
        """Exit status (minus the signal's number where one ended it) and output."""
        self._process.join(timeout)
        return self._process.exitcode, self._out.read_text()


def _main(folder: Path, arguments: list[str], environment: dict[str, str], out: Path, dtype: str) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    with out.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["softmoe", *arguments]
    if dtype:
        import torch

        torch.set_default_dtype(getattr(torch, dtype))
    from softmoe_cli.cli import main

    main()
