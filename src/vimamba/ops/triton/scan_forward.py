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

from vimamba.ops.triton.elementwise import both, position, row_of, share_of_work, sigmoid, state_tile, step_size

STRIDES = [f"{tensor}_s{axis}" for tensor in ("u", "delta", "z", "out") for axis in "rbl"]
RUN_TIME = [*STRIDES, "channel_stride", "state_stride", "length", "segment_length", "batch", "n_segments"]


@triton.jit
def load_rows(row, stride, offsets, mask, index, end, length, backwards, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """ROWS rows of a tile, one a step from step `index`, as stored."""
    rows = ()
    for j in tl.static_range(ROWS):
        here = row_of(row, position(index + j, end, length, backwards), stride)
        if EVEN:
            rows = rows + (tl.load(here + offsets),)
        else:
            rows = rows + (tl.load(here + offsets, mask=mask, other=0.0),)
    return rows


@triton.jit(do_not_specialize=RUN_TIME)
def scan_forward_kernel(
    u, delta, z, out, A, bc, B_const, C_const, D, bias, states, carry, last,
    u_sr, u_sb, u_sl, delta_sr, delta_sb, delta_sl,
    z_sr, z_sb, z_sl, out_sr, out_sb, out_sl,
    channel_stride, state_stride, batch, groups, group_dim, blocks_per_group, length, n_segments,
    segment_length, n_states,
    reverse_mask, scale,
    N: tl.constexpr, BLOCK_N: tl.constexpr, CHANNELS: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
    CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, CONST_B: tl.constexpr, CONST_C: tl.constexpr, EVEN: tl.constexpr,
    SAVE_STATES: tl.constexpr, HAS_CARRY: tl.constexpr,
):  # fmt: skip
    dim = groups * group_dim
    channel, exists, group, segment, begin, end, sequence, b, r, backwards = share_of_work(
        groups, group_dim, blocks_per_group, batch, n_segments, 0, segment_length, length, reverse_mask,
        CHANNELS, LANES, EVEN,
    )  # fmt: skip
    n, state_mask, state_offsets, A2 = state_tile(A + r * dim * N, channel, exists, state_stride, N, BLOCK_N)
    if CONST_B:
        B_tile = tl.load(B_const + state_offsets, mask=state_mask, other=0.0)
    if CONST_C:
        C_tile = tl.load(C_const + state_offsets, mask=state_mask, other=0.0)
    shift = tl.load(bias + r * dim + channel * state_stride, mask=exists, other=0.0) if HAS_BIAS else 0.0
    skip = tl.load(D + r * dim + channel * state_stride, mask=exists, other=0.0) if HAS_D else 0.0
    if HAS_CARRY:
        carry_base = carry + (sequence * n_segments + segment) * dim * N
        h = tl.load(carry_base + state_offsets, mask=state_mask, other=0.0)
    else:
        h = tl.zeros([CHANNELS, BLOCK_N, LANES], tl.float32)

    offsets = channel * channel_stride
    u_row, delta_row = u + r * u_sr + b * u_sb, delta + r * delta_sr + b * delta_sb
    out_row = out + r * out_sr + b * out_sb
    if HAS_Z:
        z_row = z + r * z_sr + b * z_sb
    if not (CONST_B and CONST_C):
        bc_row = bc + (sequence * groups + group) * length * (2 * BLOCK_N)
    states_row = states + sequence * n_states * dim * N

    # Rows are fetched one turn ahead, so that the work of a turn hides the latency of the next one's loads.
    us = load_rows(u_row, u_sl, offsets, exists, begin, end, length, backwards, UNROLL, EVEN)
    deltas = load_rows(delta_row, delta_sl, offsets, exists, begin, end, length, backwards, UNROLL, EVEN)
    for i in range(begin, end, UNROLL):
        next_us = load_rows(u_row, u_sl, offsets, exists, i + UNROLL, end, length, backwards, UNROLL, EVEN)
        next_deltas = load_rows(delta_row, delta_sl, offsets, exists, i + UNROLL, end, length, backwards, UNROLL, EVEN)
        if HAS_Z:
            zs = load_rows(z_row, z_sl, offsets, exists, i, end, length, backwards, UNROLL, EVEN)
        if SAVE_STATES:
            if i % CHUNK == 0:
                here = states_row + tl.cast(i // CHUNK, tl.int64) * dim * N
                tl.store(here + state_offsets, h, mask=state_mask)
        # Stores wait until the end of the turn: no later load may pass them.
        ys = ()
        for j in tl.static_range(UNROLL):
            t = position(i + j, end, length, backwards)
            x = us[j].to(tl.float32)
            dt = step_size(deltas[j].to(tl.float32), shift, i + j < end, SOFTPLUS)
            if CONST_B:
                Bt = B_tile
            else:
                Bt = tl.load(row_of(bc_row, t, 2 * BLOCK_N) + n)[None, :, None]
            if CONST_C:
                Ct = C_tile
            else:
                Ct = tl.load(row_of(bc_row, t, 2 * BLOCK_N) + BLOCK_N + n)[None, :, None]
            h = tl.exp2(dt[:, None, :] * A2) * h + (dt * x)[:, None, :] * Bt
            y = tl.sum(h * Ct, axis=1) + skip * x
            if HAS_Z:
                gate = zs[j].to(tl.float32)
                y = y * gate * sigmoid(gate) * scale
            ys = ys + (y,)
        for j in tl.static_range(UNROLL):
            here = row_of(out_row, position(i + j, end, length, backwards), out_sl)
            tl.store(here + offsets, ys[j].to(out.dtype.element_ty), mask=both(exists, i + j < end))
        us = next_us
        deltas = next_deltas

    if segment == n_segments - 1:
        tl.store(last + sequence * dim * N + state_offsets, h, mask=state_mask)
