"""Being asked to stop: Ctrl-C, a scheduler's SIGTERM or SIGUSR1, a terminal that was closed."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

ASKING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
]  # Windows has the first two


class StoppedBySignal(Exception):  # noqa: N818 - not an error
    """The run was asked to stop: its state is saved, and training can be resumed."""

    def __init__(self, signum: int, where: str):
        super().__init__(where)
        self.signum, self.where = signum, where


class StoppedAtOnce(BaseException):
    """A second Ctrl-C: nothing is saved beyond what was."""


class StopSignals:
    """While entered, a signal that asks to stop is noted in `asked` and otherwise changes nothing.

    A Ctrl-C after that raises StoppedAtOnce, for people who will not wait; schedulers repeat themselves, which
    must not cost the state that is being saved. SIGHUP stays ignored under nohup.
    """

    def __init__(self) -> None:
        self.asked = 0
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> StopSignals:
        self.install()
        return self

    def __exit__(self, *error: Any) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

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
        elif self.asked and signum == signal.SIGINT:
            raise StoppedAtOnce
        else:
            self.asked = self.asked or signum
