"""What the tokens of a model hold, how far they see, and how much each direction gives to them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from vimamba.errors import UserError, escaped, nearest, require
from vimamba.inference.explain.frozen import facing, watched
from vimamba.inference.explain.layer import Layer
from vimamba.layers.mixers import DirectionalMixer
from vimamba.models.description import create

WAYS = {"both ways": None, "forward": False, "backward": True}
"""Of directions: the arguments of `receptive_field`."""


@torch.no_grad()
def token_norms(model: Any, images: Tensor) -> Tensor:
    """The Euclidean norm of each patch behind the last block, (batch, rows, columns); outliers are what registers cure.

    Takes any model with timm's `forward_intermediates`, as all here do.
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


def receptive_field(model: Any, images: Tensor, backward: bool | None = None) -> Tensor:
    """How much the middle patch's features change with each pixel, (batch, height, width).

    The effective receptive field (arXiv 1701.04128): the gradient's absolute values, the mean of the image's channels.

    Args:
        model: any with timm's `forward_intermediates`.
        images: preprocessed.
        backward: only by the directions that run backward, or (False) forward; by all if not given.
    """
    with torch.enable_grad(), nullcontext() if backward is None else facing(model, backward):
        pixels = images.detach().clone().requires_grad_()
        features = _features(model, pixels)
        middle = features[:, :, features.shape[2] // 2, features.shape[3] // 2]
        (gradient,) = torch.autograd.grad(middle.sum(), pixels)
    return gradient.abs().mean(1)


def receptive_fields(model: Any, images: Tensor, compare: Sequence[str] = ()) -> dict[str, dict[str, Tensor]]:
    """The mean receptive field over images, (height, width), by the model's state or name and by `WAYS`.

    Args:
        model: a trained one; with initial weights it is measured too, if it can set them.
        images: preprocessed.
        compare: names of other models, which get initial weights.

    Raises:
        UserError: there is no such model, or it does not take the images.
    """
    models: dict[str, Any] = {}
    if hasattr(model, "init_weights"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            models["before training"] = copy.deepcopy(model)
            models["before training"].init_weights()
    models["after training"] = model
    models |= {f"{name}, untrained": other_model(name, images) for name in compare}
    fields = {}
    for name, each in models.items():
        several = any(isinstance(module, DirectionalMixer) for module in each.modules())
        ways = WAYS if several else {"both ways": None}
        fields[name] = {way: receptive_field(each, images, backward).mean(0) for way, backward in ways.items()}
    return fields


class Use(NamedTuple):
    """How much each direction of a layer gives."""

    names: list[str]
    shares_BG: Tensor
    gates_BG: Tensor | None
    """The mean gate of each; None where there are none."""


@torch.no_grad()
def direction_use(model: nn.Module, images: Tensor) -> list[Use]:
    """How much each direction adds to the tokens, layer by layer in the order in which they run.

    Raises:
        UserError: no layer has directions.
    """
    found: list[Use] = []

    def see(layer: Layer) -> None:
        found.append(Use(layer.names, layer.shares(), layer.gates()))

    with watched(model, see):
        model(images)
    of = type(model).__name__
    require(bool(found), f"`method` directions: a {of} has none; give receptive_field, which any model has")
    return found


def other_model(name: str, images: Tensor) -> nn.Module:
    """A model with initial weights, to be compared on these images.

    Raises:
        UserError: there is no such model, it does not take the images, or it does not show its features.
    """
    require(
        timm.is_model(name), f"`compare` {escaped(name)}: there is no such model{nearest(name, timm.list_models())}"
    )
    size = (images.shape[2], images.shape[3])
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = create(name, size, in_chans=images.shape[1], num_classes=0).eval().to(images.device)
        with torch.no_grad():
            _features(model, images[:1])
    except (AssertionError, RuntimeError, ValueError) as error:  # whatever timm's models say of a size
        said = str(error).strip().splitlines()[0]
        raise UserError(
            f"`compare` {name}: takes no images of {size[0]} × {size[1]} pixels ({said}); "
            "give one that takes any size, such as resnet18"
        ) from error
    return model


def _features(model: Any, images: Tensor) -> Tensor:
    if not hasattr(model, "forward_intermediates"):
        raise UserError(
            f"a {type(model).__name__} does not show its features: it has no forward_intermediates as timm's"
        )
    return model.forward_intermediates(images, indices=1, intermediates_only=True)[0]
