"""What no server should stumble over: each gets its status code and one sentence, and the next request its answer."""

import http.client
import json
import select
import socket
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serve.conftest import encoded
from tests.serve.servers import Server, form
from vimamba.serve.options import Refused
from vimamba.serve.uploads import Memory


@pytest.fixture(autouse=True)
def _goes_on(server, photograph):
    yield
    assert server.predict(photograph).status == 200
    assert not [line for line in server.lines() if "traceback" in line]


def bomb(side):
    """A PNG whose header claims side x side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


JSON = {"content_type": "application/json"}
SEND = 'send {"image": BASE64} or {"images": [BASE64, ...]}'
BAD = {
    "nothing": (b"", {}, 422, "image: is empty (0 bytes)"),
    "text": (b"not an image", {}, 422, "image: is not an image in a format that Pillow reads"),
    "html": (b"<html>", {"content_type": "text/html"}, 422, "image: is not an image in a format that Pillow reads"),
    "truncated": (encoded((300, 300), "jpeg")[:900], {}, 422, "image: cannot be decoded ("),
    "large": (encoded((600, 500)), {}, 413, "image: is 600 x 500 pixels; send one of at most 0.25 million pixels"),
    "bomb": (bomb(10_000), {}, 413, "image: is 10000 x 10000 pixels"),
    "greater bomb": (bomb(60_000), {}, 413, "image: has more pixels than the 178 million that are read"),
    "long": (b"\0" * 300_001, {}, 413, "the request is larger than 0.3 MB"),
    "no JSON": (b"{", JSON, 400, f"the body is not JSON; {SEND}"),
    "deep JSON": (b"[" * 100_000, JSON, 400, f"the body is not JSON; {SEND}"),
    "not UTF-8": (b"\xff", JSON, 400, f"the body is not JSON; {SEND}"),
    "other JSON": (b'{"picture": "aaaa"}', JSON, 400, f"the JSON has no image; {SEND}"),
    "a number": (b'{"image": 1}', JSON, 400, f"the JSON has no image; {SEND}"),
    "no images": (b'{"images": []}', JSON, 400, f"the JSON has no image; {SEND}"),
    "no base64": (b'{"image": "a b"}', JSON, 400, "image: is not base64"),
    "no boundary": (b"x", {"content_type": "multipart/form-data"}, 400, "the form cannot be read (Missing boundary"),
    "no form": (b"x", {"content_type": "multipart/form-data; boundary=x"}, 400, "the form"),
    "no file": (
        b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n',
        {"content_type": "multipart/form-data; boundary=x"}, 400, "the form has no file",
    ),
    "too many": (form(*[("a", b"b")] * 41)[0], {"content_type": form()[1]}, 413, "41 images in one request"),
    "compressed": (zlib.compress(encoded((9, 9))), {"content_encoding": "deflate"}, 422, "image: is not an image"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_body(server, name):
    body, headers, status, sentence = BAD[name]
    found = server.predict(body, **headers)
    assert (found.status, found.error.startswith(sentence)) == (status, True), found


@pytest.mark.parametrize(
    ("query", "sentence"),
    [("?top=0", "top: "), ("?top=x", "top: "), ("?min_score=2", "min_score: "), ("?masks=perhaps", "masks: ")],
)
def test_a_wrong_parameter(server, photograph, query, sentence):
    found = server.predict(photograph, query)
    assert (found.status, found.error.startswith(sentence)) == (422, True)


def test_a_wrong_method_or_path(server):
    for method, path in (("GET", "/predict"), ("DELETE", "/"), ("POST", "/health"), ("BREW", "/metrics")):
        found = server.ask(method, path)
        assert (found.status, found.error.startswith("this path takes ")) == (405, True)
        assert found.headers["allow"]
    for path in ("/nothing", "/predict/", "/..%2f..%2fetc/passwd", "/%00", "/" + "a" * 5000):
        found = server.ask("POST", path)
        assert (found.status, found.error.startswith("there is nothing here; the paths are /, ")) == (404, True)


def said(server, *parts, pause=0.0):
    """What comes back on a connection of which the parts are sent one after the other."""
    with socket.create_connection((server.host, server.port), timeout=20) as connection:
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        found = b""
        while part := connection.recv(65536):
            found += part
    return found


def parted(answer):
    """Status and JSON of a response as it came."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_what_is_not_http(server):
    for line in (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"hello\r\n\r\n", b"GET / HTTP/1.1\r\nbad header\r\n\r\n"):
        assert parted(said(server, line)) == (400, {"error": "the request is not HTTP/1.1 that this server reads"})
    long_head = b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 200_000
    assert parted(said(server, long_head))[0] in (400, 431)


def test_slow_senders_are_let_go(server, photograph):
    started = time.monotonic()
    late = {"error": "the request had not arrived after 2 s"}
    head = b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: 5000\r\n"
    slow = [(head,), (head + b"\r\n", b"a", b"b"), (b"G",)]
    with ThreadPoolExecutor(61) as threads:  # more than there are threads and places in the queue
        waiting = [threads.submit(said, server, *parts, pause=0.3) for parts in slow * 20]
        time.sleep(0.5)
        assert server.predict(photograph).status == 200  # while they hold their connections
        for one in waiting:
            assert parted(one.result()) == (408, late)
    assert said(server) == b""  # one that says nothing is closed
    assert time.monotonic() - started < 20


def test_a_client_that_goes_away_costs_nothing(server):
    for _ in range(20):
        with socket.create_connection((server.host, server.port)) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: 5000\r\n\r\nabc")
    time.sleep(0.5)
    assert server.number("vimamba_held_bytes") == 0


@pytest.mark.parametrize("length", [b"content-length: 100000000", b"transfer-encoding: chunked"])
def test_100_mb_are_refused_without_being_read(server, length):
    chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    with socket.create_connection((server.host, server.port), timeout=20) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nhost: a\r\n" + length + b"\r\n\r\n")
        sent = 0
        while sent < 100_000_000 and not select.select([connection], [], [], 0)[0]:
            connection.sendall(chunk)
            sent += len(chunk)
        response = http.client.HTTPResponse(connection)
        response.begin()
        body = json.loads(response.read())
    assert (response.status, body) == (413, {"error": "the request is larger than 0.3 MB; send a smaller image"})
    assert sent < 100_000_000


@pytest.mark.slow
def test_a_full_queue_and_a_slow_model(trained, tmp_path, photograph):
    """An image waits 10 s for company here, which nobody has the time for."""
    words = ["--max_wait_ms", "10000", "--max_batch", "64", "--max_queue", "3", "--timeout_s", "1.5"]
    with Server(trained, *words, log=tmp_path / "log") as server:
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(server.predict, [photograph] * 8))
        full = [answer for answer in found if answer.status == 429]
        late = [answer for answer in found if answer.status == 504]
        assert (len(full), len(late)) == (5, 3)
        assert {answer.error for answer in full} == {"3 images are waiting already; try again in a moment"}
        assert {answer.error for answer in late} == {"there was no answer within 1.5 s; try again later"}
        assert all(answer.headers["retry-after"] == "1" for answer in full)
        body, kind = form(*[("a.png", photograph)] * 4)
        assert server.predict(body, content_type=kind).status == 413


@pytest.mark.slow
def test_memory_is_shared_out(trained, tmp_path, photograph):
    with Server(trained, "--max_memory_mb", "0.5", "--max_upload_mb", "0.1", log=tmp_path / "log") as server:
        assert server.predict(photograph).status == 200
        found = server.predict(encoded((300, 300)))
        assert (found.status, found.error.startswith("the server has its memory full")) == (429, True)
        assert server.number("vimamba_held_bytes") == 0


def test_a_thread_that_outlives_its_request_holds_nothing():
    memory = Memory(10)
    with memory.share() as share:
        share.add(6)
        with pytest.raises(Refused, match="memory full"):
            share.add(5)
    with pytest.raises(Refused, match="has ended"):
        share.add(1)
    assert memory.held == 0


@pytest.mark.slow
def test_ten_thousand_connections(trained, tmp_path, photograph):
    """As many as this system gives a process, up to 10 000: those beyond the bound are told, and it goes on after."""
    resource = pytest.importorskip("resource", reason="Windows has no limit of this kind")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 10_500 if hard == resource.RLIM_INFINITY else min(hard, 10_500)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    count = min(10_000, most - 300)
    with Server(trained, "--max_connections", "200", "--timeout_s", "4", log=tmp_path / "log") as server:
        connections = []
        try:
            for _ in range(count):
                connections.append(socket.create_connection((server.host, server.port), timeout=20))
            first, last = connections[0], connections[-1]
            first.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
            assert parted(received(last)) == (503, {"error": "200 connections are open already; try again in a moment"})
        finally:
            for connection in connections:
                connection.close()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        server.wait_until_it_answers()
        assert server.predict(photograph).status == 200


def received(connection):
    found = b""
    while part := connection.recv(65536):
        found += part
    return found
