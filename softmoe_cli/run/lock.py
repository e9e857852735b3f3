"""One process at a time writes a run."""

import fcntl
import os
import platform
import time
from typing import TextIO


def locked(file: TextIO) -> bool:
    """Locks a file; returns whether that succeeded. It tries for half a second, because softmoe status holds locks for
    a moment, and for 15 seconds if the process that the lock names is gone: its decoding workers share the lock and end
    after it."""
    for tries in range(300):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if tries >= 10 and not _orphaned(file):
                return False
            time.sleep(0.05)
        else:
            return True
    return False


def _orphaned(file: TextIO) -> bool:
    """Whether the process of this machine that a lock names is gone."""
    file.seek(0)
    node, _, pid = file.read().rpartition(" ")
    if node != platform.node() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
