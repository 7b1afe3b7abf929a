"""What is exported: a model with its classes and its preprocessing, of a run, of the official code, or by its name."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, resolve_data_config
from torch import nn

from vimamba.data.transforms import Preprocessing
from vimamba.errors import UserError, one_line, require
from vimamba.models import create_model, load_hustvl
from vimamba.models.checkpoints import read_checkpoint
from vimamba.models.registry import default_cfgs
from vimamba.tasks.weights import load_model

IMAGENET_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Source:
    """A model in evaluation mode, and what must be known to use it."""

    model: nn.Module
    name: str
    task: str
    class_names: list[str]
    preprocessing: Preprocessing
    license: str | None = None
    """Of the weights, where it is known."""
    of_run: bool = False
    """Whether it knows what it was trained on."""

    def sized(self, img_size: int | tuple[int, int] | None) -> Source:
        """The same for images of another size, pixels.

        Raises:
            UserError: the model cannot take it.
        """
        height, width = size = _pair(img_size) or self.preprocessing.img_size
        try:
            prep = dataclasses.replace(self.preprocessing, img_size=size)
            resizable: Any = self.model
            if size != self.preprocessing.img_size and hasattr(resizable, "set_input_size"):
                resizable.set_input_size(size)
            with torch.inference_mode():
                self.model(torch.zeros(1, prep.in_chans, height, width))
        except (ValueError, RuntimeError, AssertionError) as error:
            raise UserError(f"`img_size` {height} x {width}: the model cannot take it ({one_line(error)})") from error
        return dataclasses.replace(self, preprocessing=prep)


def load_source(
    source: Source | str | os.PathLike[str], checkpoint: str | os.PathLike[str] | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> Source:  # fmt: skip
    """The model that `source` stands for.

    Args:
        source: a run's folder, its model.safetensors or one of its checkpoints; a checkpoint of the official code; or
            the name of a model. What this function gave is given back.
        checkpoint: weights of the model of that name.
        model_args: keyword arguments of the model of that name, or of `load_hustvl`.

    Raises:
        UserError: it is none of these, or the weights are not the model's.
    """
    if isinstance(source, Source):
        return source
    path, given = Path(source), dict(model_args or {})
    if checkpoint is not None or (not path.exists() and timm.is_model(str(source).split(".")[0])):
        require(checkpoint is not None, f"{source}: is a model's name; give its weights with `checkpoint`")
        return _of_model(_built(str(source), checkpoint, given), str(source))
    contents = read_checkpoint(path) if path.is_file() else {}
    if not contents or "vimamba" in contents:
        require(not given, "`model_args`: a run knows its own; leave it out")
        model, card = load_model(path)
        return Source(model, card.model, card.task, card.class_names, card.preprocessing, of_run=True)
    try:
        model = load_hustvl(path, **given)
    except UserError as error:
        raise UserError(f"{error}; the weights of another model are given with its name and `checkpoint`") from error
    return _of_model(model, "hustvl/Vim", _OFFICIAL_CFG)


_OFFICIAL_CFG = default_cfgs["vim_tiny_patch16_224"].default.to_dict()
"""What all published models have in common: their preprocessing and their licence."""


def _built(name: str, checkpoint: Any, model_args: dict[str, Any]) -> nn.Module:
    try:
        return create_model(name, checkpoint_path=os.fspath(checkpoint), **model_args).eval()
    except (TypeError, ValueError, RuntimeError) as error:
        known = isinstance(error, UserError)
        raise error if known else UserError(f"{name} with `model_args` {model_args}: {one_line(error)}") from error


def _of_model(model: Any, name: str, cfg: Mapping[str, Any] | None = None) -> Source:
    """A classifier without a description of its own."""
    cfg = cfg or getattr(model, "pretrained_cfg", None) or {}
    resolved = resolve_data_config({"crop_pct": None}, pretrained_cfg=dict(cfg), verbose=False)
    in_chans = getattr(model, "in_chans", None) or resolved["input_size"][0]
    mean, std = ((*resolved[key],) if in_chans == 3 else (sum(resolved[key]) / 3,) for key in ("mean", "std"))
    size = _pair(getattr(model, "img_size", None)) or tuple(resolved["input_size"][-2:])
    prep = Preprocessing(size, in_chans, mean, std, resolved["interpolation"], resolved["crop_pct"])
    count = model.num_classes
    require(count > 0, f"{name}: has no classifier; there is nothing to export")
    names = ImageNetInfo().label_descriptions() if count == IMAGENET_CLASSES else map(str, range(count))
    return Source(model, name, "classification", [*names], prep, cfg.get("license"))


def _pair(size: Any) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else None if size is None else (int(size[0]), int(size[1]))
