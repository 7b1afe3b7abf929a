"""Processes that decode images: how many there are without being asked, and how many this machine can bear."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

from vimamba.errors import require

MOST_WORKERS = 64  # where there are few cores; a process takes about 300 MB


def cores() -> int:
    """The processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Processes that decode files: what the machine has beside the training."""
    return min(8, max(1, cores() - 1))


def check_workers(count: int | None) -> None:
    """Refuse a number of decoding processes that is none, or that would bring the machine to a halt."""
    most = max(MOST_WORKERS, 4 * cores())
    require(
        count is None or 0 <= count <= most,
        f"`num_workers` is {count}; it counts processes, at most {most} on the {cores()} cores here",
    )


def obey_parent(worker: int = 0) -> None:
    """In a process that decodes: outlive signals that go to a whole group or job, and end when the parent says so.

    Ctrl-C, `timeout` and job systems reach every process at once; the parent takes its images until it has saved, and
    ends this process itself, or its end does.
    """
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None or not hasattr(signal, "sigwaitinfo"):  # macOS and Windows do not tell who sent a signal
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
