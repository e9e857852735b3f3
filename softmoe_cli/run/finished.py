"""Whether a run is finished, from its folder alone."""

from pathlib import Path

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
