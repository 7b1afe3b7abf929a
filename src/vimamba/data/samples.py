"""Lists of images with a class each, from wherever they are kept, under one small interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vimamba.data.decode import decode_image


class Samples(Protocol):
    """A list of images: `image` may raise DecodeError, `target` is the index of the class."""

    def __len__(self) -> int: ...
    def image(self, index: int) -> Image.Image: ...
    def target(self, index: int) -> int: ...
    def name(self, index: int) -> str: ...


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
    """Image files."""

    def __init__(self, paths: list[Path], targets: list[int]):
        # One string a file: a list of a million Path objects costs half a gigabyte and is copied to each worker.
        self.paths = np.array([str(path) for path in paths])
        self.targets = np.array(targets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Image.Image:
        return decode_image(str(self.paths[index]))

    def target(self, index: int) -> int:
        return int(self.targets[index])

    def name(self, index: int) -> str:
        return str(self.paths[index])


class HubSamples:
    """A timm reader of a hub data set, whose images are decoded here rather than by timm."""

    def __init__(self, reader: Any, prefix: str):
        self.reader, self.prefix = reader, prefix

    def __len__(self) -> int:
        return len(self.reader)

    def image(self, index: int) -> Image.Image:
        return decode_image(self.reader[index][0], self.name(index))

    def target(self, index: int) -> int:
        return int(self.reader[index][1])

    def name(self, index: int) -> str:
        return f"{self.prefix}[{index}]"
