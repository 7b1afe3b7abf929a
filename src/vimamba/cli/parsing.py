"""Options from the command line and YAML files, and what is wrong with them in one sentence."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from vimamba.errors import UserError, nearest, one_line, require, shown
from vimamba.kinds import describe, fits, text_fits
from vimamba.tasks.config import read_config

Options = TypeVar("Options")


class Help(DefaultHelpFormatter):
    """jsonargparse's help with types in words and examples as they are written."""

    def _get_type_str(self, action: Any) -> str | None:
        kind = kind_of(action)
        return super()._get_type_str(action) if kind is None else describe(kind)

    def _get_help_string(self, action: Any) -> str:
        if kind_of(action) is None:
            return action.help or ""
        said = "%(type)s" if action.default is None else "%(type)s, by default %(default)s"
        return f"{action.help or ''} ({'required: ' if action.required else ''}{said})"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


class Parser(ArgumentParser):
    """jsonargparse's, whose `--print_config` prints what `--config` takes: no positional arguments, no `typed_only`."""

    typed_only: Sequence[str] = ()

    def dump(self, namespace: Namespace, *args: Any, **kwargs: Any) -> str:
        kept = namespace.clone()
        for action in self._actions:
            if not action.option_strings or action.dest in self.typed_only:
                kept.pop(action.dest, None)
        return super().dump(kept, *args, **kwargs)


def new_parser(command: str, description: str, examples: Sequence[str] = ()) -> Parser:
    """A parser for a command, to which the command adds its arguments."""
    return Parser(
        prog=f"vimamba {command}",
        description=description,
        epilog="examples:\n" + "\n".join(f"  {line}" for line in examples) if examples else None,
        formatter_class=Help,
        exit_on_error=False,
        allow_abbrev=False,
    )


def kind_of(action: Any) -> Any:
    """The type of an option's value; None for a switch."""
    return getattr(action, "_typehint", None) or (action.type if action.nargs is None else None)


def add_options(parser: ArgumentParser, options: type) -> None:
    """Every field of a dataclass as an option."""
    parser.add_class_arguments(options, nested_key=None)
    for action in parser._actions:  # a list is given whole: no `--lr+`, which would append to the default
        action.option_strings = [name for name in action.option_strings if not name.endswith("+")]
    for name in [name for name in parser._option_string_actions if name.endswith("+")]:
        del parser._option_string_actions[name]


def take(options: type[Options], parsed: Namespace) -> Options:
    """The dataclass from what was parsed; its own checks may raise UserError."""
    return options(**{field.name: parsed[field.name] for field in dataclasses.fields(options)})  # type: ignore[arg-type]


def parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Parse; dashes and underscores in the names of options mean the same, and a bare `--option` means true.

    Raises:
        UserError: there is no such option, it is not of its kind, or one that is required is missing.
    """
    spelt = _spelt_out(parser, [_underscored(argument) for argument in arguments])
    in_files = [read_config(path) for path in config_files(spelt)]
    for values in in_files:
        _check_config(parser, values)
    asks_only = any(a in ("-h", "--help") or a.startswith("--print_config") for a in spelt)
    for action in () if asks_only else parser._actions:
        name = next(iter(action.option_strings), None)
        given = any(a.startswith(f"{name}=") for a in spelt) or any(action.dest in values for values in in_files)
        require(not (action.required and name) or given, f"{name}: required but not given; see {parser.prog} --help")
    try:
        return parser.parse_args(spelt)
    except ArgumentError as error:
        lists = (name for name, action in _options(parser).items() if describe(kind_of(action)).startswith("["))
        name = next((name for name in lists if any(word.startswith(f"{name}=") for word in spelt)), None)
        joined = f"; several values are joined by commas: {name} A,B" if name and "unrecognized" in str(error) else ""
        raise UserError(f"{one_line(error)}{joined}") from error


def config_files(arguments: Sequence[str]) -> Iterator[Path]:
    """The files that `--config` names."""
    for i, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name == "--config" and (equals or i + 1 < len(arguments)):
            yield Path(value if equals else arguments[i + 1])


def _options(parser: ArgumentParser) -> dict[str, Any]:
    """The options of a parser by name, with their actions."""
    return {name: action for action in parser._actions for name in action.option_strings if name.startswith("--")}


def _spelt_out(parser: ArgumentParser, arguments: list[str]) -> list[str]:
    """The same with every option known, its values of its kind, and a single value joined to it: `--option=value`."""
    options, rest = _options(parser), list(arguments)
    spelt: list[str] = []
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*spelt, word, *rest]
        name, equals, value = word.partition("=")
        action = options.get(name.partition(".")[0])
        if not word.startswith("--"):
            spelt.append(word)
            continue
        if action is None:
            raise UserError(f"{name}: there is no such option{_nearest_option(parser, name)}")
        kind = kind_of(action) if name in options else Any  # --model_args.depth takes what the model does
        if kind is None and name != "--config":
            spelt.append(word)
            continue
        if not equals and action.nargs in ("+", "*"):
            values = list(itertools.takewhile(lambda word: not word.startswith("--"), rest))
            rest = rest[len(values) :]
            require(bool(values) or action.nargs == "*", f"{name}: expected {describe(kind)} or several, got nothing")
            _check_words(name, kind, *values)
            spelt += [name, *values]
            continue
        if not equals:
            follows = bool(rest) and not rest[0].startswith("--") and (kind is not bool or text_fits(bool, rest[0]))
            require(follows or kind is bool, f"{name}: expected {describe(kind or str)}, got nothing")
            value = rest.pop(0) if follows else "true"
        value = _in_brackets(kind, value)
        _check_words(name, kind, value)
        spelt.append(f"{name}={value}")
    return spelt


def _in_brackets(kind: Any, word: str) -> str:
    """A list may be typed without its brackets: `a` is `[a]`, and `640,1280` is `[640,1280]`."""
    bare = kind not in (None, Any) and not text_fits(kind, word) and text_fits(kind, f"[{word}]")
    return f"[{word}]" if bare else word


def _check_words(name: str, kind: Any, *words: str) -> None:
    for word in words:
        fit = kind in (None, Any) or text_fits(kind, word)
        require(fit, f"{name}: expected {describe(kind)}, got {_brief(word) or 'nothing'}")


def _check_config(parser: ArgumentParser, values: dict[str, Any]) -> None:
    options = _options(parser)
    for name, value in values.items():
        action = options.get("--" + name.partition(".")[0])
        if action is None:
            hint = _nearest_option(parser, "--" + name).replace("--", "", 1)
            raise UserError(f"--config: '{name}' is not an option of {parser.prog}{hint}")
        kind = kind_of(action) if "." not in name else None
        kind = list[kind] if kind and action.nargs in ("+", "*") else kind  # type: ignore[valid-type]
        require(kind is None or fits(kind, value), f"--{name}: expected {describe(kind)}, got {_brief(value)}")


def _nearest_option(parser: ArgumentParser, name: str) -> str:
    return nearest(name, _options(parser)) or f"; see {parser.prog} --help"


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 and text.isprintable() else shown(value)


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
