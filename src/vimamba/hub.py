"""The Hugging Face hub, which may be out of reach: then what is cached is taken, and the rest answers at once."""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from unittest import mock

from huggingface_hub import constants

SECONDS = 4.0  # to look up the hub's name and to connect


def reachable() -> bool:
    """Whether the hub answers; assumed where a proxy stands between."""
    if urllib.request.getproxies():
        return True
    place = urllib.parse.urlsplit(constants.ENDPOINT)
    answered = threading.Event()

    def connect() -> None:
        port = place.port or {"http": 80}.get(place.scheme, 443)
        with contextlib.suppress(OSError), socket.create_connection((place.hostname or "", port), SECONDS):
            answered.set()

    # Names are looked up without a limit of time of their own.
    asking = threading.Thread(target=connect, daemon=True)
    asking.start()
    asking.join(SECONDS)
    return answered.is_set()


@contextlib.contextmanager
def from_cache_if_out_of_reach() -> Iterator[None]:
    """Inside, huggingface_hub does not try again for a minute what cannot be reached."""
    offline = constants.HF_HUB_OFFLINE or not reachable()
    with mock.patch.object(constants, "HF_HUB_OFFLINE", offline):
        yield
