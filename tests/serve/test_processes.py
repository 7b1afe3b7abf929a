"""The process: starting, stopping, several workers."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.serve.servers import START_S, Server, form


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_answers_what_is_in_work(trained, tmp_path, photograph, number):
    found = []
    words = ["--max_wait_ms", "1500", "--max_batch", "64"]
    with Server(trained, *words, log=tmp_path / "log") as server:
        threads = [threading.Thread(target=lambda: found.append(server.predict(photograph))) for _ in range(5)]
        for thread in threads:
            thread.start()
        time.sleep(0.7)  # they wait for company
        assert server.stop(number) == 0
        for thread in threads:
            thread.join()
        assert [answer.status for answer in found] == [200] * 5
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((server.host, server.port))
        assert server.lines()[-1]["message"] == "stopped"


@pytest.mark.slow
def test_several_workers_count_together_share_connections_and_are_replaced(trained, tmp_path, photograph):
    with Server(trained, "--workers", "2", log=tmp_path / "log") as server:

        def asked_at_once(count):
            connections = [http.client.HTTPConnection(server.host, server.port, timeout=START_S) for _ in range(count)]
            for connection in connections:
                connection.request("POST", "/predict", photograph)
            answers = [connection.getresponse() for connection in connections]
            assert [answer.status for answer in answers] == [200] * count
            names = {answer.getheader("x-request-id") for answer in answers}
            return {line["process"] for line in server.lines() if line.get("id") in names}

        until = time.monotonic() + START_S
        while server.log.read_text().count('"serving"') < 2 and time.monotonic() < until:
            time.sleep(0.1)
        workers = asked_at_once(40)
        assert server.number("vimamba_images_total") == 40
        assert len({line["process"] for line in server.lines() if line["message"] == "serving"}) == 2
        if sys.platform == "linux":  # others do not share connections out between sockets
            assert len(workers) == 2
            killed = workers.pop()
            os.kill(killed, signal.SIGKILL)
            found = asked_at_once(40)
            assert len(found - {killed}) == 2
        assert server.stop() == 0


@pytest.mark.slow
def test_a_batch_is_no_larger_than_asked_for(trained, tmp_path, photograph):
    with Server(trained, "--max_batch", "2", log=tmp_path / "log") as server:
        body, kind = form(*[("a.png", photograph)] * 9)
        assert len(server.predict(body, content_type=kind).json["results"]) == 9
        assert server.number("vimamba_batch_images_count") == 5
        assert server.number('vimamba_batch_images_bucket{le="2.0"}') == 5


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--port", "70000"], "--port is 70000; "),
        (["--workers", "0"], "--workers is 0; "),
        (["--workers", "100000"], "--workers is 100000; "),
        (["--max_batch", "0"], "--max_batch is 0; "),
        (["--max_queue", "0"], "--max_queue is 0; "),
        (["--max_connections", "0"], "--max_connections is 0; "),
        (["--max_wait_ms", "-1"], "--max_wait_ms is -1"),
        (["--max_upload_mb", "0.01"], "--max_upload_mb is 0.01; "),
        (["--max_upload_mb", "3000"], "--max_upload_mb is 3000.0; "),
        (["--max_memory_mb", "0"], "--max_memory_mb is 0.0; "),
        (["--max_megapixels", "0"], "--max_megapixels is 0.0; "),
        (["--timeout_s", "0"], "--timeout_s is 0.0; "),
        (["--device", "gpu"], "--device gpu: "),
        (["--flip", "true"], "--flip"),
        (["--host", "nowhere.invalid"], "--port 8000 on nowhere.invalid: "),
    ],
)
def test_what_cannot_be_served_is_said_in_one_sentence(vimamba, trained, words, sentence):
    status, out, err = vimamba("serve", trained, *words)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"error: {sentence}")


def test_a_port_that_is_taken_or_no_run(vimamba, trained):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, err = vimamba("serve", trained, "--port", port)
        assert (status, err) == (
            2,
            f"error: --port {port} on 127.0.0.1: address already in use; give another --port or --host\n",
        )
    status, _, err = vimamba("serve", trained / "nothing")
    assert (status, err.count("\n")) == (2, 1)


@pytest.mark.slow
def test_without_its_packages_the_command_says_which_to_install(trained):
    hidden = "import sys; sys.modules['uvicorn'] = None; from vimamba.cli import main; sys.exit(main(sys.argv[1:]))"
    found = subprocess.run(
        [sys.executable, "-c", hidden, "serve", trained], capture_output=True, text=True, check=False
    )
    assert found.returncode == 2
    assert found.stderr == "error: the command needs the package uvicorn; run pip install 'vimamba[train,serve]'\n"
