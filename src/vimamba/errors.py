"""Errors that are the user's to mend: one sentence, shown without a traceback by the command line."""

from __future__ import annotations

import difflib
import reprlib
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxstring, _SHORT.maxother = 2, 8, 8, 80, 80


HIDDEN = {"Cc", "Cs", "Zl", "Zp"}  # Unicode's controls, halves of letters, and separators of lines
TURNS = {*"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}  # which make a text read otherwise than it is


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


def shown(value: Any) -> str:
    """A value from a file as it may stand in a sentence: short, on one line, nothing in it that moves a terminal."""
    return _SHORT.repr(value)


def showable(text: str) -> bool:
    """Whether a name can be written to any terminal and file that takes Unicode, and reads there as it is."""
    return not any(letter in TURNS or unicodedata.category(letter) in HIDDEN for letter in text)


def escaped(name: str) -> str:
    """A name, with `\\udcff` and the like for letters that are not showable: file names hold any bytes."""
    if showable(name):
        return name
    return "".join(letter if showable(letter) else ascii(letter)[1:-1] for letter in name)


def one_line(error: BaseException) -> str:
    """What an error of another library says, as a clause: its words on one line, at most 200 characters, printable."""
    words = " ".join(str(error)[:1000].split())
    text = "".join(letter if letter.isprintable() else "?" for letter in words)
    return (text if len(text) <= 200 else f"{text[:197]}...") or type(error).__name__


@contextmanager
def naming(source: Any) -> Iterator[None]:
    """A UserError from inside, with `source` named in front."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that something does not fit into the memory, of the machine or of a device."""
    of_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or of_torch
