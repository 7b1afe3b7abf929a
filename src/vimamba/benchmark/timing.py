"""Time of several functions, taken in turns so that a disturbance of the machine meets them all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence

LEAST_ROUNDS = 3
BLOCK = 7  # runs of a model in its turn, where models push each other's weights out of the caches


def alternate(
    steps: Sequence[Callable[[], None]],
    repeats: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    block: int = 1,
) -> list[list[float]]:
    """Run the functions one after the other, round after round, and return the seconds of each in each round.

    Every other round goes backwards, so that none always follows the same one. The caller has run each once before.
    In a round each may run several times: the first runs bring back to the caches what the others pushed out of them.

    Args:
        steps: the functions.
        repeats: rounds at most.
        seconds: no round begins after this time, but there are at least three (fewer if `repeats` is).
        clock: seconds; for tests.
        block: runs in a round, of which the median counts; the first two do not, where there are more.
    """
    times: list[list[float]] = [[] for _ in steps]
    order = list(range(len(steps)))
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = clock()
        for done in range(repeats):
            if done >= LEAST_ROUNDS and clock() - start > seconds:
                break
            for i in order if done % 2 == 0 else order[::-1]:
                runs = []
                for _ in range(block):
                    begin = clock()
                    steps[i]()
                    runs.append(clock() - begin)
                times[i].append(statistics.median(runs[2:] or runs))
    finally:
        if collecting:
            gc.enable()
    return times


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, middle, high


def ratios(times: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """How many times as long as `base`: quartiles over the rounds of the quotient within a round."""
    return quartiles([a / b for a, b in zip(times, base, strict=True)])


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """The median of `ratios`."""
    return ratios(times, base)[1]
