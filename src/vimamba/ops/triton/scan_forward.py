"""The selective scan on the GPU, forward.

Layout: a program owns CHANNELS x LANES channels of one sequence and direction, and walks along time. With LANES = 32
and one warp, each thread holds all states of its CHANNELS channels, so that y = C . h needs no exchange between
threads; fewer lanes spread the states of a channel over 32 / LANES threads, for small problems.
Parallel axis: channel blocks x segments of time x sequences x directions, all in one launch.
Bytes: u, delta (and z) read and y written once; B and C, float32 and shared by all channels of a group, come from L1.
Operations for one element and state: 1 MUFU.EX2, 2 FMUL, 2 FFMA; a row of B and C is 2 N / 4 16-byte loads
a thread, shared by CHANNELS channels.

The stride of channels is a run-time value on purpose: a compile-time 1 makes the compiler spread a row over the
threads for wide loads and then pass it through shared memory into the layout of the state, once for each step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vimamba.ops.triton.elementwise import (
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

STRIDES = [f"{tensor}_s{axis}" for tensor in ("u", "delta", "z", "out") for axis in "rbl"]
RUN_TIME = [*STRIDES, "channel_stride", "state_stride", "length", "batch"]


@triton.jit
def load_rows(row, stride, offsets, mask, step, end, ROWS: tl.constexpr):
    """ROWS rows of a tile from step `step`, of which `row` is the row, as stored; zeros from step `end`."""
    rows = ()
    for j in tl.static_range(ROWS):
        rows = rows + (tl.load(row_of(row, j, stride) + offsets, mask=both(mask, step + j < end), other=0.0),)
    return rows


@triton.jit(do_not_specialize=RUN_TIME)
def scan_forward_kernel(
    u, delta, z, out, A, bc, B_const, C_const, D, bias, states, last,
    u_sr, u_sb, u_sl, delta_sr, delta_sb, delta_sl,
    z_sr, z_sb, z_sl, out_sr, out_sb, out_sl,
    channel_stride, state_stride, batch, groups, group_dim, blocks_per_group, length, n_states, reverse_mask, scale,
    N: tl.constexpr, BLOCK_N: tl.constexpr, CHANNELS: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
    CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, CONST_B: tl.constexpr, CONST_C: tl.constexpr, EVEN: tl.constexpr,
    SAVE_STATES: tl.constexpr,
):  # fmt: skip
    dim = groups * group_dim
    channel, exists, group, _, _, _, sequence, b, r, backwards = share_of_work(
        groups, group_dim, blocks_per_group, batch, 1, 0, length, length, reverse_mask, CHANNELS, LANES, EVEN,
    )  # fmt: skip
    n, state_mask, state_offsets, A2 = state_tile(A + r * dim * N, channel, exists, state_stride, N, BLOCK_N)
    B_tile = tl.load(B_const + state_offsets, mask=state_mask, other=0.0) if CONST_B else 0.0
    C_tile = tl.load(C_const + state_offsets, mask=state_mask, other=0.0) if CONST_C else 0.0
    shift = tl.load(bias + r * dim + channel * state_stride, mask=exists, other=0.0) if HAS_BIAS else 0.0
    skip = tl.load(D + r * dim + channel * state_stride, mask=exists, other=0.0) if HAS_D else 0.0
    h = tl.zeros([CHANNELS, BLOCK_N, LANES], tl.float32)

    offsets = channel * channel_stride
    u_row, u_step = walk(u + r * u_sr + b * u_sb, u_sl, length, backwards)
    delta_row, delta_step = walk(delta + r * delta_sr + b * delta_sb, delta_sl, length, backwards)
    out_row, out_step = walk(out + r * out_sr + b * out_sb, out_sl, length, backwards)
    if HAS_Z:
        z_row, z_step = walk(z + r * z_sr + b * z_sb, z_sl, length, backwards)
    bc_rows = bc if CONST_B and CONST_C else packed_matrices(bc, sequence, groups, group, length, BLOCK_N)
    states_row = states + sequence * n_states * dim * N

    # Rows are fetched one turn ahead, so that the work of a turn hides the latency of the next one's loads.
    us = load_rows(u_row, u_step, offsets, exists, 0, length, UNROLL)
    deltas = load_rows(delta_row, delta_step, offsets, exists, 0, length, UNROLL)
    for i in range(0, length, UNROLL):
        u_row = row_of(u_row, UNROLL, u_step)
        delta_row = row_of(delta_row, UNROLL, delta_step)
        next_us = load_rows(u_row, u_step, offsets, exists, i + UNROLL, length, UNROLL)
        next_deltas = load_rows(delta_row, delta_step, offsets, exists, i + UNROLL, length, UNROLL)
        if HAS_Z:
            zs = load_rows(z_row, z_step, offsets, exists, i, length, UNROLL)
            z_row = row_of(z_row, UNROLL, z_step)
        if SAVE_STATES:
            if i % CHUNK == 0:
                here = states_row + tl.cast(i // CHUNK, tl.int64) * dim * N
                tl.store(here + state_offsets, h, mask=state_mask)
        # Stores wait until the end of the turn: no later load may pass them.
        ys = ()
        for j in tl.static_range(UNROLL):
            x = us[j].to(tl.float32)
            dt = step_size(deltas[j].to(tl.float32), shift, i + j < length, SOFTPLUS)
            Bt = matrix_row(bc_rows, B_tile, i + j, n, BLOCK_N, CONST_B)
            Ct = matrix_row(bc_rows, C_tile, i + j, BLOCK_N + n, BLOCK_N, CONST_C)
            h = tl.exp2(dt[:, None, :] * A2) * h + (dt * x)[:, None, :] * Bt
            y = tl.sum(h * Ct, axis=1) + skip * x
            if HAS_Z:
                gate = zs[j].to(tl.float32)
                y = y * gate * sigmoid(gate) * scale
            ys = ys + (y,)
        for j in tl.static_range(UNROLL):
            here = row_of(out_row, j, out_step) + offsets
            tl.store(here, ys[j].to(out.dtype.element_ty), mask=both(exists, i + j < length))
        out_row = row_of(out_row, UNROLL, out_step)
        us = next_us
        deltas = next_deltas

    tl.store(last + sequence * dim * N + state_offsets, h, mask=state_mask)
