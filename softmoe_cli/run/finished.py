"""Whether a run is finished, from its folder alone."""

import shlex
from pathlib import Path

from softmoe_cli.config.run import Config
from softmoe_cli.errors import UsageError
from softmoe_cli.run import rows


def finished(folder: Path) -> rows.Row | None:
    """The flat row of a finished run; None if there is none yet.

    Raises:
        UsageError: the row is damaged, or the folder can be no run's.
    """
    path = folder / "result.json"
    try:
        path.stat()
        return rows.row(path, rows.RESULT)
    except FileNotFoundError:
        return None
    except rows.Unreadable as error:
        raise UsageError(f"{path} {error}; remove it to run again") from error
    except OSError as error:
        raise UsageError(
            f"{folder} can be no run's folder: {error.strerror}; choose another output_root, study or name"
        ) from error


def not_looked_at(config: Config, result: rows.Row, folder: Path) -> str:
    """What `train.fewshot` asks of a finished run that did not look at it, and what tells it of the last weights: the
    same shots of the same images. Nothing where it has looked at all."""
    lacking = [k for k in config.train.fewshot if f"validation_{rows.FEWSHOT.format(k)}" not in result]
    if not lacking:
        return ""
    shots = f"fewshot={str(lacking).replace(' ', '')}"
    seed = f" fewshot_seed={config.data.split_seed}" if config.data.split_seed else ""
    return (
        f"train.{shots} is looked at while a run trains, and this one has ended; of its last weights: softmoe evaluate "
        f"checkpoint={shlex.quote(str(folder))} split=validation {shlex.quote(shots)}{seed}"
    )
