"""What an evaluation found: accuracy over all images and for each class."""

from __future__ import annotations

import csv
import dataclasses
import io
from typing import Any

import torch
from torch import nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassStatScores

MAX_CONFUSION = 2000  # classes; the matrix is their square


@dataclasses.dataclass(frozen=True)
class ClassResult:
    """One class: images of it, how many were found, and the share of its predictions that were right."""

    name: str
    images: int
    correct: int
    recall: float | None
    precision: float | None
    f1: float | None


@dataclasses.dataclass(frozen=True)
class Results:
    """An evaluation; shares lie between 0 and 1, recall is None for a class without images."""

    images: int
    loss: float
    top1: float
    top5: float
    per_class: list[ClassResult]
    confusion: torch.Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the confusion matrix."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "confusion"}
        return values | {"per_class": [dataclasses.asdict(c) for c in self.per_class]}

    def to_csv(self) -> str:
        """The table of classes."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([field.name for field in dataclasses.fields(ClassResult)])
        for row in self.per_class:
            writer.writerow([f"{v:.4f}" if isinstance(v, float) else "" if v is None else v
                             for v in dataclasses.astuple(row)])  # fmt: skip
        return text.getvalue()


class Evaluation(nn.Module):
    """Collects predictions, over all devices, into Results."""

    def __init__(self, class_names: list[str], confusion: bool = False):
        super().__init__()
        self.class_names, count = class_names, len(class_names)
        self.loss = MeanMetric(nan_strategy="disable")  # a loss that is not a number is said, not left out
        self.top1 = MulticlassAccuracy(count, average="micro", validate_args=False)
        self.top5 = MulticlassAccuracy(count, top_k=min(5, count), average="micro", validate_args=False)
        self.stats = MulticlassStatScores(count, average=None, validate_args=False)
        keep = confusion and count <= MAX_CONFUSION
        self.confusion = MulticlassConfusionMatrix(count, validate_args=False) if keep else None

    def metrics(self) -> list[Any]:
        return [m for m in (self.loss, self.top1, self.top5, self.stats, self.confusion) if m is not None]

    def reset(self) -> None:
        for metric in self.metrics():
            metric.reset()

    def update(self, logits_BC: torch.Tensor, targets_B: torch.Tensor) -> None:
        logits_BC = logits_BC.float()
        self.loss.update(nn.functional.cross_entropy(logits_BC, targets_B, reduction="none"))
        for metric in self.metrics()[1:]:
            metric.update(logits_BC, targets_B)

    def compute(self) -> Results:
        stats_C5 = self.stats.compute().reshape(-1, 5).cpu()
        per_class = [
            _class_result(name, *map(int, row)) for name, row in zip(self.class_names, stats_C5.tolist(), strict=True)
        ]
        return Results(
            images=sum(row.images for row in per_class),
            loss=float(self.loss.compute()),
            top1=float(self.top1.compute()),
            top5=float(self.top5.compute()),
            per_class=per_class,
            confusion=None if self.confusion is None else self.confusion.compute().cpu(),
        )


def _class_result(name: str, tp: int, fp: int, tn: int, fn: int, support: int) -> ClassResult:
    recall = tp / support if support else None
    precision = tp / (tp + fp) if tp + fp else None
    f1 = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None
    return ClassResult(name, support, tp, recall, precision, f1)
