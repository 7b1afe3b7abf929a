"""Covering arrays: few rows in which every two levels of different factors meet."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations

Pair = frozenset[tuple[str, str]]
Row = dict[str, str]


def pairs_of(row: Mapping[str, str]) -> Iterator[Pair]:
    """Every two (factor, level) of a row."""
    return map(frozenset, combinations(row.items(), 2))


def all_pairs(factors: Mapping[str, Sequence[str]], forbidden: Collection[Pair] = ()) -> list[Pair]:
    """Every two levels of different factors that may meet, in the order of the factors."""
    found = [
        frozenset({(one, a), (two, b)})
        for one, two in combinations(factors, 2)
        for a in factors[one]
        for b in factors[two]
    ]
    return [pair for pair in found if pair not in forbidden]


def covering_rows(factors: Mapping[str, Sequence[str]], forbidden: Collection[Pair] = ()) -> list[Row]:
    """Rows of a level for each factor that hold every pair and no forbidden one; the same at each call.

    Greedy (AETG, Cohen et al. 1997, without its dice): a row begins with a pair that is not covered, and each further
    factor takes the level that covers most.

    Raises:
        ValueError: a pair is in no row that is free of forbidden ones.
    """
    left = dict.fromkeys(all_pairs(factors, forbidden))
    rows = []
    while left:
        row = _completed(dict(sorted(next(iter(left)))), factors, forbidden, left)
        if row is None:
            raise ValueError(f"{dict(sorted(next(iter(left))))} cannot meet in any row")
        rows.append({name: row[name] for name in factors})
        for pair in pairs_of(row):
            left.pop(pair, None)
    return rows


def _completed(
    row: Row, factors: Mapping[str, Sequence[str]], forbidden: Collection[Pair], left: Collection[Pair]
) -> Row | None:
    """The row with a level for each factor; None if there is none beside what it has."""
    absent = [name for name in factors if name not in row]
    if not absent:
        return row
    gain: dict[tuple[str, str], int] = {}
    for name in absent:
        for level in factors[name]:
            met = [frozenset({(name, level), other}) for other in row.items()]
            if not any(pair in forbidden for pair in met):
                gain[name, level] = sum(pair in left for pair in met)
    chosen = max(gain, key=gain.__getitem__, default=("", ""))[0]
    for name, level in sorted(gain, key=gain.__getitem__, reverse=True):
        if name == chosen and (whole := _completed({**row, name: level}, factors, forbidden, left)):
            return whole
    return None
