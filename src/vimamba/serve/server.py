"""Processes that serve."""

from __future__ import annotations

import functools
import itertools
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
import uvicorn
from uvicorn.supervisors import Multiprocess

from vimamba.errors import UserError
from vimamba.inference.predictor import load_run
from vimamba.processes import cores
from vimamba.serve.connections import Config
from vimamba.serve.options import ServeOptions
from vimamba.tasks.options import InferenceOptions

STARTING = 300  # seconds that a worker may be silent: it imports PyTorch before it says anything
BACKLOG = 4096  # connections that the system keeps until they are taken


def serve(run: str, options: ServeOptions, how: InferenceOptions, ready: Callable[[str], None]) -> None:
    """Serve a run until SIGTERM or SIGINT; requests that are in work then are answered.

    Args:
        run: as of `load_run`.
        options, how: how.
        ready: told the address once it listens.

    Raises:
        UserError: there is no run, or the address cannot be had.
    """
    application(run, options, how)  # whatever is wrong with the run is said here, once
    sockets = listen(options)
    host = f"[{options.host}]" if ":" in options.host else options.host
    allow_connections(options.max_connections)
    config = Config(
        functools.partial(process, run, options, how), options, factory=True, interface="asgi3", lifespan="on",
        ws="none", log_config=None, access_log=False, server_header=False, workers=options.workers, backlog=BACKLOG,
        timeout_keep_alive=round(options.timeout_s) or 1, timeout_graceful_shutdown=round(2 * options.timeout_s) or 1,
        timeout_worker_healthcheck=STARTING,
    )  # fmt: skip
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn sends itself again what it was stopped by
        signal.signal(number, lambda *_: None)
    ready(f"http://{host}:{sockets[0].getsockname()[1]}")
    if options.workers == 1:
        uvicorn.Server(config).run(sockets)
        return
    with tempfile.TemporaryDirectory(prefix="vimamba-metrics-") as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        Workers(config, sockets).run()


class Workers(Multiprocess):
    """uvicorn's, but that each process has the next of the sockets to itself, and one in the place of another has its.

    Of a socket that all wait at, the first to wake takes every connection that has come.
    """

    @property
    def sockets(self) -> list[socket.socket]:
        ended = [i for i, worker in enumerate(self.processes) if not worker.process.is_alive()]
        return [self.each[ended[0] if ended else next(self.turns)]]

    @sockets.setter
    def sockets(self, each: list[socket.socket]) -> None:
        self.each, self.turns = each, itertools.cycle(range(len(each)))

    def keep_subprocess_alive(self) -> None:
        for worker in self.processes:  # with this end open too, what a killed worker was asked would be waited for
            worker.child_conn.close()
        super().keep_subprocess_alive()


def process(run: str, options: ServeOptions, how: InferenceOptions) -> Any:
    """The same of a process that does nothing else: with its share of the cores, and a log in JSON."""
    from vimamba.serve.watch import start_logging

    torch.set_num_threads(max(1, cores() // options.workers))
    start_logging()
    return application(run, options, how)


def application(run: str, options: ServeOptions, how: InferenceOptions) -> Any:
    """What a process serves."""
    from vimamba.serve.app import create_app  # which needs to know first whether processes count together

    predictor = load_run(run, options.device, options.precision, how.window, how.flip)
    predictor.task.check_inference(how)
    return create_app(predictor, options)


def listen(options: ServeOptions) -> list[socket.socket]:
    """A socket at the address for each worker, between which Linux shares connections out; elsewhere all have one.

    Raises:
        UserError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET

    def opened(port: int, reuse_port: bool) -> socket.socket:
        return socket.create_server((options.host, port), family=family, backlog=BACKLOG, reuse_port=reuse_port)

    try:
        alone = opened(options.port, False)  # refused where anybody listens: those that follow would share with them
        if options.workers == 1 or sys.platform != "linux":
            return [alone] * options.workers
        port = alone.getsockname()[1]
        alone.close()
        return [opened(port, True) for _ in range(options.workers)]
    except OSError as error:
        known = error.errno or 0  # below 0 of a name that nobody knows
        reason = (os.strerror(known) if known > 0 else error.strerror or str(error)).lower()
        raise UserError(f"`port` {options.port} on {options.host}: {reason}; give another `port` or `host`") from error


def allow_connections(count: int) -> None:
    """Have the system allow as many open files as that takes, as far as it lets itself be asked."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, 2 * count + 256)
    with suppress(ValueError, OSError):
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )
