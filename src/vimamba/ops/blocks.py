"""A run of Vision Mamba's blocks in one call, for its values: norm, input projection, mixer, output projection, sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from vimamba.ops import backends, operators
from vimamba.ops.arguments import check_number, check_shape, check_tensors, wide
from vimamba.ops.block_weights import BlockWeights, flat_blocks

operators.define(
    "blocks", "(Tensor stream, Tensor[] weights, int[] reverse, int directions, float scale, float eps) -> Tensor"
)


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
    if _as_one and not backends.untraced(stream):
        return torch.ops.vimamba.blocks(stream, *flat_blocks(weights), len(weights[0].directions), scale, eps)
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


_as_one = False  # of the process, as is_exporting is; torch.compile of PyTorch 2.11 cannot trace a ContextVar


@contextmanager
def traced_as_one() -> Iterator[None]:
    """Within it torch.export takes a run of blocks, and each linear layer of others, as the operator that computes it,
    which has no derivative."""
    global _as_one
    before, _as_one = _as_one, True
    try:
        yield
    finally:
        _as_one = before


def exports_as_one(x: Tensor) -> bool:
    """Whether a program of operators without derivatives is made of what is done with `x`."""
    return _as_one and torch.compiler.is_exporting() and x.dtype == torch.float32


def as_one(stream: Tensor) -> bool:
    """Whether blocks that pass `stream` on are to run in one call, as far as it depends on what is wanted of them."""
    return exports_as_one(stream) or backends.values_only(stream)


def _exported(stream, weights, reverse, directions, scale, eps):
    chosen = backends.resolve("", stream.device, stream.dtype)
    return chosen.exported_blocks(stream, weights, reverse, directions, scale, eps)


operators.implement("blocks", _exported)
operators.first_derivatives_only("blocks")


@torch.library.register_fake("vimamba::blocks")
def _fake(stream, weights, reverse, directions, scale, eps):
    return torch.empty_like(stream, memory_format=torch.contiguous_format)
