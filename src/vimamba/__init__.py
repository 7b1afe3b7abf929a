"""Vision Mamba: images through bidirectional state space models, on CPU and GPU.

Importing vimamba registers its models with timm. `train` and `load_run` need pip install 'vimamba[train]'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vimamba.layers.block import Block
from vimamba.layers.mixers import BidirectionalMixer
from vimamba.models import VisionMamba, VisionMambaPyramid, create_model, list_models, load_hustvl, quantize
from vimamba.ops import causal_conv1d, rms_norm, selective_scan
from vimamba.ops.cpu.library import onnx_library
from vimamba_command import package_version

if TYPE_CHECKING:
    from vimamba.inference.explain.maps import explain
    from vimamba.inference.predictor import load_run
    from vimamba.tasks.training import train

__version__ = package_version()
__all__ = [
    "BidirectionalMixer",
    "Block",
    "VisionMamba",
    "VisionMambaPyramid",
    "causal_conv1d",
    "create_model",
    "explain",
    "list_models",
    "load_hustvl",
    "load_run",
    "onnx_library",
    "quantize",
    "rms_norm",
    "selective_scan",
    "train",
]

# These need Lightning and others, which models and ops do without: imported when they are asked for.
_LAZY = {
    "explain": "vimamba.inference.explain.maps",
    "load_run": "vimamba.inference.predictor",
    "train": "vimamba.tasks.training",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'vimamba' has no attribute '{name}'")
    import importlib

    try:
        return getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "vimamba":
            raise
        raise ImportError(f"vimamba.{name} needs the package {error.name}; run pip install 'vimamba[train]'") from error
