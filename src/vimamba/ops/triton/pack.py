"""B and C as the scan kernels read them, and their gradients as the caller wants them.

Packed, they are one float32 tensor (steps, 2, BLOCK_N) for each direction, batch element and group, with the steps in
the order of the recurrence, so that a kernel walks them with constant offsets whichever way the direction runs, and
with zeros past the end of the sequence, up to a multiple of PADDING steps, so that nothing has to be checked; rows are
aligned for 16-byte loads. One launch, for all directions.

Layout: steps x states; a program owns ROWS steps of one sequence. Parallel axis: sequences x groups x steps.
Bytes for one element: pack reads the input and writes 4; unpack reads 4 for each part and writes the output.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vimamba.ops.triton.elementwise import PADDING, packed_matrices, position, row_of
from vimamba.ops.triton.tiling import padded_states

ROWS = 64


@triton.jit
def share_of_steps(groups, length, batch, reverse_mask, ROWS: tl.constexpr):
    """A program's steps, their tokens, which of them exist, and its sequence, direction, batch element and group."""
    n_tiles = tl.cdiv(length, PADDING) * (PADDING // ROWS)
    pid = tl.program_id(0).to(tl.int64)
    step = (pid % n_tiles).to(tl.int32) * ROWS + tl.arange(0, ROWS)
    group, sequence = (pid // n_tiles) % groups, pid // (n_tiles * groups)
    b, r = sequence % batch, sequence // batch
    reverse = (reverse_mask >> r.to(tl.int32)) & 1
    token = position(tl.minimum(step, length - 1), length, reverse).to(tl.int64)
    return step, token, step < length, sequence, r, b, group


@triton.jit
def pack_kernel(
    B, C, packed, B_sr, B_sb, B_sg, B_sn, B_sl, C_sr, C_sb, C_sg, C_sn, C_sl,
    groups, B_share, C_share, length, batch, reverse_mask,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, HAS_B: tl.constexpr, HAS_C: tl.constexpr,
):  # fmt: skip
    step, token, exists, sequence, r, b, group = share_of_steps(groups, length, batch, reverse_mask, ROWS)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask = exists[:, None] & (n < N)[None, :]
    rows = packed_matrices(packed, sequence, groups, group, length, BLOCK_N)
    here = rows + step.to(tl.int64)[:, None] * (2 * BLOCK_N) + n[None, :]
    if HAS_B:
        given = B + r * B_sr + b * B_sb + (group // B_share) * B_sg + token[:, None] * B_sl + n[None, :] * B_sn
        tl.store(here, tl.load(given, mask=mask, other=0.0).to(tl.float32))
    if HAS_C:
        given = C + r * C_sr + b * C_sb + (group // C_share) * C_sg + token[:, None] * C_sl + n[None, :] * C_sn
        tl.store(here + BLOCK_N, tl.load(given, mask=mask, other=0.0).to(tl.float32))


@triton.jit
def unpack_kernel(
    parts, out, out_sr, out_sb, out_sg, out_sl, out_sm, groups, n_parts, part_stride, length, batch, reverse_mask,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    step, token, exists, sequence, r, b, group = share_of_steps(groups, length, batch, reverse_mask, ROWS)
    n = tl.arange(0, BLOCK_N)
    mask = exists[:, None] & (n < N)[None, :]
    rows = packed_matrices(parts, sequence, groups, group, length, BLOCK_N)
    rows = rows + step.to(tl.int64)[:, None] * (2 * BLOCK_N) + n[None, :]
    for m in tl.static_range(2):
        total = tl.load(rows + m * BLOCK_N, mask=mask, other=0.0)
        for k in range(1, n_parts):
            total += tl.load(row_of(rows, k, part_stride) + m * BLOCK_N, mask=mask, other=0.0)
        here = out + r * out_sr + b * out_sb + group * out_sg + m * out_sm + token[:, None] * out_sl + n[None, :]
        tl.store(here, total.to(out.dtype.element_ty), mask=mask)


def padded(length: int) -> int:
    """Steps of a packed sequence."""
    return triton.cdiv(length, PADDING.value) * PADDING.value


def pack(B_RBGNL: Tensor | None, C_RBGNL: Tensor | None, groups: int, reverse_mask: int) -> Tensor | None:
    """B and C packed for `groups` groups, a multiple of their own number; only one of them, or None without either."""
    given = B_RBGNL if B_RBGNL is not None else C_RBGNL
    if given is None:
        return None
    R, batch, _, state, length = given.shape
    block_n = padded_states(state)
    packed = given.new_empty((R, batch, groups, padded(length), 2, block_n), dtype=torch.float32)
    if packed.numel():
        matrices = {"B": B_RBGNL, "C": C_RBGNL}
        strides = {
            f"{name}_s{axis}": 0 if m is None else m.stride(i)
            for name, m in matrices.items()
            for i, axis in enumerate("rbgnl")
        }
        shares = {f"{name}_share": 1 if m is None else groups // m.shape[2] for name, m in matrices.items()}
        with torch.cuda.device_of(packed):
            pack_kernel[(R * batch * groups * padded(length) // ROWS,)](
                **matrices, packed=packed, **strides, groups=groups, **shares, length=length, batch=batch,
                reverse_mask=reverse_mask, N=state, BLOCK_N=block_n, ROWS=ROWS, HAS_B=B_RBGNL is not None,
                HAS_C=C_RBGNL is not None, num_warps=4,
            )  # fmt: skip
    return packed


def unpack(parts_PRBGSMN: Tensor, out_RBGLMN: Tensor, reverse_mask: int) -> None:
    """Fill `out_RBGLMN`, the gradients of B and C by token, with the sum of the parts, which are packed in rows."""
    R, batch, groups, length, _, state = out_RBGLMN.shape
    assert out_RBGLMN.stride(-1) == 1
    if out_RBGLMN.numel():
        with torch.cuda.device_of(parts_PRBGSMN):
            unpack_kernel[(R * batch * groups * padded(length) // ROWS,)](
                parts=parts_PRBGSMN, out=out_RBGLMN,
                **{f"out_s{axis}": out_RBGLMN.stride(i) for i, axis in enumerate("rbglm")},
                groups=groups, n_parts=parts_PRBGSMN.shape[0], part_stride=parts_PRBGSMN.stride(0), length=length,
                batch=batch, reverse_mask=reverse_mask, N=state, BLOCK_N=parts_PRBGSMN.shape[-1], ROWS=ROWS,
                num_warps=4,
            )  # fmt: skip
