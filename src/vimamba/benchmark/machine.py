"""The machine and the versions that a measurement holds for."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import timm
import torch

import vimamba
from vimamba.ops import backends


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe(device: str) -> dict[str, str | int]:
    """Machine, versions and the backend in use, as the table's heading and the JSON file give them."""
    kind = torch.device(device).type
    told: dict[str, str | int] = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "vimamba": _version(),
        "backend": str(backends.resolve("", torch.device(device), torch.float32)),
    }
    if kind == "cuda":
        told["gpu"] = torch.cuda.get_device_name(device)
    return told


def _version() -> str:
    try:
        return version("vimamba")
    except PackageNotFoundError:
        return vimamba.__version__


def heading(told: dict[str, str | int]) -> str:
    """Two lines for people."""
    where = f"{told['gpu']}, " if "gpu" in told else ""
    return (
        f"{where}{told['processor']}, {told['threads']} thread{'s' * (told['threads'] != 1)}, {told['instructions']}, "
        f"{told['system']}\nvimamba {told['vimamba']} (backend {told['backend']}), torch {told['torch']}, "
        f"timm {told['timm']}, Python {told['python']}"
    )
