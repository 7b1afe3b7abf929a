"""Every script of examples/ runs as it stands, prints what it promises, and is short."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

from vimamba.ops import backends

SCRIPTS = {path.stem: path for path in (Path(__file__).parents[1] / "examples").glob("*.py")}
LONGEST = 60  # lines
# What a script prints: in parentheses numbers, and the least that each must be.
PRINTS = {
    "features": (r"vim_pyramid_nano: 192 channels, every (32) pixels: \(1, 192, 10, 15\)", 32),
    "scan_in_your_model": (r"remembered: ([\d.]+) %", 95),  # by chance 12.5
    "your_backend": (r"^(272) steps, as", 272),
    "your_recurrence": (r"mamba: ([\d.]+) % held out\nGated: ([\d.]+) % held out", 60),  # by chance 10
}


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    """What a script registers and seeds is gone after it."""
    monkeypatch.setattr(backends, "_known", dict(backends._known))
    monkeypatch.setattr(backends, "FASTEST", dict(backends.FASTEST))
    with torch.random.fork_rng():
        yield
    backends._fastest.cache_clear()


def test_every_script_is_run_and_short():
    assert SCRIPTS.keys() == PRINTS.keys()
    assert all(len(path.read_text().splitlines()) < LONGEST for path in SCRIPTS.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", PRINTS)
def test_a_script_prints_what_it_promises(name, capsys):
    runpy.run_path(str(SCRIPTS[name]), run_name="__main__")
    pattern, least = PRINTS[name]
    found = re.search(pattern, capsys.readouterr().out, re.MULTILINE)
    assert found
    assert all(float(number) >= least for number in found.groups())
