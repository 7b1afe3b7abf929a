"""Parallelism along time: what a segment of the sequence does to the state, or the gradient of one, that enters it.

The gradient of the state, g = decay (g + C dy) from the last step to the first, is linear in what enters a segment at
its end, so a segment is summarised by what it adds, starting from zero, and by the decay of what enters,
exp(A sum(delta)): the product of all decays costs one exponential. Three launches: `segment_kernel` summarises every
segment (all in parallel), `carry_kernel` passes gradients from segment to segment (short and sequential), and the
backward kernel then runs on every segment from its true gradient. (The states are saved by the forward pass.)
Forward it is the same with the state, from the first step to the last; there `scan_forward_kernel` summarises.

Layout and parallel axis: as in scan_backward. Bytes: delta, dout and z once more. Operations for one element and
state: 1 MUFU.EX2, 2 FMUL, 1 FFMA: a fraction of the backward kernel's own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vimamba.ops.triton.elementwise import (
    LOG2E,
    both,
    matrix_row,
    packed_matrices,
    row_of,
    share_of_work,
    sigmoid,
    state_tile,
    step_size,
    walk,
)

STRIDES = [f"{tensor}_s{axis}" for tensor in ("dout", "delta", "z") for axis in "rbl"]
RUN_TIME = [*STRIDES, "channel_stride", "state_stride", "length", "segment_length", "batch", "n_segments"]


@triton.jit(do_not_specialize=RUN_TIME)
def segment_kernel(
    dout, delta, z, A, bc, C_const, bias, summary, decay,
    dout_sr, dout_sb, dout_sl, delta_sr, delta_sb, delta_sl, z_sr, z_sb, z_sl,
    channel_stride, state_stride, batch, groups, group_dim, blocks_per_group, length, n_segments, segment_length,
    reverse_mask, scale,
    N: tl.constexpr, BLOCK_N: tl.constexpr, CHANNELS: tl.constexpr, LANES: tl.constexpr, LANES_FIRST: tl.constexpr,
    UNROLL: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, CONST_C: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Summaries of all segments but the first, which nothing needs."""
    dim = groups * group_dim
    channel, exists, group, segment, begin, end, sequence, b, r, reverse = share_of_work(
        groups, group_dim, blocks_per_group, batch, n_segments - 1, 1, segment_length, length, reverse_mask,
        CHANNELS, LANES, LANES_FIRST, EVEN,
    )  # fmt: skip
    n, state_mask, state_offsets, A2 = state_tile(A + r * dim * N, channel, exists, state_stride, N, BLOCK_N)
    C_tile = tl.load(C_const + state_offsets, mask=state_mask, other=0.0) if CONST_C else 0.0
    shift = tl.load(bias + r * dim + channel * state_stride, mask=exists, other=0.0) if HAS_BIAS else 0.0
    offsets = channel * channel_stride
    dout_row, dout_step = walk(dout + r * dout_sr + b * dout_sb, dout_sl, length, reverse)
    delta_row, delta_step = walk(delta + r * delta_sr + b * delta_sb, delta_sl, length, reverse)
    if HAS_Z:
        z_row, z_step = walk(z + r * z_sr + b * z_sb, z_sl, length, reverse)
    bc_rows = bc if CONST_C else packed_matrices(bc, sequence, groups, group, length, BLOCK_N) + BLOCK_N

    g = tl.zeros(A2.shape, tl.float32)
    total = tl.zeros(channel.shape, tl.float32)
    for start in range(begin, end, UNROLL):
        for j in tl.static_range(UNROLL):
            valid = start + j < end
            i = tl.maximum(begin + end - 1 - (start + j), begin)
            mask = both(exists, valid)
            raw = tl.load(row_of(delta_row, i, delta_step) + offsets, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(row_of(dout_row, i, dout_step) + offsets, mask=mask, other=0.0).to(tl.float32)
            if HAS_Z:
                gate = tl.load(row_of(z_row, i, z_step) + offsets, mask=mask, other=0.0).to(tl.float32)
                dy = dy * gate * sigmoid(gate) * scale
            dt = step_size(raw, shift, valid, SOFTPLUS)
            Ct = matrix_row(bc_rows, C_tile, i, n, BLOCK_N, CONST_C)
            g = tl.exp2(dt[:, None, :] * A2) * (g + dy[:, None, :] * Ct)
            total += dt
    slot = sequence * n_segments + segment
    tl.store(summary + slot * dim * N + state_offsets, g, mask=state_mask)
    tl.store(decay + slot * dim + channel * state_stride, total, mask=exists)


@triton.jit(do_not_specialize=["total", "state_size", "n_segments", "batch"])
def carry_kernel(
    summary, decay, A, initial, total, state_size, n_segments, batch,
    N: tl.constexpr, BLOCK: tl.constexpr, HAS_INITIAL: tl.constexpr, FORWARD: tl.constexpr,
):  # fmt: skip
    """Replace every segment's summary with the state (or its gradient) that enters it; one thread a state element. The
    segment that is reached last has no summary.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = index < total
    sequence, element = index // state_size, index % state_size
    A2 = tl.load(A + (sequence // batch) * state_size + element, mask=exists, other=0.0) * LOG2E
    if HAS_INITIAL:
        g = tl.load(initial + index, mask=exists, other=0.0)
    else:
        g = tl.zeros([BLOCK], tl.float32)
    for k in range(0, n_segments):
        slot = sequence * n_segments + (k if FORWARD else n_segments - 1 - k)
        inside = both(exists, k < n_segments - 1)
        local = tl.load(summary + slot * state_size + element, mask=inside, other=0.0)
        spent = tl.load(decay + (slot * state_size + element) // N, mask=inside, other=0.0)
        tl.store(summary + slot * state_size + element, g, mask=exists)
        g = tl.exp2(A2 * spent) * g + local
