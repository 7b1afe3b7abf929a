"""From a name, weights and arguments to a model: timm's way, and the official weights, which timm cannot read."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import torch
from timm.models import build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg
from timm.models._pretrained import PretrainedCfg
from torch import nn

from vimamba.errors import UserError
from vimamba.models.checkpoints import published_weights


def build(
    model_class: type[nn.Module],
    variant: str,
    pretrained: bool,
    default_indices: int | tuple[int, ...],
    **kwargs: Any,
) -> nn.Module:
    """What `timm.create_model` gives for the model `variant`.

    Args:
        model_class: to construct.
        variant: its name without a tag.
        pretrained: whether to load weights, from wherever the configuration says.
        default_indices: the features that features_only takes, where none are asked for.
        **kwargs: of `build_model_with_cfg` and of the model.

    Raises:
        UserError: no weights are published for the model, or they cannot be fetched.
    """
    given, overlay = kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None)
    cfg: Any = resolve_pretrained_cfg(variant, given, overlay)
    official = pretrained and _is_official(cfg)
    if official:
        cfg = dataclasses.replace(cfg, state_dict=published_weights(str(cfg.hf_hub_id), str(cfg.hf_hub_filename)))
    elif pretrained and not any((cfg.state_dict, cfg.file, cfg.url, cfg.hf_hub_id)):
        raise UserError(f"no weights are published for {variant}; leave pretrained out")
    features = {"out_indices": kwargs.pop("out_indices", default_indices), "feature_cls": "getter"}
    with torch.serialization.safe_globals([argparse.Namespace]):  # what the official files hold beside tensors
        model: Any = build_model_with_cfg(
            model_class, variant, pretrained, pretrained_cfg=cfg, feature_cfg=features, **kwargs
        )
    if official:
        for holder in (model, getattr(model, "model", None)):  # features_only holds the model itself
            if holder is not None:
                holder.pretrained_cfg.pop("state_dict", None)  # a second copy of the weights
    return model


def _is_official(cfg: PretrainedCfg) -> bool:
    """Whether the weights are one of the official pickles on the hub, and nothing else was asked for."""
    elsewhere = cfg.source in ("hf-hub", "local-dir") or cfg.state_dict or cfg.file
    return not elsewhere and bool(cfg.hf_hub_id) and str(cfg.hf_hub_filename or "").endswith(".pth")
