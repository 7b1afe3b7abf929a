"""What a server tells of itself: a line of JSON a request, and numbers for Prometheus. Never what is in an image."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
import uuid
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

LOG = logging.getLogger("vimamba.serve")
SHARED = "PROMETHEUS_MULTIPROC_DIR"  # of the environment: where processes leave their numbers for each other
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
LONGEST = 200  # letters of a path in a log


class JsonLines(logging.Formatter):
    """A record as a line of JSON: time, level, message and what the call gave as `extra={"facts": ...}`."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"time": f"{clock}.{int(record.msecs):03}Z", "level": record.levelname.lower()}
        line |= {"message": record.getMessage().strip(), "process": record.process, **getattr(record, "facts", {})}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def start_logging() -> None:
    """Every line of the process, whichever library it is from, as JSON on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    LOG.setLevel(logging.INFO)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # what is wrong in a form is the sender's to know


class Numbers:
    """What Prometheus asks for."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kept: dict[str, Any] = {"namespace": "vimamba", "registry": self.registry}
        self.requests = Counter("requests", "requests answered", ["path", "status"], **kept)
        self.seconds = Histogram("request_seconds", "from a request's first line to its answer's last", **kept)
        self.images = Counter("images", "images that the model looked at", **kept)
        self.batches = Histogram("batch_images", "images looked at together", buckets=BATCHES, **kept)
        self.model_seconds = Histogram("batch_seconds", "time of the model for a batch", **kept)
        self.waiting = Gauge("queue_images", "images that wait", multiprocess_mode="livesum", **kept)
        self.memory = Gauge("held_bytes", "bytes that requests in work hold", multiprocess_mode="livesum", **kept)

    def batch(self, size: int, seconds: float) -> None:
        """Count a batch."""
        self.images.inc(size)
        self.batches.observe(size)
        self.model_seconds.observe(seconds)

    def text(self) -> bytes:
        """All of it, of all processes, as Prometheus reads it."""
        if SHARED not in os.environ:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)
        return generate_latest(together)


class Watched:
    """An ASGI application with a log line and counts a request, and an end to those that last too long.

    Args:
        app: the application.
        numbers: to count in.
        paths: that are counted by their name; all others are one.
        seconds: after which a request is given up, whatever it is doing: a client that does not read its answer.
    """

    def __init__(self, app: Any, numbers: Numbers, paths: set[str], seconds: float):
        self.app, self.numbers, self.paths, self.seconds = app, numbers, paths, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, name = time.monotonic(), 500, uuid.uuid4().hex[:12]
        facts = scope.setdefault("facts", {})

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", name.encode())]
            await send(message)

        try:
            await asyncio.wait_for(self.app(scope, receive, noted), self.seconds)
        except asyncio.TimeoutError:
            facts["gave_up"] = True  # uvicorn closes the connection of an answer that was not completed
        finally:
            took, path = time.monotonic() - start, scope["path"]
            known = path if path in self.paths else "other"
            self.numbers.requests.labels(known, status).inc()
            self.numbers.seconds.observe(took)
            LOG.info(
                "request",
                extra={
                    "facts": {
                        "id": name, "method": scope["method"][:20], "path": path[:LONGEST], "status": status,
                        "ms": round(1000 * took, 2), **facts,
                    }
                },
            )  # fmt: skip
