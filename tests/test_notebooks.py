"""The notebooks of examples/ run from top to bottom, a cell after the other, and show what they promise."""

from __future__ import annotations

import json
import re
from importlib.metadata import metadata
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

NOTEBOOKS = {path.stem: path for path in (Path(__file__).parents[1] / "examples/notebooks").glob("*.ipynb")}
EXTRAS = {*metadata("vimamba").get_all("Provides-Extra")}


def cells(path):
    """The cells of code."""
    found = json.loads(path.read_text())
    assert found["nbformat"] == 4
    return ["".join(cell["source"]) for cell in found["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def after(monkeypatch, tmp_path):
    """Runs a notebook in an empty folder: the names that it leaves, and how many pictures it showed."""
    monkeypatch.chdir(tmp_path)
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()) or plt.close())

    def run(name):
        install, *rest = cells(NOTEBOOKS[name])
        # What the first cell installs in Colab is what this test runs in: the line is read, and not run.
        needs = re.fullmatch(r"%pip install -q 'vimamba\[([\w,]+)\]'", install)
        assert needs
        assert {*needs[1].split(",")} <= EXTRAS
        names: dict = {"__name__": "notebook"}
        with torch.random.fork_rng():
            for i, cell in enumerate(rest, 2):
                exec(compile(cell, f"{name}, cell {i}", "exec"), names)
        return names, shown

    return run


@pytest.mark.slow
def test_first_steps(after):
    names, shown = after("first_steps")
    assert names["run"].best["val_top1"] > 0.7  # by chance 0.1
    assert len(names["results"]) == 8
    assert names["maps"].shape[0] == 8
    assert len(shown) == 1


def test_inside_the_scan(after):
    names, shown = after("inside_the_scan")
    assert names["difference"] < 1e-5
    seen = {name: int((strength > 0).sum()) for name, strength in names["seen"].items()}
    assert seen == {"forward": 45, "backward": 36, "both": 80}
    assert names["work"][256] / names["work"][64] == pytest.approx(16, rel=0.2)  # patches
    assert len(shown) == 3


def test_every_notebook_is_run():
    assert NOTEBOOKS.keys() == {"first_steps", "inside_the_scan"}
