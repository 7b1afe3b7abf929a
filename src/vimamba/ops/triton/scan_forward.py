"""The selective scan on the GPU, forward: every thread holds the states of its channels and takes one step at a time.

Layout: a program owns LANES x SETS channels of one sequence and direction and a segment of time. A thread has one
channel of each set, with all N states in registers; B and C of a step are read once for all its channels. They are
loaded a step before they are needed, u and delta AHEAD turns of UNROLL steps: there are too few warps to hide latency.
Parallel axis: channel blocks x segments of time x sequences x directions, all in one launch. With more than one segment
the same kernel runs before without the outputs, to find what each segment does to the state (see `scan_segments`).
Bytes: u, delta (and z) read and y written once; B and C, float32 and shared by all channels of a group, come from L1,
packed in rows, of which a thread loads 16 bytes at a time.
Operations for one element and state: 1 MUFU.EX2, 2 FMUL, 2 FFMA, and 2 / SETS words from L1.

All tensors have one axis, the threads: with more, releases of Triton differ in which axis they spread over the threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vimamba.ops.triton.elementwise import LOG2E, PADDING, both, packed_matrices, row_of, sigmoid, step_size, walk

STRIDES = [f"{tensor}_s{axis}" for tensor in ("u", "delta", "z", "out") for axis in "rbl"]
RUN_TIME = [*STRIDES, "channel_stride", "length", "segment_length", "batch", "segments", "n_segments", "n_states"]


@triton.jit
def load_matrix_row(row, LANES: tl.constexpr, N: tl.constexpr):
    """The first N elements, at least 4 of which there are, of a packed row: each the same in all threads."""
    everywhere = row + tl.zeros([LANES, 1], tl.int32)
    elements = ()
    for k in tl.static_range((N + 3) // 4):
        four = tl.load(everywhere + (4 * k + tl.arange(0, 4))[None, :])
        even, odd = tl.split(tl.reshape(four, [LANES, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        elements = elements + (first, second, third, fourth)
    return elements


@triton.jit
def load_channel_matrix(matrix, channels, exists, N: tl.constexpr, SETS: tl.constexpr):
    """The rows of a (dim, N) matrix of a thread's channels, one after the other."""
    elements = ()
    for k in tl.static_range(SETS):
        for n in tl.static_range(N):
            elements = elements + (tl.load(matrix + channels[k] * N + n, mask=exists[k], other=0.0),)
    return elements


@triton.jit
def load_steps(row, stride, offsets, exists, step, end, UNROLL: tl.constexpr, SETS: tl.constexpr):
    """UNROLL steps from `step` of a thread's channels, as stored; zeros from step `end`."""
    elements = ()
    for j in tl.static_range(UNROLL):
        here = row_of(row, step + j, stride)
        for k in tl.static_range(SETS):
            mask = both(exists[k], step + j < end)
            elements = elements + (tl.load(here + offsets[k], mask=mask, other=0.0),)
    return elements


@triton.jit
def without_first(elements, COUNT: tl.constexpr):
    """A tuple without its first COUNT elements."""
    rest = ()
    for k in tl.static_range(len(elements) - COUNT):
        rest = rest + (elements[COUNT + k],)
    return rest


@triton.jit
def store_states(pointer, channels, exists, hs, N: tl.constexpr, SETS: tl.constexpr):
    """Store the states of a thread's channels to a (dim, N) matrix."""
    for k in tl.static_range(SETS):
        for n in tl.static_range(N):
            tl.store(pointer + channels[k] * N + n, hs[k * N + n], mask=exists[k])


@triton.jit(do_not_specialize=RUN_TIME)
def scan_forward_kernel(
    u, delta, z, out, A, bc, B_const, C_const, D, bias, states, carry, decay, last,
    u_sr, u_sb, u_sl, delta_sr, delta_sb, delta_sl,
    z_sr, z_sb, z_sl, out_sr, out_sb, out_sl,
    channel_stride, batch, groups, group_dim, blocks_per_group, length, segments, n_segments, segment_length, n_states,
    reverse_mask, scale,
    N: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr, SETS: tl.constexpr, UNROLL: tl.constexpr,
    AHEAD: tl.constexpr, CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, CONST_B: tl.constexpr, CONST_C: tl.constexpr, EVEN: tl.constexpr,
    SAVE_STATES: tl.constexpr, HAS_CARRY: tl.constexpr, SUMMARY: tl.constexpr,
):  # fmt: skip
    """The outputs of the first `segments` of `n_segments`, each from the state in `carry` if HAS_CARRY; as a SUMMARY,
    only what they make of an initial state of zero, to `carry`, and their sum of delta, to `decay`.
    """
    dim = groups * group_dim
    n_blocks = groups * blocks_per_group
    pid = tl.program_id(0)
    group = (pid % n_blocks) // blocks_per_group
    segment = (pid // n_blocks) % segments
    sequence = (pid // (n_blocks * segments)).to(tl.int64)
    b, r = sequence % batch, sequence // batch
    reverse = (reverse_mask >> r.to(tl.int32)) & 1
    begin = segment * segment_length
    end = tl.minimum(begin + segment_length, length)
    slot = sequence * n_segments + segment

    channels, exists, offsets, shifts, skips, spent = (), (), (), (), (), ()
    for k in tl.static_range(SETS):
        local = ((pid % blocks_per_group) * SETS + k) * LANES + tl.arange(0, LANES)
        channel = group * group_dim + local
        real = tl.full([LANES], 1, tl.int1) if EVEN else local < group_dim
        nothing = tl.zeros([LANES], tl.float32)
        channels, exists, offsets = channels + (channel,), exists + (real,), offsets + (channel * channel_stride,)
        shifts = shifts + (tl.load(bias + r * dim + channel, mask=real, other=0.0) if HAS_BIAS else nothing,)
        skips = skips + (tl.load(D + r * dim + channel, mask=real, other=0.0) if HAS_D else nothing,)
        spent = spent + (nothing,)
    As = load_channel_matrix(A + r * dim * N, channels, exists, N, SETS)
    A2s, hs = (), ()
    for k in tl.static_range(SETS * N):
        A2s = A2s + (As[k] * LOG2E,)
    if HAS_CARRY:
        hs = load_channel_matrix(carry + slot * dim * N, channels, exists, N, SETS)
    else:
        for _ in tl.static_range(SETS * N):
            hs = hs + (tl.zeros([LANES], tl.float32),)
    if CONST_B:
        Bs = load_channel_matrix(B_const, channels, exists, N, SETS)
    if CONST_C and not SUMMARY:
        Cs = load_channel_matrix(C_const, channels, exists, N, SETS)
    bc_rows = bc if CONST_B and CONST_C else packed_matrices(bc, sequence, groups, group, length, BLOCK_N)
    states_rows = states + sequence * n_states * dim * N
    u_row, u_step = walk(u + r * u_sr + b * u_sb, u_sl, length, reverse)
    delta_row, delta_step = walk(delta + r * delta_sr + b * delta_sb, delta_sl, length, reverse)
    out_row, out_step = walk(out + r * out_sr + b * out_sb, out_sl, length, reverse)
    if HAS_Z:
        z_row, z_step = walk(z + r * z_sr + b * z_sb, z_sl, length, reverse)

    raws, us = (), ()
    for k in tl.static_range(AHEAD):
        i = begin + k * UNROLL
        raws = raws + load_steps(delta_row, delta_step, offsets, exists, i, end, UNROLL, SETS)
        us = us + load_steps(u_row, u_step, offsets, exists, i, end, UNROLL, SETS)
    EARLY: tl.constexpr = N <= 32  # the rows of more states do not fit into the registers twice
    last_row = tl.cdiv(length, PADDING) * PADDING - 1
    if EARLY and not CONST_B:
        next_Bs = load_matrix_row(row_of(bc_rows, begin, 2 * BLOCK_N), LANES, N)
    if EARLY and not CONST_C and not SUMMARY:
        next_Cs = load_matrix_row(row_of(bc_rows, begin, 2 * BLOCK_N) + BLOCK_N, LANES, N)
    for start in range(begin, end, UNROLL):
        i = start + AHEAD * UNROLL
        raws = raws + load_steps(delta_row, delta_step, offsets, exists, i, end, UNROLL, SETS)
        us = us + load_steps(u_row, u_step, offsets, exists, i, end, UNROLL, SETS)
        if SAVE_STATES:
            if start % CHUNK == 0:
                here = states_rows + tl.cast(start // CHUNK, tl.int64) * (dim * N)
                store_states(here, channels, exists, hs, N, SETS)
        for j in tl.static_range(UNROLL):
            i = start + j
            following = tl.minimum(i + 1, last_row) if EARLY else i
            if not CONST_B:
                Bs = load_matrix_row(row_of(bc_rows, following, 2 * BLOCK_N), LANES, N)
                if EARLY:
                    Bs, next_Bs = next_Bs, Bs
            if not CONST_C and not SUMMARY:
                Cs = load_matrix_row(row_of(bc_rows, following, 2 * BLOCK_N) + BLOCK_N, LANES, N)
                if EARLY:
                    Cs, next_Cs = next_Cs, Cs
            new_hs, new_spent = (), ()
            for k in tl.static_range(SETS):
                x = us[j * SETS + k].to(tl.float32)
                dt = step_size(raws[j * SETS + k].to(tl.float32), shifts[k], i < end, SOFTPLUS)
                added, y = dt * x, skips[k] * x
                new_spent = new_spent + (spent[k] + dt,)
                for n in tl.static_range(N):
                    B_n = Bs[k * N + n] if CONST_B else Bs[n]
                    h = tl.exp2(dt * A2s[k * N + n]) * hs[k * N + n] + added * B_n
                    if not SUMMARY:
                        y += h * (Cs[k * N + n] if CONST_C else Cs[n])
                    new_hs = new_hs + (h,)
                if not SUMMARY:
                    mask = both(exists[k], i < end)
                    opening = scale
                    if HAS_Z:
                        gate = tl.load(row_of(z_row, i, z_step) + offsets[k], mask=mask, other=0.0).to(tl.float32)
                        opening = gate * sigmoid(gate) * scale
                    tl.store(row_of(out_row, i, out_step) + offsets[k], (y * opening).to(out.dtype.element_ty), mask)
            hs, spent = new_hs, new_spent
        raws, us = without_first(raws, UNROLL * SETS), without_first(us, UNROLL * SETS)
    if SUMMARY:
        store_states(carry + slot * dim * N, channels, exists, hs, N, SETS)
        for k in tl.static_range(SETS):
            tl.store(decay + slot * dim + channels[k], spent[k], mask=exists[k])
    elif segment == n_segments - 1:
        store_states(last + sequence * dim * N, channels, exists, hs, N, SETS)
