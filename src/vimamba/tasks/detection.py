"""Learning to find objects: their boxes, classes and masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.detection import MeanAveragePrecision

from vimamba.data.coco import open_coco
from vimamba.data.image_data import ImageData, Source
from vimamba.data.transforms import Preprocessing
from vimamba.errors import require
from vimamba.models.heads import build_detector, paste
from vimamba.models.heads.detection import HEADS
from vimamba.tasks.dense import DenseTask, chosen_head, scenes_or
from vimamba.tasks.options import InferenceOptions
from vimamba.tasks.results import Detections, Results

# COCO's thresholds; torchmetrics' own are rounded to float32, by which a recall of 3/5 misses 0.6.
OVERLAPS, RECALLS = np.linspace(0.5, 0.95, 10).tolist(), np.linspace(0.0, 1.0, 101).tolist()
KINDS = {"bbox": "", "segm": "mask_"}  # of overlap, and what the names of their numbers begin with


class DetectionTask(DenseTask):
    """Boxes with classes, and masks where the head has them; the best epoch by the boxes' average precision."""

    name = "detect"
    result = Detections
    monitor = "map"
    columns = {  # noqa: RUF012 - declared in the base
        "map": "AP %", "map_50": "AP50 %", "mask_map": "mask AP %", "mask_map_50": "mask AP50 %",
    }  # fmt: skip
    counted = "objects"
    scored = False
    batches = (4, 2)
    jitter = (0.1, 2.0)  # large-scale jitter (arXiv 2012.07177)
    largest = 1024
    unused = ("ignore_index", "dice", "aux_weight", "class_mix")

    @classmethod
    def source(cls) -> Source:
        return scenes_or("scenes-det", open_coco)

    @classmethod
    def builder(cls) -> Callable[..., nn.Module]:
        return build_detector

    @classmethod
    def head(cls, given: str | None, data: ImageData) -> str:
        head = chosen_head(cls.name, given, HEADS, "mask_rcnn" if data.has_masks else "faster_rcnn")
        masked = data.has_masks or "mask" not in head
        require(masked, f"`head` {head}: learns from masks, and {data.name} has none; give faster_rcnn")
        return head

    @classmethod
    def renumbered(cls, target: dict[str, Tensor], order: list[int]) -> dict[str, Tensor]:
        return {**target, "labels": torch.tensor(order, dtype=torch.int64)[target["labels"]]}

    def step(self, images: Any, targets: Any) -> Tensor:
        losses: dict[str, Tensor] = self.model(list(images), [without_crowds(target) for target in targets])
        return torch.stack([loss.float() for loss in losses.values()]).sum()

    # -- what it finds

    @classmethod
    def infer(
        cls, model: Any, images: Any, sizes: list[tuple[int, int]], prep: Preprocessing, how: InferenceOptions
    ) -> Iterator[tuple[Any, slice]]:
        """What is found in each image, in pixels of its original."""
        for row, found in enumerate(model(list(images))):
            yield [placed(found, images[row].shape[-2:], sizes[row])], slice(row, row + 1)

    @classmethod
    def metrics(cls, class_names: list[str], detailed: bool = False) -> dict[str, Metric]:
        return {"precision": AveragePrecision()}

    @classmethod
    def update(cls, evaluation: MetricCollection, outputs: Any, targets: Any) -> None:
        evaluation.update(outputs, list(targets))

    @classmethod
    def results(cls, values: dict[str, Any], class_names: list[str]) -> Results:
        numbers = {name: float(value) for name, value in values.items() if name.removeprefix("mask_").startswith("map")}
        rows = [
            {"name": name, "objects": values["objects"].get(number, 0)}
            | {column: found.get(number) for column, found in values["of_classes"].items()}
            for number, name in enumerate(class_names)
        ]
        return Results(int(values["images"]), numbers, rows)

    @classmethod
    def predictions(cls, outputs: Any, class_names: list[str]) -> list[Any]:
        return [Detections.of(found, class_names, tuple(found["size"].tolist())) for found in outputs]

    @classmethod
    def sentence(cls, share: str) -> str:
        return f"box AP {share} on the held-out images"


def without_crowds(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """The objects to learn from: a region of many has no shape of its own."""
    single_N = ~target["crowd"].bool()
    return {name: values[single_N] for name, values in target.items()}


def placed(found: dict[str, Tensor], seen: Any, size: tuple[int, int]) -> dict[str, Tensor]:
    """Detections in an image of the size that was `seen`, brought to the original's, with masks (n, height, width)."""
    high, wide = size[0] / seen[0], size[1] / seen[1]
    found = {**found, "boxes": found["boxes"] * found["boxes"].new_tensor([wide, high, wide, high])}
    masks = {"masks": paste(found, size)} if "masks" in found else {}
    return {**found, **masks, "size": torch.tensor(size)}


class AveragePrecision(MeanAveragePrecision):
    """COCO's average precision of boxes, and of masks where there are some, over all classes and of each.

    Boxes and masks are measured together: torchmetrics forgets what is found in images without objects where it is
    asked for masks alone.
    """

    images: Tensor

    def __init__(self) -> None:
        super().__init__(
            iou_type=("bbox", "segm"), iou_thresholds=OVERLAPS, rec_thresholds=RECALLS, extended_summary=True,
            backend="faster_coco_eval",
        )  # fmt: skip
        self.warn_on_many_detections = False
        self.add_state("images", torch.tensor(0), "sum")

    def update(self, outputs: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> None:
        """Take in what was found and what there is, image by image."""
        self.images += len(targets)
        if not all("masks" in one for one in (*outputs, *targets)):
            self.iou_type = ("bbox",)
        known = ("boxes", "labels", "masks", "area")
        named = [{k: one[k] for k in known if k in one} | {"iscrowd": one["crowd"].int()} for one in targets]
        super().update(outputs, named)

    def compute(self) -> dict[str, Any]:
        """Numbers by name, and `objects` and `of_classes` by class."""
        found = super().compute()
        numbers: dict[str, Any] = {"images": self.images}
        of_classes: dict[str, dict[int, float]] = {}
        for kind in self.iou_type:
            theirs, ours = "" if len(self.iou_type) == 1 else f"{kind}_", KINDS[kind]
            numbers |= {f"{ours}{name}": found[f"{theirs}{name}"] for name in ("map", "map_50", "map_75")}
            precision_TRKAM = found.get(f"{theirs}precision")  # thresholds, recalls, classes, areas, detections
            if precision_TRKAM is None:
                continue
            for name, thresholds in {"ap": slice(None), "ap_50": slice(1)}.items():
                of_class = precision_TRKAM[thresholds, :, :, 0, -1].flatten(0, 1).mean(0).tolist()
                classes = found["classes"].reshape(-1).tolist()
                known = zip(classes, of_class, strict=True)
                of_classes[f"{ours}{name}"] = {label: value for label, value in known if value >= 0}
        labels = [
            label[crowd == 0] for label, crowd in zip(self.groundtruth_labels, self.groundtruth_crowds, strict=True)
        ]
        counts = torch.cat(labels).bincount().tolist() if labels else []
        return {**numbers, "objects": dict(enumerate(counts)), "of_classes": of_classes}
