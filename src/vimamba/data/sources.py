"""`data`: the built-in sample, a folder, a hub data set (hfds/...) or shards (wds/...)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from vimamba.data import mnist, scenes
from vimamba.data.copies import copies_across
from vimamba.data.folder import Classes, Reading, read_folder
from vimamba.data.image_data import ImageData, Opening, Source
from vimamba.data.samples import FileSamples, HubSamples
from vimamba.data.shards import open_shards
from vimamba.data.split import Draw, HeldOut, changes, hold_out, hold_out_as_0_1
from vimamba.errors import UserError, escaped, nearest, one_line, require
from vimamba.hub import from_cache_if_out_of_reach

BUILT_IN = {"mnist": "5000 handwritten digits, 28 x 28, carried in the package", **scenes.BUILT_IN}
HUB_PREFIXES = ("hfds/", "hfids/", "wds/")


def open_data(
    name: str,
    val_fraction: float = 0.2,
    seed: int = 0,
    class_names: str | None = None,
    strict: bool = True,
    draw: Draw = hold_out,
    kept: HeldOut | None = None,
    source: Source | None = None,
    ignore_index: int | None = None,
) -> ImageData:
    """Find the images that `data` names.

    strict asks for what training needs: two classes or more, each of them in both halves. Without it only the
    held-out half matters: data without one are held out whole if val_fraction is 1. Where there is no half to hold
    out, `draw` takes it, unless a run `kept` what it held out: `how_drawn` tells them. `source` opens data of other
    kinds than a class an image.
    """
    require(
        0.0 < val_fraction <= 1.0,
        f"`val_fraction` is {val_fraction}; give a share between 0 and 1, such as 0.2",
    )
    opening = Opening(val_fraction, seed, strict, draw, kept, class_names, ignore_index)
    data = (source or open_classes)(name, opening)
    if kept is not None:
        data.notes += [f"{escaped(name)}: {line}" for line in changes(kept, data.train, data.val)]
    elif data.drawn and draw is hold_out_as_0_1:
        data.notes.append(
            f"{escaped(name)}: the run is of version 0.1, which kept no list of its held-out images; they are drawn as "
            "it did, and are the same only if no image was added or removed since"
        )
    return data


def open_classes(name: str, opening: Opening) -> ImageData:
    """Images with a class each."""
    named = f"`class_names` {opening.class_names}: is for hub data and shards; the classes of {name} have names"
    require(opening.class_names is None or name.startswith(HUB_PREFIXES), named)
    if name == "mnist":
        return _built_in(name)
    require(name not in BUILT_IN, f"`data` {name}: is not for classification; give `task` segment or detect")
    if name.startswith(HUB_PREFIXES):
        data = _hub(name, opening.class_names, opening)
    elif os.path.isdir(name):
        data = _folder(Path(name), opening)
    else:
        raise UserError(unknown(name, "give the folder that holds one sub-folder of images for each class"))
    if opening.strict:
        count = len(data.class_names)
        require(
            count > 1,
            f"`data` {name}: found one class only ('{data.class_names[0]}'); training needs two or more",
        )
    return data


def unknown(name: str, instead: str) -> str:
    """Why there are no such data, and what to give `instead` of a file."""
    path = Path(name)
    if path.is_file():
        return f"`data` {name}: is a file; {instead}"
    beside = [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    hint = nearest(name, [*BUILT_IN, *beside])
    kinds = f"; give {', '.join(BUILT_IN)} (built in), a folder, hfds/NAME or wds/FOLDER"
    return f"`data` {name}: there is no such folder or built-in sample{hint or kinds}"


def _built_in(name: str) -> ImageData:
    train, val = mnist.load_mnist()
    digits = [str(digit) for digit in range(10)]
    return ImageData(
        name, digits, train, val, BUILT_IN[name], (28, 28), 1, mnist.MNIST_MEAN, mnist.MNIST_STD,
        small=True, built_in=True,
    )  # fmt: skip


def _folder(root: Path, opening: Opening) -> ImageData:
    reading, kept = read_folder(root), opening.kept
    names = list(reading.train or reading.val or {})

    def samples(classes: Classes) -> FileSamples:
        index = {name: position for position, name in enumerate(names)}
        paths = [path for paths in classes.values() for path in paths]
        return FileSamples(paths, [index[name] for name in classes for _ in classes[name]], str(root))

    train = samples(reading.train)
    drawn = reading.val is None or (kept is not None and kept.drawn)
    if drawn:
        one = next(((name, *paths) for name, paths in reading.train.items() if len(paths) == 1), None)
        require(
            one is None or kept is not None or opening.val_fraction == 1.0,
            f"`data` {root}: class '{one and one[0]}' has a single image, {one and escaped(one[1])}; a split needs two "
            "of each class",
        )
        train, val = opening.halve(str(root), train, names)
    else:
        _check_halves(root, reading, opening.strict)
        val = samples(reading.val or {})
    copies = copies_across(train, val) if opening.strict else []
    notes = [*reading.notes, *(f"{root}: {line}" for line in copies)]
    return ImageData(str(root), names, train, val, str(root), drawn=drawn, notes=notes)


def _check_halves(root: Path, reading: Reading, strict: bool) -> None:
    train, val = reading.train, reading.val or {}
    train_dir, val_dir = (root / name for name in reading.halves or ("", ""))
    require(bool(train) or not strict, f"`data` {root}: has {val_dir.name}/ but no train/ with one sub-folder a class")
    unknown = [name for name in val if name not in train] if train else []
    first, hint = (unknown[0], nearest(unknown[0], train)) if unknown else ("", "")
    require(not unknown, f"{val_dir}: class '{first}' is not in {train_dir}{hint}")
    missing = [name for name in train if name not in val]
    require(
        not (strict and missing),
        f"{val_dir}: no images of class {', '.join(map(repr, missing[:5]))}, which {train_dir} has; "
        "hold some of them out, or give one folder of classes to be split by `val_fraction`",
    )


def _hub(name: str, class_names: str | None, opening: Opening) -> ImageData:
    prefix, rest = name.split("/", 1)
    require(bool(rest), f"`data` {name}: name what comes after {prefix}/, such as hfds/cifar10 or wds/FOLDER")
    names = _read_names(class_names) if class_names else None
    if prefix == "wds":
        names, parts, notes = open_shards(name, Path(rest), names)
    else:
        if importlib.util.find_spec("datasets") is None:
            raise UserError(f"`data` {name}: needs the package datasets; run pip install 'vimamba[hub]'")
        with from_cache_if_out_of_reach():
            names, parts, notes = _hub_table(name, rest, names)
    train, val, drawn = parts["train"], parts.get("val"), False
    if val is None:
        drawn = True
        train, val = opening.halve(name, train, names)
        notes.append(f"{name}: it has no split to hold out: {len(val)} images of its train split are held out")
    return ImageData(name, names, train, val, name, drawn=drawn, notes=notes)


def _hub_table(name: str, rest: str, names: list[str] | None) -> tuple[list[str], dict[str, Any], list[str]]:
    from timm.data import create_dataset

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    parts: dict[str, Any] = {}
    for kind, splits in {"train": ("train", "training"), "val": ("validation", "val", "valid", "test")}.items():
        problem: Exception = ValueError()
        for split in splits:
            try:
                parts[kind] = HubSamples(
                    create_dataset(f"hfds/{rest}", root=None, split=split).reader, f"{name}:{split}"
                )
                break
            except Exception as error:  # the hub's many: no such data set, no such split, no network
                problem = error
        absent = kind == "val" and isinstance(problem, ValueError)  # datasets' kind of error for an unknown split
        require(
            kind in parts or absent,
            f"`data` {name}: cannot open a split {' or '.join(splits)} ({one_line(problem)})",
        )
    by_index = {index: label for label, index in (parts["train"].reader.class_to_idx or {}).items()}
    names = names or [by_index[i] for i in sorted(by_index)]
    require(
        bool(names),
        f"`data` {name}: its labels carry no names; list them, one a line, in a file: `class_names`",
    )
    for part in parts.values():
        try:
            beyond = sorted({*part.targets.tolist()} - {*range(len(names))})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{part.prefix}: its labels are no class numbers ({one_line(error)})") from error
        require(
            not beyond,
            f"{part.prefix}: has the label {beyond[:1]}, and the {len(names)} classes count from 0 to {len(names) - 1} "
            "(-1 stands for none); if there are more, list them, one a line, in a file: `class_names`",
        )
    return names, parts, []


def _read_names(path: str) -> list[str]:
    require(Path(path).is_file(), f"`class_names` {path}: is no file")  # a pipe would be waited for
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`class_names` {path}: cannot be read ({error})") from error
    return [name for name in names if name]
