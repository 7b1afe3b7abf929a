"""The trunks, the registry of models, and their checkpoints."""

from vimamba.models.hustvl import load_hustvl
from vimamba.models.pyramid import VisionMambaPyramid
from vimamba.models.quantize import quantize
from vimamba.models.registry import create_model, list_models
from vimamba.models.vision_mamba import VisionMamba

__all__ = ["VisionMamba", "VisionMambaPyramid", "create_model", "list_models", "load_hustvl", "quantize"]
