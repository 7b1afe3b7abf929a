"""Parallelism along time: what a segment of the sequence does to the state that enters it.

A scan is linear in its incoming state, so a segment is summarised by the state it ends with when it starts from
zero and by the decay of what enters, exp(A sum(delta)): the product of all decays costs one exponential.
Three launches: `segment_kernel` summarises every segment (all in parallel), `carry_kernel` passes states from
segment to segment (short and sequential), and the scan itself then runs on every segment from its true state.
The gradient of the state runs the other way through the same three steps: g = decay (g + C dy).

Layout and parallel axis: as in scan_forward. Bytes: delta and u (or dout, z) once more. Operations for one element
and state: 1 MUFU.EX2, 2 FMUL, 1 FFMA: about as much again as the scan, which is why only small problems do this.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vimamba.ops.triton.elementwise import (
    LOG2E,
    both,
    position,
    row_of,
    share_of_work,
    sigmoid,
    state_tile,
    step_size,
)

STRIDES = [f"{tensor}_s{axis}" for tensor in ("x", "delta", "z") for axis in "rbl"]


@triton.jit(
    do_not_specialize=[*STRIDES, "channel_stride", "state_stride", "length", "segment_length", "batch", "n_segments"]
)
def segment_kernel(
    x, delta, z, A, bc, M_const, bias, summary, decay,
    x_sr, x_sb, x_sl, delta_sr, delta_sb, delta_sl, z_sr, z_sb, z_sl,
    channel_stride, state_stride, batch, groups, group_dim, blocks_per_group, length, n_segments, segment_length,
    reverse_mask, scale,
    N: tl.constexpr, BLOCK_N: tl.constexpr, CHANNELS: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, CONST: tl.constexpr,
    GRADIENT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Summaries of all segments but the last, or for the gradient (x is dout then) but the first."""
    dim = groups * group_dim
    channel, exists, group, segment, begin, end, sequence, b, r, backwards = share_of_work(
        groups, group_dim, blocks_per_group, batch, n_segments - 1, 1 if GRADIENT else 0, segment_length, length,
        reverse_mask, CHANNELS, LANES, EVEN,
    )  # fmt: skip
    n, state_mask, state_offsets, A2 = state_tile(A + r * dim * N, channel, exists, state_stride, N, BLOCK_N)
    if CONST:
        M_tile = tl.load(M_const + state_offsets, mask=state_mask, other=0.0)
    shift = tl.load(bias + r * dim + channel * state_stride, mask=exists, other=0.0) if HAS_BIAS else 0.0
    offsets = channel * channel_stride
    x_row = x + r * x_sr + b * x_sb
    delta_row = delta + r * delta_sr + b * delta_sb
    if GRADIENT and HAS_Z:
        z_row = z + r * z_sr + b * z_sb
    if not CONST:
        bc_row = bc + (sequence * groups + group) * length * (2 * BLOCK_N) + (BLOCK_N if GRADIENT else 0)

    h = tl.zeros([CHANNELS, BLOCK_N, LANES], tl.float32)
    total = tl.zeros([CHANNELS, LANES], tl.float32)
    for start in range(begin, end, UNROLL):
        for j in tl.static_range(UNROLL):
            # The gradient walks the steps of the segment from its last to its first.
            i = (begin + end - 1 - (start + j)) if GRADIENT else start + j
            valid = start + j < end
            t = position(tl.maximum(i, begin), end, length, backwards)
            mask = both(exists, valid)
            raw = tl.load(row_of(delta_row, t, delta_sl) + offsets, mask=mask, other=0.0).to(tl.float32)
            value = tl.load(row_of(x_row, t, x_sl) + offsets, mask=mask, other=0.0).to(tl.float32)
            if CONST:
                Mt = M_tile
            else:
                Mt = tl.load(row_of(bc_row, t, 2 * BLOCK_N) + n)[None, :, None]
            dt = step_size(raw, shift, valid, SOFTPLUS)
            a = tl.exp2(dt[:, None, :] * A2)
            if GRADIENT:
                if HAS_Z:
                    gate = tl.load(row_of(z_row, t, z_sl) + offsets, mask=mask, other=0.0).to(tl.float32)
                    value = value * gate * sigmoid(gate) * scale
                h = a * (h + value[:, None, :] * Mt)
            else:
                h = a * h + (dt * value)[:, None, :] * Mt
            total += dt
    slot = sequence * n_segments + segment
    tl.store(summary + slot * dim * N + state_offsets, h, mask=state_mask)
    tl.store(decay + slot * dim + channel * state_stride, total, mask=exists)


@triton.jit(do_not_specialize=["total", "state_size", "n_segments", "batch"])
def carry_kernel(
    summary, decay, A, initial, total, state_size, n_segments, batch,
    N: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """Replace every segment's summary with the state (or gradient) that enters it; one thread a state element."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = index < total
    sequence, element = index // state_size, index % state_size
    A2 = tl.load(A + (sequence // batch) * state_size + element, mask=exists, other=0.0) * LOG2E
    if HAS_INITIAL:
        h = tl.load(initial + index, mask=exists, other=0.0)
    else:
        h = tl.zeros([BLOCK], tl.float32)
    for k in range(0, n_segments):
        segment = n_segments - 1 - k if GRADIENT else k
        slot = sequence * n_segments + segment
        inside = both(exists, k < n_segments - 1)
        local = tl.load(summary + slot * state_size + element, mask=inside, other=0.0)
        spent = tl.load(decay + (slot * state_size + element) // N, mask=inside, other=0.0)
        tl.store(summary + slot * state_size + element, h, mask=exists)
        h = tl.exp2(A2 * spent) * h + local
