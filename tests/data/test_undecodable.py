"""Files that cannot be decoded cost themselves, not the run."""

import os

import pytest
import torch

from tests.cli.runs import train_arguments
from vimamba.data.loaders import Batch
from vimamba.data.transforms import AugmentOptions, Preprocessing
from vimamba.tasks.classification import ClassificationTask
from vimamba.tasks.optim import OptimOptions
from vimamba.tasks.weights import ModelCard


def spoil(folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"bad")


def test_a_batch_of_nothing_gives_gradients_of_nothing():
    """Of every parameter: the other processes of a run wait for each one's."""
    args = {"depth": 1, "embed_dim": 16, "d_state": 4}
    card = ModelCard("vim_nano", args, ["a", "b"], Preprocessing((16, 16), 1, (0.5,), (0.5,)))
    model = card.build()
    task = ClassificationTask(model, card, OptimOptions(), AugmentOptions(mixup=0.5))
    loss = task.training_step(Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), [], ["a.png: bad"]), 0)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("batch_size", [1, 6])
def test_training_goes_on_past_batches_of_nothing(vimamba, photos, tmp_path, batch_size):
    spoil(photos / "train" / "red")
    odd = photos / "train" / "blue" / os.fsdecode(b"\xff\x1b.png")
    (photos / "train" / "blue" / "0.png").rename(odd)
    odd.write_bytes(b"bad")
    more = ("--batch_size", batch_size, "--max_undecodable", 0.5, "--accumulate", 2)
    status, out, err = vimamba(*train_arguments(photos, tmp_path / "run", *more))
    assert status == 0, err
    assert "9 training images could not be decoded" in err
    assert r"/blue/\udcff\x1b.png: is not an image" in err
    assert "2/2" in out


@pytest.mark.parametrize("half", ["train", "val"])
def test_a_run_of_nothing_is_refused(vimamba, photos, tmp_path, half):
    spoil(photos / half)
    status, _, err = vimamba(*train_arguments(photos, tmp_path / "run", "--max_undecodable", 1))
    assert status == 2
    assert "images can be decoded" in err.splitlines()[-1]
    assert "stopped: none of the" in err
