"""The `vimamba` command as far as it needs nothing heavy: the overview and the version, at once.

A package of its own, because importing `vimamba` registers its models with timm, which takes seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

COMMANDS = {
    "train": "teach a model the classes of your images",
    "eval": "measure a trained model on held-out images",
    "predict": "name what is in images",
    "export": "write a trained model for use without Python",
    "serve": "answer over HTTP what is in images, with a page to try it on",
    "explain": "show what in images the answers rest on",
    "bench": "measure time and memory of models side by side",
    "models": "list the models, with their size and cost",
    "ablate": "compare the bidirectional designs under one budget",
    "info": "show versions, devices and which scan backends are usable",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0 done, 1 done in part, 2 refused, 128 + n stopped by signal n."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if (text := answer(arguments)) is not None:
        print(text)
        return 0
    try:
        from vimamba.cli import main as run
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return run(arguments)


def answer(arguments: Sequence[str]) -> str | None:
    """What can be said without running a command, or None."""
    if list(arguments) in ([], ["-h"], ["--help"], ["help"]):
        return overview()
    return f"vimamba {package_version()}" if list(arguments) in (["-V"], ["--version"]) else None


def package_version() -> str:
    """The installed version, or "unknown" where the source tree is used as it is."""
    try:
        return version("vimamba")
    except PackageNotFoundError:
        return "unknown"


def overview() -> str:
    """The commands, and a first one to try."""
    lines = [f"  {name:<9} {line}" for name, line in COMMANDS.items()]
    return (
        "usage: vimamba COMMAND [OPTIONS]\n\nVision Mamba: learn, measure and use image models.\n\n"
        + "\n".join(lines)
        + "\n\nvimamba help COMMAND shows a command's options. A first try:\n"
        "  vimamba train --data mnist --model vim_nano --epochs 12 --output runs/demo"
    )
