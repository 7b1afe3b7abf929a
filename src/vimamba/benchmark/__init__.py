"""Models side by side: time, memory and operations, measured in one run. `benchmarks/` are scripts that use it."""

from vimamba.benchmark.entries import Entry
from vimamba.benchmark.run import Result, measure

__all__ = ["Entry", "Result", "measure"]
