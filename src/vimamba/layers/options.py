"""Checks of arguments: each names the argument, its value and what it may be."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from vimamba.errors import nearest


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise ValueError unless the argument `name` has one of the allowed values."""
    if not isinstance(value, str) or value not in allowed:
        choices = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{name} must be one of {choices}, got {value!r}{nearest(value, allowed)}")


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Raise ValueError unless the argument `name` is a whole number from `least` up."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number from {least} up, got {value!r}")


def check_number(name: str, value: Any, least: float = 0.0, most: float = math.inf, *, above: bool = False) -> None:
    """Raise ValueError unless `name` is a finite number from `least` (or `above` it) to `most`."""
    real = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not real or value > most or value < least or (above and value == least):
        limits = f"{'above' if above else 'from'} {least:g}" + (f" to {most:g}" if math.isfinite(most) else " up")
        raise ValueError(f"{name} must be a number {limits}, got {value!r}")


AXES = {1: "a length", 2: "a height and a width", 3: "a depth, a height and a width"}


def check_sizes(name: str, value: Any, rank: int) -> tuple[int, ...]:
    """The length along each of `rank` axes, from one whole number for all or one for each.

    Raises:
        ValueError: they are not, or one is under 1.
    """
    sizes = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,) * rank
    if len(sizes) != rank:
        raise ValueError(f"{name} must be one whole number, or {AXES[rank]}, got {value!r}")
    for size in sizes:
        check_whole(name, size)
    return tuple(map(int, sizes))


def check_names(owner: str, given: Collection[str], known: Collection[str]) -> None:
    """Raise TypeError, as Python does, for the first of the `given` argument names that `owner` does not know."""
    for name in given:
        if name not in known:
            raise TypeError(f"{owner} has no argument {name!r}{nearest(name, known)}")
