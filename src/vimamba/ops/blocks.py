"""A run of Vision Mamba's blocks in one call, for its values: norm, input projection, mixer, output projection, sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vimamba.ops import backends
from vimamba.ops.arguments import check_number, check_shape, check_tensors, wide
from vimamba.ops.direction import Direction


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


def blocks(
    stream: Tensor,
    weights: Sequence[BlockWeights],
    scale: float = 1.0,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Pass the residual stream through blocks one after the other. It has no gradient.

    The "cpu" backend lays the weights out for its kernels once and remembers it, with a fingerprint of all of their
    bytes that every call compares: however they are written, what runs is what they are.

    Args:
        stream: (batch, length, dim).
        weights: of one block or more, all of the same sizes and with as many directions.
        scale, eps: of every mixer, see `mixer`, and of every norm.
        dtype: type of the activations between the blocks' layers, the stream's by default.
        backend: None (choose), "reference", "torch", "cpu", "triton" or one registered with `ops.backends.register`.

    Returns:
        (batch, length, dim), the stream after the last block, in float32 (float64 for float64 input).

    Raises:
        ValueError: a shape does not fit; the message names the argument.
    """
    backends.check(backend)
    check_number("scale", scale)
    check_number("eps", eps, low=0)
    _check(stream, weights)
    dtype = dtype or stream.dtype
    with torch.no_grad():
        chosen = backends.resolve(backend or "", stream.device, wide(stream.dtype))
        return chosen.blocks(stream.to(wide(stream.dtype)), weights, scale, eps, dtype)


def _check(stream: Tensor, weights: Sequence[BlockWeights]) -> None:
    check_tensors("blocks", {"stream": stream})
    if stream.dim() != 3:
        raise ValueError(f"stream must have shape (batch, length, dim), got {tuple(stream.shape)}")
    if not weights:
        raise ValueError("weights must be those of one block or more")
    dim, inner = stream.shape[2], weights[0].out_proj.shape[-1]
    directions = len(weights[0].directions)
    for i, block in enumerate(weights):
        check_shape(f"weights[{i}].norm", block.norm, (dim,), "(dim,)")
        check_shape(f"weights[{i}].in_proj", block.in_proj, (2 * inner, dim), "(2 * inner, dim)")
        check_shape(f"weights[{i}].out_proj", block.out_proj, (dim, inner), "(dim, inner)")
        check_shape(f"weights[{i}].in_bias", block.in_bias, (2 * inner,), "(2 * inner,)")
        check_shape(f"weights[{i}].out_bias", block.out_bias, (dim,), "(dim,)")
        if not directions or len(block.directions) != directions:
            raise ValueError(f"weights[{i}] must have {directions or 1} directions, got {len(block.directions)}")
