"""Small data for tests of dense tasks: bright squares and discs on noise, with masks and as COCO's JSON."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from vimamba.data.outlines import packed

CLASSES = ("square", "disc")
SIDE = 32

# A run of a second, for either task.
TINY = {
    "model": "vim_nano", "model_args": {"depth": 1, "embed_dim": 16, "d_state": 4}, "img_size": 32, "num_workers": 0,
    "batch_size": 4, "epochs": 2, "accelerator": "cpu", "progress": False,
}  # fmt: skip
SEGMENT = {**TINY, "task": "segment", "head": "linear"}
DETECT = {
    **TINY, "task": "detect",
    "head_args": {
        "width": 8, "box_width": 16, "proposals": 16, "rois_per_image": 8, "anchor_sizes": [4, 8, 16, 24, 32],
    },
}  # fmt: skip
# One of four seconds that finds them, on 24 images.
LEARN = {
    **DETECT, "epochs": 5, "batch_size": 2, "lr": 1e-2, "augment": "none", "warmup_epochs": 0,
    "head_args": {
        "width": 16, "box_width": 32, "proposals": 32, "rois_per_image": 16, "anchor_sizes": [6, 11, 16, 24, 32],
    },
}  # fmt: skip


def scene(number):
    """An image (side, side, 3), and a mask (side, side) and a class of each of its objects; every fourth has none."""
    random = np.random.RandomState(number)
    image = random.randint(0, 60, (SIDE, SIDE, 3)).astype(np.uint8)
    y, x = np.mgrid[:SIDE, :SIDE]
    masks, labels = [], []
    for label in range(0 if number % 4 == 3 else 2):
        size, left, top = 5, 6 + 16 * label + random.randint(4), 8 + random.randint(12)
        away = np.maximum(abs(x - left), abs(y - top)) if label == 0 else np.hypot(x - left, y - top)
        inside = away <= size
        image[inside] = (200, 60, 60) if label == 0 else (60, 60, 220)
        masks.append(inside)
        labels.append(label)
    return image, masks, labels


def write_masks(root, train=8, val=4):
    """Images and masks of 0 (background), 1 (square) and 2 (disc), with a list of the classes."""
    for half, numbers in (("train", range(train)), ("val", range(train, train + val))):
        for number in numbers:
            image, masks, labels = scene(number)
            classes = np.zeros((SIDE, SIDE), np.uint8)
            for mask, label in zip(masks, labels, strict=True):
                classes[mask] = label + 1
            classes[0] = 255
            for folder, pixels in (("images", image), ("masks", classes)):
                (root / half / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / half / folder / f"{number}.png")
    (root / "classes.txt").write_text("\n".join(("background", *CLASSES)) + "\n")
    return root


def write_objects(root, train=8, val=4, masks=True):
    """The same scenes as COCO has them."""
    for half, numbers in (("train", range(train)), ("val", range(train, train + val))):
        images, annotations = [], []
        for number in numbers:
            image, shapes, labels = scene(number)
            images.append({"id": number, "file_name": f"{number}.png", "height": SIDE, "width": SIDE})
            for shape, label in zip(shapes, labels, strict=True):
                rows, columns = np.flatnonzero(shape.any(1)), np.flatnonzero(shape.any(0))
                left, top = int(columns[0]), int(rows[0])
                box = [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
                entry = {"id": len(annotations) + 1, "image_id": number, "category_id": label + 1, "bbox": box}
                entry |= {"area": int(shape.sum()), "iscrowd": 0, **({"segmentation": packed(shape)} if masks else {})}
                annotations.append(entry)
            (root / f"{half}2017").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / f"{half}2017" / f"{number}.png")
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
        (root / "annotations").mkdir(exist_ok=True)
        written = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{half}2017.json").write_text(json.dumps(written))
    return root
