"""Options from the command line and YAML files, and what is wrong with them in one sentence."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from typing import Any, Literal, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from vimamba.errors import UserError, nearest

Options = TypeVar("Options")


def new_parser(command: str, description: str) -> ArgumentParser:
    """A parser for a command, to which the command adds its arguments."""
    return ArgumentParser(prog=f"vimamba {command}", description=description, exit_on_error=False)


def add_options(parser: ArgumentParser, options: type) -> None:
    """Every field of a dataclass as an option."""
    parser.add_class_arguments(options, nested_key=None)


def take(options: type[Options], parsed: Namespace) -> Options:
    """The dataclass from what was parsed; its own checks may raise UserError."""
    return options(**{field.name: parsed[field.name] for field in dataclasses.fields(options)})  # type: ignore[arg-type]


def parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Parse; dashes and underscores in the names of options mean the same."""
    spelt = [_underscored(argument) for argument in arguments]
    try:
        return parser.parse_args(spelt)
    except ArgumentError as error:
        raise UserError(explain(parser, str(error))) from error


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def explain(parser: ArgumentParser, message: str) -> str:
    """One sentence from jsonargparse's several lines."""
    names = [name for action in parser._actions for name in action.option_strings if name[:2] == "--"]
    otherwise = f"; see {parser.prog} --help"
    if found := re.match(r"unrecognized arguments: ([^\s=]+)", message):
        return f"{found[1]}: there is no such option{nearest(found[1], names) or otherwise}"
    if found := re.match(r"Option '([^']+)' is not accepted", message):
        hint = nearest("--" + found[1], names).replace("--", "") or otherwise
        return f"--config: '{found[1]}' is not an option of {parser.prog}{hint}"
    if found := re.match(r'Parser key "([^"]+)"(?: element \d+)?:', message):
        key = found[1]
        if key == "config":
            problem = _flat(message.split(":", 1)[1])
            return f"--config: {problem.replace('File does not exist:', 'there is no file')}"
        kinds = [getattr(a, "_typehint", a.type) for a in parser._actions if a.dest == key]
        values = re.findall(r"Got value: (.*)", message)
        if kinds and values:
            return f"--{key}: expected {describe(kinds[0])}, got {values[-1].strip() or 'nothing'}"
    message = re.sub(r"the following arguments are required: (.*)", r"\1: required but not given", message)
    return _flat(message.replace("Problems parsing config:", "--config: is not valid YAML:"))


def describe(kind: Any) -> str:
    """A type in words."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if kind in WORDS:
        return WORDS[kind]
    if origin is Literal:
        return " or ".join(map(str, inside))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(part) for part in inside)
    if origin is tuple:
        return f"[{', '.join(describe(part).removeprefix('a ') for part in inside)}]"
    return "a mapping such as '{depth: 4}'" if origin is dict else str(kind)


WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    type(None): "null",
}


def _flat(text: str) -> str:
    return " ".join(text.split())
