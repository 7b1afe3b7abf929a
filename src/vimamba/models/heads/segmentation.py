"""A class for each place of an image: a backbone and a decoder of segmentation-models-pytorch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vimamba.errors import UserError
from vimamba.layers.options import check_choice, check_number, check_whole
from vimamba.layers.products import in_quick_type
from vimamba.models.heads.pyramids import Backbone, DenseModel

PYRAMID_OF = {"upernet": "deconv", "fpn": "deconv", "dpt": "none", "linear": "none"}
"""Each head with the pyramid that it reads from a plain trunk by default."""
AUXILIARY_LEVEL = 2  # the map at stride 16, as in mmsegmentation


class TrainingLogits(NamedTuple):
    """What a model with an auxiliary head gives in training, each (batch, classes, rows, columns)."""

    logits: Tensor
    auxiliary: Tensor


class SegmentationModel(DenseModel):
    """Logits of classes at a quarter of the image's height and width, or as fine as the head is.

    Norms of the decoders are GroupNorm, where segmentation-models-pytorch has BatchNorm: a batch of large images may
    be one image, of which a pooled map has one place, and a map's mean over 2 or 8 images is a poor estimate.

    Args:
        backbone: gives the maps.
        classes: how many there are.
        head: "upernet" (arXiv 1807.10221), "fpn" (arXiv 1901.02446), "dpt" (arXiv 2103.13413), or "linear": one 1×1
            convolution on all maps.
        width: channels of the decoder.
        auxiliary: whether a small convolutional head on the third map learns too; by default with all but "linear".
        dropout: share of channels left out before the last convolution, in training.

    Raises:
        UserError: segmentation-models-pytorch is missing.
        ValueError: an argument is impossible.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        head: str = "upernet",
        width: int = 256,
        auxiliary: bool | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_choice("head", head, tuple(PYRAMID_OF))
        check_whole("classes", classes)
        check_whole("width", width)
        check_number("dropout", dropout, 0, 1)
        self.backbone = backbone
        self.decoder = _with_group_norms(_decoder(head, backbone, width))
        self.classifier = _classifier(self.decoder.out_channels, classes, dropout)
        self.auxiliary: nn.Module | None = None
        if auxiliary if auxiliary is not None else head != "linear":
            self.auxiliary = nn.Sequential(
                nn.Conv2d(backbone.channels[AUXILIARY_LEVEL], width, 3, padding=1, bias=False),
                _group_norm(width),
                nn.ReLU(inplace=True),
                _classifier(width, classes, dropout),
            )

    def forward(self, images_BCHW: Tensor) -> Tensor | TrainingLogits:
        """Images of any size to logits (batch, classes, height / stride, width / stride), rounded up.

        The stride is 4; of "dpt" 2, and of "linear" that of the backbone's finest map. `enlarge` gives each pixel's.
        """
        maps = self.backbone(images_BCHW)
        height, width = images_BCHW.shape[2:]

        def cropped(x_BKHW: Tensor) -> Tensor:  # the maps cover multiples of 32 pixels
            stride = maps[0].shape[2] * self.backbone.strides[0] // x_BKHW.shape[2]
            return x_BKHW[..., : math.ceil(height / stride), : math.ceil(width / stride)]

        logits = cropped(in_quick_type(self.classifier, in_quick_type(self.decoder, maps)))
        if self.auxiliary is None or not self.training:
            return logits
        return TrainingLogits(logits, cropped(in_quick_type(self.auxiliary, maps[AUXILIARY_LEVEL])))


def enlarge(logits_BKhw: Tensor, size: Sequence[int]) -> Tensor:
    """Logits of a `SegmentationModel` to (batch, classes, height, width), each at its place.

    Args:
        logits_BKhw: at a power of two of pixels, rounded up at the right and at the bottom.
        size: height and width of the images.
    """
    rows, columns = logits_BKhw.shape[2:]
    stride = 1
    while math.ceil(size[0] / stride) > rows or math.ceil(size[1] / stride) > columns:
        stride *= 2
    return F.interpolate(logits_BKhw, scale_factor=float(stride), mode="bilinear")[..., : size[0], : size[1]]


class UPerNet(nn.Module):
    """Pooling at four sizes on the last map, and a pyramid network whose levels are joined at stride 4."""

    def __init__(self, smp: Any, backbone: Backbone, width: int) -> None:
        super().__init__()
        # The first two channels are of the image and of a map at stride 2, which the decoder does not read.
        self.net = smp.upernet.decoder.UPerNetDecoder([0, 0, *backbone.channels], decoder_channels=width)
        self.out_channels = width

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps at strides 4, 8, 16, 32 to one (batch, width, height / 4, width / 4)."""
        return self.net([maps[0], maps[0], *maps])


class PanopticFPN(nn.Module):
    """A pyramid network whose levels are scaled to stride 4 and added."""

    def __init__(self, smp: Any, backbone: Backbone, width: int) -> None:
        super().__init__()
        if width % 64:
            raise ValueError(f'head="fpn" needs width to be a multiple of 64, got {width}')
        decoder = smp.fpn.decoder.FPNDecoder
        self.net = decoder(backbone.channels, pyramid_channels=width, segmentation_channels=width // 2, dropout=0.0)
        self.out_channels = width // 2

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps at strides 4, 8, 16, 32 to one (batch, width / 2, height / 4, width / 4)."""
        return self.net(maps)


class DPT(nn.Module):
    """Maps, most of one stride, made to strides 4, 8, 16 and 32 and fused from the last on."""

    def __init__(self, smp: Any, backbone: Backbone, width: int) -> None:
        super().__init__()
        self.net = smp.dpt.decoder.DPTDecoder(
            backbone.channels,
            backbone.strides,
            encoder_has_prefix_tokens=False,
            readout="ignore",
            intermediate_channels=backbone.channels,
            fusion_channels=width,
        )
        self.out_channels = width

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Four maps to one (batch, width, height / 2, width / 2)."""
        return self.net(maps, [None] * len(maps))


class Joined(nn.Module):
    """All maps at the size of the first, one after the other."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.out_channels = sum(backbone.channels)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps to one (batch, all channels, rows, columns of the first)."""
        size = maps[0].shape[2:]
        return torch.cat([x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear") for x in maps], 1)


def _decoder(head: str, backbone: Backbone, width: int) -> Any:
    if head == "linear":
        return Joined(backbone)
    try:
        from segmentation_models_pytorch import decoders
    except ModuleNotFoundError as error:
        raise UserError(
            f"the head {head} needs segmentation-models-pytorch; run pip install 'vimamba[dense]'"
        ) from error
    heads: dict[str, Any] = {"upernet": UPerNet, "fpn": PanopticFPN, "dpt": DPT}
    return heads[head](decoders, backbone, width)


def _classifier(channels: int, classes: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(channels, classes, 1))


def _group_norm(channels: int) -> nn.GroupNorm:
    """Up to 32 groups of at least 4 channels, where they can be: groups of one have no spread on a map of one place."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 4), channels), channels)


def _with_group_norms(module: Any) -> Any:
    """The module with its norms replaced."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, _group_norm(child.num_features))
        elif isinstance(child, nn.GroupNorm):
            setattr(module, name, _group_norm(child.num_channels))
        else:
            _with_group_norms(child)
    return module
