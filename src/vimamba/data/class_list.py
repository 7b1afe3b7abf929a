"""What masks mean: lists of classes as they lie beside them in files, and from values or colours to classes."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from vimamba.data.samples import IGNORE
from vimamba.errors import UserError, escaped, naming, require, showable, shown

# In the order in which they are looked for: where two lie in a folder, the one with colours is meant.
CLASS_FILES = (
    "palette.json", "palette.csv", "palette.txt", "class_dict.csv", "labelmap.txt", "classes.txt", "objectInfo150.txt",
)  # fmt: skip
UNCLASSED = {"ignore", "void"}  # names of colours that stand for no class
MAX_BYTES = 2**20  # of a list, which may be a stranger's

IGNORED = 255  # the value of pixels that are neither learned from nor measured, as in Cityscapes, VOC and COCO
VALUES = 2**16  # of the masks that are read
COLOURED = "is coloured; give each colour's class in a palette.txt of `name r g b` lines there, or in `class_names`"

_UNKNOWN = -2  # what stands for nothing, in place of a class

Colour = tuple[int, int, int]

_GAP = r"[\s,;:]+"
_RGB = rf"(?P<r>\d{{1,3}}){_GAP}(?P<g>\d{{1,3}}){_GAP}(?P<b>\d{{1,3}})"
_NAME_FIRST = re.compile(rf"(?P<name>.+?){_GAP}{_RGB}[\s,;:]*")
_COLOUR_FIRST = re.compile(rf"{_RGB}{_GAP}(?P<name>.+)")
_HEADERS = ({"r", "g", "b"}, {"red", "green", "blue"})


@dataclasses.dataclass(frozen=True)
class ClassList:
    """The classes of masks.

    Args:
        names: of the classes
        values: the class of each value of a mask of numbers from 0 on, or None for one that stands for no class
        colours: the same of each colour of a coloured mask, if there are any
    """

    names: list[str]
    values: list[int | None]
    colours: dict[Colour, int | None] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, names: list[str]) -> ClassList:
        """Classes that are numbered from 0."""
        return cls(names, [*range(len(names))])


def find_class_list(root: Path) -> Path | None:
    """The list that lies in a folder."""
    return next((root / name for name in CLASS_FILES if (root / name).is_file()), None)


def read_class_list(path: Path) -> ClassList:
    """A list of any of the kinds that are met.

    One name a line; `name r g b` or `r,g,b,name` lines; JSON {name: [r, g, b]} or [name, ...]; ADE20K's table.

    Raises:
        UserError: it is none of these, names a class or a colour twice, or has none.
    """
    with naming(escaped(str(path))):
        try:
            require(path.is_file(), "is no file")  # a pipe would be waited for
            require(
                path.stat().st_size <= MAX_BYTES, f"is larger than the {MAX_BYTES // 2**20} MB of a list of classes"
            )
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot be read ({error})") from error
        return _checked(_entries(path, text))


Entry = tuple[str | None, Colour | None]


def _entries(path: Path, text: str) -> list[Entry]:
    """A name, or None for no class, and a colour, if any, of each value."""
    if path.suffix.lower() == ".json":
        return _of_json(text)
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    columns = lines[0].split("\t") if lines else []
    if "Name" in columns and "Idx" in columns:  # ADE20K's, whose masks have 0 for whatever is none of the 150
        place = columns.index("Name")
        rows = [line.split("\t") for line in lines[1:]]
        return [(None, None), *((row[place].strip(), None) for row in rows if len(row) > place)]
    if lines and any(header <= {*re.split(r"[\s,;]+", lines[0].lower())} for header in _HEADERS):
        lines = lines[1:]
    matches = [_NAME_FIRST.fullmatch(line) or _COLOUR_FIRST.fullmatch(line) for line in lines]
    if not all(matches):
        coloured = next((line for line, match in zip(lines, matches, strict=True) if match), None)
        plain = next(line for line, match in zip(lines, matches, strict=True) if not match)
        require(coloured is None, f"has a colour in the line {shown(coloured)} and none in {shown(plain)}")
        return [(line, None) for line in lines]
    colours = [_colour([int(match[part]) for part in "rgb"]) for match in matches if match]
    return [(match["name"].strip(), colour) for match, colour in zip(matches, colours, strict=True) if match]


def _of_json(text: str) -> list[Entry]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not JSON ({str(error)[:100]})") from error
    if isinstance(values, list):
        require(all(isinstance(name, str) for name in values), "lists what are no names")
        return [(name, None) for name in values]
    require(isinstance(values, dict), f"holds {shown(values)}; give {{name: [r, g, b]}} or a list of names")
    return [(name, _colour(colour)) for name, colour in values.items()]


def _colour(value: Any) -> Colour:
    three = (
        isinstance(value, list) and len(value) == 3 and all(type(part) is int and 0 <= part <= 255 for part in value)
    )
    require(three, f"has the colour {shown(value)}; give three whole numbers from 0 to 255")
    return tuple(value)


def _checked(entries: list[Entry]) -> ClassList:
    found = ClassList([], [])
    for name, colour in entries:
        if name is not None:
            require(bool(name) and showable(name), f"has the name '{escaped(name)}', which is no text")
            require(name not in found.names, f"names the class {name} twice")
        unclassed = name is None or (colour is not None and name.lower() in UNCLASSED)
        index = None if unclassed else len(found.names)
        found.values.append(index)
        if colour is not None:
            require(colour not in found.colours, f"gives the colour {colour} to {name} and to another class")
            found.colours[colour] = index
        if name is not None and not unclassed:
            found.names.append(name)
    require(bool(found.names), "names no classes")
    return found


class Meaning:
    """What the values or the colours of a mask stand for."""

    def __init__(self, classes: ClassList, ignore_index: int | None, binary: bool = False):
        values = [IGNORE if index is None else index for index in classes.values]
        self.described = f"the {len(classes.names)} classes are {classes.values.index(0)} to {len(values) - 1}"
        colours = {rgb: IGNORE if index is None else index for rgb, index in classes.colours.items()}
        self.class_of_value = np.full(VALUES, _UNKNOWN, dtype=np.int32)
        if len(values) <= IGNORED:
            self.class_of_value[IGNORED] = IGNORE
        if colours and all(red == green == blue for red, green, blue in colours):  # such as black and white
            self.class_of_value[[red for red, _, _ in colours]] = [*colours.values()]
        else:
            self.class_of_value[: len(values)] = values
        if binary:
            self.class_of_value[[0, IGNORED]] = 0, 1
        if ignore_index is not None:
            self.class_of_value[ignore_index] = IGNORE
        coded = sorted((_code(*rgb), index) for rgb, index in colours.items())
        self.codes, self.class_of_code = np.array(coded, dtype=np.int32).reshape(-1, 2).T

    def classes(self, pixels: np.ndarray) -> np.ndarray:
        """The class of each pixel, int32 (height, width).

        Raises:
            UserError: a value or a colour stands for nothing; the message goes on from the mask's name.
        """
        if pixels.ndim == 2:
            beyond = pixels[(pixels < 0) | (pixels >= VALUES)]
            if beyond.size:
                raise UserError(f"has the value {beyond[0]} in {beyond.size} pixels; {self.described}")
            found = self.class_of_value[pixels]
            self._check(found, pixels, "value")
            return found
        if not self.codes.size:
            require(is_grey(pixels), COLOURED)
            return self.classes(pixels[..., 0])
        codes = _code(*np.moveaxis(pixels.astype(np.int32), -1, 0))
        places = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1)
        found = np.where(self.codes[places] == codes, self.class_of_code[places], _UNKNOWN)
        self._check(found, pixels, "colour")
        return found

    def _check(self, found: np.ndarray, pixels: np.ndarray, what: str) -> None:
        unknown = pixels[found == _UNKNOWN]
        if len(unknown):
            alike = int((unknown == unknown[0]).reshape(len(unknown), -1).all(1).sum())
            known = self.described if what == "value" else "the palette does not have it"
            raise UserError(f"has the {what} {_plain(unknown[0])} in {alike} pixels; {known}")


def is_grey(pixels_HWC: np.ndarray) -> bool:
    """Whether they are numbers, written by a program that knows coloured pictures alone."""
    return bool((pixels_HWC[..., :1] == pixels_HWC).all())


def _code(red: Any, green: Any, blue: Any) -> Any:
    """One number of a colour."""
    return red << 16 | green << 8 | blue


def _plain(value: np.ndarray) -> str:
    return " ".join(map(str, np.atleast_1d(value).tolist()))
