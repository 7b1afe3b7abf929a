"""What the tests of ops share."""

from __future__ import annotations

import pytest

from vimamba.ops.cpu import library


@pytest.fixture(params=library.instruction_sets() if library.UNAVAILABLE is None else ["none"])
def each_set(request):
    """The test runs once with each instruction set of this machine."""
    if library.UNAVAILABLE is not None:
        pytest.skip(library.UNAVAILABLE)
    before = library.instruction_set()
    assert library.use_instruction_set(request.param)
    yield request.param
    library.use_instruction_set(before)
