"""What an option takes: its type in words, and whether a value is of it."""

from __future__ import annotations

import math
import types
import typing
from typing import Any, Literal

import yaml

WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    type(None): "null",
}


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
    if origin is list:
        return f"[{describe(inside[0]).removeprefix('a ')}, ...]"
    return "a mapping such as '{depth: 4}'" if origin is dict else str(kind)


def fits(kind: Any, value: Any) -> bool:
    """Whether a value from YAML is of a type."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in inside
    if origin in (typing.Union, types.UnionType):
        return any(fits(part, value) for part in inside)
    if origin is tuple:
        several = isinstance(value, (list, tuple)) and len(value) == len(inside)
        return several and all(map(fits, inside, value))
    if origin is list:
        return isinstance(value, list) and all(fits(inside[0], part) for part in value)
    if origin is dict:
        return isinstance(value, dict)
    if kind is float:
        return _is_number(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return kind is Any or isinstance(value, kind)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False
    try:
        return math.isfinite(float(value))  # YAML reads 1e-3 as a text
    except (ValueError, OverflowError):
        return False


def text_fits(kind: Any, text: str) -> bool:
    """Whether a word of the command line is a value of a type: as it stands, or as YAML."""
    if fits(kind, text):
        return True
    try:
        return fits(kind, yaml.safe_load(text))
    except (yaml.YAMLError, ValueError, RecursionError):
        return False


def convert(kind: Any, value: Any) -> Any:
    """A value that fits as YAML has it (lists for tuples, 1e-3 as a text), as its type has it."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return convert(next((part for part in inside if fits(part, value)), Any), value)
    if origin is tuple:
        return tuple(convert(part, item) for part, item in zip(inside, value, strict=True))
    return float(value) if kind is float else value
