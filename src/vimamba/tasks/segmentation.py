"""Learning to say for each pixel what it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassStatScores

from vimamba.data.image_data import ImageData, Source
from vimamba.data.masks import open_masks
from vimamba.data.samples import IGNORE
from vimamba.data.transforms import Preprocessing
from vimamba.models.heads import build_segmenter, enlarge
from vimamba.models.heads.segmentation import PYRAMID_OF
from vimamba.tasks.dense import DenseTask, chosen_head, scenes_or
from vimamba.tasks.options import InferenceOptions
from vimamba.tasks.results import Results, Segmentation

AT_ONCE = 8  # windows
STRIDE = 2 / 3  # of the window: 341 of 512 pixels, as ADE20K is measured (arXiv 2401.09417)


class SegmentationTask(DenseTask):
    """A class a pixel: cross-entropy and Dice, and an auxiliary head's cross-entropy; the best epoch by mean IoU."""

    name = "segment"
    result = Segmentation
    monitor = "miou"
    columns = {"miou": "mIoU %", "pixel_accuracy": "pixels %"}  # noqa: RUF012 - declared in the base
    counted = "pixels"
    jitter = (0.5, 2.0)
    largest = 512

    @classmethod
    def source(cls) -> Source:
        return scenes_or("scenes-seg", open_masks)

    @classmethod
    def builder(cls) -> Callable[..., nn.Module]:
        return build_segmenter

    @classmethod
    def head(cls, given: str | None, data: ImageData) -> str:
        return chosen_head(cls.name, given, PYRAMID_OF, "upernet")

    @classmethod
    def renumbered(cls, target: Tensor, order: list[int]) -> Tensor:
        table = torch.tensor([*order, IGNORE], dtype=target.dtype)  # the last entry is what -1 stands for
        return table[target.long()]

    # -- learning

    def mix(self, images_BCHW: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if not self.dense.class_mix:
            return images_BCHW, targets
        return class_mixed(images_BCHW, targets, self.dense.class_mix)

    @classmethod
    def criterion(cls, outputs: Tensor, targets: Tensor) -> Tensor:
        total = nn.functional.cross_entropy(outputs.float(), targets.long(), ignore_index=IGNORE, reduction="sum")
        return total / (targets != IGNORE).sum().clamp(min=1)

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        logits, auxiliary = outputs if isinstance(outputs, tuple) else (outputs, None)
        logits_BCHW = enlarge(logits.float(), targets.shape[-2:])
        loss = self.criterion(logits_BCHW, targets)
        if self.dense.dice:
            loss = loss + self.dense.dice * dice_loss(logits_BCHW, targets)
        if auxiliary is not None and self.dense.aux_weight:
            auxiliary_BCHW = enlarge(auxiliary.float(), targets.shape[-2:])
            loss = loss + self.dense.aux_weight * self.criterion(auxiliary_BCHW, targets)
        return loss

    # -- what it finds

    @classmethod
    def check_inference(cls, how: InferenceOptions) -> None:
        """Everything has a meaning."""

    @classmethod
    def infer(
        cls, model: nn.Module, images: Any, sizes: list[tuple[int, int]], prep: Preprocessing, how: InferenceOptions
    ) -> Iterator[tuple[Any, slice]]:
        """Logits (1, classes, height, width) in the size of each original."""
        row = 0
        for _, same in groupby(list(images), key=lambda image: image.shape):
            stack_BCHW = torch.stack(list(same))
            for logits_CHW in logits_of(model, stack_BCHW, prep.img_size, how):
                yield resized(logits_CHW[None], sizes[row]), slice(row, row + 1)
                row += 1

    @classmethod
    def metrics(cls, class_names: list[str], detailed: bool = False) -> dict[str, Metric]:
        return {
            "per_class": MulticlassStatScores(len(class_names), average=None, ignore_index=IGNORE, validate_args=False)
        }

    @classmethod
    def update(cls, evaluation: MetricCollection, outputs: Tensor, targets: Any) -> None:
        evaluation.update(outputs, torch.stack(list(targets)).long())

    @classmethod
    def results(cls, values: dict[str, Any], class_names: list[str]) -> Results:
        counts = values["per_class"].reshape(-1, 5).long().tolist()
        rows = [class_row(name, *row) for name, row in zip(class_names, counts, strict=True)]
        found = [row["iou"] for row in rows if row["iou"] is not None]
        pixels = sum(row["pixels"] for row in rows)
        numbers = {
            "loss": float(values["loss"]),
            "miou": sum(found) / len(found) if found else 0.0,
            "pixel_accuracy": sum(tp for tp, *_ in counts) / pixels if pixels else 0.0,
        }
        return Results(int(values["images"]), numbers, rows)

    @classmethod
    def predictions(cls, outputs: Tensor, class_names: list[str]) -> list[Any]:
        dtype = torch.uint8 if len(class_names) <= 256 else torch.int32
        return [Segmentation(mask.numpy(), class_names) for mask in outputs.argmax(1).to(dtype).cpu()]

    @classmethod
    def sentence(cls, share: str) -> str:
        return f"mean IoU {share} on the held-out images"


def class_row(name: str, tp: int, fp: int, tn: int, fn: int, support: int) -> dict[str, Any]:
    """A row of the table of classes; shares are None for a class that neither is there nor was found."""
    union = tp + fp + fn
    return {
        "name": name,
        "pixels": support,
        "iou": tp / union if union else None,
        "recall": tp / support if support else None,
        "precision": tp / (tp + fp) if tp + fp else None,
    }


def class_mixed(images_BCHW: Tensor, targets_BHW: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """ClassMix (arXiv 2007.07936) within a batch: on an image, what the one before it shows of half its classes.

    The class that covers most of an image, which is what lies behind the others, stays where it is.
    """
    covered_BHW = torch.zeros_like(targets_BHW, dtype=torch.bool)
    before_BHW = targets_BHW.roll(1, 0)
    for chosen in (torch.rand(len(targets_BHW)) < probability).nonzero():
        shown_HW = before_BHW[chosen.item()]
        classes, pixels = shown_HW[shown_HW != IGNORE].unique(return_counts=True)
        others = classes[pixels.argsort(descending=True)[1:]]
        half = others[torch.randperm(len(others), device=others.device)[: (len(others) + 1) // 2]]
        covered_BHW[chosen.item()] = torch.isin(shown_HW, half)
    mixed_BCHW = torch.where(covered_BHW[:, None], images_BCHW.roll(1, 0), images_BCHW)
    return mixed_BCHW, torch.where(covered_BHW, before_BHW, targets_BHW)


def dice_loss(logits_BCHW: Tensor, targets_BHW: Tensor) -> Tensor:
    """1 - Dice, a mean over classes; those that are absent from the batch count nothing."""
    from segmentation_models_pytorch.losses import DiceLoss

    return DiceLoss("multiclass", ignore_index=IGNORE)(logits_BCHW, targets_BHW.long())


def resized(logits_BCHW: Tensor, size: Any) -> Tensor:
    """Logits of an image of another size."""
    if tuple(logits_BCHW.shape[-2:]) == tuple(size):
        return logits_BCHW
    return nn.functional.interpolate(logits_BCHW, tuple(size), mode="bilinear", align_corners=False)


def logits_of(
    model: nn.Module, images_BCHW: Tensor, window: tuple[int, int], how: InferenceOptions
) -> Iterator[Tensor]:
    """Logits (classes, height, width) of each image."""
    larger = any(side > 2 * most for side, most in zip(images_BCHW.shape[-2:], window, strict=True))
    if how.window == "slide" or (how.window == "auto" and larger):
        for image_CHW in images_BCHW:
            yield slid(model, image_CHW, window, how.flip)
    else:
        for logits_CHW in seen(model, images_BCHW, how.flip):
            yield enlarge(logits_CHW[None].float(), images_BCHW.shape[-2:])[0]


def seen(model: nn.Module, images_BCHW: Tensor, flip: bool) -> Tensor:
    """Logits of whole images, the mean with those of the mirrored ones where asked."""
    logits_BCHW = model(images_BCHW)
    if flip:
        logits_BCHW = (logits_BCHW + model(images_BCHW.flip(-1)).flip(-1)) / 2
    return logits_BCHW


def slid(model: nn.Module, image_CHW: Tensor, window: tuple[int, int], flip: bool) -> Tensor:
    """Logits (classes, height, width) of an image: the mean over the windows in which a pixel is seen."""
    size = image_CHW.shape[-2:]
    high, wide = (min(side, most) for side, most in zip(size, window, strict=True))
    places = [
        (..., slice(top, top + high), slice(left, left + wide))
        for top in starts(size[0], high) for left in starts(size[1], wide)
    ]  # fmt: skip
    total, times = None, image_CHW.new_zeros(size, dtype=torch.float32)
    for first in range(0, len(places), AT_ONCE):
        some = places[first : first + AT_ONCE]
        logits_BCHW = enlarge(
            seen(model, torch.stack([image_CHW[place] for place in some]), flip).float(), (high, wide)
        )
        for place, logits_CHW in zip(some, logits_BCHW, strict=True):
            total = logits_CHW.new_zeros((len(logits_CHW), *size)) if total is None else total
            total[place] += logits_CHW
            times[place] += 1
    assert total is not None
    return total / times


def starts(length: int, window: int) -> list[int]:
    """Where windows begin, so that they cover an axis and overlap by a third or more."""
    count = 1 + max(0, -(-(length - window) // max(1, int(window * STRIDE))))
    return [round(i * (length - window) / max(1, count - 1)) for i in range(count)]
