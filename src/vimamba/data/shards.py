"""WebDataset shards: uncompressed tar files of `NAME.jpg` and `NAME.cls` pairs, listed in `_info.json`.

Where each image lies is read from the tar files' headers when they are opened, so that images are drawn, held out,
resumed from and reported like files of a folder.
"""

from __future__ import annotations

import functools
import io
import json
import os
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vimamba.data.decode import DecodeError, decode_image, extensions
from vimamba.data.folder import TEST, TRAIN, VAL
from vimamba.errors import UserError, escaped, require, shown

MAX_LABEL = 64  # bytes of a .cls file: a number


class Entry(NamedTuple):
    """A sample of a shard: where its image lies in the file, and its class, or what is wrong with it."""

    key: str
    offset: int
    size: int
    target: int
    problem: str


class ShardSamples:
    """The samples of some shards."""

    def __init__(self, root: Path, shards: list[str], entries: list[tuple[int, Entry]]):
        self.root, self.shards = root, shards
        self.shard = np.array([shard for shard, _ in entries], dtype=np.int32)
        self.places = np.array([entry[1:3] for _, entry in entries], dtype=np.int64).reshape(-1, 2)
        self.targets = np.array([entry.target for _, entry in entries], dtype=np.int64)
        self.names = np.array([entry.key for _, entry in entries], dtype=np.str_)
        self.problems = {row: entry.problem for row, (_, entry) in enumerate(entries) if entry.problem}

    def __len__(self) -> int:
        return len(self.targets)

    def image(self, index: int) -> Image.Image:
        if index in self.problems:
            raise DecodeError(self.name(index), self.problems[index])
        offset, size = map(int, self.places[index])
        path = self.root / self.shards[self.shard[index]]
        try:
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise DecodeError(self.name(index), f"cannot be read ({error.strerror or error})") from error
        return decode_image(io.BytesIO(data), self.name(index))

    def target(self, index: int) -> int:
        return int(self.targets[index])

    def name(self, index: int) -> str:
        return f"{self.root}{os.sep}{self.key(index)}"

    def key(self, index: int) -> str:
        return f"{self.shards[self.shard[index]]}:{self.names[index]}"

    def keys(self) -> list[str]:
        return [self.key(index) for index in range(len(self))]

    def marks(self) -> list[int]:
        return self.places[:, 1].tolist()

    def select(self, rows: list[int]) -> ShardSamples:
        some = ShardSamples(self.root, self.shards, [])
        some.shard, some.places, some.targets = self.shard[rows], self.places[rows], self.targets[rows]
        some.names = self.names[rows]
        some.problems = {new: self.problems[old] for new, old in enumerate(rows) if old in self.problems}
        return some


def read_shard(path: Path, classes: int) -> Iterator[Entry]:
    """The samples of a tar file: members one after the other whose names agree up to the first dot.

    Raises:
        UserError: it is no uncompressed tar file, or ends or breaks in the middle.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            files = (member for member in tar if member.isfile() and "." in os.path.basename(member.name))
            for key, members in groupby(files, key=lambda member: _split_name(member.name)[0]):
                yield _entry(tar, key, {_split_name(member.name)[1].lower(): member for member in members}, classes)
            with path.open("rb") as file:  # tarfile takes garbage between members for the end
                file.seek(tar.offset)
                require(not file.read(tarfile.BLOCKSIZE).strip(b"\0"), "it is damaged in the middle")
    except (tarfile.TarError, OSError, EOFError, UserError) as error:
        reason = "it is empty" if path.stat().st_size == 0 else " ".join(str(error).split())
        raise UserError(
            f"the shard {path} cannot be read as an uncompressed tar file ({reason}); restore it"
        ) from error


def _split_name(name: str) -> tuple[str, str]:
    folder, base = os.path.split(name)
    stem, _, ending = base.partition(".")
    return os.path.join(folder, stem), ending


def _entry(tar: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo], classes: int) -> Entry:
    image = next((member for ending, member in members.items() if f".{ending}" in _endings()), None)
    label, target, problem = members.get("cls"), -1, ""
    if image is None:
        problem = "has no image"
    elif label is None:
        problem = "has no label (.cls)"
    else:
        file = tar.extractfile(label)
        text = file.read(MAX_LABEL).decode("utf-8", "replace").strip() if file else ""
        if text.isascii() and text.isdigit() and int(text) < classes:
            target = int(text)
        else:
            problem = f"its label is {shown(text)}; the classes count from 0 to {classes - 1}"
    name = image.name if image else key
    return Entry(name, image.offset_data if image else 0, image.size if image else 0, target, problem)


@functools.cache
def _endings() -> frozenset[str]:
    return frozenset(extensions())


def open_shards(
    name: str, root: Path, class_names: list[str] | None
) -> tuple[list[str], dict[str, ShardSamples], list[str]]:
    """The class names, samples of "train" and perhaps "val", and what to say, of a folder with shards and `_info.json`.

    Raises:
        UserError: the index or a shard cannot be used.
    """
    info_path = next((root / n for n in ("_info.json", "info.json") if (root / n).is_file()), None)
    if info_path is None:
        raise UserError(f"`data` {name}: {root}/_info.json is missing; it lists the splits, shards and their lengths")
    try:
        info = json.loads(info_path.read_text(encoding="utf-8"))
        counts = {split: int(entry["num_samples"]) for split, entry in info["splits"].items()}
        shards = {split: [str(shard) for shard in entry["filenames"]] for split, entry in info["splits"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"`data` {name}: {info_path} is not a shard index with splits.*.num_samples and filenames ({error})"
        ) from error
    for shard in sorted({shard for listed in shards.values() for shard in listed}):  # it may be a stranger's
        inside = Path(shard).name == shard and (root / shard).is_file()
        require(inside, f"`data` {name}: {info_path} lists {shown(shard)}, which is no file in that folder")
    train = next((split for split in counts if TRAIN.fullmatch(split)), None)
    val = next((split for kind in (VAL, TEST) for split in counts if kind.fullmatch(split)), None)
    if train is None:
        raise UserError(f"`data` {name}: {info_path} lists no train split, only {', '.join(counts)}")
    names: Any = class_names or info.get("class_names")
    require(bool(names), f"`data` {name}: list the class names, one a line, in a file: `class_names` FILE")
    require(isinstance(names, list), f"`data` {name}: {info_path} has class_names that are no list")
    parts, notes = {}, []
    for part, split in (("train", train), ("val", val)):
        if split is None:
            continue
        listed = shards[split]
        try:
            found = [(i, entry) for i, shard in enumerate(listed) for entry in read_shard(root / shard, len(names))]
        except UserError as error:
            raise UserError(f"`data` {name}: {error}, or take it out of {info_path}") from error
        require(bool(found), f"`data` {name}: the shards of its split {split} hold no samples")
        parts[part] = ShardSamples(root, listed, found)
        if len(found) != counts[split]:
            said = f"{info_path} says that {split} has {counts[split]} samples"
            notes.append(f"{escaped(name)}: {said}, and its shards hold {len(found)}")
    return list(names), parts, notes
