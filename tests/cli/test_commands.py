"""The commands that need no run, and the command line as a program."""

import json
import subprocess
import sys

from vimamba.cli import COMMANDS
from vimamba.ops.cpu import library


def test_models_lists_size_and_cost(vimamba):
    status, out, _ = vimamba("models", "nano", "--json")
    lines = {line["name"]: line for line in json.loads(out)}
    assert status == 0
    assert lines.keys() == {"vim_nano", "vim_pyramid_nano"}
    line = lines["vim_nano"]
    assert line["input"] == [3, 28, 28]
    assert line["flops"] > 1e6
    status, out, _ = vimamba("models", "vim_*_patch16_224")
    assert status == 0
    assert "vim_tiny_patch16_224" in out
    assert "7.1 M" in out
    assert "nano" not in out


def test_models_suggests(vimamba):
    status, _, err = vimamba("models", "vim_tinny_patch16")
    assert status == 2
    assert "did you mean vim_tiny_patch16_224" in err


def test_info_tells_backends_and_why_not(vimamba):
    status, out, _ = vimamba("info", "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["backends"]["torch"] is None
    assert facts["packages"]["torch"]
    shown = vimamba("info")[1]
    assert "scan backends" in shown
    if facts["backends"]["cpu"] is None:
        assert f"usable ({library.instruction_set()})" in shown


def test_help_lists_every_command(vimamba):
    status, out, _ = vimamba("--help")
    assert status == 0
    assert all(name in out for name in COMMANDS)


def test_as_a_program():
    done = subprocess.run([sys.executable, "-m", "vimamba", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: there is no command 'trian'; did you mean train?\n"
