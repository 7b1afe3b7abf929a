"""What an option takes: its type in words, and whether a value is of it."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

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


def fits(kind: Any, value: Any, texts: bool = True) -> bool:
    """Whether a value is of a type, as annotations spell it; lists stand for tuples, and whole numbers for floats.

    Args:
        kind: the type.
        value: from YAML, or from JSON.
        texts: a number may be a text too: YAML reads 1e-3 as one.
    """
    origin, inside = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Literal:
        return value in inside
    if origin in (typing.Union, types.UnionType):
        return any(fits(part, value, texts) for part in inside)
    if origin in (tuple, list, Sequence):
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and inside and inside[-1] is not Ellipsis:
            return len(value) == len(inside) and all(map(partial(fits, texts=texts), inside, value))
        return all(fits(inside[0] if inside else Any, part, texts) for part in value)
    if origin is float:
        return _is_number(value, texts)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return origin is Any or (isinstance(origin, type) and isinstance(value, origin))


def _is_number(value: Any, texts: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | str if texts else int | float):
        return False
    try:
        return math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False


def text_fits(kind: Any, text: str) -> bool:
    """Whether a word of the command line is a value of a type: as it stands, or as YAML."""
    import yaml  # which reading a model's file needs not

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
