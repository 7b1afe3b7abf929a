"""COCO's annotations: every layout, masks as pycocotools draws them, what is wrong with files, and files written."""

import contextlib
import copy
import importlib.util
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as reference
from pycocotools.coco import COCO
from torchvision import tv_tensors

from vimamba.data import coco, coco_json
from vimamba.data.coco import open_coco
from vimamba.data.coco_json import write_coco
from vimamba.data.decode import DecodeError
from vimamba.data.image_data import Opening
from vimamba.data.outlines import drawn, kept, packed
from vimamba.data.split import hold_out
from vimamba.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools

OPENING = Opening(0.25, 0, True, hold_out, None)
WHOLE = Opening(1.0, 0, False, hold_out, None)
HEIGHT, WIDTH = 40, 60
SQUARE = [[10, 5, 30, 5, 30, 25, 10, 25]]


def document(count=4, **changes):
    """Images with a square of the third category each, but for the last."""
    annotations = [
        {"id": 100 + i, "image_id": 7 + i, "category_id": 11, "bbox": [10, 5, 20, 20], "area": 400.5, "iscrowd": 0,
         "segmentation": SQUARE}
        for i in range(count - 1)
    ]  # fmt: skip
    images = [{"id": 7 + i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(count)]
    categories = [{"id": 11, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 90, "name": "cow"}]
    return {"images": images, "annotations": annotations, "categories": categories, **changes}


def write(root, values=None, images="images", file="all.json", count=4):
    values = document(count) if values is None else values
    (root / images).mkdir(parents=True, exist_ok=True)
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        picture = np.random.RandomState(sum(images.encode()) + 100 * index).randint(
            0, 256, (HEIGHT, WIDTH, 3), np.uint8
        )
        Image.fromarray(picture).save(root / images / f"{index}.png")
    (root / file).write_text(json.dumps(values))
    return root


def opened(root, opening=WHOLE):
    return open_coco(str(root), opening)


def with_annotations(*more, count=40, **fields):
    """Many sound annotations and some more, which are those of the first with other fields."""
    values = document(count)
    for position, entry in enumerate(more):
        values["annotations"].append({**values["annotations"][0], "id": 1000 + position, **entry})
    return values


def test_what_a_sample_is(tmp_path):
    data = opened(write(tmp_path))
    assert data.class_names == ["cat", "dog", "cow"]
    assert data.has_masks
    assert data.notes == []
    target = data.val.target(1)
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
    assert target["boxes"].tolist() == [[10, 5, 30, 25]]
    assert (target["boxes"].canvas_size, target["boxes"].dtype) == ((HEIGHT, WIDTH), torch.float32)
    assert (target["labels"].tolist(), target["labels"].dtype) == ([1], torch.int64)
    assert (target["crowd"].tolist(), target["crowd"].dtype) == ([False], torch.bool)
    assert (target["area"].tolist(), target["area"].dtype) == ([400.5], torch.float32)
    assert isinstance(target["masks"], tv_tensors.Mask)
    assert target["masks"].dtype == torch.uint8
    assert target["masks"].sum() == 400
    assert target["masks"][0, 5:25, 10:30].all()
    assert data.val.image(1).size == (WIDTH, HEIGHT)
    empty = data.val.target(3)  # an image without objects stays
    assert {name: tuple(values.shape) for name, values in empty.items()} == {
        "boxes": (0, 4), "masks": (0, HEIGHT, WIDTH), "labels": (0,), "crowd": (0,), "area": (0,),
    }  # fmt: skip


LAYOUTS = {
    "COCO": ("train2017", "annotations/instances_train2017.json", "val2017", "annotations/instances_val2017.json"),
    "COCO in images": ("images/train2014", "annotations/instances_train2014.json", "images/val2014",
                       "annotations/instances_val2014.json"),
    "without a year": ("train", "annotations/instances_train.json", "val", "annotations/instances_val.json"),
    "plain names": ("images", "train.json", "images", "val.json"),
    "Roboflow": ("train", "train/_annotations.coco.json", "valid", "valid/_annotations.coco.json"),
    "Roboflow with val": ("train", "train/_annotations.coco.json", "val", "val/_annotations.coco.json"),
    "halves with images": ("train/images", "train/labels.json", "test/images", "test/labels.json"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_with_halves(tmp_path, layout):
    images, file, val_images, val_file = LAYOUTS[layout]
    write(tmp_path, images=images, file=file, count=5)
    write(tmp_path, document(3), images=val_images, file=val_file, count=3)
    (tmp_path / os.path.dirname(file) / "captions_train2017.json").write_text("{}")
    data = opened(tmp_path, OPENING)
    assert not data.drawn
    assert data.train.keys() == [f"{images}/{i}.png" for i in range(5)]
    assert data.val.keys() == [f"{val_images}/{i}.png" for i in range(3)]
    assert data.val.target(0)["labels"].tolist() == [1]
    data.train.image(4)


@pytest.mark.parametrize(
    ("images", "file", "named"),
    [
        ("images", "all.json", ""),
        ("images", "annotations/instances_default.json", ""),
        ("photos", "photos/labels.json", "photos/labels.json"),
        ("images", "labels.json", "labels.json"),
        (".", "labels.json", ""),
        ("train", "train/_annotations.coco.json", ""),
    ],
)
def test_layouts_that_are_split(tmp_path, images, file, named):
    write(tmp_path, document(12), images=images, file=file, count=12)
    data = opened(tmp_path / named, OPENING)
    assert data.drawn
    assert len(data.train) + len(data.val) == 12
    assert len(data.val) > 0
    for half in (data.train, data.val):
        for index in range(len(half)):
            empty = half.name(index).endswith("11.png")
            assert half.target(index)["labels"].tolist() == ([] if empty else [1])


def test_a_half_to_hold_out_alone(tmp_path):
    write(tmp_path, images="val2017", file="annotations/instances_val2017.json")
    with pytest.raises(UserError, match="nothing to learn from, but a half to hold out"):
        opened(tmp_path, OPENING)
    assert len(opened(tmp_path).val) == 4


def test_a_change_of_a_box_is_told(tmp_path):
    data = opened(write(tmp_path, document(8), count=8), OPENING)
    values = document(8)
    assert data.moved_from(opened(write(tmp_path, values, count=8), OPENING).held_out())
    values["annotations"][2]["bbox"][0] += 1
    assert not data.moved_from(opened(write(tmp_path, values, count=8), OPENING).held_out())


def test_numbers_of_categories_and_images_may_be_anything(tmp_path):
    values = document()
    for entry in values["images"]:
        entry["id"] = f"image {entry['id']}"
    for entry in values["annotations"]:
        entry["image_id"] = f"image {entry['image_id']}"
        del entry["id"]
    values["annotations"][0]["category_id"] = 90
    target = opened(write(tmp_path, values)).val.target(0)
    assert target["labels"].tolist() == [2]


def test_classes_are_matched_by_name_across_halves(tmp_path):
    write(tmp_path, images="train", file="train/_annotations.coco.json")
    values = document(categories=[{"id": 11, "name": "cow"}])
    write(tmp_path, values, images="valid", file="valid/_annotations.coco.json")
    data = opened(tmp_path, OPENING)
    assert data.class_names == ["cat", "dog", "cow"]
    assert data.val.target(0)["labels"].tolist() == [2]
    values["categories"][0]["name"] = "duck"
    write(tmp_path, values, images="valid", file="valid/_annotations.coco.json")
    with pytest.raises(UserError, match="has the category duck, which the images to learn from have not"):
        opened(tmp_path, OPENING)


def test_roboflows_name_of_the_whole_is_no_class(tmp_path):
    values = document()
    values["categories"] = [{"id": 0, "name": "animals", "supercategory": "none"},
                            {"id": 11, "name": "dog", "supercategory": "animals"}]  # fmt: skip
    assert opened(write(tmp_path, values)).class_names == ["dog"]
    values["annotations"][0]["category_id"] = 0
    assert opened(write(tmp_path, values)).class_names == ["animals", "dog"]


@pytest.mark.parametrize("seed", range(8))
def test_masks_are_those_of_pycocotools(seed):
    random = np.random.RandomState(seed)
    for _ in range(20):
        height, width = random.randint(5, 90, 2).tolist()
        polygons = [
            np.round(random.uniform(-9, width + 9, 2 * random.randint(3, 9)), random.randint(0, 4)).tolist()
            for _ in range(random.randint(1, 4))
        ]
        expected = reference.decode(reference.merge(reference.frPyObjects(polygons, height, width)))
        assert np.array_equal(drawn(kept(polygons, height, width), height, width), expected)
        mask = (random.rand(height, width) < random.rand()).astype(np.uint8)
        if random.randint(2):
            mask = np.kron(mask, np.ones((9, 30), np.uint8))  # runs of more than one letter
        runs = reference.encode(np.asfortranarray(mask))["counts"].decode()
        flat = mask.T.ravel()
        ends = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
        counts = np.diff(np.concatenate([[0], ends])).tolist()
        for form in (runs, counts):
            outline = kept({"size": [*mask.shape], "counts": form}, *mask.shape)
            assert np.array_equal(drawn(outline, *mask.shape), mask)
        assert packed(mask) == {"size": [*mask.shape], "counts": runs}


def test_crowds_of_run_lengths(tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[5:20, 30:50] = 1
    runs = packed(mask)
    values = with_annotations({"segmentation": runs, "iscrowd": 1, "bbox": [30, 5, 20, 15]})
    target = opened(write(tmp_path, values, count=40)).val.target(0)
    assert target["crowd"].tolist() == [False, True]
    assert np.array_equal(target["masks"][1].numpy(), mask)


@pytest.mark.parametrize("segmentation", [None, [], {}])
def test_boxes_alone(tmp_path, segmentation):
    values = document()
    for entry in values["annotations"]:
        entry["segmentation"] = segmentation
    data = opened(write(tmp_path, values))
    assert not data.has_masks
    assert set(data.val.target(0)) == {"boxes", "labels", "crowd", "area"}


def test_few_outlines_among_boxes(tmp_path):
    values = document(9)
    for entry in values["annotations"][2:]:
        del entry["segmentation"]
    data = opened(write(tmp_path, values, count=9))
    assert not data.has_masks
    assert "2 of 8 objects have an outline: no masks are learned" in data.notes[0]


def test_a_half_without_objects_takes_no_masks_from_the_other(tmp_path):
    write(tmp_path, images="train", file="train/_annotations.coco.json")
    write(tmp_path, document(annotations=[]), images="valid", file="valid/_annotations.coco.json")
    data = opened(tmp_path, OPENING)
    assert data.has_masks
    assert data.val.target(0)["masks"].shape == (0, HEIGHT, WIDTH)
    (tmp_path / "valid" / "_annotations.coco.json").replace(tmp_path / "train" / "_annotations.coco.json")
    with pytest.raises(UserError, match="has no objects to learn from"):
        opened(tmp_path / "train" / "_annotations.coco.json", OPENING)


def test_few_boxes_among_outlines(tmp_path):
    values = document(9)
    values["annotations"][0].update(segmentation=[], bbox=[10, 5, 3, 4])
    data = opened(write(tmp_path, values, count=9))
    assert "1 objects have no outline: their boxes are taken for it" in data.notes[0]
    mask = data.val.target(0)["masks"][0]
    assert mask.sum() == 12
    assert mask[5:9, 10:13].all()


def test_an_outline_of_less_than_a_pixel_is_no_object(tmp_path):
    values = with_annotations({"segmentation": [[10.1, 10.1, 10.2, 10.1, 10.2, 10.2]], "bbox": [10.1, 10.1, 0.1, 0.1]})
    assert len(opened(write(tmp_path, values, count=40)).val.target(0)["labels"]) == 1


def test_an_area_that_is_not_given_is_the_boxs(tmp_path):
    values = document()
    del values["annotations"][0]["area"]
    values["annotations"][1]["area"] = "large"
    data = opened(write(tmp_path, values))
    assert [data.val.target(i)["area"].tolist() for i in range(3)] == [[400], [400], [400.5]]


def test_boxes_are_cut_at_the_border(tmp_path):
    values = with_annotations({"bbox": [-5, 30, 20, 20]}, {"bbox": [50, -0.5, 10.5, 10]})
    data = opened(write(tmp_path, values, count=40))
    assert data.val.target(0)["boxes"].tolist()[1:] == [[0, 30, 15, 40], [50, 0, 60, 9.5]]
    assert data.notes == [f"{tmp_path}/all.json: 1 boxes reach out of their images and are cut at the border"]


NO_OUTLINES = [
    [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], [["a"] * 6], [[[1, 2], [3, 4], [5, 6]]], [[1, 2, 3, 4, 5, float("nan")]],
    [[1, 2, 3, 4, 5, 1e9]], [[0, 0, 10**400, 1, 1, 1]], "polygon", 5, [1, 2, 3, 4, 5, 6], [None], [{}],
    {"size": [HEIGHT, WIDTH]}, {"size": [HEIGHT, WIDTH], "counts": [1, 2]}, {"size": [WIDTH, HEIGHT], "counts": [2400]},
    {"size": [HEIGHT, WIDTH], "counts": [-100, 2500]}, {"size": [HEIGHT, WIDTH], "counts": [[2400]]},
    {"size": [HEIGHT, WIDTH], "counts": []}, {"size": [HEIGHT, WIDTH], "counts": [2**62, 2**62, 2**62, 2**62, 2400]},
    {"size": [10**6, 10**6], "counts": [10**12]}, {"size": [HEIGHT, WIDTH], "counts": "PPP"},
    {"size": [HEIGHT, WIDTH], "counts": "o" * 50}, {"size": [HEIGHT, WIDTH], "counts": "é"},
    {"size": [HEIGHT, WIDTH], "counts": ""}, {"size": [HEIGHT, WIDTH], "counts": "!!!"},
    {"size": [HEIGHT, WIDTH], "counts": "0" * 100000}, {"size": "large", "counts": [2400]},
]  # fmt: skip


@pytest.mark.parametrize("segmentation", NO_OUTLINES, ids=lambda value: str(value)[:40])
def test_broken_outlines_are_named_and_left_out(tmp_path, segmentation):
    data = opened(write(tmp_path, with_annotations({"segmentation": segmentation}), count=40))
    assert data.notes == [f"{tmp_path}/all.json: not read: broken outlines: 1 (1000)"]
    assert len(data.val.target(0)["labels"]) == 1


JUNK = [None, True, 0, -1, 1.5, float("nan"), 10**400, "", "x", "\0", [], [[[1]]], {}, {"a": [1]}, [1] * 7, "\ud800"]


def places(value, path=()):
    """Where something stands in a document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield (*path, key)
        yield from places(one, (*path, key))


@pytest.mark.parametrize("seed", range(4))
def test_files_with_anything_in_them_are_read_or_refused(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(coco_json, "UNUSABLE", 1.0)
    random = np.random.RandomState(seed)
    sound = document(5)
    sound["annotations"][1]["segmentation"] = packed(random.rand(HEIGHT, WIDTH) < 0.5)
    sound["annotations"][2]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [10, 20, HEIGHT * WIDTH - 30]}
    write(tmp_path, sound, count=5)
    every, read = [*places(sound)], 0
    for _ in range(60):
        values = copy.deepcopy(sound)
        *path, last = every[random.randint(len(every))]
        holder = values
        for key in path:
            holder = holder[key]
        holder[last] = copy.deepcopy(JUNK[random.randint(len(JUNK))])
        (tmp_path / "all.json").write_text(json.dumps(values))
        with contextlib.suppress(UserError):
            data = opened(tmp_path)
            for index in range(len(data.val)):
                target = data.val.target(index)
                assert len({len(part) for part in target.values()}) == 1
                assert (target["boxes"] >= 0).all()
            read += 1
    assert 20 < read < 60


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"image_id": 9999}, "annotations of images that are not listed: 1 (1000)"),
        ({"image_id": [7]}, "annotations of images that are not listed: 1 (1000)"),
        ({"image_id": None}, "annotations of images that are not listed: 1 (1000)"),
        ({"category_id": 5}, "annotations of categories that are not listed: 1 (1000)"),
        ({"category_id": {"id": 11}}, "annotations of categories that are not listed: 1 (1000)"),
        ({"id": 100}, "second annotations of a number: 1 (100)"),
        ({"bbox": [10, 5, 0, 20]}, "boxes without width or height: 1 (1000)"),
        ({"bbox": [10, 5, 20, -1]}, "boxes without width or height: 1 (1000)"),
        ({"bbox": [10, 5, float("nan"), 20]}, "boxes that are not four numbers: 1 (1000)"),
        ({"bbox": [10, 5, float("inf"), 20]}, "boxes that are not four numbers: 1 (1000)"),
        ({"bbox": [10, 5, 20]}, "boxes that are not four numbers: 1 (1000)"),
        ({"bbox": [10, 5, 20, "20"]}, "boxes that are not four numbers: 1 (1000)"),
        ({"bbox": [10, 5, 20, 10**400]}, "boxes that are not four numbers: 1 (1000)"),
        ({"bbox": None}, "boxes that are not four numbers: 1 (1000)"),
        ({"bbox": [60, 5, 20, 20]}, "boxes outside their images: 1 (1000)"),
        ({"bbox": [-30, 5, 20, 20]}, "boxes outside their images: 1 (1000)"),
        ({"bbox": [10, 1e300, 20, 20]}, "boxes outside their images: 1 (1000)"),
    ],
)
def test_annotations_that_say_nothing_are_named_and_left_out(tmp_path, entry, reason):
    data = opened(write(tmp_path, with_annotations(entry), count=40))
    assert len(data.notes) == 1
    assert data.notes[0].endswith(reason)
    assert sum(len(data.val.target(i)["labels"]) for i in range(40)) == 39


def test_what_is_no_annotation_is_left_out(tmp_path):
    values = document(60)
    values["annotations"] += [5, None, [[]], "x"]
    data = opened(write(tmp_path, values, count=60))
    assert "annotations of images that are not listed: 4 (5, None, [[]], 'x')" in data.notes[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"file_name": "none.png"}, "images that are not there: 1 (none.png)"),
        ({"file_name": "../0.png"}, "images without a number or a file of their own: 1 (../0.png)"),
        ({"file_name": "/etc/passwd"}, "images without a number or a file of their own: 1 (/etc/passwd)"),
        ({"file_name": "C:\\0.png"}, "images without a number or a file of their own: 1 (C:\\0.png)"),
        ({"file_name": 5}, "images without a number or a file of their own: 1"),
        ({"id": [1]}, "images without a number or a file of their own: 1"),
        ({"id": 7}, "second images of a number: 1 (5.png)"),
        ({"width": 0}, "images of no size, or over 268 million pixels: 1 (5.png)"),
        ({"width": "60"}, "images of no size, or over 268 million pixels: 1 (5.png)"),
        ({"width": 10**6, "height": 10**6}, "images of no size, or over 268 million pixels: 1 (5.png)"),
        ({"width": float("nan")}, "images of no size, or over 268 million pixels: 1 (5.png)"),
    ],
)
def test_images_that_cannot_be_used_are_named_and_left_out(tmp_path, change, reason):
    values = document(20)
    values["images"][5].update(change)
    (tmp_path / "0.png").write_bytes(b"")
    data = opened(write(tmp_path, values, count=20))
    assert len(data.val) == 19
    assert reason in data.notes[0]
    of_it = "id" in change  # whose annotations are of no image then
    assert sum(len(data.val.target(i)["labels"]) for i in range(19)) == 18
    assert len(data.notes) == 1 + of_it


def test_a_size_that_is_not_given_is_the_files(tmp_path):
    values = document(20)
    del values["images"][0]["height"]
    del values["images"][1]["width"]
    write(tmp_path, values, count=20)
    (tmp_path / "images" / "1.png").write_bytes(b"no picture")
    data = opened(tmp_path)
    assert data.val.target(0)["boxes"].canvas_size == (HEIGHT, WIDTH)
    assert "images that cannot be decoded: 1 (1.png)" in data.notes[0]


def test_an_image_of_another_size_than_its_annotations_is_left_out(tmp_path):
    data = opened(write(tmp_path))
    Image.new("RGB", (30, 20)).save(tmp_path / "images" / "2.png")
    with pytest.raises(DecodeError, match=r"2\.png: is 30 x 20 pixels when upright, and its annotations say 60 x 40"):
        data.val.image(2)


def test_names_with_folders_in_them(tmp_path):
    values = document()
    for entry, name in zip(
        values["images"], ["./images/0.png", "images\\1.png", "images/2.png", "images/3.png"], strict=True
    ):
        entry["file_name"] = name
    data = opened(write(tmp_path, values))
    assert sorted(map(os.path.basename, data.val.keys())) == ["0.png", "1.png", "2.png", "3.png"]
    data.val.image(1)


def test_a_tenth_that_cannot_be_used_stops(tmp_path):
    values = document(20)
    for entry in values["annotations"][:2]:
        entry["category_id"] = 5
    reason = "2 of the 19 annotations cannot be used: annotations of categories that are not listed: 2"
    with pytest.raises(UserError, match=reason):
        opened(write(tmp_path, values, count=20))
    values = document(20)
    for entry in values["images"][:3]:
        entry["file_name"] += "x"
    with pytest.raises(UserError, match="3 of the 20 images cannot be used: images that are not there: 3"):
        opened(write(tmp_path, values, count=20))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
        ("[" * 100000, "cannot be read as JSON"),
        ("1" * 5000, "cannot be read as JSON"),
        ("\udcff", "cannot be read as JSON"),
        ("[]", "is JSON of another kind than COCO's"),
        ('{"images": [], "annotations": {}, "categories": []}', "is JSON of another kind than COCO's"),
        ('{"images": [], "annotations": [], "categories": []}', "has no categories"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, text, reason):
    (tmp_path / "all.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=f"all.json: {reason}"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("categories", "reason"),
    [
        ([{"id": 1}], "has the category {'id': 1}; give each a number and a name"),
        ([{"name": "x"}], "give each a number and a name"),
        ([5], "has the category 5"),
        ([{"id": 1, "name": "a\x1b"}], "give each a number and a name"),
        ([{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "two categories of the number 1"),
        ([{"id": 1, "name": "a"}, {"id": 2, "name": "a"}], "two categories of the name a"),
    ],
)
def test_categories_that_make_no_sense_are_refused(tmp_path, categories, reason):
    with pytest.raises(UserError, match=reason):
        opened(write(tmp_path, document(categories=categories)))


def test_a_file_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(coco_json, "MAX_BYTES", 2**8)
    with pytest.raises(UserError, match="is larger than 0 MB; split it"):
        opened(write(tmp_path))


def test_masks_that_fill_no_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(coco, "MAX_MASKS", HEIGHT * WIDTH - 1)
    with pytest.raises(DecodeError, match="the masks of its 1 objects fill no memory"):
        opened(write(tmp_path)).val.target(0)


def test_folders_without_annotations_or_with_too_many(tmp_path):
    with pytest.raises(UserError, match="has no file of COCO's annotations, such as annotations/instances_train"):
        opened(tmp_path)
    with pytest.raises(UserError, match=r"none: is no folder and no JSON file"):
        opened(tmp_path / "none")
    write(tmp_path)
    write(tmp_path, file="more.json")
    with pytest.raises(UserError, match=r"has 2 files of annotations, all, more; name one of them, or call them"):
        opened(tmp_path)
    for name in ("train.json", "instances_train2017.json"):
        write(tmp_path, file=f"annotations/{name}")
    write(tmp_path, file="train.json")
    (tmp_path / "annotations" / "train.json").unlink()
    with pytest.raises(UserError, match=r"train2017.json and .*train.json may both be meant"):
        opened(tmp_path)


def test_images_that_are_nowhere(tmp_path):
    write(tmp_path, images="photos")
    with pytest.raises(UserError, match=r"none of the images that it lists \(0.png ...\) is in"):
        opened(tmp_path)


def test_no_image_is_no_data(tmp_path):
    with pytest.raises(UserError, match=r"none of the images that it lists \(none ...\)"):
        opened(write(tmp_path, document(images=[], annotations=[])))


def test_copies_across_the_halves_are_told(tmp_path):
    write(tmp_path, images="train", file="train/_annotations.coco.json")
    write(tmp_path, document(2), images="valid", file="valid/_annotations.coco.json", count=2)
    os.remove(tmp_path / "valid/0.png")
    os.link(tmp_path / "train/3.png", tmp_path / "valid/0.png")  # which has another annotation there
    assert "1 of the 2 held-out images are copies" in opened(tmp_path, OPENING).notes[-1]


def test_without_faster_coco_eval_masks_cannot_be_drawn(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "faster_coco_eval" else find(name))
    values = document()
    with pytest.raises(UserError, match=r"masks of objects: need faster-coco-eval; run pip install 'vimamba\[dense\]'"):
        opened(write(tmp_path, values))
    for entry in values["annotations"]:
        del entry["segmentation"]
    assert len(opened(write(tmp_path, values)).val) == 4


@pytest.mark.parametrize("masks", [True, False])
def test_pycocotools_reads_what_is_written(tmp_path, masks):
    random = np.random.RandomState(0)
    drawn_masks = random.rand(3, HEIGHT, WIDTH) < 0.3
    found = [
        dict(boxes=torch.tensor([[1.0, 2, 11.256, 22], [0, 0, 60, 40]]), labels=torch.tensor([2, 0]),
             scores=torch.tensor([0.9, 0.25]), masks=torch.from_numpy(drawn_masks[:2])),
        dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), scores=torch.zeros(0),
             masks=torch.zeros(0, HEIGHT, WIDTH)),
        dict(boxes=np.array([[5, 5, 6, 7]]), labels=np.array([1]), scores=np.array([0.5]), masks=drawn_masks[2:]),
    ]  # fmt: skip
    if not masks:
        found = [{name: values for name, values in one.items() if name != "masks"} for one in found]
    images = [(f"{i}.png", (HEIGHT, WIDTH)) for i in range(3)]
    path = tmp_path / "found.json"
    write_coco(path, images, found, ["cat", "dog", "cow"])
    assert [*tmp_path.iterdir()] == [path]
    read = COCO(str(path))
    assert [read.cats[i]["name"] for i in (1, 2, 3)] == ["cat", "dog", "cow"]
    assert [read.anns[i]["category_id"] for i in (1, 2, 3)] == [3, 1, 2]
    assert [read.anns[i]["image_id"] for i in (1, 2, 3)] == [1, 1, 3]
    assert read.anns[1]["bbox"] == [1, 2, 10.26, 20]
    assert read.anns[1]["area"] == (drawn_masks[0].sum() if masks else 205.12)
    results = read.loadRes(copy.deepcopy(read.dataset["annotations"]))
    assert [results.anns[i]["score"] for i in (1, 2, 3)] == [0.9, 0.25, 0.5]
    if masks:
        for number, mask in enumerate(drawn_masks, start=1):
            assert np.array_equal(read.annToMask(read.anns[number]), mask)


def test_what_is_written_is_read_again(tmp_path):
    data = opened(write(tmp_path))
    targets = [data.val.target(i) for i in range(4)]
    write_coco(tmp_path / "all.json", [(f"{i}.png", (HEIGHT, WIDTH)) for i in range(4)], targets, data.class_names)
    again = opened(tmp_path)
    assert again.class_names == data.class_names
    for index, target in enumerate(targets):
        for name, values in again.val.target(index).items():
            assert name == "area" or values.equal(target[name]), name
