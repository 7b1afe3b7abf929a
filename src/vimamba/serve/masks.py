"""Masks as small pictures for a page: transparent where there is nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from vimamba.tasks.overlays import colours, in_base64
from vimamba.tasks.results import Crop, Detections, Segmentation, is_background


def with_masks(answer: Any, top: int) -> dict[str, Any]:
    """What is added to an answer: `mask`, a picture of an image's classes in their colours, or `masks` of objects.

    An object's has the `left` and `top` pixel where its picture goes. There is none of more than 256 classes.
    """
    if isinstance(answer, Segmentation) and len(answer.class_names) <= 256:
        clear = bytes(0 if is_background(name) else 255 for name in answer.class_names)
        return {"mask": in_base64(answer.mask_image(), transparency=clear)}
    if isinstance(answer, Detections) and answer.crops is not None:
        shades = colours(answer.class_names)[answer.label_ids]
        return {"masks": [_of_object(*pair) for pair in zip(answer.crops[:top], shades[:top], strict=True)]}
    return {}


def _of_object(crop: Crop, colour_3: np.ndarray) -> dict[str, Any]:
    picture = Image.fromarray(crop.mask.astype(np.uint8) if crop.mask.size else np.zeros((1, 1), np.uint8)).convert("P")
    picture.putpalette([0, 0, 0, *colour_3.tolist()])
    return {"left": crop.left, "top": crop.top, "png": in_base64(picture, transparency=b"\x00\xff")}
