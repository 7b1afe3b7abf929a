"""A folder of tiny pictures in three colours, commands called in this process, and runs that many tests look at."""

import pytest

from tests.cli.runs import train_arguments, write_photos
from tests.dense import LEARN, SEGMENT, write_masks, write_objects
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
def segmented_run(tmp_path_factory):
    """A finished run on masks that has learned something, with its data beside it; not to be changed."""
    from vimamba import train  # not for the tests of the operators, which need nothing of it

    root = tmp_path_factory.mktemp("segmented")
    more = {"epochs": 12, "lr": 1e-2, "augment": "none"}
    return train(data=write_masks(root / "data"), output=root / "run", **SEGMENT | more)


@pytest.fixture(scope="session")
def detected_run(tmp_path_factory):
    """A finished run on objects that has learned something, with its data beside it; not to be changed."""
    from vimamba import train

    root = tmp_path_factory.mktemp("detected")
    return train(data=write_objects(root / "data", train=24, val=8), output=root / "run", **LEARN)


@pytest.fixture(scope="session")
def segmented(segmented_run):
    """Its folder."""
    return segmented_run.folder


@pytest.fixture(scope="session")
def detected(detected_run):
    """Its folder."""
    return detected_run.folder
