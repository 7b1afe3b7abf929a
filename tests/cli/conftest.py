"""A folder of tiny pictures in three colours, and commands called in this process."""

import pytest

from tests.cli.runs import train_arguments, write_photos
from tests.dense import LEARN, SEGMENT, write_masks, write_objects
from vimamba import train
from vimamba.cli import main


@pytest.fixture
def photos(tmp_path):
    return write_photos(tmp_path / "photos")


@pytest.fixture
def vimamba(capsys):
    """Call a command: vimamba("eval", run) -> (status, stdout, stderr)."""

    def call(*arguments):
        status = main([str(argument) for argument in arguments])
        return (status, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a finished run on three colours; not to be changed."""
    root = tmp_path_factory.mktemp("trained")
    photos = write_photos(root / "photos")
    more = ("--epochs", 6, "--lr", 5e-3, "--augment", "none")
    assert main([str(a) for a in train_arguments(photos, root / "run", *more)]) == 0
    return root / "run"


@pytest.fixture(scope="session")
def segmented(tmp_path_factory):
    """The folder of a finished run on masks, with its data beside it; not to be changed."""
    root = tmp_path_factory.mktemp("segmented")
    more = {"epochs": 12, "lr": 1e-2, "augment": "none"}
    return train(data=write_masks(root / "data"), output=root / "run", **SEGMENT | more).folder


@pytest.fixture(scope="session")
def detected(tmp_path_factory):
    """The folder of a finished run on objects, with its data beside it; not to be changed."""
    root = tmp_path_factory.mktemp("detected")
    return train(data=write_objects(root / "data", train=24, val=8), output=root / "run", **LEARN).folder
