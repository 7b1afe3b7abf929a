"""Guards around every file of a stranger's: no network, nothing written outside its folder, and no waiting."""

import signal
import socket

import pytest
import timm
import torch
from safetensors.torch import save_file

import vimamba  # noqa: F401 - registers the models

SECONDS = 10  # what hangs, hangs for ever; a refusal takes a fraction of a second


@pytest.fixture(autouse=True)
def guarded(tmp_path, monkeypatch):
    """The folder in which files may lie; whatever else a test leaves there was written by the file it opened."""
    asked, home = [], tmp_path / "home"
    for variable in ("HF_HOME", "HF_HUB_CACHE", "TORCH_HOME", "VIMAMBA_CACHE"):
        monkeypatch.setenv(variable, str(home))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise OSError("no network in this test")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)

    def alarm(*_):
        pytest.fail(f"still busy after {SECONDS} s")

    monkeypatch.chdir(tmp_path)
    handler = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(SECONDS)
    yield tmp_path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    assert not asked, "something was to be fetched"
    assert not home.exists(), "something was written"
    assert not (tmp_path / "canary").exists(), "something was run"


ARGS = {"depth": 1, "embed_dim": 16, "d_state": 4}


def description(**changed):
    """What `vimamba train` writes beside the weights of a tiny model."""
    prep = {
        "img_size": [16, 16], "in_chans": 1, "mean": [0.5], "std": [0.5], "interpolation": "bicubic",
        "crop_pct": 0.9, "crop_mode": "center",
    }  # fmt: skip
    told = {"model": "vim_nano", "model_args": ARGS, "class_names": ["a", "b", "c"], "preprocessing": prep}
    for name, value in changed.items():
        if name in prep:
            prep[name] = value
        else:
            told[name] = value
    return told


@pytest.fixture(scope="session")
def weights():
    torch.manual_seed(0)
    model = timm.create_model("vim_nano", img_size=16, in_chans=1, num_classes=3, **ARGS)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def stranger(guarded, weights):
    """Write a safetensors file: stranger(text of the description, tensors) -> its path."""

    def write(text, tensors=None):
        path = guarded / "model.safetensors"
        save_file(weights if tensors is None else tensors, path, metadata={"vimamba": text})
        return path

    return write
