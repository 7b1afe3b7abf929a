"""--device: what is here, by its name."""

import pytest
import torch

from vimamba.errors import UserError
from vimamba.inference.runner import pick_device


@pytest.mark.parametrize("name", ["meta", "cuda", "cuda:1", "mps", "xla", "vulkan", "gpu", "", "cpu:-1", "0", "meta:0"])
def test_a_device_that_is_not_here_is_refused(vimamba, trained, monkeypatch, name):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    for command in (["eval", trained], ["predict", trained, trained.parent / "photos" / "val" / "red"]):
        status, out, err = vimamba(*command, f"--device={name}")
        assert (status, out) == (2, "")
        assert err.startswith(f"error: --device {name}: ")
        assert err.endswith("give auto or cpu\n")
        assert err.count("\n") == 1


def test_a_device_is_one_of_those_there_are(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert [str(pick_device(name)) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda", "cuda", "cuda:1", "cpu"]
    for name in ("cuda:2", "mps", "meta"):
        with pytest.raises(
            UserError, match=f"`device` {name}: there is none here; give auto or cpu or cuda:0 or cuda:1"
        ):
            pick_device(name)
