"""The built-in scenes: the same to the bit everywhere, and what their targets say of them."""

import hashlib
import importlib.util
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from vimamba.data import scenes
from vimamba.data.samples import IGNORE
from vimamba.data.scenes import FEWEST, MOST, PICTURES, SIDE, open_scenes, write_scenes
from vimamba.errors import UserError

SOME = range(12)


@pytest.fixture(scope="module")
def objects():
    return open_scenes("scenes-det")


@pytest.fixture(scope="module")
def classes():
    return open_scenes("scenes-seg")


def test_scenes_are_the_same_to_the_bit_on_any_machine(objects):
    digest = hashlib.sha256()
    for half in (objects.train, objects.val):
        for index in SOME:
            digest.update(half.image(index).tobytes())
            digest.update(half.target(index)["masks"].numpy().tobytes())
    assert digest.hexdigest() == "79430fa807eeefcab130eede62df03bb6210b7ffec2b507072867c11bf1b6581"


class Scenes:
    """What a worker process draws."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(SOME)

    def __getitem__(self, index):
        return np.asarray(self.samples.image(index)), self.samples.target(index)


def test_workers_and_another_order_draw_the_same(classes):
    expected = [Scenes(classes.train)[index] for index in SOME]
    by_workers = [*DataLoader(Scenes(classes.train), batch_size=None, num_workers=2)]
    copied = pickle.loads(pickle.dumps(Scenes(classes.train)))
    backwards = [copied[index] for index in reversed(SOME)][::-1]
    for others in (by_workers, backwards):
        for (image, mask), (other, its_mask) in zip(expected, others, strict=True):
            assert np.array_equal(image, other)
            assert mask.equal(its_mask)


def test_the_halves_and_their_sizes(objects, classes):
    for data, names in ((objects, 10), (classes, 11)):
        assert (len(data.train), len(data.val), len(data.class_names)) == (800, 200, names)
        assert data.small
        assert not data.photographs
        assert data.held_out() is None
        assert data.train.name(3) == f"{data.name}:train[3]"
    assert (objects.has_masks, classes.has_masks) == (True, False)
    assert classes.class_names[:2] == ["background", "0"]
    assert not {*PICTURES["train"]} & {*PICTURES["val"]}
    assert not np.array_equal(objects.train.digits.images[:1000], objects.val.digits.images)


def test_classes_and_objects_tell_of_the_same_scene(objects, classes):
    for index in SOME:
        image, mask, target = objects.val.image(index), classes.val.target(index), objects.val.target(index)
        assert image.size == (SIDE, SIDE)
        assert image.tobytes() == classes.val.image(index).tobytes()
        assert isinstance(mask, tv_tensors.Mask)
        assert (mask.dtype, mask.shape) == (torch.int32, (SIDE, SIDE))
        assert not (mask == IGNORE).any()
        assert mask.equal((target["masks"].int() * (target["labels"] + 1)[:, None, None].int()).sum(0).int())
        assert (target["masks"].sum(0) <= 1).all()


def test_objects_are_whole_digits_in_boxes_around_them(objects):
    counts = set()
    for index in range(40):
        target = objects.train.target(index)
        count = len(target["labels"])
        counts.add(count)
        assert {len(values) for values in target.values()} == {count}
        assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
        assert (target["boxes"].canvas_size, target["boxes"].dtype) == ((SIDE, SIDE), torch.float32)
        assert (target["masks"].dtype, target["labels"].dtype) == (torch.uint8, torch.int64)
        assert target["area"].tolist() == target["masks"].sum((1, 2)).tolist()
        assert not target["crowd"].any()
        for mask, box in zip(target["masks"], target["boxes"].int().tolist(), strict=True):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert min(box[2] - box[0], box[3] - box[1]) >= 3
    assert {FEWEST, MOST} <= counts <= {*range(1, MOST + 1)}


def test_no_digit_is_in_two_scenes(objects):
    for half in (objects.train, objects.val):
        assert len(half) * MOST <= len(half.digits)
        for index in SOME:
            own = [half.digits.target(number) for number in range(index * MOST, (index + 1) * MOST)]
            shown, rest = half.scene(index).digits, iter(own)
            assert all(digit in rest for digit in shown)  # in this order; those that found no place are left out


def test_every_digit_stands_out_from_what_is_behind_it(objects):
    for index in range(40):
        grey = np.asarray(objects.val.image(index).convert("L")).astype(int)
        target = objects.val.target(index)
        for mask in target["masks"].numpy().astype(bool):
            around = np.zeros_like(mask)
            rows, columns = np.nonzero(mask)
            around[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
            around &= ~mask
            assert abs(np.median(grey[mask]) - grey[around].mean()) > 25, index


def test_written_scenes_are_those_held_out(tmp_path, objects):
    paths = write_scenes(tmp_path / "scenes", count=3)
    assert [path.name.split("-shows-")[0] for path in paths] == ["0", "1", "2"]
    for index, path in enumerate(paths):
        with Image.open(path) as image:
            assert image.tobytes() == objects.val.image(index).tobytes()
        shown = path.stem.split("-shows-")[1].split("-")
        assert shown == [str(label) for label in objects.val.target(index)["labels"].tolist()]


def test_without_scikit_image_a_sentence_says_what_is_missing(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "skimage" else find(name))
    with pytest.raises(UserError, match=r"need scikit-image, for its pictures; run pip install 'vimamba\[dense\]'"):
        open_scenes("scenes-seg")


def test_a_scikit_image_without_the_pictures_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(scenes, "folder_of_pictures", lambda: tmp_path)
    with pytest.raises(UserError, match=r"this scikit-image has no camera\.png"):
        scenes._pictures.__wrapped__("val")
