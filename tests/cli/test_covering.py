"""The covering arrays that the tests of the options run."""

import pytest

from tests.cli.covering import all_pairs, covering_rows, pairs_of
from tests.cli.option_values import FACTORS, FORBIDDEN

SMALL = {"a": "12", "b": "123", "c": "12", "d": "12"}


@pytest.mark.parametrize(
    ("factors", "forbidden", "most"),
    [
        (SMALL, (), 8),
        (SMALL, (frozenset({("a", "1"), ("b", "3")}), frozenset({("c", "2"), ("d", "2")})), 12),
        ({str(i): "12" for i in range(20)}, (), 20),
        (FACTORS, FORBIDDEN, 30),
    ],
)
def test_every_pair_is_in_a_row_and_no_forbidden_one(factors, forbidden, most):
    rows = covering_rows(factors, forbidden)
    covered = {pair for row in rows for pair in pairs_of(row)}
    assert covered == set(all_pairs(factors, forbidden))
    assert all(row.keys() == factors.keys() for row in rows)
    assert len(rows) <= most
    assert rows == covering_rows(factors, forbidden)


def test_a_pair_that_cannot_be_is_named():
    forbidden = [frozenset({("a", "1"), ("b", level)}) for level in "12"]
    with pytest.raises(ValueError, match=r"'a': '1'.* cannot meet"):
        covering_rows({"a": "12", "b": "12", "c": "12"}, forbidden)
