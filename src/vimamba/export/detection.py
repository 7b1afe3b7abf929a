"""What a detector finds in one image, in operators that the runtimes know: NonMaxSuppression and RoiAlign among them.

torchvision drops boxes at every step, so that the length of every list depends on the image. Here a box that is dropped
keeps its place, with a score below all others, until the objects are chosen.

Layouts: B batch (of one), A anchors, K boxes, C classes and the background, N objects.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import clip_boxes_to_image, roi_align
from torchvision.ops.poolers import LevelMapper

from vimamba.export.outputs import normalised
from vimamba.export.source import Source
from vimamba.models.heads.detection import LEVELS, DetectionModel
from vimamba.models.heads.proposals import surest, surest_of_levels
from vimamba.models.heads.pyramids import STRIDES

DROPPED = -math.inf  # a score below all others
SMALLEST = 1e-2  # side of an object in pixels, as torchvision's
OUTPUTS = ["boxes", "labels", "scores", "masks"]

level_of = LevelMapper(2, 5)  # strides 4 to 32, as powers of two


class DetectionOutputs(nn.Module):
    """A preprocessed image (1, channels, height, width) to boxes (N, 4), labels (N,), scores (N,) and, of heads that
    have them, masks (N, 28, 28), shares of each box; the surest first.

    Args:
        source: with the model, and the size of the images.
        with_preprocessing: take uint8 RGB (1, height, width, 3).
    """

    apart_24: Tensor

    def __init__(self, source: Source, with_preprocessing: bool = False) -> None:
        super().__init__()
        assert isinstance(source.model, DetectionModel)
        self.model = source.model
        self.preprocessing = source.preprocessing if with_preprocessing else None
        self.model.rpn.anchor_generator.set_cell_anchors(torch.float32, torch.device("cpu"))
        # torch.export takes it for granted, and asserts, that two boxes or more are left: these are, before all others.
        apart_24 = torch.tensor([[-2.0, -2.0, -1.0, -1.0], [-4.0, -4.0, -3.0, -3.0]])
        self.register_buffer("apart_24", apart_24, persistent=False)

    def original(self, images: Tensor) -> tuple[Tensor, ...]:
        """What the model itself finds in an image."""
        (found,) = self.model(self._taken(images))
        masks = (found["masks"][:, 0],) if "masks" in found else ()
        return (found["boxes"], found["labels"], found["scores"], *masks)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The image to what is found in it."""
        taken_BCHW = self._taken(images)
        size, maps = taken_BCHW.shape[2:], self._maps(taken_BCHW)
        boxes_N4, labels_N, scores_N = self._objects(maps, size, *self._proposals(maps, size))
        mask: Any = self.model.heads.mask
        if mask is None:
            return boxes_N4, labels_N, scores_N
        logits_NChw = mask.predictor(mask.convs(pooled(mask.align, maps, boxes_N4))).float()
        own_N111 = (labels_N + 1)[:, None, None, None]
        masks_Nhw = logits_NChw.gather(1, own_N111.expand(-1, 1, *logits_NChw.shape[2:]))[:, 0].sigmoid()
        return boxes_N4, labels_N, scores_N, masks_Nhw

    def _taken(self, images: Tensor) -> Tensor:
        return images if self.preprocessing is None else normalised(images, self.preprocessing)

    def _maps(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        maps = self.model.neck(dict(zip(LEVELS, self.model.backbone(images_BCHW), strict=True)))
        return {name: x_BCHW.float() for name, x_BCHW in maps.items()}

    def _proposals(self, maps: dict[str, Tensor], size: Any) -> tuple[Tensor, Tensor]:
        """Boxes (K, 4) and which of them count, (K,) bool."""
        rpn: Any = self.model.rpn
        anchors = rpn.anchor_generator.of_maps([*maps.values()])
        scores_A1, deltas_A4 = concat_box_prediction_layers(*rpn.head([*maps.values()]))
        counts = [each_A4.shape[0] for each_A4 in anchors]
        rows_K, levels_K = surest_of_levels(scores_A1[:, 0], counts, rpn.pre_nms_top_n())
        boxes_K4 = rpn.box_coder.decode_single(deltas_A4[rows_K], torch.cat(anchors)[rows_K])
        boxes_K4 = clip_boxes_to_image(boxes_K4, size)
        scores_K = scores_A1[rows_K, 0].where(sides(boxes_K4) >= rpn.min_size, DROPPED)
        best = self._uncovered(boxes_K4, scores_K, levels_K, size, rpn.nms_thresh)
        uncovered_K = torch.zeros_like(scores_K).index_put((best,), torch.ones(1))
        scores_K = scores_K.where(uncovered_K > 0, DROPPED)
        rows_K = surest(scores_K, rpn.post_nms_top_n())
        return boxes_K4[rows_K], scores_K[rows_K] > DROPPED

    def _objects(
        self, maps: dict[str, Tensor], size: Any, boxes_K4: Tensor, counts_K: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The objects that are chosen of the proposals: boxes (N, 4), labels (N,) from 0 and scores (N,)."""
        scores = []
        stages: Any = self.model.heads.stages
        for stage in stages:
            logits_KC, deltas = stage.box_predictor(stage.box_head(pooled(stage.box_roi_pool, maps, boxes_K4)))
            scores.append(logits_KC.softmax(-1))
            moved = stage.box_coder.decode_single(deltas, boxes_K4).reshape(*logits_KC.shape, 4)
            moved_KC4 = clip_boxes_to_image(moved, size)
            boxes_K4 = moved_KC4[:, 0]  # what the next stage of a cascade takes
        last = stages[-1]
        scores_KC = torch.stack(scores).mean(0)[:, 1:]
        labels_KC = torch.arange(scores_KC.shape[1]).expand_as(scores_KC)
        sure_KC = (scores_KC > last.score_thresh) & counts_K[:, None] & (sides(moved_KC4[:, 1:]) >= SMALLEST)
        rows = sure_KC.flatten().nonzero()[:, 0]
        found = moved_KC4[:, 1:].reshape(-1, 4)[rows], scores_KC.reshape(-1)[rows], labels_KC.reshape(-1)[rows]
        best_N = self._uncovered(*found, size, last.nms_thresh)[: last.detections_per_img]
        boxes_N4, scores_N, labels_N = (values[best_N] for values in found)
        return boxes_N4, labels_N, scores_N

    def _uncovered(self, boxes_K4: Tensor, scores_K: Tensor, groups_K: Tensor, size: Any, overlap: float) -> Tensor:
        """The rows of the boxes that no better one of their group overlaps by more than so much, the best first.

        Runtimes differ in which of equal scores comes first, and some drop those under zero: places have neither.
        """
        order_K = surest(scores_K)
        step_11 = boxes_K4.new_full((1, 1), torch.sym_max(*size) + 1.0)
        apart_K4 = boxes_K4[order_K] + groups_K[order_K, None] * step_11
        boxes = torch.cat([self.apart_24, apart_K4])
        places = torch.arange(boxes.shape[0], 0, -1, dtype=torch.float32)
        return order_K[torch.ops.torchvision.nms(boxes, places, overlap)[2:] - 2]


def sides(boxes_K4: Tensor) -> Tensor:
    """The shorter side of each box."""
    return (boxes_K4[..., 2:] - boxes_K4[..., :2]).amin(-1)


def pooled(align: Any, maps: dict[str, Tensor], boxes_K4: Tensor) -> Tensor:
    """As `Align` does: (K, channels, rows, columns), each box from the map that suits its size."""
    rois_K5 = torch.cat([torch.zeros_like(boxes_K4[:, :1]), boxes_K4], 1)  # of image 0
    levels_K = level_of([boxes_K4])
    found = boxes_K4.new_zeros(boxes_K4.shape[0], maps[LEVELS[0]].shape[1], *align.output_size)
    for level, (name, stride) in enumerate(zip(LEVELS, STRIDES, strict=True)):
        rows = (levels_K == level).nonzero()[:, 0]
        parts = roi_align(maps[name], rois_K5[rows], align.output_size, 1 / stride, align.sampling_ratio)
        found = found.index_put((rows,), parts)
    return found
