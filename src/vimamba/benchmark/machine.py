"""The machine and the versions that a measurement holds for."""

from __future__ import annotations

import platform
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
    facts: dict[str, str | int] = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "vimamba": vimamba.__version__,
        "backend": str(backends.resolve("", torch.device(device), torch.float32)),
    }
    if kind == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def heading(facts: dict[str, str | int]) -> str:
    """Two lines for people."""
    where = f"{facts['gpu']}, " if "gpu" in facts else ""
    return (
        f"{where}{facts['processor']}, {facts['threads']} thread{'s' * (facts['threads'] != 1)}, "
        f"{facts['instructions']}, {facts['system']}\n"
        f"vimamba {facts['vimamba']} (backend {facts['backend']}), torch {facts['torch']}, timm {facts['timm']}, "
        f"Python {facts['python']}"
    )
