"""COCO's JSON: read, with everything in it doubted, into arrays; and written."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vimamba.data.decode import DecodeError, upright
from vimamba.data.outlines import NOTHING, kept, need_package, packed, packed_runs
from vimamba.data.walk import LeftOut
from vimamba.errors import UserError, escaped, naming, one_line, require, showable, shown
from vimamba.files import write_text

MAX_BYTES = 2**31  # of a file of annotations; that of COCO's 118 000 images has 450 MB
MAX_PIXELS = 2**28  # of an image
UNUSABLE = 0.1  # greatest share of the images or annotations: with more, something else is wrong

Annotation = tuple[tuple[float, float, float, float], int, bool, float, np.ndarray]  # see Objects


@dataclasses.dataclass
class Objects:
    """The objects of all images, those of one side by side.

    Args:
        boxes_N4: XYXY in pixels, cut at the border of the image
        labels_N: their classes
        crowd_N: whether each is a region of many objects
        area_N: in pixels, as the file has it
        outlines, start_N: what `outlines` keeps of each, and where in it each one's begins; one start more at the end
    """

    boxes_N4: np.ndarray
    labels_N: np.ndarray
    crowd_N: np.ndarray
    area_N: np.ndarray
    outlines: np.ndarray
    start_N: np.ndarray

    def outline(self, index: int) -> np.ndarray:
        """Of one object."""
        return self.outlines[self.start_N[index] : self.start_N[index + 1]]


@dataclasses.dataclass
class Annotations:
    """What a file says.

    Args:
        class_names: in the order of the categories' numbers
        paths: of the images
        sizes_I2: height and width of each
        first_I: where each one's objects begin, and one more at the end
        outlined: whether half of the objects or more have an outline
        notes: what was left out or taken for something, a line each
    """

    class_names: list[str]
    paths: list[str]
    sizes_I2: np.ndarray
    first_I: np.ndarray
    objects: Objects
    outlined: bool
    notes: list[str]


def read_annotations(path: Path, folders: list[Path], class_names: list[str] | None = None) -> Annotations:
    """Images and their objects from COCO's JSON.

    Args:
        folders: where the images may be: the first that has one of those listed
        class_names: the classes to learn from, which those of the file have to be among

    Raises:
        UserError: it is no such file, or more than a tenth of it cannot be used.
    """
    with naming(f"`data` {escaped(str(path))}"):
        parts = _parts(path)
        reader = _Reader(parts, path, folders, class_names)
        for entry in parts["images"]:
            reader.add_image(entry)
        _check(reader.images_left_out, len(parts["images"]), "images")
        require(bool(reader.paths), "lists no images")
        for entry in parts["annotations"]:
            reader.add_annotation(entry)
        _check(reader.annotations_left_out, len(parts["annotations"]), "annotations")
        return reader.result()


def _parts(path: Path) -> dict[str, list[Any]]:
    try:
        require(path.is_file(), "is no file")  # a pipe would be waited for
        require(path.stat().st_size <= MAX_BYTES, f"is larger than {MAX_BYTES // 2**20} MB; split it")
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot be read as JSON ({one_line(error)})") from error
    names = ("images", "annotations", "categories")
    right = isinstance(values, dict) and all(isinstance(values.get(name), list) for name in names)
    require(right, f"is JSON of another kind than COCO's, which has lists of {', '.join(names)}")
    return values


def _check(left_out: LeftOut, count: int, what: str) -> None:
    bad = sum(left_out.counts.values())
    found = "".join(left_out.lines("")).removeprefix(": not read: ")
    require(bad <= UNUSABLE * count, f"{bad} of the {count} {what} cannot be used: {found}")


class _Reader:
    def __init__(self, parts: dict[str, list[Any]], path: Path, folders: list[Path], class_names: list[str] | None):
        self.path = path
        self.images_left_out, self.annotations_left_out = LeftOut(), LeftOut()
        self.cut = self.boxes_for_masks = 0
        self.class_names, self.label_of = _categories(parts, class_names)
        self.folder = _folder_of(parts["images"], folders)
        self.listings: dict[str, set[str]] = {}
        self.place_of: dict[Any, int | None] = {}  # of an image's number; None for one that is left out
        self.paths: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.of_image: list[list[Annotation]] = []
        self.seen: set[Any] = set()

    def add_image(self, entry: Any) -> None:
        """One of `images`; counted with the reason if it cannot be used."""
        number, name = _number(entry, "id"), _number(entry, "file_name")
        try:
            path, size = self._image(entry, number, name)
        except ValueError as reason:
            self.images_left_out.add(str(reason), name if isinstance(name, str) else shown(entry))
            self.place_of.setdefault(number, None)
            return
        self.place_of[number] = len(self.paths)
        self.paths.append(str(path))
        self.sizes.append(size)
        self.of_image.append([])

    def _image(self, entry: Any, number: Any, name: Any) -> tuple[Path, tuple[int, int]]:
        path = _inside(self.folder, name)
        if number is None or path is None:
            raise ValueError("images without a number or a file of their own")
        if number in self.place_of:
            raise ValueError("second images of a number")
        if not self._is_there(path):
            raise ValueError("images that are not there")
        return path, _size(entry, path)

    def _is_there(self, path: Path) -> bool:
        """Whether a file is, by one listing for each folder: asking for each of a million takes minutes."""
        folder = str(path.parent)
        if folder not in self.listings:
            self.listings[folder] = {entry.name for entry in path.parent.iterdir()} if path.parent.is_dir() else set()
        return path.name in self.listings[folder]

    def add_annotation(self, entry: Any) -> None:
        """One of `annotations`; counted with the reason if it cannot be used, but for those of images that cannot."""
        number, image, category = (_number(entry, name) for name in ("id", "image_id", "category_id"))
        try:
            if number is not None and number in self.seen:
                raise ValueError("second annotations of a number")
            self.seen.add(number)
            if image is None or image not in self.place_of:
                raise ValueError("annotations of images that are not listed")
            if category not in self.label_of:
                raise ValueError("annotations of categories that are not listed")
            place = self.place_of[image]
            if place is not None:
                self.of_image[place].append(self._annotation(entry, *self.sizes[place], self.label_of[category]))
        except ValueError as reason:
            self.annotations_left_out.add(str(reason), shown(entry if number is None else number))

    def _annotation(self, entry: dict[str, Any], height: int, width: int, label: int) -> Annotation:
        left, top, wide, high = _four(entry.get("bbox"))
        if not (wide > 0 and high > 0):
            raise ValueError("boxes without width or height")
        box = max(0.0, left), max(0.0, top), min(float(width), left + wide), min(float(height), top + high)
        if not (box[0] < box[2] and box[1] < box[3]):
            raise ValueError("boxes outside their images")
        self.cut += max(box[0] - left, box[1] - top, left + wide - box[2], top + high - box[3]) > 1
        try:
            outline = kept(entry.get("segmentation"), height, width)
        except (ValueError, TypeError, OverflowError):
            raise ValueError("broken outlines") from None
        area: Any = entry.get("area")
        known = type(area) in (int, float) and 0 < area < MAX_PIXELS
        return box, label, bool(entry.get("iscrowd")), float(area) if known else wide * high, outline

    def result(self) -> Annotations:
        """All that was added."""
        every = [annotation for annotations in self.of_image for annotation in annotations]
        with_outline = sum(bool(len(annotation[-1])) for annotation in every)
        outlined = 2 * with_outline >= len(every)
        outlines = [annotation[-1] for annotation in every] if outlined else []
        lengths = [len(outline) for outline in outlines] or [0] * len(every)
        objects = Objects(
            boxes_N4=np.array([annotation[0] for annotation in every], dtype=np.float32).reshape(-1, 4),
            labels_N=np.array([annotation[1] for annotation in every], dtype=np.int64),
            crowd_N=np.array([annotation[2] for annotation in every], dtype=bool),
            area_N=np.array([annotation[3] for annotation in every], dtype=np.float32),
            outlines=np.concatenate([NOTHING, *outlines]),
            start_N=np.cumsum([0, *lengths]),
        )
        first_I = np.cumsum([0, *map(len, self.of_image)])
        sizes_I2 = np.array(self.sizes, dtype=np.int64).reshape(-1, 2)
        notes = [*self.images_left_out.lines(self.path), *self.annotations_left_out.lines(self.path)]
        where = escaped(str(self.path))
        if self.cut:
            notes.append(f"{where}: {self.cut} boxes reach out of their images and are cut at the border")
        if outlined and with_outline < len(every):
            notes.append(f"{where}: {len(every) - with_outline} objects have no outline: their boxes are taken for it")
        if with_outline and not outlined:
            notes.append(f"{where}: {with_outline} of {len(every)} objects have an outline: no masks are learned")
        return Annotations(self.class_names, self.paths, sizes_I2, first_I, objects, outlined, notes)


def _number(entry: Any, name: str) -> Any:
    """What an entry is called by; None if that is nothing to call by."""
    value = entry.get(name) if isinstance(entry, dict) else None
    return value if type(value) in (int, str) or (type(value) is float and value == value) else None


def _four(values: Any) -> list[float]:
    if not isinstance(values, list) or len(values) != 4 or any(type(value) not in (int, float) for value in values):
        raise ValueError("boxes that are not four numbers")
    try:
        numbers = [float(value) for value in values]
    except OverflowError:
        numbers = [math.inf]
    if not all(map(math.isfinite, numbers)):
        raise ValueError("boxes that are not four numbers")
    return numbers


def _size(entry: dict[str, Any], path: Path) -> tuple[int, int]:
    """Height and width of an image, of its file where the entry does not say."""
    sides: list[Any] = [entry.get("height"), entry.get("width")]
    if None in sides:
        try:
            sides = [*reversed(upright(str(path)).size)]
        except DecodeError:
            raise ValueError("images that cannot be decoded") from None
    whole = all(type(side) in (int, float) and 1 <= side <= MAX_PIXELS and int(side) == side for side in sides)
    if not whole or sides[0] * sides[1] > MAX_PIXELS:
        raise ValueError(f"images of no size, or over {MAX_PIXELS // 10**6} million pixels")
    return int(sides[0]), int(sides[1])


def _inside(folder: Path, name: Any) -> Path | None:
    """The path of a file name that stays within the folder."""
    if not isinstance(name, str) or not name or "\0" in name:
        return None
    parts = name.replace("\\", "/").split("/")
    return None if ".." in parts or parts[0] == "" or ":" in parts[0] else folder.joinpath(*parts)


def _folder_of(images: list[Any], folders: list[Path]) -> Path:
    """The folder that has the images, which the first few tell."""
    names = [entry.get("file_name") for entry in images[:100] if isinstance(entry, dict)]
    for folder in folders:
        paths = [_inside(folder, name) for name in names]
        if any(path is not None and path.is_file() for path in paths):
            return folder
    listed = ", ".join(f"{folder}/" for folder in folders)
    first = escaped(str(names[0])) if names else "none"
    raise UserError(f"none of the images that it lists ({first} ...) is in {escaped(listed)}")


def _categories(parts: dict[str, list[Any]], class_names: list[str] | None) -> tuple[list[str], dict[Any, int]]:
    """The names of the classes, and the class of each category's number."""
    names: dict[Any, str] = {}
    parents: set[Any] = set()
    for entry in parts["categories"]:
        number, name = _number(entry, "id"), _number(entry, "name")
        right = number is not None and isinstance(name, str) and bool(name) and showable(name)
        require(right, f"has the category {shown(entry)}; give each a number and a name")
        require(number not in names, f"has two categories of the number {shown(number)}")
        require(name not in names.values(), f"has two categories of the name {name}")
        names[number] = name
        parents.add(parent if (parent := _number(entry, "supercategory")) != name else None)
    if len(names) > 1 and any(name in parents for name in names.values()):  # Roboflow's first is the name of the whole
        used = {_number(entry, "category_id") for entry in parts["annotations"]}
        names = {number: name for number, name in names.items() if number in used or name not in parents}
    require(bool(names), "has no categories")
    order = sorted(names, key=lambda number: (isinstance(number, str), number))
    own = [names[number] for number in order]
    known = class_names if class_names is not None else own
    unknown = [name for name in own if name not in known]
    require(not unknown, f"has the category {unknown and unknown[0]}, which the images to learn from have not")
    place = {name: index for index, name in enumerate(known)}
    return known, {number: place[names[number]] for number in order}


def write_coco(
    path: Path,
    images: Iterable[tuple[str, tuple[int, int]]],
    results: Iterable[Mapping[str, Any]],
    class_names: list[str],
) -> None:
    """Write what was found in images as COCO's JSON, whole or not at all.

    A file like those that are learned from; its `annotations` with their scores are what pycocotools' `loadRes` takes.
    Images and categories count from 1, in the order given.

    Args:
        images: file name and (height, width) of each
        results: for each image `boxes` (n, 4) XYXY in pixels, `labels` (n,) and, if there are any, `scores` (n,) and
            `masks` (n, height, width), or `runs`, the run lengths of each mask, column by column

    Raises:
        UserError: faster-coco-eval is missing, which packs masks.
    """
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, ((name, (height, width)), found) in enumerate(zip(images, results, strict=True), start=1):
        listed.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for entry in _entries(found, (height, width)):
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **entry})
    categories = [{"id": number, "name": name} for number, name in enumerate(class_names, start=1)]
    document = {"images": listed, "categories": categories, "annotations": annotations}
    write_text(path, json.dumps(document) + "\n")


def _entries(found: Mapping[str, Any], size: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """An image's annotations."""
    boxes_N4 = _array(found["boxes"]).reshape(-1, 4).astype(float)
    labels, scores, masks, runs = (found.get(name) for name in ("labels", "scores", "masks", "runs"))
    if masks is not None or runs is not None:
        need_package()
    for index, (left, top, right, bottom) in enumerate(boxes_N4.tolist()):
        wide, high = right - left, bottom - top
        entry = {
            "category_id": int(_array(labels)[index]) + 1,
            "bbox": [round(value, 2) for value in (left, top, wide, high)],
            "area": round(wide * high, 2),
            "iscrowd": 0,
        }
        if scores is not None:
            entry["score"] = round(float(_array(scores)[index]), 5)
        if masks is not None:
            mask_HW = _array(masks[index]) > 0
            entry.update(segmentation=packed(mask_HW), area=int(mask_HW.sum()))
        if runs is not None:
            entry.update(segmentation=packed_runs(runs[index], size), area=sum(runs[index][1::2]))
        yield entry


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
