"""Files are whole or not there, and equal weights are equal bytes."""

import hashlib
import json
import os

import pytest
import torch
from safetensors import safe_open

from vimamba import files
from vimamba.data.transforms import Preprocessing
from vimamba.tasks.weights import ModelCard, load_model, save_model


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), files.whole(path, keep=tmp_path / "before.txt") as partial:  # noqa: PT012
        partial.write_text("half")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"


def test_the_old_file_takes_another_name(tmp_path):
    path, before = tmp_path / "file.txt", tmp_path / "before.txt"
    for text in ("one", "two", "three"):
        with files.whole(path, keep=before) as partial:
            partial.write_text(text)
    assert (path.read_text(), before.read_text()) == ("three", "two")


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(os, "fsync", lambda _: events.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("replace"), replace(*names)))
    files.write_text(tmp_path / "file.txt", "text")
    assert events == ["fsync", "replace", "fsync"]  # the file; the folder that lists it


def test_a_failed_flush_replaces_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"), files.whole(path, keep=tmp_path / "before.txt") as partial:
        partial.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"


NAMES = ["a\u00e9\u4e00", 'quote " and \\ backslash', "plain"]


def test_equal_weights_are_equal_bytes(tmp_path):
    card = ModelCard(
        "vim_nano", {"depth": 1, "embed_dim": 16, "d_state": 4}, NAMES, Preprocessing((16, 16), 1, (0.5,), (0.5,))
    )
    torch.manual_seed(0)
    model = card.build()
    sums = set()
    for i in range(12):  # safetensors draws an order for each file
        save_model(tmp_path / f"{i}.safetensors", model, card)
        sums.add(hashlib.sha256((tmp_path / f"{i}.safetensors").read_bytes()).hexdigest())
    assert len(sums) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert json.loads(file.metadata()["vimamba"])["class_names"] == NAMES
    again, read = load_model(tmp_path / "0.safetensors")
    assert read == card
    assert all(value.equal(again.state_dict()[name]) for name, value in model.state_dict().items())
