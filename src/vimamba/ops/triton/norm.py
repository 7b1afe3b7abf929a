"""Residual addition and RMSNorm on the GPU.

Layout: rows (tokens) x features, features contiguous; a program owns ROWS whole rows (backward: walks over many, so
that the weight's gradient is summed in registers first). Parallel axis: rows.
Bytes for one element: forward x, residual and residual_out, normed; backward four reads at most and one write.
Operations for one element: forward 2 FFMA and 2 FMUL, backward 4 FFMA and 5 FMUL; one MUFU.RSQ a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vimamba.ops.triton.tiling import power_of_two

TILE = 2048
"""Elements of a program's tile; 16 for each of its 128 threads."""
BACKWARD_PROGRAMS = 1024
"""At most so many partial sums of the weight's gradient."""


@triton.jit
def norm_forward_kernel(
    x, residual, weight, normed, residual_out, rstd, x_sm, residual_sm, count, width, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    e = tl.arange(0, BLOCK)
    mask = (m < count)[:, None] & (e < width)[None, :]
    offsets = m[:, None] * width + e[None, :]
    total = tl.load(x + m[:, None] * x_sm + e[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual + m[:, None] * residual_sm + e[None, :], mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(total * total, axis=1) / width + eps)
    scaled = total * inverse[:, None] * tl.load(weight + e, mask=e < width, other=0.0)[None, :]
    tl.store(residual_out + offsets, total, mask=mask)
    tl.store(normed + offsets, scaled.to(normed.dtype.element_ty), mask=mask)
    tl.store(rstd + m, inverse, mask=m < count)


@triton.jit
def norm_backward_kernel(
    dnormed, dresidual, residual_out, weight, rstd, dsum, parts, dnormed_sm, dresidual_sm, count, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_DRESIDUAL: tl.constexpr,
):  # fmt: skip
    e = tl.arange(0, BLOCK)
    w = tl.load(weight + e, mask=e < width, other=0.0)[None, :]
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    pid = tl.program_id(0)
    for first in range(pid * ROWS, count, tl.num_programs(0) * ROWS):
        m = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (m < count)[:, None] & (e < width)[None, :]
        offsets = m[:, None] * width + e[None, :]
        inverse = tl.load(rstd + m, mask=m < count, other=0.0)[:, None]
        gradient = tl.load(dnormed + m[:, None] * dnormed_sm + e[None, :], mask=mask, other=0.0).to(tl.float32)
        unit = tl.load(residual_out + offsets, mask=mask, other=0.0) * inverse
        dweight += gradient * unit
        gradient *= w
        total = (gradient - unit * (tl.sum(gradient * unit, axis=1) / width)[:, None]) * inverse
        if HAS_DRESIDUAL:
            total += tl.load(dresidual + m[:, None] * dresidual_sm + e[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dsum + offsets, total, mask=mask)
    tl.store(parts + pid.to(tl.int64) * width + e, tl.sum(dweight, axis=0), mask=e < width)


def _rows(tensor: Tensor | None) -> Tensor | None:
    """(..., E) as (M, E) with contiguous features; rows may be any distance apart."""
    if tensor is None:
        return None
    tensor_ME = tensor.reshape(-1, tensor.shape[-1])
    return tensor_ME if tensor_ME.stride(1) == 1 else tensor_ME.contiguous()


def _tile(width: int) -> tuple[int, int, int]:
    """Rows, features and warps of a program."""
    block = power_of_two(width)
    return max(1, TILE // block), block, 4 if block <= 4 * TILE else 16


def norm_forward(
    x: Tensor, residual: Tensor | None, weight_E: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised sum in `out_dtype`, the sum in float32, and 1 / its root mean square; see `vimamba.rms_norm`."""
    width = x.shape[-1]
    residual_out = x.new_empty(x.shape, dtype=torch.float32)
    normed, rstd = x.new_empty(x.shape, dtype=out_dtype), residual_out.new_empty(x.shape[:-1])
    if x.numel() == 0:
        return normed, residual_out, rstd
    x_ME, residual_ME = _rows(x), _rows(residual)
    assert x_ME is not None
    count = x_ME.shape[0]
    rows, block, warps = _tile(width)
    with torch.cuda.device_of(x):
        norm_forward_kernel[(triton.cdiv(count, rows),)](
            x=x_ME, residual=residual_ME, weight=weight_E.contiguous(), normed=normed, residual_out=residual_out,
            rstd=rstd, x_sm=x_ME.stride(0), residual_sm=0 if residual_ME is None else residual_ME.stride(0),
            count=count, width=width, eps=eps, ROWS=rows, BLOCK=block, HAS_RESIDUAL=residual is not None,
            num_warps=warps,
        )  # fmt: skip
    return normed, residual_out, rstd


def norm_backward(
    dnormed: Tensor, dresidual: Tensor | None, residual_out: Tensor, weight_E: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the sum (with what arrives at `residual_out` itself) and of the weight."""
    width = residual_out.shape[-1]
    count = residual_out.numel() // max(1, width)
    dsum = torch.empty_like(residual_out, memory_format=torch.contiguous_format)
    if dsum.numel() == 0:
        return dsum, torch.zeros_like(weight_E)
    dnormed_ME, dresidual_ME = _rows(dnormed), _rows(dresidual)
    assert dnormed_ME is not None
    rows, block, warps = _tile(width)
    programs = min(triton.cdiv(count, rows), BACKWARD_PROGRAMS)
    parts = dsum.new_empty((programs, width))
    with torch.cuda.device_of(dsum):
        norm_backward_kernel[(programs,)](
            dnormed=dnormed_ME, dresidual=dresidual_ME, residual_out=residual_out.contiguous(),
            weight=weight_E.contiguous(), rstd=rstd.contiguous(), dsum=dsum, parts=parts,
            dnormed_sm=dnormed_ME.stride(0), dresidual_sm=0 if dresidual_ME is None else dresidual_ME.stride(0),
            count=count, width=width, ROWS=rows, BLOCK=block, HAS_DRESIDUAL=dresidual is not None, num_warps=warps,
        )  # fmt: skip
    return dsum, parts.sum(0)
