"""Learning to name what an image shows."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from timm.data.mixup import Mixup
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassStatScores

from vimamba.tasks.results import Classification, Results
from vimamba.tasks.task import Task

MAX_CONFUSION = 2000  # classes; the matrix is their square


class ClassificationTask(Task):
    """One class an image: cross-entropy, with mixup and label smoothing if asked for; the best epoch by top-1."""

    name = "classification"
    result = Classification
    monitor = "top1"
    columns = {"top1": "top-1 %", "top5": "top-5 %"}  # noqa: RUF012 - declared in the base

    @classmethod
    def outputs(cls, class_names: list[str]) -> int:
        return len(class_names)

    @classmethod
    def criterion(cls, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.float(), targets)

    @classmethod
    def metrics(cls, class_names: list[str], detailed: bool = False) -> dict[str, Metric]:
        count = len(class_names)
        found: dict[str, Metric] = {
            "top1": MulticlassAccuracy(count, average="micro", validate_args=False),
            "top5": MulticlassAccuracy(count, top_k=min(5, count), average="micro", validate_args=False),
            "per_class": MulticlassStatScores(count, average=None, validate_args=False),
        }
        if detailed and count <= MAX_CONFUSION:
            found["confusion"] = MulticlassConfusionMatrix(count, validate_args=False)
        return found

    @classmethod
    def results(cls, values: dict[str, Any], class_names: list[str]) -> Results:
        counts = values["per_class"].reshape(-1, 5).int().tolist()
        rows = [_class_row(name, *row) for name, row in zip(class_names, counts, strict=True)]
        confusion = values["confusion"].cpu() if "confusion" in values else None
        numbers = {name: float(values[name]) for name in ("loss", "top1", "top5")}
        return Results(int(values["images"]), numbers, rows, confusion)

    @classmethod
    def predictions(cls, outputs: Tensor, class_names: list[str]) -> list[Any]:
        return [Classification(scores, class_names) for scores in outputs.float().softmax(-1).cpu().numpy()]

    @classmethod
    def sentence(cls, share: str) -> str:
        return f"{share} of the held-out images named right"

    def mix(self, images_BCHW: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if not (self.augment.mixup or self.augment.cutmix) or len(images_BCHW) < 2:
            return images_BCHW, targets
        even = len(images_BCHW) // 2 * 2  # Mixup pairs each image with another
        return self._mixup(images_BCHW[:even], targets[:even])

    @functools.cached_property
    def _mixup(self) -> Mixup:
        augment, classes = self.augment, len(self.card.class_names)
        return Mixup(augment.mixup, augment.cutmix, label_smoothing=augment.label_smoothing, num_classes=classes)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        smoothing = 0.0 if targets.is_floating_point() else self.augment.label_smoothing  # mixed targets have theirs
        return nn.functional.cross_entropy(outputs.float(), targets, label_smoothing=smoothing)


@dataclasses.dataclass(frozen=True)
class ClassResult:
    """One class: images of it, how many were found, and the share of its predictions that were right.

    Shares lie between 0 and 1, recall is None for a class without images.
    """

    name: str
    images: int
    correct: int
    recall: float | None
    precision: float | None
    f1: float | None


def _class_row(name: str, tp: int, fp: int, tn: int, fn: int, support: int) -> dict[str, Any]:
    recall = tp / support if support else None
    precision = tp / (tp + fp) if tp + fp else None
    f1 = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None
    return dataclasses.asdict(ClassResult(name, support, tp, recall, precision, f1))
