"""The models by name, registered with timm, and their published weights."""

from __future__ import annotations

import math
from argparse import Namespace
from fnmatch import fnmatch
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from vimamba.errors import UserError, nearest
from vimamba.layers.embed.position import resize_pos_embed
from vimamba.layers.grid import CLASS_TOKENS
from vimamba.models.build import build
from vimamba.models.checkpoints import OfficialWeights, load_weights, read_checkpoint, state_dict_of
from vimamba.models.description import described_model
from vimamba.models.pyramid import vim_pyramid_nano, vim_pyramid_small, vim_pyramid_tiny
from vimamba.models.vision_mamba import VisionMamba

__all__ = [
    "vim_base_patch16_224",
    "vim_base_patch16_stride8_224",
    "vim_nano",
    "vim_pyramid_nano",
    "vim_pyramid_small",
    "vim_pyramid_tiny",
    "vim_small_patch16_224",
    "vim_small_patch16_stride8_224",
    "vim_tiny_patch16_224",
    "vim_tiny_patch16_stride8_224",
]


def _cfg(hub_id: str = "", filename: str = "", **kwargs: Any) -> dict[str, Any]:
    """A timm configuration; `filename` in the hub repository `hub_id` holds the published weights."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "fixed_input_size": False,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2401.09417",
        "paper_name": "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
        "origin_url": "https://github.com/hustvl/Vim",
        **({"hf_hub_id": hub_id, "hf_hub_filename": filename} if hub_id else {}),
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "vim_tiny_patch16_224.in1k": _cfg("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_76p1acc.pth"),
        "vim_tiny_patch16_stride8_224.in1k": _cfg("hustvl/Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth"),
        "vim_small_patch16_224.in1k": _cfg("hustvl/Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth"),
        "vim_small_patch16_stride8_224.in1k": _cfg("hustvl/Vim-small-midclstok", "vim_s_midclstok_ft_81p6acc.pth"),
        "vim_base_patch16_224.in1k": _cfg("hustvl/Vim-base-midclstok", "vim_b_midclstok_81p9acc.pth"),
        "vim_base_patch16_stride8_224.untrained": _cfg(),
        "vim_nano.untrained": _cfg(input_size=(3, 28, 28), crop_pct=1.0, num_classes=10),
    }
)


def convert_checkpoint(
    contents: dict[str, Any], model: nn.Module, grid: tuple[int, ...] | None = None
) -> dict[str, Tensor]:
    """An official or our own checkpoint as a state dict for `model`, its position embedding resized to the model's.

    `grid` is the rows and columns that the embedding covers, for a file that is described as something larger.

    Raises:
        UserError: the position embedding is of another size, and nothing tells which rows and columns it covers.
    """
    tensors = {k: v for k, v in state_dict_of(contents).items() if not k.startswith("rope.")}
    pos_embed = tensors.get("pos_embed")
    if not isinstance(model, VisionMamba) or model.pos_embed is None or pos_embed is None:
        return tensors
    if pos_embed.ndim != 3 or pos_embed.shape[2] != model.embed_dim:
        return tensors  # of another model, which loading says best
    grid = grid or _trained_grid(contents, pos_embed.shape[1] - CLASS_TOKENS[model.class_token], tensors)
    if grid is None and pos_embed.shape != model.pos_embed.shape:
        raise UserError(
            f"pos_embed is for {pos_embed.shape[1]} tokens and the model has {model.pos_embed.shape[1]}, and a bare "
            "state dict does not tell which rows and columns they cover: build the model with the img_size that it was "
            "trained at, load it, and call model.set_input_size"
        )
    if grid is not None:
        tensors["pos_embed"] = resize_pos_embed(pos_embed, grid, model.grid, model.class_token)
    return tensors


def _trained_grid(contents: dict[str, Any], patches: int, tensors: dict[str, Tensor]) -> tuple[int, ...] | None:
    """Rows and columns of patches that a checkpoint's position embedding covers, where the checkpoint tells."""
    if contents.get("vimamba") is not None:
        described = described_model(contents["vimamba"], tensors)
        return described.grid if isinstance(described, VisionMamba) else None
    official = isinstance(contents, OfficialWeights) or isinstance(contents.get("args"), Namespace)
    side = math.isqrt(max(patches, 0))  # the official code trains on square images only
    return (side, side) if official and side * side == patches else None


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build(VisionMamba, variant, pretrained, 3, pretrained_filter_fn=convert_checkpoint, **kwargs)


@register_model
def vim_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """For small images: patches of 4 pixels that overlap by one."""
    sizes = dict(img_size=28, patch_size=4, stride=3, embed_dim=64, depth=6, num_classes=10)
    return _create("vim_nano", pretrained, **{**sizes, **kwargs})


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-Ti."""
    return _create("vim_tiny_patch16_224", pretrained, **{**dict(embed_dim=192), **kwargs})


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-Ti fine-tuned on overlapping patches."""
    return _create("vim_tiny_patch16_stride8_224", pretrained, **{**dict(embed_dim=192, stride=8), **kwargs})


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-S."""
    return _create("vim_small_patch16_224", pretrained, **{**dict(embed_dim=384), **kwargs})


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-S fine-tuned on overlapping patches."""
    return _create("vim_small_patch16_stride8_224", pretrained, **{**dict(embed_dim=384, stride=8), **kwargs})


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-B."""
    return _create("vim_base_patch16_224", pretrained, **{**dict(embed_dim=768), **kwargs})


@register_model
def vim_base_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-B on overlapping patches."""
    return _create("vim_base_patch16_stride8_224", pretrained, **{**dict(embed_dim=768, stride=8), **kwargs})


def list_models(filter: str = "*") -> list[str]:
    """Names of vimamba's models, those that match the shell pattern `filter`."""
    return [name for name in __all__ if fnmatch(name, filter)]


def create_model(name: str, pretrained: bool = False, checkpoint_path: str = "", **kwargs: Any) -> nn.Module:
    """Build a model by its name, vimamba's or any of timm's.

    Args:
        name: as `list_models` or `timm.list_models` gives it.
        pretrained: load the published weights, from the cache or the hub.
        checkpoint_path: load these weights instead, .safetensors or a PyTorch file; code in it is never run.
        **kwargs: for the model: num_classes, in_chans, img_size, drop_path_rate ...

    Raises:
        UserError: the model is unknown, or the weights cannot be read or do not fit.
    """
    if ":" not in name and not timm.is_model(name):
        known = [*__all__, *timm.list_models()]
        raise UserError(f"model {name!r} is unknown{nearest(name, known)}")
    model = timm.create_model(name, pretrained=pretrained and not checkpoint_path, **kwargs)
    if checkpoint_path:
        load_weights(model, convert_checkpoint(read_checkpoint(checkpoint_path), model), checkpoint_path)
    return model


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model learns."""
    return sum(p.numel() for p in model.parameters())


def count_flops(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Floating-point operations of a forward pass over one image (channels, height, width), of any model.

    Products and sums count as two; a state update of the scan as nine, as the Mamba authors count. Nothing is computed.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    shapes_only = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), shapes_only, FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *input_size, device=device))
    return counter.get_total_flops()
