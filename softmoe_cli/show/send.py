"""The page and the pictures on Weights & Biases, as a run of the study's group."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from softmoe_cli.config.run import WANDB_LETTERS
from softmoe_cli.errors import UsageError
from softmoe_cli.run.mirror import deliver, tracking_of
from softmoe_cli.show.record import Record

PREFIX = "show/"
"""Before the name of each picture, without `.png`."""


def mode_of_sending() -> str:
    """online or offline, as `tracking=auto` would be.

    Raises:
        UsageError: W&B is turned off.
    """
    mode = tracking_of("auto")
    if mode == "off":
        raise UsageError(f"wandb=true has no effect with WANDB_MODE={os.environ.get('WANDB_MODE')}; unset one of them")
    return mode


def run_on_wandb(record: Record) -> dict[str, Any]:
    """Arguments of wandb.init. The same run shown again is the same W&B run."""
    said = record.settings
    mark = record.name.rpartition("-")[2]
    if record.receipt is not None:  # a name that was typed is not the only one of its kind, nor of letters for an id
        made_from = str(record.receipt["source"].get("digest"))
        mark = hashlib.sha256(f"{made_from} {record.name}".encode(errors="surrogateescape")).hexdigest()[:10]
    return {
        "id": f"show-{mark}"[:WANDB_LETTERS],
        "project": said.get("wandb.project") or "softmoe",
        "entity": said.get("wandb.entity"),
        "group": said.get("wandb.group") or said.get("study") or "show",
        "job_type": "show",
        "name": f"show {record.name}"[-WANDB_LETTERS:],
        "config": {"run": record.name, "state": record.state.state},
    }


def send_pictures(
    record: Record, titles: Mapping[str, str], page: str, out: Path, mode: str, say: Callable[[str], None]
) -> None:
    """Sends files of `out`: the pictures, each with its title below it, by their names, and the page."""

    def send(run: Any) -> None:
        import wandb

        logged: dict[str, Any] = {
            f"{PREFIX}{Path(name).stem}": wandb.Image(str(out / name), caption=title) for name, title in titles.items()
        }
        run.log(logged | {f"{PREFIX}page": wandb.Html((out / page).read_text(encoding="utf-8"), inject=False)})
        run.finish()

    deliver(mode, run_on_wandb(record), out, send, say)
