"""The selective scan on the GPU, backward: recomputes the states of a chunk from its saved one, then walks it back.

Layout: a program owns CHANNELS x LANES channels of one sequence and direction, one warp; the 16 states of a channel
lie in 32 / LANES threads and each thread has CHANNELS channels, which balances the two kinds of sums that cross
threads: over states (for du, ddelta and y) and over channels (for dB and dC).
Within a chunk of 64 steps, newest chunk first: walk forward and keep the state every UNROLL steps in scratch memory
(L2), then for each group of UNROLL steps, last first: walk forward with the states in registers, walk back.
Parallel axis: channel blocks x segments of time x sequences x directions, all in one launch.
Bytes: u, delta, dout (and z) read twice, the second time from cache; du, ddelta (and dz) written; dB and dC added
in float32 by atomics where a group has several channel blocks (their order, so their last bit, can vary), or under
torch.use_deterministic_algorithms written in parts.
Operations for one element and state: 2 MUFU.EX2, about 9 FMUL and 6 FFMA, 3 to 5 SHFL.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vimamba.ops.triton.elementwise import (
    LOG2E,
    both,
    matrix_row,
    outer,
    packed_matrices,
    row_of,
    share_of_work,
    sigmoid,
    state_tile,
    step_size,
    walk,
)

STRIDES = [f"{tensor}_s{axis}" for tensor in ("u", "delta", "z", "dout", "du", "ddelta", "dz") for axis in "rbl"]
RUN_TIME = [*STRIDES, "channel_stride", "state_stride", "length", "segment_length", "batch", "n_segments", "dbc_part"]


@triton.jit
def load_rows(row, stride, offsets, mask, step, end, ROWS: tl.constexpr):
    """ROWS rows of a tile from step `step`, of which `row` is the row, as stored; zeros from step `end`."""
    rows = ()
    for j in tl.static_range(ROWS):
        rows = rows + (tl.load(row_of(row, j, stride) + offsets, mask=both(mask, step + j < end), other=0.0),)
    return rows


@triton.jit
def add_row(pointer, tile, valid, n, BLOCK_N: tl.constexpr, LANES_FIRST: tl.constexpr, ATOMIC: tl.constexpr):
    """Add a (CHANNELS, BLOCK_N, LANES) tile, summed over channels, first those of a thread, to a row of dB or dC."""
    row = tl.sum(tl.sum(tile, axis=2), axis=0) if LANES_FIRST else tl.sum(tl.sum(tile, axis=0), axis=1)
    if ATOMIC:
        tl.atomic_add(pointer + n, row, mask=both(n < BLOCK_N, valid), sem="relaxed")
    else:
        tl.store(pointer + n, row, mask=both(n < BLOCK_N, valid))


@triton.jit(do_not_specialize=RUN_TIME)
def scan_backward_kernel(
    u, delta, z, dout, A, bc, B_const, C_const, D, bias, states, carry, scratch,
    du, ddelta, dz, dA, dbc, dB_const, dC_const, dD, dbias,
    u_sr, u_sb, u_sl, delta_sr, delta_sb, delta_sl, z_sr, z_sb, z_sl,
    dout_sr, dout_sb, dout_sl, du_sr, du_sb, du_sl,
    ddelta_sr, ddelta_sb, ddelta_sl, dz_sr, dz_sb, dz_sl,
    channel_stride, state_stride, batch, groups, group_dim, blocks_per_group, length, n_segments,
    segment_length, n_states,
    reverse_mask, scale, dbc_part,
    N: tl.constexpr, BLOCK_N: tl.constexpr, CHANNELS: tl.constexpr, LANES: tl.constexpr, LANES_FIRST: tl.constexpr,
    UNROLL: tl.constexpr, CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, CONST_B: tl.constexpr, CONST_C: tl.constexpr, EVEN: tl.constexpr,
    HAS_CARRY: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    TILE: tl.constexpr = CHANNELS * BLOCK_N * LANES
    dim = groups * group_dim
    channel, exists, group, segment, begin, end, sequence, b, r, reverse = share_of_work(
        groups, group_dim, blocks_per_group, batch, n_segments, 0, segment_length, length, reverse_mask,
        CHANNELS, LANES, LANES_FIRST, EVEN,
    )  # fmt: skip
    slot = sequence * n_segments + segment
    n, state_mask, state_offsets, A2 = state_tile(A + r * dim * N, channel, exists, state_stride, N, BLOCK_N)
    B_tile = tl.load(B_const + state_offsets, mask=state_mask, other=0.0) if CONST_B else 0.0
    C_tile = tl.load(C_const + state_offsets, mask=state_mask, other=0.0) if CONST_C else 0.0
    shift = tl.load(bias + r * dim + channel * state_stride, mask=exists, other=0.0) if HAS_BIAS else 0.0
    skip = tl.load(D + r * dim + channel * state_stride, mask=exists, other=0.0) if HAS_D else 0.0
    if HAS_CARRY:
        g = tl.load(carry + slot * dim * N + state_offsets, mask=state_mask, other=0.0)
    else:
        g = tl.zeros(A2.shape, tl.float32)

    offsets = channel * channel_stride
    u_row, u_step = walk(u + r * u_sr + b * u_sb, u_sl, length, reverse)
    delta_row, delta_step = walk(delta + r * delta_sr + b * delta_sb, delta_sl, length, reverse)
    dout_row, dout_step = walk(dout + r * dout_sr + b * dout_sb, dout_sl, length, reverse)
    du_row, du_step = walk(du + r * du_sr + b * du_sb, du_sl, length, reverse)
    ddelta_row, ddelta_step = walk(ddelta + r * ddelta_sr + b * ddelta_sb, ddelta_sl, length, reverse)
    if HAS_Z:
        z_row, z_step = walk(z + r * z_sr + b * z_sb, z_sl, length, reverse)
        dz_row, dz_step = walk(dz + r * dz_sr + b * dz_sb, dz_sl, length, reverse)
    if not (CONST_B and CONST_C):
        bc_rows = packed_matrices(bc, sequence, groups, group, length, BLOCK_N)
        dbc_rows = packed_matrices(dbc, sequence, groups, group, length, BLOCK_N)
        if not ATOMIC:
            dbc_rows += (tl.program_id(0) % blocks_per_group).to(tl.int64) * dbc_part
    else:
        bc_rows = bc
    states_row = states + sequence * n_states * dim * N
    # The tile's own order in scratch; the run-time stride keeps the layout (see scan_forward).
    # 64-bit indices let the compiler turn all but one address into immediate offsets.
    lanes = (tl.arange(0, LANES) * state_stride).to(tl.int64)
    c, lane = outer(tl.arange(0, CHANNELS).to(tl.int64), lanes, LANES_FIRST)
    flat = (c[:, None, :] * BLOCK_N + n.to(tl.int64)[None, :, None]) * LANES + lane[:, None, :]
    scratch_row = scratch + tl.program_id(0).to(tl.int64) * (CHUNK // UNROLL) * TILE

    dA_tile = tl.zeros(A2.shape, tl.float32)
    if CONST_B:
        dB_tile = tl.zeros(A2.shape, tl.float32)
    if CONST_C:
        dC_tile = tl.zeros(A2.shape, tl.float32)
    dD_tile = tl.zeros(channel.shape, tl.float32)
    dbias_tile = tl.zeros(channel.shape, tl.float32)

    for back in range(0, tl.cdiv(end - begin, CHUNK)):
        first = begin + (tl.cdiv(end - begin, CHUNK) - 1 - back) * CHUNK
        stop = tl.minimum(first + CHUNK, end)
        # Adds 0, which the compiler cannot know: it would otherwise keep a tile of addresses in registers.
        unit = state_stride + (first >> 31)
        turns = tl.cdiv(stop - first, UNROLL)

        # 1. Forward through the chunk; the state before every turn goes to scratch.
        here = states_row + tl.cast(first // CHUNK, tl.int64) * dim * N
        h = tl.load(here + channel[:, None, :] * N + n[None, :, None] * unit, mask=state_mask, other=0.0)
        tl.debug_barrier()
        for turn in range(0, turns - 1):
            tl.store(scratch_row + turn * TILE + flat, h)
            i = first + turn * UNROLL
            us = load_rows(row_of(u_row, i, u_step), u_step, offsets, exists, i, stop, UNROLL)
            raws = load_rows(row_of(delta_row, i, delta_step), delta_step, offsets, exists, i, stop, UNROLL)
            for j in tl.static_range(UNROLL):
                dt = step_size(raws[j].to(tl.float32), shift, i + j < stop, SOFTPLUS)
                Bt = matrix_row(bc_rows, B_tile, i + j, n, BLOCK_N, CONST_B)
                h = tl.exp2(dt[:, None, :] * A2) * h + (dt * us[j].to(tl.float32))[:, None, :] * Bt
        tl.store(scratch_row + (turns - 1) * TILE + flat, h)
        tl.debug_barrier()

        # 2. Turn by turn from the last: forward with the states in registers, then back.
        for turn_back in range(0, turns):
            i = first + (turns - 1 - turn_back) * UNROLL
            h = tl.load(scratch_row + (turns - 1 - turn_back) * TILE + flat)
            us = load_rows(row_of(u_row, i, u_step), u_step, offsets, exists, i, stop, UNROLL)
            raws = load_rows(row_of(delta_row, i, delta_step), delta_step, offsets, exists, i, stop, UNROLL)
            douts = load_rows(row_of(dout_row, i, dout_step), dout_step, offsets, exists, i, stop, UNROLL)
            if HAS_Z:
                zs = load_rows(row_of(z_row, i, z_step), z_step, offsets, exists, i, stop, UNROLL)
            hs = ()
            decays = ()
            dts = ()
            dys = ()
            for j in tl.static_range(UNROLL):
                valid = i + j < stop
                dt = step_size(raws[j].to(tl.float32), shift, valid, SOFTPLUS)
                x = us[j].to(tl.float32)
                Bt = matrix_row(bc_rows, B_tile, i + j, n, BLOCK_N, CONST_B)
                Ct = matrix_row(bc_rows, C_tile, i + j, BLOCK_N + n, BLOCK_N, CONST_C)
                decay = tl.exp2(dt[:, None, :] * A2)
                hs = hs + (h,)
                decays = decays + (decay,)
                h = decay * h + (dt * x)[:, None, :] * Bt
                dy = tl.where(valid, douts[j].to(tl.float32) * scale, 0.0)
                if HAS_Z:
                    y = tl.sum(h * Ct, axis=1) + skip * x
                    gate = zs[j].to(tl.float32)
                    open_ = sigmoid(gate)
                    dgate = dy * y * open_ * (1.0 + gate * (1.0 - open_))
                    dz_here = row_of(dz_row, i + j, dz_step) + offsets
                    tl.store(dz_here, dgate.to(dz.dtype.element_ty), mask=both(exists, valid))
                    dy = dy * gate * open_
                if CONST_C:
                    dC_tile += dy[:, None, :] * h
                else:
                    dC_here = row_of(dbc_rows, i + j, 2 * BLOCK_N) + BLOCK_N
                    add_row(dC_here, dy[:, None, :] * h, valid, n, BLOCK_N, LANES_FIRST, ATOMIC)
                dts = dts + (dt,)
                dys = dys + (dy,)
            for j in tl.static_range(UNROLL - 1, -1, -1):
                valid = i + j < stop
                x = us[j].to(tl.float32)
                dt = dts[j]
                dy = dys[j]
                Bt = matrix_row(bc_rows, B_tile, i + j, n, BLOCK_N, CONST_B)
                Ct = matrix_row(bc_rows, C_tile, i + j, BLOCK_N + n, BLOCK_N, CONST_C)
                g += dy[:, None, :] * Ct
                dinput = tl.sum(g * Bt, axis=1)
                if CONST_B:
                    dB_tile += g * (dt * x)[:, None, :]
                else:
                    dB_here = row_of(dbc_rows, i + j, 2 * BLOCK_N)
                    add_row(dB_here, g * (dt * x)[:, None, :], valid, n, BLOCK_N, LANES_FIRST, ATOMIC)
                g *= decays[j]
                through = g * hs[j]
                dA_tile += through * dt[:, None, :]
                ddt = tl.sum(through * A2, axis=1) * (1.0 / LOG2E) + dinput * x
                dx = dinput * dt + skip * dy
                if SOFTPLUS:
                    ddt = ddt * sigmoid(raws[j].to(tl.float32) + shift)
                dD_tile += dy * x
                dbias_tile += tl.where(valid, ddt, 0.0)
                mask = both(exists, valid)
                tl.store(row_of(du_row, i + j, du_step) + offsets, dx.to(du.dtype.element_ty), mask=mask)
                ddelta_here = row_of(ddelta_row, i + j, ddelta_step) + offsets
                tl.store(ddelta_here, ddt.to(ddelta.dtype.element_ty), mask=mask)

    state_offsets = channel[:, None, :] * N + n[None, :, None] * (state_stride + (end >> 31))
    tl.store(dA + slot * dim * N + state_offsets, dA_tile, mask=state_mask)
    if CONST_B:
        tl.store(dB_const + slot * dim * N + state_offsets, dB_tile, mask=state_mask)
    if CONST_C:
        tl.store(dC_const + slot * dim * N + state_offsets, dC_tile, mask=state_mask)
    if HAS_D:
        tl.store(dD + slot * dim + channel * state_stride, dD_tile, mask=exists)
    if HAS_BIAS:
        tl.store(dbias + slot * dim + channel * state_stride, dbias_tile, mask=exists)
