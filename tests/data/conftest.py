"""Commands called in this process, as in the tests of the command line."""

from tests.cli.conftest import photos, trained, vimamba

__all__ = ["photos", "trained", "vimamba"]
