"""A server that most tests ask, and the photographs that it is asked about."""

import io

import pytest
from PIL import Image

from tests.serve.servers import Server


@pytest.fixture(scope="package")
def server(trained, tmp_path_factory):
    """With bounds that a test can reach."""
    log = tmp_path_factory.mktemp("server") / "log"
    bounds = ["--max_upload_mb", "0.3", "--max_megapixels", "0.25", "--timeout_s", "2", "--max_queue", "40"]
    with Server(trained, *bounds, log=log) as running:
        yield running


@pytest.fixture(scope="session")
def photographs(trained):
    """Files by name."""
    return {str(path): path.read_bytes() for path in sorted((trained.parent / "photos" / "val").glob("*/*.png"))}


@pytest.fixture(scope="session")
def photograph(photographs):
    return next(iter(photographs.values()))


def encoded(size, kind="png", colour="red", **how):
    """A picture of one colour in a file."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind, **how)
    return file.getvalue()
