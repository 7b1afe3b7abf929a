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
TIME_CYCLES = (9.5, 40)
BACKWARD_CYCLES = (40, 15)
SEGMENT_CYCLES = (9, 5)
"""Cycles of a scheduler for one step of a warp: for each update of a thread, and for the step."""
LAUNCH_CYCLES = 8000
"""One more launch, about 5 microseconds, in cycles."""
MIN_GAIN = 0.9
"""A more elaborate tiling must be predicted to take at most this share of the time of a plainer one."""
SECTOR_CHANNELS = 16
"""Channels of a 32-byte sector of memory in bfloat16."""
MAX_THREADS = 128
"""Of a thread block along time: its registers must leave room for others on the multiprocessor."""


class ForwardTiling(NamedTuple):
    """Each thread block owns `channels` channels, each with `time` threads of `unroll` steps a turn."""

    channels: int
    time: int
    unroll: int
    block_n: int

    def warps(self, warp: int = 32) -> int:
        """Warps of a thread block, of `warp` threads: one thread for each channel and stretch of time."""
        return max(1, self.channels * self.time // warp)


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


def forward_tiling(
    sequences: int, groups: int, group_dim: int, length: int, state: int, processors: int
) -> ForwardTiling:
    """The tiling for `sequences` (batch x directions) scans forward: one thread a channel, or 2 to 16 along time where
    that leaves the machine idle. Those own a whole sector's channels (a load then wastes no bandwidth), or fewer where
    multiprocessors would have none.
    """
    best, best_cost = ForwardTiling(32, 1, 16, power_of_two(state)), float("inf")
    for time in (1, 2, 4, 8, 16):
        channels = 32 if time == 1 else min(SECTOR_CHANNELS, MAX_THREADS // time)
        while channels * time > 32 and max(1, sequences) * groups * -(-group_dim // channels) < processors:
            channels //= 2
        tiling = best._replace(channels=channels, time=time)
        each, step = FORWARD_CYCLES if time == 1 else TIME_CYCLES
        steps = -(-length // (time * tiling.unroll)) * tiling.unroll
        programs = max(1, sequences) * groups * -(-group_dim // channels)
        cost = (each * state + step) * steps * _busiest(programs, tiling.warps(), processors)
        if cost < MIN_GAIN * best_cost:
            best, best_cost = tiling, cost
    return best


def backward_tiling(
    sequences: int, groups: int, group_dim: int, length: int, state: int, processors: int
) -> BackwardTiling:
    """The tiling for the gradient: 16 updates a thread and step, the states of a channel over 4 threads, and time in
    segments where that leaves the machine idle.

    Fewer channels a thread would take as long a step: their own work is then done by 4 threads alike.
    The sums over channels then cost 3 shuffles a state and those over states 2 shuffles a channel.
    """
    block_n = power_of_two(state)
    lanes = 8 if block_n <= 64 else max(1, 512 // block_n)
    tiling = BackwardTiling(max(1, min(4, 512 // (block_n * lanes))), lanes, 2, block_n, max(sizes.CHUNK, length))
    programs = max(1, sequences) * groups * -(-group_dim // (tiling.channels * tiling.lanes))
    step, summary = (c[0] * tiling.updates + c[1] for c in (BACKWARD_CYCLES, SEGMENT_CYCLES))
    best_cost = step * length * _busiest(programs, 1, processors)
    chunks = max(1, sizes.chunks(length))
    count = 2
    while count <= chunks:
        segment = -(-chunks // count) * sizes.CHUNK
        segments = -(-length // segment)
        cost = step * segment * _busiest(programs * segments, 1, processors)
        cost += summary * segment * _busiest(programs * (segments - 1), 1, processors) + 2 * LAUNCH_CYCLES
        if cost < MIN_GAIN * best_cost:
            tiling, best_cost = tiling._replace(segment=segment), cost
        count *= 2
    return tiling


def _busiest(programs: int, warps: int, processors: int) -> float:
    """Warps of the busiest scheduler; one with a single warp cannot hide its latency and counts for more."""
    at_once = processors * max(1, SUB_CORES // warps)
    return max(1.5, -(-programs // at_once) * max(1.0, warps / SUB_CORES))
