"""Models of dense tasks: a backbone with a head, built from plain values, as a file of weights holds them."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from vimamba.errors import UserError, nearest, one_line, shown
from vimamba.kinds import describe, fits
from vimamba.models.heads.detection import PUBLISHED_ANCHORS, SMALL_IMAGE, DetectionModel, paste
from vimamba.models.heads.pyramids import Backbone, DenseModel
from vimamba.models.heads.segmentation import PYRAMID_OF, SegmentationModel, TrainingLogits, enlarge

__all__ = [
    "Backbone",
    "DetectionModel",
    "SegmentationModel",
    "TrainingLogits",
    "build_detector",
    "build_segmenter",
    "enlarge",
    "paste",
]

M = TypeVar("M", bound=DenseModel)
OF_BACKBONE: dict[str, Any] = {"pyramid": Literal["deconv", "simple", "none"], "layers": list[int] | None}


def build_segmenter(
    name: str,
    model_args: Mapping[str, Any],
    classes: int,
    in_chans: int,
    img_size: tuple[int, int] | None,
    head_args: Mapping[str, Any],
    pretrained: bool = False,
) -> SegmentationModel:
    """A model that gives each place of an image a class.

    Args:
        name: of the trunk, vimamba's or any of timm's.
        model_args: further arguments of the trunk.
        classes: how many there are.
        in_chans: image channels.
        img_size: height and width that images usually have, pixels.
        head_args: plain values, of `SegmentationModel`: head, width, auxiliary, dropout; and of `Backbone`: pyramid,
            layers.
        pretrained: load the trunk's published weights.

    Raises:
        UserError: one of `head_args` is unknown or impossible, or does not go with the trunk.
    """
    args = _checked(SegmentationModel, head_args)
    pyramid = PYRAMID_OF.get(args.get("head", "upernet"), "deconv")
    trunk = dict(name=name, in_chans=in_chans, img_size=img_size, model_args=model_args, pretrained=pretrained)
    return _built(SegmentationModel, trunk, pyramid, classes, args)


def build_detector(
    name: str,
    model_args: Mapping[str, Any],
    classes: int,
    in_chans: int,
    img_size: tuple[int, int] | None,
    head_args: Mapping[str, Any],
    pretrained: bool = False,
) -> DetectionModel:
    """A model that finds objects.

    Args:
        name: of the trunk, vimamba's or any of timm's.
        model_args: further arguments of the trunk.
        classes: how many there are, without the background.
        in_chans: image channels.
        img_size: height and width that images usually have, pixels; anchors are half as large by default where the
            longer one is under 400.
        head_args: plain values, of `DetectionModel`: head, width, box_width, anchor_sizes ...; and of `Backbone`:
            pyramid, layers.
        pretrained: load the trunk's published weights.

    Raises:
        UserError: one of `head_args` is unknown or impossible, or does not go with the trunk.
    """
    args = _checked(DetectionModel, head_args)
    if args.get("anchor_sizes") is None and img_size and max(img_size) < SMALL_IMAGE:
        args["anchor_sizes"] = [size // 2 for size in PUBLISHED_ANCHORS]
    trunk = dict(name=name, in_chans=in_chans, img_size=img_size, model_args=model_args, pretrained=pretrained)
    return _built(DetectionModel, trunk, "simple", classes, args)


def _checked(model: type[DenseModel], head_args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, each of its kind.

    Raises:
        UserError: one is not, named.
    """
    kinds = typing.get_type_hints(model.__init__)
    kinds = {**{k: v for k, v in kinds.items() if k not in ("backbone", "classes", "return")}, **OF_BACKBONE}
    for name, value in head_args.items():
        if name not in kinds:
            raise UserError(f"`head_args` has {shown(name)}, which is no argument of the head{nearest(name, kinds)}")
        if not fits(kinds[name], value, texts=False):
            raise UserError(f"`head_args` has {name}={shown(value)}; it must be {describe(kinds[name])}")
    return dict(head_args)


def _built(model: type[M], trunk: dict[str, Any], pyramid: str, classes: int, args: dict[str, Any]) -> M:
    """The model; `pyramid` is what a plain trunk gets unless `args` say otherwise.

    Raises:
        UserError: an argument is impossible.
    """
    asked = args.pop("pyramid", None)
    of_maps = {name: args[name] for name in ("width",) if name in args}
    try:
        backbone = Backbone(**trunk, pyramid=asked or pyramid, layers=args.pop("layers", None), **of_maps)
        if asked is not None and backbone.hierarchical:
            raise UserError(f"{trunk['name']} has maps at all strides by itself: leave `pyramid` out")
        return model(backbone, classes=classes, **args)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(one_line(error)) from error
