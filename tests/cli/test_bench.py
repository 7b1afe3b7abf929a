"""vimamba bench, as called from a shell."""

import json

import pytest
import torch

from vimamba.cli import main

QUICK = [
    "bench",
    "--models",
    "vim_nano",
    "--against",
    "test_vit",
    "--sizes",
    "32",
    "--repeats",
    "2",
    "--memory",
    "false",
]


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other make tiny models slow on a machine that is in use."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_it_prints_the_machine_and_a_table_and_writes_files(tmp_path, capsys):
    files = ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]
    assert main([*QUICK, "--sizes", "32", "64", "--passes", "forward", "train", *files]) == 0
    shown = capsys.readouterr().out
    assert "torch" in shown
    assert "forward, float32, batch 1" in shown
    assert "train, float32, batch 1" in shown
    assert shown.count("vim_nano") == shown.count("test_vit") == 4
    assert len(json.loads((tmp_path / "b.json").read_text())["results"]) == 8
    assert (tmp_path / "b.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--models vim_nanno", "did you mean vim_nano"),
        ("--sizes 2", "smaller than one patch"),
        ("--sizes x", "--sizes: expected a whole number, got x"),
        ("--sizes 0", "--sizes 0: it must be at least 1"),
        ("--batch 0", "--batch 0: it must be at least 1"),
        ("--repeats 0", "--repeats 0: it must be at least 1"),
        ("--dtype float64", "--dtype float64: it is float32 or"),
        ("--attention flash", "--attention flash: it is fused or eager"),
        ("--passes backward", "--passes backward: it is forward or train"),
        ("--device tpu", "--device tpu: it is cpu or cuda"),
        ("--json /nowhere/b.json", "--json /nowhere/b.json: cannot be written"),
        ("--plot b.txt", "the name must end in .png"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(options, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*QUICK, *options.split()]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
