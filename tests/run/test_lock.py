"""A folder's lock, where the process that held it is gone and where it is not."""

import fcntl
import os
import platform
import subprocess
import threading
from pathlib import Path

from softmoe_cli.run.lock import locked


def test_a_lock_is_waited_for_where_its_process_is_gone(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    for pid, waits in ((gone.pid, True), (os.getpid(), False)):
        path = tmp_path / str(pid)
        with path.open("a+") as theirs, path.open("a+") as ours:
            fcntl.flock(theirs, fcntl.LOCK_EX)
            theirs.write(f"{platform.node()} {pid}")
            theirs.flush()
            leaves = threading.Timer(0.8, fcntl.flock, (theirs, fcntl.LOCK_UN))
            if waits:
                leaves.start()
            assert locked(ours) == waits
