"""The command line. A command is a module here with `arguments(parser)` and `run(options) -> exit status`.

To add one, write the module and name it in COMMANDS; a module is imported only when its command is called.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from vimamba.errors import UserError, nearest

COMMANDS = {
    "train": "teach a model the classes of your images",
    "eval": "measure a trained model on held-out images",
    "predict": "name what is in images",
    "bench": "measure time and memory of models side by side",
    "models": "list the models, with their size and cost",
    "ablate": "compare the bidirectional designs under one budget",
    "info": "show versions, devices and which scan backends are usable",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0 done, 1 done in part, 2 refused, 128 + n stopped by signal n."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except UserError as error:
        message = " ".join(str(error).split())
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "vimamba":
            raise
        message = f"the command needs the package {error.name}; run pip install 'vimamba[train]'"
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `vimamba predict ... | head`
        sys.stderr.close()
        return 141
    print(f"error: {message}", file=sys.stderr)
    return 2


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"vimamba {package_version()}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
        raise UserError(f"there is no command '{name}'{hint}")
    command = importlib.import_module(f"vimamba.cli.{name}")
    parsing = importlib.import_module("vimamba.cli.parsing")
    parser = parsing.new_parser(name, COMMANDS[name])
    command.arguments(parser)
    if hasattr(command, "before_parsing"):
        rest = command.before_parsing(rest)
    return command.run(parser, parsing.parse(parser, rest))


def package_version() -> str:
    """The installed version, or "unknown" where the source tree is used as it is."""
    try:
        return version("vimamba")
    except PackageNotFoundError:
        return "unknown"


def _overview() -> str:
    lines = [f"  {name:<9} {line}" for name, line in COMMANDS.items()]
    return (
        "usage: vimamba COMMAND [OPTIONS]\n\nVision Mamba: learn, measure and use image models.\n\n"
        + "\n".join(lines)
        + "\n\nvimamba COMMAND --help shows a command's options. A first try:\n"
        "  vimamba train --data mnist --model vim_nano --epochs 12 --output runs/demo"
    )
