"""The command line. A command is a module here with `arguments(parser)` and `run(options) -> exit status`.

To add one, write the module and name it in `vimamba_command.COMMANDS` and in EXAMPLES; a module is imported only when
its command is called.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from vimamba.cli.examples import EXAMPLES
from vimamba.cli.spelling import dashed
from vimamba.errors import UserError, nearest
from vimamba_command import COMMANDS, answer, package_version

__all__ = ["COMMANDS", "main", "package_version"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0 done, 1 done in part, 2 refused, 128 + n stopped by signal n."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except UserError as error:
        message = dashed(" ".join(str(error).split()))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "vimamba":
            raise
        extra = "train,serve" if arguments[0] == "serve" else "train"
        message = f"the command needs the package {error.name}; run pip install 'vimamba[{extra}]'"
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `vimamba predict ... | head`
        sys.stderr.close()
        return 141
    print(f"error: {message}", file=sys.stderr)
    return 2


def _dispatch(arguments: list[str]) -> int:
    if (text := answer(arguments)) is not None:
        print(text)
        return 0
    if arguments[0] == "help":
        arguments = [arguments[1], "--help"]
    name, *rest = arguments
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
        raise UserError(f"there is no command '{name}'{hint}")
    command = importlib.import_module(f"vimamba.cli.{name}")
    parsing = importlib.import_module("vimamba.cli.parsing")
    parser = parsing.new_parser(name, COMMANDS[name], EXAMPLES[name])
    command.arguments(parser)
    if hasattr(command, "before_parsing"):
        rest = command.before_parsing(rest)
    return command.run(parser, parsing.parse(parser, rest))
