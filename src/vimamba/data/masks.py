"""Images with a mask of classes each: two folders side by side, matched by the names of their files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ImageOps
from torchvision import tv_tensors

from vimamba.data.class_list import (
    COLOURED,
    IGNORED,
    VALUES,
    ClassList,
    Meaning,
    find_class_list,
    is_grey,
    read_class_list,
)
from vimamba.data.copies import copies_across
from vimamba.data.decode import DecodeError, Upright, opened, upright
from vimamba.data.folder import TEST, TRAIN, VAL
from vimamba.data.image_data import ImageData, Opening
from vimamba.data.samples import FileSamples, size_of
from vimamba.data.walk import LeftOut, entries, find_images, kind_of
from vimamba.errors import UserError, escaped, require

IMAGES = re.compile("images?|imgs?|jpegimages|leftimg8bit|photos", re.IGNORECASE)
MASKS = re.compile(
    "masks?|annotations?|anns?|labels?|gt|gtfine|ground[ _-]?truths?|segmentations?|segmentationclass", re.IGNORECASE
)
SUFFIX = re.compile("[ _-](masks?|seg|segmentation|labels?|gt)$", re.IGNORECASE)  # of a mask's name beside its image's
LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif")
NO_JPEG = "is a JPEG, which blurs the numbers of classes; write masks as PNG"
UNMATCHED = 0.1  # greatest share of files without a partner: with more, the names follow another rule

MOST_NUMBERED = 256  # classes without a list of them: more may be numbers of objects


class MaskSamples(FileSamples):
    """Image files with a mask file each."""

    def __init__(self, paths: Iterable[str], masks: Iterable[str], meaning: Meaning, root: str):
        paths = [*paths]
        super().__init__(paths, np.zeros(len(paths)), root)
        self.masks, self.meaning = np.array([*masks], dtype=np.str_), meaning

    def target(self, index: int) -> tv_tensors.Mask:
        path = str(self.masks[index])
        pixels = read_mask(path, upright(self.name(index)))
        try:
            return tv_tensors.Mask(torch.from_numpy(self.meaning.classes(pixels)))
        except UserError as error:
            raise DecodeError(path, str(error)) from None

    def marks(self) -> list[int]:
        return [image + size_of(mask) for image, mask in zip(super().marks(), self.masks.tolist(), strict=True)]

    def select(self, rows: list[int]) -> MaskSamples:
        return MaskSamples(self.paths[rows], self.masks[rows], self.meaning, self.root)


def read_mask(path: str, of: Upright | None = None) -> np.ndarray:
    """The values (height, width) of a mask, those of a palette its indices, or the colours (height, width, 3).

    A mask of the size that the image `of` has in its file is turned as the image is; one of the size that it has when
    upright was drawn on what is shown.

    Raises:
        DecodeError: the file is no mask, or of another size than the image.
    """
    with opened(path) as image:
        require(image.format != "JPEG", NO_JPEG)
        image = ImageOps.exif_transpose(image)
        if of is not None and of.turn is not None and image.size != of.size:
            image = image.transpose(of.turn)
        require(
            of is None or image.size == of.size,
            f"is {image.width} x {image.height} pixels, and its image {of and of.size[0]} x {of and of.size[1]}",
        )
        if image.mode in ("RGB", "RGBA", "RGBX"):
            return np.asarray(image)[..., :3]
        numbered = image.mode in ("1", "L", "P", "I") or image.mode.startswith("I;16")
        require(numbered, f"has pixels of the kind {image.mode}; write masks as 8-bit or 16-bit PNG")
        pixels = np.asarray(image)
        return pixels.astype(np.uint8 if pixels.dtype == bool else np.int32)


def open_masks(name: str, opening: Opening) -> ImageData:
    """Images and masks of classes from a folder that has `images/` and `masks/` (or `annotations/`, `labels/`).

    Each of the two may hold halves, train/ and val/, or there may be two of them in each of train/ and val/; otherwise
    images are held out as `opening` says. Masks are 1, 8 or 16-bit numbers of classes, or colours. ADE20K is read as it
    comes.

    The file `opening.class_names` has the names of the classes, and their colours; without it, it is a list that lies
    in the folder, and without one the numbers that the masks have. Colours called ignore or void stand for no class.

    Raises:
        UserError: the folder has another layout, or many files have no partner.
    """
    root, left_out = Path(name), LeftOut()
    folders = find_folders(root)
    require(
        "train" in folders or not opening.strict,
        f"`data` {escaped(name)}: has nothing to learn from, but a half to hold out",
    )
    pairs = {half: _pairs(half_folders, left_out) for half, half_folders in folders.items()}
    everything = [mask for half in pairs.values() for mask in half.values()]
    listed = Path(opening.class_names) if opening.class_names else find_class_list(root)
    classes, binary, notes = _classes(root, listed, everything, opening.ignore_index)
    meaning = Meaning(classes, opening.ignore_index, binary)
    halves = {half: MaskSamples(found, found.values(), meaning, str(root)) for half, found in pairs.items()}
    train = halves.get("train", MaskSamples([], [], meaning, str(root)))
    drawn = "val" not in halves or (opening.kept is not None and opening.kept.drawn)
    train, val = opening.halve_unclassed(name, train) if drawn else (train, halves["val"])
    notes += [
        *left_out.lines(name),
        *(f"{name}: {line}" for line in (copies_across(train, val) if opening.strict else [])),
    ]
    return ImageData(name, classes.names, train, val, name, drawn=drawn, notes=notes)


class Folders(NamedTuple):
    """Where the images of a half are, and their masks."""

    images: Path
    masks: Path


def find_folders(root: Path) -> dict[str, Folders]:
    """The folders to learn from, "train", and those held out, "val", where there are any.

    Raises:
        UserError: there are none, or more than one may be meant.
    """
    both = _both(root)
    if both is None:
        halves = {half: _both(folder) for half, folder in _halves(root).items()}
        found = {half: folders for half, folders in halves.items() if folders is not None}
    else:
        images, masks = (_halves(folder) for folder in both)
        found = {half: Folders(images[half], masks[half]) for half in images if half in masks} or {"train": both}
    require(
        bool(found),
        f"`data` {escaped(str(root))}: has no images/ with masks/ (or annotations/, labels/) beside it, nor train/ and "
        "val/ with these",
    )
    return found


def _both(folder: Path) -> Folders | None:
    images, masks = (_only(folder, kind) for kind in (IMAGES, MASKS))
    return Folders(images, masks) if images and masks else None


def _halves(folder: Path) -> dict[str, Path]:
    """Sub-folders called train, val and the like; test where there is no val."""
    found = {"train": _only(folder, TRAIN), "val": _only(folder, VAL) or _only(folder, TEST)}
    return {half: path for half, path in found.items() if path}


def _only(folder: Path, kind: re.Pattern[str]) -> Path | None:
    """The sub-folder with images that has a name of a kind."""
    names = (entry.name for entry in entries(str(folder)) if kind_of(entry) == "folder" and kind.fullmatch(entry.name))
    found = [folder / name for name in sorted(names)]
    found = [path for path in found if find_images(path)] if len(found) > 1 else found
    listed = " and ".join(f"{path.name}/" for path in found)
    require(len(found) < 2, f"`data` {escaped(str(folder))}: {listed} may both be meant; leave one of them there")
    return found[0] if found else None


def _pairs(folders: Folders, left_out: LeftOut) -> dict[str, str]:
    """Each image's path with its mask's."""
    images, masks = ({path: _key(path, folder) for path in find_images(folder, left_out)} for folder in folders)
    require(bool(images), f"{escaped(str(folders.images))}: holds no images")
    lossy = next((escaped(path) for path in masks if path.lower().endswith(LOSSY)), None)
    require(lossy is None, f"{lossy}: {NO_JPEG}")
    wanted = {*images.values()}
    by_key: dict[str, str] = {}
    alone = []
    for path, own in masks.items():
        key = own if own in wanted else SUFFIX.sub("", own)
        if key not in wanted:
            alone.append(path)
        elif by_key.setdefault(key, path) != path:
            left_out.add("second masks of an image", path)
    found = {path: by_key[key] for path, key in images.items() if key in by_key}
    without = [path for path in images if path not in found]
    for paths, count, what in (
        (without, len(images), "images without a mask"),
        (alone, len(masks), "masks without an image"),
    ):
        few = len(paths) <= UNMATCHED * count
        first = escaped(paths[0]) if paths else ""
        require(
            few,
            f"{escaped(str(folders.images))}: {len(paths)} of {count} are {what} of the same name in "
            f"{folders.masks.name}/, such as {first}; rename or remove them",
        )
        for path in paths:
            left_out.add(what, path)
    return found


def _key(path: str, folder: Path) -> str:
    """A file's name within a folder, without its ending."""
    return os.path.splitext(os.path.relpath(path, folder))[0]


def _classes(
    root: Path, listed: Path | None, masks: list[str], ignore_index: int | None
) -> tuple[ClassList, bool, list[str]]:
    """The classes, whether the masks are 0 and 255 for two of them, and what to say of that."""
    where = escaped(str(root))
    classes = read_class_list(listed) if listed is not None else None
    if classes is not None and (len(classes.names) != 2 or classes.colours):
        return classes, False, []
    values = _values(masks)
    if ignore_index is None and values <= {0, IGNORED} and IGNORED in values:
        classes = classes or ClassList.of(["background", "foreground"])
        return classes, True, [f"{where}: the masks hold 0 and 255 alone: taken for {' and '.join(classes.names)}"]
    if classes is not None:
        return classes, False, []
    most = max(values - {IGNORED if ignore_index is None else ignore_index}, default=0)
    named = "name the classes, one a line, in a file classes.txt there or `class_names`"
    require(
        most < MOST_NUMBERED,
        f"`data` {where}: the masks hold values to {most}; if these are classes and not objects, {named}",
    )
    note = f"{where}: no list of classes: the values of the masks, 0 to {most}, are taken for them; {named}"
    return ClassList.of([str(value) for value in range(most + 1)]), False, [note]


def _values(masks: Iterable[str]) -> set[int]:
    """What the masks hold, of those that can be read."""
    found = np.zeros(VALUES, dtype=bool)
    for path in masks:
        try:
            pixels = read_mask(path)
        except DecodeError:  # which reading will tell
            continue
        if pixels.ndim == 3:
            require(is_grey(pixels), f"{escaped(path)}: {COLOURED}")
            pixels = pixels[..., 0]
        found[pixels[(pixels >= 0) & (pixels < VALUES)]] = True
    return {*np.flatnonzero(found).tolist()}
