"""Masks, boxes and names over images of any size, whatever the names."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from tests.dense import scene
from tests.tasks.test_figures import NAMES
from vimamba.tasks.overlays import LEAST, _label, _places, colours, with_legend
from vimamba.tasks.results import Crop, Detections, Segmentation

GREY = (120, 120, 120)


def grey(width, height):
    return Image.new("RGB", (width, height), GREY)


def detections(boxes, names, size, crops=None, scores=None):
    boxes, scores = np.float32(boxes).reshape(-1, 4), np.linspace(0.99, 0.6, len(boxes)) if scores is None else scores
    labels = np.arange(len(boxes)) % len(names)
    return Detections(boxes, labels, np.float32(scores), crops, names, size)


@pytest.mark.parametrize("count", [1, 5, 17, 40, 300])
def test_colours_lie_apart(count):
    found = colours([f"class {i}" for i in range(count)]).astype(int)
    assert found.shape == (count, 3)
    apart = [abs(a - b).sum() for a, b in itertools.pairwise(found)]
    assert min(apart, default=255) > 60  # neighbours in the list
    if count <= 17:
        assert min((abs(a - b).sum() for a, b in itertools.combinations(found, 2)), default=255) > 60


def test_what_lies_behind_is_black_in_masks_and_left_as_it_is_in_pictures():
    names, mask = ["tree", "Background", "road"], np.repeat(np.uint8([[1, 0, 2]]), 40, 1).repeat(120, 0)
    assert colours(names)[1].tolist() == [0, 0, 0]
    drawn = np.asarray(Segmentation(mask, names).draw(grey(120, 120)))
    assert (drawn[:120, :40] == GREY).all()
    for left, shade in ((40, colours(names)[0]), (80, colours(names)[2])):
        assert (drawn[60, left + 20] == np.round(0.4 * np.array(GREY) + 0.6 * shade)).all()
        assert (drawn[60, left] == shade).all()  # an outline


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("size", [(32, 32), (300, 9), (640, 480)])
def test_any_names_are_drawn(names, size):
    width, height = size
    image, mask = grey(*size), np.zeros((height, width), np.int32)
    mask[:, width // 2 :] = len(names) - 1
    drawn = Segmentation(mask, names).draw(image)
    assert drawn.width >= width
    assert drawn.height > height
    boxes = [[i % 5 * width / 6, i % 4 * height / 5, width, height] for i in range(min(len(names), 20))]
    drawn = detections(boxes, names, (height, width)).draw(image)
    assert drawn.height >= height
    assert len(drawn.getcolors(10**6)) > 3
    assert image.getcolors() == [(width * height, GREY)]
    assert drawn.width < 900 + width  # a long name is cut


def test_nothing_found_changes_nothing():
    for size in ((32, 20), (640, 480)):
        drawn = detections([], ["a"], size[::-1], []).draw(grey(*size))
        assert np.array_equal(np.asarray(drawn), np.asarray(grey(*size)))


def test_names_of_objects_hide_no_other_where_there_is_room():
    """Of a row of boxes close together, two in the same place, and others at the borders."""
    boxes = [[40 + 30 * i, 100, 75 + 30 * i, 300] for i in range(6)]
    boxes += [[300, 100, 400, 200], [300, 100, 400, 200], [0, 0, 30, 30], [610, 0, 640, 479], [0, 440, 100, 479]]
    labels = [_label(f"a thing {i}", 13, (200, 0, 0)) for i in range(len(boxes))]
    frames = [
        (x, y, x + label.width, y + label.height)
        for (x, y), label in zip(_places((640, 480), np.float32(boxes), labels), labels, strict=True)
    ]
    for left, top, right, bottom in frames:
        assert 0 <= left < right <= 640
        assert 0 <= top < bottom <= 480
    shared = [
        max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        for a, b in itertools.combinations(frames, 2)
    ]
    assert sum(share > 0 for share in shared) <= 2  # a name is three times as wide as the boxes are apart
    assert sum(shared) < 0.1 * sum(label.width * label.height for label in labels)


def test_objects_of_a_small_image_are_named_below_it():
    image, masks, _ = scene(8)
    found = detections([[3, 9, 14, 20], [18, 5, 29, 16]], ["square", "disc"], (32, 32), [Crop.of(m) for m in masks])
    drawn = np.asarray(found.draw(Image.fromarray(image)))
    assert drawn.shape[0] > 32 < LEAST
    left = (drawn.shape[1] - 32) // 2
    part = drawn[:32, left : left + 32]
    changed = (part != image).any(-1)
    assert changed[masks[0]].all()
    assert not changed[0].any()


def test_masks_and_boxes_have_the_colour_of_their_class():
    mask = np.zeros((200, 300), bool)
    mask[50:100, 60:160] = True
    found = detections([[60, 50, 160, 100]], ["a", "b"], (200, 300), [Crop.of(mask)])
    drawn, shade = np.asarray(found.draw(grey(300, 200))), colours(["a", "b"])[0]
    assert (drawn[75, 110] == np.round(0.5 * np.array(GREY) + 0.5 * shade)).all()
    assert (drawn[99, 100] == shade).all()
    assert (drawn[150, 200] == GREY).all()
    assert np.array_equal(np.asarray(found.draw(grey(300, 200), score=0.999)), np.asarray(grey(300, 200)))
    assert np.array_equal(np.asarray(found.draw(grey(300, 200), k=0)), np.asarray(grey(300, 200)))


def test_a_legend_has_as_many_rows_as_it_needs():
    entries = [(f"class {i}", (200, 30, 30)) for i in range(12)]
    heights = [with_legend(grey(width, 100), entries).height for width in (200, 400, 2000)]
    assert heights[0] > heights[1] > heights[2] > 100
    assert with_legend(grey(200, 100), entries).width == 200
    assert with_legend(grey(20, 100), entries[:1]).width > 20
    assert with_legend(grey(20, 100), []).size == (20, 100)


def test_letters_grow_with_the_image():
    small, large = (with_legend(grey(side, side), [("tree", (0, 99, 0))]).height - side for side in (200, 2000))
    assert large > 2 * small
