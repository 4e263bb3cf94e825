"""What a worker runs on, asked in a worker process: the parent never imports torch."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from benchmark.config import check_device
from benchmark.errors import UsageError


def describe(device: str) -> dict[str, Any]:
    """Returns what techniques and the plan need to know of a device.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: the name is another, or there is no such device.
    """
    check_device(device)
    import torch

    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if not kind.startswith("cuda"):
        return _cpu(torch)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(kind.partition(":")[2] or 0)
    if index >= count:
        raise UsageError(f"--device {device}: this machine has {count} CUDA devices; use --device cpu.")
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return _common(torch) | {
        "device": kind,
        "device_name": properties.name,
        "capability": [properties.major, properties.minor],
        "memory_bytes": total,
        "free_bytes": free,
        "cuda": torch.version.cuda,
    }


def _cpu(torch: Any) -> dict[str, Any]:
    free, total = host_memory()
    return _common(torch) | {
        "device": "cpu",
        "device_name": cpu_name(),
        "capability": None,
        "memory_bytes": total,
        "free_bytes": free,
        "cuda": None,
    }


def _common(torch: Any) -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "packages": [
            name for name in ("flash_attn", "bitsandbytes", "torchao", "triton") if _installed(name)
        ],
    }


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def host_memory() -> tuple[int, int]:
    """Returns this computer's free and total memory in bytes, as far as a container's limit leaves it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = total
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if limit is not None:
        total, free = min(total, limit), min(free, limit - (used or 0))
    return free, total


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def cpu_name() -> str:
    """Returns the processor's name."""
    import platform

    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
