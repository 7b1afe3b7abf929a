"""Objects that were found in overlapping parts of an image: those that a seam cut are made one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vimamba.tasks.results import Crop, Detections

SAME = 0.5  # share of the smaller of two objects, where both parts show, from which they are one


class Frame(NamedTuple):
    """A part of an image, pixels."""

    left: int
    top: int
    right: int
    bottom: int

    def shared(self, other: Frame) -> Frame:
        """What lies in both; its right may lie left of its left."""
        low = (max(sides) for sides in zip(self[:2], other[:2], strict=True))
        high = (min(sides) for sides in zip(self[2:], other[2:], strict=True))
        return Frame(*low, *high)


def joined(found: Sequence[Detections], frames: Sequence[Frame], neighbours: Iterable[tuple[int, int]]) -> Detections:
    """The objects of an image.

    Args:
        found: in each part, in pixels of the image.
        frames: where each part lies.
        neighbours: pairs of parts that overlap.
    """
    counts = np.cumsum([0, *(len(part.scores) for part in found)])
    owner = [*range(int(counts[-1]))]  # of each object one that it is the same as

    def first(i: int) -> int:
        while owner[i] != i:
            i = owner[i]
        return i

    for one, other in neighbours:
        for i, k in _matched(found[one], found[other], frames[one].shared(frames[other])):
            low, high = sorted((first(int(counts[one]) + i), first(int(counts[other]) + k)))
            owner[high] = low
    groups: dict[int, list[int]] = {}
    for i in range(len(owner)):
        groups.setdefault(first(i), []).append(i)
    return _united(found, [*groups.values()])


def _united(found: Sequence[Detections], groups: list[list[int]]) -> Detections:
    """An object for each group of them, the surest first."""
    boxes_N4, label_ids, scores = (
        np.concatenate([getattr(part, name) for part in found]) for name in ("boxes", "label_ids", "scores")
    )
    groups.sort(key=lambda group: -scores[group].max())
    boxes = [np.r_[boxes_N4[group, :2].min(0), boxes_N4[group, 2:].max(0)] for group in groups]
    crops = None
    if all(part.crops is not None for part in found):
        parts = [crop for part in found for crop in part.crops or []]
        crops = [_union([parts[i] for i in group]) for group in groups]
    return dataclasses.replace(
        found[0], boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4), crops=crops,
        label_ids=np.array([label_ids[group[0]] for group in groups], dtype=np.int64),
        scores=np.array([scores[group].max() for group in groups], dtype=np.float32),
    )  # fmt: skip


def _matched(one: Detections, other: Detections, shared: Frame) -> Iterator[tuple[int, int]]:
    """Pairs of objects of two parts that are the same, each in one pair at most, by what shows in both parts."""
    if shared.left >= shared.right or shared.top >= shared.bottom:
        return
    first_N4, second_M4 = (np.clip(boxes, [*shared[:2]] * 2, [*shared[2:]] * 2) for boxes in (one.boxes, other.boxes))
    low_NM2 = np.maximum(first_N4[:, None, :2], second_M4[:, :2])
    high_NM2 = np.minimum(first_N4[:, None, 2:], second_M4[:, 2:])
    both_NM = (high_NM2 - low_NM2).clip(0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (first_N4, second_M4)]
    likely_NM = (both_NM > 0) & (both_NM >= SAME * np.minimum(areas[0][:, None], areas[1]))
    likely_NM &= one.label_ids[:, None] == other.label_ids
    pairs = []
    for i, k in np.argwhere(likely_NM).tolist():
        both, first, second = both_NM[i, k], areas[0][i], areas[1][k]
        if one.crops is not None and other.crops is not None:
            both, first, second = _overlap(one.crops[i], other.crops[k], shared)
        if both > 0 and both >= SAME * min(first, second):
            pairs.append((both / (first + second - both), i, k))
    used: tuple[set[int], set[int]] = set(), set()
    for _, i, k in sorted(pairs, reverse=True):  # the most alike first: a small object may lie in a large one's box
        if i not in used[0] and k not in used[1]:
            used[0].add(i)
            used[1].add(k)
            yield i, k


def _overlap(crop: Crop, other: Crop, shared: Frame) -> tuple[int, int, int]:
    """How many pixels of a part of the image are in both of two masks, in the one and in the other."""
    first_HW, second_HW = (_within(mask, shared) for mask in (crop, other))
    return int((first_HW & second_HW).sum()), int(first_HW.sum()), int(second_HW.sum())


def _within(crop: Crop, frame: Frame) -> np.ndarray:
    """A mask in a part of the image, (height, width)."""
    mask_HW = np.zeros((frame.bottom - frame.top, frame.right - frame.left), dtype=bool)
    left, top, right, bottom = _frame(crop).shared(frame)
    if left < right and top < bottom:
        part = crop.mask[top - crop.top : bottom - crop.top, left - crop.left : right - crop.left]
        mask_HW[top - frame.top : bottom - frame.top, left - frame.left : right - frame.left] = part
    return mask_HW


def _frame(crop: Crop) -> Frame:
    rows, columns = crop.mask.shape
    return Frame(crop.left, crop.top, crop.left + columns, crop.top + rows)


def _union(crops: list[Crop]) -> Crop:
    """One mask of several."""
    crops = [crop for crop in crops if crop.mask.size] or crops[:1]
    frames = np.array([_frame(crop) for crop in crops])
    frame = Frame(*frames[:, :2].min(0).tolist(), *frames[:, 2:].max(0).tolist())
    mask_HW = np.zeros((frame.bottom - frame.top, frame.right - frame.left), dtype=bool)
    for crop in crops:
        dataclasses.replace(crop, top=crop.top - frame.top, left=crop.left - frame.left).paste(mask_HW)
    return Crop(frame.top, frame.left, mask_HW)
