"""`devices=N`: starts N processes of this machine that train together, through torch's elastic launcher.

When one process fails, all end, and the launcher repeats the message of the first one that failed; with `restarts=` all
start again from the last checkpoint. Processes that torchrun has started need none of this.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from softmoe_cli.config.run import Config
from softmoe_cli.data import contents
from softmoe_cli.errors import RunError, UsageError
from softmoe_cli.failures import defect, ours
from softmoe_cli.files import write_atomically
from softmoe_cli.launch.job import follow_launcher, start_server
from softmoe_cli.signals import ASKING, Asked, end_children, heard, leave_now, leave_soon

ENDED_IN = "done"
"""The file in which the first process says where the run is."""
GRACE_S = 120
"""How many seconds processes have to save and leave, when asked to, before they are killed."""
TAKEN_S = 3
"""How long a process that has saved waits for the launcher to read its exit status."""


@dataclass(frozen=True)
class Note:
    """What a process writes down when it cannot finish."""

    rank: int
    time: float
    code: int
    text: str
    lost: bool
    """True where this process only noticed that another one had died."""


class Loopback(RendezvousHandler):
    """Where the launcher and the processes of one machine meet: a store that no other machine reaches. torch's own
    choices listen on every interface of the machine, and unpickle part of what they read there."""

    BACKEND, ADDRESS = "softmoe_loopback", "127.0.0.1"

    def __init__(self, parameters: RendezvousParameters) -> None:
        with socket.socket() as listening:
            listening.bind((self.ADDRESS, 0))
            listening.listen()
            self._port = listening.getsockname()[1]
            self._store = TCPStore(
                self.ADDRESS, self._port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
            )
        self._run, self._round = parameters.run_id, 0

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return self.BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        self._round += 1  # keys of an earlier round do not count
        store = PrefixStore(f"{self._run}.{self._round}", self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(self.ADDRESS, self._port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nothing to do: no other machine takes part."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run

    def shutdown(self) -> bool:
        return True


def launch(config: Config, command: str) -> Path:
    """Trains in `config.devices` processes until all are done; returns the run's folder.

    Raises:
        UsageError, RunError: what the first process that failed has said, or how it was ended.
        KeyboardInterrupt: a signal asked to stop; the state is saved.
    """
    from softmoe_cli.parallel import ATTEMPT, TOLD

    for engine in logging.root.manager.loggerDict:
        if engine.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(engine).setLevel(logging.CRITICAL)  # the launcher prints what matters
    # Slurm may warn every process of a job that its time is nearly over; the process that handles it sends SIGTERM.
    start_server(["softmoe_cli.launch.preloaded"])
    asked = Asked()

    def hear(number: int) -> None:
        if asked.again(number):
            leave_soon(lambda: "\nleft at once; the same command goes on from the last checkpoint\n")

    # This process may itself have the variables of torchrun, from a job's script or an image.
    environment = {name: value for name, value in os.environ.items() if name not in (*TOLD, ATTEMPT)}
    environment[contents.KNOWN] = (
        contents.known()
    )  # this process has read the images, to know whether the run is finished
    inside = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if inside is not None:
        environment.setdefault("GLOO_SOCKET_IFNAME", inside)  # else gloo looks up the machine's name
    rendezvous_handler_registry.register(Loopback.BACKEND, Loopback)
    with heard(ASKING, hear), tempfile.TemporaryDirectory(prefix="softmoe-") as folder:
        elastic = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=config.devices,
            run_id=uuid.uuid4().hex,
            rdzv_backend=Loopback.BACKEND,
            local_addr=Loopback.ADDRESS,
            max_restarts=config.restarts,
            start_method="forkserver",
            signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
            shutdown_timeout=GRACE_S,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            codes = elastic_launch(elastic, _process)(config, command, os.getcwd(), environment, folder)
        except SignalException as error:
            raise KeyboardInterrupt(error.sigval.name) from error
        except ChildFailedError as error:
            code, text = cause(Path(folder), config.devices, {r: f.exitcode for r, f in error.failures.items()})
            if code == 130:
                raise KeyboardInterrupt(notes(Path(folder))[0].text) from error
            raise UsageError(text) if code == 2 else RunError(f"{text}; type the same command to go on") from error
        finally:
            end_children()  # after a second Ctrl-C we end them
        if any(codes.values()):
            raise KeyboardInterrupt(notes(Path(folder))[0].text)
        return Path((Path(folder) / ENDED_IN).read_text())


def notes(folder: Path) -> list[Note]:
    """The notes of the last attempt, the earliest first."""
    found = [Note(**json.loads(path.read_text())) for path in folder.glob("note-*.json")]
    return sorted(found, key=lambda note: note.time)


def cause(folder: Path, devices: int, exits: dict[int, int]) -> tuple[int, str]:
    """Exit status and the sentence that says why `devices` processes ended: the first error that is not about another
    process; else the process that left no note, because something killed it; where all have lost contact with others,
    the first one's words. `exits` are the known statuses."""
    found = notes(folder)
    for note in found:
        if not note.lost:
            return note.code, f"process {note.rank} of {devices}: {note.text}"
    silent = sorted({*range(devices)} - {note.rank for note in found})
    killed = [rank for rank in silent or sorted(exits) if exits.get(rank, 0) < 0] or silent
    if not killed:
        return 1, f"process {found[0].rank} of {devices}: {found[0].text}"
    by = f" by {signal.Signals(-exits[killed[0]]).name}" if exits.get(killed[0], 0) < 0 else ""
    which = " or ".join(map(str, killed))
    return 1, f"process {which} of {devices} was killed{by}, which is what the system does when memory runs out"


def _process(config: Config, command: str, directory: str, environment: dict[str, str], folder: str) -> int:
    """One of the processes: 0 when the run is done, 130 when all have saved and leave."""
    follow_launcher()
    os.chdir(directory)
    os.environ.update(environment)
    from softmoe_cli.model.pretrained import read_checkpoint
    from softmoe_cli.parallel import ATTEMPT, Lost
    from softmoe_cli.terminal import Screen
    from softmoe_cli.train.loop import train
    from softmoe_cli.train.setup import begin

    rank, attempt, screen = int(os.environ["RANK"]), int(os.environ[ATTEMPT]), Screen()
    if attempt and rank == 0:
        screen.say(f"{cause(Path(folder), config.devices, {})[1]}; restart {attempt} of {config.restarts}")
        for path in Path(folder).glob(f"note-{attempt - 1}-*.json"):
            path.unlink()

    def leave(code: int, text: str, lost: bool = False) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends the others when one has ended
        note = Note(rank, time.time(), code, text, lost)
        write_atomically(Path(folder) / f"note-{attempt}-{rank}.json", json.dumps(asdict(note)))
        sys.stdout.flush()

    try:
        source = read_checkpoint(config.checkpoint, config.base) if config.checkpoint else None
        with begin(config, command, source, screen) as begun:
            train(begun)
            if rank == 0:
                write_atomically(Path(folder) / ENDED_IN, str(begun.run.folder))
    except KeyboardInterrupt as error:
        leave(130, str(error))
        with contextlib.suppress(RuntimeError):
            dist.barrier()  # the first one may still be saving
        # The launcher reads our exit status at once, unless it was asked to stop itself, or is gone.
        ending = threading.Timer(TAKEN_S, leave_now, (130,))
        ending.daemon = True
        ending.start()
        return 130
    except Exception as error:
        known = ours(error)
        text = defect(error) if known is None else str(known)
        leave(2 if isinstance(known, UsageError) else 1, text, isinstance(known, Lost))
        leave_now(1)
    return 0
