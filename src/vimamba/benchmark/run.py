"""A whole comparison: cost of every entry, memory in fresh processes, then time in turns."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

from vimamba.benchmark import memory
from vimamba.benchmark.entries import Cost, Entry, build, cost, step_of
from vimamba.benchmark.timing import alternate, quartiles, ratio


@dataclasses.dataclass
class Result:
    """What was measured of an entry. Without times if `error` says why it could not run.

    `relative` is its time as a multiple of the first entry's that ran with it.
    """

    entry: Entry
    name: str
    cost: Cost
    seconds: list[float] = dataclasses.field(default_factory=list)
    relative: float | None = None
    peak_bytes: int | None = None
    error: str | None = None

    @property
    def median(self) -> float | None:
        return quartiles(self.seconds)[1] if self.seconds else None

    @property
    def images_per_second(self) -> float | None:
        return self.entry.batch / self.median if self.median else None


def plan(entries: Sequence[Entry]) -> list[Result]:
    """The entries with their costs, without the repetitions (of attention kinds for a model that has no attention).

    Raises:
        UserError: a model is unknown or does not take images of its size.
    """
    results: list[Result] = []
    seen: set[tuple] = set()
    for entry in entries:
        key = (entry.model, str(entry.model_args), entry.size)
        counted = cost(entry)
        shown = f"{entry.model} {entry.attention}" if counted.attends else entry.model
        mode = "" if entry.mode == "eager" else f" {entry.mode}"
        if (key, shown, mode, entry.combination) not in seen:
            seen.add((key, shown, mode, entry.combination))
            results.append(Result(entry, (entry.label or shown) + mode, counted))
    return results


def groups(results: Sequence[Result]) -> Iterator[list[Result]]:
    """Results to compare with each other, in order of pass, type, batch and size."""
    ordered = sorted(results, key=lambda result: result.entry.combination)
    for _, group in itertools.groupby(ordered, key=lambda result: result.entry.combination):
        yield list(group)


def measure(
    entries: Sequence[Entry],
    repeats: int = 20,
    seconds: float = 10.0,
    with_memory: bool = True,
    report: Callable[[str], None] = lambda line: None,
    block: int = 1,
) -> list[Result]:
    """Measure the entries; those that share pass, type, batch and size take turns.

    Args:
        entries: what to measure.
        repeats: rounds at most for each group.
        seconds: time for the rounds of a group; there are at least three rounds.
        with_memory: also measure the peak memory of entries in eager mode (see `vimamba.benchmark.memory`).
        report: is told what is being done.
        block: runs in a round, see `timing.alternate`.

    Returns:
        Results in groups; an entry that ran out of memory has an `error` and no times.

    Raises:
        UserError: a model is unknown or does not take images of its size.
    """
    measured = []
    for group in groups(plan(entries)):
        passes, dtype, batch, size = group[0].entry.combination
        what = f"{passes} {size} px batch {batch} {dtype}"
        if with_memory:
            for result in group:
                if result.entry.mode == "eager":
                    report(f"{what}: memory of {result.name}")
                    _measure_memory(result)
        report(f"{what}: time of {', '.join(result.name for result in group)}")
        _measure_time(group, repeats, seconds, block)
        measured += group
    return measured


def _measure_memory(result: Result) -> None:
    try:
        result.peak_bytes = memory.peak(result.entry)
    except memory.StepError as failure:
        result.error = str(failure)


def _measure_time(group: Sequence[Result], repeats: int, seconds: float, block: int) -> None:
    steps, running = [], []
    for result in group:
        if result.error is None and (step := _warm_step(result)) is not None:
            steps.append(step)
            running.append(result)
    try:
        measured = alternate(steps, repeats, seconds, block=block)
    except (RuntimeError, MemoryError) as error:  # together they need more memory than each did alone
        for result in running:
            result.error = memory.reason(error)
        return
    for result, times in zip(running, measured, strict=True):
        result.seconds = times
        result.relative = ratio(times, measured[0])


def _warm_step(result: Result) -> Callable[[], None] | None:
    """A step that has been run once, or None, and the reason in the result, if it cannot run."""
    try:
        step = step_of(result.entry, build(result.entry))
        step()
    except (RuntimeError, MemoryError, ValueError) as error:
        result.error = memory.reason(error)
        return None
    return step
