"""Where the arithmetic happens and in which precision."""

import os
import platform
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer

from softmoe_cli.config import UsageError
from softmoe_cli.moe.layer import CPU_MULTIPLIES


def arithmetic(name: str, precision: str, threads: int | None) -> tuple[torch.device, torch.autocast]:
    """The device and the autocast context of `device=`, `train.precision=` and `threads=`.

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


def precision_context(device: str, precision: str) -> torch.autocast:
    """The autocast context of `train.precision=` on a kind of device."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device, dtype=dtype, enabled=precision != "fp32")


def slower(device: torch.device, precision: str) -> str:
    """A warning for the header where a half precision costs time instead of saving it."""
    if device.type != "cpu" or precision == "fp32":
        return ""
    fast = CPU_MULTIPLIES[torch.float16 if precision == "fp16" else torch.bfloat16]
    return "" if fast else " (fp32 is faster: this CPU has no products of half precision)"


def prepare_attention(model: VisionTransformer, device: torch.device, precision: str) -> None:
    """Unfused attention on a CPU in half precision, where the fused backward pass is several times slower."""
    for block in model.blocks:
        block.attn.fused_attn = block.attn.fused_attn and (device.type != "cpu" or precision == "fp32")


def hardware(device: torch.device) -> str:
    """The device in words, threads included: timings of different words are not comparable."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name}, {'mps' if device.type == 'mps' else f'{torch.get_num_threads()} threads'}"


def free_memory(device: torch.device) -> int:
    """Bytes free on the device, or in the machine and in the control group that this process is held to."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
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
