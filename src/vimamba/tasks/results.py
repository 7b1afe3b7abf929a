"""What an evaluation found over many images, and what a model says of one."""

from __future__ import annotations

import csv
import dataclasses
import io
from typing import Any

import numpy as np
import torch
from PIL import Image

ROWS = 256  # of a mask that are counted at once: one that lies in a file may be larger than the memory


@dataclasses.dataclass(frozen=True)
class Results:
    """An evaluation.

    Args:
        images: how many there were.
        numbers: `loss` and the task's own by name, such as `top1`; shares lie between 0 and 1.
        per_class: a row for each class, of the same columns: its `name` first, then counts and shares.
        confusion: images by class (rows) and prediction (columns), (classes, classes); None where not asked for.
    """

    images: int
    numbers: dict[str, float]
    per_class: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    confusion: torch.Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the confusion matrix."""
        return {"images": self.images, **self.numbers, "per_class": self.per_class}

    def to_csv(self) -> str:
        """The table of classes."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.per_class[0])
        for row in self.per_class:
            writer.writerow([f"{v:.4f}" if isinstance(v, float) else "" if v is None else v for v in row.values()])
        return text.getvalue()


@dataclasses.dataclass(frozen=True)
class Classification:
    """What an image shows.

    Args:
        scores: probability of each class, (classes,), float32.
        class_names: the classes, in that order.
    """

    scores: np.ndarray
    class_names: list[str]

    @property
    def label(self) -> str:
        """The likeliest class."""
        return self.class_names[int(self.scores.argmax())]

    @property
    def score(self) -> float:
        """Its probability."""
        return float(self.scores.max())

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The `k` likeliest classes, or all if there are fewer, with their probabilities; the likeliest first."""
        order = np.argsort(-self.scores, kind="stable")[:k]
        return [(self.class_names[i], float(self.scores[i])) for i in order]

    @staticmethod
    def columns(k: int = 5) -> list[str]:
        """The columns of `rows`."""
        return [f"{column}_{place}" for place in range(1, k + 1) for column in ("class", "probability")]

    def rows(self, k: int = 5) -> list[list[str]]:
        """For a table: one row, the `k` likeliest classes side by side."""
        return [[cell for name, p in self.top(k) for cell in (name, f"{p:.6f}")]]

    def to_dict(self, k: int = 5) -> dict[str, Any]:
        """For JSON."""
        return {"predictions": [{"class": name, "probability": round(p, 6)} for name, p in self.top(k)]}

    def draw(self, image: Image.Image, k: int = 3) -> Image.Image:
        """A copy of the image with the `k` likeliest classes and their probabilities written below it."""
        from vimamba.tasks.figures import with_caption

        return with_caption(image, [f"{100 * p:.1f}% {name}" for name, p in self.top(k)])


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """What each pixel of an image shows.

    Args:
        mask: the number of each pixel's class, (height, width) of the original.
        class_names: the classes, in that order.
    """

    mask: np.ndarray
    class_names: list[str]

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The `k` classes that take up most of the image, of those that are there, with their shares of it."""
        counts = np.zeros(len(self.class_names), dtype=np.int64)
        for row in range(0, len(self.mask), ROWS):
            counts += np.bincount(self.mask[row : row + ROWS].ravel(), minlength=len(counts))
        order = [i for i in np.argsort(-counts, kind="stable")[:k] if counts[i]]
        return [(self.class_names[i], float(counts[i] / self.mask.size)) for i in order]

    @staticmethod
    def columns(k: int = 5) -> list[str]:
        """The columns of `rows`."""
        return ["class", "share"]

    def rows(self, k: int = 5) -> list[list[str]]:
        """For a table: a row for each of the `k` largest classes."""
        return [[name, f"{share:.6f}"] for name, share in self.top(k)]

    def to_dict(self, k: int = 5) -> dict[str, Any]:
        """For JSON, without the mask."""
        classes = [{"class": name, "share": round(share, 6)} for name, share in self.top(k)]
        return {"height": self.mask.shape[0], "width": self.mask.shape[1], "classes": classes}

    def mask_image(self) -> Image.Image:
        """The mask as a picture: class numbers with a palette, or 16-bit numbers of more than 256 classes."""
        from vimamba.tasks.overlays import colours

        if len(self.class_names) > 256:
            return Image.fromarray(self.mask.astype(np.uint16))
        picture = Image.fromarray(self.mask.astype(np.uint8)).convert("P")
        picture.putpalette(colours(self.class_names).ravel().tolist())
        return picture

    def draw(self, image: Image.Image, k: int = 12) -> Image.Image:
        """A copy of the image in the colours of its classes, with the `k` largest of them named below it."""
        from vimamba.tasks.overlays import WHITE, colours, with_classes, with_legend

        palette = {
            name: WHITE if is_background(name) else tuple(colour.tolist())
            for name, colour in zip(self.class_names, colours(self.class_names), strict=True)
        }
        legend = [(f"{name} {100 * share:.1f}%".strip(), palette[name]) for name, share in self.top(k)]
        return with_legend(with_classes(image, self.mask, self.class_names), legend)


def is_background(name: str) -> bool:
    """Whether a class is what lies behind the others, by its name."""
    return name.strip().lower() in ("background", "bg", "_background_")


@dataclasses.dataclass(frozen=True)
class Crop:
    """A mask by the part of it that is not empty.

    Args:
        top, left: where the part begins, pixels.
        mask: (rows, columns), bool.
    """

    top: int
    left: int
    mask: np.ndarray

    @classmethod
    def of(cls, mask_HW: np.ndarray) -> Crop:
        """Of a whole mask."""
        rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
        if not len(rows):
            return cls(0, 0, np.zeros((0, 0), dtype=bool))
        part = mask_HW[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        return cls(int(rows[0]), int(columns[0]), part.copy())

    def paste(self, into_HW: np.ndarray) -> None:
        """Set its pixels in an image's mask."""
        rows, columns = self.mask.shape
        into_HW[self.top : self.top + rows, self.left : self.left + columns] |= self.mask

    def runs(self, height: int, width: int) -> list[int]:
        """COCO's run lengths of the mask in an image: pixels column by column, off, on, off ..."""
        columns, rows = np.nonzero(self.mask.T)
        places = (columns + self.left).astype(np.int64) * height + rows + self.top
        breaks = np.flatnonzero(np.diff(places) != 1)
        starts = places[np.r_[0, breaks + 1]] if len(places) else places
        ends = places[np.r_[breaks, len(places) - 1]] + 1 if len(places) else places
        edges = np.stack([starts, ends], 1).ravel()
        return np.diff(np.r_[0, edges, height * width]).tolist()


@dataclasses.dataclass(frozen=True)
class Detections:
    """The objects in an image, the surest first.

    Args:
        boxes: (n, 4) float32: left, top, right, bottom in pixels of the original.
        label_ids: the number of each one's class, (n,) int64.
        scores: how sure it is of each, (n,) float32, 0 to 1.
        crops: the part of each one's mask that is not empty; None of a model that gives boxes alone.
        class_names: the classes, in order of their numbers.
        size: height and width of the original.
    """

    boxes: np.ndarray
    label_ids: np.ndarray
    scores: np.ndarray
    crops: list[Crop] | None
    class_names: list[str]
    size: tuple[int, int]

    @classmethod
    def of(cls, found: dict[str, torch.Tensor], class_names: list[str], size: tuple[int, int]) -> Detections:
        """From the tensors that the task gives for an image."""
        crops = [Crop.of(mask) for mask in found["masks"].bool().cpu().numpy()] if "masks" in found else None
        boxes, labels, scores = (found[name].float().cpu().numpy() for name in ("boxes", "labels", "scores"))
        return cls(boxes, labels.astype(np.int64), scores, crops, class_names, size)

    @property
    def labels(self) -> list[str]:
        """The class of each object."""
        return [self.class_names[i] for i in self.label_ids]

    @property
    def masks(self) -> np.ndarray | None:
        """Where each object is, (n, height, width) of the original, bool; None of a model that gives boxes alone."""
        if self.crops is None:
            return None
        masks_NHW = np.zeros((len(self.crops), *self.size), dtype=bool)
        for mask_HW, crop in zip(masks_NHW, self.crops, strict=True):
            crop.paste(mask_HW)
        return masks_NHW

    def select(self, rows: Any) -> Detections:
        """Some of them, in that order."""
        rows = np.asarray(rows, dtype=np.int64)
        crops = None if self.crops is None else [self.crops[row] for row in rows]
        return dataclasses.replace(
            self, boxes=self.boxes[rows], label_ids=self.label_ids[rows], scores=self.scores[rows], crops=crops
        )

    def above(self, score: float) -> Detections:
        """Those that it is so sure of."""
        return self.select(np.flatnonzero(self.scores >= score))

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The `k` surest objects' classes, with how sure it is of them."""
        return list(zip(self.labels, self.scores.tolist(), strict=True))[:k]

    @staticmethod
    def columns(k: int = 5) -> list[str]:
        """The columns of `rows`."""
        return ["class", "score", "left", "top", "right", "bottom"]

    def rows(self, k: int = 5) -> list[list[str]]:
        """For a table: a row for each of the `k` surest objects."""
        found = zip(self.top(k), self.boxes.tolist(), strict=False)
        return [[name, f"{score:.6f}", *(f"{side:.2f}" for side in box)] for (name, score), box in found]

    def to_dict(self, k: int = 100) -> dict[str, Any]:
        """For JSON, without the masks."""
        found = zip(self.top(k), self.boxes.tolist(), strict=False)
        objects = [
            {"class": name, "score": round(score, 6), "box": [round(side, 2) for side in box]}
            for (name, score), box in found
        ]
        return {"height": self.size[0], "width": self.size[1], "objects": objects}

    def to_coco(self) -> dict[str, Any]:
        """For `vimamba.data.coco_json.write_coco`."""
        masks = {} if self.crops is None else {"runs": [crop.runs(*self.size) for crop in self.crops]}
        return {"boxes": self.boxes, "labels": self.label_ids, "scores": self.scores, **masks}

    def draw(self, image: Image.Image, k: int = 100, score: float = 0.5) -> Image.Image:
        """A copy of the image with the boxes and masks of the `k` surest objects, of those that are sure enough."""
        from vimamba.tasks.overlays import colours, with_boxes

        shown = self.select(np.flatnonzero(self.scores >= score)[:k])
        names = [f"{name} {100 * sure:.0f}%".strip() for name, sure in zip(shown.labels, shown.scores, strict=True)]
        return with_boxes(image, shown.boxes, names, colours(self.class_names)[shown.label_ids], shown.crops)
