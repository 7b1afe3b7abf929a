"""The images below a folder, each once; and what lies beside them, counted."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from timm.utils.misc import natural_key

from vimamba.data.decode import extensions
from vimamba.errors import UserError, escaped

# Beside those that begin with a dot: what archives, file servers and systems leave in folders.
HIDDEN_NAMES = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__pycache__"}


class Found(NamedTuple):
    """An image: its path as the user would spell it, and where the file really is if links lead there."""

    path: str
    real: str
    linked: bool


class LeftOut:
    """What is not read, by reason; said in one line."""

    SHOWN = 4  # examples of each reason

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Count one more, or a few more, of a reason."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        examples = self.examples.setdefault(reason, [])
        if example not in examples and len(examples) <= self.SHOWN:
            examples.append(example)

    def lines(self, where: str | Path) -> list[str]:
        """One line, or none where everything was read."""
        parts = []
        for reason, count in self.counts.items():
            shown = [escaped(example) for example in self.examples[reason]]
            listed = ", ".join(shown[: self.SHOWN]) + (" ..." if len(shown) > self.SHOWN else "")
            parts.append(f"{reason}: {count} ({listed})")
        return [f"{escaped(str(where))}: not read: {'; '.join(parts)}"] if parts else []


def find_images(folder: Path, left_out: LeftOut | None = None) -> list[str]:
    """Every image below a folder, in natural order.

    Hidden files and folders, the folders of training runs, and whatever is no regular file are left out; a file that
    links lead to more than once is taken once.

    Raises:
        UserError: a folder may not be read.
    """
    left_out = left_out if left_out is not None else LeftOut()
    found = [*walk(str(folder), left_out)]
    return in_order(image.path for image in each_once(found, left_out))


def in_order(paths: Iterable[str]) -> list[str]:
    """As people count: 2.png before 10.png."""
    return sorted(paths, key=natural_key)


def each_once(found: list[Found], left_out: LeftOut) -> list[Found]:
    """One of the paths that lead to the same file: its own where it is among them, else the first."""
    if not any(image.linked for image in found):
        return found
    kept: dict[str, Found] = {}
    for image in sorted(found, key=lambda image: image.linked):
        if kept.setdefault(image.real, image) is not image:
            left_out.add("links to images that are read already", image.path)
    return [image for image in found if kept[image.real] is image]


def walk(folder: str, left_out: LeftOut) -> Iterator[Found]:
    """The images below a folder, which is entered once however many links lead to it."""
    seen: set[str] = set()
    folders = [(folder, os.path.realpath(folder), os.path.islink(folder))]
    links: list[tuple[str, str, bool]] = []  # followed when all that lies here itself is known
    while folders or links:
        path, real, linked = folders.pop() if folders else links.pop()
        if real in seen:
            left_out.add("links to folders that are read already", path)
            continue
        seen.add(real)
        for entry in entries(path):
            kind = kind_of(entry)
            if kind == "folder":
                if is_run(entry.path):
                    left_out.add("folders of training runs", entry.path)
                elif entry.is_symlink():
                    links.append((entry.path, os.path.realpath(entry.path), True))
                else:
                    folders.append((entry.path, os.path.join(real, entry.name), linked))
            elif is_image(entry, kind, left_out):
                inside = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                yield Found(entry.path, inside, linked or entry.is_symlink())


def entries(folder: str) -> list[os.DirEntry[str]]:
    """What a folder holds, without what is hidden."""
    try:
        with os.scandir(folder) as inside:
            return [entry for entry in inside if entry.name[0] != "." and entry.name not in HIDDEN_NAMES]
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{escaped(folder)}: cannot be read ({reason}); mend that or move it away") from error


def kind_of(entry: os.DirEntry[str]) -> str:
    """Where links lead: "folder", "file", or "neither" for pipes, devices and links to nowhere."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else "neither"
    except OSError:  # a link to itself
        return "neither"


def is_image(entry: os.DirEntry[str], kind: str, left_out: LeftOut) -> bool:
    """Whether an entry that is no folder is taken for an image; counted if not."""
    if not entry.name.lower().endswith(extensions()):
        left_out.add("files of other kinds", os.path.splitext(entry.name)[1].lower() or entry.name)
        return False
    if kind != "file":
        left_out.add("pipes, devices or broken links", entry.path)
        return False
    return True


def is_run(folder: str) -> bool:
    """Whether a folder is what a training run leaves: its pictures are no data."""
    held = (os.path.join(folder, name) for name in ("model.safetensors", "checkpoints"))
    return os.path.isfile(os.path.join(folder, "config.yaml")) and any(map(os.path.exists, held))
