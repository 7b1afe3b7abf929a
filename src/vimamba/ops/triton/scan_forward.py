"""The selective scan on the GPU, forward.

Layout: a program owns CHANNELS channels of one sequence and direction; TIME threads share a channel and each takes
UNROLL consecutive steps of a turn of TIME x UNROLL steps, state after state. With one thread a channel it simply runs
them. With more, for too few channels to fill the machine, a thread first runs its steps from zero, keeping the decays;
the threads of a channel exchange what their steps do to the state (a scan over TIME pairs, by shuffles); and each runs
its steps again from the state that truly enters them, which costs no second exponential.
Parallel axis: channel blocks x sequences x directions x TIME, all in one launch.
Bytes: u, delta (and z) read and y written once; B and C, float32 and shared by all channels of a group, come from L1,
packed in columns, of which a thread loads 16 bytes at a time; the state between turns lies in `last`.
Operations for one element and state: 1 MUFU.EX2, 2 FMUL, 2 FFMA; with TIME > 1 one more FFMA, and 6 SHFL for a
thread's UNROLL steps of a state.

All tensors have one axis, the threads: with more, releases of Triton differ in which axis they spread over the threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vimamba.ops.triton.elementwise import LOG2E, PADDING, packed_matrices, row_of, sigmoid, step_size, walk

STRIDES = [f"{tensor}_s{axis}" for tensor in ("u", "delta", "z", "out") for axis in "rbl"]
RUN_TIME = [*STRIDES, "channel_stride", "length", "batch"]


@triton.jit
def one_after_another(decay, added, next_decay, next_added):
    """What two successive stretches of steps do to a state: its decay and what is added to it."""
    return decay * next_decay, next_decay * added + next_added


@triton.jit
def load_steps(columns, UNROLL: tl.constexpr):
    """For each of UNROLL steps, a multiple of 4, the elements of columns that begin at the given pointers."""
    rows = ()
    for k in tl.static_range(UNROLL // 4):
        four = tl.load(columns[:, None] + (4 * k + tl.arange(0, 4))[None, :])
        even, odd = tl.split(tl.reshape(four, [columns.shape[0], 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        rows = rows + (first, second, third, fourth)
    return rows


@triton.jit(do_not_specialize=RUN_TIME)
def scan_forward_kernel(
    u, delta, z, out, A, bc, B_const, C_const, D, bias, states, last,
    u_sr, u_sb, u_sl, delta_sr, delta_sb, delta_sl,
    z_sr, z_sb, z_sl, out_sr, out_sb, out_sl,
    channel_stride, batch, groups, group_dim, blocks_per_group, length, n_states, reverse_mask, scale,
    N: tl.constexpr, BLOCK_N: tl.constexpr, CHANNELS: tl.constexpr, TIME: tl.constexpr, UNROLL: tl.constexpr,
    CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    CONST_B: tl.constexpr, CONST_C: tl.constexpr, EVEN: tl.constexpr, SAVE_STATES: tl.constexpr,
):  # fmt: skip
    LANES: tl.constexpr = CHANNELS * TIME
    dim = groups * group_dim
    n_blocks = groups * blocks_per_group
    pid = tl.program_id(0)
    lane = tl.arange(0, LANES)
    rank = lane % TIME  # the thread's place among those of its channel
    is_first = rank == 0
    previous = tl.broadcast_to((tl.arange(0, TIME)[None, :] + (TIME - 1)) % TIME, [CHANNELS, TIME])
    group = (pid % n_blocks) // blocks_per_group
    local = (pid % blocks_per_group) * CHANNELS + lane // TIME
    exists = tl.full([LANES], 1, tl.int1) if EVEN else local < group_dim
    channel = group * group_dim + local
    sequence = (pid // n_blocks).to(tl.int64)
    b, r = sequence % batch, sequence // batch
    reverse = (reverse_mask >> r.to(tl.int32)) & 1

    shift = tl.load(bias + r * dim + channel, mask=exists, other=0.0) if HAS_BIAS else 0.0
    skip = tl.load(D + r * dim + channel, mask=exists, other=0.0) if HAS_D else 0.0
    state_offset = channel * N
    A_rows, last_rows = A + r * dim * N, last + sequence * dim * N
    states_rows = states + sequence * n_states * dim * N
    offsets = channel * channel_stride
    u_row, u_step = walk(u + r * u_sr + b * u_sb, u_sl, length, reverse)
    delta_row, delta_step = walk(delta + r * delta_sr + b * delta_sb, delta_sl, length, reverse)
    out_row, out_step = walk(out + r * out_sr + b * out_sb, out_sl, length, reverse)
    if HAS_Z:
        z_row, z_step = walk(z + r * z_sr + b * z_sb, z_sl, length, reverse)
    steps = tl.cdiv(length, PADDING) * PADDING
    bc_columns = bc if CONST_B and CONST_C else packed_matrices(bc, sequence, groups, group, length, BLOCK_N)

    for start in range(0, length, TIME * UNROLL):
        i = start + rank * UNROLL
        left = tl.where(exists, length - i, 0)
        us, deltas = row_of(u_row, i, u_step) + offsets, row_of(delta_row, i, delta_step) + offsets
        dts, inputs, ys = (), (), ()
        elapsed = tl.zeros([LANES], tl.float32)
        for j in tl.static_range(UNROLL):
            valid = j < left
            raw = tl.load(row_of(deltas, j, delta_step), mask=valid, other=0.0).to(tl.float32)
            x = tl.load(row_of(us, j, u_step), mask=valid, other=0.0).to(tl.float32)
            dt = step_size(raw, shift, valid, SOFTPLUS)
            dts, inputs, ys = dts + (dt,), inputs + (dt * x,), ys + (skip * x,)
            elapsed += dt
        for n in range(0, N):
            A2 = tl.load(A_rows + (state_offset + n), mask=exists, other=0.0) * LOG2E
            entering = tl.load(last_rows + (state_offset + n), mask=exists & is_first, other=0.0)
            if CONST_B:
                B_n = tl.load(B_const + (state_offset + n), mask=exists, other=0.0)
            else:
                Bs = load_steps(bc_columns + n * steps + i, UNROLL)
            if CONST_C:
                C_n = tl.load(C_const + (state_offset + n), mask=exists, other=0.0)
            else:
                Cs = load_steps(bc_columns + (BLOCK_N + n) * steps + i, UNROLL)
            if TIME == 1:
                h = entering
            else:
                # What this thread's steps do to the state, then to what enters them.
                effect = tl.zeros([LANES], tl.float32)
                decays, added = (), ()
                for j in tl.static_range(UNROLL):
                    decay, new = tl.exp2(dts[j] * A2), inputs[j] * (B_n if CONST_B else Bs[j])
                    effect = decay * effect + new
                    decays, added = decays + (decay,), added + (new,)
                whole = tl.exp2(elapsed * A2)
                effect = tl.where(is_first, whole * entering + effect, effect)
                pairs = (tl.reshape(whole, [CHANNELS, TIME]), tl.reshape(effect, [CHANNELS, TIME]))
                _, after = tl.associative_scan(pairs, 1, one_after_another)
                # Each thread gets the state after its predecessor's steps, the first one that after the last's: the
                # state of the next turn.
                after = tl.reshape(tl.gather(after, previous, 1), [LANES])
                tl.store(last_rows + (state_offset + n), after, mask=exists & is_first)
                h = tl.where(is_first, entering, after)
            if SAVE_STATES:
                here = states_rows + ((i // CHUNK).to(tl.int64) * (dim * N) + (state_offset + n))
                tl.store(here, h, mask=(i % CHUNK == 0) & (left > 0))
            new_ys = ()
            for j in tl.static_range(UNROLL):
                if TIME == 1:
                    h = tl.exp2(dts[j] * A2) * h + inputs[j] * (B_n if CONST_B else Bs[j])
                else:
                    h = decays[j] * h + added[j]
                new_ys = new_ys + (ys[j] + h * (C_n if CONST_C else Cs[j]),)
            ys = new_ys
            if TIME == 1:
                tl.store(last_rows + (state_offset + n), h, mask=exists)
        outs = row_of(out_row, i, out_step) + offsets
        if HAS_Z:
            zs = row_of(z_row, i, z_step) + offsets
        for j in tl.static_range(UNROLL):
            valid = j < left
            opening = scale
            if HAS_Z:
                gate = tl.load(row_of(zs, j, z_step), mask=valid, other=0.0).to(tl.float32)
                opening = gate * sigmoid(gate) * scale
            tl.store(row_of(outs, j, out_step), (ys[j] * opening).to(out.dtype.element_ty), mask=valid)
