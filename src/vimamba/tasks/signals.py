"""Being asked to stop: Ctrl-C, a scheduler's SIGTERM or SIGUSR1, a terminal that was closed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

ASKING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
]  # Windows has the first two
ECHO_S = 2.0
"""A SIGTERM so soon after another is the same one: `timeout` and job systems send it to a process and to its group."""


class StoppedBySignal(Exception):  # noqa: N818 - not an error
    """The run was asked to stop: its state is saved, and training can be resumed."""

    def __init__(self, signum: int, where: str):
        super().__init__(where)
        self.signum, self.where = signum, where


class StoppedAtOnce(BaseException):
    """Asked to stop a second time: nothing is saved beyond what was."""

    def __init__(self, signum: int, message: str = "stopped at once"):
        super().__init__(message)
        self.signum = signum


class StopSignals:
    """While entered, a signal that asks to stop is noted in `asked` and otherwise changes nothing.

    A Ctrl-C after that raises StoppedAtOnce, for people who will not wait, and so does a second SIGTERM, for a run that
    hangs in its data or in a step; but a scheduler's must not cost the state that is being saved (`saving`). SIGHUP
    stays ignored under nohup.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._terminated: float | None = None  # when the first SIGTERM came
        self._saving = False
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> StopSignals:
        self.install()
        return self

    def __exit__(self, *error: Any) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """While entered, only Ctrl-C ends the run at once."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def install(self) -> None:
        """Take the signals, again where another library has taken them since."""
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in ASKING:
            handler = signal.getsignal(signum)
            if signum not in (signal.SIGINT, signal.SIGTERM) and handler is signal.SIG_IGN:
                continue
            self._before.setdefault(signum, handler)
            signal.signal(signum, self._note)

    def _note(self, signum: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a forked worker: the trainer ends it, or its end does
            if signum == signal.SIGTERM:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
        elif self._insists(signum):
            raise StoppedAtOnce(signum)
        else:
            self.asked = self.asked or signum

    def _insists(self, signum: int) -> bool:
        """Whether whoever sends this will not wait for the end of the step."""
        if signum == signal.SIGINT:
            return bool(self.asked)
        if signum != signal.SIGTERM or self._saving:
            return False
        now = time.monotonic()
        if self._terminated is None:
            self._terminated = now
        return now - self._terminated > ECHO_S
