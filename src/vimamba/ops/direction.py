"""One direction of the mixer: its weights, and which way round its convolution and its scan run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vimamba.ops.arguments import widen

WEIGHTS = 7
"""Tensors of a direction in the operators' list of weights; kWeights in cpu/mixer_run.h."""
CONV_REVERSE, SCAN_REVERSE = 1, 2
"""Bits of the operators' `reverse`, a number for each direction; kConvReverse and kScanReverse in cpu/mixer_run.h."""


class Direction(NamedTuple):
    """The weights of one direction of the mixer, and which way round its convolution and its scan run."""

    conv_weight: Tensor  # (dim, width), or (dim, 1, width) as torch.nn.Conv1d keeps it
    conv_bias: Tensor  # (dim,)
    x_proj_weight: Tensor  # (rank + 2 * state, dim)
    dt_proj_weight: Tensor  # (dim, rank)
    dt_bias: Tensor  # (dim,)
    A_log: Tensor  # (dim, state), the logarithm of -A
    D: Tensor  # (dim,)
    conv_reverse: bool = False
    scan_reverse: bool = False

    @property
    def decay_rates(self) -> Tensor:
        """A (dim, state), in float32 or more whatever the type of A_log."""
        return -torch.exp(widen(self.A_log))

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self[:WEIGHTS]  # type: ignore[return-value]

    @property
    def reverse(self) -> int:
        """Which way round, as the operators take it."""
        return CONV_REVERSE * bool(self.conv_reverse) + SCAN_REVERSE * bool(self.scan_reverse)


def flat(directions: Sequence[Direction]) -> tuple[list[Tensor], list[int]]:
    """Directions as the operators and the backends take them: all weights in a list, and which way round each runs."""
    return [weight for d in directions for weight in d.weights], [d.reverse for d in directions]


def directions_of(weights: Sequence[Tensor], reverse: Sequence[int]) -> list[Direction]:
    """The directions that `flat` made flat."""
    sets = (weights[i : i + WEIGHTS] for i in range(0, len(weights), WEIGHTS))
    return [
        Direction._make((*of_one, bool(bits & CONV_REVERSE), bool(bits & SCAN_REVERSE)))
        for of_one, bits in zip(sets, reverse, strict=True)
    ]
