"""Vision Mamba: images through bidirectional state space models, on CPU and GPU.

Importing vimamba registers its models with timm.
"""

from vimamba.models import VisionMamba, create_model, list_models, load_hustvl
from vimamba.ops import causal_conv1d, rms_norm, selective_scan

__version__ = "0.1.0"
__all__ = [
    "VisionMamba",
    "causal_conv1d",
    "create_model",
    "list_models",
    "load_hustvl",
    "rms_norm",
    "selective_scan",
]
