"""vimamba info: show versions, devices and which scan backends are usable."""

from __future__ import annotations

import importlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from rich.markup import escape

from vimamba.cli import package_version, terminal
from vimamba.quiet import quiet_libraries

PACKAGES = (
    "torch", "torchvision", "triton", "timm", "lightning", "torchmetrics", "jsonargparse",
    "safetensors", "huggingface-hub", "datasets",
)  # fmt: skip


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(parser: ArgumentParser, options: Namespace) -> int:
    quiet_libraries()
    facts = collect()
    if options.json:
        print(json.dumps(facts))
        return 0
    console = terminal.console()
    console.print(f"[bold]vimamba[/] {facts['vimamba']}, Python {facts['python']}, {facts['platform']}")
    for title in ("packages", "devices"):
        console.print(f"\n[bold]{title}[/]")
        for name, value in facts[title].items():
            console.print(f"  {name:<16} {escape(value) if value else '[dim]not installed[/]'}")
    console.print("\n[bold]scan backends[/]")
    for name, reason in facts["backends"].items():
        state = f"[yellow]not usable:[/] {escape(reason)}" if reason else f"[green]usable[/]{_how(name)}"
        console.print(f"  {name:<16} {state}")
    return 0


def collect() -> dict[str, Any]:
    """All that a report of a problem should carry."""
    return {
        "vimamba": package_version(),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True) + " " + platform.machine(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": devices(),
        "backends": backends(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def devices() -> dict[str, str]:
    """Each device with what is worth knowing of it."""
    found = {
        "cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            found[f"cuda:{index}"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
    else:
        found["cuda"] = "none found"
    if torch.backends.mps.is_available():
        found["mps"] = "usable"
    return found


def _how(backend: str) -> str:
    """What a backend says of itself behind its name, such as its instruction set."""
    return str(importlib.import_module("vimamba.ops.backends").load(backend)).removeprefix(backend)


def backends() -> dict[str, str | None]:
    """Scan backends: None where usable, else why not."""
    return importlib.import_module("vimamba.ops.backends").status()
