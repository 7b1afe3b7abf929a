"""Images of any size, tile by tile: logits blended where tiles overlap, objects joined across their seams.

What has been done is kept beside the output, so that a call that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from vimamba.errors import UserError, require
from vimamba.files import whole, write_text
from vimamba.inference.predictor import Predictor
from vimamba.inference.windows import Windows, open_windows, stamp
from vimamba.tasks.results import Crop, Detections, Segmentation

LEAST = 32  # pixels of a tile
PREVIEW = 2048  # most pixels of the side of the picture of a large image
STORED = 512  # pixels of the tiles of the TIFF file that is written
JOINED = 0.5  # share of the smaller of two objects that must lie in the other, for them to be one that a seam cut


@dataclasses.dataclass
class TileOptions:
    """How large images are taken apart.

    Args:
        tile: side of the tiles in which images are read and looked at, pixels, for those that do not fit into the
            memory; the masks are then TIFF files. Whole images if not given
        overlap: pixels by which neighbouring tiles overlap, where they are blended
    """

    tile: int | None = None
    overlap: int = 128

    def __post_init__(self) -> None:
        if self.tile is None:
            require(self.overlap == 128, f"`overlap` {self.overlap}: goes with `tile`")
            return
        require(self.tile >= LEAST, f"`tile` is {self.tile}; it must be at least {LEAST} pixels")
        require(
            0 <= self.overlap <= self.tile // 2,
            f"`overlap` is {self.overlap}; give 0 to half of `tile`, {self.tile // 2}",
        )


class Span(NamedTuple):
    """Where a tile lies along an axis."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start


def spans(length: int, tile: int, overlap: int) -> list[Span]:
    """Tiles along an axis, each `overlap` into the next; the last may be shorter."""
    step = tile - overlap
    count = max(1, math.ceil((length - overlap) / step))
    return [Span(i * step, min(i * step + tile, length)) for i in range(count)]


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
    """The tiles of an image, row by row.

    Args:
        predictor: the model.
        path: the image's file.
        options: with a tile.
        folder: where the output goes, and what has been done so far.
        name: of the output, without its ending.
    """

    def __init__(self, predictor: Predictor, path: str, options: TileOptions, folder: Path, name: str):
        assert options.tile is not None
        self.predictor, self.path, self.folder, self.name = predictor, path, folder, name
        self.tile, self.overlap = options.tile, options.overlap
        self.image: Windows = open_windows(path)
        self.rows, self.columns = (spans(side, self.tile, self.overlap) for side in self.image.size)
        self.state = folder / f".{name}.tiles"
        self.transform = predictor.transform

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)

    def place(self, number: int) -> tuple[int, int]:
        """Row and column of a tile."""
        return divmod(number, len(self.columns))

    def begin(self) -> int:
        """How many tiles have been done before, of the same image by the same model in the same way."""
        progress = self.state / "progress.json"
        key = self._key()
        try:
            before = json.loads(progress.read_text())
            if before["key"] == key and isinstance(before["done"], int) and 0 <= before["done"] <= len(self):
                return before["done"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        shutil.rmtree(self.state, ignore_errors=True)
        self.state.mkdir(parents=True)
        self.done(0)
        return 0

    def done(self, count: int) -> None:
        """Note how many tiles are done."""
        write_text(self.state / "progress.json", json.dumps({"key": self._key(), "done": count}))

    def end(self) -> None:
        """Remove what was kept for going on."""
        shutil.rmtree(self.state, ignore_errors=True)

    def _key(self) -> str:
        how = dataclasses.asdict(self.predictor.runner.how)
        parts = [stamp(self.path), self.tile, self.overlap, how, str(self.predictor.runner.dtype), self._weights]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def _weights(self) -> str:
        digest = hashlib.sha256()
        for tensor in self.predictor.model.state_dict().values():
            digest.update(tensor.detach().float().sum().cpu().numpy().tobytes())
        return digest.hexdigest()

    def outputs(self, number: int) -> Any:
        """What the model gives for a tile, in its pixels."""
        row, column = self.place(number)
        high, wide = self.rows[row].length, self.columns[column].length
        picture = self.image.read(self.rows[row].start, self.columns[column].start, high, wide)
        scaled = self.predictor.card.preprocessing
        if scaled.short_side or scaled.long_side:  # all tiles by the same factor
            picture = ImageOps.expand(picture, (0, 0, self.tile - wide, self.tile - high))
        image, _ = self.transform(picture, 0)
        ((found, _),) = self.predictor.runner(image[None], [(picture.height, picture.width)])
        return found

    def preview(self) -> tuple[Image.Image, int]:
        """A picture of the whole, of every so many pixels each way."""
        every = max(1, math.ceil(max(self.image.size) / PREVIEW))
        strips = []
        for span in spans(self.image.size[0], self.tile, 0):
            parts = [
                np.asarray(self.image.read(span.start, part.start, span.length, part.length).convert("RGB"))[
                    -span.start % every :: every, -part.start % every :: every
                ]
                for part in spans(self.image.size[1], self.tile, 0)
            ]
            strips.append(np.concatenate(parts, axis=1))
        return Image.fromarray(np.concatenate(strips)), every


Advance = Callable[[int, int], None]


def segment(tiling: Tiling, advance: Advance = lambda done, of: None) -> tuple[Segmentation, dict[str, str]]:
    """A class for each pixel of a large image: NAME-mask.tif, and NAME-overlay.png, a picture of at most 2048 pixels.

    Logits are weighted so that, where tiles overlap, they pass from one to the other. In memory are a tile, and the
    seam of a row of tiles, classes × overlap × width numbers, which lies in a file.

    Returns:
        The mask, which lies in a file, and the paths.
    """
    names, (height, width) = tiling.predictor.class_names, tiling.image.size
    dtype = np.uint8 if len(names) <= 256 else np.uint16
    first, overlap, step = tiling.begin(), tiling.overlap, tiling.tile - tiling.overlap
    labels_HW = _kept(tiling.state / "labels.npy", (height, width), dtype)
    # Of rows and of tiles in turns, so that a tile that is done again finds what it found.
    seams = [_kept(tiling.state / f"seam-{i}.npy", (len(names), overlap, width), np.float32) for i in (0, 1)]
    sides = [_kept(tiling.state / f"side-{i}.npy", (len(names), tiling.tile, overlap), np.float32) for i in (0, 1)]
    for number in range(first, len(tiling)):
        row, column = tiling.place(number)
        down, across = tiling.rows[row], tiling.columns[column]
        logits_CHW = tiling.outputs(number)[0, :, : down.length, : across.length].cpu().numpy()
        logits_CHW = logits_CHW * weights(down, height, overlap)[:, None] * weights(across, width, overlap)
        if column > 0 and overlap:
            logits_CHW[:, :, :overlap] += sides[(number - 1) % 2][:, : down.length]
        if across.stop < width and overlap:
            sides[number % 2][:, : down.length] = logits_CHW[:, :, -overlap:]
        wide = across.length if across.stop == width else step
        block_CHW, place = logits_CHW[:, :, :wide], slice(across.start, across.start + wide)
        if down.stop < height and overlap:
            seams[row % 2][:, :, place] = block_CHW[:, -overlap:]
        if row > 0 and overlap:
            block_CHW[:, :overlap] += seams[(row - 1) % 2][:, :, place]
        high = down.length if down.stop == height else step
        labels_HW[down.start : down.start + high, place] = block_CHW[:, :high].argmax(0)
        for kept in (labels_HW, *seams, *sides):
            if isinstance(kept, np.memmap):
                kept.flush()
        tiling.done(number + 1)
        advance(number + 1, len(tiling))
    files = _write(tiling, labels_HW, names)
    tiling.end()  # the mask is read on: a file that is open lasts
    return Segmentation(labels_HW, names), files


def _kept(path: Path, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array in a file, as it was left or of zeros."""
    if 0 in shape:
        return np.zeros(shape, dtype)
    if path.exists():
        return np.lib.format.open_memmap(path, "r+")
    return np.lib.format.open_memmap(path, "w+", dtype, shape)


def _write(tiling: Tiling, labels_HW: np.ndarray, names: list[str]) -> dict[str, str]:
    from vimamba.tasks.figures import colours

    try:
        import tifffile
    except ModuleNotFoundError as error:
        raise UserError("`tile`: writes TIFF files and needs tifffile; run pip install 'vimamba[dense]'") from error
    mask, overlay = (tiling.folder / f"{tiling.name}-{what}" for what in ("mask.tif", "overlay.png"))
    how: dict[str, Any] = {"photometric": "minisblack"}
    if len(names) <= 256:
        table_3N = np.zeros((3, 256), dtype=np.uint16)
        table_3N[:, : len(names)] = 257 * colours(names).T.astype(np.uint16)
        how = {"photometric": "palette", "colormap": table_3N}
    with whole(mask) as partial:
        tifffile.imwrite(
            partial, _stored(labels_HW), shape=labels_HW.shape, dtype=labels_HW.dtype, tile=(STORED, STORED),
            compression="zlib", metadata=None, extratags=tiling.image.tags, bigtiff=labels_HW.nbytes >= 2**32, **how,
        )  # fmt: skip
    picture, every = tiling.preview()
    with whole(overlay) as partial:
        Segmentation(np.ascontiguousarray(labels_HW[::every, ::every]), names).draw(picture).save(partial, "png")
    return {"mask": str(mask), "overlay": str(overlay)}


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
    first = tiling.begin()
    kept = tiling.state / "objects.jsonl"
    lines = kept.read_text().splitlines()[:first] if first else []
    write_text(kept, "".join(f"{line}\n" for line in lines))
    with kept.open("a") as file:
        for number in range(first, len(tiling)):
            (found,) = tiling.predictor.task.predictions(tiling.outputs(number), tiling.predictor.class_names)
            lines.append(json.dumps(_plain(found.above(min_score))))
            file.write(f"{lines[-1]}\n")
            file.flush()
            tiling.done(number + 1)
            advance(number + 1, len(tiling))
    result = _joined(tiling, [json.loads(line) for line in lines])
    overlay = tiling.folder / f"{tiling.name}-overlay.png"
    picture, every = tiling.preview()
    with whole(overlay) as partial:
        _smaller(result, every).draw(picture, score=0.0).save(partial, "png")
    tiling.end()
    return result, {"overlay": str(overlay)}


def _plain(found: Detections) -> dict[str, Any]:
    """Detections in a tile as JSON has them."""
    crops = found.crops
    return {
        "boxes": found.boxes.tolist(), "labels": found.label_ids.tolist(), "scores": found.scores.tolist(),
        "crops": None if crops is None else [[c.top, c.left, *c.mask.shape, whole_runs(c)] for c in crops],
    }  # fmt: skip


def whole_runs(crop: Crop) -> list[int]:
    """The run lengths of a crop by itself."""
    return Crop(0, 0, crop.mask).runs(*crop.mask.shape)


def _crop(top: int, left: int, rows: int, columns: int, runs: list[int]) -> Crop:
    values = np.arange(len(runs)) % 2 == 1
    return Crop(top, left, np.repeat(values, runs).reshape(columns, rows).T)


def _joined(tiling: Tiling, found: list[dict[str, Any]]) -> Detections:
    """The detections of all tiles in the pixels of the image, with those that are parts of one object made one."""
    boxes: list[np.ndarray] = []
    labels: list[int] = []
    scores: list[float] = []
    crops: list[Crop] = []
    tiles: list[int] = []
    masked = any(one["crops"] is not None for one in found)
    for number, one in enumerate(found):
        row, column = tiling.place(number)
        top, left = tiling.rows[row].start, tiling.columns[column].start
        boxes += [
            np.array(box, dtype=np.float32) + np.array([left, top, left, top], dtype=np.float32) for box in one["boxes"]
        ]
        labels, scores = labels + one["labels"], scores + one["scores"]
        tiles += [number] * len(one["labels"])
        for crop in one["crops"] or []:
            part = _crop(*crop)
            crops.append(dataclasses.replace(part, top=part.top + top, left=part.left + left))
    order = sorted(range(len(labels)), key=lambda i: -scores[i])
    groups: list[set[int]] = []  # of each object that is kept, the tiles it was found in
    chosen: list[int] = []
    by_tile: dict[int, list[int]] = {}
    for i in order:
        row, column = tiling.place(tiles[i])
        near = [r * len(tiling.columns) + c for r in (row - 1, row, row + 1) for c in (column - 1, column, column + 1)
                if 0 <= r < len(tiling.rows) and 0 <= c < len(tiling.columns)]  # fmt: skip
        mine = Crop(0, 0, np.zeros((0, 0), bool)) if not masked else crops[i]
        same = next(
            (
                k for tile in near for k in by_tile.get(tile, [])
                if labels[chosen[k]] == labels[i] and tiles[i] not in groups[k]
                and _covered(boxes[chosen[k]], boxes[i]) >= JOINED
                and (not masked or _shared(crops[chosen[k]], mine) >= JOINED)
            ), None,
        )  # fmt: skip
        if same is None:
            same = len(chosen)
            chosen.append(i)
            groups.append(set())
        else:
            k = chosen[same]
            boxes[k] = np.r_[np.minimum(boxes[k][:2], boxes[i][:2]), np.maximum(boxes[k][2:], boxes[i][2:])]
            if masked:
                crops[k] = _union(crops[k], mine)
        groups[same].add(tiles[i])
        by_tile.setdefault(tiles[i], []).append(same)
    return Detections(
        np.array([boxes[i] for i in chosen], dtype=np.float32).reshape(-1, 4),
        np.array([labels[i] for i in chosen], dtype=np.int64), np.array([scores[i] for i in chosen], dtype=np.float32),
        [crops[i] for i in chosen] if masked else None, tiling.predictor.class_names, tiling.image.size,
    )  # fmt: skip


def _covered(box: np.ndarray, other: np.ndarray) -> float:
    """The share of the smaller of two boxes that lies in the other."""
    width, height = np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2])
    smaller = min(float(np.prod(box[2:] - box[:2])), float(np.prod(other[2:] - other[:2])))
    return float(max(width, 0) * max(height, 0)) / max(smaller, 1e-9)


def _frame(*crops: Crop) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of some crops together."""
    return (
        min(c.top for c in crops), min(c.left for c in crops),
        max(c.top + c.mask.shape[0] for c in crops), max(c.left + c.mask.shape[1] for c in crops),
    )  # fmt: skip


def _in(frame: tuple[int, int, int, int], crop: Crop) -> np.ndarray:
    top, left, bottom, right = frame
    mask_HW = np.zeros((bottom - top, right - left), dtype=bool)
    dataclasses.replace(crop, top=crop.top - top, left=crop.left - left).paste(mask_HW)
    return mask_HW


def _shared(crop: Crop, other: Crop) -> float:
    """The share of the smaller of two masks that lies in the other."""
    frame = _frame(crop, other)
    first, second = _in(frame, crop), _in(frame, other)
    return float((first & second).sum()) / max(1, min(int(first.sum()), int(second.sum())))


def _union(crop: Crop, other: Crop) -> Crop:
    frame = _frame(crop, other)
    return Crop(frame[0], frame[1], _in(frame, crop) | _in(frame, other))


def _smaller(found: Detections, every: int) -> Detections:
    """Detections in an image of every so many pixels."""
    crops = None if found.crops is None else [
        Crop(-(-c.top // every), -(-c.left // every), c.mask[-c.top % every :: every, -c.left % every :: every])
        for c in found.crops
    ]  # fmt: skip
    size = (-(-found.size[0] // every), -(-found.size[1] // every))
    return dataclasses.replace(found, boxes=found.boxes / every, crops=crops, size=size)
