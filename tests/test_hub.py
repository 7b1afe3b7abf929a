"""The hub out of reach: an answer at once, with what to do instead."""

import socket
import time

import pytest
from huggingface_hub import constants

from vimamba import hub
from vimamba.cli import main


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", dict)


@pytest.fixture
def unreachable(monkeypatch, no_proxy, tmp_path):
    """A hub whose name nobody knows, asked as often as the network is."""
    asked = []
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VIMAMBA_CACHE", str(tmp_path / "converted"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: asked.append(a) or (_ for _ in ()).throw(OSError("no")))
    return asked


def test_what_listens_is_reached(monkeypatch, no_proxy):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.reachable()
        with hub.from_cache_if_out_of_reach():
            assert not constants.HF_HUB_OFFLINE
    assert not hub.reachable()
    with hub.from_cache_if_out_of_reach():
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE


def test_a_name_that_is_looked_up_for_ever_does_not_hold_up(monkeypatch, no_proxy):
    monkeypatch.setattr(hub, "SECONDS", 0.1)
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: time.sleep(2) or socket.create_server(("", 0)))
    began = time.monotonic()
    assert not hub.reachable()
    assert time.monotonic() - began < 1


def test_behind_a_proxy_the_hub_is_tried(monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy:1"})
    assert hub.reachable()


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["--model", "vim_tiny_patch16_224", "--pretrained"], "give its path as --checkpoint, without --pretrained"),
        (["--model", "resnet18", "--pretrained"], "given with --checkpoint, without --pretrained"),
        (["--model", "hf-hub:some/model"], "given as local-dir:FOLDER"),
        (["--model", "vim_nano", "--data", "hfds/some/thing"], "--data hfds/some/thing: cannot open a split"),
    ],
)
def test_the_network_is_asked_once(capsys, tmp_path, unreachable, options, advice):
    assert main(["train", "--data", "mnist", "--output", str(tmp_path / "run"), *options]) == 2
    err = capsys.readouterr().err
    assert advice in err
    assert err.count("\n") == 1
    assert len(unreachable) == 1
    assert not (tmp_path / "run").exists()
