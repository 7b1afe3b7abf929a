"""What segmenting and detecting have in common: images of any size, a head on the features of a trunk."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any, ClassVar

from torch import nn

from vimamba.data.image_data import ImageData, Opening, Source
from vimamba.data.loaders import Transforms
from vimamba.data.scenes import open_scenes
from vimamba.data.sources import BUILT_IN
from vimamba.data.transforms import AugmentOptions, Preprocessing, dense_eval_transform, dense_train_transform
from vimamba.errors import require
from vimamba.tasks.defaults import check_unused, choose_augmentation, choose_preprocessing, typical_side
from vimamba.tasks.task import Choice, Task

TRUNK = "backbone.trunk."  # where timm's model stands in one with a head
UNUSED = ("crop_scale", "auto_augment", "random_erasing", "mixup", "cutmix", "label_smoothing")  # of the augmentation
STEP = 32  # pixels of the coarsest map's stride: a chosen size is a multiple


class DenseTask(Task):
    """A task whose model is a trunk of timm's with a head, and whose targets lie in the image."""

    batches = (8, 4)
    eval_batch = 8
    jitter: ClassVar[tuple[float, float]]  # by what images are scaled in training
    largest: ClassVar[int]  # pixels of the side of what it learns from, if no size is given
    unused: ClassVar[tuple[str, ...]] = ()  # of the options of dense tasks

    @classmethod
    def builder(cls) -> Callable[..., nn.Module]:
        """Makes the model: (name, model_args, classes, in_chans, img_size, head_args, pretrained)."""
        raise NotImplementedError(f"{cls.__name__} does not say how its model is built")

    @classmethod
    def head(cls, given: str | None, data: ImageData) -> str:
        """The kind of the head, the one asked for or one for these data."""
        raise NotImplementedError(f"{cls.__name__} has no heads")

    @classmethod
    def choose(cls, config: Any, data: ImageData, behind: Any) -> Choice:
        dense, augment = config.dense, config.augment
        check_unused(cls.name, augment, UNUSED)
        check_unused(cls.name, dense, cls.unused)
        run = config.run
        if run.img_size is None:
            side = typical_side(data) or cls.largest
            run = dataclasses.replace(run, img_size=min(cls.largest, max(STEP, side // STEP * STEP)))
        prep = choose_preprocessing(run, data, behind)
        prep = dataclasses.replace(
            prep, crop_pct=1.0, crop_mode="center", short_side=dense.short_side, long_side=dense.long_side
        )
        augment = choose_augmentation(augment, data)
        augment = dataclasses.replace(augment, scale_jitter=augment.scale_jitter or cls.jitter)
        return Choice(prep, augment, {"head": cls.head(dense.head, data), **dense.head_args})

    @classmethod
    def transforms(cls, prep: Preprocessing, augment: AugmentOptions) -> Transforms:
        return Transforms(dense_train_transform(prep, augment), dense_eval_transform(prep))

    @classmethod
    def outputs(cls, class_names: list[str]) -> int:
        return len(class_names)

    @classmethod
    def build(cls, card: Any, pretrained: bool = False) -> nn.Module:
        prep, classes = card.preprocessing, cls.outputs(card.class_names)
        of_trunk = {"in_chans": prep.in_chans, "img_size": prep.img_size, "pretrained": pretrained}
        return cls.builder()(card.model, card.model_args, classes, head_args=card.head, **of_trunk)

    @classmethod
    def trunk(cls, model: Any) -> tuple[nn.Module, str]:
        return model.backbone.trunk, TRUNK


def chosen_head(task: str, given: str | None, heads: Collection[str], default: str) -> str:
    """The head asked for, or the default.

    Raises:
        UserError: the task has no such head.
    """
    known = given is None or given in heads
    require(known, f"`head` {given}: `task` {task} has {', '.join(heads)}")
    return given or default


def scenes_or(scenes: str, folders: Source) -> Source:
    """The built-in sample of that name, and everything else by `folders`."""
    return functools.partial(_open, scenes=scenes, folders=folders)


def _open(name: str, opening: Opening, scenes: str, folders: Source) -> ImageData:
    if name == scenes:
        for option in ("class_names", "ignore_index"):
            given = getattr(opening, option)
            require(given is None, f"`{option}` {given}: is for masks of one's own; {name} says what its classes are")
        return open_scenes(name)
    require(name not in BUILT_IN, f"`data` {name}: is of another task; give {scenes} or a folder")
    return folders(name, opening)
