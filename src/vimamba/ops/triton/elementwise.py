"""Device functions that the kernels share: softplus, sigmoid, the work of a program and the order of steps.

exp(x) is exp2(x log2(e)): one MUFU.EX2 instruction, relative error 2 ulp.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
PADDING = tl.constexpr(256)
"""Rows of B and C are packed up to a multiple of so many steps: a multiple of every kernel's steps in one turn."""

# Coefficients of log1p(e) / e on [0, 1] (a Chebyshev fit; relative error 1.8e-7 in float32, which log2(1 + e)
# cannot give for small e, and small steps are what a trained model takes).
_P0 = tl.constexpr(1.0)
_P1 = tl.constexpr(-0.49999502301216125)
_P2 = tl.constexpr(0.33319270610809326)
_P3 = tl.constexpr(-0.24844369292259216)
_P4 = tl.constexpr(0.19111430644989014)
_P5 = tl.constexpr(-0.13674770295619965)
_P6 = tl.constexpr(0.07836166769266129)
_P7 = tl.constexpr(-0.02958850748836994)
_P8 = tl.constexpr(0.005253457929939032)


@triton.jit
def softplus(x):
    """log(1 + exp(x)): one exponential, nine multiply-adds, no logarithm."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    p = _P8 * e + _P7
    p = p * e + _P6
    p = p * e + _P5
    p = p * e + _P4
    p = p * e + _P3
    p = p * e + _P2
    p = p * e + _P1
    p = p * e + _P0
    return tl.where(x > 0.0, x, 0.0) + p * e


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow."""
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def outer(channels, lanes, LANES_FIRST: tl.constexpr):
    """Numbers of channels and of lanes as a column and a row, or as a row and a column if LANES_FIRST.

    A tile's axes lie as the compiler spreads them over threads, lanes first: from the last one in newer Triton, from
    the first one in older (see `scan.LANES_FIRST`).
    """
    if LANES_FIRST:
        return channels[None, :], lanes[:, None]
    else:
        return channels[:, None], lanes[None, :]


@triton.jit
def channel_tile(
    block, blocks_per_group, group_dim, CHANNELS: tl.constexpr, LANES: tl.constexpr, LANES_FIRST: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """The channels of a block as a (CHANNELS, LANES) tile, which of them exist (all, if EVEN), and their group.

    A block never spans two groups, so that one row of B and C serves all of it.
    """
    group = block // blocks_per_group
    local = (block % blocks_per_group) * (CHANNELS * LANES)
    c, lane = outer(tl.arange(0, CHANNELS), tl.arange(0, LANES), LANES_FIRST)
    local = local + c * LANES + lane
    if EVEN:
        exists = tl.full(local.shape, 1, tl.int1)
    else:
        exists = local < group_dim
    return group * group_dim + local, exists, group


@triton.jit
def share_of_work(
    groups, group_dim, blocks_per_group, batch, segments, first_segment, segment_length, length, reverse_mask,
    CHANNELS: tl.constexpr, LANES: tl.constexpr, LANES_FIRST: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """What a program works on: its channels (see `channel_tile`), its segment of time from step `begin` to `end`, and
    its sequence, which is batch element b of direction r, and whether that runs in reverse.
    """
    n_blocks = groups * blocks_per_group
    pid = tl.program_id(0)
    channel, exists, group = channel_tile(
        pid % n_blocks, blocks_per_group, group_dim, CHANNELS, LANES, LANES_FIRST, EVEN
    )  # fmt: skip
    segment = (pid // n_blocks) % segments + first_segment
    sequence = (pid // (n_blocks * segments)).to(tl.int64)
    b, r = sequence % batch, sequence // batch
    reverse = (reverse_mask >> r.to(tl.int32)) & 1
    begin = segment * segment_length
    end = tl.minimum(begin + segment_length, length)
    return channel, exists, group, segment, begin, end, sequence, b, r, reverse


@triton.jit
def state_tile(A, channel, exists, state_stride, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """The states of a tile of channels: their numbers, which exist, where each lies in a (dim, N) matrix, and
    A log2(e) of each.
    """
    n = tl.arange(0, BLOCK_N)
    mask = exists[:, None, :] & (n < N)[None, :, None]
    offsets = channel[:, None, :] * N + n[None, :, None] * state_stride
    return n, mask, offsets, tl.load(A + offsets, mask=mask, other=0.0) * LOG2E


@triton.jit
def packed_matrices(bc, sequence, groups, group, length, BLOCK_N: tl.constexpr):
    """Where the packed B and C of a sequence and group begin; see `pack`."""
    return bc + (sequence * groups + group) * (tl.cdiv(length, PADDING) * PADDING) * (2 * BLOCK_N)


@triton.jit
def matrix_row(rows, tile, step, n, BLOCK_N: tl.constexpr, CONSTANT: tl.constexpr):
    """A packed row, of `step`, as a (1, BLOCK_N, 1) tile; the matrix's own tile if it is the same at every step."""
    if CONSTANT:
        return tile
    else:
        return tl.load(row_of(rows, step, 2 * BLOCK_N) + n)[None, :, None]


@triton.jit
def step_size(raw, bias, valid, SOFTPLUS: tl.constexpr):
    """delta from its stored value; 0, a step that changes nothing, past the end."""
    delta = raw + bias
    if SOFTPLUS:
        delta = softplus(delta)
    return tl.where(valid, delta, 0.0)


@triton.jit
def position(step, length, reverse):
    """The token of a step of the recurrence."""
    return reverse * (length - 1) + (1 - 2 * reverse) * step


@triton.jit
def row_of(pointer, t, stride):
    """The address of row `t`; the product is 64 bits wide (2^31 elements and more)."""
    return pointer + tl.cast(t, tl.int64) * stride


@triton.jit
def walk(pointer, stride, length, reverse):
    """The row of step 0 of the recurrence, and how far it is from a step's row to the next one's."""
    return row_of(pointer, reverse * (length - 1), stride), (1 - 2 * reverse) * stride


@triton.jit
def both(mask, condition):
    """A mask where a scalar condition holds too; the comparison keeps it boolean in the interpreter."""
    return (mask & condition) != 0
