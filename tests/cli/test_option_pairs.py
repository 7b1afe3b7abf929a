"""Every two options of train that meet, met in a run: a covering array of strength two, a run a row.

Half the rows are stopped on the way and resumed, and end as the run that was not, bit for bit.
"""

from __future__ import annotations

import math
import shlex
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.covering import Row, covering_rows
from tests.cli.option_values import FACTORS, FORBIDDEN, MODELS
from tests.cli.runs import write_photos
from tests.cli.test_keeping import same_run
from tests.cli.test_train import CHECKPOINTS, FILES, interrupt_at, metrics

ROWS = covering_rows(FACTORS, FORBIDDEN)


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """A folder without held-out images of its own."""
    return write_photos(tmp_path_factory.mktemp("flat"), halves=((".", 12),))


def command_of(row: Row, flat, output) -> list[str]:
    options = [f"--{name}={level}" for name, level in row.items() if name not in ("model", "resumed")]
    model = shlex.split(MODELS[row["model"]])
    given = ["--data", flat, "--output", output, "--accelerator", "cpu", "--epochs", 2]
    return ["train", *given, "--model", *model, *options]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row.values()))
def test_options_that_meet(vimamba, flat, tmp_path, monkeypatch, row):
    run = tmp_path / "run"
    status, _, err = vimamba(*command_of(row, flat, run))
    assert (status, err) == (0, "")
    assert all((run / name).stat().st_size for name in (*FILES, *CHECKPOINTS))
    rows = metrics(run)
    assert [line["epoch"] for line in rows] == ["1", "2"]
    assert all(math.isfinite(float(line[name])) for line in rows for name in ("train_loss", "val_loss"))
    (optimizer,) = torch.load(run / CHECKPOINTS[0], weights_only=True)["optimizer_states"]
    moved = [bool(state["exp_avg"].any()) for state in optimizer["state"].values()]
    assert sum(moved) >= 0.9 * len(moved)  # attention over a single token has no gradient
    kept = load_file(run / "model.safetensors").values()
    assert {value.dtype for value in kept} <= {torch.float32, torch.int64}  # batches that a norm has counted
    if row["resumed"] == "yes":
        cut = tmp_path / "cut"
        with monkeypatch.context() as patch:
            interrupt_at(patch, 1, signal.SIGTERM)
            assert vimamba(*command_of(row, flat, cut))[0] == 128 + signal.SIGTERM
        status, _, err = vimamba("train", "--resume", cut)
        assert (status, err) == (0, "")
        same_run(cut, run)


@pytest.mark.parametrize("pair", FORBIDDEN, ids=FORBIDDEN.values())
def test_options_that_cannot_meet_are_refused(vimamba, flat, tmp_path, pair):
    row = ROWS[0] | dict(pair)
    status, _, err = vimamba(*command_of(row, flat, tmp_path / "run"))
    assert status == 2
    assert err == f"error: {FORBIDDEN[pair]}\n"
    assert not (tmp_path / "run").exists()
