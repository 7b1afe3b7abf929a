"""Maps over an image of what a classifier's answer rests on: `vimamba.explain`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vimamba.errors import UserError, nearest, require
from vimamba.inference.explain.attention import attention, grid_layout, in_parts, look, rollout, to_grid, to_places
from vimamba.inference.explain.frozen import frozen, require_tokens, watched
from vimamba.inference.explain.layer import Layer
from vimamba.inference.explain.tokens import direction_use, principal_colours, receptive_field, token_norms
from vimamba.layers.grid import split_tokens, token_layout
from vimamba.models.token_model import TokenModel

IG_STEPS = 32  # points of the integral; captum's 50 changes a map's order of pixels little


def explain(
    model: nn.Module, images: Tensor, method: str = "attribution", target: Sequence[int] | None = None
) -> Tensor:
    """What in images a classifier's answer rests on, or what the model holds of them.

    Args:
        model: a classifier in evaluation mode; "gradcam" takes any VisionMamba, "directions" any model with our mixers,
            "attribution", "attention" and "rollout" a VisionMamba over the recurrence mamba, the others any model of
            ours or timm's, and "integrated_gradients" any at all.
        images: preprocessed, (batch, in_chans, height, width), of any size that the model takes.
        method: "attribution" (what each patch adds to the logit, beside the image's mean colour: their difference times
            the gradient, with delta, B, C, gates and norms held constant), "attention" (the hidden attention of the
            token that is read, mean of the layers), "rollout" (the same through all layers), "gradcam" or
            "integrated_gradients"; or what asks about no answer: "token_norms", "principal_components",
            "receptive_field" or "directions", see `tokens`.
        target: the class of each image that is asked about; the likeliest if not given. Attention asks about none.

    Returns:
        (batch, rows, columns), a value for each patch as it lies in the image; for "integrated_gradients" and
        "receptive_field" one for each pixel; for "principal_components" a colour, (batch, rows, columns, 3); for
        "directions" the share of each, (batch, layers, directions).

    Raises:
        UserError: there is no such method, it does not fit the model, its package is missing, or a class is unknown.
    """
    require(method in METHODS, f"`method` {method}: give {', '.join(METHODS)}{nearest(method, METHODS)}")
    require(images.dim() == 4, f"`images`: give (batch, channels, height, width), got {tuple(images.shape)}")
    if method in PROPERTIES:
        return PROPERTIES[method](model, images).detach()
    classes = _classes(model, images, target) if method not in UNASKED else torch.zeros(len(images), dtype=torch.long)
    return MAPS[method](model, images, classes).detach()


def reshape_transform(model: TokenModel, size: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """For pytorch-grad-cam: the tokens (batch, length, dim) of images of this height and width to maps of patches.

    It knows where class and register tokens stand, and leaves them out.
    """
    layout = token_layout(model.class_token, model.patch_embed.grid_size(tuple(size)), model.num_registers)

    def to_map(tokens: Tensor) -> Tensor:
        return split_tokens(tokens, layout.extras)[0].transpose(1, 2).unflatten(2, layout.grid)

    return to_map


def _classes(model: nn.Module, images: Tensor, target: Sequence[int] | None) -> Tensor:
    if target is None:
        with torch.no_grad():
            return model(images).argmax(1)
    count = getattr(model, "num_classes", None)
    for number in target:
        require(
            0 <= number < (count or number + 1), f"`target` {number}: the model has the classes 0 to {(count or 1) - 1}"
        )
    require(len(target) == len(images), f"`target`: {len(target)} classes for {len(images)} images; give one for each")
    return torch.tensor(list(target), device=images.device)


def _attribution(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    tokens_model, pixels = require_tokens(model), images.detach().requires_grad_()
    with torch.enable_grad(), frozen(tokens_model):
        logits = tokens_model(pixels)
        score = logits.gather(1, classes[:, None]).sum() - logits.mean(1).sum()
        (gradient,) = torch.autograd.grad(score, pixels)
    values_BHW = ((images - images.mean((2, 3), keepdim=True)) * gradient).sum(1)
    return in_parts(values_BHW, tokens_model.patch_embed.grid_size(tuple(images.shape[2:])))


def _attention(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    found, rows = require_tokens(model), []

    def see(layer: Layer) -> None:
        row_BL = attention(found, layer)[:, -1]
        rows.append(to_grid(row_BL / row_BL.sum(-1, keepdim=True), grid_layout(layer)))

    with torch.no_grad(), watched(found, see):
        found(images)
    return to_places(torch.stack(rows).mean(0), found, images.shape[2:])


def _rollout(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    found = require_tokens(model)
    layers = look(found, images)
    return to_places(to_grid(rollout(found, layers), grid_layout(layers[0])), found, images.shape[2:])


def _gradcam(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    if not isinstance(model, TokenModel):
        raise UserError(
            f"`method` gradcam: takes a VisionMamba, not a {type(model).__name__}; give integrated_gradients"
        )
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ModuleNotFoundError as error:
        raise UserError("`method` gradcam: needs the package grad-cam; run pip install 'vimamba[explain]'") from error
    # The last block's input to its mixer: of what comes behind it, a class token would read nothing but itself.
    layer = model.layers[-1].norm
    to_map = reshape_transform(model, images.shape[2:])
    targets = [ClassifierOutputTarget(int(number)) for number in classes]
    with GradCAM(model, [layer], reshape_transform=to_map) as cam, torch.enable_grad():
        shown = torch.from_numpy(cam(images, targets))
    grid = token_layout(model.class_token, model.patch_embed.grid_size(tuple(images.shape[2:]))).grid
    maps = torch.nn.functional.interpolate(shown[:, None], grid, mode="area")[:, 0]
    # A mean, where the other methods' values are parts of a sum.
    held = to_places(torch.ones_like(maps), model, images.shape[2:])
    return to_places(maps, model, images.shape[2:]) / held


def _integrated_gradients(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    try:
        from captum.attr import IntegratedGradients
    except ModuleNotFoundError as error:
        raise UserError(
            "`method` integrated_gradients: needs the package captum; run pip install 'vimamba[explain]'"
        ) from error
    with torch.enable_grad():
        found = IntegratedGradients(model).attribute(
            images, target=classes, n_steps=IG_STEPS, internal_batch_size=len(images)
        )
    return found.sum(1)


def _directions(model: nn.Module, images: Tensor) -> Tensor:
    shares = [use.shares_BG for use in direction_use(model, images)]
    most = max(each.shape[1] for each in shares)
    return torch.stack([torch.nn.functional.pad(each, (0, most - each.shape[1])) for each in shares], 1)


MAPS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "attribution": _attribution,
    "attention": _attention,
    "rollout": _rollout,
    "gradcam": _gradcam,
    "integrated_gradients": _integrated_gradients,
}
"""What an answer rests on, by name: (model, images, classes) to maps (batch, rows, columns)."""
UNASKED = ("attention", "rollout")
"""Those that are the same for all classes."""
PROPERTIES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "token_norms": token_norms,
    "principal_components": principal_colours,
    "receptive_field": receptive_field,
    "directions": _directions,
}
"""What a model holds of images, by name: (model, images) to a tensor."""
METHODS = (*MAPS, *PROPERTIES)
