"""What an exported graph computes: a model's outputs in the size of the images, or everything around it too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vimamba.data.transforms import Preprocessing
from vimamba.export.source import Source
from vimamba.models.heads import enlarge

WHITE = 255.0


class Outputs(nn.Module):
    """Preprocessed images (batch, channels, height, width) to logits, of a class or, to segment, of every pixel.

    Args:
        source: with the model.
        with_preprocessing: take uint8 RGB (batch, height, width, 3) and give probabilities.
    """

    def __init__(self, source: Source, with_preprocessing: bool = False) -> None:
        super().__init__()
        self.model = source.model
        self.dense = source.task == "segment"
        self.preprocessing = source.preprocessing if with_preprocessing else None

    def original(self, images: Tensor) -> Tensor:
        """What the model itself gives, which is this."""
        return self(images)

    def forward(self, images: Tensor) -> Tensor:
        """Images to logits (batch, classes) or (batch, classes, height, width), or to probabilities."""
        images_BCHW = images if self.preprocessing is None else normalised(images, self.preprocessing)
        outputs = self.model(images_BCHW)
        if self.dense:
            outputs = enlarge(outputs, images_BCHW.shape[-2:])
        return outputs if self.preprocessing is None else outputs.softmax(1)


def normalised(rgb_BHWC: Tensor, prep: Preprocessing) -> Tensor:
    """uint8 RGB images, which have their size already, as the model takes them."""
    images_BCHW = rgb_BHWC.permute(0, 3, 1, 2).float()
    if prep.in_chans == 1:  # Pillow's grey: luma by ITU-R 601 in 16 bits, rounded (exact in float32)
        red, green, blue = images_BCHW.split(1, dim=1)
        images_BCHW = ((red * 19595 + green * 38470 + blue * 7471 + 2**15) / 2**16).floor()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (prep.mean, prep.std))
    return (images_BCHW / WHITE - mean) / std
