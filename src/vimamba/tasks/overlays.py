"""What was found in an image, drawn over it: masks, boxes and the names of their classes."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
from matplotlib import colors as mpl_colors
from PIL import Image, ImageDraw

from vimamba.data.decode import flatten
from vimamba.tasks.figures import shortened, text_picture
from vimamba.tasks.results import Crop, is_background

# Of a list of 20 that people tell apart, by Sasha Trubetskoy (sashamaps.net), without the palest.
DISTINCT = (
    "#4363d8", "#f58231", "#3cb44b", "#e6194b", "#ffe119", "#911eb4", "#46f0f0", "#f032e6", "#bcf60c", "#008080",
    "#9a6324", "#e6beff", "#800000", "#aaffc3", "#808000", "#ffd8b1", "#000075",
)  # fmt: skip
GOLDEN = 0.61803398875  # turns of the colour circle, by which any number of further ones lie apart
WHITE = (255, 255, 255)
LEAST = 100  # pixels of the shorter side of an image that has room for names in it

Colour = tuple[int, ...]


def in_base64(picture: Image.Image, **how: Any) -> str:
    """A picture as PNG in base64."""
    file = io.BytesIO()
    picture.save(file, "png", **how)
    return base64.b64encode(file.getvalue()).decode()


def colours(names: Sequence[str]) -> np.ndarray:
    """A colour for each class, (classes, 3) uint8; what lies behind the others is black."""
    more = np.arange(max(0, len(names) - len(DISTINCT)))
    shades_N3 = np.stack([GOLDEN * more % 1.0, 0.5 + 0.4 * (more % 2), np.array([0.95, 0.75, 0.55])[more % 3]], -1)
    known_N3 = np.array([mpl_colors.to_rgb(colour) for colour in DISTINCT[: len(names)]]).reshape(-1, 3)
    rgb_N3 = np.round(255 * np.concatenate([known_N3, mpl_colors.hsv_to_rgb(shades_N3)])).astype(np.uint8)
    rgb_N3[[is_background(name) for name in names]] = 0
    return rgb_N3


def with_classes(image: Image.Image, mask_HW: np.ndarray, names: Sequence[str]) -> Image.Image:
    """A copy of an image in the colours of its pixels' classes, with outlines; what lies behind them stays as it is."""
    seen_HW = ~np.array([is_background(name) for name in names])[mask_HW]
    edge_HW = _edges(mask_HW, _pen(image.size))
    return _tinted(image, colours(names)[mask_HW], _strength(edge_HW, seen_HW, 0.6))


def with_boxes(
    image: Image.Image, boxes_N4: np.ndarray, names: list[str], colours_N3: np.ndarray, crops: list[Crop] | None
) -> Image.Image:
    """A copy of an image with named boxes, the first uppermost, and masks in the same colours.

    Names stand where they hide no other as far as there is room, and below an image that is too small for them.
    """
    picture = flatten(image).convert("RGB")
    pen = _pen(picture.size)
    for crop, colour in reversed([pair for pair in zip(crops or [], colours_N3, strict=False) if pair[0].mask.size]):
        place = (crop.left, crop.top, crop.left + crop.mask.shape[1], crop.top + crop.mask.shape[0])
        edge_HW = _edges(np.pad(crop.mask, pen), pen)[pen:-pen, pen:-pen]
        tint_HW3 = np.broadcast_to(colour, (*crop.mask.shape, 3))
        picture.paste(_tinted(picture.crop(place), tint_HW3, _strength(edge_HW, crop.mask, 0.5)), place[:2])
    draw, shades = ImageDraw.Draw(picture), [tuple(colour.tolist()) for colour in colours_N3]
    for box, shade in reversed([*zip(boxes_N4.tolist(), shades, strict=True)]):
        left, top, right, bottom = box
        draw.rectangle([left, top, max(left, right - 1), max(top, bottom - 1)], outline=shade, width=pen)
    if min(picture.size) < LEAST:
        return with_legend(picture, [*zip(names, shades, strict=True)])
    labels = [_label(name, _letters(picture.size), shade) for name, shade in zip(names, shades, strict=True)]
    for label, corner in reversed([*zip(labels, _places(picture.size, boxes_N4, labels), strict=True)]):
        picture.paste(label, corner)
    return picture


def with_legend(image: Image.Image, entries: Iterable[tuple[str, Colour]]) -> Image.Image:
    """A copy of an image with names on their colours below it, as many in a row as fit."""
    image = flatten(image).convert("RGB")
    size = _letters(image.size)
    labels = [_label(name, size, colour) for name, colour in entries]
    if not labels:
        return image
    gap = max(3, size // 3)
    width = max(image.width, *(label.width + 2 * gap for label in labels))
    places, left, top = [], gap, image.height + gap
    row = max(label.height for label in labels) + gap
    for label in labels:
        if left > gap and left + label.width + gap > width:
            left, top = gap, top + row
        places.append((left, top))
        left += label.width + gap
    whole = Image.new("RGB", (width, top + row), WHITE)
    whole.paste(image, ((width - image.width) // 2, 0))
    for label, place in zip(labels, places, strict=True):
        whole.paste(label, place)
    return whole


def _tinted(image: Image.Image, colours_HW3: np.ndarray, strength_HW: np.ndarray) -> Image.Image:
    """A copy of an image with so much of other colours, 0 to 1."""
    pixels_HW3 = np.array(flatten(image).convert("RGB"))
    where_HW = strength_HW > 0
    share_N1 = strength_HW[where_HW, None]
    pixels_HW3[where_HW] = np.round(pixels_HW3[where_HW] * (1 - share_N1) + colours_HW3[where_HW] * share_N1)
    return Image.fromarray(pixels_HW3)


def _strength(edge_HW: np.ndarray, inside_HW: np.ndarray, tint: float) -> np.ndarray:
    """1 at the edge of what is inside, `tint` within, 0 elsewhere; float32."""
    return np.where(edge_HW, np.float32(1.0), np.float32(tint)) * inside_HW


def _edges(values_HW: np.ndarray, width: int) -> np.ndarray:
    """Which pixels have others within `width` along an axis."""
    edge_HW = np.zeros(values_HW.shape, dtype=bool)
    for step in range(1, width + 1):
        for one, two in ((np.s_[step:], np.s_[:-step]), (np.s_[:, step:], np.s_[:, :-step])):
            differs = values_HW[one] != values_HW[two]
            edge_HW[one] |= differs
            edge_HW[two] |= differs
    return edge_HW


def _letters(size: tuple[int, int]) -> int:
    """Pixels of the letters on an image."""
    return max(11, round(min(size) / 36))


def _pen(size: tuple[int, int]) -> int:
    """Pixels of a line on an image."""
    return max(1, round(min(size) / 300))


def _places(size: tuple[int, int], boxes_N4: np.ndarray, labels: list[Image.Image]) -> list[tuple[int, int]]:
    """Where labels go, left and top: on their box, in it, or below it, where they hide least of those before."""
    taken_N4 = np.zeros((0, 4))
    for (left, top, right, bottom), label in zip(boxes_N4.tolist(), labels, strict=True):
        wide, high = label.size
        across = [min(max(0.0, x), max(0.0, size[0] - wide)) for x in (left, right - wide)]
        down = [y for y in (top - high, top, bottom, bottom - high) if 0 <= y <= size[1] - high] or [0.0]
        frames = [(x, y, x + wide, y + high) for y in down for x in across]
        hidden = [_shared(np.array(frame), taken_N4) for frame in frames]
        taken_N4 = np.vstack([taken_N4, frames[int(np.argmin(hidden))]])
    return [(int(left), int(top)) for left, top, _, _ in taken_N4]


def _shared(frame_4: np.ndarray, others_N4: np.ndarray) -> float:
    """Pixels of a frame that lie in others."""
    sides = np.minimum(frame_4[2:], others_N4[:, 2:]) - np.maximum(frame_4[:2], others_N4[:, :2])
    return float(sides.clip(0).prod(1).sum())


@cache
def _label(text: str, size: int, colour: Colour) -> Image.Image:
    """A line of text, letters of so many pixels, on a colour."""
    light = sum(part * weight for part, weight in zip(colour, (0.299, 0.587, 0.114), strict=True)) > 140
    return text_picture(shortened(text), size, "black" if light else "white", f"#{bytes(colour).hex()}")
