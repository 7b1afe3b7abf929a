"""What a server takes on, and what it refuses."""

from __future__ import annotations

import dataclasses

from vimamba.errors import UserError, require
from vimamba.processes import cores
from vimamba.tasks.options import InferencePrecision

LOGITS = 2**29  # numbers, 2 GiB, that a segmentation of the largest image may take
PIXELS = 50_000_000  # of an image, where that does not bound it: more than telephones take
SMALLEST_BODY = 65_000  # bytes: the form around an image has to fit


class Refused(UserError):  # noqa: N818 - not an error of ours
    """A request that gets no answer: the status code and one sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


@dataclasses.dataclass
class ServeOptions:
    """Where to serve, and how much is taken on.

    Args:
        host: address to listen on; 0.0.0.0 is every network of the machine
        port: to listen on; 0 takes a free one
        workers: processes, each with the model; the cores are shared out between them
        max_batch: images that the model looks at together
        max_wait_ms: the longest that an image waits for others to be looked at with, ms
        max_queue: images that may wait; more are refused with status 429
        max_upload_mb: largest request, MB (10^6 bytes); larger ones are refused with status 413
        max_megapixels: largest image, 10^6 pixels; 50 if not given, fewer of a segmentation into many classes
        max_memory_mb: what uploads and images in work may take together, MB; beyond it status 429
        max_connections: open connections; further ones get status 503
        timeout_s: seconds for a request to arrive (status 408), and for its answer (status 504)
        device: cpu, cuda, cuda:1, mps ...; auto takes the fastest
        precision: 32-true, bf16-mixed, 16-mixed or int8
    """

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    max_batch: int = 16
    max_wait_ms: float = 5.0
    max_queue: int = 128
    max_upload_mb: float = 20.0
    max_megapixels: float | None = None
    max_memory_mb: float = 2000.0
    max_connections: int = 1000
    timeout_s: float = 30.0
    device: str = "auto"
    precision: InferencePrecision = "32-true"

    def __post_init__(self) -> None:
        require(0 <= self.port < 65536, f"`port` is {self.port}; give one from 1 to 65535, or 0 for a free one")
        require(
            1 <= self.workers <= 4 * cores(),
            f"`workers` is {self.workers}; give 1 to {4 * cores()} processes on the {cores()} cores here",
        )
        for name in ("max_batch", "max_queue", "max_connections"):
            require(getattr(self, name) >= 1, f"`{name}` is {getattr(self, name)}; it must be at least 1")
        require(0 <= self.max_wait_ms <= 10_000, f"`max_wait_ms` is {self.max_wait_ms}; give 0 to 10000 ms")
        for name in ("max_upload_mb", "max_memory_mb", "timeout_s", "max_megapixels"):
            value = getattr(self, name)
            require(value is None or 0 < value < 1e9, f"`{name}` is {value}; it must be above 0")
        require(
            SMALLEST_BODY <= self.max_upload <= self.max_memory,
            f"`max_upload_mb` is {self.max_upload_mb}; give 0.065 to {self.max_memory_mb} (`max_memory_mb`)",
        )

    @property
    def max_upload(self) -> int:
        """Bytes."""
        return int(self.max_upload_mb * 1e6)

    @property
    def max_memory(self) -> int:
        """Bytes."""
        return int(self.max_memory_mb * 1e6)

    def max_pixels(self, task: str, classes: int) -> int:
        """The pixels of the largest image that is taken."""
        return largest(task, classes) if self.max_megapixels is None else int(self.max_megapixels * 1e6)


def largest(task: str, classes: int) -> int:
    """The pixels of the largest image that fits into an ordinary computer's memory with all that is made of it."""
    return min(PIXELS, LOGITS // max(1, classes)) if task == "segment" else PIXELS
