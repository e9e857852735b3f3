"""Where the arithmetic happens and in which precision."""

import ctypes
import fcntl
import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import pynvml
import torch

from softmoe_cli.errors import UsageError
from softmoe_cli.moe.processor import CPU_PRODUCTS
from softmoe_cli.text import several

T = TypeVar("T", bound=Callable[..., Any])


def arithmetic(name: str, precision: str, threads: int | None) -> tuple[torch.device, torch.autocast]:
    """The device and the autocast context of `device=`, `train.precision=` and `threads=`; this process gets so many
    threads.

    Raises:
        UsageError: a device that this machine lacks.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(choice for choice, here in present.items() if here)
    if not present[name]:
        raise UsageError(f"device={name} is not available; here: {', '.join(c for c, here in present.items() if here)}")
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.device(name), precision_context(name, precision)


KEPT = 1.75
"""A process that keeps freed memory holds at most so many times what is alive at once. glibc does not always find a
place for an aligned block where one of its size was, and leaves gaps (2.36: 1.3 to 1.56 in training at 256 to 3,136
tokens)."""


def keep_freed_memory(device: torch.device, peak: int = 0, free: int = 0) -> bool:
    """Makes glibc keep the memory that the main thread frees and use it again, on a CPU where KEPT times `peak` bytes
    are free. Returns whether memory is kept.

    By itself glibc gives blocks of 32 MiB and more back to the system, which hands them out again zeroed, page by page
    (what that costs: experiments/layer_speed). Where there is too little room, every freed block of 1 MiB and more is
    given back at once, so that the process holds no more than what is alive."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or device.type != "cpu":
        return False
    if KEPT * peak > free:
        mallopt(-3, 2**20)  # M_MMAP_THRESHOLD, which would grow by itself
        return False
    mallopt(-4, 0)  # M_MMAP_MAX: no blocks of their own
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing given back
    return True


def give_back_freed_memory() -> None:
    """Gives what this process has freed and kept back to the system, once."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def cores() -> int:
    """CPU cores that this process may use; its share of them where torchrun has started several on this machine."""
    all_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, all_cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def precision_context(device: str, precision: str, cached: bool = True) -> torch.autocast:
    """The autocast context of `train.precision=` on a kind of device. `cached`: a weight is cast once, and its copy
    kept until the context ends."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device, dtype=dtype, enabled=precision != "fp32", cache_enabled=cached)


NARROW, NARROW_MIXTURE = 128, 192
"""On a CPU with instructions for bf16, models narrower than this, dense ones and those with experts, were updated no
faster in bf16 than in float32, the smallest a third slower (experiments/loop_overhead): autocast's casts cost more than
the products spare."""


def _narrow(width: int | None, mixture: bool) -> bool:
    return width is not None and width < (NARROW_MIXTURE if mixture else NARROW)


def fast_precision(device: torch.device, width: int | None, *, mixture: bool) -> tuple[str, str]:
    """What `train.precision=auto` is on a device for a model of this width (None: timm's choice), a dense one or a
    mixture, and why: decided by its instructions, never by a clock, so that the same command is the same run whatever
    else the machine does meanwhile."""
    if device.type == "cuda":
        fast, name = torch.cuda.is_bf16_supported(including_emulation=False), torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        fast, name = CPU_PRODUCTS[torch.bfloat16] == "fast", "this CPU"
        if fast and _narrow(width, mixture):
            return "fp32", f"a {'mixture' if mixture else 'model'} {width} wide gains nothing from bf16 on a CPU"
    else:
        return "fp32", f"nobody has measured bf16 with device={device.type}"
    return ("bf16", f"{name} has instructions for it") if fast else ("fp32", f"{name} has no instructions for bf16")


def compiled(call: T, **options: Any) -> T:
    """torch.compile with the backward pass outside of autocast, as it is without compiling. By default torch would run
    it under the forward pass's autocast, and compute the routers' gradients in half precision. What is compiled is kept
    for other processes (launch/README.md), graphs with gradients of our own among them, such as the soft router's. The
    settings are torch's own: they hold for everything that this process compiles."""
    from torch._functorch import config

    config.backward_pass_autocast = "off"
    config.autograd_cache_allow_custom_autograd_functions = True
    return cast(T, torch.compile(call, **options))


@contextmanager
def compiling_alone(what: object, check: Callable[[], None]) -> Iterator[None]:
    """Inside, no other process of this machine compiles the same, which is known by its `repr`: who comes second finds
    it compiled. torch itself would let jobs of a sweep that start together compile it side by side. Who waits calls
    `check` again and again, which may raise."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    mark = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    with ExitStack() as held:
        with suppress(OSError):  # another user's file, a disk that knows no locks: then side by side
            file = held.enter_context(Path(cache_dir(), f"softmoe_{mark}.lock").open("w"))
            while not _locked(file):
                check()
                time.sleep(0.05)
            held.callback(fcntl.flock, file, fcntl.LOCK_UN)  # a process that torch has started may have it open still
        yield


def _locked(file: IO[str]) -> bool:
    """Whether the file is now ours; False where it is another's.

    Raises:
        OSError: nothing can be locked there.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def slower(device: torch.device, precision: str, width: int | None, *, mixture: bool) -> str:
    """A warning for the header where a half precision costs time instead of saving it. `width`: the model's, which may
    be a `mixture`."""
    if device.type != "cpu" or precision == "fp32":
        return ""
    products = CPU_PRODUCTS[torch.float16 if precision == "fp16" else torch.bfloat16]
    if products == "fast":
        kind = "mixture" if mixture else "model"
        return f" (fp32 is no slower for a {kind} {width} wide)" if _narrow(width, mixture) else ""
    if products == "slow":
        return f" (fp32 is no slower: this CPU's instructions for {precision} gain nothing)"
    return f" (fp32 is faster: this CPU has no instructions for {precision})"


def wait(device: torch.device) -> None:
    """Returns once the device has done what it was given, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def hardware(device: torch.device) -> str:
    """The device in words, threads included: timings of different words are not comparable."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name}, {'mps' if device.type == 'mps' else several(torch.get_num_threads(), 'thread')}"


class Energy:
    """Reads the energy that a device uses: NVIDIA's GPUs through NVML, CPUs through Linux's RAPL zones, which count for
    the whole device, other programs included. Many machines do not let users read it."""

    def __init__(self, device: torch.device, zones: Path = Path("/sys/class/powercap")) -> None:
        self._gpu = _nvml_handle(device) if device.type == "cuda" else None
        packages = sorted(zones.glob("intel-rapl:[0-9]*")) if device.type == "cpu" else []  # AMD's too
        self._packages = [
            zone for zone in packages if zone.name.count(":") == 1 and not _named(zone).startswith("psys")
        ]
        self._before = self._counters()

    def used(self) -> float | None:
        """Joules since the last call, or since this was made; None where the device does not tell."""
        now, before = self._counters(), self._before
        self._before = now
        if now is None or before is None:
            return None
        return sum((count - past) % span for (count, span), (past, _) in zip(now, before, strict=True)) / 1e6

    def _counters(self) -> list[tuple[int, int]] | None:
        """Microjoules of each counter, and where it starts again at zero."""
        if self._gpu is not None:
            try:
                return [(1000 * pynvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu), 1000 * 2**64)]
            except pynvml.NVMLError:  # a GPU from before Volta, or a part of one
                return None
        try:
            counters = [
                (int((zone / "energy_uj").read_text()), int((zone / "max_energy_range_uj").read_text()) + 1)
                for zone in self._packages
            ]
        except OSError:  # usually only root may read it
            return None
        return counters or None


def _named(zone: Path) -> str:
    """What a RAPL zone is of; `psys` is the whole platform, packages included."""
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return ""


def _nvml_handle(device: torch.device) -> Any:
    """NVML's handle of a CUDA device, which may have another number in NVML; None where there is no NVML."""
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError:
        return None


def free_memory(device: torch.device, *, trim: bool = True) -> int:
    """Bytes free on the device, or in the machine and in the control group that this process is held to. What this
    process has freed and kept is given back first, because it is free; or, without `trim`, counted as taken."""
    if device.type == "cuda":
        if trim:
            torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    if trim:
        give_back_freed_memory()
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return min([int(lines["MemAvailable"].split()[0]) * 1024, *_control_group_free()])


def _control_group_free(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes that each control group above this process leaves: its limit less what it holds, file cache not counted."""
    found = []
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if controllers == "":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "memory"
        else:
            continue
        here = base / path.lstrip("/")
        for folder in (here, *here.parents):
            limit, used, stat = folder / names[0], folder / names[1], folder / "memory.stat"
            if limit.exists() and used.exists() and limit.read_text().strip() != "max":
                cache = dict(entry.split() for entry in stat.read_text().splitlines()) if stat.exists() else {}
                held = int(used.read_text()) - int(cache.get(names[2], 0))
                found.append(max(0, int(limit.read_text()) - held))
            if folder == base:
                break
    return found
