"""What the tokens of a model hold: their principal components, their norms, and how far they see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def token_norms(model: Any, images: Tensor) -> Tensor:
    """The Euclidean norm of each patch behind the last block, (batch, rows, columns); outliers are what registers cure.

    Takes any model with timm's `forward_intermediates`.
    """
    return _features(model, images).norm(dim=1)


@torch.no_grad()
def principal_colours(model: Any, images: Tensor) -> Tensor:
    """The first three principal components of each image's patches as colours 0 to 1, (batch, rows, columns, 3)."""
    features = _features(model, images)
    colours = []
    for map_DHW in features:
        points_MD = map_DHW.flatten(1).t().float()
        points_MD = points_MD - points_MD.mean(0)
        axes = torch.linalg.svd(points_MD, full_matrices=False).Vh[:3]
        axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # else either sign is as good
        placed = nn.functional.pad(points_MD @ axes.t(), (0, 3 - len(axes)))
        low, high = placed.amin(0), placed.amax(0)
        colours.append(((placed - low) / (high - low).clamp(min=1e-12)).unflatten(0, map_DHW.shape[1:]))
    return torch.stack(colours)


def receptive_field(model: Any, images: Tensor) -> Tensor:
    """The mean gradient (absolute, over images and channels) of the middle patch's features by pixels, (height, width).

    The effective receptive field (arXiv 1701.04128) of any model with timm's `forward_intermediates`.
    """
    with torch.enable_grad():
        pixels = images.detach().clone().requires_grad_()
        features = _features(model, pixels)
        middle = features[:, :, features.shape[2] // 2, features.shape[3] // 2]
        (gradient,) = torch.autograd.grad(middle.sum(), pixels)
    return gradient.abs().mean((0, 1))


def _features(model: Any, images: Tensor) -> Tensor:
    return model.forward_intermediates(images, indices=1, intermediates_only=True)[0]
