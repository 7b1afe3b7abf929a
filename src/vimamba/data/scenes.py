"""Built-in scenes, handwritten digits on pictures, and `python -m vimamba.data.scenes FOLDER`, which writes a few.

Every scene is a function of its number: drawn when first asked for, in whole numbers alone, so that it is the same to
the bit on any machine.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

from vimamba.data.image_data import ImageData
from vimamba.data.mnist import load_mnist
from vimamba.data.samples import ArraySamples, write_images
from vimamba.data.steps import extents
from vimamba.data.transforms import mix_seed
from vimamba.errors import UserError, require

SIDE = 256  # pixels of a scene
COUNTS = {"train": 800, "val": 200}
DIGITS = [str(digit) for digit in range(10)]
BUILT_IN = {
    "scenes-seg": f"{sum(COUNTS.values())} scenes of handwritten digits, {SIDE} x {SIDE}, with a class for each pixel",
    "scenes-det": f"{sum(COUNTS.values())} scenes of handwritten digits, {SIDE} x {SIDE}, with boxes and masks",
}

# Of scikit-image; none lies behind the digits of both halves. No JPEG: decoders differ in the last bit.
PICTURES = {
    "train": ("astronaut", "brick", "coffee", "coins", "grass", "moon", "motorcycle_left"),
    "val": ("camera", "chelsea", "gravel", "ihc"),
}

FEWEST, MOST = 2, 4  # digits in a scene
SIZES = (104, 176)  # pixels of the square that a digit is drawn in; it fills five sevenths of that
TURN = 15  # degrees, either way: a 6 stays a 6
VISIBLE = 0.9  # least share of a digit that later ones leave uncovered
CONTRAST = 100  # least difference in lightness, of 255, between a digit and what it lies on
DARK = 140  # share, of 256, of its lightness that a picture keeps: digits are lighter,
LIGHTEST = 225  # unless that would make them lighter than this, as on another digit: they are darker then
SHADOW = 2  # pixels that a digit's shadow lies to the right of it and below
PLACES = 8  # that are tried for a digit before it is left out

MASTER = 112  # a digit enlarged four times: by a power of two, the weights of Pillow's filter are exact
BITS = 12  # of the fractions in the sampling of it


class Scene(NamedTuple):
    """image_HWC; for each pixel 0 or the number, from 1, of the digit that is seen there; and what each digit is."""

    image_HWC: np.ndarray
    owner_HW: np.ndarray
    digits: list[int]


class Scenes:
    """Drawn scenes with a target made of each."""

    def __init__(self, name: str, half: str, digits: ArraySamples, target_of: Callable[[Scene], Any]):
        self.prefix, self.half, self.digits, self.target_of = f"{name}:{half}", half, digits, target_of
        self.drawn: dict[int, Scene] = {}  # 0.26 MB each; to draw one anew takes longer than to learn from it

    def __len__(self) -> int:
        return COUNTS[self.half]

    def scene(self, index: int) -> Scene:
        """The scene of a number."""
        if index not in self.drawn:
            draw = np.random.RandomState(mix_seed(*self.half.encode(), index))  # whose numbers are the same for ever
            self.drawn[index] = _drawn(draw, _pictures(self.half), self.digits, index * MOST)
        return self.drawn[index]

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.scene(index).image_HWC)

    def target(self, index: int) -> Any:
        return self.target_of(self.scene(index))

    def name(self, index: int) -> str:
        return f"{self.prefix}[{index}]"


def open_scenes(name: str) -> ImageData:
    """The scenes for segmentation, "scenes-seg", or for detection, "scenes-det".

    Raises:
        UserError: scikit-image, which carries the pictures behind the digits, is missing.
    """
    folder_of_pictures()
    target_of = as_classes if name == "scenes-seg" else as_objects
    train, val = (Scenes(name, half, digits, target_of) for half, digits in zip(COUNTS, load_mnist(), strict=True))
    names = ["background", *DIGITS] if name == "scenes-seg" else DIGITS
    detects = name == "scenes-det"
    return ImageData(name, names, train, val, BUILT_IN[name], small=True, built_in=True, has_masks=detects)


def as_classes(scene: Scene) -> tv_tensors.Mask:
    """The class of each pixel: 0 for what lies behind the digits, a digit and 1 for a digit."""
    class_of = np.array([0, *(digit + 1 for digit in scene.digits)], dtype=np.int32)
    return tv_tensors.Mask(torch.from_numpy(class_of[scene.owner_HW]))


def as_objects(scene: Scene) -> dict[str, torch.Tensor]:
    """Boxes and masks of what is seen of the digits."""
    count = len(scene.digits)
    numbers_N11 = np.arange(1, count + 1, dtype=np.uint8)[:, None, None]
    masks_NHW = torch.from_numpy((scene.owner_HW == numbers_N11).view(np.uint8))
    return dict(
        boxes=tv_tensors.BoundingBoxes(extents(masks_NHW), format="XYXY", canvas_size=(SIDE, SIDE)),
        labels=torch.tensor(scene.digits),
        masks=tv_tensors.Mask(masks_NHW),
        crowd=torch.zeros(count, dtype=torch.bool),
        area=torch.from_numpy(np.bincount(scene.owner_HW.ravel())[1:]).float(),
    )


def folder_of_pictures() -> Path:
    """Where scikit-image keeps its pictures."""
    package = importlib.util.find_spec("skimage")
    if package is None or not package.submodule_search_locations:
        raise UserError("the built-in scenes: need scikit-image, for its pictures; run pip install 'vimamba[dense]'")
    return Path(package.submodule_search_locations[0]) / "data"


@functools.cache
def _pictures(half: str) -> list[Image.Image]:
    """The pictures behind the digits of a half, "RGB" or "L"."""
    paths = [folder_of_pictures() / f"{name}.png" for name in PICTURES[half]]
    missing = [path.name for path in paths if not path.is_file()]
    require(not missing, f"the built-in scenes: this scikit-image has no {''.join(missing[:1])}; install version 0.26")
    pictures: list[Image.Image] = [Image.open(path) for path in paths]
    for picture in pictures:
        picture.load()
    return pictures


def _drawn(draw: np.random.RandomState, pictures: list[Image.Image], digits: ArraySamples, first: int) -> Scene:
    """A scene of the digits from number `first` on: no digit is in two scenes."""
    image_HWC = _background(draw, pictures[draw.randint(len(pictures))])
    owner_HW = np.zeros((SIDE, SIDE), dtype=np.uint8)
    shown: list[int] = []
    areas: list[int] = []
    for which in range(first, first + draw.randint(FEWEST, MOST + 1)):
        size = draw.randint(SIZES[0], SIZES[1] + 1)
        alpha_hw = _stamp(digits.images[which], size, draw.randint(-TURN, TURN + 1))
        mask_hw = alpha_hw > 128  # of 256
        place = _place(draw, owner_HW, mask_hw, areas)
        if place is None:
            continue
        shown.append(digits.target(which))
        areas.append(int(mask_hw.sum()))
        owner_HW[place][mask_hw] = len(shown)
        image_HWC[place] = _painted(draw, image_HWC[place], alpha_hw, mask_hw)
    return Scene(image_HWC, owner_HW, shown)


def _background(draw: np.random.RandomState, picture: Image.Image) -> np.ndarray:
    """A part of a picture, mirrored or not, of grey ones in two colours, paled towards a colour."""
    left, top = (draw.randint(side - SIDE + 1) for side in picture.size)
    part = picture.crop((left, top, left + SIDE, top + SIDE))
    if draw.randint(2):
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    levels_C256 = np.arange(256)[None].repeat(3, 0)
    if part.mode == "L":
        dark, light = draw.randint(0, 96, (3, 1)), draw.randint(128, 256, (3, 1))
        levels_C256 = (dark * (255 - levels_C256) + light * levels_C256) // 255
    tint, share = draw.randint(0, 256, (3, 1)), draw.randint(0, 97)  # of 256
    levels_C256 = (levels_C256 * (256 - share) + tint * share) * DARK >> 16
    return np.array(part.convert("RGB").point(levels_C256.ravel().tolist()))


def _stamp(digit_HW: np.ndarray, size: int, turn: int) -> np.ndarray:
    """How much, of 256, a digit covers of the pixels around it, drawn in a square that is turned by whole degrees."""
    master = np.asarray(Image.fromarray(digit_HW).resize((MASTER, MASTER), Image.Resampling.BICUBIC)).astype(np.int32)
    one = 1 << BITS
    cos, sin = (round(function(math.radians(turn)) * one) for function in (math.cos, math.sin))
    offset = ((2 * np.arange(size) + 1 - size) * MASTER * one // (2 * size)).astype(np.int64)  # from the middle
    across, down = offset[None, :], offset[:, None]
    middle, most = (MASTER - 1) * one // 2, (MASTER - 1) * one - 1  # beyond lies the border, which is empty
    x = np.clip((across * cos + down * sin >> BITS) + middle, 0, most)
    y = np.clip((down * cos - across * sin >> BITS) + middle, 0, most)
    corner, x, y = (y >> BITS) * MASTER + (x >> BITS), x & one - 1, y & one - 1
    flat = master.ravel()
    upper = flat[corner] * (one - x) + flat[corner + 1] * x
    lower = flat[corner + MASTER] * (one - x) + flat[corner + MASTER + 1] * x
    value = upper * (one - y) + lower * y >> 2 * BITS
    alpha = np.clip(4 * value - 96, 0, 256).astype(np.uint16)  # strokes with a narrow edge at a fifth of white
    rows, columns = (np.flatnonzero(alpha.any(axis)) for axis in (1, 0))
    ends = rows[-1] + 1 + SHADOW, columns[-1] + 1 + SHADOW
    return np.pad(alpha, (0, SHADOW))[rows[0] : ends[0], columns[0] : ends[1]]


def _place(
    draw: np.random.RandomState, owner_HW: np.ndarray, mask_hw: np.ndarray, areas: list[int]
) -> tuple[slice, slice] | None:
    """Somewhere that leaves enough of every digit that is there; None if no such place is met."""
    height, width = mask_hw.shape
    seen = np.bincount(owner_HW.ravel(), minlength=len(areas) + 1)[1:]
    for _ in range(PLACES):
        top, left = draw.randint(0, SIDE - height + 1), draw.randint(0, SIDE - width + 1)
        place = slice(top, top + height), slice(left, left + width)
        covered = np.bincount(owner_HW[place][mask_hw], minlength=len(areas) + 1)[1:]
        if all(seen - covered >= np.array(areas) * VISIBLE):
            return place
    return None


def _painted(
    draw: np.random.RandomState, part_hwC: np.ndarray, alpha_hw: np.ndarray, mask_hw: np.ndarray
) -> np.ndarray:
    """A part of the picture with a digit on it, in a colour that stands out, and its shadow."""
    behind = _lightness(part_hwC[mask_hw].sum(0, dtype=np.int64) // mask_hw.sum())
    way = 1 if behind + CONTRAST <= LIGHTEST else -1
    colour = draw.randint(0, 256, 3)
    while way * (_lightness(colour) - behind) < CONTRAST:
        colour = draw.randint(0, 256, 3)
    shade_hw1 = 256 - (np.roll(alpha_hw, (SHADOW, SHADOW), (0, 1)) >> 1)[:, :, None]  # half as light
    alpha_hw1 = alpha_hw[:, :, None]
    shaded_hwC = part_hwC * shade_hw1 >> 8
    return (shaded_hwC * (256 - alpha_hw1) + colour.astype(np.uint16) * alpha_hw1 >> 8).astype(np.uint8)


def _lightness(colour: np.ndarray) -> int:
    return int(77 * colour[0] + 150 * colour[1] + 29 * colour[2]) >> 8  # of ITU-R BT.601, in 256ths


def write_scenes(folder: Path, count: int = 8) -> list[Path]:
    """Write held-out scenes as PNG files named after what they show; returns the paths."""
    held_out = open_scenes("scenes-det").val
    return write_images(held_out, ["-".join(map(str, held_out.scene(i).digits)) for i in range(count)], folder)


if __name__ == "__main__":
    for path in write_scenes(Path(sys.argv[1] if len(sys.argv) > 1 else "scenes")):
        print(path)
