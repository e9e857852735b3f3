"""Where the arithmetic happens and in which precision."""

import os
import platform
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer

from softmoe_cli.config import UsageError


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
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.device(name), torch.autocast(name, dtype=dtype, enabled=precision != "fp32")


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
    """Bytes free on the device, or in the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
