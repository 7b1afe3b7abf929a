"""Steps of a transform: timm's crops and resizes for images with masks and boxes, what images go through alone, and the
windows of dense tasks.

Geometry is drawn once, from the image, and applied to everything: masks by nearest neighbour, boxes clamped. But for
the windows, its numbers and its random draws are timm's, so that models trained or published with timm's transforms see
the same pixels.
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

from vimamba.data.samples import IGNORE
from vimamba.errors import require

# The eval crop is central: what lies beyond this many times the short side would be cut away after resizing, and
# a 40 000 x 10 image would be 900 000 x 224 until then.
MAX_ASPECT = 8

TRIES, FILLED = 10, 0.75  # parts that are drawn at most, and the share from which one class fills a part

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


def fit_sides(size: tuple[int, int], short_side: int | None, long_side: int | None) -> float:
    """The factor that brings the shorter of two sides to `short_side` unless the longer would be over `long_side`.

    With `long_side` alone, images are made smaller only.
    """
    shrunk = long_side / max(size) if long_side else 1.0
    if short_side is None:
        return min(1.0, shrunk)
    return min(short_side / min(size), shrunk) if long_side else short_side / min(size)


class RandomWindow(Scaling):
    """The image times a random factor, and of that a random part of `size` (height, width).

    What is smaller lies at the top left, beside a border: `fill` in the image, 0 in masks of objects, IGNORE in a mask
    of classes. Boxes are not cut: `KeepVisible` does. Only the part that is seen is scaled. Beside a mask of classes, a
    part that one of them fills is drawn anew, as mmsegmentation does.

    Args:
        fit: the factor for an image of a size (height, width)
        scale: smallest and largest number by which that is multiplied
    """

    def __init__(
        self, size: tuple[int, int], interpolation: str, fit: Callable[[tuple[int, int]], float],
        scale: tuple[float, float], fill: list[int],
    ):  # fmt: skip
        super().__init__(interpolation)
        self.size, self.fit, self.scale, self.fill = size, fit, scale, fill

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        image = _image(flat_inputs)
        own = image.height, image.width
        low, high = self.scale
        factor = self.fit(own) * (low + (high - low) * float(torch.rand(())) if low < high else low)
        scaled = [max(1, round(side * factor)) for side in own]
        seen = [min(sides) for sides in zip(scaled, self.size, strict=True)]
        start = self._start(flat_inputs, own, scaled, seen)
        border = 0 if any(isinstance(value, tv_tensors.BoundingBoxes) for value in flat_inputs) else IGNORE
        return dict(own=own, scaled=scaled, seen=seen, start=start, border=border)

    def _start(self, flat_inputs: list[Any], own: Any, scaled: list[int], seen: list[int]) -> list[int]:
        """Where the part begins: of several that are drawn the first that no class fills, or the one least filled."""
        mask = next((value for value in flat_inputs if isinstance(value, tv_tensors.Mask) and value.ndim == 2), None)
        starts: list[tuple[float, list[int]]] = []
        for _ in range(1 if mask is None or scaled == seen else TRIES):
            start = [int(torch.randint(whole - part + 1, ())) for whole, part in zip(scaled, seen, strict=True)]
            starts.append((0.0 if mask is None else _filled(mask, start, own, scaled, seen), start))
            if starts[-1][0] <= FILLED:
                break
        return min(starts)[1]

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, PIL.Image.Image):
            return self._image(inpt, **params)
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.wrap(self._mask(inpt.as_subclass(torch.Tensor), **params), like=inpt)
        return self._boxes(inpt, **params) if isinstance(inpt, tv_tensors.BoundingBoxes) else inpt

    def _image(self, image: PIL.Image.Image, own: Any, scaled: Any, seen: Any, start: Any, border: int) -> Any:
        (top, left), (height, width) = start, seen
        if scaled == [*own]:
            part = image.crop((left, top, left + width, top + height))
        else:
            down, across = (side / whole for side, whole in zip(own, scaled, strict=True))
            right, bottom = min(own[1], (left + width) * across), min(own[0], (top + height) * down)
            method = PIL.Image.Resampling[self.interpolation.value.upper()]
            part = image.resize((width, height), method, (left * across, top * down, right, bottom))
        if (height, width) == self.size:
            return part
        whole = PIL.Image.new(image.mode, (self.size[1], self.size[0]), tuple(self.fill))
        whole.paste(part)
        return whole

    def _mask(self, mask: torch.Tensor, own: Any, scaled: Any, seen: Any, start: Any, border: int) -> torch.Tensor:
        for axis in (0, 1):
            # Where the centre of each pixel lies in the mask as it was, in whole numbers.
            centres = 2 * torch.arange(start[axis], start[axis] + seen[axis]) + 1
            mask = mask.index_select(axis - 2, centres * own[axis] // (2 * scaled[axis]))
        if tuple(seen) == self.size:
            return mask
        bordered = mask.new_full((*mask.shape[:-2], *self.size), border)
        bordered[..., : seen[0], : seen[1]] = mask
        return bordered

    def _boxes(self, boxes: Any, own: Any, scaled: Any, seen: Any, start: Any, border: int) -> Any:
        down, across = (whole / side for side, whole in zip(own, scaled, strict=True))
        moved = boxes.as_subclass(torch.Tensor) * torch.tensor([across, down] * 2) - torch.tensor(
            [start[1], start[0]] * 2
        )
        return tv_tensors.BoundingBoxes(moved, format="XYXY", canvas_size=self.size)


def _filled(mask_HW: torch.Tensor, start: list[int], own: Any, scaled: list[int], seen: list[int]) -> float:
    """The share of a part that its largest class fills, by every fourth pixel each way."""
    (top, bottom), (left, right) = (
        [place * side // whole for place in (begin, begin + part)]
        for begin, part, side, whole in zip(start, seen, own, scaled, strict=True)
    )
    classes = mask_HW.as_subclass(torch.Tensor)[top:bottom:4, left:right:4].flatten().long()
    counts = torch.bincount(classes[classes != IGNORE])
    return float(counts.max()) / float(counts.sum()) if len(counts) else 1.0


class RandomTurn(Transform):
    """Turn and shear about the middle, up to so many degrees either way; what comes in from beyond is a border."""

    def __init__(self, degrees: float, shear: float, fill: list[int]):
        super().__init__()
        self.degrees, self.shear, self.fill = degrees, shear, fill

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        turn, shear = (2 * torch.rand(2) - 1).tolist()
        return dict(angle=turn * self.degrees, translate=[0, 0], scale=1.0, shear=[shear * self.shear, 0.0])

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, PIL.Image.Image):
            fill = self.fill if inpt.mode == "RGB" else self.fill[:1]
            return F.affine(inpt, **params, interpolation=InterpolationMode.BILINEAR, fill=fill)
        border = IGNORE if isinstance(inpt, tv_tensors.Mask) and inpt.ndim == 2 else 0  # of classes, and of objects
        return F.affine(inpt, **params, fill=border)


class KeepVisible(Transform):
    """Of the objects beside an image, those still in it: boxes cut at its border, to what their masks show there.

    An object goes with all that is said of it when nothing of its mask is left or, without masks, less than a pixel of
    its box.

    Args:
        turned: whether the objects were turned, which leaves no box tight.
    """

    def __init__(self, turned: bool = False):
        super().__init__()
        self.turned = turned

    def forward(self, image: Any, target: Any) -> Any:
        if not isinstance(target, dict):
            return image, target
        boxes_N4, masks = target["boxes"].as_subclass(torch.Tensor), target.get("masks")
        height, width = target["boxes"].canvas_size
        cut_N4 = boxes_N4.clamp(min=0).minimum(boxes_N4.new_tensor([width, height] * 2))
        small_N = (cut_N4[:, 2:] - cut_N4[:, :2] < 1).any(1)
        keep_N = ~small_N if masks is None else masks.as_subclass(torch.Tensor).amax((1, 2)) > 0
        kept = {name: values.as_subclass(torch.Tensor)[keep_N] for name, values in target.items()}
        kept["boxes"] = cut_N4[keep_N]
        if masks is not None:
            loose_N = ((cut_N4 != boxes_N4).any(1) | small_N | self.turned)[keep_N]
            kept["boxes"][loose_N] = extents(kept["masks"][loose_N])
        return image, {name: tv_tensors.wrap(values, like=target[name]) for name, values in kept.items()}


def extents(masks_NHW: torch.Tensor) -> torch.Tensor:
    """The boxes (n, 4), XYXY in pixels, around what is set in masks, each of which has something set."""
    sides = []
    for axis in (1, 2):  # what is set in each column, then in each row
        line_NL = masks_NHW.amax(axis).bool().to(torch.uint8)
        sides.append((line_NL.argmax(1), line_NL.shape[1] - line_NL.flip(1).argmax(1)))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], 1).float()
