"""Errors that are the user's to mend: one sentence, shown without a traceback by the command line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input, said in one sentence that names the thing, the value and the way out."""


def nearest(name: str, names: Iterable[str]) -> str:
    """A clause that suggests the names nearest to `name`, or nothing if none is near."""
    by_lower = {known.lower(): known for known in names}
    found = difflib.get_close_matches(str(name).lower(), by_lower, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(by_lower[match] for match in found)}?" if found else ""


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)
