"""A folder of images: classes are its sub-folders; halves are `train/` and `val/`, or drawn by a hash of names."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from vimamba.data.decode import extensions
from vimamba.data.walk import Found, LeftOut, each_once, entries, in_order, is_image, is_run, kind_of, walk
from vimamba.errors import UserError, escaped, require, showable

Classes = dict[str, list[str]]  # the paths of each class's images

LOOSE = "images outside the sub-folders"  # as a reason to leave them out

_MORE = r"([ _-]?(set|data|images?))?"
TRAIN, VAL, TEST = (re.compile(f"({names}){_MORE}", re.IGNORECASE) for names in (
    "train|training", "val|valid|validation|eval|evaluation", "test|testing",
))  # fmt: skip


class Reading(NamedTuple):
    """A folder's classes, of each half where it has two (else `val` is None), and what to say of it."""

    train: Classes
    val: Classes | None
    halves: tuple[str, str] | None  # their folders' names, "" for one that is not there
    notes: list[str]


def read_folder(root: Path) -> Reading:
    """Images by class, of the folder or of its halves.

    Raises:
        UserError: it holds no images in sub-folders, or can be read in more ways than one.
    """
    left_out = LeftOut()
    tops = _sub_folders(root, left_out)
    halves = find_halves(root, tops)
    train, val, notes = {}, None, []
    if halves is None:
        every = each_once([image for found in tops.values() for image in found], left_out)
        train = _by_class(str(root), every, left_out)
        notes = _alike(train, root)
    else:
        for name, found in tops.items():
            if found and name not in halves:
                left_out.add("images beside the halves", name + os.sep, len(found))
        every = each_once([image for name in halves if name for image in tops[name]], left_out)
        if halves[0]:
            train = _by_class(os.path.join(root, halves[0]), every, left_out)
        if halves[1]:
            val = _by_class(os.path.join(root, halves[1]), every, left_out)
        if halves != ("train", "val"):  # which are as documented
            learnt = f"{halves[0]}{os.sep} to learn from, " if halves[0] else ""
            held_out = f"{halves[1]}{os.sep}" if halves[1] else "a share of it"
            notes = [f"{root}: taken as halves: {learnt}{held_out} held out"]
    _check_classes(root, {**train, **(val or {})}, left_out)
    return Reading(train, val, halves, notes + left_out.lines(root))


def _sub_folders(root: Path, left_out: LeftOut) -> dict[str, list[Found]]:
    tops: dict[str, list[Found]] = {}
    for entry in sorted(entries(str(root)), key=lambda entry: entry.name):
        kind = kind_of(entry)
        if kind == "folder" and is_run(entry.path):
            left_out.add("folders of training runs", entry.path)
        elif kind == "folder":
            tops[entry.name] = [*walk(entry.path, left_out)]
        elif is_image(entry, kind, left_out):
            left_out.add(LOOSE, entry.path)
    return tops


def _check_classes(root: Path, classes: Classes, left_out: LeftOut) -> None:
    count = left_out.counts.get(LOOSE, 0)
    loose = f" ({count} images lie loose in it)" if count else ""
    require(
        bool(classes),
        f"`data` {root}: no images found in sub-folders, one a class{loose}; looked for {' '.join(extensions())}",
    )
    for name in classes:
        if not showable(name):
            raise UserError(f"`data` {root}: the class folder '{escaped(name)}' has a name that is no text; rename it")


def find_halves(root: Path, tops: dict[str, list[Found]]) -> tuple[str, str] | None:
    """The names of the sub-folders to learn from and to hold out, "" where there is none; None if these are classes.

    Raises:
        UserError: the names allow more than one reading.
    """
    filled = [name for name, found in tops.items() if found]
    trains, vals, tests = ([name for name in filled if kind.fullmatch(name)] for kind in (TRAIN, VAL, TEST))
    named = [*trains, *vals, *tests]
    # A half has classes: a folder of that name which holds its images itself may be a class, of railway cars.
    nested = [name for name in named if any(_depth(root, image) > 2 for image in tops[name])]
    others = [name for name in filled if name not in named]
    if not nested:
        both = f"{trains[0]}/ and {(vals + tests)[0]}/" if trains and vals + tests else ""
        require(
            not both or bool(others),
            f"`data` {root}: {both} hold images, but no sub-folders of them, one a class",
        )
        return None
    trains, vals, tests = ([name for name in names if name in nested] for names in (trains, vals, tests))
    vals = vals or tests
    for names in (trains, vals):
        listed = " and ".join(f"{name}/" for name in names)
        require(len(names) < 2, f"`data` {root}: {listed} may be the same half; leave one of them there")
    if others and not (trains and vals):
        beside = ", ".join(f"{name}/" for name in others[:3]) + (" ..." if len(others) > 3 else "")
        raise UserError(
            f"`data` {root}: {nested[0]}/ may be a half of the images or a class beside {beside}; "
            f"if it is a half, move {beside} elsewhere or into it, and if it is a class, put its images right into it"
        )
    return "".join(trains), "".join(vals)


def _depth(root: Path, image: Found) -> int:
    """1 right in the root, 2 in a sub-folder of it ..."""
    return image.path.count(os.sep) - os.path.join(root, "").count(os.sep) + 1


def _by_class(folder: str, found: list[Found], left_out: LeftOut) -> Classes:
    """Class name to images; a class is a sub-folder, with everything below it."""
    classes: Classes = {}
    prefix = os.path.join(folder, "")
    for path in in_order(image.path for image in found if image.path.startswith(prefix)):
        name, inside, _ = path[len(prefix) :].partition(os.sep)
        if inside:
            classes.setdefault(name, []).append(path)
        else:
            left_out.add(LOOSE, path)
    for entry in entries(folder):
        if kind_of(entry) == "folder" and entry.name not in classes and not is_run(entry.path):
            left_out.add("sub-folders without images", os.path.join(entry.path, ""))
    return {name: classes[name] for name in in_order(classes)}


def _alike(classes: Classes, root: Path) -> list[str]:
    """A line on classes that hold sub-folders of the same names: they may be halves by names we do not know."""
    inside = [{path[len(os.path.join(root, name, "")) :].rpartition(os.sep)[0].partition(os.sep)[0] for path in paths}
              for name, paths in classes.items()]  # fmt: skip
    if len(inside) < 2 or len(inside[0]) < 2 or any(names != inside[0] for names in inside):
        return []
    same = ", ".join(f"{name}/" for name in sorted(inside[0])[:3])
    listed = ", ".join(f"{name}/" for name in [*classes][:3])
    return [
        f"{root}: {listed} are taken for the classes, though each holds {same}; "
        "if they are halves, name them train/ and val/"
    ]
