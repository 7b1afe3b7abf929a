"""Which boxes a detector looks at: a region proposal network, on the parts of torchvision.

Layouts: B batch, A anchors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from vimamba.layers.options import check_whole
from vimamba.models.heads.pyramids import STRIDES

ANCHOR_RATIOS = (0.5, 1.0, 2.0)


class Anchors(AnchorGenerator):
    """Anchors at the true strides: torchvision divides sizes, which is not the same on odd ones."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors of each image, (all places and ratios, 4)."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        return [torch.cat(self.of_maps(feature_maps))] * len(image_list.image_sizes)

    def of_maps(self, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors of each map, (places and ratios, 4)."""
        steps = [torch.tensor(STRIDES[0] << level, device=feature_maps[0].device) for level in range(len(feature_maps))]
        return self.grid_anchors([x.shape[2:] for x in feature_maps], [[step, step] for step in steps])


class Proposals(RegionProposalNetwork):
    """torchvision's, with anchors in one order on every device and in every runtime.

    torchvision orders them by sigmoids, which are equal to many digits where logits are not, and of anchors that are as
    sure as each other, as those in the padding are, it takes any: with few proposals that decides what is found.
    """

    def filter_proposals(
        self, proposals: Tensor, objectness: Tensor, image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
        """The boxes of each image that are looked at, the surest first, of all anchors', (images, anchors, 4).

        Returns:
            Each image's boxes (n, 4) and their logits (n,).
        """
        logits_BA = objectness.detach().reshape(len(proposals), -1)
        chosen = []
        for boxes_A4, logits_A, size in zip(proposals, logits_BA, image_shapes, strict=True):
            rows, levels = surest_of_levels(logits_A, num_anchors_per_level, self.pre_nms_top_n())
            boxes, logits = clip_boxes_to_image(boxes_A4[rows], size), logits_A[rows]
            kept = remove_small_boxes(boxes, self.min_size)
            kept = kept[batched_nms(boxes[kept], logits[kept], levels[kept], self.nms_thresh)]
            kept = kept[: self.post_nms_top_n()]
            chosen.append((boxes[kept], logits[kept]))
        boxes_of, logits_of = zip(*chosen, strict=True)
        return [*boxes_of], [*logits_of]


def surest_of_levels(logits_A: Tensor, counts: Sequence[int], most: int) -> tuple[Tensor, Tensor]:
    """The rows of the surest anchors, at most so many a level, and their levels; `counts` anchors has each."""
    rows, levels, first = [], [], 0
    for level, logits in enumerate(logits_A.split(list(counts))):
        rows.append(surest(logits, most) + first)
        levels.append(torch.full_like(rows[-1], level))
        first += logits.shape[0]  # of a graph of any size, not a number as len is
    return torch.cat(rows), torch.cat(levels)


def surest(scores_A: Tensor, most: int | None = None) -> Tensor:
    """The rows of the highest scores, the highest first, and of equal ones the first."""
    rows = scores_A.sort(descending=True, stable=True).indices
    return rows if most is None else rows.narrow(0, 0, torch.sym_min(most, rows.shape[0]))


class ProposalHead(RPNHead):
    """torchvision's, with results in float32 under autocast too."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps to objectness and box regression of each, float32."""
        objectness, regression = super().forward(x)
        return [o.float() for o in objectness], [r.float() for r in regression]


def proposal_network(width: int, anchor_sizes: Sequence[int], proposals: int) -> RegionProposalNetwork:
    """torchvision's, with the numbers of Faster R-CNN."""
    if len(anchor_sizes) != len(STRIDES) + 1:
        raise ValueError(f"anchor_sizes must be {len(STRIDES) + 1} numbers, from stride 4 to 64, got {anchor_sizes}")
    for size in anchor_sizes:
        check_whole("anchor_sizes", size)
    anchors = Anchors(tuple((size,) for size in anchor_sizes), (ANCHOR_RATIOS,) * len(anchor_sizes))
    count = {"training": proposals, "testing": proposals}
    return Proposals(
        anchors, ProposalHead(width, len(ANCHOR_RATIOS)), fg_iou_thresh=0.7, bg_iou_thresh=0.3,
        batch_size_per_image=256, positive_fraction=0.5, pre_nms_top_n=count, post_nms_top_n=count, nms_thresh=0.7,
    )  # fmt: skip
