"""The weights of blocks that run in one call, one by one or in a list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vimamba.ops.direction import WEIGHTS, Direction, directions_of


class BlockWeights(NamedTuple):
    """The weights of one block: stream += out_proj(mixer(in_proj(rms_norm(stream))))."""

    norm: Tensor  # (dim,)
    in_proj: Tensor  # (2 * inner, dim)
    in_bias: Tensor | None  # (2 * inner,)
    out_proj: Tensor  # (dim, inner)
    out_bias: Tensor | None  # (dim,)
    directions: Sequence[Direction]
    in_scales: Tensor | None = None  # (2 * inner,), float32, where in_proj is of 8-bit integers: see `quantized_linear`
    out_scales: Tensor | None = None  # (dim,)


BLOCK = len(BlockWeights._fields) - 1
"""Tensors of a block in front of its directions'; kBlockWeights in cpu/block_call.h."""
_NONE = torch.empty(0)
"""Stands for a bias that there is not."""


def flat_blocks(weights: Sequence[BlockWeights]) -> tuple[list[Tensor], list[int]]:
    """Blocks as operators take them: weights in a list, a block's directions last, and which way round these run."""
    tensors = []
    for block in weights:
        optional = (block.in_bias, block.out_bias, block.in_scales, block.out_scales)
        in_bias, out_bias, in_scales, out_scales = (_NONE if x is None else x for x in optional)
        tensors += [block.norm, block.in_proj, in_bias, block.out_proj, out_bias, in_scales, out_scales]
        tensors += [weight for direction in block.directions for weight in direction.weights]
    return tensors, [direction.reverse for block in weights for direction in block.directions]


def blocks_of(tensors: Sequence[Tensor], reverse: Sequence[int], directions: int) -> list[BlockWeights]:
    """The blocks that `flat_blocks` made flat."""
    each, found = BLOCK + WEIGHTS * directions, []
    for i in range(len(reverse) // directions):
        of_block = tensors[i * each : (i + 1) * each]
        norm, in_proj, _, out_proj, *_ = of_block
        in_bias, out_bias, in_scales, out_scales = (of_block[k] if of_block[k].numel() else None for k in (2, 4, 5, 6))
        ways = directions_of(of_block[BLOCK:], reverse[i * directions : (i + 1) * directions])
        found.append(BlockWeights(norm, in_proj, in_bias, out_proj, out_bias, ways, in_scales, out_scales))
    return found
