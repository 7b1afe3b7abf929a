"""Boxes and masks of objects: a backbone, a region proposal network, and one stage of box heads or a cascade of three.

On the parts of torchvision, whose label 0 is the background: `DetectionModel` shifts labels where they come and go.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    maskrcnn_inference,
    maskrcnn_loss,
    paste_masks_in_image,
)
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from vimamba.layers.options import check_choice, check_number, check_whole
from vimamba.layers.products import in_quick_type, without_slow_autocast
from vimamba.models.heads.proposals import proposal_network
from vimamba.models.heads.pyramids import STRIDES, Backbone, DenseModel, padded

LEVELS = ("0", "1", "2", "3")  # what boxes are read from; torchvision names a map more, "pool", for the largest anchors
# (IoU from which a proposal is an object's, weights of the box's four numbers, weight of the loss): of a single stage,
# arXiv 1504.08083, and of the cascade, arXiv 1712.00726.
Stage = tuple[float, tuple[float, float, float, float], float]
SINGLE: tuple[Stage, ...] = ((0.5, (10.0, 10.0, 5.0, 5.0), 1.0),)
CASCADE: tuple[Stage, ...] = (*SINGLE, (0.6, (20.0, 20.0, 10.0, 10.0), 0.5), (0.7, (30.0, 30.0, 15.0, 15.0), 0.25))
HEADS = {"faster_rcnn": (SINGLE, False), "mask_rcnn": (SINGLE, True), "cascade_mask_rcnn": (CASCADE, True)}
"""Each head's stages, and whether it gives masks."""
PUBLISHED_ANCHORS = (32, 64, 128, 256, 512)  # for images whose shorter side is 800 pixels
SMALL_IMAGE = 400  # half of that: on smaller images, the anchors are half as large

Target = dict[str, Tensor]
Detections = dict[str, Tensor]


class DetectionModel(DenseModel):
    """Objects of an image: boxes, labels and scores, and of two heads masks.

    Args:
        backbone: gives the maps; of a plain trunk with the pyramid "simple" or "deconv".
        classes: how many there are, without the background.
        head: "faster_rcnn" (arXiv 1506.01497), "mask_rcnn" (arXiv 1703.06870) or "cascade_mask_rcnn"
            (arXiv 1906.09756).
        width: channels of the maps that the heads read.
        box_width: channels of the two layers behind a box's pooled map.
        anchor_sizes: side of the anchors at strides 4, 8, 16, 32 and 64, pixels.
        proposals: how many of the boxes that the proposal network gives an image are looked at.
        rois_per_image: how many of them are learned from.
        score_threshold: the least score of a detection.
        nms: IoU from which, of two boxes of a class, the one with the lower score is dropped.
        detections: how many an image may have.

    Raises:
        ValueError: an argument is impossible.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        head: str = "faster_rcnn",
        width: int = 256,
        box_width: int = 1024,
        anchor_sizes: list[int] | None = None,
        proposals: int = 1000,
        rois_per_image: int = 512,
        score_threshold: float = 0.05,
        nms: float = 0.5,
        detections: int = 100,
    ) -> None:
        super().__init__()
        check_choice("head", head, tuple(HEADS))
        for name, value in dict(
            classes=classes, width=width, box_width=box_width, proposals=proposals, rois_per_image=rois_per_image,
            detections=detections,
        ).items():  # fmt: skip
            check_whole(name, value)
        check_number("score_threshold", score_threshold, 0, 1)
        check_number("nms", nms, 0, 1)
        if tuple(backbone.strides) != STRIDES:
            raise ValueError('detection needs maps at strides 4, 8, 16 and 32: give pyramid="simple" or "deconv"')
        self.backbone = backbone
        self.neck = _neck(backbone, width)
        self.rpn = proposal_network(width, list(PUBLISHED_ANCHORS) if anchor_sizes is None else anchor_sizes, proposals)
        stages, masks = HEADS[head]
        self.heads = RegionHeads(
            [
                RoIHeads(
                    Align(LEVELS, 7, 2), TwoMLPHead(width * 7 * 7, box_width),
                    BoxPredictor(box_width, classes + 1, own=len(stages) == 1), iou, iou, rois_per_image, 0.25,
                    weights, score_threshold, nms, detections,
                )
                for iou, weights, _ in stages
            ],
            [weight for _, _, weight in stages],
            MaskHead(width, classes + 1) if masks else None,
        )  # fmt: skip

    def forward(self, images: Sequence[Tensor], targets: Sequence[Target] | None = None) -> Any:
        """Find the objects, or in training the losses.

        Args:
            images: each (channels, height, width), of any size, normalised.
            targets: in training, of each image: boxes (n, 4), left, top, right and bottom in its pixels; labels (n,),
                classes from 0; and, where masks are learned, masks (n, height, width) of 0 and 1.

        Returns:
            In training the losses by name. Otherwise of each image: boxes (n, 4), labels (n,) and scores (n,), the
            highest first, and where there are masks, masks (n, 1, 28, 28), shares of each box, for `paste`. Those that
            follow each other and have one size are looked at together: what an image shows does not depend on padding
            that others cause.
        """
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        if not self.training and any(size != sizes[0] for size in sizes[1:]):
            return [found for _, same in groupby(images, lambda x: x.shape) for found in self(list(same))]
        batch_BCHW = _batch(images)
        maps = in_quick_type(self.neck, dict(zip(LEVELS, self.backbone(batch_BCHW), strict=True)))
        maps = {name: x_BCHW.float() for name, x_BCHW in maps.items()}  # boxes need more digits than bfloat16 has
        with without_slow_autocast(batch_BCHW):
            return self._found(batch_BCHW, sizes, maps, targets)

    def _found(
        self,
        batch_BCHW: Tensor,
        sizes: list[tuple[int, int]],
        maps: dict[str, Tensor],
        targets: Sequence[Target] | None,
    ) -> Any:
        if not self.training:
            boxes, _ = self.rpn(ImageList(batch_BCHW, sizes), maps)
            return self.heads.detect(maps, boxes, sizes)
        if targets is None:
            raise ValueError("in training, a detection model needs targets")
        wanted = [_with_background(target) for target in targets]
        boxes, losses = self.rpn(ImageList(batch_BCHW, sizes), maps, wanted)
        return {**losses, **self.heads.losses(maps, boxes, sizes, wanted)}


def paste(detections: Detections, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """The masks of an image's detections in the image, (n, height, width) of 0 and 1, uint8.

    Args:
        detections: with masks, and with boxes in pixels of an image of that size: those of the model, scaled.
        size: height and width.
        threshold: the share from which a pixel is the object's.
    """
    masks, boxes = detections["masks"], detections["boxes"]
    pasted = masks.new_zeros(len(masks), *size, dtype=torch.uint8)
    for i in range(len(masks)):  # one at a time: as floats, a hundred masks of a large image fill the memory
        pasted[i] = paste_masks_in_image(masks[i : i + 1], boxes[i : i + 1], size)[0, 0] > threshold
    return pasted


def _batch(images: Sequence[Tensor]) -> Tensor:
    """Images of several sizes as one (batch, channels, height, width), zeros at the right and at the bottom."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    return torch.stack([padded(x_CHW, height, width) for x_CHW in images])


def _with_background(target: Target) -> Target:
    """A target as torchvision has it: classes from 1, and no box without an area, whose logarithm is infinite."""
    boxes = target["boxes"].float().reshape(-1, 4)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    masks = {"masks": target["masks"][kept]} if "masks" in target else {}
    return {"boxes": boxes[kept], "labels": target["labels"].long()[kept] + 1, **masks}


class Align(MultiScaleRoIAlign):
    """RoIAlign whose scales are those of the padded batch: torchvision guesses them from the largest image."""

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Maps and boxes to (all boxes, channels, output_size, output_size)."""
        rows, columns = x[LEVELS[0]].shape[2:]
        return super().forward(x, boxes, [(rows * STRIDES[0], columns * STRIDES[0])])


class BoxPredictor(nn.Module):
    """Class logits and four numbers of a box, of each class its `own` or the same for all."""

    def __init__(self, width: int, classes: int, own: bool) -> None:
        super().__init__()
        self.cls_score = nn.Linear(width, classes)
        self.bbox_pred = nn.Linear(width, 4 * classes if own else 4)

    def forward(self, x_NC: Tensor) -> tuple[Tensor, Tensor]:
        """(boxes, width) to logits (boxes, classes) and regression (boxes, 4 * classes), float32."""
        logits, regression = self.cls_score(x_NC).float(), self.bbox_pred(x_NC).float()
        return logits, regression.repeat(1, 4 * logits.shape[1] // regression.shape[1])


class MaskHead(nn.Module):
    """A mask of 28 × 28 for each class of a box."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.align = Align(LEVELS, 14, 2)
        self.convs = MaskRCNNHeads(width, (width,) * 4, 1)
        self.predictor = MaskRCNNPredictor(width, width, classes)

    def forward(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        """Maps and boxes to logits (all boxes, classes, 28, 28), float32."""
        return self.predictor(self.convs(self.align(maps, boxes, sizes))).float()


class RegionHeads(nn.Module):
    """Stages of box heads, each of which improves the boxes of the one before, and a head for masks.

    Args:
        stages: how boxes are matched, pooled, classified, coded and, of the last, chosen.
        weights: of each stage's loss.
        mask: the head for masks, if there are any.
    """

    def __init__(self, stages: Sequence[Any], weights: Sequence[float], mask: MaskHead | None) -> None:
        super().__init__()
        self.stages, self.weights, self.mask = nn.ModuleList(stages), tuple(weights), mask

    def losses(
        self,
        maps: dict[str, Tensor],
        proposals: list[Tensor],
        sizes: list[tuple[int, int]],
        targets: list[Target],
    ) -> dict[str, Tensor]:
        """The losses by name; of several stages, their weighted sums."""
        first: Any = self.stages[0]
        boxes, matches, labels, regression = first.select_training_samples(proposals, targets)
        sampled = boxes, matches, labels
        each: list[Tensor] = []
        for i, (stage, weight) in enumerate(zip(self.stages, self.weights, strict=True)):
            if i > 0:
                labels, regression = _matched(stage, boxes, targets)
            logits, found = _predict(stage, maps, boxes, sizes)
            each.append(weight * torch.stack(fastrcnn_loss(logits, found, labels, regression)))
            if i + 1 < len(self.stages):
                boxes = _refined(stage, boxes, found.detach(), sizes)
        losses = dict(zip(("loss_classifier", "loss_box_reg"), torch.stack(each).sum(0), strict=True))
        if self.mask is not None:
            losses["loss_mask"] = self._mask_loss(maps, sizes, targets, *sampled)
        return losses

    def _mask_loss(
        self,
        maps: dict[str, Tensor],
        sizes: list[tuple[int, int]],
        targets: list[Target],
        boxes: list[Tensor],
        matches: list[Tensor],
        labels: list[Tensor],
    ) -> Tensor:
        """Of the sampled boxes that are an object's."""
        assert self.mask is not None
        objects = [label > 0 for label in labels]
        boxes, matches = ([x[own] for x, own in zip(each, objects, strict=True)] for each in (boxes, matches))
        logits = self.mask(maps, boxes, sizes)
        return maskrcnn_loss(logits, boxes, [t["masks"] for t in targets], [t["labels"] for t in targets], matches)

    def detect(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> list[Detections]:
        """The detections of each image; the scores are means over the stages."""
        scores: list[Tensor] = []
        last: Any = self.stages[-1]
        for stage in self.stages:
            logits, found = _predict(stage, maps, boxes, sizes)
            scores.append(logits.softmax(-1))
            if stage is not last:
                boxes = _refined(stage, boxes, found, sizes)
        logits = torch.stack(scores).mean(0).log()  # of which postprocess_detections takes the softmax: the means
        chosen = last.postprocess_detections(logits, found, boxes, sizes)
        results = [
            {"boxes": box, "labels": label - 1, "scores": score} for box, score, label in zip(*chosen, strict=True)
        ]
        if self.mask is not None:
            boxes, _, labels = chosen
            masks = maskrcnn_inference(self.mask(maps, boxes, sizes), labels)
            results = [{**result, "masks": mask} for result, mask in zip(results, masks, strict=True)]
        return results


def _predict(
    stage: Any, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Class logits and box regression of all images' boxes, one after the other."""
    return stage.box_predictor(stage.box_head(stage.box_roi_pool(maps, boxes, sizes)))


def _refined(stage: Any, boxes: list[Tensor], regression: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
    """The boxes that a stage with one regression for all classes makes of those it was given."""
    moved = stage.box_coder.decode(regression, boxes)[:, 0].split([len(box) for box in boxes])
    return [clip_boxes_to_image(box, size) for box, size in zip(moved, sizes, strict=True)]


def _matched(stage: Any, boxes: list[Tensor], targets: list[Target]) -> tuple[list[Tensor], list[Tensor]]:
    """Labels of boxes at a stage's IoU, and the regression to the object that each is matched with."""
    objects = [target["boxes"] for target in targets]
    matches, labels = stage.assign_targets_to_proposals(boxes, objects, [target["labels"] for target in targets])
    nearest = [own[match] if len(own) else box for own, match, box in zip(objects, matches, boxes, strict=True)]
    return labels, stage.box_coder.encode(nearest, boxes)


class Coarser(nn.Module):
    """A map more at stride 64, for the largest anchors; the others as they are."""

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """Maps by name to the same and "pool"."""
        return {**maps, "pool": F.max_pool2d(maps[LEVELS[-1]], 1, 2)}


def _neck(backbone: Backbone, width: int) -> nn.Module:
    """What gives all maps `width` channels, and adds one; the simple pyramid has them already."""
    if backbone.pyramid is not None and backbone.pyramid.kind == "simple":
        return Coarser()
    return FeaturePyramidNetwork(backbone.channels, width, LastLevelMaxPool())
