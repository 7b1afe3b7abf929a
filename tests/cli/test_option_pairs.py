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
from tests.cli.option_values import DENSE_FACTORS, FACTORS, FORBIDDEN, HEAD, MODELS
from tests.cli.runs import write_photos
from tests.cli.test_keeping import same_run
from tests.cli.test_train import CHECKPOINTS, FILES, interrupt_at, metrics
from tests.dense import write_masks, write_objects

ROWS = covering_rows(FACTORS, FORBIDDEN)
DENSE_ROWS = covering_rows(DENSE_FACTORS)


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """A folder without held-out images of its own."""
    return write_photos(tmp_path_factory.mktemp("flat"), halves=((".", 12),))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Folders of masks and of objects."""
    return [write(tmp_path_factory.mktemp("dense"), 8, 2) for write in (write_masks, write_objects)]


def command_of(row: Row, data, output, *more) -> list[str]:
    options = [f"--{name}={level}" for name, level in row.items() if name not in ("model", "resumed")]
    model = shlex.split(MODELS[row["model"]])
    given = ["--data", data, "--output", output, "--accelerator", "cpu", "--epochs", 2]
    return ["train", *given, "--model", *model, *options, *more]


def check_run(vimamba, monkeypatch, row: Row, command, run, learned):
    """It ends, has learned with that share of its parameters, and, stopped on the way and resumed, ends the same."""
    status, _, err = vimamba(*command, "--output", run)
    assert (status, err) == (0, "")
    assert all((run / name).stat().st_size for name in (*FILES, *CHECKPOINTS))
    rows = metrics(run)
    assert [line["epoch"] for line in rows] == ["1", "2"]
    assert all(math.isfinite(float(line[name])) for line in rows for name in ("train_loss", "val_loss") if name in line)
    (optimizer,) = torch.load(run / CHECKPOINTS[0], weights_only=True)["optimizer_states"]
    means = [state.get("exp_avg", state.get("momentum_buffer")) for state in optimizer["state"].values()]  # Muon's last
    moved = [bool(mean.any()) for mean in means]
    assert sum(moved) >= learned * len(moved)
    kept = load_file(run / "model.safetensors").values()
    assert {value.dtype for value in kept} <= {torch.float32, torch.int64}  # batches that a norm has counted
    if row["resumed"] == "yes":
        cut = run.with_name("cut")
        with monkeypatch.context() as patch:
            interrupt_at(patch, 1, signal.SIGTERM)
            assert vimamba(*command, "--output", cut)[0] == 128 + signal.SIGTERM
        status, _, err = vimamba("train", "--resume", cut)
        assert (status, err) == (0, "")
        same_run(cut, run)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row.values()))
def test_options_that_meet(vimamba, flat, tmp_path, monkeypatch, row):
    # Attention over a single token has no gradient.
    check_run(vimamba, monkeypatch, row, command_of(row, flat, tmp_path / "run"), tmp_path / "run", 0.9)


@pytest.mark.slow
@pytest.mark.parametrize("row", DENSE_ROWS, ids=lambda row: " ".join(row.values()))
def test_options_of_dense_tasks_that_meet(vimamba, dense, tmp_path, monkeypatch, row):
    detects = "rcnn" in row["head"]
    more = ["--task", "detect", "--head_args", HEAD] if detects else ["--task", "segment", "--head_args", "{width: 64}"]
    command = command_of(row, dense[detects], tmp_path / "run", *more)
    check_run(vimamba, monkeypatch, row, command, tmp_path / "run", 0.9)


@pytest.mark.parametrize("pair", FORBIDDEN, ids=FORBIDDEN.values())
def test_options_that_cannot_meet_are_refused(vimamba, flat, tmp_path, pair):
    row = ROWS[0] | dict(pair)
    status, _, err = vimamba(*command_of(row, flat, tmp_path / "run"))
    assert status == 2
    assert err == f"error: {FORBIDDEN[pair]}\n"
    assert not (tmp_path / "run").exists()
