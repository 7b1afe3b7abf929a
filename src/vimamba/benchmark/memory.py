"""Peak memory of a step beyond the loaded model.

On a GPU it is the allocator's peak. On a CPU it is the growth of a fresh process: on Linux its peak resident size
(VmHWM of /proc/self/status, reset by writing 5 to /proc/self/clear_refs) minus the resident size before the step; on
other systems the growth of ru_maxrss, which cannot be reset and so is a lower bound where building the model took more
than is left resident; on Windows it is not measured. Large blocks go straight to the system there, as what is asked
for is what the model needs: glibc by itself keeps up to half as much again of freed blocks that it cannot use.

`python -m vimamba.benchmark.memory JSON` is the fresh process; it prints the result as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vimamba.benchmark.entries import Entry, build, step_of

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SMALL = 64  # pixels; a step at this size loads libraries and starts threads before the baseline is taken


class StepError(Exception):
    """The step did not come to an end; the message is the reason in a few words."""


def growth(step: Callable[[], None]) -> int | None:
    """Bytes by which this process grows at most during `step`; None where it cannot be told."""
    gc.collect()
    if sys.platform == "linux":
        _return_free_memory()
        if _reset_peak():
            before = _status_bytes("VmRSS")
            step()
            return max(0, _status_bytes("VmHWM") - before)
    try:
        import resource
    except ModuleNotFoundError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit


def _return_free_memory() -> None:
    """Have malloc give back what is free, or the step would use it without growing the process."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


def _reset_peak() -> bool:
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def peak_here(entry: Entry) -> int | None:
    """Bytes at the peak of a step beyond the loaded model, in this process, which must be fresh where it is a CPU's.

    A training step's are those of its second one: activations, gradients and the optimizer's state.
    """
    small = dataclasses.replace(entry, size=min(entry.size, SMALL))
    step_of(small, build(small))()
    model = build(entry)
    step = step_of(entry, model)

    def steps() -> None:
        for _ in range(2 if entry.passes == "train" else 1):
            step()

    if torch.device(entry.device).type != "cuda":
        return growth(steps)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    steps()
    return torch.cuda.max_memory_allocated() - before


def peak(entry: Entry) -> int | None:
    """The same, on a CPU in a process of its own, with as many threads as this one has.

    Raises:
        StepError: the step ran out of memory or broke off.
    """
    if torch.device(entry.device).type == "cuda":
        try:
            return peak_here(entry)
        except (RuntimeError, MemoryError, ValueError) as error:
            raise StepError(reason(error)) from error
    request = json.dumps({"entry": dataclasses.asdict(entry), "threads": torch.get_num_threads()})
    environment = {"MALLOC_MMAP_THRESHOLD_": "1048576", **os.environ}
    done = subprocess.run(
        [sys.executable, "-m", __name__, request], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if answer["error"]:
            raise StepError(answer["error"])
        return answer["bytes"]
    if done.returncode in (-9, 137):  # Linux ends the largest process when memory runs out
        raise StepError("out of memory")
    raise StepError(next(reversed(done.stderr.splitlines()), f"exit status {done.returncode}"))


def reason(error: BaseException) -> str:
    """Why a step failed, in a few words."""
    text = " ".join(str(error).split())
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search(
        r"not enough memory|allocate memory", text
    ):
        return "out of memory"
    return f"{type(error).__name__}: {text[:160]}"


def main(request: str) -> None:
    """The fresh process."""
    asked = json.loads(request)
    torch.set_num_threads(asked["threads"])
    answer: dict[str, Any] = {"bytes": None, "error": None}
    try:
        answer["bytes"] = peak_here(Entry(**asked["entry"]))
    except (RuntimeError, MemoryError, ValueError) as error:
        answer["error"] = reason(error)
    print(json.dumps(answer))


if __name__ == "__main__":
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # should memory run out, this process goes first
    main(sys.argv[1])
