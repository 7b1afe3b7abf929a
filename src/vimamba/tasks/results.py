"""What an evaluation found over many images, and what a model says of one."""

from __future__ import annotations

import csv
import dataclasses
import io
from typing import Any

import numpy as np
import torch
from PIL import Image


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

    def to_dict(self, k: int = 5) -> dict[str, Any]:
        """For JSON."""
        return {"predictions": [{"class": name, "probability": round(p, 6)} for name, p in self.top(k)]}

    def draw(self, image: Image.Image, k: int = 3) -> Image.Image:
        """A copy of the image with the `k` likeliest classes and their probabilities written below it."""
        from vimamba.tasks.figures import with_caption

        return with_caption(image, [f"{100 * p:.1f}% {name}" for name, p in self.top(k)])
