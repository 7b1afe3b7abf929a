"""A folder of images: classes are its sub-folders, halves are `train/` and `val/` or drawn by a seed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from timm.data.readers import get_img_extensions
from timm.utils.misc import natural_key

from vimamba.data.samples import FileSamples
from vimamba.errors import require

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "test")


def extensions() -> tuple[str, ...]:
    """The endings of file names that are taken for images."""
    return (*get_img_extensions(), ".webp", ".tif", ".tiff", ".bmp", ".gif")


def find_images(folder: Path) -> list[Path]:
    """Every image below a folder, in natural order; hidden files are left out."""
    endings, found = extensions(), []
    for root, _, files in os.walk(folder, followlinks=True):
        found += [Path(root, name) for name in files if name.lower().endswith(endings) and name[0] != "."]
    return sorted(found, key=lambda path: natural_key(str(path)))


def half(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The sub-folder that goes by one of these names."""
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def read_classes(folder: Path) -> dict[str, list[Path]]:
    """Class name to images; a class is a sub-folder, with everything below it."""
    classes = sorted(
        (p for p in folder.iterdir() if p.is_dir() and p.name[0] != "."), key=lambda p: natural_key(p.name)
    )
    images = {path.name: find_images(path) for path in classes}
    images = {name: paths for name, paths in images.items() if paths}
    looked = " ".join(sorted(set(extensions())))
    loose = f" ({len(find_images(folder))} images lie loose in it)" if find_images(folder) else ""
    require(
        bool(images),
        f"--data {folder}: no images found in sub-folders, one a class{loose}; looked for {looked}",
    )
    return images


def to_samples(images: dict[str, list[Path]], class_names: list[str]) -> FileSamples:
    """The classes' images as one list, targets counted in the order of class_names."""
    index = {name: i for i, name in enumerate(class_names)}
    pairs = [(path, index[name]) for name, paths in images.items() for path in paths]
    return FileSamples([path for path, _ in pairs], [target for _, target in pairs])


def split_by_seed(
    images: dict[str, list[Path]], val_fraction: float, seed: int
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Training and held-out images, the same share of each class held out, and at least one."""
    train, val = {}, {}
    for position, (name, paths) in enumerate(images.items()):
        require(len(paths) > 1, f"class '{name}' has a single image, {paths[0]}; a split needs two of each class")
        order = np.random.RandomState((seed + position) % 2**32).permutation(len(paths))
        held_out = min(max(1, round(val_fraction * len(paths))), len(paths) - 1)
        val[name] = [paths[i] for i in sorted(order[:held_out])]
        train[name] = [paths[i] for i in sorted(order[held_out:])]
    return train, val
