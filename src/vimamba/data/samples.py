"""Lists of images with a target each, from wherever they are kept, under one small interface.

The target of an image is, by task:

- classification: the index of its class;
- segmentation: `tv_tensors.Mask` int32 (height, width) of classes, IGNORE where none is said;
- detection: a dict of `boxes` (`tv_tensors.BoundingBoxes` float32 (n, 4), XYXY in pixels), `labels` int64 (n,), `crowd`
  bool (n,) for a region of many objects, `area` float32 (n,) in pixels of the image as it is kept, and, where the data
  have them, `masks` (`tv_tensors.Mask` uint8 (n, height, width), 0 or 1).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image

from vimamba.data.decode import decode_image

S = TypeVar("S")

IGNORE = -1  # in a mask: a pixel that is neither learned from nor measured


class Samples(Protocol):
    """A list of images: `image` and `target` may raise DecodeError, which leaves a sample out."""

    def __len__(self) -> int: ...
    def image(self, index: int) -> Image.Image: ...
    def target(self, index: int) -> Any: ...
    def name(self, index: int) -> str: ...


def write_images(samples: Samples, shown: Sequence[str], folder: Path) -> list[Path]:
    """Write as many of some samples as PNG files named after what they are said to show; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index}-shows-{name}.png" for index, name in enumerate(shown)]
    for index, path in enumerate(paths):
        samples.image(index).save(path)
    return paths


class LastingSamples(Samples, Protocol):
    """Images that are known again later, and of which some can be held out."""

    targets: np.ndarray

    def keys(self) -> list[str]:
        """Their names within the data set, wherever that lies."""
        ...

    def marks(self) -> list[int]:
        """A number of each by which a change may be told, such as the size of its file."""
        ...

    def select(self: S, rows: list[int]) -> S:
        """Some of them, in that order."""
        ...


class ArraySamples:
    """Images held in memory as one (count, height, width) array of 8-bit grey."""

    def __init__(self, images: np.ndarray, targets: np.ndarray, prefix: str):
        self.images, self.targets, self.prefix = images, targets, prefix

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def target(self, index: int) -> int:
        return int(self.targets[index])

    def name(self, index: int) -> str:
        return f"{self.prefix}[{index}]"


class FileSamples:
    """Image files, below `root` if that is given."""

    def __init__(self, paths: Sequence[str] | np.ndarray, targets: Sequence[int] | np.ndarray, root: str = ""):
        # One string a file: a list of a million Path objects costs half a gigabyte and is copied to each worker.
        self.paths = np.array(paths, dtype=np.str_)
        self.targets = np.array(targets, dtype=np.int64)
        self.root = root

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Image.Image:
        return decode_image(self.name(index))

    def target(self, index: int) -> Any:
        return int(self.targets[index])

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def keys(self) -> list[str]:
        start = len(os.path.join(self.root, "")) if self.root else 0
        return [path[start:].replace(os.sep, "/") for path in self.paths.tolist()]

    def marks(self) -> list[int]:
        return [size_of(path) for path in self.paths.tolist()]

    def select(self, rows: list[int]) -> FileSamples:
        return FileSamples(self.paths[rows], self.targets[rows], self.root)


def size_of(path: str) -> int:
    """Bytes of a file; -1 where there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


class HubSamples:
    """Rows of a timm reader of a hub data set, whose images are decoded here rather than by timm."""

    def __init__(self, reader: Any, prefix: str, rows: np.ndarray | None = None):
        self.reader, self.prefix = reader, prefix
        self.rows = np.arange(len(reader)) if rows is None else rows

    @functools.cached_property
    def targets(self) -> np.ndarray:
        """The class of each row, read without the images; -1 where the data set does not tell."""
        labels = self.reader.dataset[self.reader.label_key]
        return np.array([-1 if label is None else label for label in labels], dtype=np.int64)[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Image.Image:
        return decode_image(self.reader[int(self.rows[index])][0], self.name(index))

    def target(self, index: int) -> int:
        return int(self.targets[index])

    def name(self, index: int) -> str:
        return f"{self.prefix}[{self.rows[index]}]"

    def keys(self) -> list[str]:
        return [self.name(index) for index in range(len(self))]

    def marks(self) -> list[int]:
        return self.targets.tolist()

    def select(self, rows: list[int]) -> HubSamples:
        return HubSamples(self.reader, self.prefix, self.rows[rows])
