"""Options from the command line and YAML files, and what is wrong with them in one sentence."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from vimamba.errors import UserError, nearest, one_line, require, shown

Options = TypeVar("Options")
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
MAX_CONFIG = 2**20  # bytes
MAX_NESTING = 20


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
    for path in config_files(spelt):
        read_config(path)
    try:
        return parser.parse_args(spelt)
    except ArgumentError as error:
        raise UserError(explain(parser, str(error))) from error


def config_files(arguments: list[str]) -> Iterator[Path]:
    """The files that `--config` names."""
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        abbreviated = len(name) > 2 and "--config".startswith(name)  # jsonargparse takes these too
        if abbreviated and (equals or position + 1 < len(arguments)):
            yield Path(value if equals else arguments[position + 1])


def read_config(path: Path) -> dict[str, Any]:
    """The options in a YAML file, which may be a stranger's: plain values by name, without aliases.

    Raises:
        UserError: there is no such file, or it is no such YAML.
    """
    require(path.exists(), f"--config: there is no file {path}")
    require(path.is_file(), f"--config {path}: is no regular file")
    require(path.stat().st_size > 0, f"--config {path}: is empty (0 bytes)")  # as files of /proc that wait for ever
    require(path.stat().st_size <= MAX_CONFIG, f"--config {path}: is larger than {MAX_CONFIG // 2**20} MB")
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        text, depth = path.read_text(encoding="utf-8"), 0
        for event in yaml.parse(text, Loader=loader):
            # A few lines of nested aliases stand for more values than there is memory.
            alias = isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None)
            require(not alias, f"--config {path}: has an anchor or alias (& or *), which is not read; write it out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            require(depth <= MAX_NESTING, f"--config {path}: is nested deeper than {MAX_NESTING} levels")
        values = yaml.load(text, Loader=loader)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: is not UTF-8 (byte {error.start}); save it as that") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: is not valid YAML ({one_line(error)})") from error
    values = {} if values is None else values
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise UserError(f"--config {path}: holds {shown(values)}, not options by name")
    return values


def fetches(option: str, value: Any) -> bool:
    """Whether an option's value names something on the hub or in a folder of models, which a file may not."""
    text = str(value)
    return (option == "model" and ":" in text) or (option == "data" and text.startswith(("hfds/", "hfids/")))


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
            got = values[-1].strip()
            got = got if len(got) <= 80 and got.isprintable() else shown(got)
            return f"--{key}: expected {describe(kinds[0])}, got {got or 'nothing'}"
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
