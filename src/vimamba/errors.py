"""The one exception for what a user can put right, and the suggestions that go with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what was asked or given; its message is one sentence that names the way out.

    The command line prints it as `error: ...` and exits with status 2, without a traceback.
    """


def nearest(name: str, choices: Iterable[str], count: int = 3) -> str:
    """A clause that names the choices spelt most like `name`, or an empty string."""
    by_lower = {choice.lower(): choice for choice in choices}
    found = difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.55)
    if not found:
        return ""
    return "did you mean " + " or ".join(by_lower[match] for match in found) + "?"


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)
