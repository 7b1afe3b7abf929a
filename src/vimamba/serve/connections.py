"""Connections within bounds: how many there are, and how long one may be silent."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vimamba.serve.options import ServeOptions

LINGER = 1.0  # seconds between the end of a last answer and that of its connection


class Config(uvicorn.Config):
    """uvicorn's, with our bounds: it goes to other processes, so these cannot lie in a class of its own.

    Args:
        options: of the server.
    """

    def __init__(self, app: Any, options: ServeOptions, **how: Any):
        self.options = options
        super().__init__(app, http=Connection, **how)


class Connection(H11Protocol):
    """One of them; what uvicorn would say in words it says in JSON.

    One that there is no room for gets status 503, and one over which the head of a request has not come in time 408.
    """

    config: Config
    timer: asyncio.TimerHandle | None = None
    ended = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.config.options.max_connections:
            self._end(503, f"{self.config.options.max_connections} connections are open already; try again in a moment")
        else:
            self._wait()

    def data_received(self, data: bytes) -> None:
        if self.ended:
            return
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._end(400, "the request is not HTTP/1.1 that this server reads")

    def _wait(self) -> None:
        self._cancel()
        self.timer = self.loop.call_later(self.config.options.timeout_s, self._late)

    def _cancel(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _late(self) -> None:
        begun = bool(self.conn.trailing_data[0])
        if begun and self.conn.our_state is h11.IDLE:
            self._end(408, f"the request had not arrived after {self.config.options.timeout_s:g} s")
        else:
            self.transport.close()

    def _end(self, status: int, sentence: str) -> None:
        """Answer with an error and close a moment later: an answer is lost where data are still coming in."""
        self.ended = True
        self._cancel()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps({"error": sentence}).encode()
            head = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            for event in (h11.Response(status_code=status, headers=head), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            if self.transport.can_write_eof():
                self.transport.write_eof()
        self.timer = self.loop.call_later(LINGER, self.transport.close)
