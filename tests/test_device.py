"""What the device is asked: energy by its own counters (files of the kernel, NVML where there is a GPU), cores,
and freed memory."""

import fcntl
import json
import os
import platform
import resource
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
import torch

from softmoe_cli import device
from softmoe_cli.device import KEPT, Energy, compiling_alone, cores, fast_precision, free_memory, keep_freed_memory
from softmoe_cli.moe.processor import CPU_PRODUCTS
from softmoe_cli.train.progress import Progress
from softmoe_cli.train.stop import Interrupted, Stop
from tests.processes import forked

CPU = torch.device("cpu")


@pytest.mark.parametrize(("products", "takes"), [("fast", "bf16"), ("emulated", "fp32"), ("loops", "fp32")])
def test_precision_auto_goes_by_instructions(products: str, takes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by what oneDNN says that it supports, nor by a clock; small models gain nothing on a CPU."""
    monkeypatch.setitem(CPU_PRODUCTS, torch.bfloat16, products)
    for mixture, least in ((False, 128), (True, 192)):
        for width, precision in ((None, takes), (least, takes), (least - 1, "fp32")):
            assert fast_precision(CPU, width, mixture=mixture)[0] == precision
    for native, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")
        assert fast_precision(torch.device("cuda"), 16, mixture=True) == (
            precision, "Card has instructions for it" if native else "Card has no instructions for bf16"
        )  # fmt: skip
    assert fast_precision(torch.device("mps"), None, mixture=False)[0] == "fp32"


def zone(root: Path, name: str, joules: float, span: float = 1000) -> None:
    folder = root / name
    folder.mkdir(exist_ok=True)
    (folder / "energy_uj").write_text(f"{round(1e6 * joules)}\n")
    (folder / "max_energy_range_uj").write_text(f"{round(1e6 * span) - 1}\n")


def test_packages_add_up_parts_do_not_and_counters_start_again(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", 10)
    zone(tmp_path, "intel-rapl:1", 990)
    zone(tmp_path, "intel-rapl:0:0", 1)  # the cores of package 0, whose counter includes them
    energy = Energy(CPU, tmp_path)
    zone(tmp_path, "intel-rapl:0", 14)
    zone(tmp_path, "intel-rapl:1", 5)
    zone(tmp_path, "intel-rapl:0:0", 3)
    assert energy.used() == pytest.approx(4 + 15)
    assert energy.used() == 0


def test_the_platform_is_not_added_to_its_packages(tmp_path: Path) -> None:
    """Laptops have a zone beside package-0 that counts it too, with the rest of the platform."""
    for number, (name, joules) in enumerate((("package-0", 10), ("psys", 50))):
        zone(tmp_path, f"intel-rapl:{number}", joules)
        (tmp_path / f"intel-rapl:{number}/name").write_text(f"{name}\n")
    energy = Energy(CPU, tmp_path)
    zone(tmp_path, "intel-rapl:0", 14)
    zone(tmp_path, "intel-rapl:1", 59)
    assert energy.used() == pytest.approx(4)


def test_a_machine_that_does_not_tell(tmp_path: Path) -> None:
    assert Energy(CPU, tmp_path).used() is None
    zone(tmp_path, "intel-rapl:0", 10)
    energy = Energy(CPU, tmp_path)
    (tmp_path / "intel-rapl:0/energy_uj").unlink()
    assert energy.used() is None


def test_nvml_counts_in_millijoules(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([5_000, 7_500])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1-2"))
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda name: {"GPU-1-2": "handle"}[name])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: next(counts))
    assert Energy(torch.device("cuda")).used() == pytest.approx(2.5)


def test_without_nvml_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", refuse)
    assert device._nvml_handle(torch.device("cuda")) is None


def test_a_stretch_that_no_one_measured_leaves_the_sum_unknown() -> None:
    progress = Progress()
    progress.used(1500)
    progress.used(500)
    assert progress.spent["energy_kj"] == 2
    progress.used(None)
    progress.used(500)
    assert "energy_kj" not in progress.spent


def test_processes_of_a_run_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(7)), raising=False)
    shares = []
    for processes in ("1", "2", "16"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        shares.append(cores())
    assert shares == [7, 3, 1]


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have rules of their own")


@glibc
def test_freed_memory_is_used_again(tmp_path: Path) -> None:
    assert forked(tmp_path / "out.txt", page_faults) == 0
    default, kept = json.loads((tmp_path / "out.txt").read_text())
    assert kept < default / 2


def page_faults() -> None:
    """Prints the page faults of 64 MiB five times, each block freed before the next: first as glibc does it, then with
    freed memory kept."""
    faults = []
    for _ in range(2):
        torch.ones(1 << 24)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            torch.ones(1 << 24)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        assert keep_freed_memory(CPU)
        torch.ones(1 << 24)
    print(json.dumps(faults))


@glibc
def test_freed_memory_is_kept_where_there_is_room_for_it(tmp_path: Path) -> None:
    assert forked(tmp_path / "out.txt", rooms) == 0
    assert json.loads((tmp_path / "out.txt").read_text()) == [False, False, True]


def rooms() -> None:
    """Prints whether freed memory is kept: not on a GPU, not where the gaps would not fit, and where they fit."""
    room = round(KEPT * 2**20)
    asked = ((torch.device("cuda"), 2**60), (CPU, room - 1), (CPU, room))
    print(json.dumps([keep_freed_memory(device, 2**20, free) for device, free in asked]))


@glibc
def test_what_was_freed_is_given_back_when_free_memory_is_read(tmp_path: Path) -> None:
    """A block of 256 MiB is kept until then."""
    assert forked(tmp_path / "out.txt", resident) == 0
    kept, after = json.loads((tmp_path / "out.txt").read_text())
    assert kept - after > 250 * 2**20


def resident() -> None:
    """Prints the bytes that the process holds with a freed block, before and after it asks for free memory."""
    assert keep_freed_memory(CPU)
    held = []
    torch.ones(1 << 26)
    for _ in range(2):
        held.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
        free_memory(CPU)
    print(json.dumps(held))


def go_on() -> None:
    """Nobody asks to stop."""


def test_who_waits_for_a_compilation_hears_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    stop = Stop()
    with compiling_alone("same", go_on), stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted, match="SIGTERM"), compiling_alone("same", stop.check):
            pytest.fail("it did not wait")


def test_what_is_compiled_by_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same waits, something else does not; each lock of a file opened anew, as in another process."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    order: list[str] = []

    def second(what: str) -> None:
        with compiling_alone(what, go_on):
            order.append(what)

    with compiling_alone("same", go_on):
        waits, goes = (threading.Thread(target=second, args=(what,)) for what in ("same", "other"))
        waits.start()
        goes.start()
        goes.join()
        waits.join(timeout=0.1)
        order.append("first")
    waits.join()
    assert order == ["other", "first", "same"]
    assert len(list(tmp_path.iterdir())) == 2


def test_where_nothing_can_be_locked_all_compile_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    done = []
    with compiling_alone("same", go_on):
        done.append("locked")
    (lock,) = tmp_path.iterdir()
    lock.unlink()
    lock.mkdir()
    with compiling_alone("same", go_on), compiling_alone("same", go_on):
        done.append("another's")

    def refused(*_: object) -> None:
        raise OSError("no locks")

    monkeypatch.setattr(fcntl, "flock", refused)
    with compiling_alone("other", go_on):
        done.append("no locks")
    with pytest.raises(OSError, match="what is compiled"), compiling_alone("other", go_on):
        raise OSError("what is compiled")
    assert done == ["locked", "another's", "no locks"]
