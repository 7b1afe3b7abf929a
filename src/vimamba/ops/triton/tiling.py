"""How a scan is cut up for a GPU: which channels a thread block owns and into how many segments time is cut.

Pure functions of the shape and the number of multiprocessors. They compare a handful of tilings by a small model of
the machine, whose constants are those of the kernels' machine code (`benchmarks/gpu_static.py` prints them).
"""

from __future__ import annotations

from typing import NamedTuple

from vimamba.ops import sizes

SUB_CORES = 4
"""Schedulers of a multiprocessor: each issues one warp instruction a cycle."""
FORWARD_CYCLES = (8, 24)
SUMMARY_CYCLES = (8, 12)
BACKWARD_CYCLES = (40, 15)
SEGMENT_CYCLES = (9, 5)
"""Cycles of a scheduler for one step of a warp: for each update of a thread, and for the step; those of the segments'
summaries after those of the pass itself."""
LAUNCH_CYCLES = 40000
"""One more launch, about 20 microseconds outside a CUDA graph, in cycles."""
MIN_GAIN = 0.9
"""A more elaborate tiling must be predicted to take at most this share of the time of a plainer one."""
MAX_UPDATES = 64
"""State updates that a thread's turn of a few steps is written out to; half as many for sequences shorter than
LONG_ENOUGH steps: on an H100 the scan is then a fifth slower, and compiled in half the time."""
LONG_ENOUGH = 1024


class ForwardTiling(NamedTuple):
    """Each thread block owns lanes x sets channels, a thread one of each set, and `segment` steps of time, or all of
    them; a turn is `unroll` steps.
    """

    lanes: int
    sets: int
    unroll: int
    block_n: int
    segment: int

    def segments(self, length: int) -> int:
        return max(1, -(-length // self.segment))

    def warps(self, warp: int = 32) -> int:
        """Warps of a thread block, of `warp` threads."""
        return max(1, self.lanes // warp)


class BackwardTiling(NamedTuple):
    """Each thread block (one warp) owns channels x lanes channels and `segment` steps of time, or all of them."""

    channels: int
    lanes: int
    unroll: int
    block_n: int
    segment: int

    def segments(self, length: int) -> int:
        return max(1, -(-length // self.segment))

    @property
    def updates(self) -> int:
        """State updates of a thread in one step."""
        return max(1, self.channels * self.block_n * self.lanes // 32)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def padded_states(state: int) -> int:
    """States of a row of the packed B and C: a power of two, and 16 bytes at least."""
    return max(4, power_of_two(state))


def forward_tiling(
    sequences: int, groups: int, group_dim: int, length: int, state: int, processors: int
) -> ForwardTiling:
    """The tiling for `sequences` (batch x directions) scans forward: two channels a thread where their states fit into
    its registers (from about 100 states on not even one's do), and time in segments where that leaves the machine idle.
    """
    sets = 2 if group_dim > 32 and state <= 32 else 1
    lanes = 64 if group_dim > 32 * sets else 32
    updates = MAX_UPDATES if length >= LONG_ENOUGH else MAX_UPDATES // 2
    unroll = max(1, min(8, power_of_two(updates // (sets * state) + 1) // 2))
    tiling = ForwardTiling(lanes, sets, unroll, padded_states(state), max(sizes.CHUNK, length))
    programs = max(1, sequences) * groups * -(-group_dim // (lanes * sets))
    step, summary = (c[0] * sets * state + c[1] for c in (FORWARD_CYCLES, SUMMARY_CYCLES))
    return tiling._replace(segment=_segment(length, programs, tiling.warps(), step, summary, processors))


def backward_tiling(
    sequences: int, groups: int, group_dim: int, length: int, state: int, processors: int
) -> BackwardTiling:
    """The tiling for the gradient: 16 updates a thread and step, the states of a channel over 4 threads, and time in
    segments where that leaves the machine idle.

    Fewer channels a thread would take as long a step: their own work is then done by 4 threads alike.
    The sums over channels then cost 3 shuffles a state and those over states 2 shuffles a channel.
    """
    block_n = padded_states(state)
    lanes = 8 if block_n <= 64 else max(1, 512 // block_n)
    tiling = BackwardTiling(max(1, min(4, 512 // (block_n * lanes))), lanes, 2, block_n, max(sizes.CHUNK, length))
    programs = max(1, sequences) * groups * -(-group_dim // (tiling.channels * tiling.lanes))
    step, summary = (c[0] * tiling.updates + c[1] for c in (BACKWARD_CYCLES, SEGMENT_CYCLES))
    return tiling._replace(segment=_segment(length, programs, 1, step, summary, processors))


def _segment(length: int, programs: int, warps: int, step: int, summary: int, processors: int) -> int:
    """Steps of a segment for which `programs` thread blocks of so many warps are soonest done, when a step takes a warp
    `step` cycles and, where there are several segments, their summaries `summary` before.
    """
    best, best_cost = max(sizes.CHUNK, length), step * length * _busiest(programs, warps, processors)
    chunks = max(1, sizes.chunks(length))
    count = 2
    while count <= chunks:
        segment = -(-chunks // count) * sizes.CHUNK
        segments = -(-length // segment)
        cost = step * segment * _busiest(programs * segments, warps, processors)
        cost += summary * segment * _busiest(programs * (segments - 1), warps, processors) + 2 * LAUNCH_CYCLES
        if cost < MIN_GAIN * best_cost:
            best, best_cost = segment, cost
        count *= 2
    return best


def _busiest(programs: int, warps: int, processors: int) -> float:
    """Warps of the busiest scheduler; one with a single warp cannot hide its latency and counts for more."""
    at_once = processors * max(1, SUB_CORES // warps)
    return max(1.5, -(-programs // at_once) * max(1.0, warps / SUB_CORES))
