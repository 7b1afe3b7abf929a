"""`--data`: the built-in sample, a folder, a hub data set (hfds/...) or shards (wds/...)."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

from vimamba.data import folder as folders
from vimamba.data import sample
from vimamba.data.samples import HubSamples, Samples
from vimamba.errors import UserError, nearest, require

BUILT_IN = {"mnist": "5000 handwritten digits, 28 x 28, carried in the package"}
HUB_PREFIXES = ("hfds/", "hfids/", "wds/")


@dataclasses.dataclass
class ImageData:
    """Training and held-out images with the names of their classes."""

    name: str
    class_names: list[str]
    train: Samples | Any  # Any: timm's iterable data sets (shards), built anew for each loader by `stream`
    val: Samples | Any
    description: str = ""
    img_size: tuple[int, int] | None = None  # native size, where all images share a small one
    in_chans: int = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    small: bool = False  # in memory and cheap to decode: no worker processes needed

    @property
    def photographs(self) -> bool:
        """Whether flips and colour changes keep the meaning, as far as one can tell."""
        return self.name not in BUILT_IN


def open_data(
    name: str, val_fraction: float = 0.2, seed: int = 0, class_names: str | None = None, strict: bool = True
) -> ImageData:
    """Find the images that `--data` names.

    strict asks for what training needs: two classes or more, each of them in both halves. Without it only the
    held-out half matters: a folder without `val/` and `train/` is held out whole (val_fraction 1).
    """
    require(
        0.0 < val_fraction <= 1.0,
        f"--val_fraction is {val_fraction}; give a share between 0 and 1, such as 0.2",
    )
    if name in BUILT_IN:
        data = _built_in(name)
    elif name.startswith(HUB_PREFIXES):
        data = _hub(name, class_names)
    elif Path(name).is_dir():
        data = _folder(Path(name), val_fraction, seed, strict)
    else:
        raise UserError(_unknown(name))
    if strict:
        count = len(data.class_names)
        require(
            count > 1,
            f"--data {name}: found one class only ('{data.class_names[0]}'); training needs two or more",
        )
    return data


def _unknown(name: str) -> str:
    path = Path(name)
    if path.is_file():
        return f"--data {name}: is a file; give the folder that holds one sub-folder of images for each class"
    beside = [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    hint = nearest(name, [*BUILT_IN, *beside])
    kinds = f"; give {', '.join(BUILT_IN)} (built in), a folder, hfds/NAME or wds/FOLDER"
    return f"--data {name}: there is no such folder or built-in sample{hint or kinds}"


def _built_in(name: str) -> ImageData:
    train, val = sample.load_mnist()
    digits = [str(digit) for digit in range(10)]
    return ImageData(
        name, digits, train, val, BUILT_IN[name], (28, 28), 1, sample.MNIST_MEAN, sample.MNIST_STD, small=True
    )


def _folder(root: Path, val_fraction: float, seed: int, strict: bool) -> ImageData:
    train_dir, val_dir = folders.half(root, folders.TRAIN_NAMES), folders.half(root, folders.VAL_NAMES)
    if train_dir is None and val_dir is not None:
        require(not strict, f"--data {root}: has {val_dir.name}/ but no train/")
        images = folders.read_classes(val_dir)
        names, train, val = list(images), {}, images
    elif train_dir is not None and val_dir is not None:
        train, val = folders.read_classes(train_dir), folders.read_classes(val_dir)
        names = list(train)
        unknown = [c for c in val if c not in train]
        first, hint = (unknown[0], nearest(unknown[0], names)) if unknown else ("", "")
        require(not unknown, f"{val_dir}: class '{first}' is not in {train_dir}{hint}")
        missing = [c for c in names if c not in val]
        require(
            not (strict and missing),
            f"{val_dir}: no images of class {', '.join(map(repr, missing[:5]))}, which {train_dir} has; "
            "hold some of them out, or give one folder of classes to be split by --val_fraction",
        )
    else:
        images = folders.read_classes(train_dir or root)
        names = list(images)
        if val_fraction == 1.0:
            require(not strict, "--val_fraction 1 leaves nothing to train on")
            train, val = {}, images
        elif len(images) == 1 and strict:
            train, val = images, images  # refused by the caller, with the better reason
        else:
            train, val = folders.split_by_seed(images, val_fraction, seed)
    return ImageData(str(root), names, folders.to_samples(train, names), folders.to_samples(val, names), str(root))


def _hub(name: str, class_names: str | None) -> ImageData:
    prefix, rest = name.split("/", 1)
    package = "webdataset" if prefix == "wds" else "datasets"
    require(bool(rest), f"--data {name}: name what comes after {prefix}/, such as hfds/cifar10 or wds/FOLDER")
    if importlib.util.find_spec(package) is None:
        raise UserError(f"--data {name}: needs the package {package}; run pip install 'vimamba[hub]'")
    names = _read_names(class_names) if class_names else None
    if prefix == "wds":
        from vimamba.data.shards import open_shards

        return open_shards(name, Path(rest), names)
    return _hub_table(name, rest, names)


def _hub_table(name: str, rest: str, names: list[str] | None) -> ImageData:
    from timm.data import create_dataset

    def open_split(split: str) -> Any:
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        return create_dataset(f"hfds/{rest}", root=None, split=split).reader

    readers: dict[str, Any] = {}
    problems: list[str] = []
    for kind, splits in {"train": folders.TRAIN_NAMES, "val": ("validation", "val", "valid", "test")}.items():
        for split in splits:
            try:
                readers[kind] = open_split(split)
                break
            except Exception as error:  # the hub's many: no such data set, no such split, no network
                problems.append(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        require(kind in readers, f"--data {name}: cannot open a split {' or '.join(splits)} ({problems[-1:]})")
    by_index = {index: label for label, index in (readers["train"].class_to_idx or {}).items()}
    names = names or [by_index[i] for i in sorted(by_index)]
    require(
        bool(names),
        f"--data {name}: its labels carry no names; list them, one a line, in a file: --class_names",
    )
    train, val = HubSamples(readers["train"], f"{name}:train"), HubSamples(readers["val"], f"{name}:val")
    return ImageData(name, names, train, val, name)


def _read_names(path: str) -> list[str]:
    require(Path(path).is_file(), f"--class_names {path}: is no file")  # a pipe would be waited for
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class_names {path}: cannot be read ({error})") from error
    return [name for name in names if name]
