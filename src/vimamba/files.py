"""Files that are whole or not there: written beside their place, flushed to the disk, then put in it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".*.partial*"  # what a process that was killed may leave beside its files


@contextlib.contextmanager
def whole(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """A path to write to that becomes `path` when the block ends, and is removed if the block fails.

    Whatever happens, a full disk or the loss of power included, `path` is the old file or the new one.

    Args:
        path: the file to write or replace.
        keep: a name beside it that the old file then goes by.

    Raises:
        OSError: the file cannot be written or flushed; the old one is still in its place.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        sync(partial)
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text, in UTF-8, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    if path.is_dir() and os.name != "posix":  # elsewhere folders cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
