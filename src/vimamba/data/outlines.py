"""COCO's outlines of objects, polygons and run lengths, kept as small arrays of whole numbers, and masks drawn of them.

Everything is checked before it is kept: what is drawn by faster-coco-eval's C++ takes any number for granted.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

from vimamba.errors import require

POLYGONS, RUNS = 1, 2  # the first number of what is kept
_END = -(2**31)  # of a polygon

NOTHING = np.empty(0, dtype=np.int32)


def need_package() -> None:
    """Say so if faster-coco-eval is missing.

    Raises:
        UserError: it is.
    """
    found = importlib.util.find_spec("faster_coco_eval") is not None
    require(found, "masks of objects: need faster-coco-eval; run pip install 'vimamba[dense]'")


def kept(segmentation: Any, height: int, width: int) -> np.ndarray:
    """An annotation's outline, int32; nothing where it has none.

    Raises:
        ValueError: it is no outline of something in an image of that size.
    """
    if segmentation is None or segmentation == [] or segmentation == {}:
        return NOTHING
    if isinstance(segmentation, list):
        return np.concatenate([[POLYGONS], *(_polygon(ring, height, width) for ring in segmentation)]).astype(np.int32)
    if not isinstance(segmentation, dict) or segmentation.get("size") != [height, width]:
        raise ValueError("no run lengths of this size")
    counts = segmentation.get("counts")
    runs = unpacked(counts) if isinstance(counts, str) else _whole(counts)
    if runs.size == 0 or runs.min() < 0 or runs.max() > height * width or runs.sum() != height * width:
        raise ValueError("run lengths that do not fill the image")
    return np.concatenate([[RUNS], runs]).astype(np.int32)


def _whole(values: Any) -> np.ndarray:
    array = np.asarray(values)  # raises what numpy raises for a list of lists of any lengths
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError("no list of whole numbers")
    return array.astype(np.int64)


def _polygon(ring: Any, height: int, width: int) -> np.ndarray:
    """The corners x, y, x, y ... in fifths of a pixel, to which COCO's own code rounds them, and an end."""
    points = np.asarray(ring)
    if points.dtype.kind not in "iuf" or points.ndim != 1 or len(points) < 6 or len(points) % 2:
        raise ValueError("no list of three corners or more")
    most = 2 * max(height, width)  # much beyond the image lies no object of it, and drawing takes time and memory
    if not np.abs(points).max() <= most:
        raise ValueError("corners far outside the image")
    return np.append(np.trunc(5 * points.astype(np.float64) + 0.5), _END)


def unpacked(text: str) -> np.ndarray:
    """The run lengths of COCO's string of them: five bits a letter, least first; from the fourth on differences to the
    number two before.

    Raises:
        ValueError: it is none.
    """
    letters = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    if letters.size == 0 or letters.min() < 0 or letters.max() > 63 or letters[-1] & 32:
        raise ValueError("no packed run lengths")
    last = np.flatnonzero(~letters & 32)  # a letter with that bit is followed by another of the same number
    first = np.append(0, last[:-1] + 1)
    place = np.arange(len(letters)) - np.repeat(first, last - first + 1)
    if place.max() > 6:  # 35 bits
        raise ValueError("a run length beyond all images")
    numbers = np.add.reduceat((letters & 31) << 5 * place, first)
    numbers -= (letters[last] & 16 > 0) * (np.int64(32) << 5 * place[last])  # a sign bit, carried on
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def drawn(outline: np.ndarray, height: int, width: int) -> np.ndarray:
    """The mask, uint8 (height, width), of an outline of which something is kept."""
    if outline[0] == RUNS:
        ones = np.arange(len(outline) - 1, dtype=np.uint8) & 1
        return np.repeat(ones, outline[1:]).reshape(width, height).T
    from faster_coco_eval.core import mask as api

    ends = np.flatnonzero(outline == _END)
    rings = [outline[start:end] for start, end in zip([1, *(ends[:-1] + 1)], ends, strict=True)]
    # A number that comes out as the same fifths where the fraction is dropped towards zero.
    return api.decode(api.merge(api.frPyObjects([((ring - (ring < 0)) / 5).tolist() for ring in rings], height, width)))


def packed(mask_HW: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run lengths of a mask, as they stand in JSON."""
    from faster_coco_eval.core import mask as api

    return _as_text(api.encode(np.asfortranarray(mask_HW, dtype=np.uint8)))


def packed_runs(runs: list[int], size: tuple[int, int]) -> dict[str, Any]:
    """The same of run lengths of an image (height, width), column by column."""
    from faster_coco_eval.core import mask as api

    return _as_text(api.frPyObjects({"size": list(size), "counts": runs}, *size))


def _as_text(packed: dict[str, Any]) -> dict[str, Any]:
    counts = packed["counts"]
    return {"size": list(packed["size"]), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}
