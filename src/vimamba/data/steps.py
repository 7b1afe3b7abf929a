"""Steps of a transform: timm's crops and resizes for images with masks and boxes, and what images go through alone.

Geometry is drawn once, from the image, and applied to everything: masks by nearest neighbour, boxes clamped. Its
numbers and its random draws are timm's, so that models trained or published with timm's transforms see the same pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import PIL.Image
import torch
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.data.transforms import ResizeKeepRatio as TimmResizeKeepRatio
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms.functional import to_tensor
from torchvision.transforms.v2 import InterpolationMode, Transform
from torchvision.transforms.v2 import functional as F

from vimamba.errors import require

# The eval crop is central: what lies beyond this many times the short side would be cut away after resizing, and
# a 40 000 x 10 image would be 900 000 x 224 until then.
MAX_ASPECT = 8

ASPECT = (3 / 4, 4 / 3)  # of a random crop; torchvision's and timm's default


def _image(flat_inputs: list[Any]) -> PIL.Image.Image:
    """The image of a sample, which comes as Pillow's."""
    return next(value for value in flat_inputs if isinstance(value, PIL.Image.Image))


class OnImage(Transform):
    """A function of the image, which masks and boxes pass by."""

    _transformed_types = (PIL.Image.Image,)

    def __init__(self, function: Callable[[Any], Any]):
        super().__init__()
        self.function = function

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self.function(inpt)


class OnImageAlone(OnImage):
    """A function that moves what is in the image in ways that no mask or box can follow.

    Raises:
        UserError: there is a mask or a box beside the image.
    """

    def __init__(self, function: Callable[[Any], Any], name: str):
        super().__init__(function)
        self.name = name

    def check_inputs(self, flat_inputs: list[Any]) -> None:
        require(
            not any(isinstance(value, tv_tensors.Mask | tv_tensors.BoundingBoxes) for value in flat_inputs),
            f"{self.name} moves the image and not its masks and boxes; leave it out for data that have them",
        )


class ToTensor(OnImage):
    """To a normalised tensor, `erase` applied to it: all in one step, as each costs 10 µs of going through a sample."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], erase: Callable[[Any], Any] | None = None):
        super().__init__(erase or nn.Identity())
        self.mean_C11, self.std_C11 = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self.function(to_tensor(inpt).sub_(self.mean_C11).div_(self.std_C11))


class CutLongSide(Transform):
    """Keep the middle of an image whose long side is over MAX_ASPECT times its short side."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        width, height = _image(flat_inputs).size
        limit = MAX_ASPECT * min(width, height)
        if max(width, height) <= limit:
            return {}
        left, top = max(0, (width - limit) // 2), max(0, (height - limit) // 2)
        return dict(top=top, left=left, height=min(height, limit), width=min(width, limit))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params) if params else inpt


class Scaling(Transform):
    """Scales what it is given; masks at the centres of pixels, while torchvision's would move by half a pixel."""

    def __init__(self, interpolation: str):
        super().__init__()
        self.interpolation = InterpolationMode(interpolation)

    def scaled(self, function: Callable[..., Any], inpt: Any, **how: Any) -> Any:
        if not isinstance(inpt, tv_tensors.Mask):
            return function(inpt, interpolation=self.interpolation, **how)
        exact = function(inpt.as_subclass(torch.Tensor), interpolation=InterpolationMode.NEAREST_EXACT, **how)
        return tv_tensors.wrap(exact, like=inpt)


class Resize(Scaling):
    """To `size` (height, width), or its shorter side to that many pixels."""

    def __init__(self, size: int | tuple[int, int], interpolation: str):
        super().__init__(interpolation)
        self.size = [size] if isinstance(size, int) else list(size)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self.scaled(F.resize, inpt, size=self.size)


class ResizeKeepRatio(Scaling):
    """So that the shorter (`longest` 0) or the longer side (1) fits `size` (height, width)."""

    def __init__(self, size: tuple[int, int], interpolation: str, longest: float = 0.0):
        super().__init__(interpolation)
        self.size, self.longest = size, longest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return dict(size=TimmResizeKeepRatio.get_params(_image(flat_inputs), self.size, self.longest))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self.scaled(F.resize, inpt, **params)


class PadTo(Transform):
    """Borders around what is smaller than `size` (height, width): the image's of a colour, the masks' zero."""

    def __init__(self, size: tuple[int, int], fill: list[int]):
        super().__init__()
        self.size, self.fill = size, fill

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        width, height = _image(flat_inputs).size
        down, across = max(0, self.size[0] - height), max(0, self.size[1] - width)
        return dict(padding=[across // 2, down // 2, (across + 1) // 2, (down + 1) // 2])

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        fill = self.fill if isinstance(inpt, PIL.Image.Image) else 0
        return F.pad(inpt, **params, fill=fill)


class RandomResizedCrop(Scaling):
    """A random part of the image, resized to `size` (height, width); `scale` is the share of the area it may have."""

    def __init__(self, size: tuple[int, int], scale: tuple[float, float], interpolation: str):
        super().__init__(interpolation)
        self.size, self.scale = list(size), scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        place = RandomResizedCropAndInterpolation.get_params(_image(flat_inputs), self.scale, ASPECT)
        return dict(zip(("top", "left", "height", "width"), place, strict=True))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self.scaled(F.resized_crop, inpt, size=self.size, **params)
