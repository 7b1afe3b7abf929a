"""What a run is given where nobody said: the size of the images, the batch, the epochs and the learning rate."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from timm.data import resolve_data_config
from torch import nn

from vimamba.data.decode import DecodeError
from vimamba.data.sources import ImageData
from vimamba.data.transforms import AugmentOptions, Preprocessing
from vimamba.errors import require
from vimamba.models import list_models
from vimamba.tasks.optim import OptimOptions
from vimamba.tasks.options import RunOptions
from vimamba.tasks.weights import Architecture, ModelCard

EPOCHS = 30
BATCHES = (32, 16)  # images in a step, the largest with which an epoch has enough steps
STEPS_AN_EPOCH = 16
STEPS = 600  # least, of a run: fewer leave a model of a few hundred images half taught
MOST_EPOCHS = 300
LR, LR_OF_TRAINED = (
    2e-3,
    2e-4,
)  # of a new model of WIDTH channels; trained weights are lost at the rate that new ones need
WIDTH = 64
LOOKED_AT = 32  # images of which the size is read
LARGEST_CHOSEN = 64  # pixels to which a small model's side is doubled: each doubling costs four times the time


def choose_augmentation(augment: AugmentOptions, data: ImageData) -> AugmentOptions:
    """With a kind of augmentation.

    Raises:
        UserError: what is asked for does not go with it.
    """
    kind = augment.augment
    if kind == "auto":
        kind = "crop" if data.photographs else "affine"
    unused = f"`auto_augment` {augment.auto_augment}: goes with `augment` crop, and here it is {kind}"
    require(augment.auto_augment is None or kind == "crop", unused)
    return dataclasses.replace(augment, augment=kind)


def check_unused(task: str, options: Any, names: Iterable[str] | None = None) -> None:
    """Refuse options that a task has no use for, where they are not as by default.

    Args:
        task: its name.
        options: one of the groups of arguments.
        names: those of it that the task does not know; all of them if None.

    Raises:
        UserError: one was given.
    """
    for name in [field.name for field in dataclasses.fields(options)] if names is None else names:
        given = getattr(options, name)
        require(
            given == getattr(type(options)(), name), f"`{name}` {given}: is of no use to `task` {task}; leave it out"
        )


def choose_schedule(optim: OptimOptions, images: int, batches: Sequence[int] = BATCHES) -> OptimOptions:
    """With a batch size, one of `batches`, and a number of epochs, for as many images to learn from on a device."""
    batch = optim.batch_size
    if batch is None:
        batch = next((size for size in batches if images >= size * STEPS_AN_EPOCH), batches[-1])
    epochs = optim.epochs
    if epochs is None:
        epochs = min(MOST_EPOCHS, max(EPOCHS, math.ceil(STEPS / steps_an_epoch(images, batch, optim.accumulate))))
    return dataclasses.replace(optim, batch_size=batch, epochs=epochs)


def steps_an_epoch(images: int, batch: int, accumulate: int = 1) -> int:
    """Steps in which all the images of a device are learnt from once; a part of a batch is left out."""
    return max(1, math.ceil(max(1, images // batch) / accumulate))


def choose_lr(optim: OptimOptions, model: nn.Module, trained: bool, of_run: ModelCard | None = None) -> OptimOptions:
    """With a learning rate: that of new weights falls with the width, as Adam's steps ask for (arXiv 2203.03466)."""
    if optim.lr is not None:
        return optim
    # Version 0.1 kept no rate that it chose, and gave every model the same.
    width = WIDTH if of_run and of_run.version == "0.1.0" else getattr(model, "num_features", WIDTH)
    return dataclasses.replace(optim, lr=LR_OF_TRAINED if trained else float(f"{LR * min(1.0, WIDTH / width):.2g}"))


def choose_preprocessing(options: RunOptions, data: ImageData, behind: Architecture) -> Preprocessing:
    """What the arguments say, else what the data know of themselves, else what the model was made for."""
    resolved = resolve_data_config(args={"crop_pct": None}, pretrained_cfg=behind.pretrained_cfg, verbose=False)
    in_chans = options.in_chans or data.in_chans
    trained = options.pretrained or options.checkpoint is not None
    made_for = tuple(resolved["input_size"][-2:])
    follows = not trained and behind.name.split(".")[0] in list_models()  # others of timm's may take one size only
    size = options.img_size or data.img_size or (_size_for(data, made_for) if follows else made_for)
    size = (size, size) if isinstance(size, int) else size
    if data.mean and data.std:
        mean, std = data.mean[:1] * in_chans, data.std[:1] * in_chans
    elif in_chans == len(resolved["mean"]):
        mean, std = tuple(resolved["mean"]), tuple(resolved["std"])
    else:
        mean, std = ((sum(resolved[key]) / len(resolved[key]),) * in_chans for key in ("mean", "std"))
    crop_pct = 1.0 if data.img_size else resolved["crop_pct"]
    interpolation = "bicubic" if resolved["interpolation"] == "random" else resolved["interpolation"]
    return Preprocessing(size, in_chans, mean, std, interpolation, crop_pct, resolved["crop_mode"])


def _size_for(data: ImageData, made_for: tuple[int, ...]) -> tuple[int, int]:
    """The size that a model of ours was made for, doubled or halved towards that of the images.

    Doubling keeps the number of patches whole. A model for small images would see photographs as thumbnails
    otherwise, one for photographs would see small images enlarged, which costs time and shows nothing more.
    """
    height, width = made_for
    side = typical_side(data)
    if side is None:
        return height, width
    while 2 * height <= min(side, LARGEST_CHOSEN):
        height, width = 2 * height, 2 * width
    if side <= min(height, width) // 2 and height % 32 == width % 32 == 0:
        height, width = height // 2, width // 2
    return height, width


def typical_side(data: Any) -> int | None:
    """The middle one of the short sides of some images, in pixels; None if none of them can be decoded."""
    sides = []
    for index in range(0, len(data.train), max(1, len(data.train) // LOOKED_AT)):
        try:
            sides.append(min(data.train.image(index).size))
        except DecodeError:  # said when it is its turn
            continue
    return int(statistics.median(sides)) if sides else None
