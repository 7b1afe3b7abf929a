"""Where a classifier looks, as a picture."""

from __future__ import annotations

import torch

from vimamba.errors import UserError
from vimamba.inference.explain import report
from vimamba.inference.explain.frozen import require_tokens
from vimamba.inference.explain.maps import explain
from vimamba.inference.predictor import Predictor
from vimamba.tasks.overlays import in_base64
from vimamba.tasks.results import Classification

METHOD = "attention"  # which takes two forward passes


def has_heat(predictor: Predictor) -> bool:
    """Whether there is such a picture: the model is a classifier with the hidden attention of Mamba's scans."""
    try:
        require_tokens(predictor.model)
    except UserError:
        return False
    return issubclass(predictor.task.result, Classification)


def heat_of(predictor: Predictor, image_CHW: torch.Tensor) -> torch.Tensor:
    """What the answer reads of each patch, (rows, columns).

    Nothing else may use the model meanwhile: its methods are replaced.
    """
    return explain(predictor.model, image_CHW[None].to(predictor.device), METHOD)[0].cpu()


def heat_map(predictor: Predictor, image_CHW: torch.Tensor, heat_hw: torch.Tensor) -> str:
    """What the model sees of an image, with that in colour: a PNG in base64."""
    return in_base64(report.overlay(report.as_picture(image_CHW, predictor.card.preprocessing), heat_hw.numpy()))
