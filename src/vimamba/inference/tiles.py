"""Images of any size, tile by tile: logits blended where tiles overlap, objects joined across their seams.

What has been done is kept beside the output, so that a call that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from vimamba.errors import UserError, escaped, require
from vimamba.files import whole, write_text
from vimamba.inference.joining import Frame, joined
from vimamba.inference.predictor import Predictor
from vimamba.inference.windows import Windows, open_windows, stamp
from vimamba.tasks.results import Crop, Detections, Segmentation

LEAST = 32  # pixels of a tile
PREVIEW = 2048  # most pixels of the side of the picture of a large image
STORED = 512  # pixels of the tiles of the TIFF file that is written


@dataclasses.dataclass
class TileOptions:
    """How large images are taken apart.

    Args:
        tile: side of the tiles in which images are read and looked at, pixels, for those that do not fit into the
            memory; the masks are then TIFF files. Whole images if not given
        overlap: pixels by which neighbouring tiles overlap, where masks are blended and objects that a seam cuts are
            joined; an eighth of the tile if not given
    """

    tile: int | None = None
    overlap: int | None = None

    def __post_init__(self) -> None:
        if self.tile is None:
            require(self.overlap is None, f"`overlap` {self.overlap}: goes with `tile`")
            return
        require(self.tile >= LEAST, f"`tile` is {self.tile}; it must be at least {LEAST} pixels")
        if self.overlap is None:
            self.overlap = self.tile // 8
        require(
            0 <= self.overlap <= self.tile // 2,
            f"`overlap` is {self.overlap}; give 0 to half of `tile`, {self.tile // 2}",
        )


class Span(NamedTuple):
    """Where a tile lies along an axis: from start to stop; `seen`, where it is looked at from, lies before the start
    of a last tile that would be shorter than the others."""

    start: int
    stop: int
    seen: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def spans(length: int, tile: int, overlap: int) -> list[Span]:
    """Tiles along an axis, each `overlap` into the next; the last may be shorter."""
    step = tile - overlap
    count = max(1, math.ceil((length - overlap) / step))
    starts = range(0, count * step, step)
    return [Span(start, min(start + tile, length), max(0, min(start, length - tile))) for start in starts]


def weights(span: Span, length: int, overlap: int) -> np.ndarray:
    """What the places of a tile count, float32: 1, and along an overlap rising or falling so that the sum is 1."""
    found = np.ones(span.length, dtype=np.float32)
    ramp = (np.arange(overlap, dtype=np.float32) + 1) / (overlap + 1)
    if overlap and span.start > 0:
        found[:overlap] = ramp
    if overlap and span.stop < length:
        found[-overlap:] = 1 - ramp
    return found


class Tiling:
    """The tiles of an image, row by row, and in a folder beside the output what has been done of them.

    Args:
        predictor: the model.
        path: the image's file.
        options: with a tile.
        folder: where the output goes.
        name: of the output, without its ending.

    Raises:
        DecodeError: the image cannot be read.
    """

    def __init__(self, predictor: Predictor, path: str, options: TileOptions, folder: Path, name: str):
        assert options.tile is not None and options.overlap is not None  # noqa: PT018
        self.predictor, self.path, self.folder, self.name = predictor, path, folder, name
        self.tile, self.overlap = options.tile, options.overlap
        self.image: Windows = open_windows(path)
        self.rows, self.columns = (spans(side, self.tile, self.overlap) for side in self.image.size)
        self.state = folder / f".{name}.tiles"
        self.done = 0
        self.transform = predictor.transform

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def place(self, number: int) -> tuple[Span, Span]:
        """Where a tile lies, down and across."""
        row, column = divmod(number, len(self.columns))
        return self.rows[row], self.columns[column]

    def outputs(self, number: int) -> Any:
        """What the model gives for what is looked at of a tile."""
        down, across = self.place(number)
        picture = self.image.read(down.seen, across.seen, down.stop - down.seen, across.stop - across.seen)
        image, _ = self.transform(picture, 0)
        ((found, _),) = self.predictor.runner(image[None], [(picture.height, picture.width)])
        return found

    # -- what has been done

    def begin(self, kept: list[Path], written: list[Path]) -> None:
        """Go on where a call stopped that looked at the same image with the same model in the same way, if all is there
        that it `kept` on the way or, after the last step, had `written`."""
        self.done = self._noted()
        if not self.done or not all(path.exists() for path in (written if self.done > len(self) else kept)):
            shutil.rmtree(self.state, ignore_errors=True)
            self.state.mkdir(parents=True)
            self.note(0)

    def note(self, done: int) -> None:
        """Note how many tiles are done; one more when the result is written."""
        write_text(self.state / "progress.json", json.dumps({"key": self._key, "done": done}))
        self.done = done

    def clear(self) -> None:
        """Remove what the tiles needed, and keep that the result is written."""
        for path in self.state.iterdir():
            if path.name != "progress.json":
                with contextlib.suppress(OSError):  # Windows keeps a file that is open
                    path.unlink()

    def end(self) -> None:
        """Remove all that was kept for going on."""
        shutil.rmtree(self.state, ignore_errors=True)

    def _noted(self) -> int:
        try:
            before = json.loads((self.state / "progress.json").read_text())
            return before["done"] if before["key"] == self._key else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    @functools.cached_property
    def _key(self) -> str:
        """By what a call is known to be the same."""
        runner = self.predictor.runner
        how = dataclasses.asdict(runner.how), str(runner.dtype), self.predictor.card.to_dict()
        digest = hashlib.sha256(json.dumps([stamp(self.path), self.tile, self.overlap, how]).encode())
        for tensor in self.predictor.model.state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    # -- for people

    def progress(self) -> str:
        """How far it is, in words."""
        return f"{min(self.done, len(self))} of {len(self)} tiles of {escaped(self.path)}"

    def preview(self) -> tuple[Image.Image, int]:
        """A picture of the whole, smaller by a whole number."""
        every = max(1, math.ceil(max(self.image.size) / PREVIEW))
        height, width = (math.ceil(side / every) for side in self.image.size)
        picture = Image.new("RGB", (width, height))
        side = every * max(1, self.tile // every)
        for down in spans(self.image.size[0], side, 0):
            for across in spans(self.image.size[1], side, 0):
                part = self.image.read(down.start, across.start, down.length, across.length)
                picture.paste(part.convert("RGB").reduce(every), (across.start // every, down.start // every))
        return picture, every


Advance = Callable[[int, int], None]


def segment(tiling: Tiling, advance: Advance = lambda done, of: None) -> tuple[Segmentation, dict[str, str]]:
    """A class for each pixel of a large image: NAME-mask.tif, and NAME-overlay.png, a picture of at most 2048 pixels.

    Logits are weighted so that, where tiles overlap, they pass from one to the other. In memory are a tile, and the
    seam of a row of tiles, classes × overlap × width numbers, which lies in a file.

    Returns:
        The mask, which lies in a file, and the paths.

    Raises:
        UserError: tifffile is missing, or the image cannot be read on.
    """
    if importlib.util.find_spec("tifffile") is None:
        raise UserError("`tile`: writes TIFF files and needs tifffile; run pip install 'vimamba[dense]'")
    names, (height, width), overlap = tiling.predictor.class_names, tiling.image.size, tiling.overlap
    files = {what: tiling.folder / f"{tiling.name}-{what}" for what in ("mask.tif", "overlay.png")}
    kept: dict[str, Any] = {
        "labels": ((height, width), np.uint8 if len(names) <= 256 else np.uint16),
        # Of rows and of tiles in turns, so that a tile that is done again finds what it found.
        **{f"seam-{i}": ((len(names), overlap, width), np.float32) for i in (0, 1)},
        **{f"side-{i}": ((len(names), tiling.tile, overlap), np.float32) for i in (0, 1)},
    }
    paths = {name: tiling.state / f"{name}.npy" for name in kept}
    tiling.begin([path for name, path in paths.items() if overlap or name == "labels"], [*files.values()])
    labels_HW = _kept(paths["labels"], *kept.pop("labels"))
    if tiling.done > len(tiling):
        _read_back(files["mask.tif"], labels_HW)
    else:
        _label(tiling, labels_HW, {name: _kept(paths[name], *what) for name, what in kept.items()}, advance)
        _write(tiling, labels_HW, names, files)
        tiling.note(len(tiling) + 1)
    tiling.clear()  # the mask is read on: a file that is open lasts
    return Segmentation(labels_HW, names), {what.partition(".")[0]: str(path) for what, path in files.items()}


def _label(tiling: Tiling, labels_HW: np.ndarray, seams: dict[str, np.ndarray], advance: Advance) -> None:
    """Classes of the pixels, tile by tile."""
    (height, width), overlap, step = tiling.image.size, tiling.overlap, tiling.tile - tiling.overlap
    advance(tiling.done, len(tiling))
    for number in range(tiling.done, len(tiling)):
        down, across = tiling.place(number)
        row, column = divmod(number, len(tiling.columns))
        seen_CHW = tiling.outputs(number)[0].cpu().numpy()
        logits_CHW = seen_CHW[:, down.start - down.seen :, across.start - across.seen :]
        logits_CHW *= weights(down, height, overlap)[:, None] * weights(across, width, overlap)
        if column > 0:
            logits_CHW[:, :, :overlap] += seams[f"side-{(number - 1) % 2}"][:, : down.length]
        last = down.stop == height, across.stop == width
        if not last[1]:
            seams[f"side-{number % 2}"][:, : down.length] = logits_CHW[:, :, step:]
        block_CHW = logits_CHW[:, :, : None if last[1] else step]
        place = slice(across.start, across.start + block_CHW.shape[2])
        if not last[0]:
            seams[f"seam-{row % 2}"][:, :, place] = block_CHW[:, step:]
        if row > 0:
            block_CHW[:, :overlap] += seams[f"seam-{(row - 1) % 2}"][:, :, place]
        block_CHW = block_CHW[:, : None if last[0] else step]
        labels_HW[down.start : down.start + block_CHW.shape[1], place] = block_CHW.argmax(0)
        for array in (labels_HW, *seams.values()):
            _put_down(array)
        tiling.note(number + 1)
        advance(number + 1, len(tiling))


def _kept(path: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array in a file, as it was left or of zeros."""
    if 0 in shape:
        return np.zeros(shape, dtype)
    if path.exists():
        return np.lib.format.open_memmap(path, "r+")
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):  # a disk that is full later on would end the process without a word
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _put_down(array: np.ndarray) -> None:
    """Write what has changed of an array in a file, and leave the rest of it to the file too."""
    if isinstance(array, np.memmap):
        array.flush()
        if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            array.base.madvise(mmap.MADV_DONTNEED)


def _read_back(mask: Path, into_HW: np.ndarray) -> None:
    import tifffile

    with tifffile.TiffFile(mask) as file:
        page: Any = file.pages[0]
        page.asarray(out=into_HW)


def _write(tiling: Tiling, labels_HW: np.ndarray, names: list[str], files: dict[str, Path]) -> None:
    import tifffile

    from vimamba.tasks.overlays import colours

    how: dict[str, Any] = {"photometric": "minisblack"}
    if len(names) <= 256:
        table_3N = np.zeros((3, 256), dtype=np.uint16)
        table_3N[:, : len(names)] = 257 * colours(names).T.astype(np.uint16)
        how = {"photometric": "palette", "colormap": table_3N}
    with whole(files["mask.tif"]) as partial:
        tifffile.imwrite(
            partial, _stored(labels_HW), shape=labels_HW.shape, dtype=labels_HW.dtype, tile=(STORED, STORED),
            compression="zlib", metadata=None, extratags=tiling.image.tags, bigtiff=labels_HW.nbytes >= 2**32, **how,
        )  # fmt: skip
    picture, every = tiling.preview()
    with whole(files["overlay.png"]) as partial:
        Segmentation(np.ascontiguousarray(labels_HW[::every, ::every]), names).draw(picture).save(partial, "png")


def _stored(labels_HW: np.ndarray) -> Iterator[np.ndarray]:
    """The tiles of a TIFF file, those at the edges filled up."""
    for down in spans(labels_HW.shape[0], STORED, 0):
        for across in spans(labels_HW.shape[1], STORED, 0):
            tile = np.zeros((STORED, STORED), labels_HW.dtype)
            part = labels_HW[down.start : down.stop, across.start : across.stop]
            tile[: part.shape[0], : part.shape[1]] = part
            yield tile


def detect(
    tiling: Tiling, min_score: float, advance: Advance = lambda done, of: None
) -> tuple[Detections, dict[str, str]]:
    """The objects of a large image, those that seams cut joined; and NAME-overlay.png, of at most 2048 pixels."""
    kept, overlay = tiling.state / "objects.jsonl", tiling.folder / f"{tiling.name}-overlay.png"
    tiling.begin([kept], [kept])
    lines = kept.read_text().splitlines()[: tiling.done] if tiling.done else []
    if len(lines) < tiling.done:
        tiling.note(len(lines))
    write_text(kept, "".join(f"{line}\n" for line in lines))
    advance(tiling.done, len(tiling))
    with kept.open("a") as file:
        for number in range(tiling.done, len(tiling)):
            (found,) = tiling.predictor.task.predictions(tiling.outputs(number), tiling.predictor.class_names)
            lines.append(json.dumps(_plain(found)))
            file.write(f"{lines[-1]}\n")
            file.flush()
            os.fsync(file.fileno())
            tiling.note(number + 1)
            advance(number + 1, len(tiling))
    places = [tiling.place(number) for number in range(len(tiling))]
    parts = [
        _moved(tiling, json.loads(line), *place).above(min_score) for line, place in zip(lines, places, strict=True)
    ]
    frames = [Frame(across.seen, down.seen, across.stop, down.stop) for down, across in places]
    columns = len(tiling.columns)
    beside = [(i, i + 1) for i in range(len(tiling)) if (i + 1) % columns]
    below = [(i, i + columns) for i in range(len(tiling) - columns)]
    result = joined(parts, frames, beside + below)
    picture, every = tiling.preview()
    with whole(overlay) as partial:
        _smaller(result, every).draw(picture, score=0.0).save(partial, "png")
    return result, {"overlay": str(overlay)}


def _plain(found: Detections) -> dict[str, Any]:
    """Detections in a tile as JSON has them."""
    crops: Any = found.crops and [
        [c.top, c.left, *c.mask.shape, Crop(0, 0, c.mask).runs(*c.mask.shape)] for c in found.crops
    ]
    named = {"boxes": found.boxes, "label_ids": found.label_ids, "scores": found.scores}
    return {**{name: values.tolist() for name, values in named.items()}, "crops": crops}


def _moved(tiling: Tiling, plain: dict[str, Any], down: Span, across: Span) -> Detections:
    """Detections in a tile in pixels of the image."""
    boxes_N4 = np.array(plain["boxes"], dtype=np.float32).reshape(-1, 4) + np.array(
        [across.seen, down.seen] * 2, np.float32
    )
    crops = plain["crops"]
    if crops is not None:
        crops = [Crop(top + down.seen, left + across.seen, _drawn(*rest)) for top, left, *rest in crops]
    return Detections(
        boxes_N4, np.array(plain["label_ids"], dtype=np.int64), np.array(plain["scores"], dtype=np.float32), crops,
        tiling.predictor.class_names, tiling.image.size,
    )  # fmt: skip


def _drawn(rows: int, columns: int, runs: list[int]) -> np.ndarray:
    """The mask of run lengths, column by column."""
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(columns, rows).T


def _smaller(found: Detections, every: int) -> Detections:
    """Detections in an image of every so many pixels."""
    crops: Any = found.crops and [
        Crop(-(-c.top // every), -(-c.left // every), c.mask[-c.top % every :: every, -c.left % every :: every])
        for c in found.crops
    ]
    size = (-(-found.size[0] // every), -(-found.size[1] // every))
    return dataclasses.replace(found, boxes=found.boxes / every, crops=crops, size=size)
