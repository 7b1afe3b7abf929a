"""Where a classifier looks, as a picture."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch

from vimamba.errors import UserError
from vimamba.inference.explain import report
from vimamba.inference.explain.frozen import require_tokens
from vimamba.inference.explain.maps import explain
from vimamba.inference.predictor import Predictor
from vimamba.tasks.results import Classification

METHOD = "attention"  # which takes two forward passes


def has_heat(predictor: Predictor) -> bool:
    """Whether there is such a picture: the model is a classifier with the hidden attention of Mamba's scans."""
    try:
        require_tokens(predictor.model)
    except UserError:
        return False
    return issubclass(predictor.task.result, Classification)


def heat_map(predictor: Predictor, image_CHW: torch.Tensor) -> dict[str, Any]:
    """What the model sees of an image, the patches that its answer reads in colour: a PNG in base64.

    Nothing else may use the model meanwhile: its methods are replaced.
    """
    map_hw = explain(predictor.model, image_CHW[None].to(predictor.device), METHOD)[0].cpu().numpy()
    picture = report.overlay(report.as_picture(image_CHW, predictor.card.preprocessing), map_hw)
    file = io.BytesIO()
    picture.save(file, "png")
    return {"heat_map": base64.b64encode(file.getvalue()).decode()}
