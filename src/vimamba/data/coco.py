"""Images with boxes and masks of objects, as COCO's JSON tells them."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

from vimamba.data.coco_json import Annotations, Objects, read_annotations
from vimamba.data.copies import copies_across
from vimamba.data.decode import DecodeError
from vimamba.data.folder import TEST, TRAIN, VAL
from vimamba.data.image_data import ImageData, Opening
from vimamba.data.outlines import drawn, need_package
from vimamba.data.samples import FileSamples
from vimamba.data.walk import entries, kind_of
from vimamba.errors import escaped, require

ROBOFLOW = "_annotations.coco.json"
PREFIX = "instances_"  # of COCO's files; of those that say other things of the images:
OTHERS = ("captions_", "image_info_", "panoptic_", "person_keypoints_", "stuff_")
MAX_MASKS = 2**32  # bytes of the masks of one image


class CocoSamples(FileSamples):
    """Image files with the objects in each."""

    def __init__(
        self, paths: Any, root: str, sizes_I2: np.ndarray, spans_I2: np.ndarray, objects: Objects, outlined: bool
    ):
        super().__init__(paths, np.zeros(len(paths)), root)
        self.sizes_I2, self.spans_I2, self.objects, self.outlined = sizes_I2, spans_I2, objects, outlined

    @classmethod
    def of(cls, annotations: Annotations, root: str, outlined: bool) -> CocoSamples:
        """All images of a file."""
        first_I = annotations.first_I
        spans_I2 = np.stack([first_I[:-1], first_I[1:]], 1)
        return cls(annotations.paths, root, annotations.sizes_I2, spans_I2, annotations.objects, outlined)

    def image(self, index: int) -> Image.Image:
        image = super().image(index)
        height, width = self.sizes_I2[index].tolist()
        if image.size != (width, height):
            shown = f"is {image.width} x {image.height} pixels when upright"
            raise DecodeError(self.name(index), f"{shown}, and its annotations say {width} x {height}")
        return image

    def target(self, index: int) -> dict[str, torch.Tensor]:
        height, width = self.sizes_I2[index].tolist()
        rows = np.arange(*self.spans_I2[index])
        target: dict[str, torch.Tensor] = {}
        if self.outlined:
            if len(rows) * height * width > MAX_MASKS:
                raise DecodeError(self.name(index), f"the masks of its {len(rows)} objects fill no memory; cut it up")
            masks_NHW = np.zeros((len(rows), height, width), dtype=np.uint8)
            for mask_HW, row in zip(masks_NHW, rows, strict=True):
                mask_HW[:] = self._mask(row, height, width)
            seen_N = masks_NHW.any((1, 2))
            rows, masks_NHW = rows[seen_N], masks_NHW[seen_N]
            target["masks"] = tv_tensors.Mask(torch.from_numpy(masks_NHW))
        objects = self.objects
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(objects.boxes_N4[rows]), format="XYXY", canvas_size=(height, width)
        )
        named = dict(labels=objects.labels_N, crowd=objects.crowd_N, area=objects.area_N)
        return {"boxes": boxes, **target, **{name: torch.from_numpy(values[rows]) for name, values in named.items()}}

    def _mask(self, row: int, height: int, width: int) -> np.ndarray:
        """An object's mask; its box where it has no outline."""
        outline = self.objects.outline(row)
        if len(outline):
            return drawn(outline, height, width)
        mask_HW = np.zeros((height, width), dtype=np.uint8)
        left, top, right, bottom = self.objects.boxes_N4[row].round().astype(int).tolist()
        mask_HW[top:bottom, left:right] = 1
        return mask_HW

    def marks(self) -> list[int]:
        return [size + self._digest(*span) for size, span in zip(super().marks(), self.spans_I2.tolist(), strict=True)]

    def _digest(self, first: int, last: int) -> int:
        objects = self.objects
        parts = objects.boxes_N4[first:last], objects.labels_N[first:last], objects.crowd_N[first:last]
        outlines = objects.outlines[objects.start_N[first] : objects.start_N[last]]
        return zlib.crc32(b"".join(part.tobytes() for part in (*parts, outlines)))

    def select(self, rows: list[int]) -> CocoSamples:
        spans_I2, sizes_I2 = self.spans_I2[rows], self.sizes_I2[rows]
        return CocoSamples(self.paths[rows], self.root, sizes_I2, spans_I2, self.objects, self.outlined)


def open_coco(name: str, opening: Opening) -> ImageData:
    """Images with objects, from a folder of COCO's, Roboflow's or CVAT's, one that has a JSON file, or such a file.

    Classes are numbered in the order of the categories' numbers. There are masks if half of the objects or more have an
    outline.

    Raises:
        UserError: no file of annotations is found or more than one may be meant, it is none of COCO's, more than a
            tenth of it cannot be used, or faster-coco-eval is missing, which draws masks.
    """
    named = f"`class_names` {opening.class_names}: is of no use to objects; the categories of {name} have names"
    require(opening.class_names is None, named)
    root = Path(name)
    files = find_annotations(root)
    require(
        "train" in files or not opening.strict,
        f"`data` {escaped(name)}: has nothing to learn from, but a half to hold out",
    )
    base = root if root.is_dir() else root.parent
    read: dict[str, Annotations] = {}
    for half, path in files.items():
        known = read["train"].class_names if "train" in read else None
        read[half] = read_annotations(path, _folders(base, path, half), known)
    outlined = all(annotations.outlined for annotations in read.values())
    if outlined:
        need_package()
    halves = {half: CocoSamples.of(annotations, str(base), outlined) for half, annotations in read.items()}
    train = halves["train"] if "train" in halves else halves["val"].select([])
    require(
        not opening.strict or len(train.objects.labels_N) > 0, f"`data` {escaped(name)}: has no objects to learn from"
    )
    is_drawn = "val" not in halves or (opening.kept is not None and opening.kept.drawn)
    train, val = opening.halve_unclassed(name, train) if is_drawn else (train, halves["val"])
    notes = [note for annotations in read.values() for note in annotations.notes]
    notes += [f"{escaped(name)}: {line}" for line in (copies_across(train, val) if opening.strict else [])]
    names = next(iter(read.values())).class_names
    return ImageData(name, names, train, val, name, has_masks=outlined, drawn=is_drawn, notes=notes)


def find_annotations(root: Path) -> dict[str, Path]:
    """The files of what is to be learned from, "train", and what is held out, "val", where there are any.

    Raises:
        UserError: there are none, or more than one may be meant.
    """
    where = f"`data` {escaped(str(root))}"
    if not root.is_dir():
        require(root.is_file() and root.suffix.lower() == ".json", f"{where}: is no folder and no JSON file")
        return {"train": root}
    folders = [root / entry.name for entry in entries(str(root)) if kind_of(entry) == "folder"]
    halves = [folder for folder in folders if any(kind.fullmatch(folder.name) for kind in (TRAIN, VAL, TEST))]
    found = {folder.name: file for folder in halves if (file := _only(_json_files(folder)))}
    if not found:
        listed = [root, *(folder for folder in folders if folder.name.lower() in ("annotations", "labels"))]
        found = {label(file): file for folder in listed for file in _json_files(folder)}
    require(
        bool(found),
        f"{where}: has no file of COCO's annotations, such as annotations/instances_train.json or train/{ROBOFLOW}",
    )
    kinds = {"train": _named(found, TRAIN), "val": _named(found, VAL) or _named(found, TEST)}
    for half in kinds.values():
        listing = " and ".join(sorted(str(path) for path in half))
        require(len(half) < 2, f"{where}: {escaped(listing)} may both be meant; leave one of them there")
    chosen = {half: paths[0] for half, paths in kinds.items() if paths}
    require(
        bool(chosen) or len(found) == 1,
        f"{where}: has {len(found)} files of annotations, {', '.join(sorted(found)[:3])}; name one of them, or "
        "call them train.json and val.json",
    )
    return chosen or {"train": next(iter(found.values()))}


def _json_files(folder: Path) -> list[Path]:
    """Those that may be of COCO's annotations; of Roboflow's and COCO's names alone where there are such."""
    files = sorted(folder / entry.name for entry in entries(str(folder)) if entry.name.lower().endswith(".json"))
    files = [file for file in files if file.is_file() and not file.name.startswith(OTHERS)]
    named = [file for file in files if file.name == ROBOFLOW or file.name.startswith(PREFIX)]
    return named or files


def _only(files: list[Path]) -> Path | None:
    return files[0] if len(files) == 1 else None


def label(path: Path) -> str:
    """What a file is of: train2017 of annotations/instances_train2017.json."""
    return path.stem.removeprefix(PREFIX)


def _named(found: dict[str, Path], half: re.Pattern[str]) -> list[Path]:
    return [path for name, path in found.items() if half.fullmatch(name.rstrip("0123456789").rstrip("-_"))]


def _folders(base: Path, path: Path, half: str) -> list[Path]:
    """Where the images of a file may be."""
    names = list(dict.fromkeys([label(path), path.parent.name, half]))
    inside = [base / "images" / name for name in names] + [base / name for name in names]
    places = [path.parent / "images", path.parent, *inside, base / "images", base]
    return [folder for folder in dict.fromkeys(places) if folder.is_dir()]
