"""Servers in processes of their own, and clients of them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

START_S = 120  # for a process to import everything, on a machine that does much else


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The sentence of an error, and that there is nothing but it."""
        assert {*self.json} == {"error"}, self.body
        assert "Traceback" not in self.json["error"]
        assert "\n" not in self.json["error"]
        return self.json["error"]


class Server:
    """`vimamba serve` on a free port."""

    def __init__(self, run: Path, *options: str, log: Path):
        words = [sys.executable, "-m", "vimamba", "serve", str(run), "--port", "0", *options]
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        found = re.search(r"http://([\d.]+):(\d+)", self.said)
        assert found, log.read_text()
        self.host, self.port = found[1], int(found[2])
        self.wait_until_it_answers()

    def wait_until_it_answers(self) -> None:
        """It listens at once, and answers when its workers have the model."""
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.ask("GET", "/health", timeout=5).status == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def ask(self, method: str, path: str, body: Any = None, timeout: float = 60, **headers: str) -> Answer:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        with contextlib.closing(connection):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body=body, headers=named, encode_chunked="transfer-encoding" in named)
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def predict(self, body: Any, query: str = "", **headers: str) -> Answer:
        return self.ask("POST", f"/predict{query}", body, **headers)

    def lines(self) -> list[dict[str, Any]]:
        """The log, which is one JSON object a line."""
        return [json.loads(line) for line in self.log.read_text().split("\n")[:-1]]  # the last may be half written

    def line(self, answer: Answer) -> dict[str, Any]:
        """The line on a request, which comes after its answer."""
        until = time.monotonic() + START_S
        while time.monotonic() < until:
            for line in self.lines():
                if line.get("id") == answer.headers["x-request-id"]:
                    return line
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def number(self, name: str) -> float:
        """A number of /metrics."""
        text = self.ask("GET", "/metrics").body.decode()
        return float(re.findall(rf"^{re.escape(name)} ([\d.e+]+)$", text, re.MULTILINE)[0])

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to stop; its exit status."""
        self.process.send_signal(number)
        return self.process.wait(60)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def form(*files: tuple[str, bytes]) -> tuple[bytes, str]:
    """A multipart form and its content type."""
    parts = [
        b'--x\r\ncontent-disposition: form-data; name="image"; filename="%s"\r\n\r\n%s\r\n' % (name.encode(), data)
        for name, data in files
    ]
    return b"".join(parts) + b"--x--\r\n", "multipart/form-data; boundary=x"
