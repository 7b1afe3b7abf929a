"""How a scan is cut up for a GPU: which channels a thread block owns and into how many segments time is cut.

Pure functions of the shape and the number of multiprocessors. They compare a handful of tilings by a small model of
the machine, whose constants are those of the kernels' machine code (`benchmarks/gpu_static.py` prints them).
"""

from __future__ import annotations

from typing import NamedTuple

from vimamba.ops.backends import CHUNK

SUB_CORES = 4
"""Schedulers of a multiprocessor: each issues one warp instruction a cycle."""
FORWARD_CYCLES = (7.5, 35, 30)
BACKWARD_CYCLES = (40.0, 15, 0)
"""Cycles of a scheduler for one step of a warp: for each update of a thread, for the step, and where rows of B and C
cannot be loaded 16 bytes at a time."""
LAUNCH_CYCLES = 8000
"""One more launch, about 5 microseconds, in cycles."""
MIN_GAIN = 0.9
"""A more elaborate tiling must be predicted to take at most this share of the time of a plainer one."""


class Tiling(NamedTuple):
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


def forward_tiling(sequences: int, groups: int, group_dim: int, length: int, state: int, processors: int) -> Tiling:
    """The tiling for `sequences` (batch x directions) scans forward.

    Many sequences: 2 channels a thread, so that a row of B and C is loaded once for 64 channels. Fewer: 1 channel a
    thread, then the states of a channel over 2 or 4 threads, and time in segments where even that leaves
    the machine idle (a segment's summary costs another exponential for each update).
    """
    block_n = power_of_two(state)
    shapes = [(2, 32), (1, 32), (1, 16), (1, 8), (1, 4), (1, 2), (1, 1)]
    fitting = [s for s in shapes if s[0] * s[1] * block_n // 32 <= 32] or shapes[-1:]
    tilings = [Tiling(c, lanes, 4, block_n, 0) for c, lanes in fitting[:4]]
    return _cheapest(tilings, sequences, groups, group_dim, length, processors, FORWARD_CYCLES, 1.9)


def backward_tiling(sequences: int, groups: int, group_dim: int, length: int, state: int, processors: int) -> Tiling:
    """The tiling for the gradient: 16 updates a thread and step, the states of a channel over 4 threads.

    Fewer channels a thread would take as long a step: their own work is then done by 4 threads alike.
    The sums over channels then cost 3 shuffles a state and those over states 2 shuffles a channel.
    """
    block_n = power_of_two(state)
    lanes = 8 if block_n <= 64 else max(1, 512 // block_n)
    most = max(1, min(8, 512 // (block_n * lanes)))
    tilings = [Tiling(most, lanes, 2, block_n, 0)]
    return _cheapest(tilings, sequences, groups, group_dim, length, processors, BACKWARD_CYCLES, 1.4)


def _cheapest(
    tilings: list[Tiling],
    sequences: int,
    groups: int,
    group_dim: int,
    length: int,
    processors: int,
    cycles: tuple[float, float, float],
    segment_work: float,
) -> Tiling:
    schedulers = SUB_CORES * processors
    best, best_cost = tilings[0]._replace(segment=max(CHUNK, length)), float("inf")
    chunks = max(1, -(-length // CHUNK))
    for tiling in tilings:
        step = cycles[0] * tiling.updates + cycles[1] + cycles[2] * (tiling.lanes < 32)
        warps = max(1, sequences) * groups * -(-group_dim // (tiling.channels * tiling.lanes))
        count = 1
        while count <= chunks:
            segment = -(-chunks // count) * CHUNK
            segments = -(-length // segment) if length else 1
            # A scheduler with one warp cannot hide its latency.
            busiest = max(1.5, -(-warps * segments // schedulers))
            cost = step * busiest * min(segment, length) * (segment_work if segments > 1 else 1.0)
            cost += 2 * LAUNCH_CYCLES * (segments > 1)
            if cost < MIN_GAIN * best_cost:
                best, best_cost = tiling._replace(segment=segment if segments > 1 else max(CHUNK, length)), cost
            count *= 2
    return best
