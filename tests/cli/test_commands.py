"""The commands that need no run, and the command line as a program."""

import json
import subprocess
import sys

import pytest

from tests.cli.test_bad_commands import parser_of
from vimamba.cli import COMMANDS, parsing
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


LISTS = [
    *("explain run image --output out --method a", "explain run image --output out --method a,b"),
    *("explain run image --output out --compare a", "ablate --designs a", "ablate --designs a,b"),
    *("ablate --lr 1e-3", "ablate --lr 0.1,2", "train --data a --model b --img_size 16,24"),
    *("train --data a --model b --crop_scale 0.5,1", "train --data a --model b --scale_jitter 1,2"),
    "export run --format onnx --output a --img_size 16,24",
]


@pytest.mark.parametrize("typed", LISTS)
def test_the_brackets_of_a_list_may_be_left_out(typed):
    command, *words = typed.split()
    *given, name, values = words
    parser = parser_of(command)
    bare = parsing.parse(parser, words)[name[2:]]
    assert bare == parsing.parse(parser, [*given, name, f"[{values}]"])[name[2:]]
    assert len(bare) == len(values.split(","))


def test_every_list_option_is_typed_without_brackets():
    lists = {
        (command, name)
        for command in COMMANDS
        for name, action in parsing._options(parser_of(command)).items()
        if any(kind in str(parsing.kind_of(action)) for kind in ("list[", "tuple["))
    }
    tested = {(typed.split()[0], typed.split()[-2]) for typed in LISTS}
    assert lists == {*tested, ("train", "--devices")}  # which takes any text


def test_as_a_program():
    done = subprocess.run([sys.executable, "-m", "vimamba", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: there is no command 'trian'; did you mean train?\n"
