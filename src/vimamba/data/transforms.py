"""How an image becomes the tensor a model takes, with and without augmentation."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import v2

from vimamba.data.decode import to_channels
from vimamba.data.steps import (
    CutLongSide,
    KeepVisible,
    OnImage,
    OnImageAlone,
    PadTo,
    RandomResizedCrop,
    RandomTurn,
    RandomWindow,
    Resize,
    ResizeKeepRatio,
    ToTensor,
    fit_sides,
)
from vimamba.errors import UserError, require, shown

Transform = Callable[..., Any]
"""A Pillow image and its target to a tensor and the target. Masks and boxes (torchvision's `tv_tensors`, in any
structure that pytree knows) are moved with the image."""

MAX_SIDE = 8192  # pixels that a model may ask of an image's height or width, and half of those before the crop
TURN, SHEAR = 10, 5  # degrees either way, of "affine"
HUE = 1 / 3  # of the colour circle that hues of dense tasks turn, for the strength of the other changes of colour
MAX_JITTER = 100  # times that an image may be scaled up or down in augmentation
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What a trained model expects of its input; stored beside its weights.

    Dense tasks take images of any size. With `short_side` and `long_side` they are scaled before: the shorter side to
    the one, unless the longer would be over the other. `img_size` is the size of the parts that they learn from.

    Raises:
        UserError: a value is of another kind or out of range; the message names it.
    """

    img_size: tuple[int, int]
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 0.9
    crop_mode: str = "center"
    short_side: int | None = None
    long_side: int | None = None

    def __post_init__(self) -> None:
        def numbers(values: Any, count: int) -> bool:
            return isinstance(values, tuple) and len(values) == count and all(map(_is_finite, values))

        size, most = self.img_size, f"from 1 to {MAX_SIDE} pixels"
        whole = isinstance(size, tuple) and all(type(side) is int for side in size)
        require(whole and len(size) == 2 and 1 <= min(size) <= max(size) <= MAX_SIDE, _wrong("img_size", size, most))
        require(type(self.in_chans) is int and self.in_chans in (1, 3), _wrong("in_chans", self.in_chans, "1 or 3"))
        per_channel = f"{self.in_chans} finite numbers"
        require(numbers(self.mean, self.in_chans), _wrong("mean", self.mean, per_channel))
        positive = numbers(self.std, self.in_chans) and min(self.std) > 0
        require(positive, _wrong("std", self.std, f"{per_channel} above 0"))
        require(
            _is_finite(self.crop_pct) and 0.1 <= self.crop_pct <= 1 and max(size) / self.crop_pct <= 2 * MAX_SIDE,
            _wrong("crop_pct", self.crop_pct, "a share of the image from 0.1 to 1"),
        )
        for name, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
            value = getattr(self, name)
            require(isinstance(value, str) and value in known, _wrong(name, value, f"one of {', '.join(known)}"))
        for name in ("short_side", "long_side"):
            value = getattr(self, name)
            within = type(value) is int and 1 <= value <= MAX_SIDE
            require(value is None or within, _wrong(name, value, most))
        if self.short_side and self.long_side:
            wanted = f"at least the short_side, {self.short_side}"
            require(self.long_side >= self.short_side, _wrong("long_side", self.long_side, wanted))

    @classmethod
    def from_dict(cls, values: Any) -> Preprocessing:
        """From what `dataclasses.asdict` gave, read back from JSON (lists for tuples)."""
        known = [field.name for field in dataclasses.fields(cls)]
        require(
            isinstance(values, dict) and {*known[:4]} <= {*values} <= {*known},
            f"preprocessing is {shown(values)}; it must have {', '.join(known)}",
        )
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)


def _is_finite(value: Any) -> bool:
    """Whether it is a number, and a finite one in float32 too."""
    return type(value) in (int, float) and abs(value) < 1e38


def _wrong(name: str, value: Any, wanted: str) -> str:
    return f"preprocessing: {name} is {shown(value)}; it must be {wanted}"


@dataclasses.dataclass
class AugmentOptions:
    """What the training images go through.

    Args:
        augment: "crop": random resized crop, flip and colour, for photographs. "affine": small shifts, turns and
            changes of scale without flips, for digits and documents. "none": as in evaluation. "auto" takes
            affine for the built-in samples and crop otherwise. Dense tasks scale and crop in any case but none.
        crop_scale: smallest and largest share of the area that a random crop keeps
        hflip: probability of a horizontal flip
        color_jitter: strength of brightness, contrast and saturation changes; unused beside auto_augment
        auto_augment: a timm policy, such as rand-m9-mstd0.5-inc1
        random_erasing: probability of erasing a rectangle
        mixup: alpha of mixup; 0 is off
        cutmix: alpha of cutmix; 0 is off
        label_smoothing: share of the target spread over all classes
        repeated_augmentation: copies of each image in one round of batches, each augmented by itself
        scale_jitter: smallest and largest factor by which the images of a dense task are scaled; (0.5, 2) for segment
            and (0.1, 2) for detect if not given
    """

    augment: Literal["auto", "none", "affine", "crop"] = "auto"
    crop_scale: tuple[float, float] = (0.35, 1.0)
    hflip: float = 0.5
    color_jitter: float = 0.3
    auto_augment: str | None = None
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.1
    repeated_augmentation: int = 1
    scale_jitter: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("hflip", "random_erasing"):
            value = getattr(self, name)
            require(0.0 <= value <= 1.0, f"`{name}` is {value}; a probability lies between 0 and 1")
        require(0.0 <= self.label_smoothing < 1.0, f"`label_smoothing` is {self.label_smoothing}; give 0 to 0.99")
        for name in ("mixup", "cutmix", "color_jitter"):
            require(getattr(self, name) >= 0.0, f"`{name}` is {getattr(self, name)}; it cannot be negative")
        low, high = self.crop_scale
        require(0.0 < low <= high <= 1.0, f"`crop_scale` is {low}, {high}; give two shares, 0 < low <= high <= 1")
        if self.auto_augment is not None:
            _check_policy(self.auto_augment)
        require(self.repeated_augmentation >= 1, "`repeated_augmentation` counts copies; it must be at least 1")
        low, high = self.scale_jitter or (1.0, 1.0)
        require(
            1 / MAX_JITTER <= low <= high <= MAX_JITTER,
            f"`scale_jitter` is {low}, {high}; give two factors, {1 / MAX_JITTER} <= low <= high <= {MAX_JITTER}",
        )


def _check_policy(policy: str) -> None:
    try:
        create_transform(32, is_training=True, auto_augment=policy)
    except (AssertionError, KeyError, ValueError) as error:
        detail = f" ({error})" if str(error) else ""
        raise UserError(
            f"`auto_augment` {policy}: timm knows no such policy{detail}; try rand-m9-mstd0.5-inc1"
        ) from error


def eval_transform(prep: Preprocessing) -> Transform:
    """Resize, central crop, normalise."""
    return v2.Compose([_channels(prep.in_chans), *_whole(prep), ToTensor(prep.mean, prep.std)])


def train_transform(prep: Preprocessing, options: AugmentOptions) -> Transform:
    """The augmentation that the options describe; `augment` is resolved ("auto" is not accepted here)."""
    if options.augment == "none":
        return eval_transform(prep)
    steps = _affine(prep, options) if options.augment == "affine" else _crop(prep, options)
    return v2.Compose(steps)


def _affine(prep: Preprocessing, options: AugmentOptions) -> list[v2.Transform]:
    height, width = prep.img_size
    erasing = v2.RandomErasing(options.random_erasing) if options.random_erasing else None
    return [
        _channels(prep.in_chans),
        CutLongSide(),
        Resize(min(height, width), prep.interpolation),
        v2.CenterCrop([height, width]),
        v2.RandomAffine(TURN, (0.08, 0.08), (0.9, 1.1), SHEAR, v2.InterpolationMode.BILINEAR),
        ToTensor(prep.mean, prep.std, erasing),
    ]


def _crop(prep: Preprocessing, options: AugmentOptions) -> list[v2.Transform]:
    erasing = RandomErasing(options.random_erasing, mode="pixel", device="cpu") if options.random_erasing else None
    steps = [
        RandomResizedCrop(prep.img_size, options.crop_scale, prep.interpolation),
        *([v2.RandomHorizontalFlip(options.hflip)] if options.hflip else []),
    ]
    if not options.auto_augment:
        jitter = v2.ColorJitter(*[options.color_jitter] * 3)  # brightness, contrast, saturation
        return [_channels(prep.in_chans), *steps, jitter, ToTensor(prep.mean, prep.std, erasing)]
    # timm's policies draw in colour; a one-channel model gets its channel after them.
    policy = OnImageAlone(_policy(prep, options), f"`auto_augment` {options.auto_augment}")
    return [_channels(3), *steps, policy, _channels(prep.in_chans), ToTensor(prep.mean, prep.std, erasing)]


def _policy(prep: Preprocessing, options: AugmentOptions) -> Callable[[Image.Image], Image.Image]:
    """timm's policy, and the colour jitter that some of them want."""
    return create_transform(
        prep.img_size,
        is_training=True,
        separate=True,
        color_jitter=options.color_jitter,
        auto_augment=options.auto_augment,
        interpolation=prep.interpolation,
        mean=prep.mean,
    )[1]


def _whole(prep: Preprocessing) -> list[v2.Transform]:
    """The image at the model's size, as timm brings it there for evaluation."""
    height, width = (math.floor(side / prep.crop_pct) for side in prep.img_size)
    crop = v2.CenterCrop(prep.img_size)
    if prep.crop_mode == "squash":
        return [Resize((height, width), prep.interpolation), crop]
    if prep.crop_mode == "border":
        fill = [round(255 * mean) for mean in prep.mean]
        return [ResizeKeepRatio((height, width), prep.interpolation, longest=1.0), PadTo(prep.img_size, fill), crop]
    if height == width:
        return [CutLongSide(), Resize(height, prep.interpolation), crop]
    return [CutLongSide(), ResizeKeepRatio((height, width), prep.interpolation), crop]


def dense_train_transform(prep: Preprocessing, options: AugmentOptions) -> Transform:
    """For images with masks or boxes: scale, a random part of `img_size`, colour, and a flip or small turns.

    `augment` is resolved. "crop" flips and "affine" turns; "none" leaves the random part, without which the borders of
    large images would never be seen.
    """
    still = options.augment == "none"
    window = RandomWindow(
        prep.img_size,
        prep.interpolation,
        functools.partial(fit_sides, short_side=prep.short_side, long_side=_long_side(prep)),
        options.scale_jitter if options.scale_jitter and not still else (1.0, 1.0),
        fill=[round(255 * mean) for mean in prep.mean],
    )
    jitter = options.color_jitter
    moved = {
        "none": [],
        "crop": [v2.RandomHorizontalFlip(options.hflip)],
        "affine": [RandomTurn(TURN, SHEAR, fill=[round(255 * mean) for mean in prep.mean])],
    }[options.augment]
    colour = [] if still else [v2.ColorJitter(jitter, jitter, jitter, min(0.5, jitter * HUE))]
    steps = [_channels(prep.in_chans), window, *moved, KeepVisible(turned=options.augment == "affine"), *colour]
    return v2.Compose([*steps, ToTensor(prep.mean, prep.std)])


def dense_eval_transform(prep: Preprocessing) -> Transform:
    """The whole image, as large as `short_side` and `long_side` ask for; masks and boxes beside it stay as they are."""
    return v2.Compose([
        _channels(prep.in_chans), OnImage(functools.partial(_fitted, prep=prep)), ToTensor(prep.mean, prep.std),
    ])  # fmt: skip


def _fitted(image: Image.Image, prep: Preprocessing) -> Image.Image:
    factor = fit_sides(image.size, prep.short_side, _long_side(prep))
    size = [max(1, round(side * factor)) for side in image.size]
    return image if size == [*image.size] else image.resize(size, Image.Resampling[prep.interpolation.upper()])


def _long_side(prep: Preprocessing) -> int | None:
    """None where images stay as they are; a strip scaled by its short side could come to any length."""
    return prep.long_side or (MAX_SIDE if prep.short_side else None)


def _channels(in_chans: int) -> OnImage:
    return OnImage(functools.partial(to_channels, in_chans=in_chans))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's CPU random numbers from `seed` inside, and as they were afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def mix_seed(*parts: int) -> int:
    """One 32-bit seed from several small numbers."""
    value = 0x9E3779B9
    for part in parts:
        value = (value ^ (part & 0xFFFFFFFF)) * 0x85EBCA6B % 2**32
        value ^= value >> 13
    return value
