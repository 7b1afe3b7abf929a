"""Mixers of tokens: a recurrence, along directions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from vimamba.layers.mixers.directional import DirectionalMixer
from vimamba.layers.mixers.mamba import BidirectionalMixer
from vimamba.layers.options import check_choice

RECURRENCES: dict[str, Callable[..., nn.Module]] = {"mamba": BidirectionalMixer}
"""By name: a recurrence, as `DirectionalMixer` takes it, or a mixer over one."""


def mixer_of(recurrence: str | Callable[..., nn.Module]) -> Callable[..., DirectionalMixer]:
    """What makes mixers over a recurrence, which is named as in `RECURRENCES` or given.

    Raises:
        ValueError: there is none of that name.
    """
    if not callable(recurrence):
        check_choice("recurrence", recurrence, tuple(RECURRENCES))
    made_by: Any = recurrence if callable(recurrence) else RECURRENCES[recurrence]
    if isinstance(made_by, type) and issubclass(made_by, DirectionalMixer):
        return made_by
    return partial(DirectionalMixer, recurrence=made_by)


def recurrence_options(mixer: Callable[..., DirectionalMixer]) -> set[str]:
    """Names of the options of a mixer's recurrence: not those that every mixer has."""
    of_recurrence = mixer.keywords["recurrence"] if isinstance(mixer, partial) else mixer
    common = inspect.signature(DirectionalMixer).parameters.keys()
    return inspect.signature(of_recurrence).parameters.keys() - common
